package client

import (
	"bytes"
	"context"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"

	"go.uber.org/goleak"

	"nbdhost/protocol"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// serve starts a server by socket activation, so that it can be connected to
// at once, and ends it with the test. It returns the URI of the default export.
func serve(t *testing.T, name string, args ...string) string {
	t.Helper()
	socket := filepath.Join(t.TempDir(), "s")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: socket})
	if err != nil {
		t.Fatal(err)
	}
	l.SetUnlinkOnClose(false)
	defer l.Close()
	f, err := l.File()
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	// The pid is the shell's own: it becomes the server.
	cmd := exec.Command("/bin/sh", append([]string{"-c", `LISTEN_FDS=1 LISTEN_PID=$$ exec "$@"`, "sh", name}, args...)...)
	cmd.ExtraFiles = []*os.File{f}
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cmd.Process.Signal(syscall.SIGTERM)
		cmd.Wait()
		if t.Failed() {
			t.Logf("%s %q:\n%s", name, args, stderr.Bytes())
		}
	})
	return (&protocol.URI{Transport: protocol.TransportUnix, Socket: socket}).String()
}

func nbdkit(t *testing.T, args ...string) string {
	t.Helper()
	return serve(t, "nbdkit", append([]string{"-f"}, args...)...)
}

// connect is Dial, with a Close at the end of the test.
func connect(t *testing.T, uri string, opts *Options) *Conn {
	t.Helper()
	c, err := Dial(context.Background(), uri, opts)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

// script runs a server that is a function on the other end of a socket, for
// what no real server does. When it returns the client reads the stream's end.
func script(t *testing.T, server func(net.Conn)) net.Conn {
	t.Helper()
	fds, err := syscall.Socketpair(syscall.AF_UNIX, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	var ends [2]*net.UnixConn
	for i, fd := range fds {
		f := os.NewFile(uintptr(fd), "socketpair")
		nc, err := net.FileConn(f)
		f.Close()
		if err != nil {
			t.Fatal(err)
		}
		ends[i] = nc.(*net.UnixConn)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		defer ends[1].Close()
		server(ends[1])
		ends[1].CloseWrite()
		// Take what still comes, so that the client's writes do not fail.
		io.Copy(io.Discard, ends[1])
	}()
	t.Cleanup(func() { ends[0].Close(); <-done })
	return ends[0]
}

// fixture compiles a plugin against nbdkit's own header.
func fixture(t *testing.T, source string) string {
	t.Helper()
	out := filepath.Join(t.TempDir(), "plugin.so")
	cmd := exec.Command("gcc", "-shared", "-fPIC", "-Wall", "-Werror", "-o", out, filepath.Join("testdata", source))
	if b, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v: %v\n%s", cmd.Args, err, b)
	}
	return out
}
