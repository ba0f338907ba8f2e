/* Calls into modules: one function per shape of callback.
 *
 * Each pushes a frame, calls, and collects the outcome before it returns to
 * Go, since a goroutine may be on another thread at its next call.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <stdlib.h>

#include "shim.h"

__thread struct nbdhost_frame *nbdhost_frame;

struct nbdhost_frame *
nbdhost_get_frame (void)
{
  return nbdhost_frame;
}

struct nbdhost_frame *
nbdhost_set_frame (struct nbdhost_frame *f)
{
  struct nbdhost_frame *before = nbdhost_frame;

  nbdhost_frame = f;
  return before;
}

static void
enter (struct nbdhost_frame *f, nbdhost_ctx ctx, int worker, void *fn)
{
  f->ctx = ctx;
  f->fn = fn;
  f->kind = NBDHOST_NO_REQUEST;
  f->cookie = 0;
  /* A callback of a filter that leads to another does not change the thread. */
  f->worker =
    worker == NBDHOST_HANDSHAKE && nbdhost_frame ? nbdhost_frame->worker
                                                 : worker;
  f->error = 0;
  f->message = NULL;
  f->module = NULL;
  f->outer = nbdhost_frame;
  nbdhost_frame = f;
  nbdhost_need_sigstack ();
  /* A stale value must not become the error of a callback that sets none. */
  errno = 0;
}

/* Enter a data callback; range: count and offset are those of one. */
static void
enter_data (struct nbdhost_frame *f, const struct nbdhost_data *d, bool range)
{
  enter (f, (nbdhost_ctx) d->ctx, d->worker, (void *) d->fn);
  f->kind = range ? NBDHOST_RANGE : NBDHOST_REQUEST;
  f->cookie = f->outer && f->outer->kind != NBDHOST_NO_REQUEST
                ? f->outer->cookie : d->cookie;
  f->count = d->count;
  f->offset = d->offset;
}

/* nbdkit takes a negative value for success unless it is -1, and a module that
 * returns one need not have said anything.
 */
static void
complain (const struct nbdhost_frame *f, int64_t ret)
{
  const struct nbdhost_callback *c = nbdhost_callback_at (f->fn);

  nbdkit_error ("%s: %s returned %jd: need at least 0, or -1 for a failure",
                c ? c->module : "module", c ? c->name : "callback",
                (intmax_t) ret);
}

/* Pop the frame. On failure the error is that of nbdkit_set_error, else errno
 * where the module preserves it, else EIO (nbdkit-plugin(3), ERROR HANDLING).
 */
static struct nbdhost_result
leave (struct nbdhost_frame *f, int64_t ret, void *ptr, bool failed)
{
  int saved = errno;
  struct nbdhost_result r = { .ret = ret, .ptr = ptr };

  if (ret < -1)
    complain (f, ret);
  nbdhost_frame = f->outer;
  if (!failed) {
    free (f->message);
    return r;
  }
  if (f->error != 0)
    r.err = f->error;
  else if (f->ctx && f->ctx->errno_is_preserved && saved != 0)
    r.err = saved;
  else
    r.err = EIO;
  r.message = f->message;
  if (f->module)
    r.module = f->module;
  else {
    const struct nbdhost_callback *c = nbdhost_callback_at (f->fn);

    r.module = c ? c->module : NULL;
  }
  return r;
}

/* Call an int or int64_t callback; negative is failure. */
#define CALL(ctx, worker, type, fn, ...)                        \
  do {                                                          \
    struct nbdhost_frame f;                                     \
    enter (&f, ctx, worker, fn);                                \
    int64_t ret = ((type) fn) (__VA_ARGS__);                    \
    return leave (&f, ret, NULL, ret < 0);                      \
  } while (0)

/* The same for a data callback. */
#define CALL_DATA(d, range, type, ...)                          \
  do {                                                          \
    struct nbdhost_frame f;                                     \
    enter_data (&f, &d, range);                                 \
    int64_t ret = ((type) d.fn) (__VA_ARGS__);                  \
    return leave (&f, ret, NULL, ret < 0);                      \
  } while (0)

/* Call a callback that returns a pointer; NULL is failure. */
#define CALL_PTR(ctx, type, fn, ...)                            \
  do {                                                          \
    struct nbdhost_frame f;                                     \
    enter (&f, ctx, NBDHOST_HANDSHAKE, fn);                     \
    void *ptr = (void *) ((type) fn) (__VA_ARGS__);             \
    return leave (&f, 0, ptr, ptr == NULL);                     \
  } while (0)

void
nbdhost_call_void (nbdhost_ctx ctx, void *fn)
{
  struct nbdhost_frame f;

  enter (&f, ctx, NBDHOST_HANDSHAKE, fn);
  ((void (*) (void)) fn) ();
  leave (&f, 0, NULL, false);
}

struct nbdhost_result
nbdhost_call_int (nbdhost_ctx ctx, void *fn)
{
  CALL (ctx, NBDHOST_HANDSHAKE, int (*) (void), fn);
}

struct nbdhost_result
nbdhost_call_config (nbdhost_ctx ctx, void *fn, const char *key,
                     const char *value)
{
  CALL (ctx, NBDHOST_HANDSHAKE, int (*) (const char *, const char *), fn, key,
        value);
}

struct nbdhost_result
nbdhost_call_preconnect (nbdhost_ctx ctx, void *fn, int readonly)
{
  CALL (ctx, NBDHOST_HANDSHAKE, int (*) (int), fn, readonly);
}

/* ptr: the list, the caller's to free, also on failure; NULL: out of memory. */
struct nbdhost_result
nbdhost_call_list_exports (nbdhost_ctx ctx, void *fn, int readonly, int is_tls)
{
  struct nbdhost_frame f;
  struct nbdkit_exports *exports;
  int ret = -1;

  enter (&f, ctx, NBDHOST_HANDSHAKE, fn);
  exports = nbdkit_exports_new ();
  if (exports == NULL)
    nbdkit_set_error (ENOMEM);
  else
    ret = ((int (*) (int, int, struct nbdkit_exports *)) fn) (readonly, is_tls,
                                                              exports);
  return leave (&f, ret, exports, ret < 0);
}

struct nbdhost_result
nbdhost_call_default_export (nbdhost_ctx ctx, void *fn, int readonly,
                             int is_tls)
{
  CALL_PTR (ctx, const char *(*) (int, int), fn, readonly, is_tls);
}

struct nbdhost_result
nbdhost_call_open (nbdhost_ctx ctx, void *fn, int readonly)
{
  CALL_PTR (ctx, void *(*) (int), fn, readonly);
}

void
nbdhost_call_close (nbdhost_ctx ctx, void *fn, void *handle)
{
  struct nbdhost_frame f;

  enter (&f, ctx, NBDHOST_HANDSHAKE, fn);
  ((void (*) (void *)) fn) (handle);
  leave (&f, 0, NULL, false);
}

struct nbdhost_result
nbdhost_call_handle_int (nbdhost_ctx ctx, void *fn, void *handle)
{
  CALL (ctx, NBDHOST_HANDSHAKE, int (*) (void *), fn, handle);
}

struct nbdhost_result
nbdhost_call_handle_int64 (nbdhost_ctx ctx, void *fn, void *handle)
{
  CALL (ctx, NBDHOST_HANDSHAKE, int64_t (*) (void *), fn, handle);
}

struct nbdhost_result
nbdhost_call_handle_string (nbdhost_ctx ctx, void *fn, void *handle)
{
  CALL_PTR (ctx, const char *(*) (void *), fn, handle);
}

struct nbdhost_block_size
nbdhost_call_block_size (nbdhost_ctx ctx, void *fn, void *handle)
{
  struct nbdhost_frame f;
  struct nbdhost_block_size b = { 0 };
  int ret;

  enter (&f, ctx, NBDHOST_HANDSHAKE, fn);
  ret = ((int (*) (void *, uint32_t *, uint32_t *, uint32_t *)) fn) (
      handle, &b.minimum, &b.preferred, &b.maximum);
  b.r = leave (&f, ret, NULL, ret < 0);
  return b;
}

/* ---- data callbacks ---- */

#define HANDLE(d) ((void *) (d).handle)
#define BUF(d) ((void *) (d).buf)

struct nbdhost_result
nbdhost_call_pread (struct nbdhost_data d)
{
  CALL_DATA (d, true,
             int (*) (void *, void *, uint32_t, uint64_t, uint32_t),
             HANDLE (d), BUF (d), d.count, d.offset, d.flags);
}

struct nbdhost_result
nbdhost_call_pwrite (struct nbdhost_data d)
{
  CALL_DATA (d, true,
             int (*) (void *, const void *, uint32_t, uint64_t, uint32_t),
             HANDLE (d), BUF (d), d.count, d.offset, d.flags);
}

struct nbdhost_result
nbdhost_call_flush (struct nbdhost_data d)
{
  CALL_DATA (d, false, int (*) (void *, uint32_t), HANDLE (d), d.flags);
}

struct nbdhost_result
nbdhost_call_range (struct nbdhost_data d)
{
  CALL_DATA (d, true, int (*) (void *, uint32_t, uint64_t, uint32_t),
             HANDLE (d), d.count, d.offset, d.flags);
}

/* ptr: the list, the caller's to free, also on failure; NULL: out of memory, or
 * an offset that no disk has. An extent may reach beyond what was asked for: the
 * end of the disk, which cuts it, is not known here.
 */
struct nbdhost_result
nbdhost_call_extents (struct nbdhost_data d)
{
  struct nbdhost_frame f;
  struct nbdkit_extents *extents;
  int ret = -1;

  enter_data (&f, &d, true);
  extents = nbdkit_extents_new (d.offset, INT64_MAX);
  if (extents == NULL)
    nbdkit_set_error (errno);
  else
    ret = ((int (*) (void *, uint32_t, uint64_t, uint32_t,
                     struct nbdkit_extents *)) d.fn) (
        HANDLE (d), d.count, d.offset, d.flags, extents);
  return leave (&f, ret, extents, ret < 0);
}

struct nbdhost_result
nbdhost_call_pread_v1 (struct nbdhost_data d)
{
  CALL_DATA (d, true, int (*) (void *, void *, uint32_t, uint64_t), HANDLE (d),
             BUF (d), d.count, d.offset);
}

struct nbdhost_result
nbdhost_call_pwrite_v1 (struct nbdhost_data d)
{
  CALL_DATA (d, true, int (*) (void *, const void *, uint32_t, uint64_t),
             HANDLE (d), BUF (d), d.count, d.offset);
}

struct nbdhost_result
nbdhost_call_flush_v1 (struct nbdhost_data d)
{
  CALL_DATA (d, false, int (*) (void *), HANDLE (d));
}

struct nbdhost_result
nbdhost_call_trim_v1 (struct nbdhost_data d)
{
  CALL_DATA (d, true, int (*) (void *, uint32_t, uint64_t), HANDLE (d),
             d.count, d.offset);
}

struct nbdhost_result
nbdhost_call_zero_v1 (struct nbdhost_data d)
{
  CALL_DATA (d, true, int (*) (void *, uint32_t, uint64_t, int), HANDLE (d),
             d.count, d.offset, d.flags != 0);
}

/* ---- filters ---- */

/* Call a data callback of a filter, which gives its error in *err. */
#define CALL_ERR(d, range, type, ...)                           \
  do {                                                          \
    struct nbdhost_frame f;                                     \
    struct nbdhost_result r;                                    \
    int err = 0, ret;                                           \
    enter_data (&f, &d, range);                                 \
    ret = ((type) d.fn) (NEXT (d), HANDLE (d), __VA_ARGS__, &err); \
    r = leave (&f, ret, NULL, ret < 0);                         \
    if (ret < 0 && err != 0)                                    \
      r.err = err;                                              \
    return r;                                                   \
  } while (0)

#define NEXT(d) ((nbdhost_next) (d).next)

typedef struct nbdkit_backend *backend;

struct nbdhost_result
nbdhost_filter_config (void *fn, backend b, const char *key, const char *value)
{
  CALL (NULL, NBDHOST_HANDSHAKE,
        int (*) (int (*) (backend, const char *, const char *), backend,
                 const char *, const char *),
        fn, nbdhost_next_config, b, key, value);
}

struct nbdhost_result
nbdhost_filter_config_complete (void *fn, backend b)
{
  CALL (NULL, NBDHOST_HANDSHAKE, int (*) (int (*) (backend), backend), fn,
        nbdhost_next_config_complete, b);
}

struct nbdhost_result
nbdhost_filter_model (void *fn, int model)
{
  CALL (NULL, NBDHOST_HANDSHAKE, int (*) (int), fn, model);
}

struct nbdhost_result
nbdhost_filter_after_fork (void *fn, backend b)
{
  CALL (NULL, NBDHOST_HANDSHAKE, int (*) (backend), fn, b);
}

void
nbdhost_filter_cleanup (void *fn, backend b)
{
  struct nbdhost_frame f;

  enter (&f, NULL, NBDHOST_HANDSHAKE, fn);
  ((void (*) (backend)) fn) (b);
  leave (&f, 0, NULL, false);
}

struct nbdhost_result
nbdhost_filter_preconnect (nbdhost_ctx ctx, void *fn, backend b, int readonly)
{
  CALL (ctx, NBDHOST_HANDSHAKE, int (*) (int (*) (backend, int), backend, int),
        fn, nbdhost_next_preconnect, b, readonly);
}

/* ptr: as that of nbdhost_call_list_exports. */
struct nbdhost_result
nbdhost_filter_list_exports (nbdhost_ctx ctx, void *fn, backend b,
                             int readonly, int is_tls)
{
  struct nbdhost_frame f;
  struct nbdkit_exports *exports;
  int ret = -1;

  enter (&f, ctx, NBDHOST_HANDSHAKE, fn);
  exports = nbdkit_exports_new ();
  if (exports == NULL)
    nbdkit_set_error (ENOMEM);
  else
    ret = ((int (*) (int (*) (backend, int, struct nbdkit_exports *), backend,
                     int, int, struct nbdkit_exports *)) fn) (
        nbdhost_next_list_exports, b, readonly, is_tls, exports);
  return leave (&f, ret, exports, ret < 0);
}

struct nbdhost_result
nbdhost_filter_default_export (nbdhost_ctx ctx, void *fn, backend b,
                               int readonly, int is_tls)
{
  CALL_PTR (ctx,
            const char *(*) (const char *(*) (backend, int), backend, int, int),
            fn, nbdhost_next_default_export, b, readonly, is_tls);
}

struct nbdhost_result
nbdhost_filter_open (nbdhost_ctx ctx, int worker, void *fn,
                     struct nbdkit_context *context, int readonly,
                     const char *exportname, int is_tls)
{
  struct nbdhost_frame f;
  void *ptr;

  enter (&f, ctx, worker, fn);
  ptr = ((void *(*) (int (*) (struct nbdkit_context *, int, const char *),
                     struct nbdkit_context *, int, const char *, int)) fn) (
      nbdhost_next_open, context, readonly, exportname, is_tls);
  return leave (&f, 0, ptr, ptr == NULL);
}

void
nbdhost_filter_close (nbdhost_ctx ctx, int worker, void *fn, void *handle)
{
  struct nbdhost_frame f;

  enter (&f, ctx, worker, fn);
  ((void (*) (void *)) fn) (handle);
  leave (&f, 0, NULL, false);
}

struct nbdhost_result
nbdhost_filter_prepare (nbdhost_ctx ctx, int worker, void *fn,
                        nbdhost_next next, void *handle, int readonly)
{
  CALL (ctx, worker, int (*) (nbdhost_next, void *, int), fn, next, handle,
        readonly);
}

struct nbdhost_result
nbdhost_filter_int (nbdhost_ctx ctx, int worker, void *fn, nbdhost_next next,
                    void *handle)
{
  CALL (ctx, worker, int (*) (nbdhost_next, void *), fn, next, handle);
}

struct nbdhost_result
nbdhost_filter_int64 (nbdhost_ctx ctx, int worker, void *fn, nbdhost_next next,
                      void *handle)
{
  CALL (ctx, worker, int64_t (*) (nbdhost_next, void *), fn, next, handle);
}

struct nbdhost_result
nbdhost_filter_string (nbdhost_ctx ctx, int worker, void *fn,
                       nbdhost_next next, void *handle)
{
  struct nbdhost_frame f;
  void *ptr;

  enter (&f, ctx, worker, fn);
  ptr = (void *) ((const char *(*) (nbdhost_next, void *)) fn) (next, handle);
  return leave (&f, 0, ptr, ptr == NULL);
}

struct nbdhost_block_size
nbdhost_filter_block_size (nbdhost_ctx ctx, int worker, void *fn,
                           nbdhost_next next, void *handle)
{
  struct nbdhost_frame f;
  struct nbdhost_block_size b = { 0 };
  int ret;

  enter (&f, ctx, worker, fn);
  ret = ((int (*) (nbdhost_next, void *, uint32_t *, uint32_t *,
                   uint32_t *)) fn) (next, handle, &b.minimum, &b.preferred,
                                     &b.maximum);
  b.r = leave (&f, ret, NULL, ret < 0);
  return b;
}

struct nbdhost_result
nbdhost_filter_io (struct nbdhost_data d)
{
  CALL_ERR (d, true,
            int (*) (nbdhost_next, void *, void *, uint32_t, uint64_t, uint32_t, int *),
            BUF (d), d.count, d.offset, d.flags);
}

struct nbdhost_result
nbdhost_filter_flush (struct nbdhost_data d)
{
  CALL_ERR (d, false, int (*) (nbdhost_next, void *, uint32_t, int *), d.flags);
}

struct nbdhost_result
nbdhost_filter_range (struct nbdhost_data d)
{
  CALL_ERR (d, true,
            int (*) (nbdhost_next, void *, uint32_t, uint64_t, uint32_t, int *),
            d.count, d.offset, d.flags);
}

/* ptr: as that of nbdhost_call_extents. */
struct nbdhost_result
nbdhost_filter_extents (struct nbdhost_data d)
{
  struct nbdhost_frame f;
  struct nbdhost_result r;
  struct nbdkit_extents *extents;
  int err = 0, ret = -1;

  enter_data (&f, &d, true);
  extents = nbdkit_extents_new (d.offset, INT64_MAX);
  if (extents == NULL)
    err = errno;
  else
    ret = ((int (*) (nbdhost_next, void *, uint32_t, uint64_t, uint32_t,
                     struct nbdkit_extents *, int *)) d.fn) (
        NEXT (d), HANDLE (d), d.count, d.offset, d.flags, extents, &err);
  r = leave (&f, ret, extents, ret < 0);
  if (ret < 0 && err != 0)
    r.err = err;
  return r;
}
