package server

import (
	"io"
	"net"
	"slices"
	"sync/atomic"
	"testing"
	"time"

	"nbdhost/backend"
	"nbdhost/protocol"
)

// parkSoon lets connections be parked at once.
func parkSoon(t *testing.T, h *hooked) (s *Server, nc net.Conn, c *conn) {
	t.Helper()
	s, _, path := serve(t, h, Options{parkAfter: time.Microsecond})
	nc = raw(t, path)
	ask(t, nc, 1)
	c = only(t, s)
	awaitParked(t, c)
	return s, nc, c
}

func awaitParked(t *testing.T, c *conn) {
	t.Helper()
	await(t, "the connection is parked", func() bool { return c.reader.Load() == nil })
}

// A parked connection goes on where it was, as often as it is parked, and no new
// number makes its calls.
func TestPark(t *testing.T) {
	h := newHooked()
	var worker atomic.Int64
	h.before = func(c *backend.Call, _ backend.Callback, _ uint64) error {
		worker.Store(int64(c.Worker))
		return nil
	}
	_, nc, c := parkSoon(t, h)
	for range 10 {
		given := int64(c.numbers.Load()) // a slow call that loses the connection takes one, too
		ask(t, nc, 1)
		if n := worker.Load(); n >= given {
			t.Errorf("got a call by %d, need one of the %d numbers that there were", n, given)
		}
		ask(t, nc, 2)
		awaitParked(t, c)
	}
	// What comes in pieces comes whole.
	b := request(protocol.Request{Type: protocol.CmdWrite, Cookie: 7, Length: 4096})
	b = append(b, make([]byte, 4096)...)
	for len(b) > 0 {
		n := min(len(b), 999)
		if _, err := nc.Write(b[:n]); err != nil {
			t.Fatal(err)
		}
		b = b[n:]
		time.Sleep(time.Millisecond) // longer than a deadline, as often as there is one
	}
	if r := readReply(t, nc, 0); r.Errno != 0 || r.Cookie != 7 {
		t.Errorf("got %+v", r)
	}
}

// A connection whose client says nothing after the handshake is parked at once, and one
// whose client has asked already is not.
func TestParkAtOnce(t *testing.T) {
	s, _, path := serve(t, newHooked(), Options{parkAfter: time.Hour})
	nc := raw(t, path)
	c := only(t, s)
	await(t, "the transmission phase has begun", func() bool { return c.calling.Load() == 1 })
	if c.reader.Load() != nil {
		t.Error("there is a reader")
	}
	ask(t, nc, 1)
	if c.reader.Load() == nil {
		t.Error("there is no reader")
	}
	nc = connect(t, path)
	nc.Write(append(hello(option(protocol.OptExportName, nil)), request(protocol.Request{Type: protocol.CmdRead, Cookie: 3, Length: 512})...))
	if _, err := io.CopyN(io.Discard, nc, protocol.GreetingSize+10); err != nil {
		t.Fatal(err)
	}
	if r := readReply(t, nc, 512); r.Errno != 0 || r.Cookie != 3 {
		t.Errorf("got %+v", r)
	}
}

// A connection is not parked under a call, and a call that is slow does not keep it from
// being served.
func TestParkNotBusy(t *testing.T) {
	const stuck = 1 << 20
	h, release := hold(stuck)
	s, nc, c := parkSoon(t, h)
	nc.Write(request(protocol.Request{Type: protocol.CmdRead, Cookie: 1, Offset: stuck, Length: 512}))
	await(t, "the call is under way", func() bool { return c.inFlight() == 1 })
	nc.Write(request(protocol.Request{Type: protocol.CmdRead, Cookie: 2, Length: 512}))
	if r := readReply(t, nc, 512); r.Cookie != 2 {
		t.Errorf("got %+v", r)
	}
	if s.Stats().InFlight != 1 || c.reader.Load() == nil {
		t.Error("parked under a call")
	}
	close(release[stuck])
	if r := readReply(t, nc, 512); r.Cookie != 1 {
		t.Errorf("got %+v", r)
	}
}

// What ends a connection ends a parked one.
func TestParkEnds(t *testing.T) {
	lastWords := end{"shutdown, and last words", func(s *Server, nc net.Conn) {
		s.Shutdown()
		nc.Write(request(protocol.Request{Type: protocol.CmdRead, Cookie: 5, Length: 512}))
		if r := readReply(t, nc, 0); r.Errno != protocol.ESHUTDOWN {
			t.Errorf("got %+v", r)
		}
	}}
	for _, tt := range append(slices.Clone(ends), lastWords) {
		t.Run(tt.name, func(t *testing.T) {
			h := newHooked()
			s, nc, _ := parkSoon(t, h)
			tt.end(s, nc)
			await(t, "the connection is closed", func() bool { return h.closes.Load() == 1 })
			await(t, "it is forgotten", func() bool {
				s.mu.Lock()
				defer s.mu.Unlock()
				return len(s.conns) == 0
			})
		})
	}
}
