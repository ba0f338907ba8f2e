/* Stacks for signal handlers.
 *
 * The Go runtime demands SA_ONSTACK of every handler, and gives its threads a
 * stack of 32 KiB for them that lies in Go's heap: a module's handler that
 * needs more, as it may on a thread's own stack, would overwrite what lies
 * below. So threads that run modules get one that is larger and has a page
 * below it that cannot be written. The runtime finds its way with any stack
 * that C code sets; on a module's own thread that calls Go it would set its own
 * and leave it there, unless there is one already.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include "shim.h"

/* Memory is used only as far as a handler reaches. */
enum { STACK = 512 << 10 };

__thread bool nbdhost_has_sigstack;

static pthread_key_t key;
static pthread_once_t once = PTHREAD_ONCE_INIT;
static bool has_key;
static size_t guard;

struct handler_stack {
  void *base;                  /* the guard page */
  bool second;                 /* round of destructors */
};

/* A thread ends. The runtime's own destructor comes before or after this one,
 * and must find the stack as it left it: so wait for the next round.
 */
static void
drop (void *p)
{
  struct handler_stack *s = p;
  stack_t now, off = { .ss_flags = SS_DISABLE };

  if (!s->second) {
    s->second = true;
    pthread_setspecific (key, s);
    return;
  }
  if (sigaltstack (NULL, &now) == 0 && now.ss_sp == (char *) s->base + guard)
    sigaltstack (&off, NULL);
  munmap (s->base, guard + STACK);
  free (s);
}

static void
make_key (void)
{
  guard = sysconf (_SC_PAGESIZE);
  has_key = pthread_key_create (&key, drop) == 0;
}

/* The address sanitizer gives each thread a stack, and takes it away. */
#ifdef __SANITIZE_ADDRESS__
enum { OURS = false };
#else
enum { OURS = true };
#endif

/* Where there is no memory the thread keeps the stack that it has. */
void
nbdhost_set_sigstack (void)
{
  int saved = errno;
  struct handler_stack *s = NULL;
  char *base = MAP_FAILED;
  stack_t stack = { .ss_size = STACK };

  nbdhost_has_sigstack = true;
  if (!OURS)
    return;
  pthread_once (&once, make_key);
  if (has_key)
    s = calloc (1, sizeof *s);
  if (s != NULL)
    base = mmap (NULL, guard + STACK, PROT_READ | PROT_WRITE,
                 MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_STACK, -1,
                 0);
  if (base != MAP_FAILED) {
    s->base = base;
    stack.ss_sp = base + guard;
    /* It fails in a handler, which runs on the old stack. */
    if (mprotect (base, guard, PROT_NONE) == 0 &&
        pthread_setspecific (key, s) == 0 && sigaltstack (&stack, NULL) == 0) {
      errno = saved;
      return;
    }
    pthread_setspecific (key, NULL);
    munmap (base, guard + STACK);
  }
  free (s);
  errno = saved;
}
