/* Errors, debug messages, hex dumps. Text is formatted here; it reaches Go only
 * in the server's own process.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "shim.h"

static void
emit (int level, char *text)
{
  struct nbdhost_frame *f = nbdhost_frame;
  int worker = f ? f->worker : NBDHOST_FOREIGN;
  /* A line of a module's own thread names no connection, even if the thread
   * makes calls on behalf of one. */
  struct nbdhost_conn *conn =
    worker == NBDHOST_FOREIGN ? NULL : nbdhost_current_conn ();
  const char *name = nbdhost_settings.name; /* as --name gives it */
  char *line;
  int n;

  if (nbdhost_in_server ()) {
    const struct nbdhost_callback *c = f ? nbdhost_callback_at (f->fn) : NULL;
    struct nbdhost_message m = {
      .level = level,
      .conn = conn ? conn->id : 0,
      .worker = worker == NBDHOST_FOREIGN ? NBDHOST_HANDSHAKE : worker,
      .module = c ? c->module : NULL,
      .callback = c ? c->name : NULL,
      .export_name = f && f->ctx ? f->ctx->export_name : NULL,
      .request = f && f->kind != NBDHOST_NO_REQUEST,
      .cookie = f ? f->cookie : 0,
      .text = text,
    };

    nbdhost_need_sigstack ();
    nbdhost_go_log (&m);
    return;
  }
  n = asprintf (&line, "nbdkit%s%s%s: %s: %s\n", name ? "[" : "",
                name ? name : "", name ? "]" : "",
                level == NBDHOST_LEVEL_ERROR ? "error" : "debug", text);
  if (n == -1)
    return;
  /* One write, so that lines of several processes do not mix. There is no
   * one to tell if it fails. */
  if (write (STDERR_FILENO, line, n) == -1) {
  }
  free (line);
}

/* The text, or fmt where it cannot be filled in; nbdkit takes NULL for "". NULL:
 * out of memory.
 */
static char *
format (const char *fmt, va_list args)
{
  char *text;

  if (fmt == NULL)
    fmt = "";
  return vasprintf (&text, fmt, args) == -1 ? strdup (fmt) : text;
}

void
nbdkit_verror (const char *fmt, va_list args)
{
  int saved = errno;
  char *text = format (fmt, args);

  if (text != NULL) {
    emit (NBDHOST_LEVEL_ERROR, text);
    if (nbdhost_frame) {
      free (nbdhost_frame->message);
      nbdhost_frame->message = text;
      nbdhost_frame->module = NULL;
    }
    else
      free (text);
  }
  errno = saved;
}

void
nbdkit_error (const char *fmt, ...)
{
  va_list args;

  va_start (args, fmt);
  nbdkit_verror (fmt, args);
  va_end (args);
}

/* A debug message is one line of printable ASCII, whatever a module puts in it:
 * the rest is written as in C, as by nbdkit 1.42. NULL: out of memory.
 */
static char *
escape (const char *text)
{
  static const char letters[] = "abtnvfr"; /* for 7 to 13 */
  char *r = malloc (4 * strlen (text) + 1), *p = r;

  if (r == NULL)
    return NULL;
  for (; *text; ++text) {
    unsigned char c = *text;

    if (c == '\\')
      p = stpcpy (p, "\\\\");
    else if (c >= ' ' && c <= '~')
      *p++ = c;
    else if (c >= 7 && c <= 13) {
      *p++ = '\\';
      *p++ = letters[c - 7];
    }
    else
      p += sprintf (p, "\\x%02x", c);
  }
  *p = '\0';
  return r;
}

void
nbdkit_vdebug (const char *fmt, va_list args)
{
  int saved = errno;
  char *text, *line;

  if (!nbdhost_verbose ())
    return;
  text = format (fmt, args);
  if (text != NULL) {
    line = escape (text);
    if (line != NULL)
      emit (NBDHOST_LEVEL_DEBUG, line);
    free (line);
    free (text);
  }
  errno = saved;
}

void
nbdkit_debug (const char *fmt, ...)
{
  va_list args;

  if (!nbdhost_verbose ())
    return;
  va_start (args, fmt);
  nbdkit_vdebug (fmt, args);
  va_end (args);
}

/* The error of this call; nothing in a thread that is in none. */
void
nbdkit_set_error (int err)
{
  if (nbdhost_frame)
    nbdhost_frame->error = err;
}

const char *
nbdkit_timestamp (void)
{
  static __thread char text[64];
  int saved = errno;
  struct timespec ts;
  struct tm tm;
  size_t n;

  if (clock_gettime (CLOCK_REALTIME, &ts) == -1 ||
      gmtime_r (&ts.tv_sec, &tm) == NULL)
    strcpy (text, "!");
  else {
    n = strftime (text, sizeof text, "%Y-%m-%d %H:%M:%S", &tm);
    snprintf (text + n, sizeof text - n, ".%06ld", ts.tv_nsec / 1000);
  }
  errno = saved;
  return text;
}

/* ---- hex dumps ---- */

enum { ROW = 16 };

/* Log one row. shown: bytes that are printed, one bit each; the others are
 * left blank, as is what lies outside the buffer.
 */
static void
row (const char *prefix, const char *sign, uint64_t address,
     const uint8_t bytes[ROW], unsigned shown)
{
  char hex[ROW * 3 + 2], chars[ROW + 1], *h = hex;

  for (int i = 0; i < ROW; ++i) {
    bool show = shown >> i & 1;
    uint8_t c = bytes[i];

    if (i == ROW / 2)
      *h++ = ' ';
    if (show)
      h += sprintf (h, "%02x ", c);
    else
      h += sprintf (h, "   ");
    chars[i] = !show ? ' ' : c >= 0x20 && c < 0x7f ? (char) c : '.';
  }
  chars[ROW] = '\0';
  nbdkit_debug ("%s%s%08" PRIx64 ": %s |%s|", prefix ? prefix : "", sign,
                address, hex, chars);
}

/* Dump buf1, and where other differs from it the bytes of other. Rows start at
 * multiples of 16. NULL: nothing to compare with.
 */
static void
dump (const uint8_t *buf, const uint8_t *other, size_t len, const char *prefix,
      uint64_t start)
{
  size_t pos = 0;

  while (pos < len) {
    uint64_t address = start & ~(uint64_t) (ROW - 1);
    uint8_t bytes[ROW] = { 0 }, changed[ROW] = { 0 };
    unsigned inside = 0, differ = 0;

    for (unsigned i = start - address; i < ROW && pos < len;
         ++i, ++pos, ++start) {
      bytes[i] = buf[pos];
      inside |= 1u << i;
      if (other && other[pos] != buf[pos]) {
        changed[i] = other[pos];
        differ |= 1u << i;
      }
    }
    row (prefix, differ ? "-" : other ? " " : "", address, bytes, inside);
    if (differ)
      row (prefix, "+", address, changed, differ);
  }
}

void
nbdkit_debug_hexdump (const void *buf, size_t len, const char *prefix,
                      uint64_t start)
{
  if (nbdhost_verbose ())
    dump (buf, NULL, len, prefix, start);
}

void
nbdkit_debug_hexdiff (const void *buf1, const void *buf2, size_t len,
                      const char *prefix, uint64_t start)
{
  if (nbdhost_verbose ())
    dump (buf1, buf2, len, prefix, start);
}
