//go:build ignore

/* The load generator: a client that costs as little as a client can, so that
 * what is measured is the server.
 *
 * It keeps DEPTH requests in flight on each of CONNS connections. It receives
 * what a socket holds in one call, and asks again for all that was answered in
 * one more. A thread has one connection and blocks in recv, or several and
 * waits in epoll.
 *
 * usage: load KEY=VALUE...
 *   mode=run       requests for SECONDS after WARMUP; prints what was measured
 *   mode=fill      each block of the export once (every STRIDEth)
 *   mode=connect   COUNT times: connect, handshake, one read, close
 *   mode=idle      opens CONNS connections, prints "ready", waits for the end of
 *                  standard input
 *   mode=once      one read; prints CLOCK_MONOTONIC when it was answered
 *   mode=hog       uses one processor until it is killed
 *   socket=PATH port=N  where the server is
 *   op=read|write|status size=BYTES span=BYTES (of the export)
 *   pid=N          the server, whose processor time is printed
 *
 * Prints KEY=VALUE, times in nanoseconds. Any error ends it with status 1.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <endian.h>
#include <errno.h>
#include <inttypes.h>
#include <netinet/tcp.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#define MAX_DEPTH 256
#define BUFFER (256 << 10)

static const char *mode = "run", *op = "read", *socket_path;
static int port, depth = 1, conns = 1, count = 100, stride = 1, server_pid;
static uint64_t size = 4096, span = 64 << 20;
static double seconds = 1, warmup = 0.1;

static uint16_t command;        /* NBD_CMD_* of op */
static bool sequential;         /* fill: each block once, then stop */
static atomic_bool measuring, stopping;
static char *payload;           /* of each write */

static void
fail (const char *what, const char *why)
{
  fprintf (stderr, "load: %s: %s\n", what, why ? why : strerror (errno));
  exit (1);
}

static uint64_t
now (clockid_t clock)
{
  struct timespec t;

  if (clock_gettime (clock, &t) == -1)
    fail ("read clock", NULL);
  return t.tv_sec * UINT64_C (1000000000) + t.tv_nsec;
}

/* ---- Latencies: 32 steps in each power of two, so at most 3 % off. ---- */

#define STEPS 32
struct histogram { uint64_t n[64 * STEPS]; };

static void
record (struct histogram *h, uint64_t ns)
{
  if (ns < STEPS)
    h->n[ns]++;
  else {
    int shift = 63 - __builtin_clzll (ns) - 5;
    h->n[(shift + 1) * STEPS + (ns >> shift) - STEPS]++;
  }
}

static uint64_t
percentile (const struct histogram *h, double p)
{
  uint64_t total = 0, sum = 0;

  for (int i = 0; i < 64 * STEPS; i++)
    total += h->n[i];
  for (int i = 0; i < 64 * STEPS; i++) {
    sum += h->n[i];
    if (sum && sum >= p * total)
      return i < STEPS ? (uint64_t) i : (uint64_t) (i % STEPS + STEPS) << (i / STEPS - 1);
  }
  return 0;
}

/* ---- Connecting. ---- */

struct request {
  uint32_t magic;
  uint16_t flags, type;
  uint64_t cookie, offset;
  uint32_t length;
} __attribute__ ((packed));

struct connection {
  int fd;
  int in_flight;
  uint64_t next;                /* fill: the next block */
  uint64_t random;
  uint64_t started[MAX_DEPTH];  /* by cookie */
  struct request requests[MAX_DEPTH];
  struct iovec iov[2 * MAX_DEPTH];
  uint64_t skip;                /* payload still to come */
  size_t have;                  /* the start of a header, in buffer */
  char buffer[BUFFER];
};

static void
send_all (int fd, const void *p, size_t n)
{
  while (n) {
    ssize_t r = send (fd, p, n, MSG_NOSIGNAL);
    if (r == -1)
      fail ("send", NULL);
    p = (const char *) p + r;
    n -= r;
  }
}

static void
receive_all (int fd, void *p, size_t n)
{
  if (n && recv (fd, p, n, MSG_WAITALL) != (ssize_t) n)
    fail ("receive", "the server closed the connection");
}

static void
option (int fd, uint32_t number, const void *data, uint32_t n)
{
  struct { uint64_t magic; uint32_t option, length; } h =
    { htobe64 (0x49484156454f5054), htobe32 (number), htobe32 (n) };

  send_all (fd, &h, sizeof h);
  send_all (fd, data, n);
}

/* Reads the replies to an option, and wants an NBD_REP_ACK. */
static void
acknowledged (int fd)
{
  for (;;) {
    struct { uint64_t magic; uint32_t option, type, length; }
      __attribute__ ((packed)) h;
    char data[4096];

    receive_all (fd, &h, sizeof h);
    if (be32toh (h.length) > sizeof data)
      fail ("handshake", "got a long option reply");
    receive_all (fd, data, be32toh (h.length));
    if (be32toh (h.type) == 1)
      return;
    if (be32toh (h.type) & 0x80000000)
      fail ("handshake", "the server refused an option");
  }
}

static int
connect_to_server (void)
{
  int fd, yes = 1;
  char greeting[18], reply[10];

  if (socket_path) {
    struct sockaddr_un a = { .sun_family = AF_UNIX };
    strncpy (a.sun_path, socket_path, sizeof a.sun_path - 1);
    if ((fd = socket (AF_UNIX, SOCK_STREAM, 0)) == -1)
      fail ("open socket", NULL);
    while (connect (fd, (void *) &a, sizeof a) == -1)
      if (errno != EINTR)
        fail ("connect", NULL);
  }
  else {
    struct sockaddr_in a = { .sin_family = AF_INET, .sin_port = htons (port),
                             .sin_addr.s_addr = htonl (INADDR_LOOPBACK) };
    if ((fd = socket (AF_INET, SOCK_STREAM, 0)) == -1)
      fail ("open socket", NULL);
    setsockopt (fd, IPPROTO_TCP, TCP_NODELAY, &yes, sizeof yes);
    if (connect (fd, (void *) &a, sizeof a) == -1)
      fail ("connect", NULL);
  }
  receive_all (fd, greeting, sizeof greeting);
  uint32_t flags = htobe32 (3);
  send_all (fd, &flags, sizeof flags);
  if (command == 7) {
    static const char query[] = "\0\0\0\0\0\0\0\1\0\0\0\17base:allocation";
    option (fd, 8, NULL, 0);
    acknowledged (fd);
    option (fd, 10, query, sizeof query - 1);
    acknowledged (fd);
  }
  option (fd, 1, NULL, 0);
  receive_all (fd, reply, sizeof reply);
  return fd;
}

static struct connection *
open_connection (int i)
{
  struct connection *c = calloc (1, sizeof *c);

  if (!c)
    fail ("allocate connection", NULL);
  c->random = 0x9e3779b97f4a7c15 * (i + 1);
  c->fd = connect_to_server ();
  for (int k = 0; k < MAX_DEPTH; k++) {
    c->requests[k].magic = htobe32 (0x25609513);
    c->requests[k].type = htobe16 (command);
    c->requests[k].cookie = htobe64 (k);
    c->requests[k].length = htobe32 (size);
  }
  return c;
}

static void
disconnect (struct connection *c)
{
  struct request r = { .magic = htobe32 (0x25609513), .type = htobe16 (2) };

  send_all (c->fd, &r, sizeof r);
  close (c->fd);
  free (c);
}

/* ---- Requests. ---- */

/* Adds a request to those that ask sends. Returns false if there is none left. */
static bool
prepare (struct connection *c, int cookie, int n)
{
  uint64_t blocks = span / size, block;

  if (sequential) {
    if (c->next >= blocks)
      return false;
    block = c->next;
    c->next += stride;
  }
  else {
    if (atomic_load_explicit (&stopping, memory_order_relaxed))
      return false;
    c->random ^= c->random << 13;
    c->random ^= c->random >> 7;
    c->random ^= c->random << 17;
    block = c->random % blocks;
  }
  c->requests[cookie].offset = htobe64 (block * size);
  c->iov[2 * n] = (struct iovec) { &c->requests[cookie], sizeof (struct request) };
  c->iov[2 * n + 1] = (struct iovec) { payload, command == 1 ? size : 0 };
  return true;
}

/* Sends n requests in one call, or more if the socket takes no more at once. */
static void
ask (struct connection *c, int n)
{
  struct iovec *v = c->iov;
  int left = 2 * n;
  uint64_t t = now (CLOCK_MONOTONIC);

  c->in_flight += n;
  for (int i = 0; i < n; i++)
    c->started[be64toh (((struct request *) v[2 * i].iov_base)->cookie)] = t;
  while (left) {
    struct msghdr m = { .msg_iov = v, .msg_iovlen = left };
    ssize_t r = sendmsg (c->fd, &m, MSG_NOSIGNAL);
    if (r == -1)
      fail ("send requests", NULL);
    while (left && (size_t) r >= v->iov_len) {
      r -= v->iov_len;
      v++, left--;
    }
    if (left) {
      v->iov_base = (char *) v->iov_base + r;
      v->iov_len -= r;
    }
  }
}

static void
begin (struct connection *c)
{
  int n = 0;

  for (int i = 0; i < depth; i++)
    if (prepare (c, i, n))
      n++;
  ask (c, n);
}

struct worker {
  pthread_t thread;
  int first, connections;
  _Atomic uint64_t answered;
  struct histogram latency;
};

/* Receives once, and asks again for all that was answered. */
static void
step (struct worker *w, struct connection *c)
{
  ssize_t r = recv (c->fd, c->buffer + c->have, BUFFER - c->have, 0);
  if (r <= 0)
    fail ("receive replies", r == 0 ? "the server closed the connection" : NULL);
  uint64_t t = now (CLOCK_MONOTONIC);
  bool measure = atomic_load_explicit (&measuring, memory_order_relaxed);
  char *p = c->buffer, *end = c->buffer + c->have + r;
  int n = 0, answered = 0;

  for (;;) {
    uint64_t cookie;
    bool done = true;

    if (c->skip) {
      uint64_t k = c->skip < (uint64_t) (end - p) ? c->skip : (uint64_t) (end - p);
      c->skip -= k;
      p += k;
    }
    if (end - p < 16)
      break;
    uint32_t magic = be32toh (*(uint32_t *) p);
    if (magic == 0x67446698) {
      if (*(uint32_t *) (p + 4))
        fail ("receive replies", "the server replied an error");
      cookie = be64toh (*(uint64_t *) (p + 8));
      c->skip = command == 0 ? size : 0;
      p += 16;
    }
    else if (magic == 0x668e33ef) {
      if (end - p < 20)
        break;
      done = be16toh (*(uint16_t *) (p + 4)) & 1;
      if (be16toh (*(uint16_t *) (p + 6)) & 0x8000)
        fail ("receive replies", "the server replied an error");
      cookie = be64toh (*(uint64_t *) (p + 8));
      c->skip = be32toh (*(uint32_t *) (p + 16));
      p += 20;
    }
    else
      fail ("receive replies", "got bytes that are no reply");
    if (cookie >= (uint64_t) depth)
      fail ("receive replies", "got a cookie that no request has");
    if (done) {
      /* The last one's payload may still be on its way: the same for all servers. */
      c->in_flight--;
      answered++;
      if (measure)
        record (&w->latency, t - c->started[cookie]);
      if (prepare (c, cookie, n))
        n++;
    }
  }
  c->have = end - p;
  memmove (c->buffer, p, c->have);
  atomic_fetch_add_explicit (&w->answered, answered, memory_order_relaxed);
  if (n)
    ask (c, n);
}

static void *
work (void *arg)
{
  struct worker *w = arg;
  struct connection *list[w->connections];
  int left = w->connections, epoll = -1;

  for (int i = 0; i < w->connections; i++)
    list[i] = open_connection (w->first + i);
  if (w->connections > 1 && (epoll = epoll_create1 (0)) == -1)
    fail ("open epoll", NULL);
  for (int i = 0; i < w->connections; i++) {
    struct epoll_event e = { .events = EPOLLIN, .data.ptr = list[i] };
    if (epoll != -1 && epoll_ctl (epoll, EPOLL_CTL_ADD, list[i]->fd, &e) == -1)
      fail ("add to epoll", NULL);
    begin (list[i]);
  }
  while (left) {
    struct epoll_event events[16] = { { .data.ptr = list[0] } };
    int n = 1;

    if (epoll != -1 && (n = epoll_wait (epoll, events, 16, -1)) == -1)
      fail ("wait for replies", NULL);
    for (int i = 0; i < n; i++) {
      struct connection *c = events[i].data.ptr;
      step (w, c);
      if (c->in_flight == 0 && c->skip == 0) {
        disconnect (c);
        left--;
      }
    }
  }
  return NULL;
}

static void
pause_for (double s)
{
  struct timespec t = { s, (s - (long) s) * 1e9 };

  while (nanosleep (&t, &t) == -1)
    ;
}

struct sample { uint64_t wall, server, client, answered; };

static struct sample
take_sample (struct worker *workers, int n)
{
  struct sample s = { .wall = now (CLOCK_MONOTONIC), .client = now (CLOCK_PROCESS_CPUTIME_ID) };

  if (server_pid) {
    clockid_t clock;
    if (clock_getcpuclockid (server_pid, &clock))
      fail ("find the server's clock", NULL);
    s.server = now (clock);
  }
  for (int i = 0; i < n; i++)
    s.answered += workers[i].answered;
  return s;
}

static void
run (void)
{
  int n = sysconf (_SC_NPROCESSORS_ONLN);
  if (n > conns)
    n = conns;
  struct worker *workers = calloc (n, sizeof *workers);

  for (int i = 0, first = 0; i < n; i++) {
    workers[i].first = first;
    workers[i].connections = conns / n + (i < conns % n);
    first += workers[i].connections;
    if (pthread_create (&workers[i].thread, NULL, work, &workers[i]))
      fail ("start thread", NULL);
  }
  if (!sequential) {
    pause_for (warmup);
    struct sample a = take_sample (workers, n);
    measuring = true;
    pause_for (seconds);
    struct sample b = take_sample (workers, n);
    measuring = false;
    stopping = true;
    printf ("ops=%" PRIu64 "\nwall=%" PRIu64 "\nserver=%" PRIu64 "\nclient=%" PRIu64 "\n",
            b.answered - a.answered, b.wall - a.wall, b.server - a.server, b.client - a.client);
  }
  for (int i = 0; i < n; i++)
    pthread_join (workers[i].thread, NULL);
  if (sequential)
    return;
  for (int i = 1; i < n; i++)
    for (int k = 0; k < 64 * STEPS; k++)
      workers[0].latency.n[k] += workers[i].latency.n[k];
  printf ("p50=%" PRIu64 "\np99=%" PRIu64 "\n",
          percentile (&workers[0].latency, 0.5), percentile (&workers[0].latency, 0.99));
}

/* A connection of its own with one request on it. */
static void
once (void)
{
  struct worker w = { 0 };

  struct connection *c = open_connection (0);
  begin (c);
  stopping = true;
  while (c->in_flight || c->skip)
    step (&w, c);
  stopping = false;
  disconnect (c);
}

int
main (int argc, char *argv[])
{
  for (int i = 1; i < argc; i++) {
    char *value = strchr (argv[i], '=');
    if (!value)
      fail (argv[i], "need KEY=VALUE");
    *value++ = 0;
#define KEY(name) (strcmp (argv[i], name) == 0)
    if (KEY ("mode")) mode = value;
    else if (KEY ("op")) op = value;
    else if (KEY ("socket")) socket_path = value;
    else if (KEY ("port")) port = atoi (value);
    else if (KEY ("depth")) depth = atoi (value);
    else if (KEY ("conns")) conns = atoi (value);
    else if (KEY ("count")) count = atoi (value);
    else if (KEY ("stride")) stride = atoi (value);
    else if (KEY ("pid")) server_pid = atoi (value);
    else if (KEY ("size")) size = strtoull (value, NULL, 10);
    else if (KEY ("span")) span = strtoull (value, NULL, 10);
    else if (KEY ("seconds")) seconds = strtod (value, NULL);
    else if (KEY ("warmup")) warmup = strtod (value, NULL);
    else fail (argv[i], "no such key");
  }
  if (depth < 1 || depth > MAX_DEPTH || conns < 1 || size < 1 || span < size)
    fail ("read arguments", "a number is out of its range");
  command = strcmp (op, "read") == 0 ? 0 : strcmp (op, "write") == 0 ? 1 : 7;
  payload = malloc (size);
  if (!payload)
    fail ("allocate payload", NULL);
  memset (payload, 'x', size);

  if (strcmp (mode, "hog") == 0)
    for (volatile uint64_t i = 0;; i++)
      ;
  else if (strcmp (mode, "run") == 0)
    run ();
  else if (strcmp (mode, "fill") == 0) {
    command = 1;
    sequential = true;
    run ();
  }
  else if (strcmp (mode, "once") == 0) {
    once ();
    printf ("answered=%" PRIu64 "\n", now (CLOCK_MONOTONIC));
  }
  else if (strcmp (mode, "connect") == 0) {
    struct histogram *h = calloc (1, sizeof *h);
    for (int i = 0; i < count; i++) {
      uint64_t t = now (CLOCK_MONOTONIC);
      once ();
      record (h, now (CLOCK_MONOTONIC) - t);
    }
    printf ("p50=%" PRIu64 "\np99=%" PRIu64 "\n", percentile (h, 0.5), percentile (h, 0.99));
  }
  else if (strcmp (mode, "idle") == 0) {
    char c;
    for (int i = 0; i < conns; i++)
      connect_to_server ();
    printf ("ready\n");
    fflush (stdout);
    while (read (0, &c, 1) > 0)
      ;
  }
  else
    fail (mode, "no such mode");
  return 0;
}
