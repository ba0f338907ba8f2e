//go:build ignore

/* A plugin whose reads and writes take a millisecond, or one in N takes US microseconds
 * and the others nothing: every=N us=US; us=0 for none.
 */
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define NBDKIT_API_VERSION 2
#include <nbdkit-plugin.h>

#ifndef THREAD_MODEL
#define THREAD_MODEL NBDKIT_THREAD_MODEL_PARALLEL
#endif

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

static unsigned every = 1, us = 1000, calls;

static int
slow_config (const char *key, const char *value)
{
  if (strcmp (key, "every") == 0)
    every = atoi (value);
  else
    us = atoi (value);
  return 0;
}

static void
take_time (void)
{
  struct timespec t = { us / 1000000, us % 1000000 * 1000 };

  if (us == 0 || __atomic_add_fetch (&calls, 1, __ATOMIC_RELAXED) % every > 0)
    return;
  while (nanosleep (&t, &t) == -1)
    ;
}

static int
slow_pread (void *handle, void *buf, uint32_t count, uint64_t offset, uint32_t flags)
{
  take_time ();
  memset (buf, 'x', count);
  return 0;
}

static int
slow_pwrite (void *handle, const void *buf, uint32_t count, uint64_t offset, uint32_t flags)
{
  take_time ();
  return 0;
}

static struct nbdkit_plugin plugin = {
  .name = "slow",
  .config = slow_config,
  .open = slow_open,
  .get_size = slow_get_size,
  .pread = slow_pread,
  .pwrite = slow_pwrite,
};

NBDKIT_REGISTER_PLUGIN (plugin)
