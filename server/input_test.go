package server

import (
	"bytes"
	"testing"
)

// What is in hand of a request stays where it is, unless that is little or there is no room;
// and no receive goes beyond the request that needs more than the others.
func TestInputRoom(t *testing.T) {
	const kib, mib = 1 << 10, 1 << 20
	for _, tt := range []struct {
		what             string
		start, end, room int
		wantStart, until int
	}{
		{"nothing in hand", 4068, 4068, 28, 4068, receiveSize},
		{"the rest of a header", 200 * kib, 200*kib + 20, 28, 200 * kib, receiveSize},
		{"the rest of a header at the end", receiveSize - 20, receiveSize, 28, 0, receiveSize},
		{"the rest of a short write at the end", receiveSize - 2*kib, receiveSize, 4 * kib, 0, receiveSize},
		{"a write with room", 4 * kib, 64 * kib, 128 * kib, 4 * kib, receiveSize},
		{"a write beyond the end", 216 * kib, receiveSize, 64 * kib, 216 * kib, 280 * kib},
		{"a long write", 4 * kib, receiveSize, 256 * kib, 4 * kib, 260 * kib},
		{"a write without room, little in hand", 250 * kib, receiveSize, 300 * kib, 0, 300 * kib},
		{"a write without room, much in hand", 220 * kib, receiveSize, 300 * kib, 0, 300 * kib},
		{"a write longer than the buffer", 4 * kib, receiveSize, mib, 4 * kib, mib + 4*kib},
	} {
		var in input
		in.init(&conn{})
		if err := in.makeRoom(); err != nil {
			t.Fatal(err)
		}
		in.start, in.end, in.room = tt.start, tt.end, tt.room
		want := bytes.Repeat([]byte{'a'}, tt.end-tt.start)
		copy(in.unread(), want)
		if err := in.makeRoom(); err != nil {
			t.Fatal(err)
		}
		if in.start != tt.wantStart && (tt.room < mib || in.start%pageSize != pageSize-in.head) {
			t.Errorf("%s: begins at %d, want %d", tt.what, in.start, tt.wantStart)
		}
		if !bytes.Equal(in.unread(), want) {
			t.Errorf("%s: what is in hand has changed", tt.what)
		}
		until := in.end + len(in.window())
		if tt.until += in.start - tt.wantStart; until != tt.until || until-in.start < tt.room {
			t.Errorf("%s: the receive goes to %d, want %d", tt.what, until, tt.until)
		}
		in.release()
	}
}

// A buffer for long requests is kept while they come, unless it is very large.
func TestInputShrink(t *testing.T) {
	const mib = 1 << 20
	for _, tt := range []struct {
		room, last int
		kept       bool
	}{
		{28, 0, true}, {28, 4096, true}, {mib, mib, true}, {mib, 4096, false}, {mib, 0, false},
		{2 * mib, 2 * mib, true}, {2 * mib, mib, true}, {64 * mib, 64 * mib, false},
	} {
		var in input
		in.init(&conn{})
		in.room = tt.room
		if err := in.makeRoom(); err != nil {
			t.Fatal(err)
		}
		in.end++
		if in.shrink(0); in.buf == nil {
			t.Fatalf("%d: a buffer was released that is not empty", tt.room)
		}
		in.start++
		if in.shrink(uint64(tt.last)); (in.buf != nil) != tt.kept {
			t.Errorf("room for %d, last %d: kept %v", tt.room, tt.last, in.buf != nil)
		}
		in.release()
	}
}

// What lies behind a part that is given away goes to another buffer, and to one as large if that
// is not very large.
func TestInputPart(t *testing.T) {
	const kib, mib = 1 << 10, 1 << 20
	for _, tt := range []struct{ room, n, behind, size int }{
		{300 * kib, 256 * kib, 0, inputSize},
		{300 * kib, 256 * kib, 28, inputSize},
		{mib, mib, 0, mib + mib/2},
		{2 * mib, mib, mib, 3 * mib},
		{8 * mib, 8 * mib, 0, inputSize},
	} {
		var in input
		in.init(&conn{})
		in.room = tt.room
		if err := in.makeRoom(); err != nil {
			t.Fatal(err)
		}
		in.end += tt.n + tt.behind
		part, behind := bytes.Repeat([]byte{'a'}, tt.n), bytes.Repeat([]byte{'b'}, tt.behind)
		copy(in.unread(), part)
		copy(in.unread()[tt.n:], behind)
		p, b, err := in.part(tt.n)
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(p, part) || !bytes.Equal(in.unread(), behind) || in.buf == b {
			t.Errorf("%+v: other bytes, or the same buffer", tt)
		}
		if len(in.buf.B) != tt.size {
			t.Errorf("%+v: got another buffer of %d bytes", tt, len(in.buf.B))
		}
		b.Release()
		in.release()
	}
}
