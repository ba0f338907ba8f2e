/* A plugin with every callback, for the tests. API is 1 or 2. What it does
 * is chosen by its parameters and by the name of the export. Each callback that
 * is called is written to the log, and with it what it was given.
 */
#ifndef API
#define API 2
#endif
#define NBDKIT_API_VERSION API
#include <nbdkit-plugin.h>

#include <errno.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#ifndef THREAD_MODEL
#define THREAD_MODEL NBDKIT_THREAD_MODEL_PARALLEL
#endif
#ifndef NAME
#define NAME "fixture"
#endif
#ifndef PRESERVED
#define PRESERVED 0
#endif
/* Give the struct the size that it had before this member was added. */
#ifdef BEFORE
#define SIZE offsetof (struct nbdkit_plugin, BEFORE)
#else
#define SIZE sizeof (struct nbdkit_plugin)
#endif

int fixture_debug_one = 1, fixture_debug_two_three;

#define DISK 1048576
static unsigned char disk[DISK];
static char fail[64];           /* the callback that fails */
static int fail_errno, fail_set, fail_quiet;
static int shutdown_in_pread;
static const char *kept_key, *kept_value;
static struct handle { char export[32]; } handle;

/* True if the callback is the one to fail. */
static int
fails (const char *callback)
{
  if (strcmp (fail, callback) != 0)
    return 0;
  if (!fail_quiet)
    nbdkit_error ("%s was told to fail", callback);
  if (fail_set)
    nbdkit_set_error (fail_set);
  errno = fail_errno;
  return 1;
}

#define ENTER(name, fmt, ...)                                   \
  do {                                                          \
    nbdkit_debug (name fmt, ##__VA_ARGS__);                     \
    if (fails (name)) return -1;                                \
  } while (0)

static void load (void) { nbdkit_debug ("load one=%d two_three=%d", fixture_debug_one, fixture_debug_two_three); }
static void unload (void) { nbdkit_debug ("unload"); }

static int
config (const char *key, const char *value)
{
  ENTER ("config", " %s=%s", key, value);
  if (strcmp (key, "fail") == 0)
    snprintf (fail, sizeof fail, "%s", value);
  else if (strcmp (key, "errno") == 0)
    fail_errno = atoi (value);
  else if (strcmp (key, "set") == 0)
    fail_set = atoi (value);
  else if (strcmp (key, "quiet") == 0)
    fail_quiet = atoi (value);
  else if (strcmp (key, "shutdown") == 0)
    shutdown_in_pread = atoi (value);
  else if (strcmp (key, "keep") == 0) {
    kept_key = key;
    kept_value = value;
  }
  else {
    nbdkit_error ("unknown parameter '%s'", key);
    return -1;
  }
  return 0;
}

static int config_complete (void) { ENTER ("config_complete", " %s=%s", kept_key ? kept_key : "", kept_value ? kept_value : ""); return 0; }

static void *
open_ (int readonly)
{
  const char *name = "";
#if API == 2
  name = nbdkit_export_name ();
#endif
  nbdkit_debug ("open readonly=%d export=%s tls=%d", readonly, name, nbdkit_is_tls ());
  if (fails ("open"))
    return NULL;
  snprintf (handle.export, sizeof handle.export, "%s", name);
  return &handle;
}

static void close_ (void *h) { nbdkit_debug ("close %s", ((struct handle *) h)->export); }
static int64_t get_size (void *h) { ENTER ("get_size", ""); return sizeof disk; }

#define CAN(name, value)                                        \
  static int name (void *h)                                     \
  {                                                             \
    ENTER (#name, "");                                          \
    return value;                                               \
  }
CAN (can_write, 1)
CAN (can_flush, 1)
CAN (is_rotational, 1)
CAN (can_trim, 1)
CAN (can_zero, 1)
CAN (can_fua, NBDKIT_FUA_NATIVE)
CAN (can_multi_conn, 1)
CAN (can_cache, NBDKIT_CACHE_NATIVE)

#if API == 1
#define FLAGS
#define F 0
#else
#define FLAGS , uint32_t F
#endif

static int
pread_ (void *h, void *buf, uint32_t count, uint64_t offset FLAGS)
{
  ENTER ("pread", " %u@%lu flags=%u", count, (unsigned long) offset, (unsigned) F);
  if (shutdown_in_pread)
    nbdkit_shutdown ();
  memcpy (buf, disk + offset, count);
  return 0;
}

static int
pwrite_ (void *h, const void *buf, uint32_t count, uint64_t offset FLAGS)
{
  ENTER ("pwrite", " %u@%lu flags=%u", count, (unsigned long) offset, (unsigned) F);
  memcpy (disk + offset, buf, count);
  return 0;
}

static int flush (void *h FLAGS) { ENTER ("flush", " flags=%u", (unsigned) F); return 0; }
static int trim (void *h, uint32_t count, uint64_t offset FLAGS) { ENTER ("trim", " %u@%lu flags=%u", count, (unsigned long) offset, (unsigned) F); return 0; }

#if API == 1
static int
zero (void *h, uint32_t count, uint64_t offset, int may_trim)
{
  ENTER ("zero", " %u@%lu may_trim=%d", count, (unsigned long) offset, may_trim);
  memset (disk + offset, 0, count);
  return 0;
}
#else
static int
zero (void *h, uint32_t count, uint64_t offset, uint32_t F)
{
  ENTER ("zero", " %u@%lu flags=%u", count, (unsigned long) offset, F);
  memset (disk + offset, 0, count);
  return 0;
}

CAN (can_extents, 1)
CAN (can_fast_zero, 1)

static int
extents (void *h, uint32_t count, uint64_t offset, uint32_t F, struct nbdkit_extents *x)
{
  ENTER ("extents", " %u@%lu flags=%u", count, (unsigned long) offset, F);
  if (nbdkit_add_extent (x, 0, DISK / 2, NBDKIT_EXTENT_HOLE | NBDKIT_EXTENT_ZERO) == -1)
    return -1;
  return nbdkit_add_extent (x, DISK / 2, DISK / 2, 0);
}

static int cache (void *h, uint32_t count, uint64_t offset, uint32_t F) { ENTER ("cache", " %u@%lu flags=%u", count, (unsigned long) offset, F); return 0; }
static int thread_model (void) { ENTER ("thread_model", ""); return NBDKIT_THREAD_MODEL_SERIALIZE_REQUESTS; }
static int preconnect (int readonly) { ENTER ("preconnect", " readonly=%d tls=%d", readonly, nbdkit_is_tls ()); return 0; }
static int get_ready (void) { ENTER ("get_ready", ""); return 0; }
static int after_fork (void) { ENTER ("after_fork", ""); return 0; }
static void cleanup (void) { nbdkit_debug ("cleanup"); }

static int
list_exports (int readonly, int is_tls, struct nbdkit_exports *x)
{
  ENTER ("list_exports", " readonly=%d tls=%d", readonly, is_tls);
  if (nbdkit_add_export (x, "a", "first") == -1 ||
      nbdkit_add_export (x, "b", NULL) == -1)
    return -1;
  return nbdkit_use_default_export (x);
}

static const char *default_export (int readonly, int is_tls) { nbdkit_debug ("default_export tls=%d", is_tls); return fails ("default_export") ? NULL : nbdkit_strdup_intern ("main"); }
static const char *export_description (void *h) { return nbdkit_printf_intern ("it is %s", ((struct handle *) h)->export); }

static int
block_size (void *h, uint32_t *minimum, uint32_t *preferred, uint32_t *maximum)
{
  ENTER ("block_size", "");
  *minimum = 512;
  *preferred = 4096;
  *maximum = 0xffffffff;
  return 0;
}
#endif

static void dump (void) { printf ("fixture=yes\n"); }

static struct nbdkit_plugin plugin = {
  ._struct_size = SIZE,
  ._api_version = API,
  ._thread_model = THREAD_MODEL,
  .name = NAME, .longname = "A Fixture", .version = "1.2.3",
  .description = "For tests.\n",
  .load = load, .unload = unload,
  .config = config, .config_complete = config_complete,
  .config_help = "fail=<CALLBACK>  callback to fail", .magic_config_key = "fail",
  .open = open_, .close = close_, .get_size = get_size,
  .can_write = can_write, .can_flush = can_flush,
  .is_rotational = is_rotational, .can_trim = can_trim,
  .pread = pread_, .pwrite = pwrite_, .flush = flush, .trim = trim, .zero = zero,
  .errno_is_preserved = PRESERVED,
  .dump_plugin = dump,
  .can_zero = can_zero, .can_fua = can_fua, .can_multi_conn = can_multi_conn,
  .can_cache = can_cache,
#if API == 2
  .can_extents = can_extents, .extents = extents, .cache = cache,
  .thread_model = thread_model, .can_fast_zero = can_fast_zero,
  .preconnect = preconnect, .get_ready = get_ready, .after_fork = after_fork,
  .list_exports = list_exports, .default_export = default_export,
  .export_description = export_description, .cleanup = cleanup,
  .block_size = block_size,
#endif
};

struct nbdkit_plugin *plugin_init (void);
struct nbdkit_plugin *plugin_init (void) { return &plugin; }
