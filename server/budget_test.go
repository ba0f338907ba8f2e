package server

import (
	"bytes"
	"fmt"
	"io"
	"net"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"nbdhost/backend"
	"nbdhost/protocol"
)

// Connections beyond the limit are told so, if they ask, and one more is admitted
// for each that goes.
func TestConnectionLimit(t *testing.T) {
	for _, perAddress := range []bool{false, true} {
		t.Run(fmt.Sprintf("perAddress=%v", perAddress), func(t *testing.T) {
			l := Limits{Connections: 2}
			reason := ReasonConnections
			if perAddress {
				l, reason = Limits{ConnectionsPerAddress: 2}, ReasonConnectionsPerAddress
			}
			s, _, path := serve(t, newHooked(), Options{Limits: l})
			tcp, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				t.Fatal(err)
			}
			served := make(chan error)
			go func() { served <- s.Serve(tcp) }()
			t.Cleanup(func() { s.Shutdown(); <-served })
			open := func() net.Conn {
				nc, err := net.Dial("tcp", tcp.Addr().String())
				if err != nil {
					t.Fatal(err)
				}
				t.Cleanup(func() { nc.Close() })
				nc.SetDeadline(time.Now().Add(time.Minute))
				return nc
			}
			first := open()
			open()
			eventually(t, s, func(st Stats) bool { return st.Connections == 2 })

			goOption := option(protocol.OptGo, (&protocol.InfoRequest{}).AppendTo(nil))
			third := open()
			third.Write(hello(structured, goOption, option(protocol.OptAbort, nil)))
			said, err := io.ReadAll(third)
			if err != nil {
				t.Fatal(err)
			}
			replies, data := optionReplies(t, said)
			if len(replies) != 3 || replies[1].Type != protocol.RepErrPolicy || !strings.Contains(string(data[1]), "too many connections") ||
				replies[2].Type != protocol.RepAck {
				t.Errorf("got %v, %q", replies, data)
			}
			old := open()
			old.Write(hello(option(protocol.OptExportName, nil)))
			if said, err := io.ReadAll(old); err != nil || len(said) != protocol.GreetingSize {
				t.Errorf("old option: got %q, %v", said, err)
			}
			st := s.Stats()
			if st.Failures[reason] != 2 || st.Accepted != 2 || st.Connections != 2 {
				t.Errorf("got %+v", st)
			}
			if perAddress { // a Unix socket has no address
				raw(t, path)
			}
			before := s.Stats().Connections
			first.Close()
			eventually(t, s, func(st Stats) bool { return st.Connections == before-1 })
			nc := open()
			nc.Write(hello(goOption))
			if _, err := io.ReadFull(nc, make([]byte, protocol.GreetingSize+protocol.OptionReplyHeaderSize)); err != nil {
				t.Error(err)
			}
			eventually(t, s, func(st Stats) bool { return st.Failures[reason] == 2 })
		})
	}
}

// Many clients beyond the limit that ask nothing do not add up.
func TestConnectionLimitFlood(t *testing.T) {
	s, _, path := serve(t, newHooked(), Options{Limits: Limits{Connections: 1}})
	raw(t, path)
	for range 10 * maxRefused {
		connect(t, path)
	}
	eventually(t, s, func(st Stats) bool {
		s.mu.Lock()
		defer s.mu.Unlock()
		if n := len(s.conns); n > 1+maxRefused {
			t.Fatalf("%d connections", n)
		}
		return st.Failures[ReasonConnections] == 10*maxRefused
	})
}

// No more calls run at a time than may, over all connections; all of them do in the end.
func TestRequestLimit(t *testing.T) {
	const most, each = 3, 50
	h := newHooked()
	var now, peak atomic.Int64
	h.before = func(_ *backend.Call, cb backend.Callback, _ uint64) error {
		if cb == backend.Pread {
			n := now.Add(1)
			defer now.Add(-1)
			for p := peak.Load(); n > p && !peak.CompareAndSwap(p, n); p = peak.Load() {
			}
			time.Sleep(200 * time.Microsecond) // long enough for workers
		}
		return nil
	}
	s, uri, _ := serve(t, h, Options{Limits: Limits{Requests: most}})
	var clients sync.WaitGroup
	for range 4 {
		c := dial(t, uri, nil)
		for range 8 {
			clients.Go(func() {
				for range each {
					if err := c.Pread(make([]byte, 512), 0); err != nil {
						t.Error(err)
					}
				}
			})
		}
	}
	clients.Wait()
	if n := peak.Load(); n > most || n < 2 {
		t.Errorf("%d calls ran at a time, need at most %d", n, most)
	}
	if n := s.Stats().Delays[LimitRequests].Requests; n == 0 {
		t.Error("no request had to wait")
	}
}

// A client that does not send what it has promised, or does not read what it has asked for,
// keeps nobody from his turn.
func TestStalledTurn(t *testing.T) {
	for _, tt := range []struct {
		name     string
		requests int
		request  protocol.Request
	}{
		{"payload", 1, protocol.Request{Type: protocol.CmdWrite, Length: 4096}},
		{"long payload", 1, protocol.Request{Type: protocol.CmdWrite, Length: 8 << 20}},
		{"replies", 100, protocol.Request{Type: protocol.CmdRead, Length: 64 << 10}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s, uri, path := serve(t, newHooked(), Options{Limits: Limits{Requests: 1}})
			nc := raw(t, path)
			nc.Write(bytes.Repeat(request(tt.request), tt.requests))
			if tt.requests > 1 {
				eventually(t, s, func(Stats) bool { // it is stuck in a write
					return !only(t, s).sender.pause(func() {})
				})
			}
			if err := dial(t, uri, nil).Pread(make([]byte, 512), 0); err != nil {
				t.Error(err)
			}
			nc.Close()
		})
	}
}

// A client that does not read its replies makes the server hold no more than its
// budget, and one that does is served meanwhile.
func TestBytesPerConnection(t *testing.T) {
	const most, size = 4 << 20, 128 << 10 // too short to be carried out ahead of the reader
	h := newHooked()
	var hold atomic.Int64
	h.before = func(call *backend.Call, cb backend.Callback, off uint64) error {
		if cb == backend.Pread && off == 0 {
			// Calls go to workers from now on, and the reader's is held until it
			// has lost the connection: who receives must not be who writes
			// replies, which nobody reads.
			h.server.mu.Lock()
			c := h.server.conns[call.Conn.ID]
			h.server.mu.Unlock()
			c.pace.slacken(firstSlow)
			for len(c.slots) == 0 {
				time.Sleep(time.Millisecond)
			}
			n := backend.Buffers().InUseBytes
			for p := hold.Load(); n > p && !hold.CompareAndSwap(p, n); p = hold.Load() {
			}
			time.Sleep(time.Millisecond) // long enough to stay there
		}
		return nil
	}
	s, uri, path := serve(t, h, Options{Threads: 64, Limits: Limits{BytesPerConnection: most}, DrainTimeout: 200 * time.Millisecond})
	nc := raw(t, path)
	var out []byte
	for i := range uint64(1000) {
		out = append(out, request(protocol.Request{Type: protocol.CmdRead, Cookie: i, Length: size})...)
	}
	go nc.Write(out)
	eventually(t, s, func(st Stats) bool { return st.Delays[LimitBytesPerConnection].Requests > 0 })
	other := dial(t, uri, nil)
	for range 20 {
		if err := other.Pread(make([]byte, 512), 512); err != nil {
			t.Fatal(err)
		}
	}
	// Sizes of buffers are powers of two, above that of what they hold.
	if n := hold.Load(); n > 2*most+4<<20 {
		t.Errorf("%d bytes were held, need at most %d", n, 2*most+4<<20)
	}
	nc.Close()
	eventually(t, s, func(st Stats) bool { return st.Connections == 1 })
}

// The requests of all connections share the bytes, and one that is longer than all
// there are is let through alone.
func TestBytes(t *testing.T) {
	const most = 1 << 20
	h := newHooked()
	var now, peak atomic.Int64
	h.before = func(_ *backend.Call, cb backend.Callback, off uint64) error {
		if cb == backend.Pread {
			n := now.Add(1)
			defer now.Add(-1)
			for p := peak.Load(); n > p && !peak.CompareAndSwap(p, n); p = peak.Load() {
			}
			time.Sleep(100 * time.Microsecond)
		}
		return nil
	}
	s, uri, _ := serve(t, h, Options{Limits: Limits{Bytes: most}})
	var clients sync.WaitGroup
	for range 3 {
		c := dial(t, uri, nil)
		for i := range 4 {
			clients.Go(func() {
				for range 10 {
					p := make([]byte, most/2)
					if i == 3 {
						p = make([]byte, 3*most)
					}
					if err := c.Pread(p, 0); err != nil {
						t.Error(err)
					}
					if err := c.Pwrite(p[:4096], 0, 0); err != nil {
						t.Error(err)
					}
				}
			})
		}
	}
	clients.Wait()
	if n := peak.Load(); n > 2 {
		t.Errorf("%d calls ran at a time", n)
	}
	if s.Stats().Delays[LimitBytes].Requests == 0 {
		t.Error("no request had to wait")
	}
	// A client may have a reply before its bytes are given back.
	eventually(t, s, func(Stats) bool {
		all := s.bytes.sem.TryAcquire(most)
		if all {
			s.bytes.sem.Release(most)
		}
		return all
	})
}

// Reads and writes have their bandwidth each, for all connections of an export.
func TestBandwidth(t *testing.T) {
	const bits = 8 << 20 // 1 MiB a second, with 1/10 of it at once
	s, uri, _ := serve(t, newHooked(), Options{Limits: Limits{Bandwidth: bits}})
	began := time.Now()
	var clients sync.WaitGroup
	for range 2 {
		clients.Go(func() {
			c := dial(t, uri, nil)
			for _, n := range []int{64 << 10, 200 << 10} { // the second is more than a burst
				if err := c.Pread(make([]byte, n), 0); err != nil {
					t.Error(err)
				}
				if err := c.Pwrite(make([]byte, n), 0, 0); err != nil {
					t.Error(err)
				}
			}
		})
	}
	clients.Wait()
	// Less is impossible, however fast the machine.
	if took, least := time.Since(began), (2*(64+200)-103)*time.Second/1024; took < least {
		t.Errorf("took %v, need at least %v", took, least)
	}
	if d := s.Stats().Delays[LimitBandwidth]; d.Requests == 0 || d.Seconds == 0 {
		t.Errorf("got %+v", d)
	}
}

// Who waits for bandwidth holds up nobody else.
func TestBandwidthHoldsNothing(t *testing.T) {
	s, uri, path := serve(t, newHooked(), Options{Limits: Limits{Bytes: 1 << 20, Bandwidth: 8}})
	nc := raw(t, path)
	nc.Write(request(protocol.Request{Type: protocol.CmdRead, Length: 6 << 20}))
	eventually(t, s, func(st Stats) bool { return st.Delays[LimitBandwidth].Requests == 1 })
	c := dial(t, uri, nil)
	if err := c.Cache(1<<20, 0, 0); err != nil { // counts as bytes, and needs no bandwidth
		t.Error(err)
	}
	nc.Close()
}

// Who waits for bytes or bandwidth stops to when its client goes, or is told that the server stops.
func TestDelayEnds(t *testing.T) {
	const year = 1 // bit a second
	for _, tt := range []struct {
		name string
		l    Limits
		cmd  protocol.Command
	}{
		{"bandwidth", Limits{Bandwidth: year}, protocol.CmdRead},
		{"bandwidth of writes", Limits{Bandwidth: year}, protocol.CmdWrite},
		{"bytes", Limits{Bytes: 1}, protocol.CmdRead},
	} {
		t.Run(tt.name, func(t *testing.T) {
			release := make(chan struct{})
			h := newHooked()
			h.before = func(_ *backend.Call, cb backend.Callback, off uint64) error {
				if cb == backend.Pread {
					<-release
				}
				return nil
			}
			s, _, path := serve(t, h, Options{Limits: tt.l})
			delayed := func(n int) {
				t.Helper()
				eventually(t, s, func(st Stats) bool {
					sum := 0
					for _, d := range st.Delays {
						sum += int(d.Requests)
					}
					return sum == n
				})
			}
			if tt.l.Bandwidth == 0 {
				holder := raw(t, path)
				holder.Write(request(protocol.Request{Type: protocol.CmdRead, Length: 1}))
				eventually(t, s, func(st Stats) bool { return st.InFlight == 1 })
			}
			before := s.Stats().Connections
			r := request(protocol.Request{Type: tt.cmd, Cookie: 7, Length: 1000})
			if tt.cmd == protocol.CmdWrite {
				r = append(r, make([]byte, 1000)...)
			}
			goes, stays := raw(t, path), raw(t, path)
			goes.Write(r)
			delayed(1)
			goes.Close()
			eventually(t, s, func(st Stats) bool { return st.Connections == before+1 })

			stays.Write(r)
			delayed(2)
			s.Shutdown()
			if m := readReply(t, stays, 0); m.Errno != protocol.ESHUTDOWN || m.Cookie != 7 {
				t.Errorf("got %+v, need %v", m, protocol.ESHUTDOWN)
			}
			stays.Close()
			close(release)
			runtime.Gosched()
		})
	}
}
