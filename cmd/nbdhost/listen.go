package main

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"nbdhost/monitor"
	"nbdhost/protocol"
	"nbdhost/server"
)

// An endpoint is what clients connect to.
type endpoint struct {
	listeners []net.Listener
	conn      net.Conn     // the one client there is, and no listeners; or nil
	uri       protocol.URI // the zero one if there is none
	inherited bool         // the sockets are another process's, too
	private   string       // the directory of a private socket, or ""
	monitor   *monitor.Monitor
	// tls does the server's side of TLS handshakes; nil if TLS is off.
	tls func(net.Conn) (server.TLSConn, error)
}

// listen binds the sockets that the options ask for.
func listen(o *options, log *slog.Logger) (*endpoint, error) {
	switch {
	case o.superior != nil:
		log.Debug(fmt.Sprintf("using %d sockets of the supervisor", len(o.superior.Listeners)))
		return listenOn(o, "the supervisor", o.superior.Listeners)
	case o.inherited > 0:
		return listenInherited(o, log)
	case o.stdio:
		log.Debug("using standard input and output")
		return listenStdio()
	}
	if o.label != "" {
		if err := labelSockets(o.label); err != nil {
			return nil, err
		}
		defer labelSockets("") // the thread is the main one, which stays
	}
	switch {
	case o.vsock:
		return listenVsock(o, log)
	case o.unix != "":
		return listenUnix(o.unix, o.export, log)
	}
	return listenTCP(o, log)
}

// abandon takes away the sockets of a server that does not get to serve.
func (e *endpoint) abandon() {
	for _, l := range e.listeners {
		l.Close()
	}
	if e.conn != nil {
		e.conn.Close()
	}
	if e.uri.Socket != "" && !e.inherited {
		os.Remove(e.uri.Socket)
	}
	e.remove()
}

// remove takes away what must not outlive the server. The socket file of
// --unix=PATH stays, as nbdkit's does: nobody else's may be in its place by now.
func (e *endpoint) remove() {
	e.monitor.Close()
	if e.private != "" {
		os.RemoveAll(e.private)
	}
}

func listenUnix(path, export string, log *slog.Logger) (_ *endpoint, err error) {
	e := &endpoint{}
	if path == "-" {
		// Only the owner may enter the directory that MkdirTemp makes. $TMPDIR is often too long for a
		// socket's address.
		if e.private, err = os.MkdirTemp("/tmp", "nbdhost"); err != nil {
			e.private, err = os.MkdirTemp("", "nbdhost")
		}
		if err != nil {
			return nil, fmt.Errorf("make directory for the private socket: %w", err)
		}
		path = filepath.Join(e.private, "socket")
	}
	removeDead(path, log)
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		e.remove()
		err = cause(err)
		if errors.Is(err, syscall.EADDRINUSE) {
			return nil, fmt.Errorf("bind to %s: %w: stop the server that uses it, remove the file if it is no socket, or give another --unix", path, err)
		}
		return nil, fmt.Errorf("bind to %s: %w", path, err)
	}
	l.SetUnlinkOnClose(false)
	e.listeners = []net.Listener{l}
	e.uri = protocol.URI{Transport: protocol.TransportUnix, Socket: path, Export: export}
	log.Debug("bound to unix socket " + path)
	return e, nil
}

// removeDead removes path, if it is a socket that no process has any more, as it is left where one was
// killed, and always by --unix=PATH. To look for whoever has it must not look like a client:
// a datagram socket cannot be connected to one of streams, dead or alive, but the errors differ.
func removeDead(path string, log *slog.Logger) {
	dir, err := os.Open(filepath.Dir(path))
	if err != nil {
		return
	}
	defer dir.Close()
	// Between the look and the removal another server could take the place.
	if unix.Flock(int(dir.Fd()), unix.LOCK_EX|unix.LOCK_NB) != nil {
		return
	}
	if info, err := os.Lstat(path); err != nil || info.Mode().Type() != os.ModeSocket {
		return
	}
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return
	}
	defer unix.Close(fd)
	if unix.Connect(fd, &unix.SockaddrUnix{Name: path}) == unix.ECONNREFUSED && os.Remove(path) == nil {
		log.Debug("removed socket " + path + ", which no process had any more")
	}
}

// freePortTries is how often another free port is tried where the one that the
// first address got is taken on the next.
const freePortTries = 20

func listenTCP(o *options, log *slog.Logger) (*endpoint, error) {
	port := protocol.DefaultPort
	if o.port != "" {
		p, err := net.LookupPort("tcp", o.port)
		if err != nil {
			return nil, fmt.Errorf("look up port: %w", err)
		}
		port = p
	}
	addrs, err := addresses(o)
	if err != nil {
		return nil, err
	}
	e := &endpoint{}
	for try := 0; ; try++ {
		e.listeners, err = bindTCP(addrs, port, o, log)
		if port != 0 || try == freePortTries || !errors.Is(err, syscall.EADDRINUSE) {
			break
		}
	}
	if err != nil {
		return nil, err
	}
	for _, l := range e.listeners {
		a := l.Addr().(*net.TCPAddr)
		family := "IPv4"
		if a.IP.To4() == nil {
			family = "IPv6"
		}
		log.Debug(fmt.Sprintf("bound to %s address %v", family, a))
		port = a.Port
	}
	e.uri = protocol.URI{Transport: protocol.TransportTCP, Host: o.address, Port: uint32(port), Export: o.export}
	if len(addrs) > 0 && addrs[0].IsUnspecified() {
		e.uri.Host = "localhost"
	}
	return e, nil
}

// addresses returns the IP addresses to listen on.
func addresses(o *options) ([]netip.Addr, error) {
	if o.address == "" || o.address == "*" {
		return map[string][]netip.Addr{
			"tcp":  {netip.IPv4Unspecified(), netip.IPv6Unspecified()},
			"tcp4": {netip.IPv4Unspecified()},
			"tcp6": {netip.IPv6Unspecified()},
		}[o.family], nil
	}
	network := "ip" + o.family[len("tcp"):]
	a, err := netip.ParseAddr(o.address)
	if err != nil {
		a, err = parseShort(o.address)
	}
	if err == nil {
		if o.family == "tcp4" && a.Is6() || o.family == "tcp6" && a.Is4() {
			return nil, fmt.Errorf("option --ipaddr: got %s: need an address of the family of -4 or -6", o.address)
		}
		return []netip.Addr{a}, nil
	}
	addrs, err := net.DefaultResolver.LookupNetIP(context.Background(), network, o.address)
	if err != nil {
		return nil, fmt.Errorf("look up --ipaddr: %w", err)
	}
	seen := map[netip.Addr]bool{}
	var list []netip.Addr
	for _, a := range addrs {
		if a = a.Unmap(); !seen[a] {
			seen[a] = true
			list = append(list, a)
		}
	}
	return list, nil
}

// parseShort reads an address of IPv4 as inet_aton(3) does: one to four numbers, decimal, octal or
// hexadecimal, the last of which is all the bytes that are left.
func parseShort(s string) (netip.Addr, error) {
	var ip [4]byte
	numbers := strings.Split(s, ".")
	if len(numbers) > len(ip) {
		return netip.Addr{}, fmt.Errorf("got %q: need an address of IPv4", s)
	}
	value := uint64(0)
	for i, number := range numbers {
		bits := 8
		if i == len(numbers)-1 {
			bits = 8 * (len(ip) - i)
		}
		n, err := strconv.ParseUint(number, 0, bits)
		if err != nil || strings.ContainsAny(number, "_oO") || strings.HasPrefix(strings.ToLower(number), "0b") {
			return netip.Addr{}, fmt.Errorf("got %q: need an address of IPv4", s)
		}
		value = value<<bits | n
	}
	binary.BigEndian.PutUint32(ip[:], uint32(value))
	return netip.AddrFrom4(ip), nil
}

// bindTCP binds a socket to each address, all to one port. Of several, those that this machine does not
// have are left out, and, with a warning, those where somebody else has the port.
func bindTCP(addrs []netip.Addr, port int, o *options, log *slog.Logger) (list []net.Listener, err error) {
	free := port == 0
	// With the kernel's times, which the administrator may set.
	config := net.ListenConfig{KeepAlive: -1, KeepAliveConfig: net.KeepAliveConfig{Enable: o.keepalive, Idle: -1, Interval: -1, Count: -1}}
	// Multipath TCP, which package net takes otherwise, would let clients do what neither nbdkit's
	// can nor anybody has tried.
	config.SetMultipathTCP(false)
	config.Control = func(_, _ string, raw syscall.RawConn) (err error) {
		if controlErr := raw.Control(func(fd uintptr) { err = setSendTimeout(int(fd), o.sendTimeout) }); controlErr != nil {
			return controlErr
		}
		return err
	}
	var warnings []string
	for i, a := range addrs {
		network := "tcp4"
		if a.Is6() {
			network = "tcp6" // with IPV6_V6ONLY, so that it does not take IPv4's port too
		}
		l, err := config.Listen(context.Background(), network, net.JoinHostPort(a.String(), strconv.Itoa(port)))
		if err != nil {
			absent := errors.Is(err, syscall.EAFNOSUPPORT) || errors.Is(err, syscall.EADDRNOTAVAIL)
			inUse := errors.Is(err, syscall.EADDRINUSE) && !free
			if (absent || inUse) && (len(list) > 0 || i < len(addrs)-1) {
				if inUse {
					warnings = append(warnings, fmt.Sprintf("bind to %s: %v: serving on the other addresses only",
						net.JoinHostPort(a.String(), strconv.Itoa(port)), cause(err)))
				}
				continue
			}
			for _, l := range list {
				l.Close()
			}
			err = cause(err)
			where := net.JoinHostPort(a.String(), strconv.Itoa(port))
			switch {
			case errors.Is(err, syscall.EADDRINUSE):
				return nil, fmt.Errorf("bind to %s: %w: stop the other server, or give another --port (0 takes a free one)", where, err)
			case errors.Is(err, syscall.EADDRNOTAVAIL):
				return nil, fmt.Errorf("bind to %s: %w: need an address of this machine", where, err)
			case errors.Is(err, syscall.EACCES):
				return nil, fmt.Errorf("bind to %s: %w: ports below 1024 are the superuser's; give another --port", where, err)
			}
			return nil, fmt.Errorf("bind to %s: %w", where, err)
		}
		list = append(list, l)
		port = l.Addr().(*net.TCPAddr).Port // where it was 0, the next take the same
	}
	for _, w := range warnings {
		log.Warn(w)
	}
	return list, nil
}

// setSendTimeout has the kernel end connections that fd accepts, a socket of TCP, whose client has
// taken nothing of what it was sent for d (tcp(7), TCP_USER_TIMEOUT). 0 leaves that to the kernel.
func setSendTimeout(fd int, d time.Duration) error {
	if d == 0 {
		return nil
	}
	// In full milliseconds, of which 0 would be none.
	ms := (min(d, math.MaxInt32*time.Millisecond) + time.Millisecond - 1) / time.Millisecond
	err := unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, int(ms))
	if err == unix.ENOPROTOOPT {
		return errors.New("option --send-timeout: got a socket of multipath TCP: need one of TCP")
	}
	return os.NewSyscallError("setsockopt", err)
}

// cause returns the system's error number where err has one: package net wraps
// it into more words than a user needs.
func cause(err error) error {
	var errno syscall.Errno
	if errors.As(err, &errno) {
		return errno
	}
	return err
}
