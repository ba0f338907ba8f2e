package client

import (
	"fmt"
	"math"
	"slices"

	"nbdhost/protocol"
)

// Error is a server's refusal or failure of a command.
type Error struct {
	Command protocol.Command
	Errno   protocol.Errno
	Msg     string // the server's words from a structured reply, may be empty
}

func (e *Error) Error() string {
	if e.Msg == "" {
		return fmt.Sprintf("%v: server replied %v", e.Command, e.Errno)
	}
	return fmt.Sprintf("%v: server replied %v: %s", e.Command, e.Errno, e.Msg)
}

// Unwrap gives the operating system's error, for errors.Is(err, syscall.EPERM).
func (e *Error) Unwrap() error { return e.Errno.Syscall() }

// Completion is told how a command ended: nil, an *Error from the server, or an
// error that wraps ErrDisconnected; of a command that AioCancel cancels, the cause
// given there. It returns 1 to retire the command, and 0 to leave that to
// AioCommandCompleted. A nil Completion leaves it as well.
type Completion func(err error) int

// ExtentFunc is told what one meta context says of consecutive runs from offset
// on. The slice is only valid during the call.
type ExtentFunc func(context string, offset uint64, runs []protocol.Descriptor)

// A Chunk is a part of the reply to a read. Without structured replies there is one,
// of all the data.
type Chunk struct {
	// Type is protocol.ReplyOffsetData, protocol.ReplyOffsetHole (which Data has
	// as zeroes), or that of an error, with neither Data nor, often, an Offset.
	Type   protocol.ReplyType
	Offset uint64 // in the export
	Data   []byte // the part of the read's buffer
	Err    *Error // of an error
}

// ChunkFunc is told what a chunk of a read's reply has brought. If it returns an
// error the command fails with the first such, unless the server reports one; the
// rest of the reply is received all the same.
type ChunkFunc func(Chunk) error

// command is one command from its issue to its retirement, after which it is used
// for another. Its request never changes once issued. The data of a write is the
// sender's until it is sent, that of a read the receiver's until the reply is whole.
type command struct {
	request    protocol.Request
	data       []byte   // what to write, or where to read to; the caller's
	asked      uint64   // bytes of the export that a block status is asked about
	only       []uint32 // the contexts that it is asked about; nil for all
	chunk      ChunkFunc
	extents    ExtentFunc
	completion Completion

	// The reply as it comes in; the receiver's.
	failure  *Error // the first error chunk
	refusal  error  // the first error of chunk
	parts    []part // of data that have come
	received uint64 // the sum of parts
	statuses []uint32

	gone bool // the receiver must not use what came with it; guarded by Conn.use

	// Guarded by Conn.mu.
	queued    bool // in Conn.queue
	sent      bool // the sender needs data no more; true at once of all but writes
	replied   bool // the reply is complete, or will never be
	claimed   bool // somebody runs the completion, or did
	completed bool // the completion has returned
	retired   bool // nobody may ask for the cookie any more
	result    error
}

// claim tells whether it is the caller who completes the command. The caller holds
// Conn.mu.
func (cmd *command) claim() bool {
	was := cmd.claimed
	cmd.claimed = true
	return !was
}

// part is a range of a read's buffer.
type part struct{ start, end uint64 }

// AioPread reads len(p) bytes at off into p. For the length see Calls.Pread.
func (c *Conn) AioPread(p []byte, off uint64, flags protocol.CommandFlags, completion Completion) (uint64, error) {
	return c.issue(command{request: protocol.Request{Type: protocol.CmdRead, Flags: flags, Offset: off, Length: uint64(len(p))}, data: p, completion: completion})
}

// AioPreadStructured is AioPread that tells chunk, in the order in which they come,
// what each part of the reply has brought, before the completion.
func (c *Conn) AioPreadStructured(p []byte, off uint64, flags protocol.CommandFlags, chunk ChunkFunc, completion Completion) (uint64, error) {
	return c.issue(command{request: protocol.Request{Type: protocol.CmdRead, Flags: flags, Offset: off, Length: uint64(len(p))}, data: p, chunk: chunk, completion: completion})
}

// AioPwrite writes p at off. For the length see Calls.Pread.
func (c *Conn) AioPwrite(p []byte, off uint64, flags protocol.CommandFlags, completion Completion) (uint64, error) {
	return c.issue(command{request: protocol.Request{Type: protocol.CmdWrite, Flags: flags, Offset: off, Length: uint64(len(p))}, data: p, completion: completion})
}

// AioFlush makes what was written and answered durable.
func (c *Conn) AioFlush(flags protocol.CommandFlags, completion Completion) (uint64, error) {
	return c.issue(command{request: protocol.Request{Type: protocol.CmdFlush, Flags: flags}, completion: completion})
}

// AioTrim discards count bytes at off: less than 4 GiB unless Extended.
func (c *Conn) AioTrim(count, off uint64, flags protocol.CommandFlags, completion Completion) (uint64, error) {
	return c.issue(command{request: protocol.Request{Type: protocol.CmdTrim, Flags: flags, Offset: off, Length: count}, completion: completion})
}

// AioZero writes count zeroes at off: less than 4 GiB unless Extended.
func (c *Conn) AioZero(count, off uint64, flags protocol.CommandFlags, completion Completion) (uint64, error) {
	return c.issue(command{request: protocol.Request{Type: protocol.CmdWriteZeroes, Flags: flags, Offset: off, Length: count}, completion: completion})
}

// AioCache prefetches count bytes at off into the server's cache: less than 4 GiB
// unless Extended.
func (c *Conn) AioCache(count, off uint64, flags protocol.CommandFlags, completion Completion) (uint64, error) {
	return c.issue(command{request: protocol.Request{Type: protocol.CmdCache, Flags: flags, Offset: off, Length: count}, completion: completion})
}

// AioBlockStatus asks what the selected meta contexts say of count bytes at off: less
// than 4 GiB unless Extended. extents is called once for each, before the completion.
func (c *Conn) AioBlockStatus(count, off uint64, flags protocol.CommandFlags, extents ExtentFunc, completion Completion) (uint64, error) {
	return c.issue(command{request: protocol.Request{Type: protocol.CmdBlockStatus, Flags: flags, Offset: off, Length: count}, extents: extents, completion: completion})
}

// AioBlockStatusOf is AioBlockStatus for some of the selected meta contexts only.
// It fails where the server does not have NBD_FLAG_BLOCK_STATUS_PAYLOAD, and for a
// context that was not selected.
func (c *Conn) AioBlockStatusOf(contexts []string, count, off uint64, flags protocol.CommandFlags, extents ExtentFunc, completion Completion) (uint64, error) {
	if c.export.Flags&protocol.FlagBlockStatusPayload == 0 {
		return 0, fmt.Errorf("issue %v: the export does not have %v", protocol.CmdBlockStatus, protocol.FlagBlockStatusPayload)
	}
	q := protocol.BlockStatusRequest{Length: count}
	for _, name := range contexts {
		id, ok := c.contextID(name)
		if !ok {
			return 0, fmt.Errorf("issue %v: got context %q, need one that was selected", protocol.CmdBlockStatus, name)
		}
		q.ContextIDs = append(q.ContextIDs, id)
	}
	return c.issue(command{
		request:    protocol.Request{Type: protocol.CmdBlockStatus, Flags: flags | protocol.CmdFlagPayloadLen, Offset: off, Length: uint64(q.WireSize())},
		data:       q.AppendTo(nil),
		asked:      count,
		only:       append([]uint32{}, q.ContextIDs...),
		extents:    extents,
		completion: completion,
	})
}

// AioCommandCompleted tells whether a command has completed, and if so how. It
// tells each command's result once: after that, and for a command that its
// completion retired, the cookie is unknown, which is an error with false.
func (c *Conn) AioCommandCompleted(cookie uint64) (bool, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	cmd := c.find(cookie)
	if cmd == nil || cmd.retired {
		return false, fmt.Errorf("look up command: got cookie %d, which no command has or which is retired", cookie)
	}
	if !cmd.completed {
		return false, nil
	}
	result := cmd.result
	cmd.retired = true
	c.release(cmd)
	return true, result
}

// AioCancel completes a command with cause, unless it has completed already or is
// about to, and then returns false. The completion runs within AioCancel, and after
// it the command's buffer and functions are the caller's again. What the server has
// read of the command it executes nevertheless, and its reply is dropped when it
// comes; a command that was not yet sent never is. AioCancel must not be called from
// a ChunkFunc or an ExtentFunc, of whatever command of the connection.
func (c *Conn) AioCancel(cookie uint64, cause error) bool {
	c.mu.Lock()
	cmd := c.find(cookie)
	if cmd == nil || !cmd.claim() {
		c.mu.Unlock()
		return false
	}
	cmd.result = cause
	c.completing++
	if cmd.queued {
		c.unqueue(cmd)
		cmd.sent = true
		c.answered(cmd)
		c.settled()
	}
	c.mu.Unlock()

	c.use.Lock()
	cmd.gone = true
	c.use.Unlock()
	c.out.use.Lock()
	if c.out.owner == cmd {
		c.out.tail = slices.Clone(c.out.tail)
	}
	c.out.use.Unlock()

	c.complete(cmd, cause)
	c.elsewhere()
	return true
}

// elsewhere counts a completion off that ran elsewhere than on the receiver.
func (c *Conn) elsewhere() {
	c.mu.Lock()
	c.completing--
	c.quiet.Broadcast()
	c.mu.Unlock()
}

// find looks a cookie up. The caller holds mu.
func (c *Conn) find(cookie uint64) *command {
	if cmd := c.slots[cookie&uint64(len(c.slots)-1)]; cmd != nil && cmd.request.Cookie == cookie {
		return cmd
	}
	return nil
}

// insert gives a command a cookie and a slot. Numbers whose slot is taken, by a
// command that takes long, are passed over. The caller holds mu.
func (c *Conn) insert(cmd *command) {
	if 2*c.used >= len(c.slots) {
		old := c.slots
		c.slots = make([]*command, 2*len(old))
		for _, other := range old {
			if other != nil {
				c.slots[other.request.Cookie&uint64(len(c.slots)-1)] = other
			}
		}
	}
	for {
		c.cookie++
		if slot := &c.slots[c.cookie&uint64(len(c.slots)-1)]; *slot == nil {
			*slot = cmd
			break
		}
	}
	c.used++
	cmd.request.Cookie = c.cookie
}

// release frees the slot of a command that nobody asks for any more, in either
// direction. The caller holds mu.
func (c *Conn) release(cmd *command) {
	if cmd.completed && cmd.retired && cmd.replied && cmd.sent {
		c.slots[cmd.request.Cookie&uint64(len(c.slots)-1)] = nil
		c.used--
		c.idle = append(c.idle, cmd)
	}
}

// answered notes that no reply to the command will come any more. The caller holds
// mu.
func (c *Conn) answered(cmd *command) {
	cmd.replied = true
	c.pending--
	c.owed -= c.wireSize(&cmd.request)
	c.due -= replySize(&cmd.request)
}

// issue queues a command. If it fails nothing was issued, and the completion is
// never called.
func (c *Conn) issue(cmd command) (uint64, error) {
	switch {
	case cmd.request.Type == protocol.CmdWrite && c.extended:
		cmd.request.Flags |= protocol.CmdFlagPayloadLen
	case c.extended && cmd.only == nil && cmd.request.Flags&protocol.CmdFlagPayloadLen != 0:
		return 0, fmt.Errorf("issue %v: got %v, but there is no payload", cmd.request.Type, protocol.CmdFlagPayloadLen)
	}
	if cmd.only == nil {
		cmd.asked = cmd.request.Length
	}
	if !c.extended && cmd.request.Length > math.MaxUint32 {
		return 0, fmt.Errorf("issue %v: got length %d, need at most %d without extended headers; split the command", cmd.request.Type, cmd.request.Length, uint32(math.MaxUint32))
	}
	if err := c.strict.refuse(c, &cmd); err != nil {
		return 0, err
	}
	cmd.sent = cmd.request.PayloadLength(c.extended) == 0
	cmd.queued = true

	c.mu.Lock()
	if err := c.err; err != nil || c.leaving {
		c.mu.Unlock()
		if err == nil {
			err = fmt.Errorf("disconnect was called: %w", ErrDisconnected)
		}
		return 0, fmt.Errorf("issue %v: %w", cmd.request.Type, err)
	}
	var p *command
	if n := len(c.idle); n > 0 {
		p, c.idle = c.idle[n-1], c.idle[:n-1]
		cmd.parts, cmd.statuses = p.parts[:0], p.statuses[:0]
	} else {
		p = new(command)
	}
	*p = cmd
	c.insert(p)
	cookie := p.request.Cookie
	c.pending++
	c.owed += c.wireSize(&p.request)
	c.due += replySize(&p.request)
	c.enqueue(p)
	c.kick()
	return cookie, nil
}

// reply completes a command once its reply is whole and its data is sent,
// whichever comes last: a server may refuse a write before it has read it.
func (c *Conn) reply(cmd *command, result error) {
	c.mu.Lock()
	if !cmd.claimed {
		cmd.result = result
	}
	mine := cmd.sent && cmd.claim()
	c.answered(cmd)
	if !mine {
		c.release(cmd)
	}
	if c.leaving {
		c.settled()
	}
	c.mu.Unlock()
	if mine {
		c.complete(cmd, result)
	}
}

// complete calls the completion and retires the command if that says so. Only who
// has claimed the command calls it.
func (c *Conn) complete(cmd *command, result error) {
	retire := 0
	if cmd.completion != nil {
		retire = cmd.completion(result)
	}
	c.mu.Lock()
	cmd.completed = true
	cmd.data, cmd.completion, cmd.extents, cmd.chunk = nil, nil, nil, nil
	if retire == 1 {
		cmd.retired = true
		c.release(cmd)
	}
	c.mu.Unlock()
}
