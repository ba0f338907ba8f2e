package server

import (
	"errors"
	"time"
)

// parkAfter is how long a connection has nothing to say before it is parked: it keeps a
// goroutine that has made no call, and so has the smallest stack, and no reader. That is
// a third less memory; it costs some microseconds when the next request comes. One that
// says nothing after its handshake is parked at once. TLS keeps much more than that
// anyway, and is not parked.
const parkAfter = 250 * time.Millisecond

// errIdle is the end of a wait in which nothing came for parkAfter.
var errIdle = errors.New("nothing came")

// rest makes the reader's wait end after a while, unless that has been asked for
// already. The deadline stays while requests come, so it is set once in a while only.
func (c *conn) rest() {
	if !c.sock.resting {
		c.endWaits(time.Now().Add(c.s.opts.parkAfter))
		c.sock.resting = !c.s.quitting()
	}
}

// rested tells whether it was rest that ended a wait, and undoes it. While the server
// stops it was, unless the time for last words is over.
func (c *conn) rested() bool {
	if !c.sock.resting {
		return false
	}
	c.sock.resting = false
	if c.s.quitting() && !time.Now().Before(c.s.stop) {
		return false
	}
	c.endWaits(time.Time{})
	return true
}

// endWaits sets the deadline of a cold socket's reads, but not against a shutdown.
func (c *conn) endWaits(t time.Time) {
	c.sock.mu.Lock()
	_ = c.sock.nc.SetReadDeadline(t)
	c.sock.mu.Unlock()
	if c.s.quitting() {
		c.sock.wake(time.Until(c.s.stop)) // what Shutdown set may just have been undone
	}
}

// parks tells whether the connection, on which nothing came, is to be parked: nothing
// is in flight, and neither the watcher nor a shutdown is about to do something with it.
func (r *reader) parks() bool {
	return len(r.c.slots) == 0 && !r.c.watched.Load() && !r.c.s.quitting() &&
		len(r.in.unread()) == 0 && r.out.empty() && now()-r.arrived >= r.c.s.opts.parkAfter
}

// parkable tells whether the connection may be parked at all.
func (c *conn) parkable() bool { return c.secure == nil && !c.s.pinned }

// park leaves the connection to a goroutine that waits for it, and becomes the reader of
// that number when something comes. The caller's reader is done with it.
func (c *conn) park(number int) {
	c.calling.Add(1)
	c.reader.Store(nil)
	go func() {
		_ = c.sock.raw.Read(readable) // whatever ends the wait, the reader will see it too
		r := newReader(c, number)
		c.hand(r)
		c.start(r)
	}()
}
