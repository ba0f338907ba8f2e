package server

import (
	"math"

	"nbdhost/backend"
	"nbdhost/protocol"
)

const (
	// maxDescriptor is the longest run that a 32-bit descriptor is given:
	// libnbd before 1.24 fails on lengths near 4 GiB that are not aligned.
	maxDescriptor = math.MaxUint32 &^ (64<<10 - 1)

	// maxStatusCalls bounds the calls that one question may cost where each
	// answers for 4 GiB. The client asks again for what is left.
	maxStatusCalls = 256

	// spanUnit is what conn.span is a multiple of, in bytes.
	spanUnit = 64 << 10

	// keptExtents is up to how many extents the memory for them is kept.
	keptExtents = 1 << 10

	// baseAllocation is the number that block status replies call the context by.
	baseAllocation = 1
)

// queryStatus asks for the extents and puts the descriptors together: one that
// lies within the range with NBD_CMD_FLAG_REQ_ONE; else up to the end of the range,
// the last of them perhaps beyond it, perhaps less. More than 4 GiB takes several
// calls; an error of a later one only ends the answer.
func (t *task) queryStatus(flags backend.Flags) error {
	d := describer{limit: maxDescriptor, list: t.status.Descriptors[:0]}
	if t.c.negotiated.ExtendedHeaders {
		d.limit = math.MaxUint64
	}
	end := t.req.Offset + t.req.Length
	off := t.req.Offset
	for calls := range maxStatusCalls {
		if calls > 0 && t.pause() != nil {
			break
		}
		n := t.c.statusSpan(end - off)
		if err := t.c.session.Extents(&t.call, n, off, flags, &t.extents); err != nil {
			if calls == 0 {
				return err
			}
			break
		}
		list := t.extents.List()
		t.c.learnSpan(list)
		if block := uint64(t.c.negotiated.BlockSize.Minimum); block > 1 {
			t.aligned = align(t.aligned[:0], list, block, t.c.negotiated.Size)
			list = t.aligned
		}
		asked := off + uint64(n)
		off = d.add(list, end)
		if off < asked || off >= end || flags&backend.ReqOne != 0 || len(d.list) >= backend.MaxExtents {
			break
		}
	}
	t.status.Descriptors = d.list
	if flags&backend.ReqOne != 0 {
		t.status.Descriptors = d.list[:1]
		d.list[0].Length = min(d.list[0].Length, t.req.Length)
	}
	return nil
}

// statusSpan is how many of n bytes the module is asked about. It looks at all of them, however
// many extents there are room for.
func (c *conn) statusSpan(n uint64) uint32 {
	if span := c.span.Load(); span > 0 {
		n = min(n, span)
	}
	return piece32(n)
}

// learnSpan takes in whether there was room for all extents.
func (c *conn) learnSpan(list []backend.Extent) {
	span := c.span.Load()
	switch {
	case len(list) == backend.MaxExtents:
		last := list[len(list)-1]
		span = (last.Offset + last.Length - list[0].Offset + spanUnit) &^ (spanUnit - 1)
	case span == 0:
		return
	case span < math.MaxUint32:
		span *= 2
	default:
		span = 0
	}
	c.span.Store(span)
}

// A describer turns extents into descriptors of at most limit bytes.
type describer struct {
	limit uint64
	list  []protocol.Descriptor
}

// add appends extents, which go on where the last ones ended, as long as they
// begin before end. It returns where the answer ends now.
func (d *describer) add(extents []backend.Extent, end uint64) (off uint64) {
	for _, e := range extents {
		for off = e.Offset; off < e.Offset+e.Length; {
			if off >= end {
				return off
			}
			n := e.Offset + e.Length - off
			if i := len(d.list) - 1; i >= 0 && d.list[i].Flags == uint64(e.Type) && d.list[i].Length < d.limit {
				n = min(n, d.limit-d.list[i].Length)
				d.list[i].Length += n
			} else if n = min(n, d.limit); len(d.list) < backend.MaxExtents {
				d.list = append(d.list, protocol.Descriptor{Length: n, Flags: uint64(e.Type)})
			} else {
				return off
			}
			off += n
		}
	}
	return off
}

// align appends to out the extents with their bounds on multiples of block, as
// block status must have them where block sizes were advertised; the end of the
// export may lie between. A block that several extents share is what all of them
// are: it is a hole, or zero, only if they all are. Of a block at the end of which
// nothing is known nothing is said, unless it is the first.
func align(out, extents []backend.Extent, block, size uint64) []backend.Extent {
	emit := func(off, end uint64, typ uint32) {
		if i := len(out) - 1; i >= 0 && out[i].Type == typ {
			out[i].Length = end - out[i].Offset
			return
		}
		out = append(out, backend.Extent{Offset: off, Length: end - off, Type: typ})
	}
	pos := extents[0].Offset
	for i, e := range extents {
		end := e.Offset + e.Length
		if end <= pos {
			continue
		}
		whole := end - end%block
		if end == size {
			whole = end
		}
		if whole > pos {
			emit(pos, whole, e.Type)
			pos = whole
		}
		if pos == end {
			continue
		}
		last := min(pos+block, size)
		typ := e.Type
		for _, next := range extents[i+1:] {
			if next.Offset >= last {
				break
			}
			typ &= next.Type
			end = next.Offset + next.Length
		}
		if end < last {
			if len(out) == 0 {
				emit(pos, last, 0)
			}
			break
		}
		emit(pos, last, typ)
		pos = last
	}
	return out
}

func (t *task) finishStatus() error {
	if len(t.extents.List()) > keptExtents || len(t.status.Descriptors) > keptExtents {
		defer func() { t.extents, t.aligned, t.status.Descriptors = backend.Extents{}, nil, nil }()
	}
	t.status.ContextID = baseAllocation
	if t.c.negotiated.ExtendedHeaders {
		b, err := t.chunk(protocol.ReplyBlockStatusExt, t.status.ExtendedWireSize())
		if err == nil {
			t.out.end = len(t.status.AppendExtendedTo(b))
		}
		return err
	}
	b, err := t.chunk(protocol.ReplyBlockStatus, t.status.WireSize())
	if err == nil {
		t.out.end = len(t.status.AppendTo(b))
	}
	return err
}
