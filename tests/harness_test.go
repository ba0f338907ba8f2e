package tests

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// patience ends what hangs. Nothing is expected to take so long.
const patience = 3 * time.Minute

// A scenario is something that two servers are asked to do alike.
type scenario struct {
	name string
	// tcp serves on 127.0.0.1 and not on a Unix socket.
	tcp bool
	// setup, if any, makes files in the server's own directory.
	setup func(t *testing.T, dir string)
	// args are the server's, after those that the harness adds. DIR in one
	// stands for the server's own directory.
	args []string
	// client returns what is compared.
	client func(t *testing.T, s *server) string
	// after, if any, returns more to compare when the server has stopped.
	after func(t *testing.T, dir string) string
}

// compare runs the scenario under nbdkit and under the program under test, each
// in a directory of its own, and wants both to end well with equal results.
func compare(t *testing.T, sc scenario) {
	t.Helper()
	want := sc.run(t, nbdkit)
	got := sc.run(t, nbdhost)
	if got != want {
		t.Errorf("%s is unlike nbdkit in this:\n%s", underTest(), difference(want, got))
	}
}

func (sc *scenario) run(t *testing.T, program string) string {
	t.Helper()
	dir := tempDir(t)
	if sc.setup != nil {
		sc.setup(t, dir)
	}
	s := start(t, program, dir, sc.tcp, sc.args...)
	result := sc.client(t, s)
	s.stop()
	if sc.after != nil {
		result += sc.after(t, dir)
	}
	return s.anonymous(result)
}

// difference shows the first lines in which two texts differ.
func difference(want, got string) string {
	w, g := strings.Split(want, "\n"), strings.Split(got, "\n")
	line := func(s []string, i int) string {
		if i < len(s) {
			return s[i]
		}
		return "(nothing)"
	}
	var b strings.Builder
	for i, shown := 0, 0; i < max(len(w), len(g)) && shown < 5; i++ {
		if line(w, i) != line(g, i) {
			fmt.Fprintf(&b, "line %d\n  nbdkit: %.300s\n  got:    %.300s\n", i+1, line(w, i), line(g, i))
			shown++
		}
	}
	return b.String()
}

// A server is a running nbdkit or nbdhost. It serves until stop, or until the
// test ends and kills it.
type server struct {
	t       testing.TB
	program string
	dir     string // holds its socket, its pidfile and what it prints
	network string // "unix" or "tcp"
	address string
	pid     int
	args    []string

	exited chan struct{} // closed when it has exited
	status error         // of exec.Cmd.Wait, valid after exited
	once   sync.Once     // stop
}

// start runs program in the foreground and returns when its pidfile says that
// it serves. DIR in an argument stands for dir.
func start(t testing.TB, program, dir string, tcp bool, args ...string) *server {
	t.Helper()
	s, err := tryStart(t, program, dir, tcp, args...)
	for tcp && err != nil && strings.Contains(err.Error(), "in use") {
		// Someone else got the free port first.
		s, err = tryStart(t, program, dir, tcp, args...)
	}
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// startHost starts the program under test on a Unix socket.
func startHost(t testing.TB, args ...string) *server {
	t.Helper()
	return start(t, nbdhost, tempDir(t), false, args...)
}

func tryStart(t testing.TB, program, dir string, tcp bool, args ...string) (*server, error) {
	t.Helper()
	s := &server{t: t, program: program, dir: dir, args: args, exited: make(chan struct{})}
	pidfile := filepath.Join(dir, "pid")
	os.Remove(pidfile)
	all := []string{"-f", "-P", pidfile}
	if tcp {
		s.network, s.address = "tcp", freePort(t)
		_, port, _ := net.SplitHostPort(s.address)
		all = append(all, "-i", "127.0.0.1", "-p", port)
	} else {
		s.network, s.address = "unix", filepath.Join(dir, "sock")
		os.Remove(s.address)
		all = append(all, "-U", s.address)
	}
	for _, a := range args {
		all = append(all, strings.ReplaceAll(a, "DIR", dir))
	}

	ready, err := newWatch(dir, "pid")
	if err != nil {
		return nil, err
	}
	defer ready.Close()

	stderr, err := os.Create(s.stderrPath())
	if err != nil {
		return nil, err
	}
	defer stderr.Close()
	cmd := exec.Command(program, all...)
	cmd.Stderr = stderr
	// A race or a sanitizer's report must end the server, and so the test: a
	// server that leaves through C's exit does not tell in its status.
	cmd.Env = append(os.Environ(), "GORACE=halt_on_error=1 exitcode=66", "TMPDIR="+dir, "LC_ALL=C")
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	s.pid = cmd.Process.Pid
	go func() {
		s.status = cmd.Wait()
		close(s.exited)
		ready.Close()
	}()
	t.Cleanup(func() {
		select {
		case <-s.exited:
		default:
			cmd.Process.Kill()
			<-s.exited
		}
		if t.Failed() {
			last := s.stderr()
			last = last[max(0, len(last)-64<<10):] // it may have run for an hour
			t.Logf("%s %s\n%s", filepath.Base(program), strings.Join(all, " "), last)
		}
	})

	if err := ready.wait(); err != nil {
		select {
		case <-s.exited:
			return nil, fmt.Errorf("start %s %s: %v\n%s", program, strings.Join(all, " "), s.status, s.stderr())
		case <-time.After(patience):
			return nil, fmt.Errorf("start %s: %w", program, err)
		}
	}
	return s, nil
}

func (s *server) stderrPath() string { return filepath.Join(s.dir, "stderr") }

// stderr is what the server has printed so far.
func (s *server) stderr() string {
	b, _ := os.ReadFile(s.stderrPath())
	return string(b)
}

// uri is for clients, with the given export name.
func (s *server) uri(export string) string {
	if s.network == "tcp" {
		return "nbd://" + s.address + "/" + export
	}
	return "nbd+unix:///" + export + "?socket=" + s.address
}

// anonymous replaces in text what differs between any two servers.
func (s *server) anonymous(text string) string {
	return strings.NewReplacer(s.uri(""), "URI", s.address, "ADDRESS", s.dir, "DIR").Replace(text)
}

// serves tells whether the plugin is this one.
func (s *server) serves(plugin string) bool { return slices.Contains(s.args, plugin) }

func (s *server) dial() net.Conn {
	s.t.Helper()
	c, err := net.Dial(s.network, s.address)
	if err != nil {
		s.t.Fatal(err)
	}
	c.SetDeadline(time.Now().Add(patience))
	s.t.Cleanup(func() { c.Close() })
	return c
}

func (s *server) signal(sig syscall.Signal) {
	s.t.Helper()
	if err := syscall.Kill(s.pid, sig); err != nil {
		s.t.Fatalf("signal server: %v", err)
	}
}

// wait returns when the server has exited, and wants it to have ended well.
func (s *server) wait() {
	s.t.Helper()
	select {
	case <-s.exited:
	case <-time.After(patience):
		s.t.Fatalf("%s is still there %v after it was told to stop", s.program, patience)
	}
	switch {
	case s.status == nil:
	case strings.HasSuffix(s.program, "nbdkit") && (strings.HasPrefix(s.status.Error(), "signal: segmentation fault") ||
		strings.HasPrefix(s.status.Error(), "signal: aborted")):
		// With filters that have threads, and with multi-conn, nbdkit crashes now and then as it ends.
		s.t.Logf("%s: %v at its end", s.program, s.status)
	default:
		s.t.Errorf("%s: got %v, want exit status 0\n%s", s.program, s.status, s.stderr())
	}
	for _, report := range []string{"DATA RACE", "AddressSanitizer", "panic:", "fatal error:"} {
		if strings.Contains(s.stderr(), report) {
			s.t.Errorf("%s printed %q:\n%s", s.program, report, s.stderr())
		}
	}
	// The server led its own process group. What is left of it was left behind.
	if err := syscall.Kill(-s.pid, syscall.SIGKILL); !errors.Is(err, syscall.ESRCH) {
		s.t.Errorf("%s left processes behind", s.program)
	}
}

// stop ends the server with SIGTERM, once.
func (s *server) stop() {
	s.t.Helper()
	s.once.Do(func() {
		s.t.Helper()
		select {
		case <-s.exited:
		default:
			// It may have ended just now; how it did is seen below.
			if err := syscall.Kill(s.pid, syscall.SIGTERM); err != nil && !errors.Is(err, syscall.ESRCH) {
				s.t.Fatalf("signal server: %v", err)
			}
		}
		s.wait()
	})
}

// A watch tells when a file in a directory has been written and closed, or
// moved there.
type watch struct {
	*os.File
	name string
}

func newWatch(dir, name string) (*watch, error) {
	fd, err := unix.InotifyInit1(unix.IN_NONBLOCK | unix.IN_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("watch %s: %w", dir, err)
	}
	if _, err := unix.InotifyAddWatch(fd, dir, unix.IN_CLOSE_WRITE|unix.IN_MOVED_TO); err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("watch %s: %w", dir, err)
	}
	return &watch{os.NewFile(uintptr(fd), "inotify"), name}, nil
}

// wait returns nil when the file is there, and an error when the watch is closed.
func (w *watch) wait() error {
	w.SetDeadline(time.Now().Add(patience))
	buf := make([]byte, 4096)
	for {
		n, err := w.Read(buf)
		if err != nil {
			return err
		}
		for b := buf[:n]; len(b) >= unix.SizeofInotifyEvent; {
			size := unix.SizeofInotifyEvent + int(b[12]) + int(b[13])<<8
			name, _, _ := bytes.Cut(b[unix.SizeofInotifyEvent:size], []byte{0})
			if string(name) == w.name {
				return nil
			}
			b = b[size:]
		}
	}
}

// freePort is an address that nobody listens on just now.
func freePort(t testing.TB) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

// command runs a client and returns what it prints. The test fails if it does.
func command(t testing.TB, name string, args ...string) string {
	t.Helper()
	out, err := try(t, name, args...)
	if err != nil {
		t.Fatalf("%s %s: %v", name, strings.Join(args, " "), err)
	}
	return out
}

// try is command for a client that may fail; the error has what it printed on
// its standard error.
func try(t testing.TB, name string, args ...string) (string, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	cmd := exec.CommandContext(ctx, name, args...)
	var stderr strings.Builder
	cmd.Stderr = &stderr
	// nbdsh runs the first python3 in the path, and Debian's has the module.
	cmd.Env = append(os.Environ(), "LC_ALL=C", "PATH=/usr/sbin:/usr/bin:/sbin:/bin")
	out, err := cmd.Output()
	if err != nil {
		err = fmt.Errorf("%w: %s", err, strings.TrimSpace(stderr.String()))
	}
	return string(out), err
}

// digest identifies a file's bytes in what is compared.
func digest(t testing.TB, path string) string {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	h := sha256.New()
	n, err := io.Copy(h, f)
	if err != nil {
		t.Fatal(err)
	}
	return fmt.Sprintf("%d bytes, sha256 %x\n", n, h.Sum(nil))
}

// sameBytes wants two files to be equal.
func sameBytes(t testing.TB, got, want string) {
	t.Helper()
	if g, w := digest(t, got), digest(t, want); g != w {
		t.Errorf("%s: got %swant %s", filepath.Base(got), g, w)
	}
}

func copyFile(t testing.TB, to, from string) {
	t.Helper()
	command(t, "cp", "--sparse=always", from, to)
}

func writeFile(t testing.TB, path, text string, mode os.FileMode) {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), mode); err != nil {
		t.Fatal(err)
	}
}

// tempDir is like t.TempDir, with a path that is short enough for a socket in it.
func tempDir(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp(scratch, "")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

// kill ends the server as a crash does.
func (s *server) kill() {
	s.t.Helper()
	s.once.Do(func() {
		s.signal(syscall.SIGKILL)
		<-s.exited
	})
}
