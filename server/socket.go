package server

import (
	"net"
	"os"
	"runtime"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// A socket is the descriptor of a connection, and how one waits for it.
//
// A cold socket is in the runtime's poller, as every net.Conn: a connection that
// says nothing costs no thread. But the poller wakes a thread whenever something
// arrives, also where nobody waits for it, and the goroutine then runs on another
// thread. Where requests follow each other at once that is most of the cost of a
// request. So a hot socket is not in the poller: its reader blocks in read(2).
//
// The reader makes a socket hot or cold, while no call is under way and nobody
// sends. Others may shut it down at any time.
type socket struct {
	mu  sync.Mutex      // held while what follows changes, and by others than the reader
	nc  net.Conn        // nil while hot
	raw syscall.RawConn // of nc; nil where that has no descriptor
	fd  int             // of own: the same socket, outside of the poller; -1 where nobody has asked

	local bool // a Unix socket: what one side sends the kernel copies at once

	resting bool // nc has the deadline of rest; of who has the connection
}

// A Socket is a connection of a type that this package does not know, of which it may use
// the descriptor as it does that of a [net.TCPConn] or [net.UnixConn]: Read and Write do
// nothing but receive from it and send to it. What wraps a connection to do more is none,
// even where it has a SyscallConn that is the inner one's.
type Socket interface {
	net.Conn
	syscall.Conn
	Socket()
}

func (s *socket) init(nc net.Conn) {
	s.nc, s.fd = nc, -1
	var sc syscall.Conn
	switch nc := nc.(type) {
	case *net.TCPConn:
		sc = nc
	case *net.UnixConn:
		sc, s.local = nc, true
	case Socket:
		sc = nc
	default:
		return
	}
	if raw, err := sc.SyscallConn(); err == nil {
		s.raw = raw
	}
}

// widen makes room for replies. An error means that there is less.
func (s *socket) widen() {
	if u, ok := s.nc.(*net.UnixConn); ok {
		_ = u.SetWriteBuffer(sendBuffer)
	}
}

func (s *socket) hot() bool { return s.nc == nil }

// descriptor is valid until the socket is closed, or is made hot for the first
// time; -1 if there is none.
func (s *socket) descriptor() int {
	fd := s.fd
	if fd < 0 && s.raw != nil {
		_ = s.raw.Control(func(d uintptr) { fd = int(d) }) // fails only on a closed connection
	}
	return fd
}

// own returns a descriptor of the socket that stays the same until it is closed.
func (s *socket) own() (int, error) {
	if s.fd >= 0 {
		return s.fd, nil
	}
	fd, err := unix.FcntlInt(uintptr(s.descriptor()), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return -1, os.NewSyscallError("dup", err)
	}
	timeout := unix.NsecToTimeval(int64(hotWait))
	if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &timeout); err != nil {
		unix.Close(fd)
		return -1, os.NewSyscallError("setsockopt", err)
	}
	s.mu.Lock()
	s.fd = fd
	s.mu.Unlock()
	return fd, nil
}

// heat makes a cold socket hot. Where that fails it stays as it is.
func (s *socket) heat() error {
	switch s.nc.(type) {
	case *net.TCPConn, *net.UnixConn: // net.FileConn brings these back
	default:
		return syscall.ENOTSUP
	}
	if _, err := s.own(); err != nil {
		return err
	}
	if err := unix.SetNonblock(s.fd, false); err != nil {
		return os.NewSyscallError("fcntl", err)
	}
	s.mu.Lock()
	nc := s.nc
	s.nc, s.raw = nil, nil
	s.mu.Unlock()
	s.resting = false
	_ = nc.Close() // this descriptor is gone either way; the socket lives on in fd
	return nil
}

// cool makes a hot socket cold. Where that fails, as where no descriptor is free, it
// stays as it is.
func (s *socket) cool() (err error) {
	if err := unix.SetNonblock(s.fd, true); err != nil {
		return os.NewSyscallError("fcntl", err)
	}
	defer func() {
		if err != nil {
			_ = unix.SetNonblock(s.fd, false) // which it was before
		}
	}()
	fd, err := unix.FcntlInt(uintptr(s.fd), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return os.NewSyscallError("dup", err)
	}
	f := os.NewFile(uintptr(fd), "")
	defer f.Close() // FileConn has its own
	nc, err := net.FileConn(f)
	if err != nil {
		return err
	}
	raw, err := nc.(syscall.Conn).SyscallConn()
	if err != nil {
		nc.Close()
		return err
	}
	s.mu.Lock()
	s.nc, s.raw = nc, raw
	s.mu.Unlock()
	return nil
}

// write sends all of p on a hot socket.
func (s *socket) write(p []byte) error {
	for len(p) > 0 {
		n, err := unix.Write(s.fd, p)
		if err != nil {
			if err == unix.EINTR {
				continue
			}
			return os.NewSyscallError("write", err)
		}
		p = p[n:]
	}
	return nil
}

// unblock makes writes fail that would wait.
func (s *socket) unblock() {
	if s.hot() {
		_ = unix.SetNonblock(s.fd, true)
	}
}

// A blocking is a hot socket as TLS wants it. What TLS receives is read from the
// descriptor; the socket is closed by its owner; deadlines are without effect.
type blocking struct {
	net.Conn // when it was cold, for the addresses
	s        *socket
}

func (b blocking) Write(p []byte) (int, error) {
	if err := b.s.write(p); err != nil {
		return 0, err
	}
	return len(p), nil
}

func (b blocking) Close() error                          { return nil }
func (b blocking) Socket()                               {}
func (b blocking) SyscallConn() (syscall.RawConn, error) { return descriptor(b.s.fd), nil }

// A descriptor is a syscall.RawConn outside of the runtime's poller.
type descriptor int

func (d descriptor) Control(f func(fd uintptr)) error {
	f(uintptr(d))
	return nil
}

func (d descriptor) Read(f func(fd uintptr) bool) error  { return d.try(f, unix.POLLIN) }
func (d descriptor) Write(f func(fd uintptr) bool) error { return d.try(f, unix.POLLOUT) }

func (d descriptor) try(f func(fd uintptr) bool, events int16) error {
	for !f(uintptr(d)) {
		if _, err := unix.Poll([]unix.PollFd{{Fd: int32(d), Events: events}}, -1); err != nil && err != unix.EINTR {
			return os.NewSyscallError("poll", err)
		}
	}
	return nil
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

// shutdown wakes the reader, a writer, and a module that sleeps
// (nbdkit_nanosleep). It may be called on any thread.
func (s *socket) shutdown() {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case s.fd >= 0:
		_ = unix.Shutdown(s.fd, unix.SHUT_RDWR)
	case s.raw != nil:
		_ = s.raw.Control(func(fd uintptr) { _ = unix.Shutdown(int(fd), unix.SHUT_RDWR) })
	case s.nc != nil:
		s.nc.Close()
	}
}

// wake makes the reader's wait for the client end after d. An error means that
// the connection is closed, which ends the wait as well. The reader of a hot
// socket looks by itself whether the server stops.
func (s *socket) wake(d time.Duration) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.nc != nil {
		_ = s.nc.SetReadDeadline(time.Now().Add(d))
	}
}

func (s *socket) close() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.nc != nil {
		_ = s.nc.Close()
	}
	if s.fd >= 0 {
		unix.Close(s.fd)
		s.fd = -1
	}
}

const (
	// sendBuffer is what the kernel may hold of replies on a Unix socket, in
	// bytes, if net.core.wmem_max allows. The usual 208 KiB make who sends a long
	// reply wait several times for who reads it; 4 MiB are no better than 1. TCP
	// finds out by itself.
	sendBuffer = 1 << 20
	// hotWait is how long the reader of a hot socket waits for more. After that
	// the socket is cold again, which costs some ten system calls.
	hotWait = 20 * time.Millisecond
	// At least temperEvery receives that took less than quickGap each make a socket
	// hot.
	temperEvery = 32
	quickGap    = 8 * time.Millisecond
)

// maxHot is how many sockets may be hot at a time where there are no more processors for their
// readers than there are: each keeps a thread, and one of GOMAXPROCS.
func maxHot() int32 {
	procs := runtime.GOMAXPROCS(0)
	if procs < 4 {
		return 0
	}
	return int32(min(procs/2, 4*runtime.NumCPU()))
}

// temper makes the connection hot where requests follow each other at once, and
// cold where other connections are active. It is called before a receive.
func (r *reader) temper() {
	c := r.c
	if r.in.receives < temperEvery {
		return
	}
	receives, most := r.in.receives, c.s.mostHot()
	r.in.receives = 0
	crowded := c.s.watcher.active.Load() > most
	if c.sock.hot() {
		if crowded {
			c.cool()
		} else {
			c.s.processors.keep(c.s.hot.Load(), c.s.opts.MaxProcs)
		}
		return
	}
	t := now()
	quick := t-r.tempered < time.Duration(receives)*c.s.opts.hotGap
	r.tempered = t
	if !quick || crowded || len(c.slots) > 0 {
		return
	}
	if c.s.hot.Add(1) > most || !c.sender.pause(c.heat) || !c.sock.hot() {
		c.s.hot.Add(-1)
	}
}

// mostHot is how many sockets may be hot. More active ones than that make all of them cold: with
// very many the poller, which finds several at once, does better.
func (s *Server) mostHot() int32 {
	o := &s.opts
	switch {
	case o.MaxProcs == 0: // more could keep all processors
		return o.maxHot
	case s.pinned: // each has a thread in any case, and the poller finds it by way of another
		return max(o.maxHot, int32(o.MaxProcs))
	}
	return 2 * o.maxHot
}

func (c *conn) heat() {
	cold := c.sock.nc
	if err := c.sock.heat(); err != nil {
		c.call.Debugf("make connection hot: %v", err)
		return
	}
	c.move(blocking{cold, &c.sock})
	c.peer.Move(c.sock.descriptor())
}

// move tells TLS what it is on now.
func (c *conn) move(nc net.Conn) {
	if c.secure == nil {
		return
	}
	if err := c.secure.Move(nc); err != nil {
		c.call.Debugf("move TLS: %v", err)
		c.disconnect(true)
	}
}

// cool makes a hot connection cold, unless calls are under way. It is tried again
// later where it fails.
func (c *conn) cool() {
	if len(c.slots) > 0 {
		return
	}
	c.sender.pause(func() {
		if err := c.sock.cool(); err != nil {
			c.call.Debugf("make connection cold: %v", err)
			return
		}
		c.move(c.sock.nc)
		c.s.hot.Add(-1)
		if c.s.quitting() {
			c.sock.wake(lastWords) // in vain for a hot socket when Shutdown came
		}
	})
}
