/* Prints the offset and size of every member of struct nbdkit_plugin, or with
 * -DFILTER of struct nbdkit_filter, and the constants, from the nbdkit header that it
 * is compiled with. -DDUMP_PLUGIN: filters have .dump_plugin.
 */
#include <stddef.h>
#include <stdio.h>

#ifdef FILTER
#include <nbdkit-filter.h>
#define STRUCT struct nbdkit_filter
#else
#include <nbdkit-plugin.h>
#define STRUCT struct nbdkit_plugin
#endif

#define C(name) printf ("%s %d\n", #name, (int) NBDKIT_##name);
#define F(name)                                                         \
  printf ("%s %zu %zu\n", #name, offsetof (STRUCT, name), \
          sizeof (((STRUCT *) 0)->name));

int
main (void)
{
#ifdef FILTER
  F (_api_version) F (_version)
  F (name) F (longname) F (description) F (load) F (unload)
  F (config) F (config_complete) F (config_help) F (thread_model)
#ifdef DUMP_PLUGIN
  F (dump_plugin)
#endif
  F (get_ready) F (after_fork) F (cleanup)
  F (preconnect) F (list_exports) F (default_export)
  F (open) F (close) F (prepare) F (finalize)
  F (get_size) F (export_description) F (block_size)
  F (can_write) F (can_flush) F (is_rotational) F (can_trim) F (can_zero)
  F (can_fast_zero) F (can_extents) F (can_fua) F (can_multi_conn)
  F (can_cache)
  F (pread) F (pwrite) F (flush) F (trim) F (zero) F (extents) F (cache)
  printf ("sizeof %zu 0\n", sizeof (STRUCT));
  C (ZERO_NONE) C (ZERO_EMULATE) C (ZERO_NATIVE)
#else
  F (_struct_size) F (_api_version) F (_thread_model)
  F (name) F (longname) F (version) F (description)
  F (load) F (unload) F (config) F (config_complete) F (config_help)
  F (open) F (close) F (get_size)
  F (can_write) F (can_flush) F (is_rotational) F (can_trim)
#if NBDKIT_API_VERSION == 2
  F (_pread_v1) F (_pwrite_v1) F (_flush_v1) F (_trim_v1) F (_zero_v1)
#else
  F (_unused1) F (_unused2) F (_unused3) F (_unused4) F (_unused5)
#endif
  F (errno_is_preserved) F (dump_plugin) F (can_zero) F (can_fua)
  F (pread) F (pwrite) F (flush) F (trim) F (zero)
  F (magic_config_key) F (can_multi_conn) F (can_extents) F (extents)
  F (can_cache) F (cache) F (thread_model) F (can_fast_zero)
  F (preconnect) F (get_ready) F (after_fork) F (list_exports)
  F (default_export) F (export_description) F (cleanup)
  F (block_size)
  printf ("sizeof %zu 0\n", sizeof (STRUCT));
  C (THREAD_MODEL_SERIALIZE_CONNECTIONS)
  C (THREAD_MODEL_SERIALIZE_ALL_REQUESTS)
  C (THREAD_MODEL_SERIALIZE_REQUESTS)
  C (THREAD_MODEL_PARALLEL)
  C (FLAG_MAY_TRIM) C (FLAG_FUA) C (FLAG_REQ_ONE) C (FLAG_FAST_ZERO)
  C (FUA_NONE) C (FUA_EMULATE) C (FUA_NATIVE)
  C (CACHE_NONE) C (CACHE_EMULATE) C (CACHE_NATIVE)
  C (EXTENT_HOLE) C (EXTENT_ZERO)
#endif
  return 0;
}
