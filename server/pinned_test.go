package server

import (
	"bytes"
	"net"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"nbdhost/backend"
	"nbdhost/protocol"
)

// pinned is a disk whose calls for a connection are to be made on one thread. It notes on
// which they are.
type pinned struct {
	*hooked
	mu      sync.Mutex
	threads map[uint64]map[int]int // by connection, how many calls on each
}

func (*pinned) Pinned() bool { return true }

// newPinned returns one, whose reads and writes at the offset hold wait for release.
func newPinned(hold uint64) (p *pinned, entered, release chan struct{}) {
	p = &pinned{hooked: newHooked(), threads: map[uint64]map[int]int{}}
	p.model = backend.SerializeRequests
	entered, release = make(chan struct{}), make(chan struct{})
	p.before = func(c *backend.Call, cb backend.Callback, off uint64) error {
		p.mu.Lock()
		of := p.threads[c.Conn.ID]
		if of == nil {
			of = map[int]int{}
			p.threads[c.Conn.ID] = of
		}
		of[unix.Gettid()]++
		p.mu.Unlock()
		if (cb == backend.Pread || cb == backend.Pwrite) && off == hold {
			entered <- struct{}{}
			<-release
		}
		return nil
	}
	return p, entered, release
}

// All calls for a connection are made on one thread, from the first to the last, also behind
// one that takes long; nothing waits for that which was there before it.
func TestPinned(t *testing.T) { plainAndTLS(t, testPinned) }

func testPinned(t *testing.T, o Options) {
	const conns, n = 3, 12
	p, entered, release := newPinned(burstOffset(4)) // and so the fifth request
	s, _, path := serveBackend(t, p, p.hooked, o)
	s.opts.parkAfter = time.Microsecond
	var ncs []net.Conn
	for range conns {
		ncs = append(ncs, rawFor(t, path, o))
	}
	for round := range 3 {
		for _, nc := range ncs {
			ask(t, nc, 3*sampleCalls) // then bursts may be made
			if _, err := nc.Write(alternating(n)); err != nil {
				t.Fatal(err)
			}
			for i := range n {
				if i == 4 || i == 5 {
					<-entered
					if got := s.Stats().InFlight; got != 1 {
						t.Errorf("%d requests in flight, need 1", got)
					}
					release <- struct{}{}
				}
				if r, data := burstReply(t, nc); r.Cookie != uint64(i) || r.Errno != 0 || data != nil && !bytes.Equal(data, burstData(i)) {
					t.Fatalf("round %d, request %d: got %+v", round, i, r)
				}
			}
		}
	}
	if err := s.Probe(t.Context(), ""); err != nil {
		t.Error(err)
	}
	for _, nc := range ncs {
		nc.Write(request(protocol.Request{Type: protocol.CmdDisc}))
	}
	eventually(t, s, func(st Stats) bool { return st.Connections == 0 })
	p.mu.Lock()
	defer p.mu.Unlock()
	of := map[int]uint64{} // who is open at the same time shares no thread
	for conn, threads := range p.threads {
		if len(threads) != 1 {
			t.Errorf("connection %d: calls on %d threads", conn, len(threads))
		}
		for thread := range threads {
			if of[thread] != 0 {
				t.Errorf("connections %d and %d: calls on the same thread", conn, of[thread])
			}
			of[thread] = conn
		}
	}
	if len(p.threads) != conns+1 {
		t.Errorf("calls of %d connections, need %d and the probe's", len(p.threads), conns)
	}
}

// A reader lets Go's scheduler run, unless it is pinned: then another thread would have to run
// before it could go on.
func TestYield(t *testing.T) {
	for _, tt := range []struct {
		name    string
		backend func(*hooked) backend.Backend
		yields  bool
	}{
		{"free", func(h *hooked) backend.Backend { return h }, true},
		{"pinned", func(h *hooked) backend.Backend { return &pinned{hooked: h} }, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			h := newHooked()
			h.model = backend.SerializeRequests
			s, _, path := serveBackend(t, tt.backend(h), h, Options{parkAfter: time.Hour})
			nc := raw(t, path)
			ask(t, nc, sampleCalls)
			r := only(t, s).reader.Load()
			nc.Close()
			eventually(t, s, func(st Stats) bool { return st.Connections == 0 })
			if yielded := r.yielded != 0; yielded != tt.yields {
				t.Errorf("has yielded: %v, want %v", yielded, tt.yields)
			}
		})
	}
}

// There are fewer threads than connections that somebody may make.
func TestPinnedLimit(t *testing.T) {
	chain := backend.NewChain(&pinned{hooked: newHooked()}, nil, backend.Trace{})
	for limit, want := range map[int]int{0: defaultPinned, 3: 3, 5000: 5000} {
		if got := New(Options{Chain: chain, Limits: Limits{Connections: limit}}).opts.Limits.Connections; got != want {
			t.Errorf("limit %d: got %d, need %d", limit, got, want)
		}
	}
	chain = backend.NewChain(newHooked(), nil, backend.Trace{})
	if got := New(Options{Chain: chain}).opts.Limits.Connections; got != 0 {
		t.Errorf("not pinned: got %d, need none", got)
	}
}

// A client that leaves while a long call is under way, and a server that stops then, come to
// their end with it.
func TestPinnedEnds(t *testing.T) {
	const held = 6
	for what, end := range map[string]func(s *Server, nc net.Conn){
		"the client leaves": func(_ *Server, nc net.Conn) { nc.Close() },
		"the server stops":  func(s *Server, _ net.Conn) { s.Shutdown() },
	} {
		t.Run(what, func(t *testing.T) {
			p, entered, release := newPinned(burstOffset(held))
			s, _, path := serveBackend(t, p, p.hooked, Options{})
			nc := raw(t, path)
			ask(t, nc, 3*sampleCalls)
			if _, err := nc.Write(alternating(held + 3)); err != nil {
				t.Fatal(err)
			}
			<-entered
			for i := range held { // what was before it is there
				if r, _ := burstReply(t, nc); r.Cookie != uint64(i) {
					t.Errorf("got %+v, need the reply to %d", r, i)
				}
			}
			end(s, nc)
			release <- struct{}{}
			eventually(t, s, func(st Stats) bool { return st.Connections == 0 })
		})
	}
}
