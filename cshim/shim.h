/* Declarations shared by the C files of this package and by cgo.
 *
 * Nothing here is included by a module: modules are compiled against nbdkit's
 * own headers. The prototypes below repeat those of nbdkit-plugin(3),
 * nbdkit-filter(3) and the manual page of each function.
 */
#ifndef NBDHOST_SHIM_H
#define NBDHOST_SHIM_H

#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/socket.h>

#define PUBLIC __attribute__ ((visibility ("default")))
#define PRINTF(fmt, args) __attribute__ ((format (printf, fmt, args)))

/* ---- state of a call (state.c) ---- */

struct interned;

/* One client connection. The descriptor is borrowed, never closed here. */
struct nbdhost_conn {
  uint64_t id;                 /* from 1 */
  int fd;                      /* socket, -1: none */
  int tls;                     /* 1 once TLS has been negotiated */
  char *dn, *issuer_dn;        /* of the client's certificate, NULL: none */
  struct interned *interned;   /* strings freed with the connection */
};

/* What a module may ask about the call it is in. Immutable while calls use it. */
struct nbdhost_context {
  struct nbdhost_conn *conn;   /* NULL: outside any connection */
  char *export_name;           /* NULL: none negotiated */
  int errno_is_preserved;
  int tls;                     /* nbdkit_is_tls without a connection */
};

/* Workers of a frame, and of a request of a thread without one. */
enum { NBDHOST_HANDSHAKE = -1, NBDHOST_FOREIGN = -2 };

/* One call into a module. Frames live on the C stack, innermost first; a call
 * made from inside a callback pushes its own, so the outer one is intact
 * when it returns. Frames are per thread: a module's own threads have none.
 */
struct nbdhost_frame {
  const struct nbdhost_context *ctx;
  void *fn;                    /* the callback */
  int worker;                  /* or NBDHOST_HANDSHAKE */
  enum { NBDHOST_NO_REQUEST, NBDHOST_REQUEST, NBDHOST_RANGE } kind;
  uint64_t cookie;             /* of a request: the client's */
  uint64_t offset;             /* of a request for a range of bytes */
  uint32_t count;
  int error;                   /* nbdkit_set_error's value, 0: not called */
  char *message;               /* last nbdkit_error, NULL: none */
  const char *module;          /* where the error is from; NULL: fn's own */
  struct nbdhost_frame *outer;
};

extern __thread struct nbdhost_frame *nbdhost_frame;

/* The innermost frame of this thread. Setting returns the one before: a call
 * that another thread makes while this one waits is still within its frame.
 */
struct nbdhost_frame *nbdhost_get_frame (void);
struct nbdhost_frame *nbdhost_set_frame (struct nbdhost_frame *);

/* The connection of the current call, or NULL. */
struct nbdhost_conn *nbdhost_current_conn (void);

struct nbdhost_conn *nbdhost_conn_new (uint64_t id, int fd);
void nbdhost_conn_set_dn (struct nbdhost_conn *, const char *dn,
                          const char *issuer_dn);
void nbdhost_conn_free (struct nbdhost_conn *);
struct nbdhost_context *nbdhost_context_new (struct nbdhost_conn *,
                                             const char *export_name,
                                             int errno_is_preserved);
void nbdhost_context_free (struct nbdhost_context *);

/* Copy n bytes of str into the list of a connection, or of the process if conn
 * is NULL. NULL and errno when out of memory.
 */
const char *nbdhost_intern (struct nbdhost_conn *conn, const char *str,
                            size_t n);

/* Connections, contexts and lists that have not been freed. */
long nbdhost_live_objects (void);
void nbdhost_live_add (long n);

/* ---- process-wide settings (state.c) ---- */

struct nbdhost_settings {
  bool verbose;
  bool stdio_safe;
  const char *name;            /* --name, NULL: not set */
  int quit_fd;                 /* eventfd, readable once the server stops */
  int pid;                     /* of the server: a forked child has another */
};

extern struct nbdhost_settings nbdhost_settings;

static inline bool
nbdhost_verbose (void)
{
  return __atomic_load_n (&nbdhost_settings.verbose, __ATOMIC_RELAXED);
}

int nbdhost_init (void);       /* 0, or an errno */
void nbdhost_set_name (const char *name);
void nbdhost_set_verbose (int);
void nbdhost_set_stdio_safe (int);
void nbdhost_set_quit (void);

/* False in a child that a module forked. Such a child must never enter Go:
 * the runtime's other threads do not exist there and the call would hang.
 */
bool nbdhost_in_server (void);

/* ---- stacks of signal handlers (sigstack.c) ---- */

extern __thread bool nbdhost_has_sigstack;
void nbdhost_set_sigstack (void);

/* Before a thread calls a module, and before one of a module's own, of which a signal
 * handler may need it, calls Go. Not in a signal handler.
 */
static inline void
nbdhost_need_sigstack (void)
{
  if (!nbdhost_has_sigstack)
    nbdhost_set_sigstack ();
}

void nbdhost_signals_save (void);
void nbdhost_signals_restore (void);

/* ---- crashes (crash.c) ---- */

/* A callback of a module, so that a call can be named. Never freed. */
struct nbdhost_callback {
  const struct nbdhost_callback *next;
  const void *fn;
  const char *kind;            /* "plugin", "filter" */
  const char *module;
  const char *name;            /* "pread" */
};

/* The callback at fn, or NULL. Safe in a signal handler. */
const struct nbdhost_callback *nbdhost_callback_at (const void *fn);
/* The texts must live for ever. ENOMEM or 0. */
int nbdhost_callback_add (const void *fn, const char *kind, const char *module,
                          const char *name);

/* What a crash is reported as: head, and then the message or, of an object that
 * head begins, the rest. head must live for ever.
 */
enum nbdhost_crash_format { NBDHOST_CRASH_TEXT, NBDHOST_CRASH_JSON };
void nbdhost_crash_report_to (int fd, enum nbdhost_crash_format,
                              const char *head);
int nbdhost_crash_init (void); /* 0, or an errno */

/* ---- the command line (state.c) ---- */

/* Put n bytes, arguments with a NUL after each, where ps(1) finds those that the
 * program was started with, as far as there is room.
 */
void nbdhost_set_command_line (const char *args, size_t n);

/* ---- exported by Go (export.go) ---- */

enum { NBDHOST_LEVEL_ERROR = 0, NBDHOST_LEVEL_DEBUG = 1 };

/* What nbdkit_error or nbdkit_debug was given, and where. */
struct nbdhost_message {
  int level;
  uint64_t conn;               /* 0: none */
  int worker;
  const char *module, *callback; /* NULL: outside of calls */
  const char *export_name;     /* NULL: none */
  bool request;                /* in one, whose cookie follows */
  uint64_t cookie;
  const char *text;
};

extern void nbdhost_go_log (struct nbdhost_message *);
extern void nbdhost_go_secret (char *text);
extern void nbdhost_go_shutdown (void);
extern void nbdhost_go_disconnect (uint64_t conn, int force);

/* What a filter asks of the layers below. Which of the arguments and results
 * count depends on op. Texts are the caller's in both directions.
 */
enum nbdhost_op {
  /* of a backend */
  NBDHOST_CONFIG, NBDHOST_CONFIG_COMPLETE, NBDHOST_PRECONNECT,
  NBDHOST_LIST_EXPORTS, NBDHOST_DEFAULT_EXPORT, NBDHOST_CONTEXT_OPEN,
  /* of a context */
  NBDHOST_OPEN, NBDHOST_SET_NEXT,
  /* of a next */
  NBDHOST_PREPARE, NBDHOST_FINALIZE, NBDHOST_CLOSE,
  NBDHOST_GET_SIZE, NBDHOST_EXPORT_DESCRIPTION, NBDHOST_BLOCK_SIZE,
  NBDHOST_CAN_WRITE, NBDHOST_CAN_FLUSH, NBDHOST_IS_ROTATIONAL,
  NBDHOST_CAN_TRIM, NBDHOST_CAN_ZERO, NBDHOST_CAN_FAST_ZERO,
  NBDHOST_CAN_EXTENTS, NBDHOST_CAN_FUA, NBDHOST_CAN_MULTI_CONN,
  NBDHOST_CAN_CACHE,
  NBDHOST_PREAD, NBDHOST_PWRITE, NBDHOST_FLUSH, NBDHOST_TRIM, NBDHOST_ZERO,
  NBDHOST_EXTENTS, NBDHOST_CACHE,
};

struct nbdhost_request {
  enum nbdhost_op op;
  int worker;                  /* of the thread that asks */
  uint64_t conn;               /* of the thread that asks, 0: none */
  uint64_t id;                 /* the handle of what is asked */
  uint64_t next;               /* set_next: 0 for NULL */
  const char *key, *value;     /* config; an export's name in value */
  int readonly, shared;
  void *buf;
  uint32_t count;
  uint64_t offset;
  uint32_t flags;
  void *list;                  /* struct nbdkit_exports, struct nbdkit_extents */

  int64_t ret;                 /* negative: failed */
  int err;                     /* if it failed */
  char *text;                  /* malloc'd: the answer, or the error's message */
  const char *module;          /* where the error is from, NULL: unknown */
  void *ptr;
  uint32_t minimum, preferred, maximum;
};

extern void nbdhost_go_backend (struct nbdhost_request *);
extern void nbdhost_go_context (struct nbdhost_request *);
extern void nbdhost_go_next (struct nbdhost_request *);

/* ---- calls into modules (call.c) ---- */

struct nbdhost_result {
  int64_t ret;
  void *ptr;
  char *message;               /* malloc'd, the caller's; NULL: none */
  const char *module;          /* where the error is from, NULL: unknown */
  int err;                     /* 0 on success */
};

typedef const struct nbdhost_context *nbdhost_ctx;

void nbdhost_call_void (nbdhost_ctx, void *fn);
struct nbdhost_result nbdhost_call_int (nbdhost_ctx, void *fn);
struct nbdhost_result nbdhost_call_config (nbdhost_ctx, void *fn,
                                           const char *key, const char *value);
struct nbdhost_result nbdhost_call_preconnect (nbdhost_ctx, void *fn,
                                               int readonly);
struct nbdhost_result nbdhost_call_list_exports (nbdhost_ctx, void *fn,
                                                 int readonly, int is_tls);
struct nbdhost_result nbdhost_call_default_export (nbdhost_ctx, void *fn,
                                                   int readonly, int is_tls);
struct nbdhost_result nbdhost_call_open (nbdhost_ctx, void *fn, int readonly);
void nbdhost_call_close (nbdhost_ctx, void *fn, void *handle);
struct nbdhost_result nbdhost_call_handle_int (nbdhost_ctx, void *fn,
                                               void *handle);
struct nbdhost_result nbdhost_call_handle_int64 (nbdhost_ctx, void *fn,
                                                 void *handle);
struct nbdhost_result nbdhost_call_handle_string (nbdhost_ctx, void *fn,
                                                  void *handle);
struct nbdhost_block_size {
  struct nbdhost_result r;
  uint32_t minimum, preferred, maximum;
};
struct nbdhost_block_size nbdhost_call_block_size (nbdhost_ctx, void *fn,
                                                   void *handle);

/* A data callback with its arguments, as far as it has them. The pointers are
 * numbers: cgo would look at each whether it leads to memory of Go's, which
 * takes 12 ns, and none does.
 */
struct nbdhost_data {
  uintptr_t ctx, fn;           /* nbdhost_ctx */
  uintptr_t next, handle;      /* nbdhost_next, of a filter */
  /* Which of a client's requests it is for, unless a callback makes the call:
   * then it is for that one's.
   */
  int worker;                  /* or NBDHOST_HANDSHAKE, NBDHOST_FOREIGN */
  uint64_t cookie;
  uintptr_t buf;
  uint32_t count, flags;       /* v1: none but may_trim, 0 or not */
  uint64_t offset;
};

struct nbdhost_result nbdhost_call_pread (struct nbdhost_data);
struct nbdhost_result nbdhost_call_pwrite (struct nbdhost_data);
struct nbdhost_result nbdhost_call_flush (struct nbdhost_data);
struct nbdhost_result nbdhost_call_range (struct nbdhost_data);
struct nbdhost_result nbdhost_call_extents (struct nbdhost_data);
struct nbdhost_result nbdhost_call_pread_v1 (struct nbdhost_data);
struct nbdhost_result nbdhost_call_pwrite_v1 (struct nbdhost_data);
struct nbdhost_result nbdhost_call_flush_v1 (struct nbdhost_data);
struct nbdhost_result nbdhost_call_trim_v1 (struct nbdhost_data);
struct nbdhost_result nbdhost_call_zero_v1 (struct nbdhost_data);

/* ---- calls into filters (call.c) ---- */

struct nbdkit_backend;
struct nbdkit_context;
struct nbdkit_next_ops;
typedef struct nbdkit_next_ops *nbdhost_next;

struct nbdhost_result nbdhost_filter_config (void *fn, struct nbdkit_backend *,
                                             const char *key,
                                             const char *value);
struct nbdhost_result nbdhost_filter_config_complete (void *fn,
                                                      struct nbdkit_backend *);
/* .thread_model, .get_ready */
struct nbdhost_result nbdhost_filter_model (void *fn, int model);
struct nbdhost_result nbdhost_filter_after_fork (void *fn,
                                                 struct nbdkit_backend *);
void nbdhost_filter_cleanup (void *fn, struct nbdkit_backend *);
struct nbdhost_result nbdhost_filter_preconnect (nbdhost_ctx, void *fn,
                                                 struct nbdkit_backend *,
                                                 int readonly);
struct nbdhost_result nbdhost_filter_list_exports (nbdhost_ctx, void *fn,
                                                   struct nbdkit_backend *,
                                                   int readonly, int is_tls);
struct nbdhost_result nbdhost_filter_default_export (nbdhost_ctx, void *fn,
                                                     struct nbdkit_backend *,
                                                     int readonly, int is_tls);
struct nbdhost_result nbdhost_filter_open (nbdhost_ctx, int worker, void *fn,
                                           struct nbdkit_context *,
                                           int readonly, const char *exportname,
                                           int is_tls);
void nbdhost_filter_close (nbdhost_ctx, int worker, void *fn, void *handle);
struct nbdhost_result nbdhost_filter_prepare (nbdhost_ctx, int worker,
                                              void *fn, nbdhost_next,
                                              void *handle, int readonly);
/* .finalize, .can_*, .is_rotational */
struct nbdhost_result nbdhost_filter_int (nbdhost_ctx, int worker, void *fn,
                                          nbdhost_next, void *handle);
struct nbdhost_result nbdhost_filter_int64 (nbdhost_ctx, int worker, void *fn,
                                            nbdhost_next, void *handle);
struct nbdhost_result nbdhost_filter_string (nbdhost_ctx, int worker, void *fn,
                                             nbdhost_next, void *handle);
struct nbdhost_block_size nbdhost_filter_block_size (nbdhost_ctx, int worker,
                                                     void *fn, nbdhost_next,
                                                     void *handle);
/* .pread, .pwrite */
struct nbdhost_result nbdhost_filter_io (struct nbdhost_data);
struct nbdhost_result nbdhost_filter_flush (struct nbdhost_data);
/* .trim, .zero, .cache */
struct nbdhost_result nbdhost_filter_range (struct nbdhost_data);
struct nbdhost_result nbdhost_filter_extents (struct nbdhost_data);

/* ---- several calls at once (filter.c) ---- */

enum { NBDHOST_MAX_BURST = 32 };

/* Reads and writes that are made one after the other. It is Go's memory, without
 * pointers into it.
 */
struct nbdhost_burst {
  struct nbdhost_data read, write; /* what is called, without arguments */
  uintptr_t filter;   /* its struct nbdkit_context, if it is a filter's */
  int worker;
  uint32_t len;
  uint32_t done;      /* so many calls have returned */
  struct nbdhost_burst_call {
    uintptr_t buf;
    uint64_t offset, cookie;
    uint32_t count;
    bool write;
  } calls[NBDHOST_MAX_BURST];
};

/* Makes the calls until one fails: the result is that of the last one made. The
 * first has begun. Each other one does by raising *begun, which is atomic, by 1
 * from how many had; where that is not its value any more there is none.
 */
struct nbdhost_result nbdhost_call_burst (struct nbdhost_burst *,
                                          uint32_t *begun);

/* ---- what filters call (filter.c) ---- */

struct nbdkit_exports;
struct nbdkit_extent;
struct nbdkit_extents;

struct nbdkit_backend *nbdhost_backend_new (uint64_t id);
struct nbdkit_context *nbdhost_filter_context_new (uint64_t id,
                                                   struct nbdkit_backend *);
nbdhost_next nbdhost_next_new (uint64_t id, bool block_size, bool extents64);
/* What is below a filter from now on; NULL: nothing. */
void nbdhost_filter_set_next (struct nbdkit_context *, nbdhost_next);

/* How .pread or .pwrite of the session that next stands for is called without
 * asking Go: with data, which has no arguments yet, for a range within size
 * bytes, and counted in *calls. filter is the session's if it is one of a
 * filter, else NULL. Once at most for each.
 */
void nbdhost_next_direct (nbdhost_next next, bool write,
                          struct nbdhost_data data,
                          struct nbdkit_context *filter, uint64_t size,
                          uint64_t *calls);
void nbdhost_filter_object_free (void *); /* any of the three */

int nbdhost_next_config (struct nbdkit_backend *, const char *key,
                         const char *value);
int nbdhost_next_config_complete (struct nbdkit_backend *);
int nbdhost_next_preconnect (struct nbdkit_backend *, int readonly);
int nbdhost_next_list_exports (struct nbdkit_backend *, int readonly,
                               struct nbdkit_exports *);
const char *nbdhost_next_default_export (struct nbdkit_backend *,
                                         int readonly);
int nbdhost_next_open (struct nbdkit_context *, int readonly,
                       const char *exportname);
int nbdhost_extents_append (struct nbdkit_extents *,
                            const struct nbdkit_extent *, size_t n);

/* ---- lists (lists.c) ---- */

struct nbdkit_extent {
  uint64_t offset;
  uint64_t length;
  uint32_t type;
};

struct nbdkit_extents {
  uint64_t start, end;         /* [start, end): what was asked for */
  uint64_t next;               /* end of the last extent added, UINT64_MAX: none */
  struct nbdkit_extent *list;
  size_t len, cap;
};

struct nbdkit_export {
  char *name;
  char *description;           /* NULL: none */
};

struct nbdkit_exports {
  struct nbdkit_export *list;
  size_t len, cap;
  bool use_default;
};

/* ---- the functions modules call ---- */

PUBLIC void nbdkit_error (const char *fmt, ...) PRINTF (1, 2);
PUBLIC void nbdkit_verror (const char *fmt, va_list) PRINTF (1, 0);
PUBLIC void nbdkit_debug (const char *fmt, ...) PRINTF (1, 2);
PUBLIC void nbdkit_vdebug (const char *fmt, va_list) PRINTF (1, 0);
PUBLIC void nbdkit_debug_hexdump (const void *buf, size_t len,
                                  const char *prefix, uint64_t start);
PUBLIC void nbdkit_debug_hexdiff (const void *buf1, const void *buf2,
                                  size_t len, const char *prefix,
                                  uint64_t start);
PUBLIC void nbdkit_set_error (int err);
PUBLIC const char *nbdkit_timestamp (void);

PUBLIC const char *nbdkit_name (void);
PUBLIC int nbdkit_stdio_safe (void);
PUBLIC int nbdkit_nanosleep (unsigned sec, unsigned nsec);
PUBLIC void nbdkit_shutdown (void);
PUBLIC void nbdkit_disconnect (int force);

PUBLIC int64_t nbdkit_parse_size (const char *str);
PUBLIC int nbdkit_parse_bool (const char *str);
PUBLIC int nbdkit_parse_int (const char *what, const char *str, int *r);
PUBLIC int nbdkit_parse_unsigned (const char *what, const char *str,
                                  unsigned *r);
PUBLIC int nbdkit_parse_int8_t (const char *what, const char *str, int8_t *r);
PUBLIC int nbdkit_parse_uint8_t (const char *what, const char *str,
                                 uint8_t *r);
PUBLIC int nbdkit_parse_int16_t (const char *what, const char *str,
                                 int16_t *r);
PUBLIC int nbdkit_parse_uint16_t (const char *what, const char *str,
                                  uint16_t *r);
PUBLIC int nbdkit_parse_int32_t (const char *what, const char *str,
                                 int32_t *r);
PUBLIC int nbdkit_parse_uint32_t (const char *what, const char *str,
                                  uint32_t *r);
PUBLIC int nbdkit_parse_int64_t (const char *what, const char *str,
                                 int64_t *r);
PUBLIC int nbdkit_parse_uint64_t (const char *what, const char *str,
                                  uint64_t *r);
PUBLIC int nbdkit_parse_probability (const char *what, const char *str,
                                     double *r);
PUBLIC int nbdkit_parse_delay (const char *what, const char *str,
                               unsigned *sec, unsigned *nsec);
PUBLIC int nbdkit_read_password (const char *value, char **password);

PUBLIC char *nbdkit_absolute_path (const char *path);
PUBLIC char *nbdkit_realpath (const char *path);

PUBLIC const char *nbdkit_strdup_intern (const char *str);
PUBLIC const char *nbdkit_strndup_intern (const char *str, size_t n);
PUBLIC const char *nbdkit_printf_intern (const char *fmt, ...) PRINTF (1, 2);
PUBLIC const char *nbdkit_vprintf_intern (const char *fmt, va_list)
  PRINTF (1, 0);

PUBLIC const char *nbdkit_export_name (void);
PUBLIC int nbdkit_is_tls (void);
PUBLIC int nbdkit_peer_name (struct sockaddr *addr, socklen_t *addrlen);
PUBLIC int64_t nbdkit_peer_pid (void);
PUBLIC int64_t nbdkit_peer_uid (void);
PUBLIC int64_t nbdkit_peer_gid (void);
PUBLIC char *nbdkit_peer_security_context (void);
PUBLIC char *nbdkit_peer_tls_dn (void);
PUBLIC char *nbdkit_peer_tls_issuer_dn (void);

PUBLIC struct nbdkit_extents *nbdkit_extents_new (uint64_t start,
                                                  uint64_t end);
PUBLIC void nbdkit_extents_free (struct nbdkit_extents *);
PUBLIC size_t nbdkit_extents_count (const struct nbdkit_extents *);
PUBLIC struct nbdkit_extent nbdkit_get_extent (const struct nbdkit_extents *,
                                               size_t);
PUBLIC int nbdkit_add_extent (struct nbdkit_extents *, uint64_t offset,
                              uint64_t length, uint32_t type);

PUBLIC struct nbdkit_exports *nbdkit_exports_new (void);
PUBLIC void nbdkit_exports_free (struct nbdkit_exports *);
PUBLIC size_t nbdkit_exports_count (const struct nbdkit_exports *);
PUBLIC struct nbdkit_export nbdkit_get_export (const struct nbdkit_exports *,
                                               size_t);
PUBLIC int nbdkit_add_export (struct nbdkit_exports *, const char *name,
                              const char *description);
PUBLIC int nbdkit_use_default_export (struct nbdkit_exports *);

/* For filters (filter.c). */
PUBLIC struct nbdkit_extents *nbdkit_extents_full (struct nbdkit_next_ops *,
                                                   uint32_t count,
                                                   uint64_t offset,
                                                   uint32_t flags, int *err);
PUBLIC int nbdkit_extents_aligned (struct nbdkit_next_ops *, uint64_t count,
                                   uint64_t offset, uint32_t flags,
                                   uint32_t align, struct nbdkit_extents *,
                                   int *err);
PUBLIC struct nbdkit_backend *nbdkit_context_get_backend (
    struct nbdkit_context *);
PUBLIC struct nbdkit_next_ops *nbdkit_next_context_open (
    struct nbdkit_backend *, int readonly, const char *exportname, int shared);
PUBLIC void nbdkit_next_context_close (struct nbdkit_next_ops *);
PUBLIC struct nbdkit_next_ops *nbdkit_context_set_next (
    struct nbdkit_context *, struct nbdkit_next_ops *);

#endif /* NBDHOST_SHIM_H */
