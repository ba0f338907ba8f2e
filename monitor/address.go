package monitor

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// An Address is where a monitor listens: a TCP address, or a Unix socket.
type Address struct {
	network, address string
}

// Socket is the path of a Unix socket, or "".
func (a Address) Socket() string {
	if a.network == "unix" {
		return a.address
	}
	return ""
}

const maxSocket = 107 // bytes of a path in struct sockaddr_un, without the NUL

// ParseAddress reads HOST:PORT, where an empty host is 127.0.0.1, PORT alone, or
// unix:PATH. Only a host that says so is reached from other machines, such as 0.0.0.0.
func ParseAddress(s string) (Address, error) {
	bad := func(need string) (Address, error) {
		return Address{}, fmt.Errorf("got %q: need %s, such as :9809, 0.0.0.0:9809 or unix:/run/nbdhost/metrics.sock", s, need)
	}
	if path, ok := strings.CutPrefix(s, "unix:"); ok {
		if path == "" {
			return bad("a path behind unix:")
		}
		path, err := filepath.Abs(path)
		if err == nil && len(path) > maxSocket {
			err = fmt.Errorf("got a path of %d bytes (%s): need at most %d; choose a shorter one", len(path), path, maxSocket)
		}
		return Address{"unix", path}, err
	}
	host, port := "", s
	if strings.Contains(s, ":") {
		var err error
		if host, port, err = net.SplitHostPort(s); err != nil {
			return bad("HOST:PORT (with an IPv6 address in brackets), PORT or unix:PATH")
		}
	}
	n, err := strconv.ParseUint(port, 10, 16)
	if err != nil {
		return bad("a port from 0 to 65535")
	}
	if host == "" {
		host = "127.0.0.1"
	}
	return Address{"tcp", net.JoinHostPort(host, strconv.FormatUint(n, 10))}, nil
}

// String is what ParseAddress reads.
func (a Address) String() string {
	if a.network == "unix" {
		return "unix:" + a.address
	}
	return a.address
}

// Listen binds the address. The file of a Unix socket is removed when the listener is
// closed.
func Listen(a Address) (net.Listener, error) {
	l, err := net.Listen(a.network, a.address)
	if err == nil {
		return l, nil
	}
	hint := ""
	switch {
	case errors.Is(err, syscall.EADDRINUSE) && a.network == "unix":
		hint = ": stop the server that uses it, remove the file if it is no socket, or give another path"
	case errors.Is(err, syscall.EADDRINUSE):
		hint = ": stop the other server, or give another port"
	case errors.Is(err, syscall.EADDRNOTAVAIL):
		hint = ": need an address of this machine"
	}
	if errno := syscall.Errno(0); errors.As(err, &errno) {
		err = errno // package net wraps it into more words than a user needs
	}
	return nil, fmt.Errorf("bind to %v for metrics and health: %w%s", a, err, hint)
}

// Check asks the monitor at a whether its server is ready, and returns nil if it is. An
// address that means all of this machine's is asked at its loopback.
func Check(ctx context.Context, a Address) error {
	client := http.Client{Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, a.network, a.address)
		},
	}}
	r, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://nbdhost/readyz", nil)
	if err != nil {
		return err
	}
	answer, err := client.Do(r)
	if err != nil {
		switch errno := syscall.Errno(0); {
		case errors.As(err, &errno):
			err = errno
		case errors.Is(err, context.DeadlineExceeded):
			err = errors.New("no answer in time")
		}
		return fmt.Errorf("ask %v: %w", a, err)
	}
	defer answer.Body.Close()
	text, err := io.ReadAll(io.LimitReader(answer.Body, 4096))
	if answer.StatusCode == http.StatusOK && err == nil {
		return nil
	}
	if answer.StatusCode != http.StatusServiceUnavailable {
		return fmt.Errorf("ask %v: got %s: need an address that --metrics has", a, answer.Status)
	}
	return errors.New(strings.TrimSpace(string(text)))
}

// CheckTimeout is how long Check may sensibly take.
const CheckTimeout = 30 * time.Second
