package client

import (
	"errors"
	"fmt"
	"io"
	"net"
	"slices"

	"nbdhost/protocol"
)

// maxErrorLength bounds an error chunk's data in bytes: a text and room for
// what an unknown type of error may add.
const maxErrorLength = 64 << 10

// send is the sender: it writes what is queued, all at once, until the
// connection ends.
func (c *Conn) send() {
	defer c.running.Done()
	for {
		select {
		case <-c.wake:
		case <-c.broken:
			return
		}
		c.mu.Lock()
		batch := c.queue
		c.queue = nil
		c.mu.Unlock()
		if err := c.write(batch); err != nil {
			c.fail(fmt.Errorf("%w: write requests: %w", ErrDisconnected, err))
			return
		}
		c.release(batch)
	}
}

// write sends requests, and the data of writes from where it is.
func (c *Conn) write(batch []*command) error {
	// headers must not grow: out holds parts of it.
	headers := make([]byte, 0, len(batch)*protocol.ExtendedRequestSize)
	var out net.Buffers
	start := 0
	for _, cmd := range batch {
		if c.extended {
			headers = cmd.request.AppendExtendedTo(headers)
		} else {
			headers = cmd.request.AppendTo(headers)
		}
		if cmd.request.PayloadLength(c.extended) > 0 {
			out = append(out, headers[start:], cmd.data)
			start = len(headers)
		}
	}
	if start < len(headers) {
		out = append(out, headers[start:])
	}
	_, err := out.WriteTo(c.nc)
	return err
}

// release marks writes as sent, and completes those that were already answered.
func (c *Conn) release(batch []*command) {
	var answered []*command
	c.mu.Lock()
	for _, cmd := range batch {
		if !cmd.sent && cmd.replied {
			answered = append(answered, cmd)
		}
		cmd.sent = true
	}
	c.mu.Unlock()
	for _, cmd := range answered {
		c.complete(cmd, cmd.result)
	}
}

// receive is the receiver: it takes replies until the connection ends.
func (c *Conn) receive() {
	defer c.running.Done()
	r := receiver{Conn: c}
	for {
		err := r.next()
		if err == nil {
			continue
		}
		c.mu.Lock()
		asked := c.leaving && len(c.queue) == 0 && !c.pending()
		c.mu.Unlock()
		if errors.Is(err, io.EOF) && asked {
			c.fail(errGone)
		} else {
			c.fail(fmt.Errorf("%w: read reply: %w", ErrDisconnected, err))
		}
		return
	}
}

// pending tells whether a command has no complete reply yet. The caller holds mu.
func (c *Conn) pending() bool {
	for _, cmd := range c.commands {
		if !cmd.replied {
			return true
		}
	}
	return false
}

// receiver is the receiving goroutine's state.
type receiver struct {
	*Conn
	header [protocol.ExtendedChunkHeaderSize]byte
	buf    []byte // reused for what is decoded at once
	status protocol.BlockStatus
}

// next takes one message. Its error ends the connection, and is io.EOF only
// between two messages.
func (r *receiver) next() error {
	magic := r.header[:4]
	if _, err := io.ReadFull(r.in, magic); err != nil {
		return err
	}
	kind, ok := protocol.ReplyMagic(magic)
	if !ok || r.extended != (kind == protocol.KindExtendedChunk) {
		return fmt.Errorf("got %#x, need the magic number of the replies that were negotiated", magic)
	}
	header := r.header[:kind.HeaderSize()]
	if err := r.full(header[4:]); err != nil {
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
		if err := h.Decode(header); err != nil {
			return err
		}
	} else if err := h.DecodeExtended(header); err != nil {
		return err
	}
	return r.chunk(&h)
}

// full reads all of b, which cannot be the end of the stream.
func (r *receiver) full(b []byte) error {
	_, err := io.ReadFull(r.in, b)
	if err == io.EOF && len(b) > 0 {
		err = io.ErrUnexpectedEOF
	}
	return err
}

// payload reads n bytes into the receiver's buffer.
func (r *receiver) payload(n, limit uint64, what fmt.Stringer) ([]byte, error) {
	if n > limit {
		return nil, fmt.Errorf("got %v of %d bytes, need at most %d", what, n, limit)
	}
	if uint64(cap(r.buf)) < n {
		r.buf = make([]byte, n)
	}
	b := r.buf[:n]
	return b, r.full(b)
}

// find looks a command in flight up.
func (r *receiver) find(cookie uint64) (*command, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if cmd, ok := r.commands[cookie]; ok && !cmd.replied {
		return cmd, nil
	}
	return nil, fmt.Errorf("got a reply with cookie %d, which no command in flight has", cookie)
}

func (r *receiver) simple(s *protocol.SimpleReply) error {
	cmd, err := r.find(s.Cookie)
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
		r.reply(cmd, &Error{Command: t, Errno: s.Errno})
		return nil
	}
	if t == protocol.CmdRead {
		if err := r.full(cmd.data); err != nil {
			return err
		}
	}
	r.reply(cmd, nil)
	return nil
}

func (r *receiver) chunk(h *protocol.ChunkHeader) error {
	if !r.structured {
		return fmt.Errorf("got %v, although structured replies were not negotiated", h.Type)
	}
	cmd, err := r.find(h.Cookie)
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
		r.reply(cmd, nil)
	}
	return err
}

// place finds where in a read's buffer n bytes at off of the export belong.
func (cmd *command) place(off, n uint64) ([]byte, error) {
	start, size := off-cmd.request.Offset, cmd.request.Length
	if off < cmd.request.Offset || start > size || n > size-start || n > size-cmd.received {
		return nil, fmt.Errorf("got %d bytes at %d in reply to a read of %d at %d, of which %d had come", n, off, size, cmd.request.Offset, cmd.received)
	}
	if cmd.request.Flags&protocol.CmdFlagDF != 0 && len(cmd.parts) > 0 {
		return nil, fmt.Errorf("got a second piece in reply to a read with %v", protocol.CmdFlagDF)
	}
	cmd.parts = append(cmd.parts, part{start, start + n})
	cmd.received += n
	return cmd.data[start : start+n], nil
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
	p, err := cmd.place(o.Offset, h.Length-protocol.OffsetDataSize)
	if err != nil {
		return err
	}
	return r.full(p)
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
	p, err := cmd.place(o.Offset, uint64(o.Length))
	if err != nil {
		return err
	}
	clear(p)
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
	if !ok || cmd.statuses[r.status.ContextID] {
		return fmt.Errorf("got block status of context %d, which was not selected or had come already", r.status.ContextID)
	}
	if cmd.statuses == nil {
		cmd.statuses = make(map[uint32]bool)
	}
	cmd.statuses[r.status.ContextID] = true
	// All but the last run must start within the request.
	var sum uint64
	for i := range r.status.Descriptors {
		if sum >= cmd.asked {
			return fmt.Errorf("got block status of %d runs, of which number %d is past the %d bytes asked for", len(r.status.Descriptors), i, cmd.asked)
		}
		sum += r.status.Descriptors[i].Length
	}
	if cmd.request.Flags&protocol.CmdFlagReqOne != 0 && (len(r.status.Descriptors) != 1 || sum > cmd.asked) {
		return fmt.Errorf("got block status of %d runs and %d bytes, need one run of at most %d with %v", len(r.status.Descriptors), sum, cmd.asked, protocol.CmdFlagReqOne)
	}
	if cmd.extents != nil {
		cmd.extents(name, cmd.request.Offset, r.status.Descriptors)
	}
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
	if cmd.failure == nil {
		cmd.failure = &Error{Command: cmd.request.Type, Errno: e.Errno, Msg: e.Msg}
	}
	return nil
}
