/* What filters call: the layers below them. Each function hands a request to Go,
 * where the layers are. Only reads and writes have a way that is shorter, once Go
 * has said that there is nothing more to be decided.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <string.h>

#include "shim.h"

/* ---- the objects that filters hold ---- */

/* What is below a filter outside of connections; from .load to .unload. */
struct nbdkit_backend {
  uint64_t id;
};

/* A filter's own open session; from .open to .close. */
struct nbdkit_context {
  uint64_t id;
  struct nbdkit_backend *backend;
  nbdhost_next next;            /* atomic; NULL: none */
};

/* The members of struct nbdkit_next_ops, since 1.30 and before. They begin every
 * open session of the layer below, since the filter calls next->pread (next, ...).
 */
#define BEFORE_BLOCK_SIZE                                               \
  int (*prepare) (nbdhost_next);                                        \
  int (*finalize) (nbdhost_next);                                       \
  int64_t (*get_size) (nbdhost_next);                                   \
  const char *(*export_description) (nbdhost_next);

#define AFTER_BLOCK_SIZE                                                \
  int (*can_write) (nbdhost_next);                                      \
  int (*can_flush) (nbdhost_next);                                      \
  int (*is_rotational) (nbdhost_next);                                  \
  int (*can_trim) (nbdhost_next);                                       \
  int (*can_zero) (nbdhost_next);                                       \
  int (*can_fast_zero) (nbdhost_next);                                  \
  int (*can_extents) (nbdhost_next);                                    \
  int (*can_fua) (nbdhost_next);                                        \
  int (*can_multi_conn) (nbdhost_next);                                 \
  int (*can_cache) (nbdhost_next);                                      \
  int (*pread) (nbdhost_next, void *buf, uint32_t count,                \
                uint64_t offset, uint32_t flags, int *err);             \
  int (*pwrite) (nbdhost_next, const void *buf, uint32_t count,         \
                 uint64_t offset, uint32_t flags, int *err);            \
  int (*flush) (nbdhost_next, uint32_t flags, int *err);                \
  int (*trim) (nbdhost_next, uint32_t count, uint64_t offset,           \
               uint32_t flags, int *err);                               \
  int (*zero) (nbdhost_next, uint32_t count, uint64_t offset,           \
               uint32_t flags, int *err);                               \
  int (*extents) (nbdhost_next, uint32_t count, uint64_t offset,        \
                  uint32_t flags, struct nbdkit_extents *, int *err);   \
  int (*cache) (nbdhost_next, uint32_t count, uint64_t offset,          \
                uint32_t flags, int *err);

struct nbdkit_next_ops {
  BEFORE_BLOCK_SIZE
  int (*block_size) (nbdhost_next, uint32_t *minimum, uint32_t *preferred,
                     uint32_t *maximum);
  AFTER_BLOCK_SIZE
};

struct old_next_ops {
  BEFORE_BLOCK_SIZE
  AFTER_BLOCK_SIZE
};

/* See nbdhost_next_direct. */
struct direct {
  bool known;                   /* atomic: the rest is there */
  struct nbdhost_data data;
  struct nbdkit_context *filter;
  uint64_t size;
  uint64_t *calls;              /* atomic */
};

struct next {
  union {
    struct nbdkit_next_ops now;
    struct old_next_ops old;
  } ops; /* must be the first member */
  uint64_t id;
  bool extents64; /* the filter's nbdkit_extents_aligned has 64 bits of count */
  struct direct pread, pwrite;
};

static struct next *
of_next (nbdhost_next next)
{
  return (struct next *) next;
}

/* ---- requests ---- */

/* What failed, in module, is for now why the callback fails that f stands for, until
 * that sets another error. message is f's; f may be NULL.
 */
static int
failed (struct nbdhost_frame *f, int err, char *message, const char *module)
{
  if (f) {
    f->error = err;
    free (f->message);
    f->message = message;
    f->module = module;
  }
  else
    free (message);
  errno = err;
  return -1;
}

/* Has a request done. */
static int64_t
ask (void (*go) (struct nbdhost_request *), uint64_t id,
     struct nbdhost_request *r)
{
  struct nbdhost_frame *f = nbdhost_frame;
  struct nbdhost_conn *conn = nbdhost_current_conn ();

  nbdhost_need_sigstack ();
  r->id = id;
  r->worker = f ? f->worker : NBDHOST_FOREIGN;
  r->conn = conn ? conn->id : 0;
  /* What remains if Go panics. */
  r->ret = -1;
  r->err = EIO;
  go (r);
  if (r->ret >= 0)
    return r->ret;
  failed (f, r->err, r->text, r->module);
  r->text = NULL;
  return -1;
}

static int64_t
ask_backend (struct nbdkit_backend *b, struct nbdhost_request *r)
{
  return ask (nbdhost_go_backend, b->id, r);
}

static int64_t
ask_context (struct nbdkit_context *context, struct nbdhost_request *r)
{
  return ask (nbdhost_go_context, context->id, r);
}

/* A filter that has not opened next, and uses it all the same, gets an error. */
static int64_t
ask_next (nbdhost_next next, struct nbdhost_request *r)
{
  return ask (nbdhost_go_next, next ? of_next (next)->id : 0, r);
}

/* A text that lives as long as the connection. */
static const char *
interned (char *text)
{
  const char *r;

  if (text == NULL)
    return NULL;
  r = nbdkit_strdup_intern (text);
  free (text);
  return r;
}

/* ---- next, outside of sessions ---- */

int
nbdhost_next_config (struct nbdkit_backend *b, const char *key,
                     const char *value)
{
  struct nbdhost_request r = { .op = NBDHOST_CONFIG, .key = key,
                               .value = value };

  return ask_backend (b, &r);
}

int
nbdhost_next_config_complete (struct nbdkit_backend *b)
{
  struct nbdhost_request r = { .op = NBDHOST_CONFIG_COMPLETE };

  return ask_backend (b, &r);
}

int
nbdhost_next_preconnect (struct nbdkit_backend *b, int readonly)
{
  struct nbdhost_request r = { .op = NBDHOST_PRECONNECT,
                               .readonly = readonly };

  return ask_backend (b, &r);
}

int
nbdhost_next_list_exports (struct nbdkit_backend *b, int readonly,
                           struct nbdkit_exports *exports)
{
  struct nbdhost_request r = { .op = NBDHOST_LIST_EXPORTS,
                               .readonly = readonly, .list = exports };

  return ask_backend (b, &r);
}

const char *
nbdhost_next_default_export (struct nbdkit_backend *b, int readonly)
{
  struct nbdhost_request r = { .op = NBDHOST_DEFAULT_EXPORT,
                               .readonly = readonly };

  return ask_backend (b, &r) == -1 ? NULL : interned (r.text);
}

int
nbdhost_next_open (struct nbdkit_context *context, int readonly,
                   const char *exportname)
{
  struct nbdhost_request r = { .op = NBDHOST_OPEN, .readonly = readonly,
                               .value = exportname };

  return ask_context (context, &r);
}

struct nbdkit_backend *
nbdkit_context_get_backend (struct nbdkit_context *context)
{
  return context->backend;
}

struct nbdkit_next_ops *
nbdkit_next_context_open (struct nbdkit_backend *b, int readonly,
                          const char *exportname, int shared)
{
  struct nbdhost_request r = { .op = NBDHOST_CONTEXT_OPEN,
                               .readonly = readonly, .value = exportname,
                               .shared = shared };

  return ask_backend (b, &r) == -1 ? NULL : r.ptr;
}

void
nbdkit_next_context_close (nbdhost_next next)
{
  struct nbdhost_request r = { .op = NBDHOST_CLOSE };

  if (next)
    ask_next (next, &r);
}

nbdhost_next
nbdkit_context_set_next (struct nbdkit_context *context, nbdhost_next next)
{
  struct nbdhost_request r = { .op = NBDHOST_SET_NEXT,
                               .next = next ? of_next (next)->id : 0 };

  return ask_context (context, &r) == -1 ? NULL : r.ptr;
}

/* ---- struct nbdkit_next_ops ---- */

static int
next_prepare (nbdhost_next next)
{
  struct nbdhost_request r = { .op = NBDHOST_PREPARE };

  return ask_next (next, &r);
}

static int
next_finalize (nbdhost_next next)
{
  struct nbdhost_request r = { .op = NBDHOST_FINALIZE };

  return ask_next (next, &r);
}

static int64_t
next_get_size (nbdhost_next next)
{
  struct nbdhost_request r = { .op = NBDHOST_GET_SIZE };

  return ask_next (next, &r);
}

static const char *
next_export_description (nbdhost_next next)
{
  struct nbdhost_request r = { .op = NBDHOST_EXPORT_DESCRIPTION };

  return ask_next (next, &r) == -1 ? NULL : interned (r.text);
}

static int
next_block_size (nbdhost_next next, uint32_t *minimum, uint32_t *preferred,
                 uint32_t *maximum)
{
  struct nbdhost_request r = { .op = NBDHOST_BLOCK_SIZE };

  if (ask_next (next, &r) == -1)
    return -1;
  *minimum = r.minimum;
  *preferred = r.preferred;
  *maximum = r.maximum;
  return 0;
}

#define CAN(name, what)                                                 \
  static int next_##name (nbdhost_next next)                            \
  {                                                                     \
    struct nbdhost_request r = { .op = what };                          \
                                                                        \
    return ask_next (next, &r);                                         \
  }
CAN (can_write, NBDHOST_CAN_WRITE)
CAN (can_flush, NBDHOST_CAN_FLUSH)
CAN (is_rotational, NBDHOST_IS_ROTATIONAL)
CAN (can_trim, NBDHOST_CAN_TRIM)
CAN (can_zero, NBDHOST_CAN_ZERO)
CAN (can_fast_zero, NBDHOST_CAN_FAST_ZERO)
CAN (can_extents, NBDHOST_CAN_EXTENTS)
CAN (can_fua, NBDHOST_CAN_FUA)
CAN (can_multi_conn, NBDHOST_CAN_MULTI_CONN)
CAN (can_cache, NBDHOST_CAN_CACHE)

/* Does a data request; its error goes to *err, which filters may rely on. */
static int
data (nbdhost_next next, struct nbdhost_request *r, int *err)
{
  if (ask_next (next, r) != -1)
    return 0;
  if (err)
    *err = r->err;
  return -1;
}

/* The next that a filter is called with, whose context this is; 0: none. */
static uintptr_t
next_of (const struct nbdkit_context *filter)
{
  return (uintptr_t) __atomic_load_n (&filter->next, __ATOMIC_ACQUIRE);
}

static struct nbdhost_result
call_io (const struct nbdhost_data *data, bool filter, bool write)
{
  if (filter)
    return nbdhost_filter_io (*data);
  return write ? nbdhost_call_pwrite (*data) : nbdhost_call_pread (*data);
}

/* Lets the next call begin, unless there is none or the burst was stopped. */
static bool
begin_next (const struct nbdhost_burst *b, uint32_t *begun)
{
  uint32_t done = b->done;

  return done < b->len &&
         __atomic_compare_exchange_n (begun, &done, done + 1, false,
                                      __ATOMIC_ACQ_REL, __ATOMIC_RELAXED);
}

struct nbdhost_result
nbdhost_call_burst (struct nbdhost_burst *b, uint32_t *begun)
{
  struct nbdkit_context *filter = (struct nbdkit_context *) b->filter;
  struct nbdhost_result r;

  b->done = 0;
  do {
    const struct nbdhost_burst_call *c = &b->calls[b->done++];
    struct nbdhost_data data = c->write ? b->write : b->read;

    if (filter)
      data.next = next_of (filter);
    data.worker = b->worker;
    data.cookie = c->cookie;
    data.buf = c->buf;
    data.count = c->count;
    data.offset = c->offset;
    r = call_io (&data, filter != NULL, c->write);
  } while (r.ret >= 0 && begin_next (b, begun));
  return r;
}

/* Calls the module below from here, if Go has said how. false: ask Go. A thread of
 * the filter's own has no frame to make the call in.
 */
static bool
call_directly (nbdhost_next next, bool write, const void *buf, uint32_t count,
               uint64_t offset, int *err, int *ret)
{
  struct nbdhost_frame *f = nbdhost_frame;
  struct nbdhost_data data;
  struct nbdhost_result r;
  struct direct *d;

  if (next == NULL || f == NULL || nbdhost_verbose ())
    return false;
  d = write ? &of_next (next)->pwrite : &of_next (next)->pread;
  if (!__atomic_load_n (&d->known, __ATOMIC_ACQUIRE) || offset > d->size ||
      count > d->size - offset)
    return false;
  data = d->data;
  if (d->filter && (data.next = next_of (d->filter)) == 0)
    return false;
  data.worker = f->worker;
  data.buf = (uintptr_t) buf;
  data.count = count;
  data.offset = offset;
  __atomic_fetch_add (d->calls, 1, __ATOMIC_RELAXED);
  r = call_io (&data, d->filter != NULL, write);
  *ret = r.ret < 0 ? failed (f, r.err, r.message, r.module) : 0;
  if (*ret == -1 && err)
    *err = r.err;
  return true;
}

static int
next_pread (nbdhost_next next, void *buf, uint32_t count, uint64_t offset,
            uint32_t flags, int *err)
{
  struct nbdhost_request r = { .op = NBDHOST_PREAD, .buf = buf,
                               .count = count, .offset = offset,
                               .flags = flags };
  int ret;

  if (call_directly (next, false, buf, count, offset, err, &ret))
    return ret;
  return data (next, &r, err);
}

static int
next_pwrite (nbdhost_next next, const void *buf, uint32_t count,
             uint64_t offset, uint32_t flags, int *err)
{
  struct nbdhost_request r = { .op = NBDHOST_PWRITE, .buf = (void *) buf,
                               .count = count, .offset = offset,
                               .flags = flags };
  int ret;

  if (flags == 0 && call_directly (next, true, buf, count, offset, err, &ret))
    return ret;
  return data (next, &r, err);
}

static int
next_flush (nbdhost_next next, uint32_t flags, int *err)
{
  struct nbdhost_request r = { .op = NBDHOST_FLUSH, .flags = flags };

  return data (next, &r, err);
}

#define RANGE(name, what)                                               \
  static int next_##name (nbdhost_next next, uint32_t count,            \
                          uint64_t offset, uint32_t flags, int *err)    \
  {                                                                     \
    struct nbdhost_request r = { .op = what, .count = count,            \
                                 .offset = offset, .flags = flags };    \
                                                                        \
    return data (next, &r, err);                                        \
  }
RANGE (trim, NBDHOST_TRIM)
RANGE (zero, NBDHOST_ZERO)
RANGE (cache, NBDHOST_CACHE)

static int
next_extents (nbdhost_next next, uint32_t count, uint64_t offset,
              uint32_t flags, struct nbdkit_extents *extents, int *err)
{
  struct nbdhost_request r = { .op = NBDHOST_EXTENTS, .count = count,
                               .offset = offset, .flags = flags,
                               .list = extents };

  return data (next, &r, err);
}

#define OPS(with_block_size)                                            \
  {                                                                     \
    .prepare = next_prepare, .finalize = next_finalize,                 \
    .get_size = next_get_size,                                          \
    .export_description = next_export_description, with_block_size      \
    .can_write = next_can_write, .can_flush = next_can_flush,           \
    .is_rotational = next_is_rotational, .can_trim = next_can_trim,     \
    .can_zero = next_can_zero, .can_fast_zero = next_can_fast_zero,     \
    .can_extents = next_can_extents, .can_fua = next_can_fua,           \
    .can_multi_conn = next_can_multi_conn,                              \
    .can_cache = next_can_cache, .pread = next_pread,                   \
    .pwrite = next_pwrite, .flush = next_flush, .trim = next_trim,      \
    .zero = next_zero, .extents = next_extents, .cache = next_cache     \
  }
#define NOTHING
#define BLOCK_SIZE .block_size = next_block_size,

static const struct nbdkit_next_ops now = OPS (BLOCK_SIZE);
static const struct old_next_ops old = OPS (NOTHING);

/* ---- making the objects ---- */

struct nbdkit_backend *
nbdhost_backend_new (uint64_t id)
{
  struct nbdkit_backend *b = calloc (1, sizeof *b);

  if (b != NULL) {
    b->id = id;
    nbdhost_live_add (1);
  }
  return b;
}

struct nbdkit_context *
nbdhost_filter_context_new (uint64_t id, struct nbdkit_backend *b)
{
  struct nbdkit_context *context = calloc (1, sizeof *context);

  if (context != NULL) {
    context->id = id;
    context->backend = b;
    nbdhost_live_add (1);
  }
  return context;
}

nbdhost_next
nbdhost_next_new (uint64_t id, bool block_size, bool extents64)
{
  struct next *next = calloc (1, sizeof *next);

  if (next == NULL)
    return NULL;
  if (block_size)
    next->ops.now = now;
  else
    next->ops.old = old;
  next->id = id;
  next->extents64 = extents64;
  nbdhost_live_add (1);
  return &next->ops.now;
}

void
nbdhost_filter_set_next (struct nbdkit_context *context, nbdhost_next next)
{
  __atomic_store_n (&context->next, next, __ATOMIC_RELEASE);
}

void
nbdhost_next_direct (nbdhost_next next, bool write, struct nbdhost_data data,
                     struct nbdkit_context *filter, uint64_t size,
                     uint64_t *calls)
{
  struct direct *d = write ? &of_next (next)->pwrite : &of_next (next)->pread;

  d->data = data;
  d->filter = filter;
  d->size = size;
  d->calls = calls;
  __atomic_store_n (&d->known, true, __ATOMIC_RELEASE);
}

void
nbdhost_filter_object_free (void *object)
{
  free (object);
  nbdhost_live_add (-1);
}

/* ---- extents ---- */

int
nbdhost_extents_append (struct nbdkit_extents *x, const struct nbdkit_extent *e,
                        size_t n)
{
  for (size_t i = 0; i < n; ++i)
    if (nbdkit_add_extent (x, e[i].offset, e[i].length, e[i].type) == -1)
      return errno;
  return 0;
}

/* One answer about [offset, end), which may reach on, but is cut at limit: at
 * least one extent. NULL: failed.
 */
static struct nbdkit_extents *
answer (nbdhost_next next, uint64_t offset, uint64_t end, uint64_t limit,
        uint32_t flags, int *err)
{
  struct nbdkit_extents *x = nbdkit_extents_new (offset, limit);
  uint64_t count = end - offset;

  if (x == NULL) {
    *err = errno;
    return NULL;
  }
  if (next_extents (next, count > UINT32_MAX ? UINT32_MAX : count, offset,
                    flags, x, err) == -1)
    goto fail;
  if (x->len == 0) {
    nbdkit_error ("get extents: the next layer has none at offset %ju",
                  (uintmax_t) offset);
    *err = EIO;
    goto fail;
  }
  return x;

 fail:
  nbdkit_extents_free (x);
  return NULL;
}

enum { REQ_ONE = 1 << 2 };

struct nbdkit_extents *
nbdkit_extents_full (nbdhost_next next, uint32_t count, uint64_t offset,
                     uint32_t flags, int *err)
{
  uint64_t end = offset + count;
  struct nbdkit_extents *full = nbdkit_extents_new (offset, end), *x;

  if (full == NULL) {
    *err = errno;
    return NULL;
  }
  while (offset < end) {
    x = answer (next, offset, end, end, flags & ~REQ_ONE, err);
    if (x == NULL)
      goto fail;
    *err = nbdhost_extents_append (full, x->list, x->len);
    offset = x->list[x->len - 1].offset + x->list[x->len - 1].length;
    nbdkit_extents_free (x);
    if (*err != 0)
      goto fail;
  }
  return full;

 fail:
  nbdkit_extents_free (full);
  return NULL;
}

/* The type of [offset, end), whatever types its parts have: what holds for all of
 * them. -1: failed.
 */
static int64_t
common_type (nbdhost_next next, uint64_t offset, uint64_t end, uint32_t flags,
             int *err)
{
  uint32_t type = UINT32_MAX;

  while (offset < end) {
    struct nbdkit_extents *x = answer (next, offset, end, end, flags, err);

    if (x == NULL)
      return -1;
    for (size_t i = 0; i < x->len; ++i) {
      type &= x->list[i].type;
      offset = x->list[i].offset + x->list[i].length;
    }
    nbdkit_extents_free (x);
  }
  return type;
}

int
nbdkit_extents_aligned (nbdhost_next next, uint64_t count, uint64_t offset,
                        uint32_t flags, uint32_t align,
                        struct nbdkit_extents *extents, int *err)
{
  const uint64_t mask = (uint64_t) align - 1;
  int64_t size = next_get_size (next);
  struct nbdkit_extents *x;
  uint64_t end;

  if (size == -1) {
    *err = errno;
    return -1;
  }
  if (!next || !of_next (next)->extents64)
    count &= UINT32_MAX; /* the rest of the register is anything */
  if (offset > (uint64_t) size || count > size - offset || align == 0 ||
      (align & mask) != 0) {
    nbdkit_error ("get aligned extents: got offset %ju and count %ju, need a"
                  " range within the %jd bytes of the next layer, and an"
                  " alignment (%u) that is a power of 2",
                  (uintmax_t) offset, (uintmax_t) count, (intmax_t) size,
                  align);
    *err = EINVAL;
    return -1;
  }
  /* Neither sum overflows: both are at most 2^63 - 1 + 2^32 - 1. */
  end = (offset + count + mask) & ~mask;
  if (end > (uint64_t) size)
    end = size;
  x = answer (next, offset, end, size, flags, err);
  if (x == NULL)
    return -1;

  /* Whole blocks are taken as they are, also beyond what was asked for. A block in which
   * an extent ends is one extent, within that.
   */
  for (size_t i = 0; i < x->len;) {
    uint64_t stop = x->list[i].offset + x->list[i].length;
    uint64_t whole = stop == (uint64_t) size ? stop : stop & ~mask;
    int64_t type = x->list[i].type;

    if (whole <= offset) {
      if (offset >= end)
        break;
      whole = (offset | mask) + 1;
      if (whole > (uint64_t) size)
        whole = size;
      type = common_type (next, offset, whole, flags & ~REQ_ONE, err);
    }
    if (type == -1 ||
        nbdkit_add_extent (extents, offset, whole - offset, type) == -1) {
      if (type != -1)
        *err = errno;
      nbdkit_extents_free (x);
      return -1;
    }
    offset = whole;
    while (i < x->len && x->list[i].offset + x->list[i].length <= offset)
      ++i;
    if (flags & REQ_ONE)
      break;
  }
  nbdkit_extents_free (x);
  return 0;
}
