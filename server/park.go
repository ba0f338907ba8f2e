package server

import (
	"errors"
	"time"

	"golang.org/x/sys/unix"
)

// parkAfter is how long a connection has nothing to say before it is parked: it keeps a
// goroutine that has made no call, and so has the smallest stack, and no reader. That is
// a third less memory; it costs some microseconds when the next request comes. TLS
// keeps much more than that anyway, and is not parked.
const parkAfter = 250 * time.Millisecond

// errIdle is the end of a wait in which nothing came for parkAfter.
var errIdle = errors.New("nothing came")

// rest makes the reader's wait end after a while, unless that has been asked for
// already. The deadline stays while requests come, so it is set once in a while only.
func (c *conn) rest() {
	s := &c.sock
	if s.resting {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if !c.s.quitting() { // else the deadline is the one of wake, now or soon
		s.resting = true
		_ = s.nc.SetReadDeadline(time.Now().Add(c.s.opts.parkAfter))
	}
}

// rested tells whether it was rest that ended a wait, and undoes it.
func (c *conn) rested() bool {
	s := &c.sock
	if !s.resting {
		return false
	}
	s.resting = false
	if c.s.quitting() {
		s.wake(lastWords) // what it set may just have been undone
		return true
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if !c.s.quitting() {
		_ = s.nc.SetReadDeadline(time.Time{})
	}
	return true
}

// parks tells whether the connection, on which nothing came, is to be parked: nothing
// is in flight, and neither the watcher nor a shutdown is about to do something with it.
func (r *reader) parks() bool {
	return len(r.c.slots) == 0 && !r.c.watched.Load() && !r.c.s.quitting() &&
		len(r.in.unread()) == 0 && r.out.empty() && time.Since(r.arrived) >= r.c.s.opts.parkAfter
}

// park leaves the connection to a goroutine that waits for it, and becomes the reader of
// that number when something comes. The caller's reader is done with it.
func (c *conn) park(number int) {
	c.calling.Add(1)
	c.reader.Store(nil)
	go func() {
		_ = c.sock.raw.Read(readable) // whatever ends the wait, the reader will see it too
		c.start(newReader(c, number))
	}()
}

// readable tells whether a receive from the socket would not have to wait.
func readable(fd uintptr) bool {
	fds := [1]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
	for {
		n, err := unix.Poll(fds[:], 0)
		if err != unix.EINTR {
			return n != 0 || err != nil
		}
	}
}
