package client

import (
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"slices"
	"sync"

	"golang.org/x/sys/unix"

	"nbdhost/protocol"
)

const (
	// receiveSize is how much is received at a time, unless it goes to the caller's
	// memory.
	receiveSize = 256 << 10
	// directSize is how much of a read's data must be missing for it to be received
	// into the caller's memory, instead of copied there.
	directSize = 16 << 10
	// maxErrorLength bounds an error chunk's data in bytes: a text and room for
	// what an unknown type of error may add.
	maxErrorLength = 64 << 10
)

// buffers are what is received into; an idle connection of a socket has none, unless it is
// Blocking.
var buffers = sync.Pool{New: func() any { return new([receiveSize]byte) }}

// receiver is the receiving goroutine's state: it takes what the socket holds, goes
// through all replies in it, and sends the requests that were issued meanwhile
// before it waits for more.
type receiver struct {
	*Conn
	buf        *[receiveSize]byte // or nil
	start, end int                // what is in hand: buf[start:end]
	large      []byte             // for what is decoded at once and longer than buf
	status     protocol.BlockStatus

	more, fillIn func(fd uintptr) bool // tryMore, tryDirect
	quiet        bool                  // nothing is in flight
	cmd          *command              // whose data tryDirect receives,
	from, to     uint64                // which part of it,
	n            int                   // how much it or tryMore got
	err          error
}

func newReceiver(c *Conn, early []byte) *receiver {
	r := &receiver{Conn: c}
	r.more, r.fillIn = r.tryMore, r.tryDirect
	if len(early) > 0 {
		r.buf = buffers.Get().(*[receiveSize]byte)
		r.end = copy(r.buf[:], early)
	}
	return r
}

// receive is the receiving goroutine, which ends the connection.
func (c *Conn) receive() {
	r := c.in
	c.mu.Lock()
	c.awake = true
	c.mu.Unlock()
	var err error
	for err == nil {
		err = r.next()
	}
	c.mu.Lock()
	asked := c.leaving && len(c.queue) == 0 && c.pending == 0
	c.awake = false
	c.mu.Unlock()
	if errors.Is(err, io.EOF) && asked {
		c.fail(errGone)
	} else {
		c.fail(fmt.Errorf("%w: read reply: %w", ErrDisconnected, err))
	}
	r.letGo()
	c.finish()
}

// letGo gives the buffer back.
func (r *receiver) letGo() {
	if r.buf != nil {
		buffers.Put(r.buf)
		r.buf, r.start, r.end = nil, 0, 0
	}
}

// rest sends what was issued, before the receiver waits.
func (r *receiver) rest() {
	c := r.Conn
	c.mu.Lock()
	c.awake = false
	r.quiet = c.pending == 0
	if r.quiet && !c.sending && cap(c.out.head) > keptSize {
		c.out.head = nil
	}
	if r.quiet && r.large != nil { // of an answer that was very long
		r.large, r.status.Descriptors = nil, nil
	}
	if len(c.queue) == 0 || c.sending {
		c.mu.Unlock()
		return
	}
	c.sending = true
	if c.link.fd >= 0 && c.due <= owedSize {
		// This thread may wait: the server can send all its replies without our
		// help, so it will read.
		c.mu.Unlock()
		c.sendAll()
		return
	}
	if !c.mayWrite() {
		c.mu.Unlock()
		go c.drainFunc()
		return
	}
	c.fill()
	c.mu.Unlock()
	c.flush(true)
}

func (r *receiver) wakeUp() {
	r.mu.Lock()
	r.awake = true
	r.mu.Unlock()
}

// receiveMore receives at least a byte behind what is in hand.
func (r *receiver) receiveMore() error {
	r.rest()
	defer r.wakeUp()
	if r.start == r.end {
		r.start, r.end = 0, 0
	}
	var err error
	if r.link.direct() {
		if err = r.link.read(r.more, false); err == nil {
			err = r.err
		}
	} else {
		r.n, err = r.link.nc.Read(r.room())
		if r.n > 0 {
			err = nil
		}
	}
	if err != nil {
		return err
	}
	if r.n == 0 {
		return io.EOF
	}
	r.end += r.n
	return nil
}

// room is where to receive.
func (r *receiver) room() []byte {
	if r.buf == nil {
		r.buf = buffers.Get().(*[receiveSize]byte)
	}
	return r.buf[r.end:]
}

// tryMore receives once; false means that nothing is there. An idle connection gives
// its buffer back before it waits.
func (r *receiver) tryMore(fd uintptr) bool {
	for {
		r.n, r.err = unix.Read(int(fd), r.room())
		switch r.err {
		case unix.EINTR:
			continue
		case unix.EAGAIN:
			if r.quiet && r.start == r.end {
				r.letGo()
			}
			return false
		case nil:
		default:
			r.err = os.NewSyscallError("receive", r.err)
		}
		return true
	}
}

// tryDirect receives once into the data of r.cmd, and what comes behind into the
// buffer, of which nothing is in hand.
func (r *receiver) tryDirect(fd uintptr) bool {
	for {
		r.use.Lock()
		if r.cmd.gone {
			r.use.Unlock()
			return r.tryMore(fd)
		}
		pieces := [2][]byte{r.cmd.data[r.from:r.to], r.room()}
		r.n, r.err = unix.Readv(int(fd), pieces[:])
		if r.n > 0 {
			n := min(uint64(r.n), r.to-r.from)
			r.from += n
			r.n -= int(n)
			r.use.Unlock()
			return true
		}
		r.use.Unlock()
		switch r.err {
		case unix.EINTR:
			continue
		case unix.EAGAIN:
			return false
		case nil:
		default:
			r.err = os.NewSyscallError("receive", r.err)
		}
		return true
	}
}

// data receives bytes from up to to of a read's data.
func (r *receiver) data(cmd *command, from, to uint64) error {
	for {
		if n := min(uint64(r.end-r.start), to-from); n > 0 {
			r.use.Lock()
			if !cmd.gone {
				copy(cmd.data[from:], r.buf[r.start:r.start+int(n)])
			}
			r.use.Unlock()
			r.start += int(n)
			from += n
		}
		switch {
		case from == to:
			return nil
		case to-from < directSize || !r.link.direct():
			if err := r.receiveMore(); err != nil {
				return unexpectedEnd(err)
			}
			continue
		}
		r.rest()
		r.cmd, r.from, r.to = cmd, from, to
		r.start, r.end = 0, 0
		err := r.link.read(r.fillIn, true)
		if err == nil {
			err = r.err
		}
		r.wakeUp()
		if err == nil && r.from == from && r.n == 0 {
			err = io.ErrUnexpectedEOF
		}
		from, r.end, r.cmd = r.from, r.n, nil
		if err != nil {
			return err
		}
	}
}

// need waits until n bytes are in hand and returns them; they are valid until the
// next call. It returns io.EOF only at the end of the stream.
func (r *receiver) need(n int) ([]byte, error) {
	if n > receiveSize {
		return r.needLarge(n)
	}
	for r.end-r.start < n {
		if r.start+n > receiveSize {
			r.end = copy(r.buf[:], r.buf[r.start:r.end])
			r.start = 0
		}
		some := r.end > r.start
		if err := r.receiveMore(); err != nil {
			if some {
				err = unexpectedEnd(err)
			}
			return nil, err
		}
	}
	if n == 0 {
		return nil, nil
	}
	b := r.buf[r.start : r.start+n]
	r.start += n
	return b, nil
}

func (r *receiver) needLarge(n int) ([]byte, error) {
	if cap(r.large) < n {
		r.large = make([]byte, n)
	}
	b := r.large[:n]
	for have := 0; have < n; {
		if r.start == r.end {
			if err := r.receiveMore(); err != nil {
				return nil, err
			}
		}
		k := copy(b[have:], r.buf[r.start:r.end])
		r.start += k
		have += k
	}
	return b, nil
}

func unexpectedEnd(err error) error {
	if err == io.EOF {
		return io.ErrUnexpectedEOF
	}
	return err
}

// next takes one message. Its error ends the connection, and is io.EOF only
// between two messages.
func (r *receiver) next() error {
	magic, err := r.need(4)
	if err != nil {
		return err
	}
	kind, ok := protocol.ReplyMagic(magic)
	if !ok || r.extended != (kind == protocol.KindExtendedChunk) {
		return fmt.Errorf("got %#x, need the magic number of the replies that were negotiated", magic)
	}
	r.start -= len(magic)
	header, err := r.need(kind.HeaderSize())
	if err != nil {
		return err
	}
	if kind == protocol.KindSimple {
		var s protocol.SimpleReply
		if err := s.Decode(header); err != nil {
			return err
		}
		return r.simple(&s)
	}
	var h protocol.ChunkHeader
	if kind == protocol.KindChunk {
		err = h.Decode(header)
	} else {
		err = h.DecodeExtended(header)
	}
	if err != nil {
		return err
	}
	return r.chunk(&h)
}

// payload receives n bytes.
func (r *receiver) payload(n, limit uint64, what fmt.Stringer) ([]byte, error) {
	if n > limit {
		return nil, fmt.Errorf("got %v of %d bytes, need at most %d", what, n, limit)
	}
	b, err := r.need(int(n))
	return b, unexpectedEnd(err)
}

// inFlight looks a command in flight up.
func (r *receiver) inFlight(cookie uint64) (*command, error) {
	r.mu.Lock()
	cmd := r.find(cookie)
	if cmd == nil || cmd.replied || cmd.queued {
		cmd = nil
	}
	r.mu.Unlock()
	if cmd == nil {
		return nil, fmt.Errorf("got a reply with cookie %d, which no command in flight has", cookie)
	}
	return cmd, nil
}

// tell calls what came with a command, unless that was cancelled.
func (r *receiver) tell(cmd *command, f func()) {
	r.use.Lock()
	defer r.use.Unlock()
	if !cmd.gone {
		f()
	}
}

func (r *receiver) simple(s *protocol.SimpleReply) error {
	cmd, err := r.inFlight(s.Cookie)
	if err != nil {
		return err
	}
	t := cmd.request.Type
	if r.structured && (t == protocol.CmdRead || t == protocol.CmdBlockStatus && s.Errno == 0) {
		return fmt.Errorf("got a simple reply to %v, need a structured one", t)
	}
	if cmd.failure != nil || cmd.received > 0 || len(cmd.statuses) > 0 {
		return fmt.Errorf("got a simple reply to %v within a structured one", t)
	}
	if s.Errno != 0 {
		failed := &Error{Command: t, Errno: s.Errno}
		r.tell(cmd, func() { cmd.told(Chunk{Type: protocol.ReplyError, Err: failed}) })
		r.reply(cmd, failed)
		return nil
	}
	if t == protocol.CmdRead {
		n := cmd.request.Length
		if err := r.data(cmd, 0, n); err != nil {
			return err
		}
		r.tell(cmd, func() { cmd.told(Chunk{Type: protocol.ReplyOffsetData, Offset: cmd.request.Offset, Data: cmd.data}) })
	}
	r.reply(cmd, cmd.refusal)
	return nil
}

func (r *receiver) chunk(h *protocol.ChunkHeader) error {
	if !r.structured {
		return fmt.Errorf("got %v, although structured replies were not negotiated", h.Type)
	}
	cmd, err := r.inFlight(h.Cookie)
	if err != nil {
		return err
	}
	if r.extended && h.Offset != cmd.request.Offset {
		return fmt.Errorf("got a reply for offset %d to %v at %d", h.Offset, cmd.request.Type, cmd.request.Offset)
	}
	done := h.Flags&protocol.ReplyFlagDone != 0
	switch {
	case h.Type == protocol.ReplyNone:
		if h.Length != 0 || !done {
			return fmt.Errorf("got %v of %d bytes with flags %v, need 0 bytes and NBD_REPLY_FLAG_DONE", h.Type, h.Length, h.Flags)
		}
	case h.Type == protocol.ReplyOffsetData && cmd.request.Type == protocol.CmdRead:
		err = r.offsetData(cmd, h)
	case h.Type == protocol.ReplyOffsetHole && cmd.request.Type == protocol.CmdRead:
		err = r.offsetHole(cmd, h)
	case cmd.request.Type == protocol.CmdBlockStatus && (h.Type == protocol.ReplyBlockStatus || h.Type == protocol.ReplyBlockStatusExt && r.extended):
		err = r.blockStatus(cmd, h)
	case h.Type.IsError():
		err = r.errorChunk(cmd, h)
	default:
		err = fmt.Errorf("got %v in reply to %v", h.Type, cmd.request.Type)
	}
	if err != nil || !done {
		return err
	}
	if cmd.failure != nil {
		r.reply(cmd, cmd.failure)
		return nil
	}
	switch cmd.request.Type {
	case protocol.CmdRead:
		err = cmd.whole()
	case protocol.CmdBlockStatus:
		need := len(cmd.only)
		if cmd.only == nil {
			need = len(r.contexts)
		}
		if len(cmd.statuses) != need {
			err = fmt.Errorf("got block status of %d contexts in a reply without error, need %d", len(cmd.statuses), need)
		}
	}
	if err == nil {
		r.reply(cmd, cmd.refusal)
	}
	return err
}

// told tells ChunkFunc of a chunk, if there is one. It is for tell: a cancelled command has lost it.
func (cmd *command) told(chunk Chunk) {
	if cmd.chunk == nil {
		return
	}
	if err := cmd.chunk(chunk); cmd.refusal == nil {
		cmd.refusal = err
	}
}

// place finds where in a read's buffer n bytes at off of the export belong.
func (cmd *command) place(off, n uint64) (from, to uint64, err error) {
	start, size := off-cmd.request.Offset, cmd.request.Length
	if off < cmd.request.Offset || start > size || n > size-start || n > size-cmd.received {
		return 0, 0, fmt.Errorf("got %d bytes at %d in reply to a read of %d at %d, of which %d had come", n, off, size, cmd.request.Offset, cmd.received)
	}
	if cmd.request.Flags&protocol.CmdFlagDF != 0 && len(cmd.parts) > 0 {
		return 0, 0, fmt.Errorf("got a second piece in reply to a read with %v", protocol.CmdFlagDF)
	}
	cmd.parts = append(cmd.parts, part{start, start + n})
	cmd.received += n
	return start, start + n, nil
}

// whole checks that the parts of a read cover its buffer, each byte once.
func (cmd *command) whole() error {
	slices.SortFunc(cmd.parts, func(a, b part) int {
		if a.start < b.start {
			return -1
		}
		return 1
	})
	var end uint64
	for _, p := range cmd.parts {
		if p.start != end {
			return fmt.Errorf("got pieces of a read that do not join at byte %d", end)
		}
		end = p.end
	}
	if end != cmd.request.Length {
		return fmt.Errorf("got %d bytes of a read, need %d", end, cmd.request.Length)
	}
	return nil
}

func (r *receiver) offsetData(cmd *command, h *protocol.ChunkHeader) error {
	if h.Length <= protocol.OffsetDataSize {
		return fmt.Errorf("got %v of %d bytes, need more than %d", h.Type, h.Length, protocol.OffsetDataSize)
	}
	b, err := r.payload(protocol.OffsetDataSize, protocol.OffsetDataSize, h.Type)
	if err != nil {
		return err
	}
	var o protocol.OffsetData
	if err := o.Decode(b); err != nil {
		return err
	}
	from, to, err := cmd.place(o.Offset, h.Length-protocol.OffsetDataSize)
	if err != nil {
		return err
	}
	if err := r.data(cmd, from, to); err != nil {
		return err
	}
	r.tell(cmd, func() { cmd.told(Chunk{Type: h.Type, Offset: o.Offset, Data: cmd.data[from:to]}) })
	return nil
}

func (r *receiver) offsetHole(cmd *command, h *protocol.ChunkHeader) error {
	b, err := r.payload(h.Length, protocol.OffsetHoleSize, h.Type)
	if err != nil {
		return err
	}
	var o protocol.OffsetHole
	if err := o.Decode(b); err != nil {
		return err
	}
	from, to, err := cmd.place(o.Offset, uint64(o.Length))
	if err != nil {
		return err
	}
	r.tell(cmd, func() {
		clear(cmd.data[from:to])
		cmd.told(Chunk{Type: h.Type, Offset: o.Offset, Data: cmd.data[from:to]})
	})
	return nil
}

func (r *receiver) blockStatus(cmd *command, h *protocol.ChunkHeader) error {
	decode, limit := r.status.Decode, uint64(4+8*protocol.MaxExtents)
	if h.Type == protocol.ReplyBlockStatusExt {
		decode, limit = r.status.DecodeExtended, 8+16*protocol.MaxExtents
	}
	b, err := r.payload(h.Length, limit, h.Type)
	if err != nil {
		return err
	}
	if err := decode(b); err != nil {
		return err
	}
	name, ok := r.contexts[r.status.ContextID]
	if cmd.only != nil && !slices.Contains(cmd.only, r.status.ContextID) {
		ok = false
	}
	if !ok || slices.Contains(cmd.statuses, r.status.ContextID) {
		return fmt.Errorf("got block status of context %d, which was not selected or had come already", r.status.ContextID)
	}
	cmd.statuses = append(cmd.statuses, r.status.ContextID)
	// All but the last run must start within the request.
	var sum uint64
	for i := range r.status.Descriptors {
		if sum >= cmd.asked {
			return fmt.Errorf("got block status of %d runs, of which number %d is past the %d bytes asked for", len(r.status.Descriptors), i, cmd.asked)
		}
		sum += min(r.status.Descriptors[i].Length, math.MaxUint64-sum)
	}
	if cmd.request.Flags&protocol.CmdFlagReqOne != 0 && (len(r.status.Descriptors) != 1 || sum > cmd.asked) {
		return fmt.Errorf("got block status of %d runs and %d bytes, need one run of at most %d with %v", len(r.status.Descriptors), sum, cmd.asked, protocol.CmdFlagReqOne)
	}
	r.tell(cmd, func() {
		if cmd.extents != nil {
			cmd.extents(name, cmd.request.Offset, r.status.Descriptors)
		}
	})
	return nil
}

func (r *receiver) errorChunk(cmd *command, h *protocol.ChunkHeader) error {
	b, err := r.payload(h.Length, maxErrorLength, h.Type)
	if err != nil {
		return err
	}
	e := protocol.ErrorChunk{Type: h.Type}
	if err := e.Decode(b); err != nil {
		return err
	}
	failed := &Error{Command: cmd.request.Type, Errno: e.Errno, Msg: e.Msg}
	if cmd.failure == nil {
		cmd.failure = failed
	}
	r.tell(cmd, func() { cmd.told(Chunk{Type: h.Type, Offset: e.Offset, Err: failed}) })
	return nil
}
