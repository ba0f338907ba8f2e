package server

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"path/filepath"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"

	"nbdhost/backend"
	"nbdhost/client"
	"nbdhost/protocol"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// hooked is a disk in memory whose calls a test can watch and hold up.
type hooked struct {
	*backend.Mem
	model  backend.ThreadModel
	before func(c *backend.Call, cb backend.Callback, off uint64) error
	server *Server // set by serve
	opens  atomic.Int32
	closes atomic.Int32
}

func (h *hooked) ThreadModel() backend.ThreadModel { return h.model }

func (h *hooked) Open(c *backend.Call, readonly bool, export string) (backend.Handle, error) {
	if h.before != nil {
		if err := h.before(c, backend.Open, 0); err != nil {
			return nil, err
		}
	}
	m, err := h.Mem.Open(c, readonly, export)
	h.opens.Add(1)
	return &hookedHandle{m, h}, err
}

type hookedHandle struct {
	backend.Handle
	h *hooked
}

func (x *hookedHandle) call(c *backend.Call, cb backend.Callback, off uint64) error {
	if x.h.before == nil {
		return nil
	}
	return x.h.before(c, cb, off)
}

func (x *hookedHandle) Close(c *backend.Call) {
	x.call(c, backend.Close, 0)
	x.h.closes.Add(1)
	x.Handle.Close(c)
}

func (x *hookedHandle) Pread(c *backend.Call, p []byte, off uint64) error {
	if err := x.call(c, backend.Pread, off); err != nil {
		return err
	}
	return x.Handle.Pread(c, p, off)
}

func (x *hookedHandle) Pwrite(c *backend.Call, p []byte, off uint64, flags backend.Flags) error {
	if err := x.call(c, backend.Pwrite, off); err != nil {
		return err
	}
	return x.Handle.Pwrite(c, p, off, flags)
}

func (x *hookedHandle) Flush(c *backend.Call) error {
	return x.call(c, backend.Flush, 0)
}

// serve runs a server for h on a Unix socket until the test ends, and holds it to
// closing what it opened and to giving back its buffers.
func serve(t testing.TB, h *hooked, o Options) (s *Server, uri, path string) {
	t.Helper()
	return serveBackend(t, h, h, o)
}

// serveBackend is serve for b, which is h or has h inside.
func serveBackend(t testing.TB, b backend.Backend, h *hooked, o Options) (s *Server, uri, path string) {
	t.Helper()
	path = filepath.Join(t.TempDir(), "s")
	o.Chain = backend.NewChain(b, nil, backend.Trace{})
	s = New(o)
	h.server = s
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	served := make(chan error, 1)
	go func() { served <- s.Serve(l) }()
	t.Cleanup(func() {
		s.Shutdown()
		if !s.Wait() {
			t.Error("calls did not return")
		}
		if err := <-served; err != nil {
			t.Error(err)
		}
		if o, c := h.opens.Load(), h.closes.Load(); o != c {
			t.Errorf("%d opens, %d closes", o, c)
		}
		if n := backend.BuffersInUse(); n != 0 {
			t.Errorf("%d buffers in use", n)
		}
	})
	return s, "nbd+unix:///?socket=" + path, path
}

func newHooked() *hooked {
	return &hooked{Mem: backend.NewMem(1 << 30), model: backend.Parallel}
}

func dial(t testing.TB, uri string, o *client.Options) *client.Conn {
	t.Helper()
	c, err := client.Dial(context.Background(), uri, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

func errnoOf(err error) protocol.Errno {
	var e *client.Error
	if errors.As(err, &e) {
		return e.Errno
	}
	return 0
}

// Random requests of all kinds and sizes, many at a time on several connections,
// each on its own part of the disk, against a copy of what the disk must hold.
func TestData(t *testing.T) {
	for _, model := range []backend.ThreadModel{backend.SerializeAllRequests, backend.SerializeRequests, backend.Parallel} {
		for name, o := range map[string]client.Options{"simple": {SimpleReplies: true}, "structured": {CompactHeaders: true}, "extended": {}} {
			t.Run(fmt.Sprintf("%v/%s", model, name), func(t *testing.T) {
				h := newHooked()
				h.model = model
				_, uri, _ := serve(t, h, Options{SparseReads: SparseAlways})
				var clients sync.WaitGroup
				for k := range 3 {
					clients.Go(func() { exercise(t, dial(t, uri, &o), k) })
				}
				clients.Wait()
			})
		}
	}
}

func exercise(t *testing.T, c *client.Conn, k int) {
	const part, lanes = 4 << 20, 8
	rnd := rand.New(rand.NewPCG(1, uint64(k)))
	var inFlight sync.WaitGroup
	defer inFlight.Wait()
	for lane := range lanes {
		seed := rnd.Uint64()
		inFlight.Go(func() {
			rnd := rand.New(rand.NewPCG(2, seed))
			base := uint64(k*lanes+lane) * part
			want := make([]byte, part)
			buf := make([]byte, part)
			for range 30 {
				// Mostly small, sometimes larger than any buffer that is there.
				n := 1 + rnd.Uint64N(1<<rnd.Uint64N(22))
				off := rnd.Uint64N(part - n + 1)
				p := buf[:n]
				var err error
				switch rnd.IntN(5) {
				case 0, 1:
					for i := range p {
						p[i] = byte(rnd.Uint32())
					}
					copy(want[off:], p)
					err = c.Pwrite(p, base+off, protocol.CmdFlagFUA)
				case 2:
					clear(want[off : off+n])
					err = c.Zero(n, base+off, 0)
				case 3:
					if err = c.Flush(); err == nil {
						err = c.Cache(n, base+off, 0)
					}
				default:
					if err = c.Pread(p, base+off); err == nil && !bytes.Equal(p, want[off:off+n]) {
						t.Errorf("read of %d at %d differs", n, base+off)
						return
					}
				}
				if err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
}

func request(r protocol.Request) []byte { return r.AppendTo(nil) }

func connect(t testing.TB, path string) net.Conn {
	t.Helper()
	nc, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { nc.Close() })
	nc.SetDeadline(time.Now().Add(time.Minute)) // a test that hangs fails
	return nc
}

// raw opens a connection by hand, for what a client library would not do.
func raw(t testing.TB, path string) net.Conn {
	t.Helper()
	nc := connect(t, path)
	hello := make([]byte, protocol.GreetingSize)
	if _, err := io.ReadFull(nc, hello); err != nil {
		t.Fatal(err)
	}
	out := (protocol.FlagCFixedNewstyle | protocol.FlagCNoZeroes).AppendTo(nil)
	h := protocol.OptionHeader{Option: protocol.OptExportName}
	if _, err := nc.Write(h.AppendTo(out)); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(nc, make([]byte, 10)); err != nil {
		t.Fatal(err)
	}
	return nc
}

func readReply(t testing.TB, nc net.Conn, data int) protocol.SimpleReply {
	t.Helper()
	m, _ := readData(t, nc, func(uint64) int { return data })
	return m
}

// readData receives a reply, and as much data behind it as one without an error has to a
// request with that cookie.
func readData(t testing.TB, nc net.Conn, size func(cookie uint64) int) (m protocol.SimpleReply, data []byte) {
	t.Helper()
	b := make([]byte, protocol.SimpleReplySize)
	if _, err := io.ReadFull(nc, b); err != nil {
		t.Fatal(err)
	}
	if err := m.Decode(b); err != nil {
		t.Fatal(err)
	}
	if n := size(m.Cookie); m.Errno == 0 && n > 0 {
		data = make([]byte, n)
		if _, err := io.ReadFull(nc, data); err != nil {
			t.Fatal(err)
		}
	}
	return m, data
}

// One call that does not return holds up neither the replies before it nor the
// requests behind it, all of which came in one segment. Where the thread model
// serialises, those behind it must wait, but not those before it.
func TestSlowCall(t *testing.T) {
	for _, tt := range []struct {
		model   backend.ThreadModel
		threads int
		slow    protocol.Command
		after   int // replies that come before the slow call returns
	}{
		{backend.Parallel, 16, protocol.CmdRead, 20},
		{backend.Parallel, 16, protocol.CmdWrite, 20},
		{backend.Parallel, 2, protocol.CmdRead, 20},
		{backend.Parallel, 1, protocol.CmdRead, 0},
		{backend.SerializeRequests, 16, protocol.CmdRead, 0},
		{backend.SerializeAllRequests, 16, protocol.CmdWrite, 0},
	} {
		t.Run(fmt.Sprintf("%v/%d/%v", tt.model, tt.threads, tt.slow), func(t *testing.T) {
			const magic = 1 << 20
			h := newHooked()
			h.model = tt.model
			release := make(chan struct{})
			h.before = func(_ *backend.Call, cb backend.Callback, off uint64) error {
				if off == magic {
					<-release
				}
				return nil
			}
			_, _, path := serve(t, h, Options{Threads: tt.threads})
			nc := raw(t, path)

			var out []byte
			add := func(cookie uint64, cmd protocol.Command, off uint64) {
				out = append(out, request(protocol.Request{Type: cmd, Cookie: cookie, Offset: off, Length: 512})...)
				if cmd == protocol.CmdWrite {
					out = append(out, bytes.Repeat([]byte{byte(cookie)}, 512)...)
				}
			}
			for i := range uint64(10) {
				add(i, protocol.CmdRead, 0)
			}
			add(99, tt.slow, magic)
			for i := range uint64(20) {
				add(100+i, []protocol.Command{protocol.CmdRead, protocol.CmdWrite}[i%2], 4096*i)
			}
			if _, err := nc.Write(out); err != nil {
				t.Fatal(err)
			}
			size := func(cookie uint64) int {
				if cookie < 99 || cookie >= 100 && cookie%2 == 0 || cookie == 99 && tt.slow == protocol.CmdRead {
					return 512
				}
				return 0
			}
			seen := map[uint64]bool{}
			next := func() {
				t.Helper()
				b := make([]byte, protocol.SimpleReplySize)
				var m protocol.SimpleReply
				if _, err := io.ReadFull(nc, b); err != nil {
					t.Fatal(err)
				}
				if err := m.Decode(b); err != nil || m.Errno != 0 || seen[m.Cookie] {
					t.Fatalf("got reply %+v, %v, seen: %v", m, err, seen)
				}
				seen[m.Cookie] = true
				data := make([]byte, size(m.Cookie))
				if _, err := io.ReadFull(nc, data); err != nil {
					t.Fatal(err)
				}
			}
			for range 10 + tt.after {
				next()
			}
			if seen[99] {
				t.Fatal("the slow call was answered before it returned")
			}
			close(release)
			for range 21 - tt.after {
				next()
			}
			// What the slow call and those behind it wrote is there.
			check := func(off uint64, want byte) {
				p := make([]byte, 512)
				mem, _ := h.Mem.Open(nil, false, "")
				if mem.Pread(nil, p, off); !bytes.Equal(p, bytes.Repeat([]byte{want}, 512)) {
					t.Errorf("at %d: got %d..., need %d", off, p[0], want)
				}
			}
			if tt.slow == protocol.CmdWrite {
				check(magic, 99)
			}
			check(4096*19, 119)
		})
	}
}

// Workers that have nothing to do are not taken for calls under way.
func TestSlowCallBesideIdleWorkers(t *testing.T) {
	const magic = 1 << 20
	h := newHooked()
	arrived := make(chan struct{}, 2)
	release := make(chan struct{})
	h.before = func(_ *backend.Call, cb backend.Callback, off uint64) error {
		if cb == backend.Flush || off == magic {
			arrived <- struct{}{}
			<-release
		}
		return nil
	}
	s, uri, _ := serve(t, h, Options{Threads: 3})
	c := dial(t, uri, nil)
	hold := func(n int) (done chan error) {
		done = make(chan error, n)
		for range n {
			if _, err := c.AioFlush(0, func(err error) int { done <- err; return 1 }); err != nil {
				t.Fatal(err)
			}
		}
		for range n {
			<-arrived
		}
		return done
	}
	done := hold(3) // now there are workers
	for range 3 {
		release <- struct{}{}
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
	slow := &only(t, s).pace.slow
	p := make([]byte, 512)
	for slow.Load() { // until calls are made on the reader again
		if err := c.Pread(p, 0); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := c.AioPread(make([]byte, 512), magic, 0, func(err error) int { done <- err; return 1 }); err != nil {
		t.Fatal(err)
	}
	<-arrived
	if err := c.Pread(p, 0); err != nil { // hangs if the connection was not taken away
		t.Error(err)
	}
	close(release)
	if err := <-done; err != nil {
		t.Error(err)
	}
}

// As many calls run at a time as Threads says, and no more.
func TestThreads(t *testing.T) {
	for _, threads := range []int{1, 2, 5} {
		t.Run(fmt.Sprint(threads), func(t *testing.T) {
			h := newHooked()
			var now, most atomic.Int32
			arrived := make(chan struct{}, 100)
			release := make(chan struct{})
			h.before = func(_ *backend.Call, cb backend.Callback, _ uint64) error {
				if cb == backend.Flush {
					n := now.Add(1)
					defer now.Add(-1)
					for old := most.Load(); n > old && !most.CompareAndSwap(old, n); old = most.Load() {
					}
					arrived <- struct{}{}
					<-release
				}
				return nil
			}
			_, uri, _ := serve(t, h, Options{Threads: threads})
			c := dial(t, uri, nil)
			var done sync.WaitGroup
			for range 20 {
				done.Add(1)
				if _, err := c.AioFlush(0, func(err error) int {
					if err != nil {
						t.Error(err)
					}
					done.Done()
					return 1
				}); err != nil {
					t.Fatal(err)
				}
			}
			for range threads {
				<-arrived
			}
			close(release)
			done.Wait()
			if n := most.Load(); n != int32(threads) {
				t.Errorf("got %d calls at a time, need %d", n, threads)
			}
		})
	}
}

// nbdkit_disconnect(0): the commands in flight are answered, new ones with
// NBD_ESHUTDOWN; other connections go on.
func TestDisconnectSoft(t *testing.T) {
	h := newHooked()
	release := make(chan struct{})
	var held sync.WaitGroup
	held.Add(2)
	h.before = func(c *backend.Call, cb backend.Callback, off uint64) error {
		switch {
		case cb == backend.Pread && off == 1<<20:
			held.Done()
			<-release
		case cb == backend.Pwrite && off == 2<<20:
			c.Conn.Disconnect(false)
		}
		return nil
	}
	_, uri, _ := serve(t, h, Options{})
	c, other := dial(t, uri, nil), dial(t, uri, nil)
	answers := make(chan error, 2)
	for range 2 {
		if _, err := c.AioPread(make([]byte, 512), 1<<20, 0, func(err error) int { answers <- err; return 1 }); err != nil {
			t.Fatal(err)
		}
	}
	held.Wait()
	if err := c.Pwrite(make([]byte, 512), 2<<20, 0); err != nil {
		t.Errorf("the command that disconnects: %v", err)
	}
	if err := c.Pread(make([]byte, 512), 0); errnoOf(err) != protocol.ESHUTDOWN {
		t.Errorf("new command: got %v, need NBD_ESHUTDOWN", err)
	}
	close(release)
	for range 2 {
		if err := <-answers; err != nil {
			t.Errorf("command in flight: %v", err)
		}
	}
	if err := other.Pread(make([]byte, 512), 0); err != nil {
		t.Errorf("other connection: %v", err)
	}
}

// nbdkit_disconnect(1): no command in flight is answered; close comes when they
// have returned; other connections go on.
func TestDisconnectForce(t *testing.T) {
	h := newHooked()
	release := make(chan struct{})
	closed := make(chan struct{})
	var held sync.WaitGroup
	var cut atomic.Uint64 // the connection that ends
	held.Add(2)
	h.before = func(c *backend.Call, cb backend.Callback, off uint64) error {
		switch {
		case cb == backend.Pread && off == 1<<20:
			held.Done()
			<-release
		case cb == backend.Pwrite && off == 2<<20:
			cut.Store(c.Conn.ID)
			c.Conn.Disconnect(true)
		case cb == backend.Close && c.Conn.ID == cut.Load():
			close(closed)
		}
		return nil
	}
	_, uri, _ := serve(t, h, Options{})
	c, other := dial(t, uri, nil), dial(t, uri, nil)
	answers := make(chan error, 3)
	done := func(err error) int { answers <- err; return 1 }
	for range 2 {
		if _, err := c.AioPread(make([]byte, 512), 1<<20, 0, done); err != nil {
			t.Fatal(err)
		}
	}
	held.Wait()
	if _, err := c.AioPwrite(make([]byte, 512), 2<<20, 0, done); err != nil {
		t.Fatal(err)
	}
	for range 3 {
		if err := <-answers; err == nil || errnoOf(err) != 0 {
			t.Errorf("command in flight: got %v, need a lost connection", err)
		}
	}
	select {
	case <-closed:
		t.Error("closed while calls were under way")
	default:
	}
	close(release)
	<-closed
	if err := other.Pread(make([]byte, 512), 0); err != nil {
		t.Errorf("other connection: %v", err)
	}
	dial(t, uri, nil) // the client may come back
}

// A shutdown answers what is in flight, refuses what is new, and does not wait
// for ever for clients that say nothing.
func TestShutdown(t *testing.T) {
	h := newHooked()
	release := make(chan struct{})
	held := make(chan struct{})
	h.before = func(c *backend.Call, cb backend.Callback, off uint64) error {
		if cb == backend.Pread && off == 1<<20 {
			close(held)
			<-release
		}
		return nil
	}
	s, uri, path := serve(t, h, Options{})
	c := dial(t, uri, nil)
	dial(t, uri, nil) // idle
	nc, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err) // says nothing at all
	}
	defer nc.Close()
	answer := make(chan error, 1)
	if _, err := c.AioPread(make([]byte, 512), 1<<20, 0, func(err error) int { answer <- err; return 1 }); err != nil {
		t.Fatal(err)
	}
	<-held
	s.Shutdown()
	if err := c.Pread(make([]byte, 512), 0); errnoOf(err) != protocol.ESHUTDOWN {
		t.Errorf("new command: got %v, need NBD_ESHUTDOWN", err)
	}
	close(release)
	if err := <-answer; err != nil {
		t.Errorf("command in flight: %v", err)
	}
	if !s.Wait() {
		t.Error("calls did not return")
	}
}

// A call that never returns does not hold up the stop, and is reported.
func TestShutdownStuck(t *testing.T) {
	h := newHooked()
	release := make(chan struct{})
	held := make(chan struct{})
	h.before = func(c *backend.Call, cb backend.Callback, off uint64) error {
		if cb == backend.Flush {
			close(held)
			<-release
		}
		return nil
	}
	s, uri, _ := serve(t, h, Options{DrainTimeout: time.Millisecond})
	c := dial(t, uri, nil)
	if _, err := c.AioFlush(0, func(error) int { return 1 }); err != nil {
		t.Fatal(err)
	}
	<-held
	s.Shutdown()
	if s.Wait() {
		t.Error("Wait says that all is closed")
	}
	close(release)
	s.open.Wait()
}

// What the module says goes to the client, with its errno.
func TestErrorText(t *testing.T) {
	h := newHooked()
	h.before = func(_ *backend.Call, cb backend.Callback, _ uint64) error {
		if cb == backend.Pread {
			return &backend.Error{Module: "mem", Op: "pread", Errno: syscall.ENOSPC, Msg: "the dog ate it"}
		}
		return nil
	}
	_, uri, _ := serve(t, h, Options{})
	err := dial(t, uri, nil).Pread(make([]byte, 1), 0)
	var e *client.Error
	if !errors.As(err, &e) || e.Errno != protocol.ENOSPC || e.Msg != "the dog ate it" {
		t.Errorf("got %v, need NBD_ENOSPC: the dog ate it", err)
	}
	err = dial(t, uri, &client.Options{SimpleReplies: true}).Pread(make([]byte, 1), 0)
	if errnoOf(err) != protocol.ENOSPC {
		t.Errorf("got %v, need NBD_ENOSPC", err)
	}
}

// A write that is refused, or too large, is consumed, and the connection lives.
func TestRefusedWrite(t *testing.T) {
	for _, tt := range []struct {
		readonly bool
		n        int
		want     protocol.Errno
	}{
		{true, 1, protocol.EPERM},
		{true, 1 << 20, protocol.EPERM},
		{false, protocol.MaxRequestLength + 1, protocol.ENOMEM},
	} {
		t.Run(fmt.Sprintf("readonly=%v/%d", tt.readonly, tt.n), func(t *testing.T) {
			_, _, path := serve(t, newHooked(), Options{ReadOnly: tt.readonly})
			nc := raw(t, path)
			out := request(protocol.Request{Type: protocol.CmdWrite, Cookie: 7, Length: uint64(tt.n)})
			go nc.Write(append(out, make([]byte, tt.n)...))
			if m := readReply(t, nc, 0); m.Errno != tt.want || m.Cookie != 7 {
				t.Errorf("got %+v, need %v", m, tt.want)
			}
			nc.Write(request(protocol.Request{Type: protocol.CmdRead, Cookie: 8, Length: 100}))
			if m := readReply(t, nc, 100); m.Errno != 0 || m.Cookie != 8 {
				t.Errorf("next request: got %+v", m)
			}
		})
	}
}

// A client that sends requests and closes its side gets its answers; one thread
// keeps them in order.
func TestHalfClose(t *testing.T) {
	for name, limits := range map[string]Limits{"": {}, "requests": {Requests: 1}, "bytes per connection": {BytesPerConnection: 1}} {
		t.Run(name, func(t *testing.T) { testHalfClose(t, limits) })
	}
}

func testHalfClose(t *testing.T, limits Limits) {
	h := newHooked()
	h.before = func(_ *backend.Call, cb backend.Callback, _ uint64) error {
		if cb == backend.Pread && limits != (Limits{}) {
			time.Sleep(2 * slowCall) // long enough for workers
		}
		return nil
	}
	_, _, path := serve(t, h, Options{Limits: limits})
	nc := raw(t, path)
	var out []byte
	for i := range uint64(50) {
		out = append(out, request(protocol.Request{Type: protocol.CmdRead, Cookie: i, Length: 65536})...)
	}
	if _, err := nc.Write(out); err != nil {
		t.Fatal(err)
	}
	nc.(*net.UnixConn).CloseWrite()
	got := map[uint64]bool{}
	for range 50 {
		if m := readReply(t, nc, 65536); m.Cookie >= 50 || got[m.Cookie] || m.Errno != 0 {
			t.Fatalf("got %+v", m)
		} else {
			got[m.Cookie] = true
		}
	}
	if n, err := nc.Read(make([]byte, 1)); err != io.EOF {
		t.Errorf("got %d, %v, need an end", n, err)
	}
}

// The read path does not allocate, whatever the size. One thread keeps the calls
// on the reader however busy the machine is.
func TestNoAllocation(t *testing.T) {
	_, _, path := serve(t, newHooked(), Options{Threads: 1})
	for _, n := range []int{512, 4096, 1 << 20} {
		const depth = 32
		nc := raw(t, path)
		var out []byte
		for i := range uint64(depth) {
			out = append(out, request(protocol.Request{Type: protocol.CmdRead, Cookie: i, Length: uint64(n)})...)
		}
		in := make([]byte, depth*(protocol.SimpleReplySize+n))
		got := testing.AllocsPerRun(100, func() {
			nc.Write(out)
			if _, err := io.ReadFull(nc, in); err != nil {
				t.Fatal(err)
			}
		})
		if got >= 1 {
			t.Errorf("%d reads of %d bytes: %v allocations, need 0", depth, n, got)
		}
	}
}

// An idle connection holds no buffer.
func TestIdleHoldsNothing(t *testing.T) {
	s, uri, _ := serve(t, newHooked(), Options{})
	for range 10 {
		c := dial(t, uri, nil)
		if err := c.Pread(make([]byte, 1<<20), 0); err != nil {
			t.Fatal(err)
		}
	}
	holdsNothing(t, s)
}

// holdsNothing waits until no buffer is in use.
func holdsNothing(t *testing.T, s *Server) {
	t.Helper()
	eventually(t, s, func(Stats) bool { return backend.BuffersInUse() == 0 })
}

// The watcher stops when there is nothing to watch.
func TestWatcherStops(t *testing.T) {
	s, uri, _ := serve(t, newHooked(), Options{})
	c := dial(t, uri, nil)
	if err := c.Pread(make([]byte, 512), 0); err != nil {
		t.Fatal(err)
	}
	eventually(t, s, func(Stats) bool {
		s.watcher.mu.Lock()
		defer s.watcher.mu.Unlock()
		return !s.watcher.running
	})
}

// disconnect cuts off all connections.
func disconnect(s *Server) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, c := range s.conns {
		c.disconnect(true)
	}
}
