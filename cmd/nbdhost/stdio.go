package main

import (
	"errors"
	"fmt"
	"net"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// listenStdio makes a connection of standard input and output, and puts
// /dev/null in their place, so that nobody else writes into it.
func listenStdio() (*endpoint, error) {
	var files [2]*os.File
	for fd, name := range []string{"standard input", "standard output"} {
		// Above 2, since package os raises a signal where those cannot be written.
		copy, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 3)
		if err != nil {
			return nil, fmt.Errorf("take over %s: %w", name, err)
		}
		if canWait(copy) {
			if err := unix.SetNonblock(copy, true); err != nil {
				return nil, fmt.Errorf("take over %s: %w", name, err)
			}
		}
		files[fd] = os.NewFile(uintptr(copy), name)
	}
	if err := giveUp(0, 1); err != nil {
		return nil, err
	}
	return &endpoint{conn: stdioConn(files[0], files[1])}, nil
}

// canWait tells whether a descriptor can be waited for in the poller, and is not
// shared with a shell, as a terminal is.
func canWait(fd int) bool {
	var st unix.Stat_t
	if unix.Fstat(fd, &st) != nil {
		return false
	}
	return st.Mode&unix.S_IFMT == unix.S_IFSOCK || st.Mode&unix.S_IFMT == unix.S_IFIFO
}

// stdioConn makes a connection of two files: where they are one socket, as inetd
// has it, that one, which modules may ask for the client's address.
func stdioConn(in, out *os.File) net.Conn {
	a, errA := in.Stat()
	b, errB := out.Stat()
	if errA == nil && errB == nil && os.SameFile(a, b) {
		if c, err := net.FileConn(in); err == nil { // a copy
			in.Close()
			out.Close()
			return c
		}
	}
	return &pipeConn{in, out}
}

// A pipeConn is a net.Conn of two files.
type pipeConn struct{ in, out *os.File }

type stdioAddr struct{}

func (stdioAddr) Network() string { return "stdio" }
func (stdioAddr) String() string  { return "standard input and output" }

func (c *pipeConn) Read(p []byte) (int, error)  { return c.in.Read(p) }
func (c *pipeConn) Write(p []byte) (int, error) { return c.out.Write(p) }
func (c *pipeConn) Close() error                { return errors.Join(c.in.Close(), c.out.Close()) }
func (c *pipeConn) LocalAddr() net.Addr         { return stdioAddr{} }
func (c *pipeConn) RemoteAddr() net.Addr        { return stdioAddr{} }

func (c *pipeConn) SetDeadline(t time.Time) error {
	return errors.Join(c.in.SetDeadline(t), c.out.SetDeadline(t))
}
func (c *pipeConn) SetReadDeadline(t time.Time) error  { return c.in.SetDeadline(t) }
func (c *pipeConn) SetWriteDeadline(t time.Time) error { return c.out.SetDeadline(t) }
