package server

import (
	"bytes"
	"sync/atomic"
	"time"

	"nbdhost/backend"
	"nbdhost/protocol"
)

// SparseReads says when a read is answered with NBD_REPLY_TYPE_OFFSET_HOLE for
// the parts of it that the module's extents know to be zero, instead of reading
// and sending zeroes. Only clients with structured replies can be told so.
type SparseReads int

const (
	// SparseAuto asks for the extents where that has paid: where long reads bring
	// zeroes it measures now and then what the question costs and how much of what
	// is read are holes.
	SparseAuto SparseReads = iota
	// SparseNever sends data only, and so never makes a call for a read that
	// nbdkit would not make: there are plugins whose .extents crashes on the
	// ranges that reads have.
	SparseNever
	SparseAlways // ask before every read of at least sparseSize
)

const (
	// sparseSize is the shortest read in bytes for which the extents are asked:
	// for less the question costs more than the zeroes.
	sparseSize = 32 << 10
	// holeSize is the shortest hole in bytes that gets a chunk of its own.
	holeSize = 4 << 10
	// holeAlign keeps the pieces of a reply to multiples of it, as the
	// specification asks for.
	holeAlign = 512
	// maxPieces bounds the chunks of one reply. What is left goes into the last.
	maxPieces = 16
	// firstProbe is how many long reads pass before one is looked at, so that short
	// sessions see no call that they would not see otherwise. Where it brought
	// zeroes only it is a probe: the extents of the same range are asked for. Where a
	// probe finds that asking does not pay, twice as many pass before the next look.
	firstProbe = 32
	// zeroesPerNanosecond is how many bytes of zeroes are read, sent and
	// received in a nanosecond, without network. Measured with this client, one
	// read of 1 MiB at a time: a hole takes 60 us instead of 310 with the plugin
	// memory, and 80 instead of 760 with file; this is what the quicker of the
	// two loses. Data costs the same with the question and without.
	zeroesPerNanosecond = 4
)

// A sparsePolicy decides for one connection which reads ask for extents.
type sparsePolicy struct {
	mode     SparseReads
	reads    atomic.Uint64 // long ones so far
	look     atomic.Uint64 // the number of the first read that is to be looked at
	interval atomic.Uint64 // between the last probe and that
	cost     atomic.Int64  // ns that a question takes
	zero     atomic.Int64  // parts of 2^20 of what was asked about that were zero
}

func (p *sparsePolicy) init(mode SparseReads, possible bool) {
	p.mode = mode
	if !possible {
		p.mode = SparseNever
	}
	p.interval.Store(firstProbe)
	p.look.Store(firstProbe)
}

// concerns tells whether holes are anything to the request.
func (p *sparsePolicy) concerns(r *protocol.Request) bool {
	return p.mode != SparseNever && r.Type == protocol.CmdRead && r.Length >= sparseSize && r.Flags&protocol.CmdFlagDF == 0
}

// wants tells whether to ask for the extents before this request.
func (p *sparsePolicy) wants(r *protocol.Request) bool {
	if !p.concerns(r) {
		return false
	}
	if p.mode == SparseAlways {
		return true
	}
	p.reads.Add(1)
	return p.pays(r.Length)
}

// probes tells whether to ask for the extents of a read for which wants said no, and
// that brought data.
func (p *sparsePolicy) probes(r *protocol.Request, data []byte) bool {
	if !p.concerns(r) {
		return false
	}
	n := p.reads.Load()
	if n < p.look.Load() {
		return false
	}
	p.look.Store(n + firstProbe)
	return allZero(data)
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

// pays tells whether asking about a read of this length has cost less than half of
// what it would have saved.
func (p *sparsePolicy) pays(length uint64) bool {
	zeroes := float64(length) / (1 << 20) * float64(p.zero.Load())
	return zeroes/zeroesPerNanosecond > 2*float64(p.cost.Load())
}

// learn takes in one answer. Two at the same time may lose one, which does no harm.
func (p *sparsePolicy) learn(d time.Duration, zeroes, length uint64) {
	average := func(v *atomic.Int64, sample int64) {
		old := v.Load()
		v.Store(old + (sample-old)/4)
	}
	average(&p.cost, int64(d))
	average(&p.zero, int64(zeroes<<20/length))
	if p.pays(length) {
		p.interval.Store(firstProbe)
	} else {
		p.interval.Store(2 * p.interval.Load())
	}
	p.look.Store(p.reads.Load() + p.interval.Load())
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

// holes asks for the extents of the read, and takes in what that cost. Where it fails
// there are none: reading may work all the same.
func (t *task) holes() (list []piece, zeroes uint64) {
	began := time.Now()
	err := t.c.session.Extents(&t.call, uint32(t.req.Length), t.req.Offset, 0, &t.extents)
	cost := time.Since(began)
	if err == nil {
		list, zeroes = t.pieces(t.req.Offset, t.req.Length)
	}
	t.c.sparse.learn(cost, zeroes, t.req.Length)
	return list, zeroes
}

// readSparse composes the whole reply of a read with its holes. It returns false
// where there is none: an ordinary read is due then.
func (t *task) readSparse() bool {
	s, req := t.c.session, &t.req
	pieces, zeroes := t.holes()
	if zeroes == 0 {
		return false
	}
	b := t.out.buf.B[:t.at]
	for i, p := range pieces {
		h := protocol.ChunkHeader{Cookie: req.Cookie, Offset: req.Offset, Type: protocol.ReplyOffsetHole, Length: protocol.OffsetHoleSize}
		if i == len(pieces)-1 {
			h.Flags = t.done()
		}
		if p.hole {
			hole := protocol.OffsetHole{Offset: req.Offset + p.start, Length: uint32(p.end - p.start)}
			b = hole.AppendTo(t.c.negotiated.AppendChunk(b, &h))
			continue
		}
		h.Type, h.Length = protocol.ReplyOffsetData, protocol.OffsetDataSize+p.end-p.start
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
