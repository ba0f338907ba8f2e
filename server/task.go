package server

import (
	"errors"
	"math"

	"nbdhost/backend"
	"nbdhost/protocol"
)

// A task carries out one request after another for a goroutine that makes calls:
// reserve, then run, then finish. Its memory is used again for each.
type task struct {
	c    *conn
	call backend.Call
	req  protocol.Request
	err  error
	out  batch // replies not yet sent, and room for the next one
	at   int   // where in out.buf the reply of the request under way begins

	extents backend.Extents
	status  protocol.BlockStatus
}

func (t *task) init(c *conn) {
	t.c = c
	worker := int(c.numbers.Add(1) - 1)
	t.call = backend.Call{Conn: &c.peer, Worker: worker, Log: c.log.With("worker", worker)}
}

// reserve makes room for the reply of a read, whose data the call will put in
// place. It may send what waits.
func (t *task) reserve() error {
	n := protocol.SimpleReplySize
	if t.req.Type == protocol.CmdRead {
		n = t.c.replyHead() + int(t.req.Length)
	}
	err := t.room(n)
	t.at = t.out.end
	return err
}

// room makes room for n bytes behind the replies that wait, or sends those.
func (t *task) room(n int) error {
	if t.out.fits(n) && (t.out.empty() || t.out.end-t.out.start+n <= batchSize) {
		return nil
	}
	t.c.sender.send(&t.out)
	return t.out.grow(t.c.replyHead(), n)
}

// replyHead is the size in bytes of what precedes the data in a read's reply.
func (c *conn) replyHead() int {
	if c.negotiated.StructuredReplies {
		return protocol.ChunkHeaderSize + protocol.OffsetDataSize
	}
	return protocol.SimpleReplySize
}

// run makes the call. payload is what a write brought. Nothing is sent here, and
// of the batch only the reserved room is touched: see watch.go.
func (t *task) run(payload []byte) {
	s, req := t.c.session, &t.req
	n, off := uint32(req.Length), req.Offset
	flags := backend.Flags(0)
	if req.Flags&protocol.CmdFlagFUA != 0 {
		flags |= backend.FUA
	}
	switch req.Type {
	case protocol.CmdRead:
		from := t.at + t.c.replyHead()
		t.err = s.Pread(&t.call, t.out.buf.B[from:from+int(n)], off)
	case protocol.CmdWrite:
		t.err = s.Pwrite(&t.call, payload, off, flags)
	case protocol.CmdFlush:
		t.err = s.Flush(&t.call)
	case protocol.CmdTrim:
		t.err = s.Trim(&t.call, n, off, flags)
	case protocol.CmdCache:
		t.err = s.Cache(&t.call, n, off)
	case protocol.CmdWriteZeroes:
		if req.Flags&protocol.CmdFlagNoHole == 0 {
			flags |= backend.MayTrim
		}
		if req.Flags&protocol.CmdFlagFastZero != 0 {
			flags |= backend.FastZero
		}
		t.err = s.Zero(&t.call, n, off, flags)
	case protocol.CmdBlockStatus:
		if req.Flags&protocol.CmdFlagReqOne != 0 {
			flags |= backend.ReqOne
		}
		t.err = s.Extents(&t.call, n, off, flags, &t.extents)
	}
}

// finish adds the reply to the batch. An error means that there is no memory for
// it.
func (t *task) finish() error {
	switch {
	case t.err != nil:
		return t.refuse()
	case t.req.Type == protocol.CmdRead:
		b := t.out.buf.B[:t.at]
		if t.c.negotiated.StructuredReplies {
			h := protocol.ChunkHeader{Cookie: t.req.Cookie, Flags: protocol.ReplyFlagDone,
				Type: protocol.ReplyOffsetData, Length: protocol.OffsetDataSize + t.req.Length}
			o := protocol.OffsetData{Offset: t.req.Offset}
			b = o.AppendTo(h.AppendTo(b))
		} else {
			h := protocol.SimpleReply{Cookie: t.req.Cookie}
			b = h.AppendTo(b)
		}
		t.out.end = len(b) + int(t.req.Length)
		return nil
	case t.req.Type == protocol.CmdBlockStatus:
		return t.finishStatus()
	}
	return t.simple(0)
}

func (t *task) simple(errno protocol.Errno) error {
	if err := t.room(protocol.SimpleReplySize); err != nil {
		return err
	}
	h := protocol.SimpleReply{Cookie: t.req.Cookie, Errno: errno}
	t.out.end = len(h.AppendTo(t.out.buf.B[:t.out.end]))
	return nil
}

// chunk starts the only chunk of a structured reply, with n bytes of data.
func (t *task) chunk(typ protocol.ReplyType, n int) ([]byte, error) {
	if err := t.room(protocol.ChunkHeaderSize + n); err != nil {
		return nil, err
	}
	h := protocol.ChunkHeader{Cookie: t.req.Cookie, Flags: protocol.ReplyFlagDone, Type: typ, Length: uint64(n)}
	return h.AppendTo(t.out.buf.B[:t.out.end]), nil
}

// refuse replies with t.err. Where structured replies were negotiated the text
// of the error goes to the client as well.
func (t *task) refuse() error {
	errno := protocol.ErrnoFor(t.err, t.req.Flags)
	if !t.c.negotiated.StructuredReplies {
		return t.simple(errno)
	}
	e := protocol.ErrorChunk{Type: protocol.ReplyError, Errno: errno, Msg: errorText(t.err)}
	b, err := t.chunk(e.Type, e.WireSize())
	if err == nil {
		t.out.end = len(e.AppendTo(b))
	}
	return err
}

// errorText is what a client is told: what the module said, if it said anything.
func errorText(err error) string {
	var e *backend.Error
	if errors.As(err, &e) {
		return e.Msg
	}
	var refused *protocol.RequestError
	if errors.As(err, &refused) {
		return refused.Msg
	}
	return err.Error()
}

// maxDescriptor is the longest run that a 32-bit descriptor is given: libnbd
// before 1.24 fails on lengths near 4 GiB that are not aligned.
const maxDescriptor = math.MaxUint32 &^ (64<<10 - 1)

// baseAllocation is the number that block status replies call the context by.
const baseAllocation = 1

func (t *task) finishStatus() error {
	t.status.ContextID = baseAllocation
	t.status.Descriptors = describe(t.status.Descriptors[:0], t.extents.List(), &t.req)
	b, err := t.chunk(protocol.ReplyBlockStatus, t.status.WireSize())
	if err == nil {
		t.out.end = len(t.status.AppendTo(b))
	}
	return err
}

// describe turns extents, which begin at the request's offset, into descriptors:
// one that lies within the range with NBD_CMD_FLAG_REQ_ONE; else up to the end of
// the range, the last of them perhaps beyond it.
func describe(d []protocol.Descriptor, extents []backend.Extent, req *protocol.Request) []protocol.Descriptor {
	end := req.Offset + req.Length
	if req.Flags&protocol.CmdFlagReqOne != 0 {
		e := extents[0]
		return append(d, protocol.Descriptor{Length: min(e.Length, req.Length), Flags: uint64(e.Type)})
	}
	for _, e := range extents {
		for off := e.Offset; off < e.Offset+e.Length; {
			if off >= end || len(d) == protocol.MaxExtents {
				return d
			}
			n := min(e.Offset+e.Length-off, maxDescriptor)
			d = append(d, protocol.Descriptor{Length: n, Flags: uint64(e.Type)})
			off += n
		}
	}
	return d
}
