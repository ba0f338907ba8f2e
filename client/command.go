package client

import (
	"fmt"
	"math"

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
// error that wraps ErrDisconnected. It returns 1 to retire the command, and 0
// to leave that to AioCommandCompleted.
type Completion func(err error) int

// ExtentFunc is told what one meta context says of consecutive runs from offset
// on. The slice is only valid during the call.
type ExtentFunc func(context string, offset uint64, runs []protocol.Descriptor)

// command is one command from its issue to its retirement. Its request never
// changes once issued. The data of a write is the sender's until it is sent,
// that of a read the receiver's until the reply is whole. The fields from sent
// on are guarded by Conn.mu.
type command struct {
	request    protocol.Request
	data       []byte   // what to write, or where to read to; the caller's
	asked      uint64   // bytes of the export that a block status is asked about
	only       []uint32 // the contexts that it is asked about; nil for all
	extents    ExtentFunc
	completion Completion

	// The reply as it comes in; the receiver's.
	failure  *Error // the first error chunk
	parts    []part // of data that have come
	received uint64 // the sum of parts
	statuses map[uint32]bool

	sent      bool // the sender needs data no more; true at once of all but writes
	replied   bool // the reply is complete, result says how
	completed bool // the completion has returned
	result    error
}

// part is a range of a read's buffer.
type part struct{ start, end uint64 }

// AioPread reads len(p) bytes at off into p.
func (c *Conn) AioPread(p []byte, off uint64, flags protocol.CommandFlags, completion Completion) (uint64, error) {
	return c.issue(&command{request: protocol.Request{Type: protocol.CmdRead, Flags: flags, Offset: off, Length: uint64(len(p))}, data: p, completion: completion})
}

// AioPwrite writes p at off.
func (c *Conn) AioPwrite(p []byte, off uint64, flags protocol.CommandFlags, completion Completion) (uint64, error) {
	return c.issue(&command{request: protocol.Request{Type: protocol.CmdWrite, Flags: flags, Offset: off, Length: uint64(len(p))}, data: p, completion: completion})
}

// AioFlush makes what was written and answered durable.
func (c *Conn) AioFlush(flags protocol.CommandFlags, completion Completion) (uint64, error) {
	return c.issue(&command{request: protocol.Request{Type: protocol.CmdFlush, Flags: flags}, completion: completion})
}

// AioTrim discards count bytes at off.
func (c *Conn) AioTrim(count, off uint64, flags protocol.CommandFlags, completion Completion) (uint64, error) {
	return c.issue(&command{request: protocol.Request{Type: protocol.CmdTrim, Flags: flags, Offset: off, Length: count}, completion: completion})
}

// AioZero writes count zeroes at off.
func (c *Conn) AioZero(count, off uint64, flags protocol.CommandFlags, completion Completion) (uint64, error) {
	return c.issue(&command{request: protocol.Request{Type: protocol.CmdWriteZeroes, Flags: flags, Offset: off, Length: count}, completion: completion})
}

// AioCache prefetches count bytes at off into the server's cache.
func (c *Conn) AioCache(count, off uint64, flags protocol.CommandFlags, completion Completion) (uint64, error) {
	return c.issue(&command{request: protocol.Request{Type: protocol.CmdCache, Flags: flags, Offset: off, Length: count}, completion: completion})
}

// AioBlockStatus asks what the selected meta contexts say of count bytes at
// off. extents is called once for each, before the completion.
func (c *Conn) AioBlockStatus(count, off uint64, flags protocol.CommandFlags, extents ExtentFunc, completion Completion) (uint64, error) {
	return c.issue(&command{request: protocol.Request{Type: protocol.CmdBlockStatus, Flags: flags, Offset: off, Length: count}, extents: extents, completion: completion})
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
	return c.issue(&command{
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
	cmd, ok := c.commands[cookie]
	if !ok {
		return false, fmt.Errorf("look up command: got cookie %d, which no command has or which is retired", cookie)
	}
	if !cmd.completed {
		return false, nil
	}
	delete(c.commands, cookie)
	return true, cmd.result
}

// issue queues a command. If it fails nothing was issued, and the completion is
// never called.
func (c *Conn) issue(cmd *command) (uint64, error) {
	if cmd.request.Type == protocol.CmdWrite && c.extended {
		cmd.request.Flags |= protocol.CmdFlagPayloadLen
	}
	if cmd.only == nil {
		cmd.asked = cmd.request.Length
	}
	if !c.extended && cmd.request.Length > math.MaxUint32 {
		return 0, fmt.Errorf("issue %v: got length %d, need at most %d without extended headers; split the command", cmd.request.Type, cmd.request.Length, uint32(math.MaxUint32))
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.err != nil {
		return 0, fmt.Errorf("issue %v: %w", cmd.request.Type, c.err)
	}
	if c.leaving {
		return 0, fmt.Errorf("issue %v: disconnect was called: %w", cmd.request.Type, ErrDisconnected)
	}
	if err := c.strict.refuse(c, cmd); err != nil {
		return 0, err
	}
	c.cookie++
	cmd.request.Cookie = c.cookie
	cmd.sent = cmd.request.PayloadLength(c.extended) == 0
	c.commands[c.cookie] = cmd
	c.enqueue(cmd)
	return c.cookie, nil
}

// enqueue hands a command to the sender. The caller holds mu.
func (c *Conn) enqueue(cmd *command) {
	c.queue = append(c.queue, cmd)
	select {
	case c.wake <- struct{}{}:
	default: // it is awake
	}
}

// reply completes a command once its reply is whole and its data is sent,
// whichever comes last: a server may refuse a write before it has read it.
func (c *Conn) reply(cmd *command, result error) {
	c.mu.Lock()
	cmd.replied, cmd.result = true, result
	sent := cmd.sent
	c.mu.Unlock()
	if sent {
		c.complete(cmd, result)
	}
}

// complete calls the completion and retires the command if that says so.
func (c *Conn) complete(cmd *command, result error) {
	retire := 0
	if cmd.completion != nil {
		retire = cmd.completion(result)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	cmd.completed, cmd.result = true, result
	cmd.data, cmd.completion, cmd.extents, cmd.parts = nil, nil, nil, nil
	if retire == 1 {
		delete(c.commands, cmd.request.Cookie)
	}
}
