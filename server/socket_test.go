package server

import (
	"bytes"
	"log/slog"
	"net"
	"os"
	"runtime"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"nbdhost/backend"
	"nbdhost/protocol"
)

// hot serves h with one connection that has become hot.
func hot(t *testing.T, h *hooked, o Options) (s *Server, nc net.Conn, uri string) {
	t.Helper()
	o.maxHot, o.hotGap = 1, time.Hour
	s, uri, path := serve(t, h, o)
	nc = rawFor(t, path, o)
	becomeHot(t, s, nc)
	return s, nc, uri
}

// rawFor is raw, or rawTLS where o says so.
func rawFor(t *testing.T, path string, o Options) net.Conn {
	t.Helper()
	if o.TLS != nil {
		return rawTLS(t, path)
	}
	return raw(t, path)
}

// plainAndTLS runs f without and with TLS.
func plainAndTLS(t *testing.T, f func(t *testing.T, o Options)) {
	t.Run("plain", func(t *testing.T) { f(t, Options{}) })
	t.Run("TLS", func(t *testing.T) { f(t, Options{TLS: sealServer}) })
}

// becomeHot makes requests until the connection is hot. On a busy machine a call
// may lose the connection at first, which keeps it cold for a while.
func becomeHot(t *testing.T, s *Server, nc net.Conn) {
	t.Helper()
	await(t, "the connection becomes hot", func() bool {
		ask(t, nc, temperEvery)
		return s.hot.Load() == 1
	})
}

// ask makes n requests, one after the other.
func ask(t *testing.T, nc net.Conn, n int) {
	t.Helper()
	data := bytes.Repeat([]byte("data"), 1024)
	for i := range n {
		r := protocol.Request{Type: protocol.CmdWrite, Cookie: uint64(i), Offset: 4096, Length: 4096}
		if _, err := nc.Write(append(request(r), data...)); err != nil {
			t.Fatal(err)
		}
		if r := readReply(t, nc, 0); r.Errno != 0 || r.Cookie != uint64(i) {
			t.Fatalf("got %+v", r)
		}
	}
}

// askTogether makes n reads of size bytes, which are sent at once.
func askTogether(t *testing.T, nc net.Conn, n, size int) {
	t.Helper()
	var b []byte
	for i := range n {
		b = append(b, request(protocol.Request{Type: protocol.CmdRead, Cookie: uint64(i), Length: uint64(size)})...)
	}
	if _, err := nc.Write(b); err != nil {
		t.Fatal(err)
	}
	for range n {
		if r := readReply(t, nc, size); r.Errno != 0 {
			t.Fatalf("got %+v", r)
		}
	}
}

func await(t *testing.T, what string, f func() bool) {
	t.Helper()
	for deadline := time.Now().Add(time.Minute); !f(); runtime.Gosched() {
		if time.Now().After(deadline) {
			t.Fatal("deadline exceeded: " + what)
		}
	}
}

func descriptors(t *testing.T) int {
	t.Helper()
	d, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(d)
}

// A connection goes from hot to cold and back without losing anything.
func TestHotAndCold(t *testing.T) { plainAndTLS(t, testHotAndCold) }

func testHotAndCold(t *testing.T, o Options) {
	var fd atomic.Int64
	h := newHooked()
	h.before = func(c *backend.Call, _ backend.Callback, _ uint64) error {
		fd.Store(int64(c.Conn.FD))
		return nil
	}
	s, nc, _ := hot(t, h, o)
	n := descriptors(t)
	for range 3 {
		await(t, "the socket cools", func() bool { return s.hot.Load() == 0 })
		// More than the socket holds.
		askTogether(t, nc, 16, 1<<20)
		becomeHot(t, s, nc)
	}
	if domain, err := unix.GetsockoptInt(int(fd.Load()), unix.SOL_SOCKET, unix.SO_DOMAIN); err != nil || domain != unix.AF_UNIX {
		t.Errorf("descriptor for modules: got domain %d, %v", domain, err)
	}
	if got := descriptors(t); got > n { // fewer where an earlier test still closed some
		t.Errorf("got %d descriptors, want %d", got, n)
	}
}

// Two connections are active where one socket may be hot. The first one becomes cold, and
// the reader that had it loses nothing; but both may be hot if there may be processors for
// both.
func TestHotGivesWay(t *testing.T) {
	const before = 2
	for _, tt := range []struct {
		name      string
		maxProcs  int
		pinned    bool
		wantHot   int32
		wantProcs int
	}{
		{"many processors", 60, false, 2, procStep},
		{"few processors", 0, false, 0, before},
		{"pinned, many processors", 60, true, 2, procStep},
		{"pinned, few processors", 0, true, 0, before},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Cleanup(func() { runtime.GOMAXPROCS(runtime.GOMAXPROCS(before)) })
			runtime.GOMAXPROCS(before)
			p, _, _ := newPinned(1)
			var b backend.Backend = p.hooked
			if tt.pinned {
				b = p
			}
			s, _, path := serveBackend(t, b, p.hooked, Options{maxHot: 1, hotGap: time.Hour, MaxProcs: tt.maxProcs})
			first, second := raw(t, path), raw(t, path)
			becomeHot(t, s, first)
			most, rounds := int32(0), 0
			await(t, "as many are hot as may be", func() bool {
				ask(t, first, 1)
				ask(t, second, 1)
				rounds++
				most = max(most, s.hot.Load())
				return s.hot.Load() == tt.wantHot && runtime.GOMAXPROCS(0) == tt.wantProcs && rounds > 8*temperEvery
			})
			if most > max(tt.wantHot, 1) {
				t.Errorf("%d were hot, need at most %d", most, max(tt.wantHot, 1))
			}
			await(t, "the processors are set back", func() bool { return runtime.GOMAXPROCS(0) == before })
		})
	}
}

// Where more sockets are hot than maxHot a reader gives the memory for replies back before it
// receives, but not for a few bytes.
func TestManyHot(t *testing.T) {
	const before, inARow = 2, 20
	await(t, "no buffer is in use", func() bool { return backend.BuffersInUse() == 0 })
	t.Cleanup(func() { runtime.GOMAXPROCS(runtime.GOMAXPROCS(before)) })
	runtime.GOMAXPROCS(before)
	s, _, path := serve(t, newHooked(), Options{maxHot: 1, hotGap: time.Hour, MaxProcs: 60})
	conns := []net.Conn{raw(t, path), raw(t, path)}
	await(t, "both are hot", func() bool {
		for _, nc := range conns {
			ask(t, nc, 1)
		}
		return s.hot.Load() == 2
	})
	for _, tt := range []struct {
		what    string
		size    int
		buffers int64 // in use, with those of the input
	}{
		{"long replies", ownReplies, 2},
		{"short replies", ownReplies / 2, 4},
		{"long replies again", ownReplies, 2},
	} {
		n := 0
		await(t, tt.what, func() bool {
			for _, nc := range conns {
				askTogether(t, nc, 1, tt.size)
			}
			if n++; s.hot.Load() < 2 || backend.BuffersInUse() != tt.buffers {
				n = 0
			}
			return n >= inARow
		})
	}
}

// ends are the ways in which a connection ends that is idle.
var ends = []end{
	{"shutdown", func(s *Server, _ net.Conn) { s.Shutdown() }},
	{"forced disconnect", func(s *Server, _ net.Conn) { disconnect(s) }},
	{"client closes", func(_ *Server, nc net.Conn) { nc.Close() }},
	{"client disconnects", func(_ *Server, nc net.Conn) { nc.Write(request(protocol.Request{Type: protocol.CmdDisc})) }},
	{"garbage", func(_ *Server, nc net.Conn) { nc.Write([]byte(strings.Repeat("garbage", 10))) }},
}

type end struct {
	name string
	end  func(*Server, net.Conn)
}

// What ends a connection ends a hot one.
func TestHotEnds(t *testing.T) { plainAndTLS(t, testHotEnds) }

func testHotEnds(t *testing.T, o Options) {
	for _, tt := range ends {
		t.Run(tt.name, func(t *testing.T) {
			h := newHooked()
			s, nc, _ := hot(t, h, o)
			tt.end(s, nc)
			await(t, "the connection is closed", func() bool { return h.closes.Load() == 1 })
			await(t, "it is forgotten", func() bool { return s.hot.Load() == 0 })
		})
	}
}

// A call on a hot connection that takes long does not hold up the others.
func TestHotSlowCall(t *testing.T) { plainAndTLS(t, testHotSlowCall) }

func testHotSlowCall(t *testing.T, o Options) {
	h := newHooked()
	const slow = 1 << 20
	under, gate := make(chan struct{}), make(chan struct{})
	h.before = func(_ *backend.Call, cb backend.Callback, off uint64) error {
		if off == slow {
			under <- struct{}{}
			<-gate
		}
		return nil
	}
	s, nc, uri := hot(t, h, o)
	r := protocol.Request{Type: protocol.CmdRead, Cookie: 99, Offset: slow, Length: 4096}
	for {
		if _, err := nc.Write(request(r)); err != nil {
			t.Fatal(err)
		}
		if <-under; s.hot.Load() == 1 {
			break
		}
		// We were away for longer than a hot socket waits.
		gate <- struct{}{}
		readReply(t, nc, 4096)
		becomeHot(t, s, nc)
	}
	other := dial(t, uri, nil)
	p := make([]byte, 4096)
	await(t, "the other connection is active", func() bool {
		if err := other.Pread(p, 0); err != nil {
			t.Fatal(err)
		}
		return s.watcher.active.Load() == 2
	})
	ask(t, nc, 3*temperEvery) // which would make it cold
	if s.hot.Load() != 1 {
		t.Error("the connection became cold while a call was under way") // FD must not change then
	}
	close(gate)
	if r := readReply(t, nc, 4096); r.Cookie != 99 || r.Errno != 0 {
		t.Fatalf("got %+v", r)
	}
	ask(t, nc, 1)
}

// A client that does not read holds up neither its reader nor the end.
func TestHotNeverReads(t *testing.T) { plainAndTLS(t, testHotNeverReads) }

func testHotNeverReads(t *testing.T, o Options) {
	h := newHooked()
	o.DrainTimeout = time.Millisecond
	s, nc, _ := hot(t, h, o)
	var b []byte
	for i := range 512 {
		b = append(b, request(protocol.Request{Type: protocol.CmdRead, Cookie: uint64(i), Length: 1 << 20})...)
	}
	nc.SetWriteDeadline(time.Now().Add(10 * time.Second))
	if _, err := nc.Write(b); err != nil {
		t.Fatal(err)
	}
	s.Shutdown()
	if !s.Wait() {
		t.Error("the server did not end")
	}
}

// A connection that cannot become cold, since no descriptor is free, stays hot and
// goes on being served.
func TestHotWithoutDescriptors(t *testing.T) {
	failed := make(chan struct{}, 100)
	log := slog.New(slog.NewTextHandler(writer(func(line string) {
		if strings.Contains(line, "make connection cold") {
			select {
			case failed <- struct{}{}:
			default:
			}
		}
	}), &slog.HandlerOptions{Level: slog.LevelDebug}))
	s, nc, _ := hot(t, newHooked(), Options{Log: log})
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		t.Fatal(err)
	}
	none := unix.Rlimit{Cur: 0, Max: limit.Max}
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &none); err != nil {
		t.Fatal(err)
	}
	<-failed
	ask(t, nc, 1)
	still := s.hot.Load()
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		t.Fatal(err)
	}
	if still != 1 {
		t.Error("the connection became cold without a descriptor")
	}
	await(t, "the socket cools", func() bool { return s.hot.Load() == 0 })
	ask(t, nc, 1)
}

type writer func(line string)

func (w writer) Write(p []byte) (int, error) {
	w(string(p))
	return len(p), nil
}
