package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"syscall"

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
		// Only the owner may enter the directory that MkdirTemp makes.
		if e.private, err = os.MkdirTemp("", "nbdhost"); err != nil {
			return nil, fmt.Errorf("make directory for the private socket: %w", err)
		}
		path = filepath.Join(e.private, "socket")
	}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		e.remove()
		err = cause(err)
		if errors.Is(err, syscall.EADDRINUSE) {
			return nil, fmt.Errorf("bind to %s: %w: remove the file if no server uses it, or give another --unix", path, err)
		}
		return nil, fmt.Errorf("bind to %s: %w", path, err)
	}
	l.SetUnlinkOnClose(false)
	e.listeners = []net.Listener{l}
	e.uri = protocol.URI{Transport: protocol.TransportUnix, Socket: path, Export: export}
	log.Debug("bound to unix socket " + path)
	return e, nil
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
		e.listeners, err = bindTCP(addrs, port, o.address == "" && o.family == "tcp", o.keepalive)
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
	if a, err := netip.ParseAddr(o.address); o.address == "" || err == nil && a.IsUnspecified() {
		e.uri.Host = "localhost"
	}
	return e, nil
}

// addresses returns the IP addresses to listen on.
func addresses(o *options) ([]netip.Addr, error) {
	if o.address == "" {
		return map[string][]netip.Addr{
			"tcp":  {netip.IPv4Unspecified(), netip.IPv6Unspecified()},
			"tcp4": {netip.IPv4Unspecified()},
			"tcp6": {netip.IPv6Unspecified()},
		}[o.family], nil
	}
	network := "ip" + o.family[len("tcp"):]
	if a, err := netip.ParseAddr(o.address); err == nil {
		return []netip.Addr{a}, nil // -4 and -6 are about names
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

// bindTCP binds a socket to each address, all to one port. With any, a family
// that this machine does not have is left out.
func bindTCP(addrs []netip.Addr, port int, any, keepalive bool) (list []net.Listener, err error) {
	// With the kernel's times, which the administrator may set.
	config := net.ListenConfig{KeepAlive: -1, KeepAliveConfig: net.KeepAliveConfig{Enable: keepalive, Idle: -1, Interval: -1, Count: -1}}
	for i, a := range addrs {
		network := "tcp4"
		if a.Is6() {
			network = "tcp6" // with IPV6_V6ONLY, so that it does not take IPv4's port too
		}
		l, err := config.Listen(context.Background(), network, net.JoinHostPort(a.String(), strconv.Itoa(port)))
		if err != nil {
			if any && (errors.Is(err, syscall.EAFNOSUPPORT) || errors.Is(err, syscall.EADDRNOTAVAIL)) &&
				(len(list) > 0 || i < len(addrs)-1) {
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
	return list, nil
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
