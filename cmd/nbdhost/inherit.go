package main

import (
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"strconv"

	"golang.org/x/sys/unix"

	"nbdhost/protocol"
)

// firstInherited is the first descriptor that a starting process hands over
// (sd_listen_fds(3)).
const firstInherited = 3

var listenVariables = []string{"LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"}

// inheritSockets returns how many listening sockets the starting process, such as
// systemd or a libnbd program, has handed over. It hides them and the variables
// that say so from the programs that modules run.
func inheritSockets() (int, error) {
	pid, fds := os.Getenv("LISTEN_PID"), os.Getenv("LISTEN_FDS")
	if fds == "" || pid != strconv.Itoa(os.Getpid()) {
		return 0, nil // none, or another process's
	}
	for _, v := range listenVariables {
		os.Unsetenv(v)
	}
	n, err := strconv.ParseUint(fds, 10, 16)
	if err != nil || n == 0 {
		return 0, fmt.Errorf("read LISTEN_FDS: got %q: need the number of sockets from descriptor %d on", fds, firstInherited)
	}
	for fd := firstInherited; fd < firstInherited+int(n); fd++ {
		if _, err := unix.FcntlInt(uintptr(fd), unix.F_SETFD, unix.FD_CLOEXEC); err != nil {
			return 0, fmt.Errorf("read LISTEN_FDS: got %d: descriptor %d: %w", n, fd, err)
		}
	}
	return int(n), nil
}

// listenInherited listens on the sockets that were handed over.
func listenInherited(o *options, log *slog.Logger) (*endpoint, error) {
	var fds []int
	for fd := range o.inherited {
		fds = append(fds, firstInherited+fd)
	}
	log.Debug(fmt.Sprintf("using socket activation, number of sockets = %d", o.inherited))
	return listenOn(o, "LISTEN_FDS", fds)
}

// listenOn listens on sockets that another process has made; from is who says so.
func listenOn(o *options, from string, fds []int) (_ *endpoint, err error) {
	e := &endpoint{inherited: true}
	defer func() {
		if err != nil {
			e.abandon()
		}
	}()
	for i, fd := range fds {
		listening, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_ACCEPTCONN)
		if err == nil && listening == 0 {
			err = errors.New("it does not listen")
		}
		if err != nil {
			return nil, fmt.Errorf("use descriptor %d of %s: %w: need a socket that listens", fd, from, err)
		}
		l, err := inheritListener(fd, o)
		if err != nil {
			return nil, fmt.Errorf("use descriptor %d of %s: %w", fd, from, err)
		}
		e.listeners = append(e.listeners, l)
		if i == 0 {
			e.uri = uriOf(l.Addr(), o.export)
		}
	}
	return e, nil
}

// inheritListener takes descriptor fd over.
func inheritListener(fd int, o *options) (net.Listener, error) {
	if sa, err := unix.Getsockname(fd); err != nil {
		return nil, err
	} else if vm, ok := sa.(*unix.SockaddrVM); ok {
		return newVsockListener(fd, vm)
	}
	set, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_KEEPALIVE)
	if err != nil {
		return nil, err
	}
	f := os.NewFile(uintptr(fd), "inherited socket")
	defer f.Close() // FileListener has a copy
	l, err := net.FileListener(f)
	if tcp, ok := l.(*net.TCPListener); ok {
		if err := setSendTimeout(fd, o.sendTimeout); err != nil {
			l.Close()
			return nil, err
		}
		return &tcpListener{tcp, o.keepalive || set != 0}, nil
	}
	return l, err
}

// A tcpListener is one that this program did not make, so that the package net
// would send keepalives in its own way.
type tcpListener struct {
	*net.TCPListener
	keepalive bool
}

func (l *tcpListener) Accept() (net.Conn, error) {
	c, err := l.AcceptTCP()
	if err != nil {
		return nil, err
	}
	if err := c.SetKeepAlive(l.keepalive); err != nil {
		c.Close()
		return nil, err
	}
	return c, nil
}

// uriOf returns the URI of a server that listens on a.
func uriOf(a net.Addr, export string) protocol.URI {
	u := protocol.URI{Export: export}
	switch a := a.(type) {
	case *net.UnixAddr:
		u.Transport, u.Socket = protocol.TransportUnix, a.Name
	case *net.TCPAddr:
		u.Transport, u.Host, u.Port = protocol.TransportTCP, a.IP.String(), uint32(a.Port)
		if a.IP.IsUnspecified() {
			u.Host = "localhost"
		}
	case vsockAddr:
		u.Transport, u.CID, u.Port = protocol.TransportVsock, unix.VMADDR_CID_LOCAL, a.port
	}
	return u
}
