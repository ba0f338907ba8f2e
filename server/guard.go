package server

import (
	"os"
	"sync"

	"golang.org/x/sys/unix"
)

// A guard gives connections on whose readers make long calls: when such a client sends
// something more during the call, another goroutine gets the connection. A call during
// which nothing comes costs two system calls, and no other goroutine. The sockets are in
// an epoll set of the guard's own, which reports a socket only while it is wanted.
type guard struct {
	mu    sync.Mutex // held while what follows changes
	users int        // connections that have joined
	set   *os.File   // in the runtime's poller; nil without users
	fd    int        // of set
}

// join makes c one of the guard's connections. It fails where the socket has no
// descriptor, or where none is free.
func (g *guard) join(c *conn) error {
	fd, err := c.sock.own()
	if err != nil {
		return err
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.users == 0 {
		if err := g.begin(c.s); err != nil {
			return err
		}
	}
	if err := unix.EpollCtl(g.fd, unix.EPOLL_CTL_ADD, fd, c.interest(0)); err != nil {
		if g.users == 0 {
			_ = g.set.Close()
		}
		return os.NewSyscallError("epoll_ctl", err)
	}
	g.users++
	return nil
}

// leave ends what join began. The socket is still open.
func (g *guard) leave(c *conn) {
	g.mu.Lock()
	defer g.mu.Unlock()
	_ = unix.EpollCtl(g.fd, unix.EPOLL_CTL_DEL, c.sock.fd, nil)
	if g.users--; g.users == 0 {
		_ = g.set.Close() // ends report
	}
}

// begin makes the set.
func (g *guard) begin(s *Server) error {
	fd, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		return os.NewSyscallError("epoll_create1", err)
	}
	if err := unix.SetNonblock(fd, true); err != nil { // else os.NewFile leaves the poller out
		unix.Close(fd)
		return os.NewSyscallError("fcntl", err)
	}
	g.fd, g.set = fd, os.NewFile(uintptr(fd), "epoll")
	go report(g.set, s)
	return nil
}

// report gives on the connections that set reports, until it is closed.
func report(set *os.File, s *Server) {
	raw, err := set.SyscallConn()
	if err != nil {
		return // closed already
	}
	events := make([]unix.EpollEvent, 16)
	_ = raw.Read(func(fd uintptr) bool {
		// The poller reports a change once: all that there is must be taken.
		for {
			n, err := unix.EpollWait(int(fd), events, 0)
			if err == unix.EINTR {
				continue
			}
			if n <= 0 {
				return false
			}
			for _, e := range events[:n] {
				s.giveOn(uint64(uint32(e.Pad))<<32 | uint64(uint32(e.Fd)))
			}
		}
	})
}

// giveOn gives the connection of that number on, if it is there and still under guard.
func (s *Server) giveOn(id uint64) {
	s.mu.Lock()
	c := s.conns[id]
	s.mu.Unlock()
	if c == nil {
		return
	}
	if r := c.reader.Load(); r != nil {
		if state := r.state.Load(); state&mask == guarded {
			c.takeAway(r, state)
		}
	}
}

// interest is what the set reports of c, once; EPOLLHUP and EPOLLERR always are.
func (c *conn) interest(events uint32) *unix.EpollEvent {
	return &unix.EpollEvent{Events: events | unix.EPOLLONESHOT, Fd: int32(c.id), Pad: int32(c.id >> 32)}
}

// arm makes the guard look at c's socket, and disarm makes it look away. They cannot
// fail for what is in the set.
func (g *guard) arm(c *conn) {
	_ = unix.EpollCtl(g.fd, unix.EPOLL_CTL_MOD, c.sock.fd, c.interest(unix.EPOLLIN|unix.EPOLLRDHUP))
}

func (g *guard) disarm(c *conn) {
	_ = unix.EpollCtl(g.fd, unix.EPOLL_CTL_MOD, c.sock.fd, c.interest(0))
}
