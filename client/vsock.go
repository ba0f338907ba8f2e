package client

import (
	"context"
	"fmt"
	"net"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// dialVsock connects to a port of a virtual machine, or of its host: package net does
// not know AF_VSOCK.
func dialVsock(ctx context.Context, cid, port uint32) (net.Conn, error) {
	remote := vsockAddr{cid, port}
	fail := func(err error) (net.Conn, error) { return nil, fmt.Errorf("dial vsock %v: %w", remote, err) }
	fd, err := unix.Socket(unix.AF_VSOCK, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return fail(os.NewSyscallError("socket", err))
	}
	err = unix.Connect(fd, &unix.SockaddrVM{CID: cid, Port: port})
	if err != nil && err != unix.EINPROGRESS {
		unix.Close(fd)
		return fail(os.NewSyscallError("connect", err))
	}
	c := &vsockConn{os.NewFile(uintptr(fd), "vsock"), remote}
	if err := c.established(ctx); err != nil {
		c.Close()
		return fail(err)
	}
	return c, nil
}

// established waits for a connect under way.
func (c *vsockConn) established(ctx context.Context) error {
	raw, err := c.SyscallConn()
	if err != nil {
		return err
	}
	stop := context.AfterFunc(ctx, func() { c.SetDeadline(time.Unix(1, 0)) })
	waited := raw.Write(func(fd uintptr) bool {
		if _, err = unix.Getpeername(int(fd)); err != unix.ENOTCONN {
			return true
		}
		var n int
		if n, err = unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_ERROR); err == nil && n != 0 {
			err = unix.Errno(n)
		}
		return err != nil
	})
	switch {
	case !stop():
		return context.Cause(ctx)
	case waited != nil:
		return waited
	}
	return os.NewSyscallError("connect", err)
}

// A vsockConn is a net.Conn.
type vsockConn struct {
	*os.File
	remote vsockAddr
}

func (c *vsockConn) LocalAddr() net.Addr  { return vsockAddr{} }
func (c *vsockConn) RemoteAddr() net.Addr { return c.remote }
func (c *vsockConn) Socket()              {} // for TLS: its data is that of its descriptor

// vsockAddr is a net.Addr.
type vsockAddr struct{ cid, port uint32 }

func (a vsockAddr) Network() string { return "vsock" }
func (a vsockAddr) String() string  { return fmt.Sprintf("%d:%d", a.cid, a.port) }
