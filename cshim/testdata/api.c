/* A plugin that calls the server's functions with ordinary and odd arguments
 * and writes what came back, one line a call, to the file that the environment
 * variable API_OUTPUT names, from .dump_plugin. The same binary runs in
 * nbdkit, so the two outputs can be compared. Error texts are not written.
 *
 * Functions newer than the installed headers are looked up, and skipped where
 * the server lacks them.
 */
#define _GNU_SOURCE
#define NBDKIT_API_VERSION 2
#include <nbdkit-plugin.h>

#include <dlfcn.h>
#include <fcntl.h>
#include <inttypes.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define THREAD_MODEL NBDKIT_THREAD_MODEL_PARALLEL
#define N(a) (sizeof (a) / sizeof (a)[0])

static FILE *out;

static const char *const sizes[] = {
  "0", "1", "1b", "1B", "1k", "1K", "1m", "1M", "1g", "1G", "1t", "1T", "1p",
  "1P", "1e", "1E", "1s", "1S", "2s", "1KiB", "1KB", "1kb", "1MiB", "1Mi", "1c",
  "1w", "0x10", "0x10k", "0X10", "010", "010k", "1.5M", "1.5", "1 M",
  " 1", "1 ", "\t1", "\n1M", "+1", "-1", "-0", "-0k", "", " ", "M", "k", "0x",
  "x", "1e3", "7E", "8E", "9E", "8191P", "8192P", "9007199254740991k",
  "9007199254740992k", "18014398509481983s", "18014398509481984s",
  "9223372036854775807", "9223372036854775808", "9223372036854775807b",
  "18446744073709551615", "18446744073709551616", "-9223372036854775808",
  "-9223372036854775809", "0E", "00000000000001", "1\xc2\xb5", "1kk", "1k ",
};

static const char *const bools[] = {
  "1", "0", "true", "false", "TRUE", "FALSE", "True", "tRuE", "t", "f", "T",
  "F", "yes", "no", "Yes", "y", "n", "Y", "N", "on", "off", "ON", "oFf", "",
  " ", " 1", "1 ", "2", "-1", "00", "01", "o", "enable", "disable", "ye",
};

static const char *const ints[] = {
  "0", "1", "-1", "+1", "-0", "+0", "", " ", " 1", "1 ", "\t1", "\n1", "- 1",
  "+ 1", "--1", "+-1", "-+1", " -1", " +1", "0x7f", "0x80", "0xff", "0x100",
  "-0x80", "-0x81", "0x7fff", "0x8000", "0xffff", "0x10000", "-0x8000",
  "-0x8001", "0x7fffffff", "0x80000000", "0xffffffff", "0x100000000",
  "-0x80000000", "-0x80000001", "0x7fffffffffffffff", "0x8000000000000000",
  "0xffffffffffffffff", "0x10000000000000000", "-0x8000000000000000",
  "-0x8000000000000001", "010", "08", "0x", "0xg", "x1", "1x", "1k", "1.0",
  "1e1", "127", "128", "-128", "-129", "255", "256", "32767", "32768", "65535",
  "65536", "2147483647", "2147483648", "4294967295", "4294967296",
  "9223372036854775807", "9223372036854775808", "18446744073709551615",
  "18446744073709551616", "99999999999999999999999999", "-18446744073709551615",
  "1\n", "NaN",
};

static const char *const probabilities[] = {
  "0", "1", "0.1", "1e-1", "10%", "1:10", "1/10", "100%", "200%", "0%", "-1",
  "-0", "-0%", "-10%", "+1", "", "%", ":", "/", "1:", "1/", ":1", "/1", "1:0",
  "1/0", "0:0", "0:1", "0/1", "1:2:3", "1/2/3", "1:2/3", "1:-2", "-1:-2",
  "-1:2", "1: 2", " 1", "1 ", "1 %", "10% ", "10%%", "nan", "inf", "-inf",
  "1:inf", "inf:1", "1:nan", "0x10", "0x10%", "1e400", "1e-400", "1e308:1e-308",
  "1.5:3", "1x", "1:2x", "1:2%", "50%:2", ".5", "5.", "1,5", "1:1e-320",
  "1/ 2", "1 /2", "1e1%", "1e309%", "infinity", "INF", "NAN(1)", "4294967296",
  "-0:1", "0:-1", "-0:0", "0/0", "-0:-1", "1%:1", "1:1e400", "0.0:0.0",
};

static const char *const delays[] = {
  "0", "1", "1.2", "1.2s", "1.2ms", "120ms", "1.2us", "120us", "1.2\xce\xbcs",
  "120\xc2\xb5s", "1ns", "1.2ns", "0.1ns", "999999999ns", "1000000000ns",
  "1000000001ns", "1000ms", "1500ms", "1000000us", "1m", "1h", "1d", "1 s",
  "1s ", " 1s", "", "s", "ms", "-1", "-0", "-1ms", "+1", "1e3", "1e-3",
  "1e3ms", "0x10", "0x10ms", "nan", "inf", "1sec", "1S", "1MS", "1msx", "1.5e0s",
  "2147483647", "2147483648", "2147483647s", "4294967295",   "4294967295.5", "1e400", "0.999999999",
  "0.0000000001", "1.0000000001", "0.0000000005", "1e-9",
  "1e-10", "1.999999999", "0.3", "0.7", "0.1", "4294967295000ms",
  "1..2", "1.2.3", ".5", "5.", ".5ms", "0.0000015ms", "1n",
  "1u", "4.1", "4.999999999", "1\xe6s", "2147483647000ms", "2147483648000ms",
};

#define NUMBER(name, type, fmt)                                               \
  do {                                                                        \
    for (size_t i = 0; i < N (ints); ++i) {                                   \
      type v = 42;                                                            \
      int r = nbdkit_parse_##name ("what", ints[i], &v);                      \
      fprintf (out, #name " \"%s\" = %d %" fmt "\n", ints[i], r, v);          \
    }                                                                         \
    fprintf (out, #name " no result = %d %d\n",                               \
             nbdkit_parse_##name ("what", "7", NULL),                         \
             nbdkit_parse_##name ("what", "bad", NULL));                      \
  } while (0)

static void
parse (void)
{
  for (size_t i = 0; i < N (sizes); ++i)
    fprintf (out, "size \"%s\" = %" PRIi64 "\n", sizes[i],
             nbdkit_parse_size (sizes[i]));
  for (size_t i = 0; i < N (bools); ++i)
    fprintf (out, "bool \"%s\" = %d\n", bools[i], nbdkit_parse_bool (bools[i]));
  NUMBER (int, int, "d");
  NUMBER (unsigned, unsigned, "u");
  NUMBER (int8_t, int8_t, PRIi8);
  NUMBER (uint8_t, uint8_t, PRIu8);
  NUMBER (int16_t, int16_t, PRIi16);
  NUMBER (uint16_t, uint16_t, PRIu16);
  NUMBER (int32_t, int32_t, PRIi32);
  NUMBER (uint32_t, uint32_t, PRIu32);
  NUMBER (int64_t, int64_t, PRIi64);
  NUMBER (uint64_t, uint64_t, PRIu64);
}

static void
parse_new (void)
{
  int (*probability) (const char *, const char *, double *) =
    dlsym (RTLD_DEFAULT, "nbdkit_parse_probability");
  int (*delay) (const char *, const char *, unsigned *, unsigned *) =
    dlsym (RTLD_DEFAULT, "nbdkit_parse_delay");

  if (probability) {
    for (size_t i = 0; i < N (probabilities); ++i) {
      double d = 42;
      int r = probability ("what", probabilities[i], &d);
      fprintf (out, "new: probability \"%s\" = %d %.17g\n", probabilities[i], r,
               d);
    }
    fprintf (out, "new: probability no result = %d\n",
             probability ("what", "1:2", NULL));
  }
  if (delay) {
    for (size_t i = 0; i < N (delays); ++i) {
      unsigned s = 42, n = 43;
      int r = delay ("what", delays[i], &s, &n);
      fprintf (out, "new: delay \"%s\" = %d %u %u\n", delays[i], r, s, n);
    }
  }
}

static void
show (const char *what, const char *s)
{
  if (s == NULL)
    fprintf (out, "%s = NULL\n", what);
  else if (strlen (s) > 1000)
    fprintf (out, "%s = %zu bytes\n", what, strlen (s));
  else
    fprintf (out, "%s = \"%s\"\n", what, s);
}

static void
paths (void)
{
  static const char *const list[] = {
    "/", "/tmp", "/tmp/", "//tmp", "relative", "./relative", "../relative", "",
    ".", "..", "/does/not/exist", "/etc/../etc/passwd",
    "/tmp/.", "/etc/passwd/",
  };

  if (chdir ("/usr/lib") == -1)
    abort ();
  for (size_t i = 0; i < N (list); ++i) {
    char what[64], *s;

    snprintf (what, sizeof what, "absolute_path \"%s\"", list[i]);
    s = nbdkit_absolute_path (list[i]);
    show (what, s);
    free (s);
    snprintf (what, sizeof what, "realpath \"%s\"", list[i]);
    s = nbdkit_realpath (list[i]);
    show (what, s);
    free (s);
  }
}

static void
password (const char *what, const char *value)
{
  char *pw = (char *) "unset";
  int r = nbdkit_read_password (value, &pw);

  fprintf (out, "password %s = %d ", what, r);
  show ("", r == 0 ? pw : NULL);
  if (r == 0)
    free (pw);
}

static void
password_text (const char *what, const char *text, size_t len)
{
  char path[] = "/tmp/api-XXXXXX", value[64];
  int fd = mkstemp (path), fd2;

  if (write (fd, text, len) != (ssize_t) len)
    abort ();
  snprintf (value, sizeof value, "+%s", path);
  fprintf (out, "file: ");
  password (what, value);
  fd2 = fcntl (fd, F_DUPFD, 50);
  lseek (fd2, 0, SEEK_SET);
  snprintf (value, sizeof value, "-%d", fd2);
  fprintf (out, "fd: ");
  password (what, value);
  fprintf (out, "fd closed = %d\n", fcntl (fd2, F_GETFD) == -1);
  close (fd);
  unlink (path);
}

static void
passwords (void)
{
  static const char *const list[] = {
    "secret", "", " spaces ", "a-b", "a+b", "-0", "-1", "-2", "-00", "-0x99",
    "-99x", "-999", "--1", "-x", "+/does/not/exist", "+", "+/tmp",
    "-99999999999", "-4294967296",
  };

  for (size_t i = 0; i < N (list); ++i)
    password (list[i], list[i]);
#define TEXT(s) password_text (#s, s, sizeof (s) - 1)
  TEXT ("secret");
  TEXT ("secret\n");
  TEXT ("secret\n\n");
  TEXT ("secret\r\n");
  TEXT ("two\nlines\n");
  TEXT ("\n");
  TEXT ("");
  TEXT ("nul\0inside");
  char big[10000];
  memset (big, 'x', sizeof big);
  password_text ("big", big, sizeof big);
}

static void
errnos (void)
{
#define KEEP(name, call)                                        \
  do {                                                          \
    errno = EXDEV;                                              \
    call;                                                       \
    fprintf (out, "errno after %s = %d\n", name, errno);        \
  } while (0)
  KEEP ("error", nbdkit_error ("text %m %s", "x"));
  KEEP ("debug", nbdkit_debug ("text %m %s", "x"));
}

static void
interns (void)
{
  show ("strdup_intern", nbdkit_strdup_intern ("abc"));
  show ("strdup_intern empty", nbdkit_strdup_intern (""));
  show ("strndup_intern 2", nbdkit_strndup_intern ("abc", 2));
  show ("strndup_intern 0", nbdkit_strndup_intern ("abc", 0));
  show ("strndup_intern 9", nbdkit_strndup_intern ("abc", 9));
  show ("strndup_intern huge", nbdkit_strndup_intern ("abc", 1 << 20));
  show ("printf_intern", nbdkit_printf_intern ("%d %s", 5, "x"));
  show ("printf_intern empty", nbdkit_printf_intern ("%s", ""));
  fprintf (out, "distinct = %d\n",
           nbdkit_strdup_intern ("a") != nbdkit_strdup_intern ("b"));
}

/* Outside a connection. */
static void
no_connection (void)
{
  struct sockaddr_storage a;
  socklen_t len = sizeof a;
  void (*disconnect) (int) = dlsym (RTLD_DEFAULT, "nbdkit_disconnect");
  char *(*fn) (void);
  static const char *const strings[] = {
    "nbdkit_peer_security_context",
  };

  fprintf (out, "peer_name = %d\n",
           nbdkit_peer_name ((struct sockaddr *) &a, &len));
  fprintf (out, "peer_pid = %" PRIi64 "\n", nbdkit_peer_pid ());
  fprintf (out, "peer_uid = %" PRIi64 "\n", nbdkit_peer_uid ());
  fprintf (out, "peer_gid = %" PRIi64 "\n", nbdkit_peer_gid ());
  show ("export_name", nbdkit_export_name ());
  fprintf (out, "is_tls = %d\n", nbdkit_is_tls ());
  fprintf (out, "stdio_safe = %d\n", nbdkit_stdio_safe ());
  if (disconnect) {
    disconnect (0);
    disconnect (1);
  }
  for (size_t i = 0; i < N (strings); ++i) {
    fn = (char *(*) (void)) dlsym (RTLD_DEFAULT, strings[i]);
    if (fn) {
      char *s = fn ();
      fprintf (out, "new: ");
      show (strings[i], s);
      free (s);
    }
  }
}

static void
misc_new (void)
{
  const char *(*name) (void) =
    (const char *(*) (void)) dlsym (RTLD_DEFAULT, "nbdkit_name");

  if (name) {
    fprintf (out, "new: ");
    show ("name", name ());
  }
}

static void
sleeps (void)
{
  fprintf (out, "nanosleep INT_MAX+1 0 = %d\n",
           nbdkit_nanosleep ((unsigned) INT_MAX + 1, 0));
  fprintf (out, "nanosleep UINT_MAX 0 = %d\n", nbdkit_nanosleep (UINT_MAX, 0));
}

struct nbdkit_extents *nbdkit_extents_new (uint64_t start, uint64_t end);
void nbdkit_extents_free (struct nbdkit_extents *);
size_t nbdkit_extents_count (const struct nbdkit_extents *);
struct extent { uint64_t offset, length; uint32_t type; };
struct extent nbdkit_get_extent (const struct nbdkit_extents *, size_t);

static void
extents (const char *what, uint64_t start, uint64_t end,
         const struct extent *e, size_t n)
{
  struct nbdkit_extents *x;

  errno = 0;
  x = nbdkit_extents_new (start, end);
  fprintf (out, "extents %s: %s", what, x ? "" : "NULL");
  if (x == NULL) {
    fprintf (out, " errno %d\n", errno);
    return;
  }
  for (size_t i = 0; i < n; ++i) {
    int r;

    errno = 0;
    r = nbdkit_add_extent (x, e[i].offset, e[i].length, e[i].type);
    fprintf (out, " %d", r);
    if (r == -1)
      fprintf (out, "(%d)", errno);
  }
  fprintf (out, " ->");
  for (size_t i = 0; i < nbdkit_extents_count (x); ++i) {
    struct extent g = nbdkit_get_extent (x, i);
    fprintf (out, " %" PRIu64 "+%" PRIu64 ":%" PRIu32, g.offset, g.length,
             g.type);
  }
  fprintf (out, "\n");
  nbdkit_extents_free (x);
}

static void
all_extents (void)
{
#define EXTENTS(what, start, end, ...)                                  \
  do {                                                                  \
    static const struct extent e[] = { __VA_ARGS__ };                   \
    extents (what, start, end, e, N (e));                               \
  } while (0)
  EXTENTS ("one", 0, 100, { 0, 100, 0 });
  EXTENTS ("merge", 0, 100, { 0, 10, 1 }, { 10, 10, 1 }, { 20, 10, 3 });
  EXTENTS ("before start", 50, 100, { 0, 10, 0 }, { 10, 20, 1 }, { 30, 20, 2 },
           { 50, 10, 3 });
  EXTENTS ("across start", 50, 100, { 0, 60, 1 }, { 60, 100, 2 });
  EXTENTS ("across both", 50, 100, { 0, 200, 3 });
  EXTENTS ("beyond end", 0, 100, { 0, 100, 0 }, { 100, 10, 1 }, { 110, 5, 2 });
  EXTENTS ("not from start", 0, 100, { 10, 10, 0 });
  EXTENTS ("late start", 50, 100, { 60, 10, 0 });
  EXTENTS ("gap", 0, 100, { 0, 10, 0 }, { 20, 10, 0 });
  EXTENTS ("gap of another type", 0, 100, { 0, 10, 0 }, { 20, 10, 1 });
  EXTENTS ("overlap", 0, 100, { 0, 10, 0 }, { 5, 10, 0 });
  EXTENTS ("descending", 0, 100, { 50, 10, 0 }, { 0, 10, 0 });
  EXTENTS ("gap before start", 50, 100, { 0, 10, 0 }, { 20, 100, 1 });
  EXTENTS ("descending before start", 50, 100, { 20, 10, 0 }, { 0, 60, 1 });
  EXTENTS ("zero length", 0, 100, { 0, 0, 0 }, { 0, 10, 1 }, { 10, 0, 2 },
           { 10, 10, 1 });
  EXTENTS ("zero length elsewhere", 0, 100, { 70, 0, 0 }, { 0, 10, 1 });
  EXTENTS ("gap beyond end", 0, 100, { 0, 100, 0 }, { 200, 10, 1 });
  EXTENTS ("gap at end", 0, 100, { 0, 90, 0 }, { 200, 10, 1 });
  EXTENTS ("odd type", 0, 100, { 0, 10, 4 }, { 10, 10, UINT32_MAX });
  EXTENTS ("to the top", 0, INT64_MAX, { 0, INT64_MAX, 0 });
  EXTENTS ("beyond the top", 0, INT64_MAX, { 0, UINT64_MAX, 0 });
  EXTENTS ("start above the top", (uint64_t) INT64_MAX + 1, UINT64_MAX,
           { 0, 1, 0 });
  EXTENTS ("end above the top", 0, (uint64_t) INT64_MAX + 1, { 0, 1, 0 });
  EXTENTS ("start at the top", INT64_MAX, INT64_MAX, { INT64_MAX, 1, 0 });
  EXTENTS ("empty range", 10, 10, { 0, 100, 0 });
  EXTENTS ("start after end", 11, 10, { 0, 100, 0 });
  EXTENTS ("none", 0, 100);

  struct nbdkit_extents *x = nbdkit_extents_new (0, 1 << 30);
  uint64_t i, failed = 0;
  for (i = 0; i < (1 << 20) + 10; ++i)
    failed += nbdkit_add_extent (x, i, 1, i & 1) != 0;
  fprintf (out, "extents many = %zu, %" PRIu64 " failed\n",
           nbdkit_extents_count (x), failed);
  nbdkit_extents_free (x);
  nbdkit_extents_free (NULL);
}

struct nbdkit_exports *nbdkit_exports_new (void);
void nbdkit_exports_free (struct nbdkit_exports *);
size_t nbdkit_exports_count (const struct nbdkit_exports *);
struct export { char *name, *description; };
struct export nbdkit_get_export (const struct nbdkit_exports *, size_t);

static void
exports (void)
{
  struct nbdkit_exports *x = nbdkit_exports_new ();
  static char text[5000];
  int r;

#define ADD(what, name, description)                                    \
  do {                                                                  \
    errno = 0;                                                          \
    r = nbdkit_add_export (x, name, description);                       \
    fprintf (out, "export %s = %d errno %d\n", what, r, r ? errno : 0); \
  } while (0)
  ADD ("plain", "a", "b");
  ADD ("no description", "c", NULL);
  ADD ("empty", "", "");
  ADD ("twice", "a", "b");
  ADD ("not utf-8", "\xff\xfe", "\xc0");
  memset (text, 'x', 4096);
  ADD ("name 4096", text, NULL);
  ADD ("description 4096", "d", text);
  text[4096] = 'x';
  ADD ("name 4097", text, NULL);
  ADD ("description 4097", "d", text);
  errno = 0;
  r = nbdkit_use_default_export (x);
  fprintf (out, "use_default_export = %d\n", r);
  r = nbdkit_use_default_export (x);
  fprintf (out, "use_default_export again = %d\n", r);
  for (size_t i = 0; i < nbdkit_exports_count (x); ++i) {
    struct export e = nbdkit_get_export (x, i);
    fprintf (out, "export %zu: %zu %.3s ", i, strlen (e.name), e.name);
    show ("", e.description && strlen (e.description) < 10 ? e.description
                                                           : NULL);
  }
  nbdkit_exports_free (x);

  x = nbdkit_exports_new ();
  size_t failed = 0;
  int first = 0;
  for (int i = 0; i < 10010; ++i) {
    snprintf (text, sizeof text, "%d", i);
    errno = 0;
    if (nbdkit_add_export (x, text, NULL) == -1) {
      ++failed;
      if (first == 0)
        first = errno;
    }
  }
  fprintf (out, "exports many = %zu, %zu failed, errno %d\n",
           nbdkit_exports_count (x), failed, first);
  nbdkit_exports_free (x);
  nbdkit_exports_free (NULL);
}

static void
api_dump_plugin (void)
{
  const char *path = getenv ("API_OUTPUT");

  if (path == NULL)
    return;
  out = fopen (path, "w");
  if (out == NULL)
    abort ();
  setvbuf (out, NULL, _IOLBF, 0);
  parse ();
  parse_new ();
  paths ();
  passwords ();
  errnos ();
  interns ();
  no_connection ();
  misc_new ();
  sleeps ();
  all_extents ();
  exports ();
  fclose (out);
}

static void *
api_open (int readonly)
{
  (void) readonly;
  return NBDKIT_HANDLE_NOT_NEEDED;
}

static int64_t
api_get_size (void *handle)
{
  (void) handle;
  return 0;
}

static int
api_pread (void *handle, void *buf, uint32_t count, uint64_t offset,
           uint32_t flags)
{
  (void) handle, (void) offset, (void) flags;
  memset (buf, 0, count);
  return 0;
}

static struct nbdkit_plugin plugin = {
  .name = "api",
  .dump_plugin = api_dump_plugin,
  .open = api_open,
  .get_size = api_get_size,
  .pread = api_pread,
};

NBDKIT_REGISTER_PLUGIN (plugin)
