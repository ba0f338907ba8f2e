package tests

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
)

// reads sends n reads of 512 bytes over four connections, 16 at a time on each, and
// wants all to succeed.
func reads(t *testing.T, s *server, n int) {
	t.Helper()
	script(t, s, "", fmt.Sprintf(`
handles = [h]
for i in range(3):
    n = nbd.NBD()
    n.connect_uri(h.get_uri())
    handles.append(n)
errors = []
def completed(error):
    if error.value != 0:
        errors.append(error.value)
    return 1
for i in range(%d):
    for handle in handles:
        handle.aio_pread(nbd.Buffer(512), 512 * (1 + i), completed)
        while handle.aio_in_flight() >= 16:
            handle.poll(-1)
for handle in handles:
    while handle.aio_in_flight() > 0:
        handle.poll(-1)
    handle.shutdown()
assert not errors, errors
`, n))
}

// testHazards lets a plugin do what a program in Go could trip over. Each ends
// with an orderly stop, which start's server checks.
func testHazards(t *testing.T) {
	plugin := fixture(t, "hazard")
	serve := func(t *testing.T, what string, args ...string) (*server, *journal, *gate) {
		t.Helper()
		dir := tempDir(t)
		j, g := newJournal(t, dir), newGate(t, dir)
		args = append(args, plugin, "journal=DIR/journal", "gate=DIR/gate", "do="+what)
		return start(t, nbdhost, dir, false, args...), j, g
	}
	orderly := func(t *testing.T, s *server, j *journal) {
		t.Helper()
		s.stop()
		if lines := j.all(); count(lines, "cleanup") != 1 {
			t.Errorf("journal: got %q, want cleanup once", lines)
		}
	}
	for _, hazard := range []struct {
		name string
		run  func(t *testing.T)
	}{
		{"installs signal handlers without SA_ONSTACK", func(t *testing.T) {
			s, j, _ := serve(t, "signals")
			for range 20 {
				s.signal(syscall.SIGUSR1)
			}
			reads(t, s, 50)
			s.signal(syscall.SIGURG) // not the plugin's: that would exit with 99
			reads(t, s, 50)
			orderly(t, s, j)
		}},
		{"strips SA_ONSTACK from the host's handlers", func(t *testing.T) {
			s, j, _ := serve(t, "strip")
			for range 20 {
				s.signal(syscall.SIGURG)
			}
			reads(t, s, 50)
			orderly(t, s, j)
		}},
		{"forks, logs in the child, and execs", func(t *testing.T) {
			s, j, _ := serve(t, "fork", "-v")
			reads(t, s, 20)
			if n := strings.Count(s.stderr(), "nbdkit: error: the child complains\n"); n != 80 {
				t.Errorf("got %d complaints of children, want 80", n)
			}
			orderly(t, s, j)
		}},
		{"exits in .config, with its own status", func(t *testing.T) { exits(t, plugin, "exit in config", 7) }},
		{"exits in .get_ready, with its own status", func(t *testing.T) { exits(t, plugin, "exit in get_ready", 8) }},
		{"ignores SIGCHLD, so that nobody learns how --run has ended", func(t *testing.T) {
			exits(t, plugin, "no zombies", 1, "--run", "exit 3")
		}},
		{"calls nbdkit_error in threads of its own", func(t *testing.T) {
			s, j, _ := serve(t, "threads", "-v")
			reads(t, s, 200)
			orderly(t, s, j)
			for i := range 4 {
				if line := fmt.Sprintf("error: thread %d complains\n", i); !strings.Contains(s.stderr(), line) {
					t.Errorf("the log has no %q", line)
				}
			}
		}},
		{"uses 6 MiB of stack", func(t *testing.T) {
			s, j, _ := serve(t, "stack")
			reads(t, s, 20)
			orderly(t, s, j)
		}},
		{"blocks in a call, while others go on", func(t *testing.T) {
			s, j, g := serve(t, "blocks")
			script(t, s, "", `
blocked = [h.aio_pread(nbd.Buffer(512), 0) for i in range(8)]
other = nbd.NBD()
other.connect_uri(h.get_uri())
for i in range(100):
    other.pread(512, 512)
    h.pread(512, 1024)
other.shutdown()
print(sum(h.aio_command_completed(cookie) for cookie in blocked))
open('`+s.dir+`/gate', 'wb').write(bytes(8))
while h.aio_in_flight() > 0:
    h.poll(-1)
for cookie in blocked:
    assert h.aio_command_completed(cookie)
h.shutdown()
`)
			j.wait("blocked", 8)
			_ = g
			orderly(t, s, j)
		}},
		// What Go preempts with, and what it catches although nobody asked for it.
		{"polls, which no signal ends that a process without Go would not see", func(t *testing.T) {
			s, j, g := serve(t, "waits")
			done := background(t, s, "h.pread(1, 0)\nh.shutdown()\n")
			tid := thread(j, "waiting %d", done)
			for range 50 {
				for _, sig := range []syscall.Signal{syscall.SIGURG, syscall.SIGCHLD, syscall.SIGWINCH} {
					signalThread(t, s, tid, sig)
				}
			}
			g.open(1)
			<-done
			orderly(t, s, j)
		}},
		{"sleeps with nbdkit_nanosleep, while it handles signals", func(t *testing.T) {
			s, j, _ := serve(t, "sleeps")
			done := background(t, s, "h.pread(1, 0)\nh.shutdown()\n")
			tid := thread(j, "sleeping %d", done)
			for awake := false; !awake; {
				select {
				case <-done:
					awake = true
				default:
					signalThread(t, s, tid, syscall.SIGUSR1)
				}
			}
			orderly(t, s, j)
		}},
		{"has a signal handler that uses 400 KiB of stack", func(t *testing.T) {
			if asanEnabled {
				t.Skip("the sanitizer's stacks for handlers are smaller")
			}
			s, j, _ := serve(t, "handler 409600")
			reads(t, s, 50)
			orderly(t, s, j)
			for _, line := range []string{"handler on a handler's stack", "handler in a thread on a handler's stack"} {
				if n := count(j.all(), line); n != 200 {
					t.Errorf("journal: got %q %d times, want 200: %q", line, n, j.all())
				}
			}
		}},
		{"has a signal handler that uses 1 MiB of stack: ends with SIGSEGV, overwrites nothing", func(t *testing.T) {
			if asanEnabled {
				t.Skip("the sanitizer ends in its own way")
			}
			s, j, _ := serve(t, "handler 1048576")
			if _, err := try(t, "/usr/bin/nbdsh", "-u", s.uri(""), "-c", "h.pread(1, 0)"); err == nil {
				t.Error("the read succeeded")
			}
			<-s.exited
			var exit *exec.ExitError
			if !errors.As(s.status, &exit) || exit.Sys().(syscall.WaitStatus).Signal() != syscall.SIGSEGV {
				t.Errorf("got %v, want SIGSEGV", s.status)
			}
			j.all()
		}},
		{"expects errno to be kept by the functions it calls", func(t *testing.T) {
			s, j, _ := serve(t, "errno", "-v")
			reads(t, s, 20)
			orderly(t, s, j)
		}},
		{"needs much static TLS: refused, with advice", func(t *testing.T) {
			dir := tempDir(t)
			_, err := tryStart(t, nbdhost, dir, false, fixture(t, "statictls"))
			if err == nil || !strings.Contains(err.Error(), "GLIBC_TUNABLES=glibc.rtld.optional_static_tls=") {
				t.Errorf("got %v, want advice", err)
			}
		}},
	} {
		t.Run(hazard.name, func(t *testing.T) {
			t.Parallel()
			hazard.run(t)
			hazardTable.record(t, hazard.name, "result", 0, "works")
		})
	}
}

// TestNullTexts lets a plugin pass NULL for a text. That of a message is then empty.
func TestNullTexts(t *testing.T) {
	t.Parallel()
	compare(t, scenario{
		args:   []string{"-v", fixture(t, "hazard"), "do=null"},
		client: func(t *testing.T, s *server) string { return script(t, s, "", "print(h.pread(1, 0))\nh.shutdown()\n") },
		after: func(t *testing.T, dir string) string {
			log, err := os.ReadFile(dir + "/stderr")
			if err != nil {
				t.Fatal(err)
			}
			var b strings.Builder
			for _, text := range []string{"error: \n", "debug: \n", "error: "} {
				fmt.Fprintf(&b, "%q %d times\n", text, strings.Count(string(log), text))
			}
			return b.String()
		},
	})
}

// background runs a client, and closes the channel when it has ended.
func background(t *testing.T, s *server, text string) <-chan struct{} {
	t.Helper()
	done := make(chan struct{})
	go func() {
		defer close(done)
		script(t, s, "", text)
	}()
	return done
}

// thread returns the thread ID that a line of the journal has.
func thread(j *journal, format string, done <-chan struct{}) (tid int) {
	j.t.Helper()
	for {
		for _, line := range j.sofar() {
			if n, _ := fmt.Sscanf(line, format, &tid); n == 1 {
				return tid
			}
		}
		select {
		case <-done:
			j.t.Fatalf("journal: got %q, want %q", j.sofar(), format)
		default:
		}
	}
}

func signalThread(t *testing.T, s *server, tid int, sig syscall.Signal) {
	t.Helper()
	if err := syscall.Tgkill(s.pid, tid, sig); err != nil && err != syscall.ESRCH {
		t.Fatal(err)
	}
}

// exits wants nbdkit and the program under test to end as the plugin says, after
// what the plugin gave to atexit has run.
func exits(t *testing.T, plugin, what string, status int, args ...string) {
	t.Helper()
	for _, program := range []string{nbdkit, nbdhost} {
		dir := tempDir(t)
		j := newJournal(t, dir)
		args := append([]string{"-f", "-U", dir + "/sock", plugin, "journal=" + dir + "/journal", "do=" + what}, args...)
		cmd := exec.Command(program, args...)
		cmd.Stderr = os.Stderr
		err := cmd.Run()
		if exit, ok := err.(*exec.ExitError); !ok || exit.ExitCode() != status {
			t.Errorf("%s: got %v, want exit status %d", program, err, status)
		}
		// With --run nbdkit is two processes.
		if lines := j.all(); count(lines, "atexit") != 1 && (program == nbdhost || count(lines, "atexit") != 2) {
			t.Errorf("%s: journal: got %q, want atexit once", program, lines)
		}
	}
}
