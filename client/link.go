package client

import (
	"net"
	"os"
	"runtime"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// A link is the transport of a Conn. On a socket that can be tried without waiting,
// data goes between the kernel and the caller's buffers; on any other connection
// (TLS, a pipe) it takes the way through ours.
type link struct {
	nc  net.Conn
	raw syscall.RawConn // of nc if that is a socket, or nil
	fd  int             // with Options.Blocking: a socket that blocks, else -1
	// buffered: a little may be written without waiting for the peer to read it,
	// since below nc there is a socket.
	buffered bool

	yielded time.Time // on a socket that blocks, when Go's scheduler ran last

	mu     sync.Mutex // guards closed
	closed bool
}

// yieldEvery is how often a thread that awaits replies in the kernel lets Go's scheduler
// run, which it never meets by itself: see RATIONALE.md, "Why does a busy reader call
// runtime.Gosched?".
const yieldEvery = 2 * time.Millisecond

// newLink takes a connection over after the handshake. socket is what the handshake
// began on, and nc that or what TLS made of it.
func newLink(socket, nc net.Conn, blocking bool) (*link, error) {
	l := &link{nc: nc, fd: -1}
	switch socket.(type) {
	case *net.TCPConn, *net.UnixConn, *vsockConn:
	default: // what wraps one of them may do more than it does
		return l, nil
	}
	raw, err := socket.(syscall.Conn).SyscallConn()
	if err != nil {
		return l, nil
	}
	l.buffered = true
	if nc != socket {
		return l, nil
	}
	l.raw = raw
	if !blocking {
		return l, nil
	}
	// A descriptor of our own, since the one of nc is in the poller, which would
	// wake a thread at every arrival.
	fd := -1
	if err := raw.Control(func(d uintptr) { fd, err = unix.FcntlInt(d, unix.F_DUPFD_CLOEXEC, 0) }); err != nil {
		return l, err
	}
	if err != nil {
		return l, os.NewSyscallError("duplicate socket", err)
	}
	nc.Close()
	if err := unix.SetNonblock(fd, false); err != nil {
		unix.Close(fd)
		return l, os.NewSyscallError("make socket blocking", err)
	}
	l.fd, l.raw = fd, nil
	return l, nil
}

// direct tells whether the socket can be tried.
func (l *link) direct() bool { return l.raw != nil || l.fd >= 0 }

// close ends all waiting, now and later.
func (l *link) close() {
	l.mu.Lock()
	defer l.mu.Unlock()
	switch {
	case l.closed:
	case l.fd >= 0:
		// Others still use the descriptor.
		_ = unix.Shutdown(l.fd, unix.SHUT_RDWR)
	default:
		l.nc.Close()
	}
	l.closed = true
}

// free comes after close, when nobody uses the link any more.
func (l *link) free() {
	if l.fd >= 0 {
		unix.Close(l.fd)
	}
}

// read calls try with the descriptor until it returns true, and waits in between
// for something to read. With look it waits before the first time as well, where
// try would block.
func (l *link) read(try func(fd uintptr) bool, look bool) error {
	if l.raw != nil {
		return l.raw.Read(try)
	}
	if now := time.Now(); now.Sub(l.yielded) > yieldEvery {
		l.yielded = now
		runtime.Gosched()
	}
	for {
		if look {
			if err := l.poll(unix.POLLIN); err != nil {
				return err
			}
		}
		if try(uintptr(l.fd)) {
			return nil
		}
		look = true
	}
}

// write calls try with the descriptor until it returns true, and waits in between
// for room to write.
func (l *link) write(try func(fd uintptr) bool) error {
	if l.raw != nil {
		return l.raw.Write(try)
	}
	for !try(uintptr(l.fd)) {
		if err := l.poll(unix.POLLOUT); err != nil {
			return err
		}
	}
	return nil
}

func (l *link) poll(events int16) error {
	fds := [1]unix.PollFd{{Fd: int32(l.fd), Events: events}}
	for {
		_, err := unix.Poll(fds[:], -1)
		if err == nil {
			return nil
		}
		if err != unix.EINTR {
			return os.NewSyscallError("poll", err)
		}
	}
}
