package server

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"runtime"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"nbdhost/backend"
	"nbdhost/client"
	"nbdhost/protocol"
)

// command finds what was counted for a command of an export; nil if nothing was.
func (s Stats) command(export string, cmd protocol.Command) *CommandStats {
	for _, e := range s.Exports {
		for i := range e.Commands {
			if e.Name == export && e.Commands[i].Command == cmd {
				return &e.Commands[i]
			}
		}
	}
	return nil
}

// eventually waits until Stats are as want says.
func eventually(t *testing.T, s *Server, want func(Stats) bool) {
	t.Helper()
	for deadline := time.Now().Add(time.Minute); !want(s.Stats()); runtime.Gosched() {
		if time.Now().After(deadline) {
			t.Fatalf("never came to what was expected: %+v", s.Stats())
		}
	}
}

// Each request is counted once, whoever carried it out, with its bytes and one
// latency; also after its connection is gone.
func TestStats(t *testing.T) {
	for _, threads := range []int{1, 4} {
		t.Run(fmt.Sprintf("threads=%d", threads), func(t *testing.T) {
			const bad, slow = 1 << 20, 2 << 20
			h := newHooked()
			h.before = func(_ *backend.Call, cb backend.Callback, off uint64) error {
				switch {
				case cb == backend.Pread && off == bad:
					return &backend.Error{Module: "hooked", Op: "pread", Errno: syscall.EIO, Msg: "bad"}
				case off == slow:
					time.Sleep(5 * time.Millisecond) // to become one that loses the connection
				}
				return nil
			}
			s, uri, path := serve(t, h, Options{Threads: threads})
			c := dial(t, uri, nil)
			p := make([]byte, 1000)
			for i := range 100 {
				if err := c.Pread(p, uint64(i)); err != nil {
					t.Fatal(err)
				}
			}
			for range 3 {
				if err := c.Pwrite(p, slow, 0); err != nil {
					t.Fatal(err)
				}
				if err := c.Pread(p, bad); errnoOf(err) != protocol.EIO {
					t.Fatal(err)
				}
			}
			if err := errors.Join(c.Flush(), c.Zero(1<<16, 0, 0)); err != nil {
				t.Fatal(err)
			}
			check := func() {
				t.Helper()
				st := s.Stats()
				for _, want := range []CommandStats{
					{Command: protocol.CmdRead, Operations: 103, Bytes: 100000},
					{Command: protocol.CmdWrite, Operations: 3, Bytes: 3000},
					{Command: protocol.CmdFlush, Operations: 1},
					{Command: protocol.CmdWriteZeroes, Operations: 1, Bytes: 1 << 16},
				} {
					got := st.command("", want.Command)
					if got == nil || got.Operations != want.Operations || got.Bytes != want.Bytes {
						t.Fatalf("%v: got %+v, need %+v", want.Command, got, want)
					}
					var n uint64
					for _, b := range got.Latency {
						n += b
					}
					if n != got.Operations || got.Seconds <= 0 {
						t.Errorf("%v: %d latencies of %d operations, %g s", want.Command, n, got.Operations, got.Seconds)
					}
				}
				if n := st.command("", protocol.CmdRead).Errors["hooked"]; n != 3 {
					t.Errorf("%d errors of the module, need 3", n)
				}
				if got := st.command("", protocol.CmdWrite).Seconds; got < 0.015 {
					t.Errorf("three writes of 5 ms took %g s", got)
				}
				if st.Operations() != 108 || st.Bytes() != 103000 || st.Accepted != 1 {
					t.Errorf("got %d operations, %d bytes, %d connections", st.Operations(), st.Bytes(), st.Accepted)
				}
			}
			check()
			if st := s.Stats(); st.Connections != 1 || st.Exports[0].Connections != 1 {
				t.Errorf("got %+v", st)
			}
			c.Close()
			eventually(t, s, func(st Stats) bool { return st.Connections == 0 })
			check()

			// What does not reach the chain is the server's.
			nc := raw(t, path)
			nc.Write(request(protocol.Request{Type: 77}))
			readReply(t, nc, 0)
			nc.Write(request(protocol.Request{Type: protocol.CmdRead, Offset: 1 << 60, Length: 1}))
			readReply(t, nc, 0)
			st := s.Stats()
			if c := st.command("", UnknownCommand); c == nil || c.Errors[""] != 1 {
				t.Errorf("unknown command: got %+v", c)
			}
			if c := st.command("", protocol.CmdRead); c.Errors[""] != 1 || c.Operations != 104 {
				t.Errorf("read beyond the end: got %+v", c)
			}
		})
	}
}

// Requests under way are in flight wherever they run, and the connection that a
// slow call loses counts what was answered before with its own latency.
func TestStatsInFlight(t *testing.T) {
	for _, workers := range []bool{false, true} {
		t.Run(fmt.Sprintf("workers %v", workers), func(t *testing.T) { testInFlight(t, workers) })
	}
}

func testInFlight(t *testing.T, workers bool) {
	release := make(chan struct{})
	h := newHooked()
	h.before = func(_ *backend.Call, cb backend.Callback, off uint64) error {
		if cb == backend.Pread && off >= 1<<20 {
			<-release
		}
		return nil
	}
	s, _, path := serve(t, h, Options{Threads: 4})
	nc := raw(t, path)
	if workers {
		only(t, s).pace.slacken(firstSlow)
	}
	var out []byte
	for i := range uint64(4) {
		out = append(out, request(protocol.Request{Type: protocol.CmdRead, Cookie: i, Length: 1})...)
		out = append(out, request(protocol.Request{Type: protocol.CmdRead, Cookie: i, Offset: 1 << 20, Length: 1})...)
	}
	nc.Write(out)
	eventually(t, s, func(st Stats) bool { return st.InFlight == 4 })
	for range 4 {
		readReply(t, nc, 1)
	}
	if st := s.Stats(); workers && st.Workers == 0 || st.Operations() != 4 {
		t.Errorf("got %+v", st)
	}
	close(release)
	for range 4 {
		readReply(t, nc, 1)
	}
	eventually(t, s, func(st Stats) bool { return st.InFlight == 0 && st.Operations() == 8 })
	nc.Close()
	eventually(t, s, func(st Stats) bool { return st.Workers == 0 })
}

// However many names clients come up with, so many are kept.
func TestStatsExports(t *testing.T) {
	s, uri, _ := serve(t, newHooked(), Options{})
	p := make([]byte, 1)
	for i := range maxNamedExports + 5 {
		name := strconv.Itoa(i)
		switch i {
		case 0:
			name = "%28other%29"
		case 1:
			name = "%ff%fe"
		}
		c := dial(t, strings.Replace(uri, "///", "///"+name, 1), nil)
		if err := c.Pread(p, 0); err != nil {
			t.Fatal(err)
		}
		c.Close()
	}
	st := s.Stats()
	last := st.Exports[len(st.Exports)-1]
	if len(st.Exports) != maxNamedExports+1 || last.Name != OtherExports || last.Commands[0].Operations != 5 || st.command("\uFFFD", protocol.CmdRead) == nil || st.Operations() != maxNamedExports+5 {
		t.Errorf("got %d exports, the last %+v", len(st.Exports), last)
	}
}

// A handshake that leads nowhere is counted once, with the reason.
func TestHandshakeFailures(t *testing.T) {
	refuse := func(_ *backend.Call, cb backend.Callback, _ uint64) error {
		if cb == backend.Open {
			return &backend.Error{Module: "hooked", Op: "open", Errno: syscall.ENOENT, Msg: "no"}
		}
		return nil
	}
	goOption := option(protocol.OptGo, (&protocol.InfoRequest{}).AppendTo(nil))
	abort := option(protocol.OptAbort, nil)
	for _, tt := range []struct {
		name   string
		said   []byte
		open   func(*backend.Call, backend.Callback, uint64) error
		o      Options
		reason Reason // reasons for none
	}{
		{name: "abort", said: hello(option(protocol.OptList, nil), abort), reason: reasons},
		{name: "hang up", said: hello(structured), reason: ReasonClient},
		{name: "hang up at once", reason: ReasonClient},
		{name: "flags", said: []byte{0xff, 0xff, 0xff, 0xff}, reason: ReasonProtocol},
		{name: "garbage", said: hello(bytes.Repeat([]byte("x"), 100)), reason: ReasonProtocol},
		{name: "no export", said: hello(goOption), open: refuse, reason: ReasonExport},
		{name: "no export, abort", said: hello(goOption, abort), open: refuse, reason: ReasonExport},
		{name: "no export, old option", said: hello(option(protocol.OptExportName, nil)), open: refuse, reason: ReasonExport},
		{name: "plain", said: hello(goOption, abort), o: Options{TLS: sealServer, TLSRequired: true}, reason: ReasonTLSRequired},
		{name: "plain, old option", said: hello(option(protocol.OptExportName, nil)), o: Options{TLS: sealServer, TLSRequired: true}, reason: ReasonTLSRequired},
		{name: "TLS", said: hello(option(protocol.OptStartTLS, nil)), o: Options{TLS: failTLS}, reason: ReasonTLS},
		{name: "timeout", said: nil, o: Options{HandshakeTimeout: time.Millisecond}, reason: ReasonTimeout},
	} {
		t.Run(tt.name, func(t *testing.T) {
			h := newHooked()
			h.before = tt.open
			s, _, path := serve(t, h, tt.o)
			nc := connect(t, path)
			if tt.reason == ReasonTimeout {
				io.Copy(io.Discard, nc)
			} else {
				nc.Write(tt.said)
				nc.(*net.UnixConn).CloseWrite()
				io.Copy(io.Discard, nc)
			}
			eventually(t, s, func(st Stats) bool { return st.Accepted == 1 && st.Connections == 0 })
			st := s.Stats()
			for r, n := range st.Failures {
				want := uint64(0)
				if Reason(r) == tt.reason {
					want = 1
				}
				if n != want {
					t.Errorf("%v: got %d, need %d", Reason(r), n, want)
				}
			}
			if want := tt.reason == ReasonTLS; (st.TLSFailures == 1) != want {
				t.Errorf("%d failures of TLS", st.TLSFailures)
			}
		})
	}
}

func failTLS(net.Conn) (TLSConn, error) { return nil, errors.New("bad certificate") }

// Scrapes while requests are made.
func TestStatsRace(t *testing.T) {
	s, uri, _ := serve(t, newHooked(), Options{})
	var stop atomic.Bool
	scraped := make(chan struct{})
	go func() {
		defer close(scraped)
		for last := uint64(0); !stop.Load(); {
			st := s.Stats()
			if n := st.Operations(); n < last {
				t.Errorf("%d operations after %d", n, last)
			} else {
				last = n
			}
			s.opts.Chain.Calls()
		}
	}()
	p := make([]byte, 512)
	for range 20 {
		c := dial(t, uri, &client.Options{})
		for range 50 {
			if err := c.Pread(p, 0); err != nil {
				t.Error(err)
			}
		}
		c.Close()
	}
	stop.Store(true)
	<-scraped
	if n := s.Stats().Operations(); n != 1000 {
		t.Errorf("%d operations, need 1000", n)
	}
	calls := s.opts.Chain.Calls()
	calls[0].Each(func(cb backend.Callback, n uint64) {
		if cb == backend.Pread && n != 1000 {
			t.Errorf("%d calls of pread, need 1000", n)
		}
	})
}

// What counting costs a request of a batch of 16, which fill 64 KiB with 4 KiB each, and
// that it allocates nothing.
func BenchmarkCount(b *testing.B) {
	s := New(Options{Chain: backend.NewChain(backend.NewMem(1), nil, backend.Trace{})})
	t := &task{c: &conn{s: s}, arrived: now(), req: protocol.Request{Type: protocol.CmdRead, Length: 4096}}
	b.ReportAllocs()
	for i := 0; b.Loop(); i++ {
		t.count()
		if i%16 == 15 {
			t.account(0)
			t.arrived = now()
		}
	}
}
