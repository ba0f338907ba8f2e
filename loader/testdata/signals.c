/* A plugin that takes the signals of the program that it is loaded into. */
#define NBDKIT_API_VERSION 2
#include <nbdkit-plugin.h>

#include <signal.h>
#include <string.h>
#include <unistd.h>

static void die (int sig) { _exit (99); }
static void load (void) { signal (SIGSEGV, die); signal (SIGURG, die); signal (SIGTERM, SIG_IGN); }
static void *open_ (int readonly) { return NBDKIT_HANDLE_NOT_NEEDED; }
static int64_t get_size (void *h) { return 512; }
static int pread_ (void *h, void *buf, uint32_t n, uint64_t off, uint32_t flags) { memset (buf, 0, n); return 0; }

#define THREAD_MODEL NBDKIT_THREAD_MODEL_PARALLEL
static struct nbdkit_plugin plugin = {
  .name = "signals", .load = load, .open = open_, .get_size = get_size, .pread = pread_,
};
NBDKIT_REGISTER_PLUGIN (plugin)
