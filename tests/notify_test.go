package tests

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
)

// A manager is what systemd is to a service of Type=notify: a datagram socket.
type manager struct {
	t *testing.T
	*net.UnixConn
}

func newManager(t *testing.T, name string) *manager {
	t.Helper()
	c, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: name, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return &manager{t, c}
}

// start runs the program under test as a service, in dir.
func (m *manager) start(dir string, env []string, args ...string) *server {
	m.t.Helper()
	s := &server{t: m.t, program: nbdhost, dir: dir, network: "unix", address: filepath.Join(dir, "sock"), args: args, exited: make(chan struct{})}
	stderr, err := os.Create(s.stderrPath())
	if err != nil {
		m.t.Fatal(err)
	}
	defer stderr.Close()
	cmd := exec.Command(nbdhost, append([]string{"-f", "-U", s.address}, args...)...)
	cmd.Dir, cmd.Stderr = dir, stderr
	cmd.Env = append(append(os.Environ(), "NOTIFY_SOCKET="+m.LocalAddr().String(), "TMPDIR="+dir, "LC_ALL=C"), env...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := cmd.Start(); err != nil {
		m.t.Fatal(err)
	}
	s.pid = cmd.Process.Pid
	go func() {
		s.status = cmd.Wait()
		close(s.exited)
	}()
	m.t.Cleanup(func() {
		cmd.Process.Kill()
		<-s.exited
		if m.t.Failed() {
			m.t.Log(s.stderr())
		}
	})
	return s
}

// next returns the lines of the next message of which one begins with prefix.
func (m *manager) next(prefix string) []string {
	m.t.Helper()
	m.SetReadDeadline(time.Now().Add(patience))
	buf := make([]byte, 4096)
	for {
		n, err := m.Read(buf)
		if err != nil {
			m.t.Fatalf("wait for %s: %v", prefix, err)
		}
		lines := strings.Split(string(buf[:n]), "\n")
		if slices.ContainsFunc(lines, func(l string) bool { return strings.HasPrefix(l, prefix) }) {
			return lines
		}
	}
}

// TestNotify: a service manager is told when clients can connect, that the server is
// alive, how it is, and that it stops; and what runs below the server hears nothing of
// the manager.
func TestNotify(t *testing.T) {
	t.Parallel()
	onlyNbdhost(t)
	for _, test := range []struct {
		name, address string
		args          []string
	}{
		{"path", "DIR/notify", nil},
		{"abstract", "@DIR/notify", nil},
		{"supervised", "DIR/notify", []string{"--supervise"}},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			dir := tempDir(t)
			m := newManager(t, strings.ReplaceAll(test.address, "DIR", dir))
			s := m.start(dir, []string{"WATCHDOG_USEC=200000"}, append(test.args, "eval", "get_size=echo 1M", "pread=dd if=/dev/zero bs=$3 count=1 status=none",
				`get_ready=env >`+dir+`/env`)...)
			want := []string{"READY=1", fmt.Sprintf("MAINPID=%d", s.pid)}
			if got := m.next("READY"); !slices.Equal(got, want) {
				t.Errorf("got %q, want %q", got, want)
			}
			for range 3 {
				m.next("WATCHDOG=1")
			}
			c := s.hello(false)
			c.read(1, 0, 512)
			c.want(1, 0)
			if got := m.next("STATUS="); !strings.HasPrefix(got[0], "STATUS=serving 1 client, ") || !strings.HasSuffix(got[0], " MiB/s") {
				t.Errorf("got %q, want one client and rates", got)
			}
			c.disc()
			s.signal(syscall.SIGTERM)
			if got, want := m.next("STOPPING"), []string{"STOPPING=1", "STATUS=stopping"}; !slices.Equal(got, want) {
				t.Errorf("got %q, want %q", got, want)
			}
			s.wait()
			env := command(t, "cat", filepath.Join(dir, "env"))
			for _, v := range []string{"NOTIFY_SOCKET=", "WATCHDOG_", "NBDHOST_"} {
				if strings.Contains("\n"+env, "\n"+v) {
					t.Errorf("a program that a plugin runs has %s in its environment", v)
				}
			}
		})
	}

	// A service that starts a server for itself is the one that speaks to its manager, and what the
	// server runs may speak too.
	t.Run("another's", func(t *testing.T) {
		t.Parallel()
		dir := tempDir(t)
		m := newManager(t, filepath.Join(dir, "notify"))
		ready := filepath.Join(dir, "ready")
		w, err := newWatch(dir, "ready")
		if err != nil {
			t.Fatal(err)
		}
		defer w.Close()
		s := m.start(dir, []string{"SYSTEMD_EXEC_PID=1"}, "-P", ready, "eval", "get_size=echo 1M", "after_fork=echo $NOTIFY_SOCKET >"+dir+"/env")
		if err := w.wait(); err != nil {
			t.Fatal(err)
		}
		s.signal(syscall.SIGTERM)
		s.wait()
		if got, want := command(t, "cat", filepath.Join(dir, "env")), m.LocalAddr().String()+"\n"; got != want {
			t.Errorf("the plugin knows of the manager %q, want %q", got, want)
		}
		if _, err := m.WriteTo([]byte("the end"), m.LocalAddr()); err != nil { // behind all that there is
			t.Fatal(err)
		}
		if got := m.next(""); !slices.Equal(got, []string{"the end"}) {
			t.Errorf("the manager got %q", got)
		}
	})
	t.Run("a watchdog that makes no sense", func(t *testing.T) {
		t.Parallel()
		dir := tempDir(t)
		m := newManager(t, filepath.Join(dir, "notify"))
		s := m.start(dir, []string{"WATCHDOG_USEC=18446744073709551615"}, "memory", "1M")
		m.next("READY")
		s.signal(syscall.SIGTERM)
		s.wait()
		wantLog(t, s, `nbdkit: warning: read WATCHDOG_USEC: got "18446744073709551615": need a number of microseconds; going on without`)
	})

	// The watchdog is fed by whoever lives: the server, and between two servers the
	// supervisor.
	t.Run("crash", func(t *testing.T) {
		t.Parallel()
		dir := tempDir(t)
		m := newManager(t, filepath.Join(dir, "notify"))
		s := m.start(dir, []string{"WATCHDOG_USEC=200000"}, "--supervise", fixture(t, "crash"), "do=_exit")
		m.next("READY")
		for range 3 {
			s.crash()
			if got := m.next("STATUS="); !strings.HasPrefix(got[0], "STATUS=restarting: server process ") {
				t.Errorf("got %q, want that the server is started again", got)
			}
			m.next("WATCHDOG=1")
			s.hello(false).disc()
		}
		s.signal(syscall.SIGTERM)
		m.next("STOPPING")
		s.wait()
	})

	// Another process's watchdog, a manager that is not there, and a name that is none.
	t.Run("environment", func(t *testing.T) {
		t.Parallel()
		dir := tempDir(t)
		m := newManager(t, filepath.Join(dir, "notify"))
		s := m.start(dir, []string{"WATCHDOG_USEC=1", "WATCHDOG_PID=1"}, "memory", "1M")
		m.next("READY")
		s.hello(false).disc()
		s.signal(syscall.SIGTERM)
		buf := make([]byte, 4096)
		for n := 0; !strings.HasPrefix(string(buf[:n]), "STOPPING"); {
			var err error
			if n, err = m.Read(buf); err != nil || strings.Contains(string(buf[:n]), "WATCHDOG") {
				t.Fatalf("got %q, %v", buf[:n], err)
			}
		}
		s.wait()
		for value, says := range map[string]string{
			dir + "/nobody": "connect to NOTIFY_SOCKET " + dir + "/nobody: no such file or directory",
			"relative":      `read NOTIFY_SOCKET: got "relative": need a path, or an abstract name that begins with @`,
		} {
			cmd := exec.Command(nbdhost, "memory", "1M", "--run", "true")
			cmd.Env = append(os.Environ(), "NOTIFY_SOCKET="+value, "TMPDIR="+dir)
			out, err := cmd.CombinedOutput()
			if want := "nbdkit: warning: " + says + "; going on without\n"; err != nil || string(out) != want {
				t.Errorf("got %v, %q, want %q", err, out, want)
			}
		}
	})
}
