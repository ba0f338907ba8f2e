//go:build ignore

/* The floor: the least that a server can do for these clients.
 *
 * One thread. A receive takes what the socket holds, each request in it costs a
 * memcpy, and the replies leave in one send. There are no checks beyond what
 * keeps it in its memory, no options, no structured replies.
 *
 * usage: floor KEY=VALUE...
 *   socket=PATH port=N  where to listen
 *   size=BYTES          of the export
 *   single=1            one connection at a time, which blocks in recv; else epoll
 *   plugin=FILE         call nbdkit's memory plugin instead of memcpy; requests are at most
 *                       1 MiB long
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <dlfcn.h>
#include <endian.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <pthread.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#define NBDKIT_API_VERSION 2
#include <nbdkit-plugin.h>

#define BUFFER (256 << 10)
/* What leaves in one send: more has left the cache before the kernel copies it. */
#define BATCH (64 << 10)
/* With the plugin: as much as leaves nbdhost in one send where 64 reads of 4 KiB are in flight,
 * and room for the longest request.
 */
#define PLUGIN_BATCH (132 << 10)
#define LONGEST ((1 << 20) + 28)

static char *memory;
static uint64_t size = 64 << 20;
static struct nbdkit_plugin *plugin;
static void *handle;            /* of the plugin, which needs one only */

struct connection {
  int fd;
  size_t have;                  /* the start of a header, in buffer */
  char *to;                     /* where the payload of a write goes on, */
  uint64_t left;                /* and how much of it is to come */
  uint64_t cookie;              /* of that write */
  char buffer[LONGEST];
};

static char out[LONGEST];       /* nothing waits in it between two receives */
static size_t waiting, batch = BATCH;

static void
fail (const char *what)
{
  perror (what);
  exit (1);
}

static bool
send_all (int fd, const void *p, size_t n)
{
  while (n) {
    ssize_t r = send (fd, p, n, MSG_NOSIGNAL);
    if (r == -1)
      return false;
    p = (const char *) p + r;
    n -= r;
  }
  return true;
}

static bool
receive_all (int fd, void *p, size_t n)
{
  return n == 0 || recv (fd, p, n, MSG_WAITALL) == (ssize_t) n;
}

static bool
answer (int fd, uint32_t option, uint32_t type, const void *data, uint32_t n)
{
  struct { uint64_t magic; uint32_t option, type, length; } __attribute__ ((packed)) h =
    { htobe64 (0x3e889045565a9), htobe32 (option), htobe32 (type), htobe32 (n) };

  return send_all (fd, &h, sizeof h) && send_all (fd, data, n);
}

static bool
handshake (int fd)
{
  const uint16_t export_flags = htobe16 (1 | 4 | 256); /* has flags, flush, multi-conn */
  struct { uint64_t magic, ihaveopt; uint16_t flags; } __attribute__ ((packed)) greeting =
    { htobe64 (0x4e42444d41474943), htobe64 (0x49484156454f5054), htobe16 (3) };
  struct { uint16_t type; uint64_t size; uint16_t flags; } __attribute__ ((packed)) info =
    { 0, htobe64 (size), export_flags };
  uint32_t client;

  if (!send_all (fd, &greeting, sizeof greeting) || !receive_all (fd, &client, 4))
    return false;
  for (;;) {
    struct { uint64_t magic; uint32_t option, length; } h;
    char data[8192];

    if (!receive_all (fd, &h, sizeof h) || be32toh (h.length) > sizeof data ||
        !receive_all (fd, data, be32toh (h.length)))
      return false;
    uint32_t option = be32toh (h.option);
    switch (option) {
    case 1:                     /* NBD_OPT_EXPORT_NAME */
      return send_all (fd, &info.size, 10);
    case 2:                     /* NBD_OPT_ABORT */
      answer (fd, option, 1, NULL, 0);
      return false;
    case 6: case 7:             /* NBD_OPT_INFO, NBD_OPT_GO */
      if (!answer (fd, option, 3, &info, sizeof info) || !answer (fd, option, 1, NULL, 0))
        return false;
      if (option == 7)
        return true;
      break;
    default:
      if (!answer (fd, option, 0x80000001, NULL, 0))
        return false;
    }
  }
}

static bool
flush (int fd)
{
  size_t n = waiting;

  waiting = 0;
  return send_all (fd, out, n);
}

static bool
put (int fd, const char *p, uint64_t n)
{
  while (n) {
    size_t k = n < batch - waiting ? n : batch - waiting;
    memcpy (out + waiting, p, k);
    waiting += k;
    p += k;
    n -= k;
    if (waiting == batch && !flush (fd))
      return false;
  }
  return true;
}

static bool
reply (int fd, uint64_t cookie)
{
  struct { uint32_t magic, error; uint64_t cookie; } h = { htobe32 (0x67446698), 0, cookie };

  return put (fd, (char *) &h, sizeof h);
}

static bool
read_plugin (int fd, uint64_t cookie, uint32_t length, uint64_t offset)
{
  if (waiting + 16 + length > batch && !flush (fd))
    return false;
  char *data = out + waiting + 16;
  if (16 + length > sizeof out || plugin->pread (handle, data, length, offset, 0) == -1 ||
      !reply (fd, cookie))
    return false;
  waiting += length;
  return true;
}

/* One receive, and all that it brought. Returns false at the connection's end. */
static bool
step (struct connection *c)
{
  size_t room = c->have < BUFFER ? BUFFER : LONGEST;
  ssize_t r = recv (c->fd, c->buffer + c->have, room - c->have, 0);
  if (r <= 0)
    return false;
  char *p = c->buffer, *end = c->buffer + c->have + r;

  for (;;) {
    if (c->left) {
      uint64_t n = c->left < (uint64_t) (end - p) ? c->left : (uint64_t) (end - p);
      memcpy (c->to, p, n);
      c->to += n;
      c->left -= n;
      p += n;
      if (c->left == 0 && !reply (c->fd, c->cookie))
        return false;
    }
    if (end - p < 28)
      break;
    uint16_t type = be16toh (*(uint16_t *) (p + 6));
    uint64_t cookie = *(uint64_t *) (p + 8), offset = be64toh (*(uint64_t *) (p + 16));
    uint32_t length = be32toh (*(uint32_t *) (p + 24));
    p += 28;
    if (type <= 1 && (offset > size || length > size - offset))
      return false;
    switch (type) {
    case 0:
      if (plugin) {
        if (!read_plugin (c->fd, cookie, length, offset))
          return false;
        break;
      }
      if (!reply (c->fd, cookie) || !put (c->fd, memory + offset, length))
        return false;
      break;
    case 1:
      if (plugin) {
        if ((uint64_t) (end - p) < length) {
          p -= 28;
          goto rest;            /* until all of it is there */
        }
        if (plugin->pwrite (handle, p, length, offset, 0) == -1 || !reply (c->fd, cookie))
          return false;
        p += length;
        break;
      }
      c->to = memory + offset;
      c->left = length;
      c->cookie = cookie;
      break;
    case 3:
      if (!reply (c->fd, cookie))
        return false;
      break;
    default:
      return false;
    }
  }
 rest:
  c->have = end - p;
  if (p > c->buffer)
    memmove (c->buffer, p, c->have);
  return flush (c->fd);
}

static struct connection *
take_connection (int listener)
{
  int yes = 1, fd = accept (listener, NULL, NULL);

  if (fd == -1)
    return NULL;
  setsockopt (fd, IPPROTO_TCP, TCP_NODELAY, &yes, sizeof yes);
  if (!handshake (fd)) {
    close (fd);
    return NULL;
  }
  struct connection *c = malloc (sizeof *c);
  if (!c)
    fail ("floor: allocate connection");
  c->fd = fd;
  c->have = c->left = 0;
  return c;
}

/* What the memory plugin asks of a server, as far as it is asked here. */
void nbdkit_debug (const char *fs, ...) {}
void nbdkit_error (const char *fs, ...) {}
int64_t nbdkit_parse_size (const char *s) { return strtoll (s, NULL, 10); }
int nbdkit_parse_bool (const char *s) { return -1; }
int nbdkit_add_extent (struct nbdkit_extents *x, uint64_t o, uint64_t n, uint32_t t) { return -1; }
void nbdkit_extents_free (struct nbdkit_extents *x) {}
void nbdkit_exports_free (struct nbdkit_exports *x) {}

static void *
sleep_on (void *unused)
{
  for (;;)
    pause ();
  return unused;
}

static void
load (const char *file)
{
  char bytes[32];
  pthread_t thread;
  void *module = dlopen (file, RTLD_NOW);
  struct nbdkit_plugin *(*init) (void) = module ? (void *) dlsym (module, "plugin_init") : NULL;

  if (!init) {
    fprintf (stderr, "floor: load plugin: %s\n", dlerror ());
    exit (1);
  }
  plugin = init ();
  snprintf (bytes, sizeof bytes, "%llu", (unsigned long long) size);
  if ((plugin->load && (plugin->load (), 0)) || plugin->config ("size", bytes) == -1 ||
      (plugin->config_complete && plugin->config_complete () == -1) ||
      (plugin->get_ready && plugin->get_ready () == -1) ||
      (plugin->after_fork && plugin->after_fork () == -1) || !(handle = plugin->open (0))) {
    fprintf (stderr, "floor: prepare plugin: it refused\n");
    exit (1);
  }
  memset (out, 'x', BATCH);
  for (uint64_t offset = 0; offset + BATCH <= size; offset += BATCH)
    plugin->pwrite (handle, out, BATCH, offset, 0);
  batch = PLUGIN_BATCH;
  /* In a process of one thread glibc's mutexes leave the atomic operations out, which wait
   * until what memcpy has written has left the processor. No server of several threads can. */
  if (pthread_create (&thread, NULL, sleep_on, NULL) != 0)
    fail ("floor: start thread");
}

int
main (int argc, char *argv[])
{
  const char *path = NULL, *file = NULL;
  int port = 0, listener, yes = 1;
  bool single = false;

  for (int i = 1; i < argc; i++) {
    char *value = strchr (argv[i], '=');
    if (!value)
      return 1;
    *value++ = 0;
    if (strcmp (argv[i], "socket") == 0) path = value;
    else if (strcmp (argv[i], "port") == 0) port = atoi (value);
    else if (strcmp (argv[i], "size") == 0) size = strtoull (value, NULL, 10);
    else if (strcmp (argv[i], "single") == 0) single = atoi (value);
    else if (strcmp (argv[i], "plugin") == 0) file = value;
    else return 1;
  }
  if (file)
    load (file);
  else if (!(memory = malloc (size)))
    fail ("floor: allocate memory");
  else
    memset (memory, 'x', size);
  if (path) {
    struct sockaddr_un a = { .sun_family = AF_UNIX };
    strncpy (a.sun_path, path, sizeof a.sun_path - 1);
    if ((listener = socket (AF_UNIX, SOCK_STREAM, 0)) == -1 ||
        bind (listener, (void *) &a, sizeof a) == -1)
      fail ("floor: bind");
  }
  else {
    struct sockaddr_in a = { .sin_family = AF_INET, .sin_port = htons (port),
                             .sin_addr.s_addr = htonl (INADDR_LOOPBACK) };
    if ((listener = socket (AF_INET, SOCK_STREAM, 0)) == -1 ||
        setsockopt (listener, SOL_SOCKET, SO_REUSEADDR, &yes, sizeof yes) == -1 ||
        bind (listener, (void *) &a, sizeof a) == -1)
      fail ("floor: bind");
  }
  if (listen (listener, 128) == -1)
    fail ("floor: listen");

  if (single)
    for (;;) {
      struct connection *c = take_connection (listener);
      if (!c)
        continue;
      while (step (c))
        ;
      waiting = 0;
      close (c->fd);
      free (c);
    }
  int epoll = epoll_create1 (0);
  struct epoll_event e = { .events = EPOLLIN };
  if (epoll == -1 || epoll_ctl (epoll, EPOLL_CTL_ADD, listener, &e) == -1)
    fail ("floor: epoll");
  for (;;) {
    struct epoll_event events[64];
    int n = epoll_wait (epoll, events, 64, -1);
    for (int i = 0; i < n; i++) {
      struct connection *c = events[i].data.ptr;
      if (!c) {
        if ((c = take_connection (listener))) {
          e.data.ptr = c;
          if (epoll_ctl (epoll, EPOLL_CTL_ADD, c->fd, &e) == -1)
            fail ("floor: epoll");
        }
      }
      else if (!step (c)) {
        waiting = 0;
        close (c->fd);
        free (c);
      }
    }
  }
}
