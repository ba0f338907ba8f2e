/* Callbacks for the tests of the Call functions. Each does one thing; the
 * declarations of the server's functions are those of nbdkit-plugin(3).
 */
#define _GNU_SOURCE
#include <errno.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

extern void nbdkit_error (const char *, ...);
extern void nbdkit_debug (const char *, ...);
extern void nbdkit_set_error (int);
extern const char *nbdkit_export_name (void);
extern int nbdkit_is_tls (void);
extern int nbdkit_add_extent (void *, uint64_t, uint64_t, uint32_t);
extern int nbdkit_add_export (void *, const char *, const char *);
extern int nbdkit_use_default_export (void *);
extern const char *nbdkit_strdup_intern (const char *);
extern const char *nbdkit_printf_intern (const char *, ...);
extern void nbdkit_shutdown (void);
extern void nbdkit_disconnect (int);
extern const char *nbdkit_name (void);
extern const char *nbdkit_timestamp (void);
extern int nbdkit_nanosleep (unsigned, unsigned);
extern int nbdkit_stdio_safe (void);
extern int nbdkit_read_password (const char *, char **);
extern int nbdkit_parse_delay (const char *, const char *, unsigned *,
                               unsigned *);
extern int nbdkit_peer_name (struct sockaddr *, socklen_t *);
extern int64_t nbdkit_peer_pid (void);
extern int64_t nbdkit_peer_uid (void);
extern int64_t nbdkit_peer_gid (void);
extern char *nbdkit_peer_tls_dn (void);
extern char *nbdkit_peer_tls_issuer_dn (void);
extern char *nbdkit_peer_security_context (void);
extern void nbdkit_debug_hexdump (const void *, size_t, const char *, uint64_t);
extern void nbdkit_debug_hexdiff (const void *, const void *, size_t,
                                  const char *, uint64_t);

static int handle;

/* ---- arguments ---- */

/* Every argument of the last call, for the test to read. */
uint64_t seen[8];

#define SEE(...)                                                \
  do {                                                          \
    uint64_t args[] = { __VA_ARGS__ };                          \
    memset (seen, 0, sizeof seen);                              \
    memcpy (seen, args, sizeof args);                           \
  } while (0)
#define P(p) (uint64_t) (uintptr_t) (p)

void see_void (void) { SEE (1); }
int see_int (void) { SEE (2); return 42; }
int see_config (const char *k, const char *v)
{
  SEE (3, strlen (k), strlen (v), P (k), P (v));
  return 0;
}
int see_preconnect (int ro) { SEE (4, ro); return 0; }
void *see_open (int ro) { SEE (5, ro); return &handle; }
void see_close (void *h) { SEE (6, h == &handle); }
int see_handle (void *h) { SEE (7, h == &handle); return 2; }
int64_t see_size (void *h) { SEE (8, h == &handle); return INT64_MAX; }
const char *see_string (void *h) { SEE (9, h == &handle); return "text"; }
const char *see_default (int ro, int tls) { SEE (10, ro, tls); return "name"; }
int see_block_size (void *h, uint32_t *min, uint32_t *pref, uint32_t *max)
{
  SEE (11, h == &handle);
  *min = 1, *pref = 4096, *max = UINT32_MAX;
  return 0;
}
int see_pread (void *h, void *b, uint32_t c, uint64_t o, uint32_t f)
{
  SEE (12, h == &handle, c, o, f, P (b));
  memset (b, 'r', c);
  return 0;
}
int see_pwrite (void *h, const void *b, uint32_t c, uint64_t o, uint32_t f)
{
  SEE (13, h == &handle, c, o, f, P (b));
  return 0;
}
int see_flush (void *h, uint32_t f) { SEE (14, h == &handle, f); return 0; }
int see_range (void *h, uint32_t c, uint64_t o, uint32_t f)
{
  SEE (15, h == &handle, c, o, f);
  return 0;
}
int see_extents (void *h, uint32_t c, uint64_t o, uint32_t f, void *x)
{
  SEE (16, h == &handle, c, o, f);
  return nbdkit_add_extent (x, 0, o + 10, 1) ||
         nbdkit_add_extent (x, o + 10, 10, 1) ||
         nbdkit_add_extent (x, o + 20, UINT32_MAX, 3);
}
int see_pread_v1 (void *h, void *b, uint32_t c, uint64_t o)
{
  SEE (17, h == &handle, c, o, 0, P (b));
  return 0;
}
int see_pwrite_v1 (void *h, const void *b, uint32_t c, uint64_t o)
{
  SEE (18, h == &handle, c, o, 0, P (b));
  return 0;
}
int see_flush_v1 (void *h) { SEE (19, h == &handle); return 0; }
int see_trim_v1 (void *h, uint32_t c, uint64_t o)
{
  SEE (20, h == &handle, c, o);
  return 0;
}
int see_zero_v1 (void *h, uint32_t c, uint64_t o, int may_trim)
{
  SEE (21, h == &handle, c, o, may_trim);
  return 0;
}
int see_list (int ro, int tls, void *x)
{
  SEE (22, ro, tls);
  nbdkit_use_default_export (x);
  return nbdkit_add_export (x, "a", "first") || nbdkit_add_export (x, "b", NULL);
}
int no_exports (int ro, int tls, void *x)
{
  (void) ro, (void) tls;
  nbdkit_add_export (x, "a", NULL);
  nbdkit_error ("no list");
  return -1;
}
int no_extents (void *h, uint32_t c, uint64_t o, uint32_t f, void *x)
{
  (void) h, (void) c, (void) f;
  nbdkit_add_extent (x, o, 1, 0);
  nbdkit_set_error (ENOTSUP);
  return -1;
}
const char *null_string (void *h) { (void) h; return NULL; }
const char *long_string (void *h)
{
  static char s[10000];
  (void) h;
  memset (s, 'x', sizeof s - 1);
  return s;
}
void *get_handle (void) { return &handle; }

/* ---- errors ---- */

int fail_plain (void *h) { (void) h; return -1; }
int fail_errno (void *h) { (void) h; errno = ENOSPC; return -1; }
int fail_set (void *h)
{
  (void) h;
  nbdkit_set_error (ESHUTDOWN);
  errno = ENOSPC;
  return -1;
}
int fail_text (void *h)
{
  (void) h;
  nbdkit_error ("first");
  errno = ENOSPC;
  nbdkit_error ("second %d: %m", 2);
  return -1;
}
int fail_oddly (void *h) { (void) h; errno = ENOSPC; return -5; }
int fail_oddly_named (void *h) { (void) h; nbdkit_error ("why"); return INT_MIN; }
int fail_with_null (void *h)
{
  const char *volatile null = NULL;

  (void) h;
  nbdkit_debug (null);
  nbdkit_error (null);
  return nbdkit_printf_intern (null) == NULL ? -1 : 0;
}
int succeed_after_error (void *h)
{
  (void) h;
  nbdkit_error ("not so bad");
  nbdkit_set_error (ENOSPC);
  return 0;
}
void *open_fails (int ro) { (void) ro; nbdkit_error ("no"); return NULL; }
int keep_errno (void)
{
  errno = EXDEV;
  nbdkit_error ("%m");
  nbdkit_debug ("%m");
  nbdkit_set_error (EPERM);
  (void) nbdkit_timestamp ();
  return errno;
}

/* ---- state ---- */

/* Around a message, on which the test calls a module again. */
int outer (void *h)
{
  (void) h;
  nbdkit_set_error (ENOSPC);
  nbdkit_error ("outer %s", nbdkit_export_name ());
  nbdkit_debug ("nest");
  nbdkit_debug ("outer is %s", nbdkit_export_name ());
  return -1;
}
int inner (void *h)
{
  (void) h;
  nbdkit_set_error (EPERM);
  nbdkit_error ("inner %s", nbdkit_export_name ());
  return -1;
}

const char *show_name (void *h) { (void) h; return nbdkit_export_name (); }
int show_tls (void *h) { (void) h; return nbdkit_is_tls (); }
const char *intern (void *h)
{
  (void) h;
  nbdkit_strdup_intern ("unused");
  return nbdkit_printf_intern ("%s-%d", "interned", 7);
}
const char *server_name (void *h) { (void) h; return nbdkit_name (); }
const char *timestamp (void *h) { (void) h; return nbdkit_timestamp (); }
int stdio_safe (void) { return nbdkit_stdio_safe (); }
void shutdown_server (void) { nbdkit_shutdown (); }
int disconnect (void *h) { (void) h; nbdkit_disconnect (0); nbdkit_disconnect (1); return 0; }
int delay_halves (void)
{
  unsigned s = 0, n = 0;
  if (nbdkit_parse_delay ("x", "1.5", NULL, &n) == -1 || n != 500000000)
    return -1;
  if (nbdkit_parse_delay ("x", "2.5", &s, NULL) == -1 || s != 2)
    return -1;
  if (nbdkit_parse_delay ("x", "0.9999999999", &s, &n) == -1 || s != 1 || n != 0)
    return -1;
  /* What does not fit is refused, and changes nothing. */
  if (nbdkit_parse_delay ("x", "4294967296", &s, &n) != -1 || s != 1 ||
      nbdkit_parse_delay ("x", "4294967295.9999999999", &s, &n) != -1)
    return -1;
  return 0;
}

/* ---- threads and processes ---- */

static void *
thread (void *arg)
{
  (void) arg;
  nbdkit_error ("from a thread");
  nbdkit_set_error (EPERM);
  nbdkit_debug ("name %s", nbdkit_export_name () ? "set" : "not set");
  return NULL;
}

int from_thread (void *h)
{
  pthread_t t;

  (void) h;
  if (pthread_create (&t, NULL, thread, NULL) != 0)
    return -2;
  pthread_join (t, NULL);
  errno = ENOSPC;
  return -1;
}

/* Threads that have called Go, and are gone. */
int from_threads (void)
{
  for (int i = 0; i < 100; i++)
    from_thread (NULL);
  return 0;
}

/* What the child wrote to standard error; NULL if it did not exit with 7. */
const char *
forks (void *h)
{
  static char text[1000];
  size_t len = 0;
  ssize_t n;
  int p[2], status;
  pid_t pid;

  (void) h;
  if (pipe (p) == -1)
    return NULL;
  pid = fork ();
  if (pid == 0) {
    dup2 (p[1], STDERR_FILENO);
    nbdkit_error ("from a child %d", 1);
    nbdkit_debug ("debug");
    nbdkit_shutdown ();
    nbdkit_disconnect (1);
    nbdkit_export_name ();
    _exit (7);
  }
  close (p[1]);
  while ((n = read (p[0], text + len, sizeof text - 1 - len)) > 0)
    len += n;
  text[len] = 0;
  close (p[0]);
  if (waitpid (pid, &status, 0) != pid || !WIFEXITED (status) ||
      WEXITSTATUS (status) != 7)
    return NULL;
  return text;
}

/* ---- the client ---- */

int64_t peer_pid (void *h) { (void) h; return nbdkit_peer_pid (); }
int64_t peer_uid (void *h) { (void) h; return nbdkit_peer_uid (); }
int64_t peer_gid (void *h) { (void) h; return nbdkit_peer_gid (); }
int peer_family (void *h)
{
  struct sockaddr_storage a;
  socklen_t len = sizeof a;

  (void) h;
  if (nbdkit_peer_name ((struct sockaddr *) &a, &len) == -1)
    return -1;
  return a.ss_family;
}

static const char *
given (char *s)
{
  static char text[1000];

  if (s == NULL)
    return NULL;
  snprintf (text, sizeof text, "%s", s);
  free (s);
  return text;
}
const char *peer_dn (void *h) { (void) h; return given (nbdkit_peer_tls_dn ()); }
const char *peer_issuer (void *h)
{
  (void) h;
  return given (nbdkit_peer_tls_issuer_dn ());
}
const char *peer_label (void *h)
{
  (void) h;
  return given (nbdkit_peer_security_context ());
}

int sleep_short (void *h) { (void) h; return nbdkit_nanosleep (0, 1000); }
int sleep_zero (void *h) { (void) h; return nbdkit_nanosleep (0, 0); }
int sleep_long (void *h)
{
  (void) h;
  nbdkit_debug ("sleeping");
  return nbdkit_nanosleep (1000000, 0);
}

/* ---- the process ---- */

static void bye (void) { puts ("bye"); fflush (stdout); }
int at_exit (void) { return atexit (bye); }
int ask_password (void)
{
  char *pw;
  if (nbdkit_read_password ("-", &pw) == -1)
    return -1;
  printf ("got %s\n", pw);
  fflush (stdout);
  free (pw);
  return 0;
}

static void on_signal (int sig) { (void) sig; }
/* As Ruby and Python do. */
int take_signals (void)
{
  struct sigaction sa = { .sa_handler = on_signal };

  if (sigaction (SIGSEGV, &sa, NULL) == -1 ||
      sigaction (SIGUSR1, &sa, NULL) == -1 ||
      sigaction (SIGINT, &sa, NULL) == -1)
    return -1;
  sa.sa_handler = SIG_IGN;
  if (sigaction (SIGXFSZ, &sa, NULL) == -1)
    return -1;
  sa.sa_handler = SIG_DFL;
  if (sigaction (SIGPIPE, &sa, NULL) == -1)
    return -1;
  if (sigaction (SIGTERM, NULL, &sa) == -1)
    return -1;
  sa.sa_flags &= ~SA_ONSTACK;
  return sigaction (SIGTERM, &sa, NULL);
}
/* Bit 0: our handler, 1: ignored, 2: default, 3: SA_ONSTACK. */
static int disposition (int sig)
{
  struct sigaction sa;
  sigaction (sig, NULL, &sa);
  return (sa.sa_handler == on_signal) | (sa.sa_handler == SIG_IGN) << 1 |
         (sa.sa_handler == SIG_DFL) << 2 | !!(sa.sa_flags & SA_ONSTACK) << 3;
}
int check_signals (void)
{
  static const int sigs[] = { SIGSEGV, SIGUSR1, SIGINT, SIGXFSZ, SIGPIPE,
                              SIGTERM };
  SEE (disposition (sigs[0]), disposition (sigs[1]), disposition (sigs[2]),
       disposition (sigs[3]), disposition (sigs[4]), disposition (sigs[5]));
  return 0;
}

void hexdumps (void)
{
  unsigned char a[64], b[64];

  for (int i = 0; i < 64; i++)
    a[i] = b[i] = i * 7 + 30;
  b[3] = 'Z', b[20] = 0, b[21] = '~', b[40] = 'x';
  nbdkit_debug_hexdump (a, 40, "p: ", 0);
  nbdkit_debug_hexdump (a, 20, NULL, 5);
  nbdkit_debug_hexdump (a, 3, "", UINT64_C (0x1fffffff5));
  nbdkit_debug_hexdump (a, 0, "none", 0);
  nbdkit_debug_hexdump (a, 16, "x", UINT64_C (0xfffffffffffffff8));
  nbdkit_debug_hexdiff (a, b, 43, "q: ", 0);
  nbdkit_debug_hexdiff (a, b, 30, NULL, 3);
  nbdkit_debug_hexdiff (a, a, 20, "same", 0);
}
