package server

import (
	"bytes"

	"nbdhost/backend"
	"nbdhost/protocol"
)

// SparseReads says when a read is answered with NBD_REPLY_TYPE_OFFSET_HOLE instead of
// zeroes. Only clients with structured replies can be told so.
type SparseReads int

const (
	// SparseAuto looks at what a long read has brought: where that is zeroes only, the
	// reply says so instead of bringing them.
	SparseAuto SparseReads = iota
	// SparseNever sends data only.
	SparseNever
	// SparseAlways asks for the extents before every long read, and reads no part that is zero
	// by them. They must be right: filters and plugins are known of which they are not, and
	// some that crash when they are asked.
	SparseAlways
)

const (
	// sparseSize is the shortest read in bytes that may have holes: for less a question
	// costs more than the zeroes.
	sparseSize = 32 << 10
	// holeSize is the shortest hole in bytes that gets a chunk of its own.
	holeSize = 4 << 10
	// holeAlign keeps the pieces of a reply to multiples of it, as the
	// specification asks for.
	holeAlign = 512
	// maxPieces bounds the chunks of one reply. What is left goes into the last.
	maxPieces = 16
)

// sparseMode is how the reads of a connection are answered.
func (o *Options) sparseMode(structured, extents bool) SparseReads {
	switch {
	case !structured:
		return SparseNever
	case o.SparseReads == SparseAlways && !extents:
		return SparseAuto
	}
	return o.SparseReads
}

// mayHaveHoles tells whether holes are anything to the request.
func (c *conn) mayHaveHoles(r *protocol.Request) bool {
	return c.sparse != SparseNever && r.Type == protocol.CmdRead && r.Length >= sparseSize && r.Flags&protocol.CmdFlagDF == 0
}

var zeroPage [4096]byte

func allZero(p []byte) bool {
	for len(p) > len(zeroPage) {
		if !bytes.Equal(p[:len(zeroPage)], zeroPage[:]) {
			return false
		}
		p = p[len(zeroPage):]
	}
	return bytes.Equal(p, zeroPage[:len(p)])
}

// A piece is a part of a read: [start, end) of the request, a hole or data.
type piece struct {
	start, end uint64
	hole       bool
}

// pieces divides a read of length bytes at off by what the extents say. What they
// do not cover is data. It returns how many bytes are holes.
func (t *task) pieces(off, length uint64) (list []piece, zeroes uint64) {
	list = t.parts[:0]
	pos := uint64(0)
	for _, e := range t.extents.List() {
		if e.Offset >= off+length || len(list) >= maxPieces-2 {
			break
		}
		if e.Type&backend.ExtentZero == 0 {
			continue
		}
		start, end := max(e.Offset, off), min(e.Offset+e.Length, off+length)
		if start > off+pos {
			start = (start + holeAlign - 1) &^ (holeAlign - 1)
		}
		if end < off+length {
			end &^= holeAlign - 1
		}
		if end < start+holeSize {
			continue
		}
		if start -= off; start > pos {
			list = append(list, piece{pos, start, false})
		}
		pos = end - off
		list = append(list, piece{start, pos, true})
		zeroes += pos - start
	}
	if pos < length {
		list = append(list, piece{pos, length, false})
	}
	return list, zeroes
}

// sparseRoom is how much longer than data alone the reply of a sparse read may be.
const sparseRoom = maxPieces * (protocol.ExtendedChunkHeaderSize + protocol.OffsetHoleSize)

// hole composes the whole reply of a read that brought zeroes only.
func (t *task) hole() {
	t.filled = len(t.appendHole(t.out.buf.B[:t.at], piece{0, t.req.Length, true}, t.done()))
}

func (t *task) appendHole(b []byte, p piece, flags protocol.ReplyFlags) []byte {
	h := protocol.ChunkHeader{Cookie: t.req.Cookie, Offset: t.req.Offset, Flags: flags,
		Type: protocol.ReplyOffsetHole, Length: protocol.OffsetHoleSize}
	hole := protocol.OffsetHole{Offset: t.req.Offset + p.start, Length: uint32(p.end - p.start)}
	return hole.AppendTo(t.c.negotiated.AppendChunk(b, &h))
}

// readSparse composes the whole reply of a read with its holes. It returns false
// where there is none: an ordinary read is due then. That the extents cannot be had is no
// error: reading may work all the same.
func (t *task) readSparse() bool {
	s, req := t.c.session, &t.req
	if s.Extents(&t.call, uint32(req.Length), req.Offset, 0, &t.extents) != nil {
		return false
	}
	pieces, zeroes := t.pieces(req.Offset, req.Length)
	if zeroes == 0 {
		return false
	}
	b := t.out.buf.B[:t.at]
	for i, p := range pieces {
		flags := protocol.ReplyFlags(0)
		if i == len(pieces)-1 {
			flags = t.done()
		}
		if p.hole {
			b = t.appendHole(b, p, flags)
			continue
		}
		h := protocol.ChunkHeader{Cookie: req.Cookie, Offset: req.Offset, Flags: flags,
			Type: protocol.ReplyOffsetData, Length: protocol.OffsetDataSize + p.end - p.start}
		data := protocol.OffsetData{Offset: req.Offset + p.start}
		b = data.AppendTo(t.c.negotiated.AppendChunk(b, &h))
		n := len(b)
		b = b[:n+int(p.end-p.start)]
		if t.err = s.Pread(&t.call, b[n:], data.Offset); t.err != nil {
			return true
		}
	}
	t.filled = len(b)
	return true
}
