package main

import (
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"strconv"
	"syscall"

	"golang.org/x/sys/unix"

	"nbdhost/protocol"
)

// Package net does not know AF_VSOCK, so this file has a listener and a
// connection over an os.File, which waits in the same poller.

// listenVsock binds the socket of --vsock: for every virtual machine, and for
// this one itself.
func listenVsock(o *options, log *slog.Logger) (*endpoint, error) {
	port := uint32(protocol.DefaultPort)
	if o.port != "" {
		n, err := strconv.ParseUint(o.port, 10, 32)
		if err != nil {
			return nil, err
		}
		port = uint32(n)
	}
	if port == 0 {
		port = unix.VMADDR_PORT_ANY
	}
	fd, err := unix.Socket(unix.AF_VSOCK, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if errors.Is(err, unix.EAFNOSUPPORT) {
		return nil, fmt.Errorf("listen on vsock: %w: need a kernel that has it; load one of the modules vhost_vsock, vmw_vsock_virtio_transport and vsock_loopback", err)
	} else if err != nil {
		return nil, fmt.Errorf("listen on vsock: %w", err)
	}
	err = unix.Bind(fd, &unix.SockaddrVM{CID: unix.VMADDR_CID_ANY, Port: port})
	if err == nil {
		err = unix.Listen(fd, unix.SOMAXCONN)
	}
	var sa unix.Sockaddr
	if err == nil {
		sa, err = unix.Getsockname(fd)
	}
	if err != nil {
		unix.Close(fd)
		if errors.Is(err, unix.EADDRINUSE) {
			return nil, fmt.Errorf("bind to vsock port %d: %w: stop the other server, or give another --port (0 takes a free one)", port, err)
		}
		return nil, fmt.Errorf("bind to vsock port %d: %w", port, err)
	}
	l, err := newVsockListener(fd, sa.(*unix.SockaddrVM))
	if err != nil {
		return nil, fmt.Errorf("listen on vsock: %w", err)
	}
	log.Debug("bound to vsock " + l.Addr().String())
	return &endpoint{listeners: []net.Listener{l}, uri: uriOf(l.Addr(), o.export)}, nil
}

// vsockAddr is a net.Addr.
type vsockAddr struct{ cid, port uint32 }

func (a vsockAddr) Network() string { return "vsock" }
func (a vsockAddr) String() string {
	if a.cid == unix.VMADDR_CID_ANY {
		return fmt.Sprintf("any:%d", a.port)
	}
	return fmt.Sprintf("%d:%d", a.cid, a.port)
}

// A vsockListener is a net.Listener.
type vsockListener struct {
	*os.File
	raw  syscall.RawConn
	addr vsockAddr
}

// newVsockListener takes over a socket that listens; it is closed if that fails.
func newVsockListener(fd int, sa *unix.SockaddrVM) (*vsockListener, error) {
	if err := unix.SetNonblock(fd, true); err != nil {
		unix.Close(fd)
		return nil, err
	}
	f := os.NewFile(uintptr(fd), "vsock")
	raw, err := f.SyscallConn()
	if err != nil {
		f.Close()
		return nil, err
	}
	return &vsockListener{f, raw, vsockAddr{sa.CID, sa.Port}}, nil
}

func (l *vsockListener) Addr() net.Addr { return l.addr }

func (l *vsockListener) Accept() (net.Conn, error) {
	var fd int
	var peer unix.Sockaddr
	var err error
	waited := l.raw.Read(func(s uintptr) bool {
		fd, peer, err = unix.Accept4(int(s), unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC)
		return err != unix.EAGAIN && err != unix.EINTR
	})
	if waited != nil {
		return nil, waited
	}
	if err != nil {
		// syscall.Errno tells what is temporary.
		return nil, fmt.Errorf("accept: %w", err)
	}
	c := &fileConn{File: os.NewFile(uintptr(fd), "vsock"), local: l.addr, remote: vsockAddr{}}
	if vm, ok := peer.(*unix.SockaddrVM); ok {
		c.remote = vsockAddr{vm.CID, vm.Port}
	}
	return c, nil
}

// A fileConn is a net.Conn over a socket.
type fileConn struct {
	*os.File
	local, remote net.Addr
}

func (c *fileConn) LocalAddr() net.Addr  { return c.local }
func (c *fileConn) RemoteAddr() net.Addr { return c.remote }
func (c *fileConn) Socket()              {} // makes it a server.Socket
