/* The state of calls: connections, contexts, interned strings; and the
 * process-wide settings and signals.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/resource.h>
#include <unistd.h>

#include "shim.h"

struct nbdhost_settings nbdhost_settings = { .stdio_safe = true,
                                             .quit_fd = -1 };

/* Strings that live until the process exits. */
static struct interned *process_interned;

static long live_objects;

long
nbdhost_live_objects (void)
{
  return __atomic_load_n (&live_objects, __ATOMIC_RELAXED);
}

void
nbdhost_live_add (long n)
{
  __atomic_add_fetch (&live_objects, n, __ATOMIC_RELAXED);
}

struct interned {
  struct interned *next;
  char str[];
};

const char *
nbdhost_intern (struct nbdhost_conn *conn, const char *str, size_t n)
{
  struct interned **head = conn ? &conn->interned : &process_interned;
  struct interned *s = malloc (sizeof *s + n + 1);

  if (s == NULL)
    return NULL;
  memcpy (s->str, str, n);
  s->str[n] = '\0';
  /* Workers of one connection add strings at the same time. */
  s->next = __atomic_load_n (head, __ATOMIC_RELAXED);
  while (!__atomic_compare_exchange_n (head, &s->next, s, true,
                                       __ATOMIC_RELEASE, __ATOMIC_RELAXED))
    ;
  return s->str;
}

struct nbdhost_conn *
nbdhost_current_conn (void)
{
  return nbdhost_frame && nbdhost_frame->ctx ? nbdhost_frame->ctx->conn : NULL;
}

struct nbdhost_conn *
nbdhost_conn_new (uint64_t id, int fd)
{
  struct nbdhost_conn *conn = calloc (1, sizeof *conn);

  if (conn == NULL)
    return NULL;
  conn->id = id;
  conn->fd = fd;
  nbdhost_live_add (1);
  return conn;
}

void
nbdhost_conn_set_dn (struct nbdhost_conn *conn, const char *dn,
                     const char *issuer_dn)
{
  free (conn->dn);
  free (conn->issuer_dn);
  conn->dn = strdup (dn);
  conn->issuer_dn = strdup (issuer_dn);
}

void
nbdhost_conn_free (struct nbdhost_conn *conn)
{
  struct interned *s, *next;

  for (s = conn->interned; s != NULL; s = next) {
    next = s->next;
    free (s);
  }
  free (conn->dn);
  free (conn->issuer_dn);
  free (conn);
  nbdhost_live_add (-1);
}

struct nbdhost_context *
nbdhost_context_new (struct nbdhost_conn *conn, const char *export_name,
                     int errno_is_preserved)
{
  struct nbdhost_context *ctx = calloc (1, sizeof *ctx);

  if (ctx == NULL)
    return NULL;
  ctx->conn = conn;
  ctx->errno_is_preserved = errno_is_preserved;
  if (export_name != NULL) {
    ctx->export_name = strdup (export_name);
    if (ctx->export_name == NULL) {
      free (ctx);
      return NULL;
    }
  }
  nbdhost_live_add (1);
  return ctx;
}

void
nbdhost_context_free (struct nbdhost_context *ctx)
{
  free (ctx->export_name);
  free (ctx);
  nbdhost_live_add (-1);
}

/* ---- settings ---- */

int
nbdhost_init (void)
{
  if (nbdhost_settings.quit_fd == -1) {
    int fd = eventfd (0, EFD_CLOEXEC | EFD_NONBLOCK);

    if (fd == -1)
      return errno;
    nbdhost_settings.quit_fd = fd;
  }
  /* What a process without handlers ignores, the Go runtime catches, and then it
   * ends a poll or a nanosleep of a module with EINTR. The runtime preempts
   * with SIGURG; a goroutine then goes on to its next function call.
   */
  signal (SIGURG, SIG_DFL);
  signal (SIGCHLD, SIG_DFL);
  signal (SIGWINCH, SIG_DFL);
  nbdhost_settings.pid = getpid ();
  return 0;
}

bool
nbdhost_in_server (void)
{
  return getpid () == nbdhost_settings.pid;
}

void
nbdhost_set_name (const char *name)
{
  nbdhost_settings.name = name;
}

void
nbdhost_set_verbose (int on)
{
  __atomic_store_n (&nbdhost_settings.verbose, on != 0, __ATOMIC_RELAXED);
}

void
nbdhost_set_stdio_safe (int on)
{
  nbdhost_settings.stdio_safe = on != 0;
}

void
nbdhost_set_quit (void)
{
  /* Never read again: every sleeper, now or later, finds it readable. */
  eventfd_write (nbdhost_settings.quit_fd, 1);
}

/* ---- signals ---- */

static struct sigaction saved[_NSIG];
static bool is_saved[_NSIG];

static bool
has_handler (const struct sigaction *sa)
{
  return (sa->sa_flags & SA_SIGINFO) ||
         (sa->sa_handler != SIG_DFL && sa->sa_handler != SIG_IGN);
}

/* Those that stop the server, and those that the Go runtime cannot do without:
 * faults that it turns into panics, and the one that it sends to preempt. All
 * others are the module's if it wants them.
 */
static bool
is_ours (int sig)
{
  static const int ours[] = {
    SIGINT, SIGTERM, SIGQUIT, SIGHUP, SIGPIPE,
    SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGTRAP, SIGSYS, SIGURG, SIGPROF,
  };

  for (size_t i = 0; i < sizeof ours / sizeof ours[0]; ++i)
    if (sig == ours[i])
      return true;
  return false;
}

void
nbdhost_signals_save (void)
{
  for (int sig = 1; sig < _NSIG; ++sig)
    is_saved[sig] = sigaction (sig, NULL, &saved[sig]) == 0;
}

void
nbdhost_signals_restore (void)
{
  for (int sig = 1; sig < _NSIG; ++sig) {
    struct sigaction now;

    if (!is_saved[sig] || sigaction (sig, NULL, &now) == -1)
      continue;
    if (is_ours (sig))
      sigaction (sig, &saved[sig], NULL);
    else if (has_handler (&now) && !(now.sa_flags & SA_ONSTACK)) {
      /* The runtime aborts on a handler that would run on a goroutine's
       * stack. It may be the runtime's own: Ruby takes the flag away. */
      now.sa_flags |= SA_ONSTACK;
      sigaction (sig, &now, NULL);
    }
  }
}

/* ---- names ---- */

/* --export-dynamic puts every name of the program before a module's own of that name.
 * These are not the program's alone: to refer to them as hidden hides them. They are weak
 * since not all are there in each program that cgo links.
 */
#define HIDDEN __attribute__ ((weak, visibility ("hidden")))

extern char fatalf HIDDEN, crosscall1 HIDDEN, crosscall2 HIDDEN; /* Go's */
extern char data_start HIDDEN, edata HIDDEN, end HIDDEN, etext HIDDEN; /* the linker's */

__attribute__ ((used)) static const char *const hidden[] = {
  &fatalf, &crosscall1, &crosscall2, &data_start, &edata, &end, &etext,
};

/* ---- open files ---- */

/* Go takes the hard limit for itself. What a module forks has the one that the
 * program was started with: programs close as many descriptors, or have a table
 * for as many, as there may be.
 */
static struct rlimit open_files;

static void
limit_open_files (void)
{
  setrlimit (RLIMIT_NOFILE, &open_files);
}

/* Before the Go runtime starts. */
__attribute__ ((constructor)) static void
keep_open_files (void)
{
  if (getrlimit (RLIMIT_NOFILE, &open_files) == 0)
    pthread_atfork (NULL, NULL, limit_open_files);
}

/* ---- the command line ---- */

static char *command_line, *command_line_end;

/* glibc calls constructors as it does main. */
__attribute__ ((constructor)) static void
find_command_line (int argc, char **argv)
{
  if (argc < 1 || argv == NULL || argv[0] == NULL)
    return;
  command_line = command_line_end = argv[0];
  for (int i = 0; i < argc && argv[i] == command_line_end; ++i)
    command_line_end += strlen (argv[i]) + 1;
}

void
nbdhost_set_command_line (const char *args, size_t n)
{
  size_t room = command_line_end - command_line;

  if (room == 0)
    return;
  if (n >= room)
    n = room - 1;
  memcpy (command_line, args, n);
  memset (command_line + n, 0, room - n);
}
