package server

import (
	"context"
	"errors"
	"fmt"
	"net"
	"sync/atomic"
	"time"

	"golang.org/x/sync/semaphore"
	"golang.org/x/sys/unix"
	"golang.org/x/time/rate"

	"nbdhost/protocol"
)

// Limits bound what clients get. What goes beyond the number of connections is
// refused; a request that goes beyond another limit waits for its turn, and holds up its own
// connection. Zero is no limit, unless something else is said.
type Limits struct {
	Connections int // open at a time; 0 stands for 1000 if each has a thread ([backend.Pinned])
	// ConnectionsPerAddress is for each IP address, or machine on a vsock;
	// clients on Unix sockets have none.
	ConnectionsPerAddress int
	Requests              int // that the chain works on at a time
	// Bytes is how much data the requests of all connections may have under way
	// until their replies are sent, and BytesPerConnection those of one; 0 stands
	// for 256 MiB there, less than 0 for no limit. One request is let through
	// however long it is.
	Bytes, BytesPerConnection int64
	// Bandwidth is how many bits of data may be read from each export in a
	// second, and as many written to it.
	Bandwidth int64
}

// A Limit is one that makes requests wait.
type Limit int

const (
	LimitBandwidth Limit = iota
	LimitBytes
	LimitBytesPerConnection
	LimitRequests
	limits
)

// String is a word for a label, such as "bandwidth".
func (l Limit) String() string {
	return [limits]string{"bandwidth", "bytes", "bytes_per_connection", "requests"}[l]
}

// DelayStats is about the requests that had to wait for a limit.
type DelayStats struct {
	Requests uint64 // that have waited, or wait now
	Seconds  float64
}

type delays struct{ requests, nanoseconds atomic.Uint64 }

const (
	defaultBytesPerConnection = 256 << 20
	// defaultPinned is far below the threads that containers usually allow, and a Go program
	// (10,000, see debug.SetMaxThreads): one more ends the process.
	defaultPinned = 1000
	// largestBuffer is the most that one request makes the server hold, in
	// bytes: its payload, its reply, or zeroes for a module that has no .zero.
	largestBuffer = protocol.MaxRequestLength
	// bucketTime is for how long a client that was idle may use its bandwidth at once.
	bucketTime = 100 * time.Millisecond
	// goneTick is how often a client whose request waits is looked after.
	goneTick = 50 * time.Millisecond
	// refusedTime is how long a client has that is refused, to ask and be told why;
	// and maxRefused how many are told at a time. The others are cut off.
	refusedTime = time.Second
	maxRefused  = 16
)

// A budget is a number of requests or bytes that may be under way. The zero value
// has no limit.
type budget struct {
	sem *semaphore.Weighted
	max int64
}

func newBudget(limit int64) budget {
	if limit <= 0 {
		return budget{}
	}
	return budget{semaphore.NewWeighted(limit), limit}
}

// cost is what n takes from the budget: never more than there is.
func (b budget) cost(n int64) int64 {
	if b.sem == nil {
		return 0
	}
	return min(n, b.max)
}

// try takes n if that need not wait, and returns false where it must.
func (b budget) try(n int64) bool { return b.sem == nil || n == 0 || b.sem.TryAcquire(n) }

func (b budget) giveBack(n int64) {
	if n > 0 && b.sem != nil {
		b.sem.Release(n)
	}
}

// A bucket lets so many bytes pass in a second. The nil one lets all pass.
type bucket struct{ *rate.Limiter }

func newBucket(bitsPerSecond int64) bucket {
	if bitsPerSecond <= 0 {
		return bucket{}
	}
	bytes := float64(bitsPerSecond) / 8
	return bucket{rate.NewLimiter(rate.Limit(bytes), max(1, int(bytes*bucketTime.Seconds())))}
}

// wait takes n bytes, more than a burst in pieces.
func (b bucket) wait(ctx context.Context, n int) error {
	for n > 0 {
		piece := min(n, b.Burst())
		if err := b.WaitN(ctx, piece); err != nil {
			return err
		}
		n -= piece
	}
	return nil
}

// held is what a request has taken from the budgets of bytes, and gives back when
// its reply has been sent.
type held struct{ own, all int64 }

func (h *held) add(other *held) {
	h.own += other.own
	h.all += other.all
	*other = held{}
}

func (c *conn) giveBack(h *held) {
	if *h != (held{}) {
		c.bytes.giveBack(h.own)
		c.s.bytes.giveBack(h.all)
		*h = held{}
	}
}

// size is how much data the request makes the server hold, in bytes.
func size(req *protocol.Request) int64 {
	switch req.Type {
	case protocol.CmdRead, protocol.CmdWrite, protocol.CmdWriteZeroes, protocol.CmdCache:
		return int64(min(req.Length, largestBuffer))
	}
	return 0
}

var errGone = errors.New("the client went away while its request waited for a limit")

// shortRequest is up to which size in bytes a request is small for limit.
const shortRequest = 64 << 10

// limit waits until the limits of bytes and bandwidth let r.req pass, which other goroutines
// will carry out with delegated. What is taken is in r.held. Small requests that the
// reader carries out itself, one after the other, do not count as the connection's own
// bytes. An error ends the connection, unless it is in r.err: then the request is
// to be refused.
func (r *reader) limit(delegated bool) error {
	c, s := r.c, r.c.s
	n := size(&r.req)
	if delegated || n > shortRequest {
		r.takeOwn(c.bytes.cost(n))
	}
	if !s.limited {
		return nil
	}
	// Who waits for bandwidth holds nothing that others want.
	err := r.pass()
	if err == nil {
		err = r.takeAll(s.bytes.cost(n))
	}
	if err == nil {
		return nil
	}
	c.giveBack(&r.held)
	if s.quitting() {
		r.err = r.stopping()
		return nil
	}
	return err
}

// takeOwn takes n of the connection's own bytes. They come back by themselves, when replies have
// been sent or cannot be.
func (r *reader) takeOwn(n int64) {
	own := r.c.bytes
	if !own.try(n) {
		r.sample()
		r.send() // what holds some of them
		r.delayed(LimitBytesPerConnection, func() { _ = own.sem.Acquire(context.Background(), n) })
	}
	r.held.own = n
}

// takeAll takes n of the bytes of all connections.
func (r *reader) takeAll(n int64) error {
	all := r.c.s.bytes
	if !all.try(n) {
		if err := r.delay(LimitBytes, func(ctx context.Context) error { return all.sem.Acquire(ctx, n) }); err != nil {
			return err
		}
	}
	r.held.all = n
	return nil
}

// pass waits for bandwidth.
func (r *reader) pass() error {
	var b bucket
	switch r.req.Type {
	case protocol.CmdRead:
		b = r.c.export.reads
	case protocol.CmdWrite:
		b = r.c.export.writes
	}
	n := int(r.req.Length)
	if b.Limiter == nil || n == 0 || b.AllowN(time.Now(), n) {
		return nil
	}
	return r.delay(LimitBandwidth, func(ctx context.Context) error { return b.wait(ctx, n) })
}

// delay runs wait, whose context ends when the client is gone or the server stops.
func (r *reader) delay(l Limit, wait func(context.Context) error) (err error) {
	// What is ready to be sent need not wait; and others may wait for what it holds.
	r.sample()
	r.send()
	r.delayed(l, func() {
		r.c.attended(func(ctx context.Context) { err = wait(ctx) })
	})
	if err != nil {
		return errGone
	}
	return nil
}

// delayed runs wait, which is for l, and counts that.
func (t *task) delayed(l Limit, wait func()) {
	c := t.c
	d := &c.s.delays[l]
	d.requests.Add(1)
	began := time.Now()
	if c.delays.Or(1<<l)&(1<<l) == 0 {
		t.call.Debugf("%v waits: the limit of %v is reached (said once for a connection)", t.req.Type, l)
	}
	wait()
	d.nanoseconds.Add(uint64(time.Since(began)))
}

// attended runs wait, whose context ends when the client is gone or the server stops.
func (c *conn) attended(wait func(context.Context)) {
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		defer cancel()
		c.await(ctx)
	}()
	wait(ctx)
	cancel()
	<-ended
}

// await returns when ctx has ended, the client is gone or the server stops.
func (c *conn) await(ctx context.Context) {
	tick := time.NewTicker(goneTick)
	defer tick.Stop()
	for !c.gone() {
		select {
		case <-ctx.Done():
			return
		case <-c.s.quit:
			return
		case <-tick.C:
		}
	}
}

// gone tells whether the client has closed the connection, or the server has cut it.
// A client that has only ended its own side counts as well: it should have said
// NBD_CMD_DISC, and over TCP cannot be told from one that is gone.
func (c *conn) gone() bool {
	if status(c.status.Load()) == dead {
		return true
	}
	if c.peer.FD < 0 {
		return false
	}
	p := []unix.PollFd{{Fd: int32(c.peer.FD), Events: unix.POLLRDHUP}}
	n, err := unix.Poll(p, 0)
	return err == nil && n > 0
}

// takeTurn waits until a call into the chain may be made: the thread model and Limits.Requests
// allow it. Nobody has a turn but for calls, so that no client can keep others from theirs.
func (t *task) takeTurn() {
	t.c.lane.Lock()
	if all := t.c.s.requests; !all.try(1) {
		t.delayed(LimitRequests, func() { _ = all.sem.Acquire(context.Background(), 1) })
	}
}

// tryTurn is takeTurn where that need not wait, and returns false where it must.
func (t *task) tryTurn() bool {
	if !t.c.lane.TryLock() {
		return false
	}
	if !t.c.s.requests.try(1) {
		t.c.lane.Unlock()
		return false
	}
	return true
}

// endTurn lets others make theirs.
func (t *task) endTurn() {
	t.c.s.requests.giveBack(1)
	t.c.lane.Unlock()
}

// address is what ConnectionsPerAddress goes by; "" for none.
func address(nc net.Conn) string {
	peer := nc.RemoteAddr()
	if _, ok := peer.(*net.UnixAddr); ok || peer == nil {
		return "" // whatever the client has called its socket; or it has gone already
	}
	host, _, err := net.SplitHostPort(peer.String())
	if err != nil {
		return ""
	}
	return host
}

// count makes c, a new connection, one of those that are admitted, or one that is told
// why it is not. It returns false where there is not even room for that. s.mu is held.
func (s *Server) count(c *conn, address string) bool {
	var reason Reason
	if reason, c.denied = s.full(address); c.denied != "" {
		s.failures[reason].Add(1)
		s.complain(c, address)
		return len(s.conns)-s.admitted < maxRefused
	}
	c.address, c.counted = address, true
	s.admitted++
	s.accepted++
	s.addresses[address]++
	return true
}

// full tells why no connection from address may be added, in ReasonClient's place.
// s.mu is held.
func (s *Server) full(address string) (Reason, string) {
	l := &s.opts.Limits
	switch {
	case l.Connections > 0 && s.admitted >= l.Connections:
		return ReasonConnections, fmt.Sprintf("too many connections: at most %d may be open at a time", l.Connections)
	case l.ConnectionsPerAddress > 0 && address != "" && s.addresses[address] >= l.ConnectionsPerAddress:
		return ReasonConnectionsPerAddress, fmt.Sprintf("too many connections from %s: at most %d may be open at a time", address, l.ConnectionsPerAddress)
	}
	return ReasonClient, ""
}

// complain logs that a connection was refused.
func (s *Server) complain(c *conn, address string) {
	ok, lost := s.refusedLines.take(time.Now())
	if !ok {
		return
	}
	text := "refuse connection"
	if address != "" {
		text += " from " + address
	}
	text += ": " + c.denied
	if lost > 0 {
		text += fmt.Sprintf("; %d more were refused before it and not logged", lost)
	}
	c.log.Error(text)
}

// turnAway lets a client ask for something and tells it why it is refused.
func (c *conn) turnAway(in *input) {
	if c.s.opts.Oldstyle { // which has no words for it
		return
	}
	_ = c.sock.nc.SetDeadline(time.Now().Add(refusedTime)) // fails only on a closed connection
	if err := (&negotiation{c: c, in: in}).negotiate(); err != nil {
		c.call.Debugf("handshake: %v", err)
	}
}
