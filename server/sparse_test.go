package server

import (
	"bytes"
	"fmt"
	"slices"
	"syscall"
	"testing"

	"nbdhost/backend"
	"nbdhost/client"
	"nbdhost/protocol"
)

// zeroes makes v say that a range reads as zeroes, and everything else is data.
func (v *vast) zeroes(start, end uint64, fail func(off uint64) error) {
	v.says(func(_ uint32, _ uint64, x *backend.Extents) error {
		x.Add(0, start, 0)
		x.Add(start, end-start, backend.ExtentZero)
		return x.Add(end, uint64(v.size)-end, 0)
	}, fail)
}

// Reads with holes in them: the pieces, what is asked of the module, and that
// they are whole.
func TestSparseRead(t *testing.T) {
	v := newVast(1 << 40)
	v.zeroes(100<<10, 200<<10, nil)
	uri, path := serveVast(t, v, Options{SparseReads: SparseAlways})
	c := dial(t, uri, nil)
	for _, tt := range []struct {
		name     string
		off, n   uint64
		flags    protocol.CommandFlags
		want     []string
		from, to uint64 // where the zeroes are
	}{
		{"all hole", 110 << 10, 64 << 10, 0, []string{"extents 0x1b800+0x10000"}, 0, 64 << 10},
		{"all data", 300 << 10, 64 << 10, 0, []string{"extents 0x4b000+0x10000", "pread 0x4b000+0x10000"}, 0, 0},
		{"hole between data", 0, 300 << 10, 0, []string{"extents 0x0+0x4b000", "pread 0x0+0x19000", "pread 0x32000+0x19000"}, 100 << 10, 200 << 10},
		{"hole first", 110<<10 + 1, 100 << 10, 0, []string{"extents 0x1b801+0x19000", "pread 0x32000+0x2801"}, 0, 90<<10 - 1},
		{"hole last", 60 << 10, 50<<10 + 1, 0, []string{"extents 0xf000+0xc801", "pread 0xf000+0xa000"}, 40 << 10, 50<<10 + 1},
		{"hole too short", 0, 101 << 10, 0, []string{"extents 0x0+0x19400", "pread 0x0+0x19400"}, 0, 0},
		{"short read", 110 << 10, sparseSize - 1, 0, []string{"pread 0x1b800+0x7fff"}, 0, 0},
		{"not to be fragmented", 110 << 10, 64 << 10, protocol.CmdFlagDF, []string{"pread 0x1b800+0x10000"}, 0, 0},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got := make([]byte, tt.n)
			done := make(chan error, 1)
			if _, err := c.AioPread(got, tt.off, tt.flags, func(err error) int { done <- err; return 1 }); err != nil {
				t.Fatal(err)
			}
			if err := <-done; err != nil {
				t.Fatal(err)
			}
			equal(t, "calls", v.took(), tt.want)
			want := bytes.Repeat([]byte{'d'}, int(tt.n))
			clear(want[tt.from:tt.to])
			if !bytes.Equal(got, want) {
				t.Error("read other bytes")
			}
		})
	}

	// What is on the wire, with both headers. The hole is not on a multiple of 512.
	v.zeroes(100<<10+1, 200<<10+1, nil)
	for _, way := range []protocol.Option{protocol.OptStructuredReply, protocol.OptExtendedHeaders} {
		p, next := handshake(t, path, way), (*peer).compactChunk
		r := protocol.Request{Type: protocol.CmdRead, Cookie: 3, Offset: 90 << 10, Length: 200 << 10}
		if way == protocol.OptExtendedHeaders {
			next = (*peer).chunk
			p.send(r)
		} else {
			p.Write(r.AppendTo(nil))
		}
		var got []string
		for done := false; !done; {
			h, data := next(p)
			var at protocol.OffsetData
			at.Decode(data)
			s := fmt.Sprintf("%v at %d", h.Type, at.Offset)
			var hole protocol.OffsetHole
			if h.Type == protocol.ReplyOffsetHole && hole.Decode(data) == nil {
				s += fmt.Sprintf(" of %d", hole.Length)
			} else {
				s += fmt.Sprintf(" of %d", len(data)-8)
			}
			got = append(got, s)
			done = h.Flags == protocol.ReplyFlagDone
		}
		equal(t, way.String(), got, []string{"NBD_REPLY_TYPE_OFFSET_DATA at 92160 of 10752",
			"NBD_REPLY_TYPE_OFFSET_HOLE at 102912 of 101888", "NBD_REPLY_TYPE_OFFSET_DATA at 204800 of 92160"})
	}
	v.took()

	// Simple replies cannot say it.
	nc := raw(t, path)
	nc.Write(request(protocol.Request{Type: protocol.CmdRead, Offset: 110 << 10, Length: 64 << 10}))
	readReply(t, nc, 64<<10)
	equal(t, "simple", v.took(), []string{"pread 0x1b800+0x10000"})
}

// Where there are more holes than a reply has room for, the rest is data.
func TestSparsePieces(t *testing.T) {
	var task task
	task.extents.Reset(0, 1<<30)
	for i := range uint64(40) {
		task.extents.Add(i*16384, 8192, backend.ExtentZero)
		task.extents.Add(i*16384+8192, 8192, 0)
	}
	list, _ := task.pieces(0, 40*16384)
	if len(list) > maxPieces {
		t.Errorf("got %d pieces", len(list))
	}
	end := uint64(0)
	for i, p := range list {
		if p.start != end || p.end <= p.start || i > 0 && p.hole == list[i-1].hole {
			t.Errorf("got %v", list)
		}
		end = p.end
	}
	if end != 40*16384 || list[len(list)-1].hole {
		t.Errorf("got %v", list)
	}
}

// Errors: of the extents, which does not hurt the read; of the read, which fails
// as a whole.
func TestSparseErrors(t *testing.T) {
	v := newVast(1 << 40)
	uri, _ := serveVast(t, v, Options{SparseReads: SparseAlways})
	c := dial(t, uri, nil)
	bad := &backend.Error{Module: "mem", Op: "x", Errno: syscall.EIO, Msg: "broken"}
	v.says(func(uint32, uint64, *backend.Extents) error { return bad }, nil)
	if err := c.Pread(make([]byte, 64<<10), 0); err != nil {
		t.Error(err)
	}
	v.zeroes(0, 40<<10, func(off uint64) error {
		if off > 0 {
			return bad
		}
		return nil
	})
	if err := c.Pread(make([]byte, 64<<10), 0); errnoOf(err) != protocol.EIO {
		t.Errorf("got %v", err)
	}
	if err := c.Pread(make([]byte, 40<<10), 0); err != nil {
		t.Error(err)
	}
}

// By default what was read is looked at, and nobody is asked for extents: a long read that
// brought zeroes only is answered with a hole, any other with data.
func TestSparseAuto(t *testing.T) {
	const data = 1 << 20 // where a byte is not zero
	h := newHooked()
	h.before = func(_ *backend.Call, cb backend.Callback, _ uint64) error {
		if cb == backend.GetExtents {
			t.Error("the extents were asked for")
		}
		return nil
	}
	_, uri, _ := serve(t, h, Options{})
	c := dial(t, uri, nil)
	if err := c.Pwrite([]byte{1}, data, 0); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		name   string
		off, n uint64
		flags  protocol.CommandFlags
		want   protocol.ReplyType
	}{
		{"zeroes", 0, data, 0, protocol.ReplyOffsetHole},
		{"zeroes, not in pages", 1, sparseSize + 1, 0, protocol.ReplyOffsetHole},
		{"data at the end", 1, data, 0, protocol.ReplyOffsetData},
		{"data at the beginning", data, sparseSize, 0, protocol.ReplyOffsetData},
		{"short", 0, sparseSize - 1, 0, protocol.ReplyOffsetData},
		{"not to be fragmented", 0, data, protocol.CmdFlagDF, protocol.ReplyOffsetData},
	} {
		for range 40 {
			var got []protocol.ReplyType
			p := bytes.Repeat([]byte{'x'}, int(tt.n))
			if err := c.With(t.Context()).PreadStructured(p, tt.off, tt.flags, func(chunk client.Chunk) error {
				got = append(got, chunk.Type)
				return nil
			}); err != nil {
				t.Fatal(err)
			}
			want := make([]byte, tt.n)
			if tt.off+tt.n > data {
				want[data-tt.off] = 1
			}
			if !slices.Equal(got, []protocol.ReplyType{tt.want}) || !bytes.Equal(p, want) {
				t.Fatalf("%s: got %v, need %v; or other bytes", tt.name, got, tt.want)
			}
		}
	}
	for mode, want := range map[SparseReads]SparseReads{SparseAuto: SparseAuto, SparseAlways: SparseAuto, SparseNever: SparseNever} {
		o := Options{SparseReads: mode}
		if got := o.sparseMode(true, false); got != want {
			t.Errorf("%d without extents: got %d, need %d", mode, got, want)
		}
		if got := o.sparseMode(false, true); got != SparseNever {
			t.Errorf("%d without structured replies: got %d, need %d", mode, got, SparseNever)
		}
	}
}

// A read that begins within the export and ends beyond: with structured replies
// what there is, and an error that says where it ends.
func TestReadPastEnd(t *testing.T) {
	v := newVast(1000)
	_, path := serveVast(t, v, Options{SparseReads: SparseAlways})
	for _, flags := range []protocol.CommandFlags{0, protocol.CmdFlagDF} {
		c := extendedConn(t, path)
		c.send(protocol.Request{Type: protocol.CmdRead, Flags: flags, Cookie: 4, Offset: 512, Length: 512})
		h, data := c.chunk()
		if h.Type != protocol.ReplyOffsetData || h.Flags != 0 || h.Cookie != 4 || h.Offset != 512 || len(data) != 8+488 || data[8] != 'd' {
			t.Errorf("got %+v", h)
		}
		h, data = c.chunk()
		e := protocol.ErrorChunk{Type: h.Type}
		if err := e.Decode(data); err != nil || h.Type != protocol.ReplyErrorOffset || h.Flags != protocol.ReplyFlagDone ||
			e.Errno != protocol.EINVAL || e.Offset != 1000 || e.Msg == "" {
			t.Errorf("got %+v, %+v, %v", h, e, err)
		}
		// Nothing of it is left for the next one.
		c.send(protocol.Request{Type: protocol.CmdRead, Cookie: 5, Offset: 0, Length: 512})
		if h, _ = c.chunk(); h.Type != protocol.ReplyOffsetData || h.Flags != protocol.ReplyFlagDone {
			t.Errorf("next read: got %+v", h)
		}
		for i, r := range []protocol.Request{
			{Type: protocol.CmdRead, Offset: 1000, Length: 1},
			{Type: protocol.CmdRead, Offset: 512, Length: protocol.MaxRequestLength + 1},
			{Type: protocol.CmdRead, Offset: 512, Length: 512, Flags: 1 << 15},
			{Type: protocol.CmdCache, Offset: 512, Length: 512},
		} {
			c.send(r)
			if h, _ = c.chunk(); h.Type != protocol.ReplyError || h.Flags != protocol.ReplyFlagDone {
				t.Errorf("%d: got %+v", i, h)
			}
		}
	}
	nc := raw(t, path)
	nc.Write(request(protocol.Request{Type: protocol.CmdRead, Offset: 512, Length: 512}))
	if m := readReply(t, nc, 0); m.Errno != protocol.EINVAL {
		t.Errorf("simple: got %+v", m)
	}
}

// The same where a hole is the last thing there is, and on a worker.
func TestReadPastEndSparse(t *testing.T) {
	v := newVast(100 << 10)
	v.zeroes(40<<10, 100<<10, nil)
	_, path := serveVast(t, v, Options{SparseReads: SparseAlways})
	c := extendedConn(t, path)
	c.send(protocol.Request{Type: protocol.CmdRead, Length: 1 << 20})
	var got []protocol.ReplyType
	for {
		h, _ := c.chunk()
		got = append(got, h.Type)
		if h.Flags != 0 {
			break
		}
	}
	if want := []protocol.ReplyType{protocol.ReplyOffsetData, protocol.ReplyOffsetHole, protocol.ReplyErrorOffset}; !slices.Equal(got, want) {
		t.Errorf("got %v, need %v", got, want)
	}
}
