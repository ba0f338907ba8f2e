package server

import (
	"bytes"
	"log/slog"
	"math/rand/v2"
	"runtime"
	"sync"
	"testing"

	"nbdhost/backend"
	"nbdhost/client"
	"nbdhost/protocol"
)

// A long read or write goes to a worker where more requests follow and processors are free,
// which the client that receives what is read wants as well.
func TestAhead(t *testing.T) {
	processors := int64(runtime.NumCPU())
	if processors == 1 {
		t.Skip("one processor")
	}
	const threads = 4
	h := newHooked()
	s, _, path := serve(t, h, Options{Threads: threads})
	raw(t, path)
	serial := newHooked()
	serial.model = backend.SerializeRequests
	other, _, otherPath := serve(t, serial, Options{Threads: threads})
	raw(t, otherPath)
	for _, tt := range []struct {
		what    string
		command protocol.Command
		length  uint64
		beside  int // bytes in hand after the payload
		change  func(c *conn)
		handed  int64 // calls of workers that are under way
		active  int32
		serial  bool
		want    bool
	}{
		{what: "a read", command: protocol.CmdRead, length: aheadLength, beside: 28, want: true},
		{what: "a write", command: protocol.CmdWrite, length: aheadLength, beside: 28, want: true},
		{what: "a trim", command: protocol.CmdTrim, length: aheadLength, beside: 28},
		{what: "a short read", command: protocol.CmdRead, length: aheadLength - 1, beside: 28},
		{what: "nothing behind it", command: protocol.CmdRead, length: aheadLength},
		{what: "as many reads as keep the processors busy", command: protocol.CmdRead, length: aheadLength, beside: 28, handed: processors - 1},
		{what: "so many writes", command: protocol.CmdWrite, length: aheadLength, beside: 28, handed: processors - 1, want: true},
		{what: "as many writes as keep the processors busy", command: protocol.CmdWrite, length: aheadLength, beside: 28, handed: processors},
		{what: "another client", command: protocol.CmdRead, length: aheadLength, beside: 28, active: 2},
		{what: "TCP", command: protocol.CmdRead, length: aheadLength, beside: 28, change: func(c *conn) { c.sock.local = false }},
		{what: "TLS", command: protocol.CmdRead, length: aheadLength, beside: 28, change: func(c *conn) { c.secure = tlsConn{} }},
		{what: "calls that do not overlap", command: protocol.CmdRead, length: aheadLength, beside: 28, serial: true},
	} {
		s := s
		if tt.serial {
			s = other
		}
		c := only(t, s)
		r := newReader(&conn{s: s, sock: socket{fd: c.sock.descriptor(), local: true}, lane: c.lane, log: slog.New(slog.DiscardHandler)}, 0)
		buf, err := backend.GetBuffer(1)
		if err != nil {
			t.Fatal(err)
		}
		const payload = 512
		r.in.buf, r.in.end = buf, payload+tt.beside
		r.req = protocol.Request{Type: tt.command, Length: tt.length}
		if tt.change != nil {
			tt.change(r.c)
		}
		s.handed.Add(tt.handed)
		s.watcher.active.Add(tt.active)
		if got := r.ahead(payload); got != tt.want {
			t.Errorf("%s: got %v, need %v", tt.what, got, tt.want)
		}
		s.watcher.active.Add(-tt.active)
		s.handed.Add(-tt.handed)
		buf.Release()
	}
}

type tlsConn struct{ TLSConn }

// Where long requests go to workers all of them, and the short ones between them, read and write
// what they should.
func TestAheadData(t *testing.T) {
	if runtime.NumCPU() == 1 {
		t.Skip("one processor")
	}
	for name, o := range map[string]client.Options{"simple": {SimpleReplies: true}, "structured": {CompactHeaders: true}, "extended": {}} {
		t.Run(name, func(t *testing.T) {
			s, uri, _ := serve(t, newHooked(), Options{})
			c := dial(t, uri, &o)
			var lanes sync.WaitGroup
			for lane := range 8 {
				lanes.Go(func() { aheadLane(t, c, uint64(lane)<<23) })
			}
			lanes.Wait()
			if n := s.Stats().Workers; n == 0 {
				t.Error("no worker was started")
			}
		})
	}
}

// aheadLane writes and reads at random within 8 MiB from base.
func aheadLane(t *testing.T, c *client.Conn, base uint64) {
	want := make([]byte, 8<<20)
	buf := make([]byte, 4<<20)
	for i := range 20 {
		n := 1 + rand.IntN(8<<10)
		if i%4 > 0 {
			n = aheadLength/2 + rand.IntN(len(buf)-aheadLength/2)
		}
		off := rand.IntN(len(want) - n + 1)
		p := buf[:n]
		if i%2 == 0 {
			for j := range p {
				p[j] = byte(i + j>>8)
			}
			copy(want[off:], p)
			if err := c.Pwrite(p, base+uint64(off), 0); err != nil {
				t.Error(err)
				return
			}
		} else if err := c.Pread(p, base+uint64(off)); err != nil || !bytes.Equal(p, want[off:off+n]) {
			t.Errorf("read %d of %d at %d: got %v, or other bytes", i, n, off, err)
			return
		}
	}
}
