/* What is said when a module ends the process: by a fault, abort or exit.
 *
 * Faults in C come through the Go runtime, which hands those that are not in Go
 * code to the handlers that were there before it started (os/signal, "Non-Go
 * code"). The other fatal signals it would take for its own, so that a handler
 * is put before its.
 *
 * Everything that a handler uses here is safe where malloc, the dynamic linker
 * or Go may have been interrupted: memory that does not change any more, and
 * write(2). snprintf allocates nothing for what it is given here; dladdr may
 * wait for a lock, but not for one that its own thread holds.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

#include "shim.h"

/* ---- names of calls ---- */

static const struct nbdhost_callback *callbacks;

int
nbdhost_callback_add (const void *fn, const char *kind, const char *module,
                      const char *name)
{
  struct nbdhost_callback *c = malloc (sizeof *c);

  if (c == NULL)
    return ENOMEM;
  *c = (struct nbdhost_callback) { callbacks, fn, kind, module, name };
  __atomic_store_n (&callbacks, c, __ATOMIC_RELEASE);
  return 0;
}

const struct nbdhost_callback *
nbdhost_callback_at (const void *fn)
{
  const struct nbdhost_callback *c =
    __atomic_load_n (&callbacks, __ATOMIC_ACQUIRE);

  while (c != NULL && c->fn != fn)
    c = c->next;
  return c;
}

/* ---- the report ---- */

static int report_fd = STDERR_FILENO;
static enum nbdhost_crash_format report_format;
static const char *report_head = "nbdkit: error: ";

void
nbdhost_crash_report_to (int fd, enum nbdhost_crash_format format,
                         const char *head)
{
  report_fd = fd;
  report_format = format;
  report_head = head;
}

/* A text of bounded length; what does not fit is left out. */
struct text {
  size_t len;
  char s[1024];
};

static void add (struct text *, const char *fmt, ...) PRINTF (2, 3);

static void
add (struct text *t, const char *fmt, ...)
{
  va_list args;
  int n;

  va_start (args, fmt);
  n = vsnprintf (t->s + t->len, sizeof t->s - t->len, fmt, args);
  va_end (args);
  if (n > 0)
    t->len += n;
  if (t->len > sizeof t->s - 2)
    t->len = sizeof t->s - 2; /* room for the end of a line */
}

/* A member of a JSON object. what is printable ASCII here, but for quotes. */
static void
add_member (struct text *t, const char *key, const char *what)
{
  add (t, ",\"%s\":\"", key);
  for (; *what; ++what)
    add (t, "%c", *what < ' ' || *what == '"' || *what == '\\' ? '?' : *what);
  add (t, "\"");
}

/* "file.so+0x12" for an address in a library, "" for others. */
static void
locate (char *out, size_t size, uintptr_t pc)
{
  const char *base;
  Dl_info info;

  *out = '\0';
  if (pc == 0 || dladdr ((void *) pc, &info) == 0 || info.dli_fname == NULL)
    return;
  base = strrchr (info.dli_fname, '/');
  snprintf (out, size, "%s+%#lx", base ? base + 1 : info.dli_fname,
            (unsigned long) (pc - (uintptr_t) info.dli_fbase));
}

/* Say that this thread's innermost call did verb ("crashed with SIGSEGV"). */
static void
report (const char *verb, uintptr_t pc)
{
  const struct nbdhost_frame *f = nbdhost_frame;
  const struct nbdhost_callback *c = f ? nbdhost_callback_at (f->fn) : NULL;
  const struct nbdhost_conn *conn = f && f->ctx ? f->ctx->conn : NULL;
  struct text t = { 0 }, m = { 0 };
  char where[256];

  locate (where, sizeof where, pc);
  if (c)
    add (&m, "%s %s %s in .%s", c->kind, c->module, verb, c->name);
  else if (f)
    add (&m, "a module %s in a call", verb);
  else
    add (&m, "a thread outside of calls %s", verb);
  if (conn)
    add (&m, " (connection %lu", (unsigned long) conn->id);
  if (conn && f->kind != NBDHOST_NO_REQUEST)
    add (&m, ", cookie %lu", (unsigned long) f->cookie);
  if (conn && f->kind == NBDHOST_RANGE)
    add (&m, ", offset %lu, length %lu", (unsigned long) f->offset,
         (unsigned long) f->count);
  add (&m, "%s%s%s", conn ? ")" : "", *where ? " at " : "", where);
  add (&t, "%s", report_head);
  if (report_format == NBDHOST_CRASH_JSON) {
    add_member (&t, "msg", m.s);
    if (c) {
      add_member (&t, "module", c->module);
      add_member (&t, "callback", c->name);
    }
    if (conn)
      add (&t, ",\"conn\":%lu", (unsigned long) conn->id);
    if (conn && f->kind != NBDHOST_NO_REQUEST)
      add (&t, ",\"cookie\":%lu", (unsigned long) f->cookie);
    if (conn && f->kind == NBDHOST_RANGE)
      add (&t, ",\"offset\":%lu,\"length\":%lu", (unsigned long) f->offset,
           (unsigned long) f->count);
    add (&t, "}");
  }
  else
    add (&t, "%s", m.s);
  t.s[t.len++] = '\n';
  if (write (report_fd, t.s, t.len) == -1) {
    /* There is nobody to tell. */
  }
}

/* ---- signals ---- */

/* Those that Go hands on, and those that it does not. */
static const int faults[] = { SIGSEGV, SIGBUS, SIGFPE };
static const int others[] = { SIGABRT, SIGILL, SIGTRAP, SIGSYS };

static struct sigaction of_go[_NSIG];

static uintptr_t
program_counter (const void *context)
{
#if defined __x86_64__
  return ((const ucontext_t *) context)->uc_mcontext.gregs[REG_RIP];
#elif defined __aarch64__
  return ((const ucontext_t *) context)->uc_mcontext.pc;
#else
  (void) context;
  return 0;
#endif
}

static void
crashed (int sig, siginfo_t *info, void *context)
{
  static const struct { int sig; const char *verb; } verbs[] = {
    { SIGSEGV, "crashed with SIGSEGV" }, { SIGBUS, "crashed with SIGBUS" },
    { SIGFPE, "crashed with SIGFPE" }, { SIGABRT, "aborted (SIGABRT)" },
    { SIGILL, "crashed with SIGILL" }, { SIGTRAP, "crashed with SIGTRAP" },
    { SIGSYS, "crashed with SIGSYS" },
  };
  struct sigaction dfl = { .sa_handler = SIG_DFL };
  static int reported;

  (void) info;
  /* A second crash, now or in another thread, is nobody's business; neither is
   * it if the report takes for ever. */
  for (size_t i = 0; i < sizeof verbs / sizeof verbs[0]; ++i)
    sigaction (verbs[i].sig, &dfl, NULL);
  sigaction (SIGALRM, &dfl, NULL);
  alarm (5);
  if (nbdhost_in_server () && !__atomic_exchange_n (&reported, 1,
                                                    __ATOMIC_RELAXED))
    for (size_t i = 0; i < sizeof verbs / sizeof verbs[0]; ++i)
      if (verbs[i].sig == sig)
        report (verbs[i].verb, program_counter (context));
  raise (sig); /* once the handler has returned, which blocks it */
}

static bool
in_program (uintptr_t pc)
{
  extern char __executable_start;
  extern char etext __attribute__ ((visibility ("hidden"))); /* see state.c */

  return pc >= (uintptr_t) &__executable_start && pc < (uintptr_t) &etext;
}

/* Go's handler is for what others send, and for the program's own code. */
static void
other (int sig, siginfo_t *info, void *context)
{
  if (info->si_code == SI_USER || in_program (program_counter (context)))
    of_go[sig].sa_sigaction (sig, info, context);
  else
    crashed (sig, info, context);
}

/* Before the Go runtime starts. */
__attribute__ ((constructor)) static void
before_go (void)
{
  struct sigaction sa = { .sa_sigaction = crashed,
                          .sa_flags = SA_SIGINFO | SA_ONSTACK };

  for (size_t i = 0; i < sizeof faults / sizeof faults[0]; ++i)
    sigaction (faults[i], &sa, NULL);
}

/* ---- exit ---- */

/* A module may exit up to .get_ready, and there is nothing to say then. */
static void
exiting (const char *function, int status)
{
  const struct nbdhost_frame *f = nbdhost_frame;
  char verb[64];

  if (f == NULL || f->ctx == NULL || f->ctx->conn == NULL ||
      !nbdhost_in_server ())
    return;
  snprintf (verb, sizeof verb, "called %s(%d)", function, status);
  report (verb, 0);
}

static void
at_exit (int status, void *unused)
{
  (void) unused;
  exiting ("exit", status);
}

/* These take the place of the C library's for modules, as all that the program
 * exports does. The library's own exit does not come here.
 */
PUBLIC void
_exit (int status)
{
  exiting ("_exit", status);
  for (;;)
    syscall (SYS_exit_group, status);
}

PUBLIC void
_Exit (int status)
{
  _exit (status);
}

int
nbdhost_crash_init (void)
{
  struct sigaction sa = { .sa_sigaction = other,
                          .sa_flags = SA_SIGINFO | SA_ONSTACK };

  sigfillset (&sa.sa_mask); /* as Go has it */
  for (size_t i = 0; i < sizeof others / sizeof others[0]; ++i)
    if (sigaction (others[i], &sa, &of_go[others[i]]) == -1)
      return errno;
  return on_exit (at_exit, NULL) == 0 ? 0 : ENOMEM;
}
