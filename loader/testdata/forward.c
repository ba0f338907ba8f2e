/* A filter that passes reads and writes on. */
#include <nbdkit-filter.h>

static int
f_pread (nbdkit_next *next, void *handle, void *buf, uint32_t count,
         uint64_t offset, uint32_t flags, int *err)
{
  return next->pread (next, buf, count, offset, flags, err);
}

static int
f_pwrite (nbdkit_next *next, void *handle, const void *buf, uint32_t count,
          uint64_t offset, uint32_t flags, int *err)
{
  return next->pwrite (next, buf, count, offset, flags, err);
}

static struct nbdkit_filter filter = {
  .name = "forward", .pread = f_pread, .pwrite = f_pwrite,
};

NBDKIT_REGISTER_FILTER (filter)
