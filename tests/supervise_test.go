package tests

import (
	"encoding/json"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"
)

// whereCrashes is the offset at which fixtures/crash.c does what do= says.
const whereCrashes = 65536

// crashes are the values of do= for which the server does not live on, with what is said
// about the plugin, and the status of a server that nobody supervises.
var crashes = []struct {
	do, says string
	status   int
}{
	{"segv", `plugin crash crashed with SIGSEGV in \.pread \(connection \d+, cookie 77, offset 65536, length 512\) at crash\.so\+0x[0-9a-f]+`, 139},
	{"divide", `plugin crash crashed with SIGFPE in \.pread \(connection \d+, cookie 77, offset 65536, length 512\) at crash\.so\+0x[0-9a-f]+`, 136},
	{"trap", `plugin crash crashed with SIGILL in \.pread \(connection \d+, cookie 77, offset 65536, length 512\) at crash\.so\+0x[0-9a-f]+`, 132},
	{"abort", `plugin crash aborted \(SIGABRT\) in \.pread \(connection \d+, cookie 77, offset 65536, length 512\) at libc\.so\.6\+0x[0-9a-f]+`, 134},
	{"libc", `plugin crash crashed with SIGSEGV in \.pread \(connection \d+, cookie 77, offset 65536, length 512\) at libc\.so\.6\+0x[0-9a-f]+`, 139},
	{"recurse", `plugin crash crashed with SIGSEGV in \.pread \(connection \d+, cookie 77, offset 65536, length 512\) at crash\.so\+0x[0-9a-f]+`, 139},
	{"thread", `a thread outside of calls crashed with SIGSEGV at crash\.so\+0x[0-9a-f]+`, 139},
	{"exit", `plugin crash called exit\(7\) in \.pread \(connection \d+, cookie 77, offset 65536, length 512\)`, 7},
	{"_exit", `plugin crash called _exit\(7\) in \.pread \(connection \d+, cookie 77, offset 65536, length 512\)`, 7},
	{"kill", ``, 137},
}

// wantLog wants a line of the server's to match.
func wantLog(t *testing.T, s *server, pattern string) {
	t.Helper()
	if !regexp.MustCompile(`(?m)^` + pattern + `$`).MatchString(s.stderr()) {
		t.Errorf("the log has no line that matches %s:\n%s", pattern, s.stderr())
	}
}

// crash lets a request of a new connection end the server, and wants that connection
// to end.
func (s *server) crash() {
	s.t.Helper()
	c := s.hello(false)
	c.read(77, whereCrashes, 512)
	c.wantEOF()
}

// TestCrash: without a supervisor the log says what call it was, and the program ends
// as the plugin made it, which leaves a core if the system is set up so.
func TestCrash(t *testing.T) {
	t.Parallel()
	onlyNbdhost(t)
	for _, c := range crashes {
		t.Run(c.do, func(t *testing.T) {
			t.Parallel()
			if asanEnabled {
				t.Skip("the sanitizer has crashes for itself")
			}
			s := startHost(t, fixture(t, "crash"), "do="+c.do)
			s.crash()
			<-s.exited
			var status int
			if e, ok := s.status.(*exec.ExitError); ok {
				w := e.Sys().(syscall.WaitStatus)
				if status = w.ExitStatus(); w.Signaled() {
					status = 128 + int(w.Signal())
				}
			}
			if status != c.status {
				t.Errorf("got status %d, want %d\n%s", status, c.status, s.stderr())
			}
			if c.says != "" {
				wantLog(t, s, `nbdkit: error: `+c.says)
			}
		})
	}
}

// TestCrashLogged: the crash is in the log, wherever that is.
func TestCrashLogged(t *testing.T) {
	t.Parallel()
	onlyNbdhost(t)
	if asanEnabled {
		t.Skip("the sanitizer has crashes for itself")
	}
	for format, want := range map[string]string{
		"text": `^nbdkit\[x\]: error: ` + crashes[0].says + `\n$`,
		"json": `^\{"level":"ERROR","name":"x","plugin":"crash","msg":"` + crashes[0].says + `","module":"crash",.*"length":512\}\n$`,
	} {
		s := startHost(t, "--log=DIR/log", "--log-format="+format, "--name=x", fixture(t, "crash"), "do=segv")
		s.crash()
		<-s.exited
		text, err := os.ReadFile(filepath.Join(s.dir, "log"))
		if err != nil {
			t.Fatal(err)
		}
		if format == "json" { // that the client came
			_, last, _ := strings.Cut(string(text), "\n")
			text = []byte(last)
		}
		if !regexp.MustCompile(want).Match(text) {
			t.Errorf("%s: got %s", format, text)
		}
		if strings.Contains(s.stderr(), "crashed") {
			t.Errorf("%s: standard error has %s", format, s.stderr())
		}
	}
}

// TestCrashInFilter: it is the plugin that crashed, and the client's request, also where a
// filter made the call.
func TestCrashInFilter(t *testing.T) {
	t.Parallel()
	onlyNbdhost(t)
	for _, model := range []string{"PARALLEL", "SERIALIZE_ALL_REQUESTS"} { // the latter on one thread
		s := startHost(t, "--supervise", "--filter=blocksize", "--filter=nofilter",
			fixture(t, "crash", "-DTHREAD_MODEL=NBDKIT_THREAD_MODEL_"+model), "do=segv", "maxdata=64k")
		c := s.hello(false)
		c.read(77, whereCrashes-1024, 2048)
		c.want(77, 0) // no request begins at the offset
		s.crash()
		s.crash()
		s.hello(false).disc() // only a server that runs ends in order
		s.stop()
		wantLog(t, s, `nbdkit: error: plugin crash crashed with SIGSEGV in \.pread \(connection 2, cookie 77, offset 65536, length 512\) at .*`)
	}
}

// TestSupervise: a crash takes only the connections that there were, what comes meanwhile
// waits, and the end is in order.
func TestSupervise(t *testing.T) {
	t.Parallel()
	onlyNbdhost(t)
	for _, c := range crashes {
		t.Run(c.do, func(t *testing.T) {
			t.Parallel()
			if asanEnabled {
				t.Skip("the sanitizer has crashes for itself")
			}
			for _, tcp := range []bool{false, true} {
				dir := tempDir(t)
				j := newJournal(t, dir)
				s := start(t, nbdhost, dir, tcp, "--supervise", fixture(t, "crash"), "journal=DIR/journal", "do="+c.do)
				other := s.hello(false)
				for range 2 {
					s.crash()
					// Nobody waits here for the next server: the socket takes the connection.
					again := s.hello(false)
					again.read(1, 0, 512)
					again.want(1, 0)
					again.disc()
				}
				other.wantEOF()
				s.stop()
				if c.says != "" {
					wantLog(t, s, `nbdkit: error: `+c.says)
				}
				wantLog(t, s, `nbdkit: error: server process \d+ (was ended by signal \d+ \(.*\)|exited with status 7): starting it again in 100ms`)
				wantLog(t, s, `nbdkit: error: server process \d+ (was ended by signal \d+ \(.*\)|exited with status 7): starting it again in 200ms`)
				lines := j.all()
				if n := count(lines, "unload"); n != 1 {
					t.Errorf("got .unload %d times, want it once, at the end", n)
				}
				if c.do == "segv" && len(lines) != 4 {
					t.Errorf("journal: got %q, want after_fork three times", lines)
				}
			}
		})
	}
}

// TestSuperviseStart: a plugin that cannot be configured is not started again before it
// has ever served, and later only so often.
func TestSuperviseStart(t *testing.T) {
	t.Parallel()
	onlyNbdhost(t)
	t.Run("first", func(t *testing.T) {
		t.Parallel()
		dir := tempDir(t)
		writeFile(t, filepath.Join(dir, "broken"), "", 0o600)
		got := runCLI(t, dir, "", nbdhost, "--supervise", "-f", "-U", "sock", "-P", "pid", fixture(t, "crash"), "broken=broken")
		want := "nbdkit: error: fails as long as broken is there\n"
		if got.status != 1 || got.stderr != want {
			t.Errorf("got status %d\n%swant status 1\n%s", got.status, got.stderr, want)
		}
		for _, name := range []string{"sock", "pid"} {
			if _, err := os.Lstat(filepath.Join(dir, name)); err == nil {
				t.Errorf("%s was left behind", name)
			}
		}
		if !asanEnabled {
			got = runCLI(t, dir, "", nbdhost, "--supervise", "-f", "-U", "sock", fixture(t, "crash"), "do=segv in config_complete")
			if got.status != 139 || !regexp.MustCompile(`^nbdkit: error: plugin crash crashed with SIGSEGV in \.config_complete at crash.so\+0x\w+\n`+
				`nbdhost: error: the server process \d+ was ended by signal 11 \(segmentation fault\) before it served\n$`).MatchString(got.stderr) {
				t.Errorf("got status %d\n%s", got.status, got.stderr)
			}
		}
		got = runCLI(t, dir, "", nbdhost, "--supervise", "-f", "-U", "sock", "no-such-plugin")
		if got.status != 1 || strings.Count(got.stderr, "\n") > 2 || !strings.HasPrefix(got.stderr, "nbdhost: error: find plugin no-such-plugin: ") {
			t.Errorf("got status %d\n%s", got.status, got.stderr)
		}
	})
	t.Run("later", func(t *testing.T) {
		t.Parallel()
		dir := tempDir(t)
		broken := filepath.Join(dir, "broken")
		s := start(t, nbdhost, dir, false, "--supervise", fixture(t, "crash"), "do=_exit", "broken=DIR/broken")
		writeFile(t, broken, "", 0o600)
		s.crash()
		waiting := s.dial()
		for !strings.Contains(s.stderr(), "fails as long as "+broken+" is there") {
			time.Sleep(time.Millisecond) // there is nothing to wait for but the file
		}
		os.Remove(broken)
		waiting.Close()
		c := s.hello(false)
		c.read(1, 0, 512)
		c.want(1, 0)
		s.stop()
	})
	t.Run("for good", func(t *testing.T) {
		t.Parallel()
		dir := tempDir(t)
		s := start(t, nbdhost, dir, false, "--supervise", "--log=DIR/log", fixture(t, "crash"), "do=_exit", "broken=DIR/broken")
		writeFile(t, filepath.Join(dir, "broken"), "", 0o600)
		s.crash()
		<-s.exited
		if s.status == nil || s.status.Error() != "exit status 1" {
			t.Errorf("got %v, want exit status 1", s.status)
		}
		log := command(t, "cat", filepath.Join(dir, "log"))
		if !regexp.MustCompile(`nbdkit: error: the server process \d+ exited with status 1: gave up after 8 starts in a row that failed\n$`).MatchString(log) {
			t.Errorf("log: got\n%s", log)
		}
	})
}

// TestSuperviseStop: every signal that stops a server stops the two processes, after
// what is in flight, and clients that connect meanwhile are refused.
func TestSuperviseStop(t *testing.T) {
	t.Parallel()
	onlyNbdhost(t)
	for _, sig := range []syscall.Signal{syscall.SIGTERM, syscall.SIGINT, syscall.SIGQUIT, syscall.SIGHUP} {
		t.Run(sig.String(), func(t *testing.T) {
			t.Parallel()
			dir := tempDir(t)
			j, g := newJournal(t, dir), newGate(t, dir)
			s := start(t, nbdhost, dir, false, "--supervise", "-v", fixture(t, "crash"), "journal=DIR/journal", "gate=DIR/gate")
			c := s.hello(false)
			c.read(1, whereCrashes/2, 512)
			j.wait("slow", 1)
			s.stopsServing(sig)
			g.open(1)
			c.want(1, 0)
			s.wait()
			if n := count(j.all(), "unload"); n != 1 {
				t.Errorf("got .unload %d times, want once", n)
			}
		})
	}
	t.Run("nbdkit_shutdown", func(t *testing.T) {
		t.Parallel()
		dir := tempDir(t)
		j := newJournal(t, dir)
		s := start(t, nbdhost, dir, false, "--supervise", fixture(t, "crash"), "journal=DIR/journal", "do=shutdown")
		c := s.hello(false)
		c.read(1, whereCrashes, 512)
		c.want(1, 0)
		s.wait()
		if lines := j.all(); count(lines, "unload") != 1 || len(lines) != 2 {
			t.Errorf("journal: got %q, want after_fork and unload", lines)
		}
	})
	t.Run("the supervisor is killed", func(t *testing.T) {
		t.Parallel()
		dir := tempDir(t)
		j := newJournal(t, dir)
		s := start(t, nbdhost, dir, false, "--supervise", fixture(t, "crash"), "journal=DIR/journal")
		s.kill()
		j.wait("unload", 1)
	})
	t.Run("while a plugin keeps failing", func(t *testing.T) {
		t.Parallel()
		dir := tempDir(t)
		s := start(t, nbdhost, dir, false, "--supervise", fixture(t, "crash"), "do=_exit", "broken=DIR/broken")
		writeFile(t, filepath.Join(dir, "broken"), "", 0o600)
		s.crash()
		for strings.Count(s.stderr(), "starting it again") < 4 {
			time.Sleep(time.Millisecond)
		}
		s.stop()
	})
}

// TestSuperviseWith: --supervise beside other options.
func TestSuperviseWith(t *testing.T) {
	t.Parallel()
	onlyNbdhost(t)
	crash := func(t *testing.T) string { return fixture(t, "crash") }
	t.Run("--single", func(t *testing.T) {
		t.Parallel()
		got := runCLI(t, tempDir(t), "", nbdhost, "--supervise", "-s", "memory", "1M")
		want := "nbdhost: error: got both --single and --supervise: need one of them; leave the other out\n"
		if got.status != 1 || got.stderr != want {
			t.Errorf("got status %d\n%swant status 1\n%s", got.status, got.stderr, want)
		}
	})
	t.Run("--run", func(t *testing.T) {
		t.Parallel()
		got := runCLI(t, tempDir(t), "", nbdhost, "--supervise", crash(t), "do=_exit", "--run",
			`PATH=/usr/bin:/bin nbdsh -u "$uri" -c 'h.pread(512, 65536)' 2>/dev/null; nbdinfo --size "$uri" && exit 9`)
		if got.status != 9 || got.stdout != "1048576\n" || !strings.Contains(got.stderr, "starting it again") {
			t.Errorf("got %+v, want status 9, the size, and a server that was started again", got)
		}
	})
	t.Run("a password from a descriptor", func(t *testing.T) {
		t.Parallel()
		dir := tempDir(t)
		j := newJournal(t, dir)
		r, w, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		w.WriteString("very secret\n")
		defer w.Close() // only after the end: it is the line that counts
		c := call(t, filepath.Join(dir, "pid"), nbdhost, []*os.File{r}, "--supervise", "-f", "-U", filepath.Join(dir, "sock"),
			"-P", filepath.Join(dir, "pid"), crash(t), "journal="+filepath.Join(dir, "journal"), "do=_exit", "password=-3")
		s := &server{t: t, network: "unix", address: filepath.Join(dir, "sock")}
		s.crash()
		j.wait("password very secret", 2)
		s.hello(false).disc()
		c.Process.Signal(syscall.SIGTERM)
		<-c.exited
		if c.err != nil {
			t.Error(c.err)
		}
		got := runCLI(t, dir, "", nbdhost, "--supervise", "-f", "-U", "s2", crash(t), "password=-")
		if got.status != 1 || !strings.Contains(got.stderr, "need password=+FILE or password=-DESCRIPTOR") {
			t.Errorf("got status %d\n%s", got.status, got.stderr)
		}
	})
	t.Run("socket activation", func(t *testing.T) {
		t.Parallel()
		dir := tempDir(t)
		address := &net.UnixAddr{Name: filepath.Join(dir, "sock"), Net: "unix"}
		l, err := net.ListenUnix("unix", address)
		if err != nil {
			t.Fatal(err)
		}
		f, err := l.File()
		if err != nil {
			t.Fatal(err)
		}
		l.SetUnlinkOnClose(false)
		l.Close()
		c := call(t, filepath.Join(dir, "pid"), "/bin/sh", []*os.File{f}, "-c", `LISTEN_FDS=1 LISTEN_PID=$$; export LISTEN_FDS LISTEN_PID; exec "$0" "$@"`,
			nbdhost, "--supervise", "-P", filepath.Join(dir, "pid"), crash(t), "do=_exit")
		f.Close()
		s := &server{t: t, network: "unix", address: address.Name}
		s.crash()
		again := s.hello(false)
		again.read(1, 0, 512)
		again.want(1, 0)
		again.disc()
		c.Process.Signal(syscall.SIGTERM)
		<-c.exited
		if c.err != nil {
			t.Error(c.err)
		}
	})
	t.Run("in the background", func(t *testing.T) {
		t.Parallel()
		dir := tempDir(t)
		j := newJournal(t, dir)
		pidfile := filepath.Join(dir, "pid")
		got := runCLI(t, dir, "", nbdhost, "--supervise", "-U", "sock", "-P", pidfile, "--log="+filepath.Join(dir, "log"),
			crash(t), "do=_exit", "journal=journal") // relative to where it is started, each time
		if got.status != 0 || got.stderr != "" {
			t.Fatalf("got status %d\n%s", got.status, got.stderr)
		}
		var pid int
		if err := json.Unmarshal([]byte(command(t, "cat", pidfile)), &pid); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { syscall.Kill(pid, syscall.SIGKILL) })
		s := &server{t: t, network: "unix", address: filepath.Join(dir, "sock")}
		s.crash()
		s.hello(false).disc()
		j.waitLines(2) // one of each server
		for _, fd := range []string{"0", "1", "2"} {
			if to, _ := os.Readlink("/proc/" + command(t, "cat", pidfile)[:len(command(t, "cat", pidfile))-1] + "/fd/" + fd); to != os.DevNull {
				t.Errorf("descriptor %s of the supervisor is %s", fd, to)
			}
		}
		syscall.Kill(pid, syscall.SIGTERM)
		j.wait("unload", 1)
		log := command(t, "cat", filepath.Join(dir, "log"))
		if !strings.Contains(log, "plugin crash called _exit(7) in .pread") || !strings.Contains(log, "starting it again") {
			t.Errorf("log: got\n%s", log)
		}
	})
	t.Run("the directory is removed", func(t *testing.T) {
		t.Parallel()
		dir := tempDir(t)
		where := filepath.Join(dir, "where")
		if err := os.Mkdir(where, 0o700); err != nil {
			t.Fatal(err)
		}
		sock, pidfile, log := filepath.Join(dir, "sock"), filepath.Join(dir, "pid"), filepath.Join(dir, "log")
		got := runCLI(t, where, "", nbdhost, "--supervise", "-U", sock, "-P", pidfile, "--log="+log, fixture(t, "crash"), "do=_exit")
		if got.status != 0 {
			t.Fatalf("got status %d\n%s", got.status, got.stderr)
		}
		pid := strings.TrimSpace(command(t, "cat", pidfile))
		t.Cleanup(func() { try(t, "kill", "-KILL", pid) })
		if err := os.Remove(where); err != nil {
			t.Fatal(err)
		}
		s := &server{t: t, network: "unix", address: sock}
		s.crash()
		s.hello(false).disc()
		command(t, "kill", pid)
		if text := command(t, "cat", log); !strings.Contains(text, "start server in / instead: stat "+where+": no such file") {
			t.Errorf("log: got\n%s", text)
		}
	})
	t.Run("--exit-with-parent", func(t *testing.T) {
		t.Parallel()
		dir := tempDir(t)
		j := newJournal(t, dir)
		cmd := exec.Command("/bin/sh", "-c", `"$0" "$@" & while [ ! -f pid ]; do sleep 0.01; done; kill -KILL $$`, nbdhost,
			"--supervise", "--exit-with-parent", "-U", "sock", "-P", "pid", crash(t), "journal=journal")
		cmd.Dir = dir
		cmd.Run()
		j.wait("unload", 1)
	})
	t.Run("--user", func(t *testing.T) {
		t.Parallel()
		if os.Geteuid() != 0 {
			t.Skip("needs the superuser")
		}
		s := startHost(t, "--supervise", "--user=nobody", "-v", crash(t), "do=_exit")
		for range 2 {
			s.crash()
		}
		s.hello(false).disc()
		s.stop()
		if n := strings.Count(s.stderr(), "changed user to nobody\n"); n != 3 {
			t.Errorf("%d servers changed their user, want 3\n%s", n, s.stderr())
		}
	})
	t.Run("--log-format=json", func(t *testing.T) {
		t.Parallel()
		if asanEnabled {
			t.Skip("the sanitizer has crashes for itself")
		}
		s := startHost(t, "--supervise", "--log-format=json", crash(t), "do=segv")
		s.crash()
		s.hello(false).disc()
		s.stop()
		found := false
		for line := range strings.Lines(s.stderr()) {
			var m struct {
				Level, Msg, Module, Callback string
				Conn, Cookie, Offset, Length uint64
			}
			if err := json.Unmarshal([]byte(line), &m); err != nil {
				t.Errorf("%q: %v", line, err)
			}
			if m.Callback == "pread" {
				found = m.Level == "ERROR" && m.Module == "crash" && m.Conn == 1 && m.Cookie == 77 && m.Offset == whereCrashes && m.Length == 512
			}
		}
		if !found {
			t.Errorf("the log does not say what call it was:\n%s", s.stderr())
		}
	})
}
