/* What a module may ask about, or of, the server and the connection it serves. */
#define _GNU_SOURCE
#include <errno.h>
#include <limits.h>
#include <poll.h>
#include <stdio.h>
#include <string.h>
#include <time.h>

#include "shim.h"

/* The connection of the current call; complains if there is none. */
static struct nbdhost_conn *
need_conn (const char *op)
{
  struct nbdhost_conn *conn = nbdhost_current_conn ();

  if (conn == NULL)
    nbdkit_error ("%s: this thread is not serving a connection", op);
  return conn;
}

const char *
nbdkit_name (void)
{
  return nbdhost_settings.name;
}

int
nbdkit_stdio_safe (void)
{
  return nbdhost_settings.stdio_safe;
}

void
nbdkit_shutdown (void)
{
  if (nbdhost_in_server ()) {
    nbdhost_need_sigstack ();
    nbdhost_go_shutdown ();
  }
}

void
nbdkit_disconnect (int force)
{
  struct nbdhost_conn *conn = nbdhost_current_conn ();

  if (conn == NULL)
    nbdkit_debug ("disconnect: ignored outside a connection");
  else if (nbdhost_in_server ())
    nbdhost_go_disconnect (conn->id, force);
}

/* ---- sleep ---- */

int
nbdkit_nanosleep (unsigned sec, unsigned nsec)
{
  struct nbdhost_conn *conn = nbdhost_current_conn ();
  struct pollfd fds[] = {
    { .fd = nbdhost_settings.quit_fd, .events = POLLIN },
    { .fd = conn ? conn->fd : -1, .events = POLLRDHUP },
  };
  struct timespec deadline, now, left;

  if (sec > INT_MAX) {
    nbdkit_error ("sleep: got %u seconds, need at most %d", sec, INT_MAX);
    errno = EINVAL;
    return -1;
  }
  clock_gettime (CLOCK_MONOTONIC, &deadline);
  deadline.tv_sec += sec;
  deadline.tv_nsec += nsec; /* below 6e9, a long on every 64-bit system */
  deadline.tv_sec += deadline.tv_nsec / 1000000000;
  deadline.tv_nsec %= 1000000000;

  /* The runtime's signals interrupt system calls of every thread. */
  for (;;) {
    clock_gettime (CLOCK_MONOTONIC, &now);
    left.tv_sec = deadline.tv_sec - now.tv_sec;
    left.tv_nsec = deadline.tv_nsec - now.tv_nsec;
    if (left.tv_nsec < 0) {
      left.tv_nsec += 1000000000;
      left.tv_sec--;
    }
    if (left.tv_sec < 0)
      left.tv_sec = left.tv_nsec = 0;
    switch (ppoll (fds, 2, &left, NULL)) {
    case 0:
      return 0;
    case -1:
      if (errno == EINTR || errno == EAGAIN)
        continue;
      nbdkit_error ("sleep: %m");
      return -1;
    default:
      nbdkit_error ("sleep: ended early, since the %s",
                    fds[0].revents ? "server is stopping" : "client has gone");
      errno = ESHUTDOWN;
      return -1;
    }
  }
}

/* ---- the connection ---- */

const char *
nbdkit_export_name (void)
{
  if (nbdhost_frame && nbdhost_frame->ctx && nbdhost_frame->ctx->export_name)
    return nbdhost_frame->ctx->export_name;
  nbdkit_error ("get export name: none has been negotiated in this thread");
  return NULL;
}

int
nbdkit_is_tls (void)
{
  struct nbdhost_conn *conn = nbdhost_current_conn ();

  if (conn == NULL && nbdhost_frame && nbdhost_frame->ctx)
    return nbdhost_frame->ctx->tls; /* a session that connections share */
  conn = need_conn ("get TLS status");
  return conn ? conn->tls : -1;
}

int
nbdkit_peer_name (struct sockaddr *addr, socklen_t *addrlen)
{
  struct nbdhost_conn *conn = need_conn ("get peer name");

  if (conn == NULL)
    return -1;
  if (getpeername (conn->fd, addr, addrlen) == -1) {
    nbdkit_error ("get peer name: %m");
    return -1;
  }
  return 0;
}

/* The credentials of the process at the other end of a Unix domain socket. */
static int
peer_cred (const char *op, struct ucred *cred)
{
  struct nbdhost_conn *conn = need_conn (op);
  int domain;
  socklen_t len = sizeof domain;

  if (conn == NULL)
    return -1;
  if (getsockopt (conn->fd, SOL_SOCKET, SO_DOMAIN, &domain, &len) == -1) {
    nbdkit_error ("%s: %m", op);
    return -1;
  }
  if (domain != AF_UNIX) {
    errno = EINVAL;
    nbdkit_error ("%s: need a client on a Unix domain socket", op);
    return -1;
  }
  len = sizeof *cred;
  if (getsockopt (conn->fd, SOL_SOCKET, SO_PEERCRED, cred, &len) == -1) {
    nbdkit_error ("%s: %m", op);
    return -1;
  }
  return 0;
}

int64_t
nbdkit_peer_pid (void)
{
  struct ucred cred;

  return peer_cred ("get peer process", &cred) == -1 ? -1 : (int64_t) cred.pid;
}

int64_t
nbdkit_peer_uid (void)
{
  struct ucred cred;

  return peer_cred ("get peer user", &cred) == -1 ? -1 : (int64_t) cred.uid;
}

int64_t
nbdkit_peer_gid (void)
{
  struct ucred cred;

  return peer_cred ("get peer group", &cred) == -1 ? -1 : (int64_t) cred.gid;
}

char *
nbdkit_peer_security_context (void)
{
  struct nbdhost_conn *conn = need_conn ("get peer security context");
  socklen_t len = 256;
  char *label = NULL, *larger;

  if (conn == NULL)
    return NULL;
  for (;;) {
    socklen_t size = len;

    larger = realloc (label, (size_t) size + 1);
    if (larger == NULL)
      break;
    label = larger;
    if (getsockopt (conn->fd, SOL_SOCKET, SO_PEERSEC, label, &len) == 0) {
      label[len] = '\0';
      return label;
    }
    /* ERANGE: len is what the label needs. */
    if (errno != ERANGE || len <= size)
      break;
  }
  nbdkit_error ("get peer security context: %m");
  free (label);
  return NULL;
}

static char *
peer_dn (const char *op, bool issuer)
{
  struct nbdhost_conn *conn = need_conn (op);
  const char *dn;
  char *r;

  if (conn == NULL)
    return NULL;
  dn = issuer ? conn->issuer_dn : conn->dn;
  r = strdup (dn ? dn : "");
  if (r == NULL)
    nbdkit_error ("%s: %m", op);
  return r;
}

char *
nbdkit_peer_tls_dn (void)
{
  return peer_dn ("get peer certificate", false);
}

char *
nbdkit_peer_tls_issuer_dn (void)
{
  return peer_dn ("get peer certificate issuer", true);
}

/* ---- strings ---- */

static const char *
intern (const char *str, size_t n)
{
  const char *r;

  if (str == NULL) {
    nbdkit_error ("intern string: no string given");
    errno = EINVAL;
    return NULL;
  }
  r = nbdhost_intern (nbdhost_current_conn (), str, n);
  if (r == NULL)
    nbdkit_error ("intern string: %m");
  return r;
}

const char *
nbdkit_strdup_intern (const char *str)
{
  return intern (str, str ? strlen (str) : 0);
}

const char *
nbdkit_strndup_intern (const char *str, size_t n)
{
  return intern (str, str ? strnlen (str, n) : 0);
}

const char *
nbdkit_vprintf_intern (const char *fmt, va_list args)
{
  const char *r;
  char *str;
  int n;

  if (fmt == NULL)
    return intern (NULL, 0);
  n = vasprintf (&str, fmt, args);
  if (n == -1) {
    nbdkit_error ("intern string: %m");
    return NULL;
  }
  r = intern (str, n);
  free (str);
  return r;
}

const char *
nbdkit_printf_intern (const char *fmt, ...)
{
  const char *r;
  va_list args;

  va_start (args, fmt);
  r = nbdkit_vprintf_intern (fmt, args);
  va_end (args);
  return r;
}
