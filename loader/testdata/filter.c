/* A filter that asks next from a thread of its own, shares one session of next among
 * its own, closes the one it has, and calls what it may not.
 */
#include <errno.h>
#include <pthread.h>
#include <stdio.h>
#include <string.h>

#include <nbdkit-filter.h>

static nbdkit_next *shared;

static int
f_after_fork (nbdkit_backend *backend)
{
  shared = nbdkit_next_context_open (backend, 1, "shared", 1);
  return shared == NULL ? -1 : shared->prepare (shared);
}

static void
f_cleanup (nbdkit_backend *backend)
{
  shared->finalize (shared);
  nbdkit_next_context_close (shared);
}

static nbdkit_context *opened[2]; /* the last ones */

/* The handle is the context. */
static void *
f_open (nbdkit_next_open *next, nbdkit_context *context, int readonly,
        const char *exportname, int is_tls)
{
  static int n;

  opened[__atomic_fetch_add (&n, 1, __ATOMIC_RELAXED) % 2] = context;
  return next (context, readonly, exportname) == -1 ? NULL : context;
}

struct call {
  nbdkit_next *next;
  void *buf;
  uint32_t count;
  uint64_t offset;
  int ret, err;
};

static void *
in_thread (void *p)
{
  struct call *c = p;

  c->ret = c->next->pread (c->next, c->buf, c->count, c->offset, 0, &c->err);
  return NULL;
}

static int
f_pread (nbdkit_next *next, void *handle, void *buf, uint32_t count,
         uint64_t offset, uint32_t flags, int *err)
{
  struct call c = { next, buf, count, offset, 0, 0 };
  nbdkit_next *other;
  pthread_t thread;

  switch (offset) {
  case 0: /* the session of this connection */
    break;
  case 512:
    c.next = shared;
    break;
  case 1024: /* nothing is open */
    if (shared->get_size (shared) < 0)
      return -1;
    return ((nbdkit_next *) next)->pread (NULL, buf, count, offset, 0, err);
  case 3072: /* nothing is to be below from here on */
    next->finalize (next);
    nbdkit_next_context_close (next);
    *err = EIO;
    return -1;
  case 4096: /* is nothing below? */
    *err = next == NULL ? ENOTCONN : 0;
    return next == NULL ? -1 : 0;
  case 4608: /* what is below is below the other session as well */
    other = nbdkit_context_set_next (opened[opened[0] == handle], next);
    other->finalize (other);
    nbdkit_next_context_close (other);
    return 0;
  case 5120: /* nothing is below */
    nbdkit_context_set_next (handle, NULL);
    return 0;
  case 5632: /* nothing is below any more */
    other = nbdkit_context_set_next (handle, NULL);
    other->finalize (other);
    nbdkit_next_context_close (other);
    return 0;
  case 2560: /* over the end */
    return next->pread (next, buf, count, next->get_size (next) - count + 1, 0,
                        err);
  case 2048: /* beyond the end */
    return next->pread (next, buf, count, UINT64_MAX - 1, 0, err);
  }
  pthread_create (&thread, NULL, in_thread, &c);
  pthread_join (thread, NULL);
  *err = c.err;
  return c.ret;
}

static struct nbdkit_filter filter = {
  .name = "threads",
  .after_fork = f_after_fork,
  .cleanup = f_cleanup,
  .open = f_open,
  .pread = f_pread,
};

NBDKIT_REGISTER_FILTER (filter)
