/* Numbers, sizes, booleans, probabilities, delays, passwords and paths from
 * a module's parameters.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <limits.h>
#include <math.h>
#include <stdio.h>
#include <string.h>
#include <strings.h>
#include <termios.h>
#include <unistd.h>

#include "shim.h"

/* ---- integers ---- */

/* Complain and return -1 unless strto*max, which left errno and end, read all
 * of str.
 */
static int
check_number (const char *what, const char *str, const char *end)
{
  if (end == str) {
    errno = EINVAL;
    nbdkit_error ("parse %s: got \"%s\", need a number", what, str);
    return -1;
  }
  if (errno != 0) {
    nbdkit_error ("parse %s: got \"%s\": %m", what, str);
    return -1;
  }
  if (*end != '\0') {
    errno = EINVAL;
    nbdkit_error ("parse %s: got \"%s\", need a number without \"%s\"", what,
                  str, end);
    return -1;
  }
  return 0;
}

static int
parse_signed (const char *what, const char *str, intmax_t min, intmax_t max,
              intmax_t *r)
{
  char *end;

  errno = 0;
  *r = strtoimax (str, &end, 0);
  if (check_number (what, str, end) == -1)
    return -1;
  if (*r < min || *r > max) {
    errno = ERANGE;
    nbdkit_error ("parse %s: got %s, need %" PRIdMAX " to %" PRIdMAX, what,
                  str, min, max);
    return -1;
  }
  return 0;
}

static int
parse_unsigned (const char *what, const char *str, uintmax_t max, uintmax_t *r)
{
  char *end;

  /* strtoumax would take -1 for UINTMAX_MAX. */
  if (str[strspn (str, " \t\n\v\f\r")] == '-') {
    errno = EINVAL;
    nbdkit_error ("parse %s: got \"%s\", need a number that is not negative",
                  what, str);
    return -1;
  }
  errno = 0;
  *r = strtoumax (str, &end, 0);
  if (check_number (what, str, end) == -1)
    return -1;
  if (*r > max) {
    errno = ERANGE;
    nbdkit_error ("parse %s: got %s, need at most %" PRIuMAX, what, str, max);
    return -1;
  }
  return 0;
}

#define SIGNED(name, type, min, max)                                    \
  int                                                                   \
  nbdkit_parse_##name (const char *what, const char *str, type *r)      \
  {                                                                     \
    intmax_t v;                                                         \
                                                                        \
    if (parse_signed (what, str, min, max, &v) == -1)                   \
      return -1;                                                        \
    if (r)                                                              \
      *r = (type) v;                                                    \
    return 0;                                                           \
  }

#define UNSIGNED(name, type, max)                                       \
  int                                                                   \
  nbdkit_parse_##name (const char *what, const char *str, type *r)      \
  {                                                                     \
    uintmax_t v;                                                        \
                                                                        \
    if (parse_unsigned (what, str, max, &v) == -1)                      \
      return -1;                                                        \
    if (r)                                                              \
      *r = (type) v;                                                    \
    return 0;                                                           \
  }

SIGNED (int, int, INT_MIN, INT_MAX)
SIGNED (int8_t, int8_t, INT8_MIN, INT8_MAX)
SIGNED (int16_t, int16_t, INT16_MIN, INT16_MAX)
SIGNED (int32_t, int32_t, INT32_MIN, INT32_MAX)
SIGNED (int64_t, int64_t, INT64_MIN, INT64_MAX)
UNSIGNED (unsigned, unsigned, UINT_MAX)
UNSIGNED (uint8_t, uint8_t, UINT8_MAX)
UNSIGNED (uint16_t, uint16_t, UINT16_MAX)
UNSIGNED (uint32_t, uint32_t, UINT32_MAX)
UNSIGNED (uint64_t, uint64_t, UINT64_MAX)

/* ---- sizes and booleans ---- */

int64_t
nbdkit_parse_size (const char *str)
{
  static const struct {
    char suffix;
    unsigned shift;
  } units[] = {
    { 'b', 0 },  { 'k', 10 }, { 'm', 20 }, { 'g', 30 },
    { 't', 40 }, { 'p', 50 }, { 'e', 60 }, { 's', 9 },
  };
  unsigned shift = 0;
  bool known;
  char *end;
  int64_t size;

  errno = 0;
  size = strtoimax (str, &end, 0);
  if (end == str || errno != 0) {
    nbdkit_error ("parse size: got \"%s\", need a number of bytes such as"
                  " 512, 10K or 4G", str);
    return -1;
  }
  if (size < 0) {
    nbdkit_error ("parse size: got \"%s\", need a size that is not negative",
                  str);
    return -1;
  }
  known = *end == '\0';
  if (!known && end[1] == '\0')
    for (size_t i = 0; i < sizeof units / sizeof units[0]; ++i)
      if ((*end | 0x20) == units[i].suffix) {
        shift = units[i].shift;
        known = true;
      }
  if (!known) {
    nbdkit_error ("parse size: got suffix \"%s\" in \"%s\", need b, k, M, G,"
                  " T, P, E or s (sectors of 512 bytes)", end, str);
    return -1;
  }
  if (size > INT64_MAX >> shift) {
    nbdkit_error ("parse size: got %s, need at most %" PRIi64 " bytes", str,
                  INT64_MAX);
    return -1;
  }
  return size << shift;
}

int
nbdkit_parse_bool (const char *str)
{
  static const char *const words[][5] = {
    { "0", "f", "false", "n", "no" },
    { "1", "t", "true", "y", "yes" },
  };

  for (int v = 0; v < 2; ++v)
    for (int i = 0; i < 5; ++i)
      if (strcasecmp (str, words[v][i]) == 0)
        return v;
  if (strcasecmp (str, "on") == 0)
    return 1;
  if (strcasecmp (str, "off") == 0)
    return 0;
  nbdkit_error ("parse boolean: got \"%s\", need true or false, on or off, yes"
                " or no, 1 or 0", str);
  return -1;
}

/* ---- probabilities and delays ---- */

int
nbdkit_parse_probability (const char *what, const char *str, double *r)
{
  char *end;
  double p = strtod (str, &end);
  bool ok = end != str;

  if (ok && strcmp (end, "%") == 0)
    p /= 100;
  else if (ok && (*end == ':' || *end == '/')) {
    const char *second = end + 1;
    double d = strtod (second, &end);

    ok = end != second && *end == '\0';
    /* No chances out of none. */
    if (p != 0 || d != 0)
      p /= d;
  }
  else
    ok = ok && *end == '\0';

  if (!ok || !isfinite (p) || signbit (p)) {
    nbdkit_error ("parse %s: got \"%s\", need a probability such as 0.1, 10%%,"
                  " 1:10 or 1/10", what, str);
    return -1;
  }
  if (r)
    *r = p;
  return 0;
}

int
nbdkit_parse_delay (const char *what, const char *str, unsigned *sec,
                    unsigned *nsec)
{
  static const struct {
    const char *suffix;
    double per_second;
  } units[] = {
    { "", 1 },     { "s", 1 },            { "ms", 1e3 },
    { "us", 1e6 }, { "\xce\xbcs", 1e6 },  { "ns", 1e9 },
  };
  char *end;
  double d = strtod (str, &end), s, n;
  double per_second = 0;

  if (end != str)
    for (size_t i = 0; i < sizeof units / sizeof units[0]; ++i)
      if (strcmp (end, units[i].suffix) == 0)
        per_second = units[i].per_second;
  if (per_second == 0 || !isfinite (d) || signbit (d)) {
    nbdkit_error ("parse %s: got \"%s\", need a delay such as 10, 1.5s, 20ms,"
                  " 50us or 100ns", what, str);
    return -1;
  }
  s = floor (d / per_second);
  n = rint ((d - s * per_second) * (1e9 / per_second));
  if (n >= 1e9) {
    n -= 1e9;
    s += 1;
  }
  if (s > UINT_MAX) {
    nbdkit_error ("parse %s: got \"%s\", need a delay of at most %u seconds",
                  what, str, UINT_MAX);
    return -1;
  }
  if (sec)
    *sec = s;
  if (nsec)
    *nsec = n;
  return 0;
}

/* ---- passwords ---- */

/* Read the first line of fd, without its end, and close fd. name is for the
 * message.
 */
static int
read_line (int fd, const char *name, char **password)
{
  char *line = NULL;
  size_t size = 0;
  ssize_t n;
  FILE *fp = fdopen (fd, "r");

  if (fp == NULL) {
    nbdkit_error ("read password from %s: %m", name);
    return -1;
  }
  errno = 0;
  n = getline (&line, &size, fp);
  if (n == -1 && (ferror (fp) || errno == ENOMEM)) {
    nbdkit_error ("read password from %s: %m", name);
    free (line);
    fclose (fp);
    return -1;
  }
  fclose (fp);
  if (n == -1) {
    /* An empty file is an empty password. */
    free (line);
    line = strdup ("");
    if (line == NULL) {
      nbdkit_error ("read password from %s: %m", name);
      return -1;
    }
  }
  else if (n > 0 && line[n - 1] == '\n')
    line[n - 1] = '\0';
  *password = line;
  return 0;
}

/* Ask at the terminal, which need not be standard input, without echo. */
static int
read_tty (char **password)
{
  static const char prompt[] = "password: ";
  int fd = open ("/dev/tty", O_RDWR | O_CLOEXEC | O_NOCTTY), copy, r = -1;
  struct termios old, quiet;
  bool restore = false;

  if (fd == -1) {
    nbdkit_error ("read password: open /dev/tty: %m; there is no terminal, use"
                  " +FILE or -FD");
    return -1;
  }
  /* Before the prompt: this drops what has been typed. */
  if (tcgetattr (fd, &old) == 0) {
    quiet = old;
    quiet.c_lflag &= ~ECHO;
    quiet.c_lflag |= ECHONL;
    restore = tcsetattr (fd, TCSAFLUSH, &quiet) == 0;
  }
  copy = fcntl (fd, F_DUPFD_CLOEXEC, 0);
  if (copy == -1)
    nbdkit_error ("read password from /dev/tty: %m");
  else if (write (fd, prompt, sizeof prompt - 1) == -1) {
    nbdkit_error ("read password from /dev/tty: %m");
    close (copy);
  }
  else
    r = read_line (copy, "/dev/tty", password);
  if (restore)
    tcsetattr (fd, TCSAFLUSH, &old);
  close (fd);
  return r;
}

static int
read_password (const char *value, char **password)
{
  int fd;

  *password = NULL;
  if (strcmp (value, "-") == 0)
    return read_tty (password);

  if (value[0] == '-') {
    if (nbdkit_parse_int ("password file descriptor", value + 1, &fd) == -1)
      return -1;
    if (fd >= 0 && fd <= STDERR_FILENO) {
      nbdkit_error ("read password from descriptor %d: need 3 or above, since it"
                    " is closed afterwards", fd);
      return -1;
    }
    return read_line (fd, value, password);
  }

  if (value[0] == '+') {
    fd = open (value + 1, O_RDONLY | O_CLOEXEC);
    if (fd == -1) {
      nbdkit_error ("read password: open %s: %m", value + 1);
      return -1;
    }
    return read_line (fd, value + 1, password);
  }

  *password = strdup (value);
  if (*password == NULL) {
    nbdkit_error ("read password: %m");
    return -1;
  }
  return 0;
}

int
nbdkit_read_password (const char *value, char **password)
{
  int r = read_password (value, password);

  if (r == 0 && *password != NULL && nbdhost_in_server ())
    nbdhost_go_secret (*password);
  return r;
}

/* ---- paths ---- */

static bool
empty (const char *path)
{
  if (path != NULL && *path != '\0')
    return false;
  nbdkit_error ("resolve path: got an empty one");
  return true;
}

char *
nbdkit_absolute_path (const char *path)
{
  char *cwd, *r;

  if (empty (path))
    return NULL;
  if (*path == '/') {
    r = strdup (path);
    if (r == NULL)
      nbdkit_error ("resolve path %s: %m", path);
    return r;
  }
  cwd = get_current_dir_name ();
  if (cwd == NULL) {
    nbdkit_error ("resolve path %s: get the working directory: %m", path);
    return NULL;
  }
  if (asprintf (&r, "%s/%s", cwd, path) == -1) {
    nbdkit_error ("resolve path %s: %m", path);
    r = NULL;
  }
  free (cwd);
  return r;
}

char *
nbdkit_realpath (const char *path)
{
  char *r;

  if (empty (path))
    return NULL;
  r = realpath (path, NULL);
  if (r == NULL)
    nbdkit_error ("resolve path %s: %m", path);
  return r;
}
