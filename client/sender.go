package client

import (
	"fmt"
	"os"
	"runtime"
	"slices"
	"sync"

	"golang.org/x/sys/unix"

	"nbdhost/protocol"
)

const (
	// batchSize is how many bytes of requests leave with one write, headers and
	// small data. More has left the processor's cache when the kernel copies it.
	batchSize = 64 << 10
	// copySize bounds the data of a write that is copied behind its header. That of
	// larger ones leaves from where it is.
	copySize = 16 << 10
	// keptSize is how much memory for requests an idle connection keeps.
	keptSize = 8 << 10
	// owedSize is how many bytes of requests a socket holds without the server's
	// help.
	owedSize = 16 << 10
)

// An outbox is what is being sent: the head, and after it the data of one large
// write. It belongs to who has set Conn.sending.
type outbox struct {
	head  []byte // headers and small data
	sent  int    // bytes of head that have left
	owner *command
	err   error

	// use is held while tail is read, so that AioCancel can take its memory away.
	use  sync.Mutex
	tail []byte // the owner's data that has not left

	try, only func(fd uintptr) bool // of send: to wait, and not to wait
	again     bool                  // only found no room
}

func (o *outbox) init() {
	o.try = o.trySend
	o.only = func(fd uintptr) bool {
		o.again = !o.trySend(fd)
		return true
	}
}

// enqueue adds a command to those to send. The caller holds mu and must call kick
// after it.
func (c *Conn) enqueue(cmd *command) { c.queue = append(c.queue, cmd) }

// kick has what is queued sent: by the receiver if it is awake, which will do so
// when it has nothing left in hand, and so will who is sending already; at once and
// here if nothing else is in flight; else by a goroutine that gives others the time
// to queue more. The caller holds mu, and kick releases it.
func (c *Conn) kick() {
	if c.awake || c.sending {
		c.mu.Unlock()
		return
	}
	c.sending = true
	if c.pending > 1 || !c.mayWrite() {
		c.mu.Unlock()
		go c.drainFunc()
		return
	}
	c.fill()
	c.mu.Unlock()
	c.flush(false)
}

// mayWrite tells whether requests can be sent by who must not wait. The caller
// holds mu.
func (c *Conn) mayWrite() bool {
	return c.link.direct() || c.link.buffered && c.owed <= owedSize
}

// fill moves what is queued into the outbox, up to a batch. The caller holds mu, and
// has set sending. It returns false, and has cleared sending, if there is nothing.
func (c *Conn) fill() bool {
	o := &c.out
	o.head, o.sent = o.head[:0], 0
	n := 0
	for _, cmd := range c.queue {
		n++
		cmd.queued = false
		if c.extended {
			o.head = cmd.request.AppendExtendedTo(o.head)
		} else {
			o.head = cmd.request.AppendTo(o.head)
		}
		if !cmd.sent {
			if len(cmd.data) > copySize {
				o.use.Lock()
				o.owner, o.tail = cmd, cmd.data
				o.use.Unlock()
				break
			}
			o.head = append(o.head, cmd.data...)
			cmd.sent = true
		}
		if len(o.head) >= batchSize {
			break
		}
	}
	c.queue = slices.Delete(c.queue, 0, n)
	if n == 0 {
		c.sending = false
		c.settled()
		c.quiet.Broadcast()
	}
	return n > 0
}

// flush sends the outbox and then, if all is set, what is queued meanwhile. It does
// not wait: what finds no room is left to a goroutine.
func (c *Conn) flush(all bool) {
	for {
		again, err := c.try()
		if err != nil {
			c.unsendable(err)
			return
		}
		if again {
			go c.drainFunc()
			return
		}
		c.left()
		c.mu.Lock()
		more := c.fill()
		direct := all && c.mayWrite()
		c.mu.Unlock()
		if !more {
			return
		}
		if !direct {
			go c.drainFunc()
			return
		}
	}
}

// try sends as much as there is room for.
func (c *Conn) try() (again bool, err error) {
	o := &c.out
	if !c.link.direct() {
		return false, c.stream()
	}
	if err := c.link.write(o.only); err != nil {
		return false, err
	}
	return o.again, o.err
}

// drain is the sending goroutine. It begins with sending set, and perhaps with
// something in the outbox.
func (c *Conn) drain() {
	if c.out.empty() {
		runtime.Gosched() // others may be about to queue more
	}
	c.sendAll()
}

// sendAll sends until nothing is queued, and waits for room.
func (c *Conn) sendAll() {
	o := &c.out
	for {
		var err error
		if !o.empty() {
			if c.link.direct() {
				if err = c.link.write(o.try); err == nil {
					err = o.err
				}
			} else {
				err = c.stream()
			}
		}
		if err != nil {
			c.unsendable(err)
			return
		}
		c.left()
		c.mu.Lock()
		more := c.fill()
		c.mu.Unlock()
		if !more {
			return
		}
	}
}

// unsendable gives the connection up.
func (c *Conn) unsendable(err error) {
	c.fail(fmt.Errorf("%w: write requests: %w", ErrDisconnected, err))
	c.left()
	c.mu.Lock()
	c.sending = false
	c.quiet.Broadcast()
	c.mu.Unlock()
}

// left lets go of the large write that was sent, and completes it if it was answered
// before: not here, since here may be within the caller's call.
func (c *Conn) left() {
	cmd := c.out.owner
	if cmd == nil {
		return
	}
	c.out.use.Lock()
	c.out.owner, c.out.tail = nil, nil
	c.out.use.Unlock()
	c.mu.Lock()
	cmd.sent = true
	answered := cmd.replied && cmd.claim()
	c.release(cmd)
	if answered {
		c.completing++
		go func() {
			c.complete(cmd, cmd.result)
			c.elsewhere()
		}()
	}
	c.mu.Unlock()
}

func (o *outbox) empty() bool { return o.sent == len(o.head) && o.owner == nil }

// trySend sends as much as the socket takes; false means that it takes no more now.
func (o *outbox) trySend(fd uintptr) bool {
	for {
		head := o.head[o.sent:]
		var n int
		o.use.Lock()
		if len(o.tail) == 0 {
			n, o.err = unix.SendmsgN(int(fd), head, nil, nil, unix.MSG_DONTWAIT|unix.MSG_NOSIGNAL)
		} else {
			pieces := [2][]byte{head, o.tail}
			n, o.err = unix.SendmsgBuffers(int(fd), pieces[:], nil, nil, unix.MSG_DONTWAIT|unix.MSG_NOSIGNAL)
		}
		if n > 0 {
			k := min(n, len(head))
			o.sent += k
			o.tail = o.tail[n-k:]
		}
		left := len(o.head) - o.sent + len(o.tail)
		o.use.Unlock()
		switch {
		case o.err == unix.EINTR:
		case o.err == unix.EAGAIN:
			o.err = nil
			return false
		case o.err != nil:
			o.err = os.NewSyscallError("send", o.err)
			return true
		case left == 0:
			return true
		}
	}
}

// stream writes the outbox to a connection that cannot be tried. The data goes
// through the head, so that nothing waits with the caller's memory in hand.
func (c *Conn) stream() error {
	o := &c.out
	for {
		o.use.Lock()
		if room := batchSize - len(o.head); len(o.tail) > 0 && room > 0 {
			n := min(room, len(o.tail))
			o.head = append(o.head, o.tail[:n]...)
			o.tail = o.tail[n:]
		}
		o.use.Unlock()
		if len(o.head) == 0 {
			return nil
		}
		_, err := c.link.nc.Write(o.head)
		o.head, o.sent = o.head[:0], 0
		if err != nil {
			return err
		}
	}
}

// unqueue takes a command back that nobody has begun to send. The caller holds mu.
func (c *Conn) unqueue(cmd *command) {
	c.queue = slices.DeleteFunc(c.queue, func(q *command) bool { return q == cmd })
	cmd.queued = false
}

// wireSize is how many bytes a request takes on the wire.
func (c *Conn) wireSize(r *protocol.Request) uint64 {
	return protocol.ExtendedRequestSize + r.PayloadLength(c.extended)
}

// replySize is how many bytes its reply takes, as a rough bound: an error chunk may
// have more.
func replySize(r *protocol.Request) uint64 {
	switch r.Type {
	case protocol.CmdRead:
		return r.Length
	case protocol.CmdBlockStatus:
		return batchSize
	}
	return protocol.ExtendedChunkHeaderSize
}
