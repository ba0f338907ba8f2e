package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/bits"
	"os"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"nbdhost/client"
	_ "nbdhost/client/nbds"
)

// The load generator is this program too, started again with the arguments
// load KEY=VALUE...:
//
//	mode=run       requests for SECONDS after WARMUP; prints what was measured
//	mode=fill      each block of the export once (every STRIDEth)
//	mode=connect   COUNT times: connect, handshake, one read, close
//	mode=idle      opens CONNS connections, prints "ready", waits for the end of
//	               standard input
//	mode=hog       uses one processor until it is killed
//	uri=URI        where the server is; nbds is possible
//	op=read|write|status size=BYTES span=BYTES (of the export)
//	depth=N conns=N     requests in flight on each connection; connections
//	pid=N          the server, whose processor time is printed
//
// It prints KEY=VALUE, times in nanoseconds. Any error ends it.
type load struct {
	mode, uri, op       string
	depth, conns, count int
	stride, pid         int
	size, span          int
	seconds, warmup     float64

	measuring, stopping atomic.Bool
}

// loadMain is the load generator's main function.
func loadMain(args []string, stdin io.Reader, stdout io.Writer) error {
	l := &load{mode: "run", op: "read", depth: 1, conns: 1, count: 100, stride: 1, size: 4 * kib, span: exportSize, seconds: 1, warmup: 0.1}
	texts := map[string]*string{"mode": &l.mode, "uri": &l.uri, "op": &l.op}
	numbers := map[string]*int{"depth": &l.depth, "conns": &l.conns, "count": &l.count, "stride": &l.stride, "pid": &l.pid, "size": &l.size, "span": &l.span}
	times := map[string]*float64{"seconds": &l.seconds, "warmup": &l.warmup}
	for _, arg := range args {
		key, value, _ := strings.Cut(arg, "=")
		var err error
		switch {
		case texts[key] != nil:
			*texts[key] = value
		case numbers[key] != nil:
			*numbers[key], err = strconv.Atoi(value)
		case times[key] != nil:
			*times[key], err = strconv.ParseFloat(value, 64)
		default:
			err = errors.New("no such key")
		}
		if err != nil {
			return fmt.Errorf("read argument %q: %w", arg, err)
		}
	}
	if l.depth < 1 || l.conns < 1 || l.stride < 1 || l.size < 1 || l.span < l.size {
		return errors.New("read arguments: a number is out of its range")
	}
	switch l.mode {
	case "run":
		return l.run(stdout)
	case "fill":
		l.op = "write"
		return l.fill()
	case "connect":
		return l.connect(stdout)
	case "idle":
		for range l.conns {
			c, err := l.dial(context.Background())
			if err != nil {
				return err
			}
			defer c.Close()
		}
		fmt.Fprintln(stdout, "ready")
		_, err := io.Copy(io.Discard, stdin)
		return err
	case "hog":
		for n := 0; ; n++ {
			runtime.KeepAlive(n)
		}
	}
	return fmt.Errorf("read arguments: got mode %q", l.mode)
}

// dial connects as all clients of the same row do: with simple replies, unless
// block status needs structured ones. A thread for each connection awaits replies,
// as long as there is a processor for each.
func (l *load) dial(ctx context.Context) (*client.Conn, error) {
	status := l.op == "status"
	opts := &client.Options{NoGo: true, SimpleReplies: !status, CompactHeaders: true,
		Blocking: l.mode != "idle" && l.conns <= runtime.NumCPU()}
	return client.Dial(ctx, l.uri, opts)
}

// A stream is what one connection does.
type stream struct {
	*load
	c        *client.Conn
	answered atomic.Uint64
	mu       sync.Mutex // held by a completion; one of a large write may be beside another
	histo    histogram
	random   uint64
	next     int    // with sequential the next block, else unused
	data     []byte // of all requests: nobody looks at it
	inFlight int
	ended    chan error

	sequential bool
}

var epoch = time.Now()

// clock is a monotonic time in nanoseconds.
func clock() int64 { return int64(time.Since(epoch)) }

func (l *load) stream(i int) (*stream, error) {
	c, err := l.dial(context.Background())
	if err != nil {
		return nil, err
	}
	if uint64(l.span) > c.Size() {
		return nil, fmt.Errorf("got an export of %d bytes, need %d", c.Size(), l.span)
	}
	return &stream{load: l, c: c, random: 0x9e3779b97f4a7c15 * uint64(i+1), data: slices.Repeat([]byte{'x'}, l.size), ended: make(chan error, 1)}, nil
}

// begin has the requests made, nearly all on the receiving goroutine: the completion
// of a first read issues so many as are to be in flight, and the completion of each
// the next.
func (s *stream) begin() error {
	s.inFlight = s.depth
	first := make([]byte, s.size) // not data: zeroes that are written are holes to nbdcopy
	_, err := s.c.AioPread(first, 0, 0, func(err error) int {
		s.mu.Lock()
		defer s.mu.Unlock()
		for range s.depth {
			r := &request{stream: s}
			r.done = r.completed
			if err == nil {
				err = r.issue()
			}
		}
		if err != nil {
			s.end(err)
		}
		return 1
	})
	return err
}

func (s *stream) end(err error) {
	select {
	case s.ended <- err:
	default:
	}
}

// A request is made again and again.
type request struct {
	*stream
	started int64
	done    client.Completion
}

// issue makes the request, or counts it off where there is none left to make.
func (r *request) issue() (err error) {
	s := r.stream
	blocks := s.span / s.size
	var block int
	if s.sequential {
		block = s.next
		s.next += s.stride
	} else {
		s.random ^= s.random << 13
		s.random ^= s.random >> 7
		s.random ^= s.random << 17
		block = int(s.random % uint64(blocks))
	}
	if block >= blocks || s.stopping.Load() {
		if s.inFlight--; s.inFlight == 0 {
			s.end(nil)
		}
		return nil
	}
	off := uint64(block * s.size)
	switch s.op {
	case "read":
		_, err = s.c.AioPread(s.data, off, 0, r.done)
	case "write":
		_, err = s.c.AioPwrite(s.data, off, 0, r.done)
	case "status":
		_, err = s.c.AioBlockStatus(uint64(s.size), off, 0, nil, r.done)
	default:
		err = fmt.Errorf("read arguments: got op %q", s.op)
	}
	return err
}

func (r *request) completed(err error) int {
	s := r.stream
	now := clock()
	s.mu.Lock()
	defer s.mu.Unlock()
	if err == nil {
		if r.started != 0 && s.measuring.Load() {
			s.histo.record(uint64(now - r.started))
		}
		r.started = now
		s.answered.Add(1)
		err = r.issue()
	}
	if err != nil {
		s.end(err)
	}
	return 1
}

// start opens the connections.
func (l *load) start(sequential bool) (streams []*stream, err error) {
	for i := range l.conns {
		s, err := l.stream(i)
		if err != nil {
			return nil, err
		}
		s.sequential = sequential
		streams = append(streams, s)
	}
	for _, s := range streams {
		if err := s.begin(); err != nil {
			return nil, err
		}
	}
	return streams, nil
}

func finish(streams []*stream) error {
	for _, s := range streams {
		if err := <-s.ended; err != nil {
			return err
		}
		if err := s.c.Disconnect(); err != nil {
			return err
		}
	}
	return nil
}

func (l *load) fill() error {
	streams, err := l.start(true)
	if err != nil {
		return err
	}
	return finish(streams)
}

// totals are readings of what only grows.
type totals struct {
	wall              int64
	answered          uint64
	server, ourselves int64 // processor time
}

func (l *load) totals(streams []*stream) (t totals, err error) {
	t.wall = clock()
	for _, s := range streams {
		t.answered += s.answered.Load()
	}
	if l.pid != 0 {
		if t.server, err = processClock(l.pid); err != nil {
			return t, fmt.Errorf("read the server's clock: %w", err)
		}
	}
	var u unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &u); err != nil {
		return t, err
	}
	t.ourselves = u.Utime.Nano() + u.Stime.Nano()
	return t, nil
}

func (l *load) run(w io.Writer) error {
	streams, err := l.start(false)
	if err != nil {
		return err
	}
	time.Sleep(time.Duration(l.warmup * float64(time.Second)))
	a, err := l.totals(streams)
	if err != nil {
		return err
	}
	l.measuring.Store(true)
	time.Sleep(time.Duration(l.seconds * float64(time.Second)))
	b, err := l.totals(streams)
	if err != nil {
		return err
	}
	l.measuring.Store(false)
	l.stopping.Store(true)
	if err := finish(streams); err != nil {
		return err
	}
	var all histogram
	for _, s := range streams {
		all.add(&s.histo)
	}
	fmt.Fprintf(w, "ops=%d\nwall=%d\nserver=%d\nclient=%d\np50=%d\np99=%d\n", b.answered-a.answered, b.wall-a.wall,
		b.server-a.server, b.ourselves-a.ourselves, all.percentile(0.5), all.percentile(0.99))
	return nil
}

func (l *load) connect(w io.Writer) error {
	var h histogram
	p := make([]byte, l.size)
	for range l.count {
		t := clock()
		c, err := l.dial(context.Background())
		if err != nil {
			return err
		}
		if err := c.Pread(p, 0); err != nil {
			return err
		}
		h.record(uint64(clock() - t))
		if err := c.Disconnect(); err != nil {
			return err
		}
	}
	fmt.Fprintf(w, "p50=%d\np99=%d\n", h.percentile(0.5), h.percentile(0.99))
	return nil
}

// steps are in each power of two, so that a percentile is at most 3 % off.
const steps = 32

type histogram [64 * steps]uint64

func (h *histogram) record(ns uint64) {
	if ns < steps {
		h[ns]++
		return
	}
	shift := bits.Len64(ns) - 6
	h[(shift+1)*steps+int(ns>>shift)-steps]++
}

func (h *histogram) add(other *histogram) {
	for i, n := range other {
		h[i] += n
	}
}

func (h *histogram) percentile(p float64) uint64 {
	var total, sum uint64
	for _, n := range h {
		total += n
	}
	for i, n := range h {
		sum += n
		if sum > 0 && float64(sum) >= p*float64(total) {
			if i < steps {
				return uint64(i)
			}
			return uint64(i%steps+steps) << (i/steps - 1)
		}
	}
	return 0
}

// processClock is the processor time that a process has used so far, in
// nanoseconds; see clock_getcpuclockid(3).
func processClock(pid int) (int64, error) {
	var t unix.Timespec
	err := unix.ClockGettime(^int32(pid)<<3|2, &t)
	return t.Nano(), err
}

// runLoad is main for a process that is to be the load generator.
func runLoad() {
	if err := loadMain(os.Args[2:], os.Stdin, os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, "load:", err)
		os.Exit(1)
	}
	os.Exit(0)
}
