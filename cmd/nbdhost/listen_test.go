package main

import (
	"errors"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"nbdhost/protocol"
)

var quiet = slog.New(slog.DiscardHandler)

// socketOption returns what a connection or listener has for an option of its socket.
func socketOption(t *testing.T, c any, level, option int) (value int) {
	t.Helper()
	raw, err := c.(syscall.Conn).SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	raw.Control(func(fd uintptr) { value, err = unix.GetsockoptInt(int(fd), level, option) })
	if err != nil {
		t.Fatal(err)
	}
	return value
}

func keepalive(t *testing.T, c net.Conn) bool {
	t.Helper()
	return socketOption(t, c, unix.SOL_SOCKET, unix.SO_KEEPALIVE) != 0
}

// listening returns a socket of TCP that listens, as another process hands it over.
func listening(t *testing.T) (fd int) {
	t.Helper()
	var config net.ListenConfig
	config.SetMultipathTCP(false)
	l, err := config.Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	f, err := l.(*net.TCPListener).File()
	if err != nil {
		t.Fatal(err)
	}
	l.Close()
	fd, err = unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 3)
	f.Close()
	if err != nil {
		t.Fatal(err)
	}
	return fd
}

// accepted returns the server's end of a connection to l.
func accepted(t *testing.T, l net.Listener) net.Conn {
	t.Helper()
	client, err := net.Dial(l.Addr().Network(), l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { client.Close() })
	c, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

// Keepalives are sent with --keepalive only, whoever made the socket.
func TestKeepalive(t *testing.T) {
	for _, want := range []bool{false, true} {
		e, err := listen(&options{port: "0", address: "127.0.0.1", family: "tcp", keepalive: want}, quiet)
		if err != nil {
			t.Fatal(err)
		}
		defer e.abandon()
		if got := keepalive(t, accepted(t, e.listeners[0])); got != want {
			t.Errorf("--keepalive %v: got %v", want, got)
		}
	}
	for _, socket := range []bool{false, true} {
		for _, option := range []bool{false, true} {
			fd := listening(t)
			if socket {
				if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_KEEPALIVE, 1); err != nil {
					t.Fatal(err)
				}
			}
			inherited, err := inheritListener(fd, &options{keepalive: option})
			if err != nil {
				t.Fatal(err)
			}
			defer inherited.Close()
			if got := keepalive(t, accepted(t, inherited)); got != (socket || option) {
				t.Errorf("an inherited socket with %v, --keepalive %v: got %v", socket, option, got)
			}
		}
	}
}

// Connections have the timeout of --send-timeout, whoever made the socket.
func TestSendTimeout(t *testing.T) {
	for _, o := range []struct {
		timeout time.Duration
		want    int // in ms, as the kernel has it
	}{{0, 0}, {time.Nanosecond, 1}, {1500 * time.Microsecond, 2}, {30 * time.Second, 30_000}, {1<<63 - 1, 1<<31 - 1}} {
		e, err := listen(&options{port: "0", address: "127.0.0.1", family: "tcp", sendTimeout: o.timeout}, quiet)
		if err != nil {
			t.Fatal(err)
		}
		defer e.abandon()
		inherited, err := inheritListener(listening(t), &options{sendTimeout: o.timeout})
		if err != nil {
			t.Fatal(err)
		}
		defer inherited.Close()
		for _, l := range []net.Listener{e.listeners[0], inherited} {
			if got := socketOption(t, accepted(t, l), unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT); got != o.want {
				t.Errorf("%T, %v: got %d ms, need %d", l, o.timeout, got, o.want)
			}
		}
	}
}

// Who wants multipath TCP gets TCP.
func TestSinglePath(t *testing.T) {
	e, err := listen(&options{port: "0", address: "127.0.0.1", family: "tcp"}, quiet)
	if err != nil {
		t.Fatal(err)
	}
	defer e.abandon()
	if got := socketOption(t, e.listeners[0], unix.SOL_SOCKET, unix.SO_PROTOCOL); got != unix.IPPROTO_TCP {
		t.Errorf("got protocol %d, need %d", got, unix.IPPROTO_TCP)
	}
}

func TestInheritListener(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	l.SetUnlinkOnClose(false)
	f, err := l.File()
	if err != nil {
		t.Fatal(err)
	}
	l.Close()
	fd, err := unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 3)
	f.Close()
	if err != nil {
		t.Fatal(err)
	}
	got, err := inheritListener(fd, &options{})
	if err != nil {
		t.Fatal(err)
	}
	u := uriOf(got.Addr(), "x")
	if want := "nbd+unix:///x?socket=" + path; u.String() != want {
		t.Errorf("got %v, want %s", &u, want)
	}
	accepted(t, got)
	// It is the other process's: its file stays.
	(&endpoint{listeners: []net.Listener{got}, uri: u, inherited: true}).abandon()
	if _, err := os.Stat(path); err != nil {
		t.Error(err)
	}
}

func TestUriOf(t *testing.T) {
	for _, tt := range []struct {
		a    net.Addr
		want string
	}{
		{&net.TCPAddr{IP: net.IPv4zero, Port: 10809}, "nbd://localhost"},
		{&net.TCPAddr{IP: net.IPv6loopback, Port: 1}, "nbd://[::1]:1"},
		{vsockAddr{unix.VMADDR_CID_ANY, 7}, "nbd+vsock://1:7"},
	} {
		if u := uriOf(tt.a, ""); u.String() != tt.want {
			t.Errorf("%v: got %v, want %s", tt.a, &u, tt.want)
		}
	}
}

// A connection over vsock is one like others: it is read and written, it waits
// with a deadline, and closing the listener ends Accept.
func TestVsock(t *testing.T) {
	e, err := listen(&options{vsock: true, port: "0"}, quiet)
	if errors.Is(err, unix.EAFNOSUPPORT) {
		t.Skip(err)
	} else if err != nil {
		t.Fatal(err)
	}
	defer e.abandon()
	if e.uri.Transport != protocol.TransportVsock || e.uri.Port == 0 || e.uri.Port == unix.VMADDR_PORT_ANY {
		t.Errorf("got URI %v, need the port that was taken", &e.uri)
	}
	l := e.listeners[0]
	ended := make(chan error, 1)
	fd, err := unix.Socket(unix.AF_VSOCK, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	client := os.NewFile(uintptr(fd), "client")
	defer client.Close()
	if _, err := os.Stat("/sys/module/vsock_loopback"); err != nil {
		t.Logf("no loopback of vsock here: %v", err)
	} else {
		if err := unix.Connect(fd, &unix.SockaddrVM{CID: unix.VMADDR_CID_LOCAL, Port: e.uri.Port}); err != nil {
			t.Fatal(err)
		}
		c, err := l.Accept()
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		client.WriteString("ping")
		b := make([]byte, 4)
		if _, err := io.ReadFull(c, b); err != nil || string(b) != "ping" {
			t.Errorf("got %q, %v", b, err)
		}
		if c.RemoteAddr().String() == l.Addr().String() {
			t.Errorf("got the address %v for both ends", c.RemoteAddr())
		}
	}
	go func() {
		_, err := l.Accept()
		ended <- err
	}()
	l.Close()
	if err := <-ended; err == nil {
		t.Error("Accept went on after Close")
	}
}

func TestListenErrors(t *testing.T) {
	if _, err := listen(&options{vsock: true, port: "x"}, quiet); err == nil {
		t.Error("a port of letters: got no error")
	}
	if _, err := lookUpIdentity("", "nosuchgroup"); err == nil {
		t.Error("a group that is none: got no error")
	}
	id, err := lookUpIdentity("4000000000", "")
	if err != nil || id.uid != 4000000000 || id.gid != keep {
		t.Errorf("a user who has only a number: got %+v, %v", id, err)
	}
	id, err = lookUpIdentity("root", "")
	if err != nil || id.uid != 0 || id.gid != 0 || len(id.groups) == 0 {
		t.Errorf("root: got %+v, %v", id, err)
	}
}

// Addresses of IPv4 as inet_aton(3) reads them.
func TestParseShort(t *testing.T) {
	for text, want := range map[string]string{
		"0": "0.0.0.0", "127.1": "127.0.0.1", "2130706433": "127.0.0.1", "0x7f000001": "127.0.0.1",
		"127.0.0.01": "127.0.0.1", "1.2.0x304": "1.2.3.4", "0377.1.2.3": "255.1.2.3",
		"": "", "1.": "", "256.1": "", "4294967296": "", "1.2.3.4.5": "", "1_0": "", "0b1": "", "localhost": "", "-1": "",
	} {
		got, err := parseShort(text)
		if (err != nil) != (want == "") || err == nil && got.String() != want {
			t.Errorf("%q: got %v, %v, need %q", text, got, err, want)
		}
	}
}

// The socket that a killed server has left is replaced; what anybody uses, or is no
// socket, is not.
func TestDeadSocket(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	e, err := listenUnix(path, "", quiet)
	if err != nil {
		t.Fatal(err)
	}
	connected, l := make(chan struct{}), e.listeners[0]
	go func() {
		if _, err := l.Accept(); err == nil {
			close(connected)
		}
	}()
	if _, err := listenUnix(path, "", quiet); err == nil || !strings.Contains(err.Error(), "address already in use: stop the server") {
		t.Errorf("in use: got %v", err)
	}
	select {
	case <-connected:
		t.Error("the server has had a client")
	default:
	}
	l.Close()
	if e, err = listenUnix(path, "", quiet); err != nil {
		t.Fatal(err)
	}
	e.listeners[0].Close()
	os.Remove(path)
	if err := os.WriteFile(path, []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := listenUnix(path, "", quiet); err == nil {
		t.Error("a file was replaced")
	}
	if b, err := os.ReadFile(path); string(b) != "precious" {
		t.Errorf("got %q, %v", b, err)
	}
}

// Several servers that find a dead socket at once do not take it away from each other.
func TestDeadSocketOfMany(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	for range 3000 {
		e, err := listenUnix(path, "", quiet)
		if err != nil {
			t.Fatal(err)
		}
		e.listeners[0].Close() // its file stays
		var mu sync.Mutex
		var bound []net.Listener
		var servers sync.WaitGroup
		for range 4 {
			servers.Go(func() {
				if e, err := listenUnix(path, "", quiet); err == nil {
					mu.Lock()
					bound = append(bound, e.listeners...)
					mu.Unlock()
				}
			})
		}
		servers.Wait()
		for _, l := range bound {
			l.Close()
		}
		os.Remove(path)
		if len(bound) > 1 {
			t.Fatalf("%d servers have bound to one socket", len(bound))
		}
	}
}
