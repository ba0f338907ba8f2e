/* A plugin with one thing wrong, chosen by -D. */
#define NBDKIT_API_VERSION 2
#include <nbdkit-plugin.h>
#include <string.h>

#ifndef VERSION
#define VERSION 2
#endif
#ifndef SIZE
#define SIZE sizeof (struct nbdkit_plugin)
#endif
#ifndef NAME
#define NAME "bad"
#endif
#ifndef MODEL
#define MODEL 0
#endif
#ifndef OPEN
#define OPEN open_
#endif
#ifndef GET_SIZE
#define GET_SIZE get_size
#endif
#ifndef PREAD
#define PREAD pread_
#endif
#ifndef INIT
#define INIT plugin_init
#endif
#ifndef RETURN
#define RETURN &plugin
#endif

#pragma GCC diagnostic ignored "-Wunused-function"
#pragma GCC diagnostic ignored "-Wunused-variable"
static void *open_ (int readonly) { return NBDKIT_HANDLE_NOT_NEEDED; }
static int64_t get_size (void *h) { return 512; }
static int pread_ (void *h, void *buf, uint32_t n, uint64_t off, uint32_t flags) { memset (buf, 0, n); return 0; }

#ifdef NEEDS
extern void NEEDS (void);
static void load (void) { NEEDS (); }
#define LOAD load
#else
#define LOAD NULL
#endif

#ifdef TLS
static __thread char tls[TLS] __attribute__ ((tls_model ("initial-exec")));
char *get_tls (void);
char *get_tls (void) { return tls; }
#endif

/* LONG makes the struct longer than any release has it. */
#ifdef LONG
static struct { struct nbdkit_plugin p; char more[LONG]; } longer = {
  { sizeof longer, VERSION, MODEL, .name = NAME, .open = OPEN, .get_size = GET_SIZE, .pread = PREAD },
  "This must not be taken for callbacks."
};
#undef RETURN
#define RETURN &longer.p
#endif

static struct nbdkit_plugin plugin = {
  ._struct_size = SIZE, ._api_version = VERSION, ._thread_model = MODEL,
  .name = NAME, .load = LOAD, .open = OPEN, .get_size = GET_SIZE, .pread = PREAD,
};

struct nbdkit_plugin *INIT (void);
struct nbdkit_plugin *INIT (void) { return RETURN; }
