/* A plugin whose every call fails with the error number offset / 512. */
#define NBDKIT_API_VERSION 2
#include <nbdkit-plugin.h>
#include <stdlib.h>

#define THREAD_MODEL NBDKIT_THREAD_MODEL_PARALLEL

static void *
errors_open (int readonly)
{
  return NBDKIT_HANDLE_NOT_NEEDED;
}

static int64_t
errors_get_size (void *handle)
{
  return 1 << 20;
}

static int
yes (void *handle)
{
  return 1;
}

static int
native (void *handle)
{
  return NBDKIT_FUA_NATIVE;
}

static int
native_cache (void *handle)
{
  return NBDKIT_CACHE_NATIVE;
}

static int
fail (uint64_t offset)
{
  nbdkit_error ("error number %d", (int) (offset / 512));
  nbdkit_set_error (offset / 512);
  return -1;
}

static int
errors_pread (void *handle, void *buf, uint32_t count, uint64_t offset, uint32_t flags)
{
  return fail (offset);
}

static int
errors_pwrite (void *handle, const void *buf, uint32_t count, uint64_t offset, uint32_t flags)
{
  return fail (offset);
}

static int
errors_range (void *handle, uint32_t count, uint64_t offset, uint32_t flags)
{
  return fail (offset);
}

static struct nbdkit_plugin plugin = {
  .name = "errors",
  .version = "1",
  .open = errors_open,
  .get_size = errors_get_size,
  .can_fua = native,
  .can_fast_zero = yes,
  .can_cache = native_cache,
  .pread = errors_pread,
  .pwrite = errors_pwrite,
  .trim = errors_range,
  .zero = errors_range,
  .cache = errors_range,
};

NBDKIT_REGISTER_PLUGIN (plugin)
