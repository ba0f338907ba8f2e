/* What only filters call. Filters cannot be loaded yet; the names are here so
 * that every module that names them links.
 */
#include <errno.h>

#include "shim.h"

static void
unsupported (const char *function, int *err)
{
  nbdkit_error ("%s: filters are not supported yet", function);
  if (err)
    *err = ENOTSUP;
  errno = ENOTSUP;
}

struct nbdkit_extents *
nbdkit_extents_full (struct nbdkit_next_ops *next, uint32_t count,
                     uint64_t offset, uint32_t flags, int *err)
{
  (void) next, (void) count, (void) offset, (void) flags;
  unsupported ("nbdkit_extents_full", err);
  return NULL;
}

int
nbdkit_extents_aligned (struct nbdkit_next_ops *next, uint64_t count,
                        uint64_t offset, uint32_t flags, uint32_t align,
                        struct nbdkit_extents *extents, int *err)
{
  (void) next, (void) count, (void) offset, (void) flags, (void) align;
  (void) extents;
  unsupported ("nbdkit_extents_aligned", err);
  return -1;
}

struct nbdkit_backend *
nbdkit_context_get_backend (struct nbdkit_context *context)
{
  (void) context;
  unsupported ("nbdkit_context_get_backend", NULL);
  return NULL;
}

struct nbdkit_next_ops *
nbdkit_next_context_open (struct nbdkit_backend *backend, int readonly,
                          const char *exportname, int shared)
{
  (void) backend, (void) readonly, (void) exportname, (void) shared;
  unsupported ("nbdkit_next_context_open", NULL);
  return NULL;
}

void
nbdkit_next_context_close (struct nbdkit_next_ops *next)
{
  (void) next;
  unsupported ("nbdkit_next_context_close", NULL);
}

struct nbdkit_next_ops *
nbdkit_context_set_next (struct nbdkit_context *context,
                         struct nbdkit_next_ops *next)
{
  (void) context, (void) next;
  unsupported ("nbdkit_context_set_next", NULL);
  return NULL;
}
