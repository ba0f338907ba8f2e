package server

import (
	"io"
	"log/slog"
	"math"
	"net"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"nbdhost/backend"
	"nbdhost/protocol"
)

// Who carries a request out depends on how long calls take, on what is in hand and on how
// many calls are under way.
func TestWay(t *testing.T) {
	const threads, payload = 4, 512
	h := newHooked()
	s, _, path := serve(t, h, Options{Threads: threads})
	raw(t, path)
	c := only(t, s)
	r := newReader(&conn{s: s, sock: socket{fd: c.sock.descriptor()}, slots: make(chan struct{}, threads),
		lane: c.lane, log: slog.New(slog.DiscardHandler)}, 0)
	defer func() {
		r.c.sock.fd = -1 // c's
		s.guard.leave(r.c)
	}()
	buf, err := backend.GetBuffer(1)
	if err != nil {
		t.Fatal(err)
	}
	defer buf.Release()
	r.in.buf = buf
	for _, tt := range []struct {
		what         string
		slow         bool
		beside       int // bytes in hand after the payload
		slots, calls int
		full         bool
		want         way
	}{
		{"calls are short", false, 28, 0, 0, false, byReader},
		{"one request", true, 0, 0, 0, false, underGuard},
		{"two requests in hand", true, 28, 0, 0, false, byWorker},
		{"TLS has more", true, 0, 0, 0, true, byWorker},
		{"some calls", true, 0, guardedCalls, guardedCalls, false, underGuard},
		{"many calls", true, 0, 0, guardedCalls + 1, false, byWorker},
		{"as many as may be", false, 0, threads, 0, false, byWorker},
	} {
		r.c.pace.slow.Store(tt.slow)
		r.in.start, r.in.end, r.c.full = 0, payload+tt.beside, tt.full
		for range tt.slots {
			r.c.slots <- struct{}{}
		}
		s.long.Add(int64(tt.calls))
		if got := r.way(payload); got != tt.want {
			t.Errorf("%s: got way %d, need %d", tt.what, got, tt.want)
		}
		s.long.Add(-int64(tt.calls))
		for range tt.slots {
			<-r.c.slots
		}
	}
}

// only returns the one connection of s.
func only(t *testing.T, s *Server) *conn {
	t.Helper()
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, c := range s.conns {
		if len(s.conns) == 1 {
			return c
		}
	}
	t.Fatalf("%d connections, need 1", len(s.conns))
	return nil
}

// hold returns a plugin whose reads and writes at some offsets wait until they are let
// go, each by its own channel.
func hold(offsets ...uint64) (h *hooked, release map[uint64]chan struct{}) {
	h, release = newHooked(), map[uint64]chan struct{}{}
	for _, off := range offsets {
		release[off] = make(chan struct{})
	}
	h.before = func(_ *backend.Call, cb backend.Callback, off uint64) error {
		if c := release[off]; c != nil && (cb == backend.Pread || cb == backend.Pwrite) {
			<-c
		}
		return nil
	}
	return h, release
}

// guardedRead sends a read that is held, and waits until it is under guard.
func guardedRead(t *testing.T, nc net.Conn, c *conn, cookie, off uint64, inFlight int) *reader {
	t.Helper()
	c.pace.slacken(firstSlow)
	send(t, nc, cookie, off)
	var r *reader
	await(t, "the call is under guard", func() bool {
		r = c.reader.Load()
		return r != nil && r.state.Load()&mask == guarded && c.inFlight() == inFlight
	})
	return r
}

func send(t *testing.T, nc net.Conn, cookie, off uint64) {
	t.Helper()
	if _, err := nc.Write(request(protocol.Request{Type: protocol.CmdRead, Cookie: cookie, Offset: off, Length: 512})); err != nil {
		t.Fatal(err)
	}
}

func receive(t *testing.T, nc net.Conn, cookie uint64) {
	t.Helper()
	_ = nc.SetReadDeadline(time.Now().Add(time.Minute))
	if r := readReply(t, nc, 512); r.Cookie != cookie || r.Errno != 0 {
		t.Fatalf("got %+v, need the reply to %d", r, cookie)
	}
}

// While the reader makes a long call another one has the connection as soon as the
// client sends more, and the first gets it back where the other is in such a call
// itself. No worker is needed, and no more readers than there are calls.
func TestGuard(t *testing.T) { plainAndTLS(t, testGuard) }

func testGuard(t *testing.T, o Options) {
	const a, b = 1 << 20, 2 << 20
	h, release := hold(a, b)
	s, _, path := serve(t, h, o)
	nc := rawFor(t, path, o)
	c := only(t, s)
	for range 10 {
		first := guardedRead(t, nc, c, 1, a, 1)
		send(t, nc, 2, 0)
		receive(t, nc, 2)
		if second := guardedRead(t, nc, c, 3, b, 2); second == first {
			t.Fatal("one reader in two calls")
		}
		release[a] <- struct{}{}
		receive(t, nc, 1)
		await(t, "the first has the connection again", func() bool { return c.reader.Load() == first })
		send(t, nc, 4, 0)
		receive(t, nc, 4)
		release[b] <- struct{}{}
		receive(t, nc, 3)
		await(t, "no call is under way", func() bool { return c.inFlight() == 0 })
	}
	if n := c.numbers.Load(); n > 3 { // three requests may be under way for a moment
		t.Errorf("%d readers were needed, want at most 3", n)
	}
	if st := s.Stats(); st.Workers != 0 {
		t.Errorf("%d workers, want none", st.Workers)
	}
}

// A request that came with the end of another one's payload does not wait for that call.
func TestGuardPayload(t *testing.T) {
	const held, size = 1 << 20, 4096
	h, release := hold(held)
	s, _, path := serve(t, h, Options{})
	nc := raw(t, path)
	c := only(t, s)
	c.pace.slacken(firstSlow)
	write := append(request(protocol.Request{Type: protocol.CmdWrite, Cookie: 1, Offset: held, Length: size}), make([]byte, size)...)
	if _, err := nc.Write(write[:size/2]); err != nil {
		t.Fatal(err)
	}
	sc, err := nc.(*net.UnixConn).SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	await(t, "the first half is received", func() (received bool) {
		_ = sc.Control(func(fd uintptr) {
			n, err := unix.IoctlGetInt(int(fd), unix.SIOCOUTQ)
			received = err == nil && n == 0
		})
		return received
	})
	if _, err := nc.Write(append(write[size/2:], request(protocol.Request{Type: protocol.CmdRead, Cookie: 2, Length: 512})...)); err != nil {
		t.Fatal(err)
	}
	receive(t, nc, 2)
	close(release[held])
	if r := readReply(t, nc, 0); r.Cookie != 1 || r.Errno != 0 {
		t.Errorf("got %+v", r)
	}
}

// What ends a connection ends it also under guard, when the call is over.
func TestGuardEnds(t *testing.T) {
	const held = 1 << 20
	for _, tt := range []end{
		{"the client goes", func(s *Server, nc net.Conn) { nc.Close() }},
		{"the client says so", func(s *Server, nc net.Conn) {
			nc.Write(request(protocol.Request{Type: protocol.CmdDisc}))
		}},
		{"shutdown", func(s *Server, nc net.Conn) {
			s.Shutdown()
			nc.Write(request(protocol.Request{Type: protocol.CmdRead, Cookie: 5, Length: 512}))
			if r := readReply(t, nc, 0); r.Cookie != 5 || r.Errno != protocol.ESHUTDOWN {
				t.Errorf("got %+v", r)
			}
		}},
		{"the call ends it", func(s *Server, nc net.Conn) { disconnect(s) }},
	} {
		t.Run(tt.name, func(t *testing.T) {
			h, release := hold(held)
			s, _, path := serve(t, h, Options{})
			nc := raw(t, path)
			guardedRead(t, nc, only(t, s), 1, held, 1)
			tt.end(s, nc)
			if h.closes.Load() != 0 {
				t.Error("closed during the call")
			}
			close(release[held])
			eventually(t, s, func(st Stats) bool { return st.Connections == 0 })
			await(t, "closed once", func() bool { return h.closes.Load() == 1 })
			await(t, "the guard has nobody", func() bool { return guards(s) == 0 })
		})
	}
}

// Where processors are contended calls that wait for something stay slow, and calls that
// only take long are not. Of those that are known to wait few are asked.
func TestWaits(t *testing.T) {
	for _, tt := range []struct {
		name string
		call func()
		slow bool
	}{
		{"wait", func() { block(2 * longCall) }, true},
		{"compute", func() {
			for began := time.Now(); time.Since(began) < 2*longCall; {
			}
		}, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			h := newHooked()
			var calls, asked atomic.Int64
			h.before = func(_ *backend.Call, cb backend.Callback, _ uint64) error {
				if cb == backend.Pread {
					calls.Add(1)
					tt.call()
				}
				return nil
			}
			s, uri, _ := serve(t, h, Options{contended: func(time.Duration) bool {
				asked.Add(1)
				return true
			}})
			client := dial(t, uri, nil)
			c := only(t, s)
			c.pace.slacken(firstSlow)
			// Where other programs take the processors a call that only computes may seem to
			// wait, when the runtime moves it: that must pass.
			deadline := time.Now().Add(time.Minute)
			for p := make([]byte, 512); c.pace.slow.Load() && (!tt.slow || calls.Load() < 4*meanCalls) && time.Now().Before(deadline); {
				if err := client.Pread(p, 0); err != nil {
					t.Fatal(err)
				}
			}
			if c.pace.slow.Load() != tt.slow {
				t.Errorf("after %d calls: slow %v, want %v", calls.Load(), !tt.slow, tt.slow)
			}
			if n := asked.Load(); tt.slow && n > calls.Load()/4 {
				t.Errorf("%d of %d calls were asked, want one in %d where all take long", n, calls.Load(), sampleLong)
			}
		})
	}
}

// block keeps the thread waiting, as a call in C may.
func block(d time.Duration) {
	t := unix.NsecToTimespec(int64(d))
	_ = unix.Nanosleep(&t, nil)
}

// A long call under guard allocates nothing.
func TestGuardAllocations(t *testing.T) {
	h := newHooked()
	h.before = func(_ *backend.Call, cb backend.Callback, _ uint64) error {
		if cb == backend.Pread {
			block(longCall)
		}
		return nil
	}
	s, _, path := serve(t, h, Options{})
	nc := raw(t, path)
	c := only(t, s)
	c.pace.slacken(firstSlow)
	read := request(protocol.Request{Type: protocol.CmdRead, Length: 512})
	reply := make([]byte, protocol.SimpleReplySize+512)
	// Something else in this process may allocate now and then.
	least := math.Inf(1)
	for range 5 {
		least = min(least, testing.AllocsPerRun(100, func() {
			if _, err := nc.Write(read); err != nil {
				t.Fatal(err)
			}
			if _, err := io.ReadFull(nc, reply); err != nil {
				t.Fatal(err)
			}
		}))
	}
	if least > 0 {
		t.Errorf("got %v allocations a request, want none", least)
	}
	if guards(s) != 1 || !c.pace.slow.Load() || s.Stats().Workers > 0 {
		t.Error("the calls were not under guard")
	}
}

// guards is how many connections have joined the guard of s.
func guards(s *Server) int {
	s.guard.mu.Lock()
	defer s.guard.mu.Unlock()
	return s.guard.users
}
