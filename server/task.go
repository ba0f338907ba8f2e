package server

import (
	"errors"
	"math"
	"time"

	"nbdhost/backend"
	"nbdhost/protocol"
)

// A task carries out one request after another for a goroutine that makes calls:
// reserve, then run, then finish. Its memory is used again for each.
type task struct {
	c     *conn
	call  backend.Call
	req   protocol.Request
	err   error
	out   batch // replies not yet sent, and room for the next one
	batch int   // at how many bytes replies that wait are sent
	at    int   // where in out.buf the reply of the request under way begins

	// arrived is when the request, and those before it in the batch, had been
	// received.
	arrived time.Duration
	began   time.Time // of the call; zero where nobody wants to know
	tally   tally

	longCalls int // calls so far that were expected to take long

	held held // what the request has taken from the limits of bytes

	// tail is the error with which a read ends whose range was cut to what the
	// export has; nil else.
	tail error
	// sparse tells that the extents are asked for first.
	sparse bool
	// filled is where in out.buf the reply ends that run has composed, or 0
	// where finish has to.
	filled int
	// failedAt is where a request that was split failed, 0 where it was not:
	// what precedes has been done.
	failedAt uint64

	extents backend.Extents
	aligned []backend.Extent
	parts   [maxPieces]piece
	status  protocol.BlockStatus
}

func (t *task) init(c *conn, number int) {
	t.c = c
	t.batch = maxBatch
	t.call = backend.Call{Conn: &c.peer, Worker: number, Log: c.log}
	if t.call.Worker != backend.Handshake {
		t.call.Log = t.call.Log.With("worker", t.call.Worker)
	}
}

// reserve makes room for the reply of a read, whose data the call will put in
// place. It may send what waits.
func (t *task) reserve() error {
	n := protocol.ExtendedChunkHeaderSize
	t.sparse = t.c.sparse == SparseAlways && t.c.mayHaveHoles(&t.req)
	if t.req.Type == protocol.CmdRead {
		n = t.c.replyHead() + int(t.req.Length)
		if t.sparse {
			n += sparseRoom
		}
	}
	err := t.room(n)
	t.at = t.out.end
	return err
}

// room makes room for n bytes behind the replies that wait, or sends those.
func (t *task) room(n int) error {
	if t.fits(n) {
		return nil
	}
	t.send()
	return t.out.grow(t.c.id, t.c.replyHead(), n)
}

// fits tells whether there is room for n bytes behind the replies that wait, and claims it.
func (t *task) fits(n int) bool {
	return (t.out.empty() || t.out.end-t.out.start+n <= t.batch) && t.out.claim(n)
}

// replyHead is the size in bytes of what precedes the data in a read's reply.
func (c *conn) replyHead() int {
	if c.negotiated.StructuredReplies {
		return c.negotiated.ChunkHeaderSize() + protocol.OffsetDataSize
	}
	return protocol.SimpleReplySize
}

// run makes the call. payload is what a write brought. Nothing is sent here, and
// of the batch only the reserved room is touched: see watch.go.
func (t *task) run(payload []byte) {
	s, req := t.c.session, &t.req
	t.filled, t.failedAt = 0, 0
	t.call.Request = backend.Request{Command: req.Type.String(), Cookie: req.Cookie}
	flags := backend.Flags(0)
	if req.Flags&protocol.CmdFlagFUA != 0 {
		flags |= backend.FUA
	}
	switch req.Type {
	case protocol.CmdRead:
		t.err = nil
		if !t.sparse || !t.readSparse() {
			from := t.at + t.c.replyHead()
			data := t.out.buf.B[from : from+int(req.Length)]
			if t.err = s.Pread(&t.call, data, req.Offset); t.err == nil && t.c.mayHaveHoles(req) && allZero(data) {
				t.hole()
			}
		}
	case protocol.CmdWrite:
		t.err = s.Pwrite(&t.call, payload, req.Offset, flags)
	case protocol.CmdFlush:
		t.err = s.Flush(&t.call)
	case protocol.CmdTrim:
		t.err = t.split(func(n uint32, off uint64) error { return s.Trim(&t.call, n, off, flags) })
	case protocol.CmdCache:
		t.err = t.split(func(n uint32, off uint64) error { return s.Cache(&t.call, n, off) })
	case protocol.CmdWriteZeroes:
		if req.Flags&protocol.CmdFlagNoHole == 0 {
			flags |= backend.MayTrim
		}
		if req.Flags&protocol.CmdFlagFastZero != 0 {
			flags |= backend.FastZero
		}
		t.err = t.split(func(n uint32, off uint64) error { return s.Zero(&t.call, n, off, flags) })
	case protocol.CmdBlockStatus:
		flags = 0 // FUA means nothing here
		if req.Flags&protocol.CmdFlagReqOne != 0 {
			flags = backend.ReqOne
		}
		t.err = t.queryStatus(flags)
	}
}

// piece32 is how much of n bytes one call is asked for. All but the last piece of
// a longer request are multiples of 64 KiB, so that they stay aligned as it was.
func piece32(n uint64) uint32 {
	if n <= math.MaxUint32 {
		return uint32(n)
	}
	return math.MaxUint32 &^ (64<<10 - 1)
}

// split makes as many calls as the request needs: a module is asked for less than
// 4 GiB at a time, and one client's huge request must not keep others out.
func (t *task) split(call func(n uint32, off uint64) error) error {
	off, left := t.req.Offset, t.req.Length
	for {
		n := piece32(left)
		if err := call(n, off); err != nil {
			if off > t.req.Offset {
				t.failedAt = off
			}
			return err
		}
		off += uint64(n)
		if left -= uint64(n); left == 0 {
			return nil
		}
		if err := t.pause(); err != nil {
			t.failedAt = off
			return err
		}
	}
}

// pause lets others go first between two calls for one request. It fails where
// there is no point in going on.
func (t *task) pause() error {
	if t.c.gone() || t.c.s.quitting() {
		return &protocol.RequestError{Command: t.req.Type, Errno: protocol.ESHUTDOWN,
			Msg: "the server is shutting down; only a part was done"}
	}
	t.endTurn()
	t.takeTurn()
	return nil
}

// finish adds the reply to the batch. An error means that there is no memory for
// it.
func (t *task) finish() error {
	t.count()
	t.report(t.failure())
	t.call.Request = backend.Request{}
	if err := t.reply(); err != nil {
		t.c.giveBack(&t.held)
		return err
	}
	t.out.held.add(&t.held)
	return nil
}

func (t *task) reply() error {
	switch {
	case t.err != nil:
		return t.refuse()
	case t.req.Type == protocol.CmdRead:
		t.finishRead()
		if t.tail == nil {
			return nil
		}
		end := t.req.Offset + t.req.Length
		return t.fail(&protocol.ErrorChunk{Type: protocol.ReplyErrorOffset,
			Errno: protocol.ErrnoFor(t.tail, t.req.Flags), Msg: errorText(t.tail), Offset: end})
	case t.req.Type == protocol.CmdBlockStatus:
		return t.finishStatus()
	}
	return t.succeed()
}

// done marks the last chunk of what was read, where no error follows it.
func (t *task) done() protocol.ReplyFlags {
	if t.tail != nil {
		return 0
	}
	return protocol.ReplyFlagDone
}

// finishRead puts the header before the data, which lies in its place.
func (t *task) finishRead() {
	if t.filled > 0 {
		t.out.end = t.filled
		return
	}
	b := t.out.buf.B[:t.at]
	if t.c.negotiated.StructuredReplies {
		h := protocol.ChunkHeader{Cookie: t.req.Cookie, Offset: t.req.Offset, Flags: t.done(),
			Type: protocol.ReplyOffsetData, Length: protocol.OffsetDataSize + t.req.Length}
		o := protocol.OffsetData{Offset: t.req.Offset}
		b = o.AppendTo(t.c.negotiated.AppendChunk(b, &h))
	} else {
		h := protocol.SimpleReply{Cookie: t.req.Cookie}
		b = h.AppendTo(b)
	}
	t.out.end = len(b) + int(t.req.Length)
}

// succeed replies without data.
func (t *task) succeed() error {
	if !t.c.negotiated.ExtendedHeaders {
		return t.simple(0)
	}
	b, err := t.chunk(protocol.ReplyNone, 0)
	if err == nil {
		t.out.end = len(b)
	}
	return err
}

func (t *task) simple(errno protocol.Errno) error {
	if err := t.room(protocol.SimpleReplySize); err != nil {
		return err
	}
	h := protocol.SimpleReply{Cookie: t.req.Cookie, Errno: errno}
	t.out.end = len(h.AppendTo(t.out.buf.B[:t.out.end]))
	return nil
}

// chunk starts the last chunk of a structured reply, with n bytes of data.
func (t *task) chunk(typ protocol.ReplyType, n int) ([]byte, error) {
	if err := t.room(t.c.negotiated.ChunkHeaderSize() + n); err != nil {
		return nil, err
	}
	h := protocol.ChunkHeader{Cookie: t.req.Cookie, Offset: t.req.Offset, Flags: protocol.ReplyFlagDone, Type: typ, Length: uint64(n)}
	return t.c.negotiated.AppendChunk(t.out.buf.B[:t.out.end], &h), nil
}

// refuse replies with t.err. Where structured replies were negotiated the text
// of the error goes to the client as well.
func (t *task) refuse() error {
	errno := protocol.ErrnoFor(t.err, t.req.Flags)
	if !t.c.negotiated.StructuredReplies {
		return t.simple(errno)
	}
	e := protocol.ErrorChunk{Type: protocol.ReplyError, Errno: errno, Msg: errorText(t.err)}
	if t.failedAt > 0 {
		e.Type, e.Offset = protocol.ReplyErrorOffset, t.failedAt
		t.failedAt = 0 // the next request may be refused without a call
	}
	return t.fail(&e)
}

// fail ends a structured reply with an error.
func (t *task) fail(e *protocol.ErrorChunk) error {
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
