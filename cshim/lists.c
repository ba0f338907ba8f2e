/* The lists that .extents and .list_exports fill in. */
#include <errno.h>
#include <inttypes.h>
#include <string.h>

#include "shim.h"

/* Make room for one more element of a list with len, cap. */
#define GROW(l)                                                         \
  ((l)->len < (l)->cap                                                  \
     ? true                                                             \
     : grow ((void **) &(l)->list, &(l)->cap, sizeof (l)->list[0]))

static bool
grow (void **list, size_t *cap, size_t size)
{
  size_t n = *cap ? *cap * 2 : 16;
  void *p = reallocarray (*list, n, size);

  if (p == NULL)
    return false;
  *list = p;
  *cap = n;
  return true;
}

/* ---- extents ---- */

/* An answer holds no more; what comes after is dropped (nbdkit-plugin(3)). */
enum { MAX_EXTENTS = 1 << 20 };

#define NO_EXTENT UINT64_MAX

struct nbdkit_extents *
nbdkit_extents_new (uint64_t start, uint64_t end)
{
  struct nbdkit_extents *x;

  if (start > INT64_MAX || end > INT64_MAX || start > end) {
    errno = ERANGE;
    nbdkit_error ("make extents list: got %" PRIu64 " to %" PRIu64
                  ", need start <= end <= %" PRIi64, start, end, INT64_MAX);
    errno = ERANGE;
    return NULL;
  }
  x = calloc (1, sizeof *x);
  if (x == NULL) {
    nbdkit_error ("make extents list: %m");
    return NULL;
  }
  x->start = start;
  x->end = end;
  x->next = NO_EXTENT;
  nbdhost_live_add (1);
  return x;
}

void
nbdkit_extents_free (struct nbdkit_extents *x)
{
  if (x == NULL)
    return;
  free (x->list);
  free (x);
  nbdhost_live_add (-1);
}

size_t
nbdkit_extents_count (const struct nbdkit_extents *x)
{
  return x->len;
}

struct nbdkit_extent
nbdkit_get_extent (const struct nbdkit_extents *x, size_t i)
{
  return x->list[i];
}

int
nbdkit_add_extent (struct nbdkit_extents *x, uint64_t offset, uint64_t length,
                   uint32_t type)
{
  uint64_t end = length > NO_EXTENT - offset ? NO_EXTENT : offset + length;

  if (x->next != NO_EXTENT && offset != x->next) {
    nbdkit_error ("add extent: got offset %" PRIu64 ", need %" PRIu64
                  ": extents are ascending and contiguous", offset, x->next);
    errno = ERANGE;
    return -1;
  }
  x->next = end;

  if (end > x->end)
    end = x->end;
  if (length == 0 || offset >= x->end || end <= x->start ||
      x->len == MAX_EXTENTS)
    return 0;
  if (offset < x->start)
    offset = x->start;
  if (x->len == 0 && offset > x->start) {
    nbdkit_error ("add extent: got offset %" PRIu64 " first, need one at or"
                  " before %" PRIu64, offset, x->start);
    errno = ERANGE;
    return -1;
  }

  if (x->len > 0 && x->list[x->len - 1].type == type) {
    x->list[x->len - 1].length += end - offset;
    return 0;
  }
  if (!GROW (x)) {
    nbdkit_error ("add extent: %m");
    return -1;
  }
  x->list[x->len++] = (struct nbdkit_extent) {
    .offset = offset, .length = end - offset, .type = type
  };
  return 0;
}

/* ---- exports ---- */

enum { MAX_EXPORTS = 10000, MAX_STRING = 4096 };

struct nbdkit_exports *
nbdkit_exports_new (void)
{
  struct nbdkit_exports *x = calloc (1, sizeof *x);

  if (x == NULL)
    nbdkit_error ("make exports list: %m");
  else
    nbdhost_live_add (1);
  return x;
}

void
nbdkit_exports_free (struct nbdkit_exports *x)
{
  if (x == NULL)
    return;
  for (size_t i = 0; i < x->len; ++i) {
    free (x->list[i].name);
    free (x->list[i].description);
  }
  free (x->list);
  free (x);
  nbdhost_live_add (-1);
}

size_t
nbdkit_exports_count (const struct nbdkit_exports *x)
{
  return x->len;
}

struct nbdkit_export
nbdkit_get_export (const struct nbdkit_exports *x, size_t i)
{
  return x->list[i];
}

int
nbdkit_add_export (struct nbdkit_exports *x, const char *name,
                   const char *description)
{
  struct nbdkit_export e = { 0 };

  if (x->len == MAX_EXPORTS) {
    nbdkit_error ("add export: got more than %d", MAX_EXPORTS);
    errno = EINVAL;
    return -1;
  }
  if (strnlen (name, MAX_STRING + 1) > MAX_STRING ||
      (description && strnlen (description, MAX_STRING + 1) > MAX_STRING)) {
    nbdkit_error ("add export: got a name or description longer than %d bytes",
                  MAX_STRING);
    errno = EINVAL;
    return -1;
  }
  e.name = strdup (name);
  if (description)
    e.description = strdup (description);
  if (e.name == NULL || (description && e.description == NULL) || !GROW (x)) {
    nbdkit_error ("add export: %m");
    free (e.name);
    free (e.description);
    errno = ENOMEM;
    return -1;
  }
  x->list[x->len++] = e;
  return 0;
}

int
nbdkit_use_default_export (struct nbdkit_exports *x)
{
  x->use_default = true;
  return 0;
}
