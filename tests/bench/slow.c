//go:build ignore

/* A plugin whose reads and writes take a millisecond. */
#include <string.h>
#include <time.h>

#define NBDKIT_API_VERSION 2
#include <nbdkit-plugin.h>

#define THREAD_MODEL NBDKIT_THREAD_MODEL_PARALLEL

static void *
slow_open (int readonly)
{
  return NBDKIT_HANDLE_NOT_NEEDED;
}

static int64_t
slow_get_size (void *handle)
{
  return 64 << 20;
}

static void
wait_a_millisecond (void)
{
  struct timespec t = { 0, 1000000 };

  while (nanosleep (&t, &t) == -1)
    ;
}

static int
slow_pread (void *handle, void *buf, uint32_t count, uint64_t offset, uint32_t flags)
{
  wait_a_millisecond ();
  memset (buf, 'x', count);
  return 0;
}

static int
slow_pwrite (void *handle, const void *buf, uint32_t count, uint64_t offset, uint32_t flags)
{
  wait_a_millisecond ();
  return 0;
}

static struct nbdkit_plugin plugin = {
  .name = "slow",
  .open = slow_open,
  .get_size = slow_get_size,
  .pread = slow_pread,
  .pwrite = slow_pwrite,
};

NBDKIT_REGISTER_PLUGIN (plugin)
