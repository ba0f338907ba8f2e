package cshim_test

import (
	"bytes"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"nbdhost/cshim"
)

// taken matches names that are the program's: those of the API, those that are replaced on
// purpose, and what no module may call something of its own.
var taken = regexp.MustCompile(`^(nbdkit_.*|pthread_mutex_init|main|_.*|x_cgo_.*|x_crosscall2_ptr)$`)

// exported returns the names that start with nbdkit_ in the symbol table of this
// executable, which is linked as any that imports cshim is.
func exported(t *testing.T) []string {
	t.Helper()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command("nm", "-D", "--defined-only", exe).Output()
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for line := range strings.Lines(string(out)) {
		f := strings.Fields(line)
		if name := f[len(f)-1]; strings.HasPrefix(name, "nbdkit_") {
			names = append(names, name)
		}
		// A module may well have one of its own that has the name of any other function.
		if name := f[len(f)-1]; !taken.MatchString(name) {
			t.Errorf("exported %s: need it hidden", name)
		}
	}
	return names
}

func TestExportedNames(t *testing.T) {
	syms, err := os.ReadFile("nbdkit.syms")
	if err != nil {
		t.Fatal(err)
	}
	if got, want := strings.Join(exported(t), "\n")+"\n", string(syms); got != want {
		t.Errorf("exported names: got\n%s\nneed those of nbdkit.syms\n%s", got, want)
	}
}

// testdata/api.txt is what testdata/api.c gets from nbdkit 1.48.1; the installed
// nbdkit, which may be older, is asked too.
func TestAPIAgainstNbdkit(t *testing.T) {
	lib := compile(t, "api")
	run := func(name string, f func(output string) error) []byte {
		output := filepath.Join(t.TempDir(), "output")
		t.Setenv("API_OUTPUT", output)
		if err := f(output); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		out, err := os.ReadFile(output)
		if err != nil {
			t.Fatal(err)
		}
		return out
	}
	ours := run("nbdhost", func(string) error {
		_, err := child(t, "api", func(cmd *exec.Cmd) { cmd.Stderr = nil }, lib)
		return err
	})

	t.Run("1.48.1", func(t *testing.T) {
		golden, err := os.ReadFile("testdata/api.txt")
		if err != nil {
			t.Fatal(err)
		}
		compare(t, ours, golden)
	})
	t.Run("installed", func(t *testing.T) {
		nbdkit, err := exec.LookPath("nbdkit")
		if err != nil {
			t.Skip("nbdkit is not installed")
		}
		theirs := run("nbdkit", func(string) error {
			return exec.Command(nbdkit, "--dump-plugin", lib).Run()
		})
		compare(t, common(ours), common(theirs))
	})
}

// common drops what older releases lack, or do in another way: sizes were decimal.
func common(out []byte) []byte {
	var kept bytes.Buffer
	for line := range bytes.Lines(out) {
		if !bytes.HasPrefix(line, []byte("new: ")) && !bytes.HasPrefix(line, []byte(`size "0`)) {
			kept.Write(line)
		}
	}
	return kept.Bytes()
}

func compare(t *testing.T, ours, theirs []byte) {
	t.Helper()
	if len(ours) == 0 {
		t.Fatal("no output")
	}
	a, b := strings.Split(string(ours), "\n"), strings.Split(string(theirs), "\n")
	for i := range max(len(a), len(b)) {
		switch {
		case i >= len(a) || i >= len(b):
			t.Fatalf("got %d lines, need %d", len(a), len(b))
		case a[i] != b[i]:
			t.Errorf("line %d: got %q, need %q", i+1, a[i], b[i])
		}
	}
}

func TestExit(t *testing.T) {
	out, err := child(t, "exit", nil, compile(t, "calls"))
	if exit, ok := err.(*exec.ExitError); !ok || exit.ExitCode() != 3 || string(out) != "bye\n" {
		t.Errorf("got %v, %q, need exit status 3 and the atexit handler's bye", err, out)
	}
}

func TestQuitEndsSleep(t *testing.T) {
	out, err := child(t, "quit", nil, compile(t, "calls"))
	line := "-1 sleep: ended early, since the server is stopping\n"
	if want := line + line; err != nil || string(out) != want {
		t.Errorf("got %v, %q, need %q", err, out, want)
	}
}

// The password is asked for at the terminal, which standard input is not.
func TestPasswordFromTerminal(t *testing.T) {
	master, err := os.OpenFile("/dev/ptmx", os.O_RDWR, 0)
	if err != nil {
		t.Skip(err)
	}
	defer master.Close()
	if err := unix.IoctlSetPointerInt(int(master.Fd()), unix.TIOCSPTLCK, 0); err != nil {
		t.Fatal(err)
	}
	n, err := unix.IoctlGetInt(int(master.Fd()), unix.TIOCGPTN)
	if err != nil {
		t.Fatal(err)
	}
	tty, err := os.OpenFile(fmt.Sprintf("/dev/pts/%d", n), os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer tty.Close()
	go func() {
		// Typed only after the prompt: what is there before is dropped.
		buf := make([]byte, len("password: "))
		if _, err := io.ReadFull(master, buf); err == nil {
			fmt.Fprintln(master, "top secret ")
		}
	}()
	out, err := child(t, "password", func(cmd *exec.Cmd) {
		cmd.ExtraFiles = []*os.File{tty}
		cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true, Ctty: 3}
	}, compile(t, "calls"))
	if want := "got top secret \n0 \n"; err != nil || string(out) != want {
		t.Errorf("got %v, %q, need %q", err, out, want)
	}
	// Without echo only the prompt, and the end of line, came out.
	unix.SetNonblock(int(master.Fd()), true)
	buf := make([]byte, 100)
	if m, _ := unix.Read(int(master.Fd()), buf); string(buf[:max(m, 0)]) != "\r\n" {
		t.Errorf("the terminal shows %q", buf[:max(m, 0)])
	}

	out, err = child(t, "password", func(cmd *exec.Cmd) {
		cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	}, compile(t, "calls"))
	if want := "-1 read password: open /dev/tty: No such device or address; there is no terminal, use +FILE or -FD\n"; err != nil || string(out) != want {
		t.Errorf("without a terminal: got %v, %q, need %q", err, out, want)
	}
}

// TestThreadsLeaveNothing lets threads of a module log and end. Their stacks for
// signal handlers go with them.
func TestThreadsLeaveNothing(t *testing.T) {
	mappings := func() int {
		maps, err := os.ReadFile("/proc/self/maps")
		if err != nil {
			t.Fatal(err)
		}
		return bytes.Count(maps, []byte("\n"))
	}
	fn := calls()("from_threads")
	record(t, "", false)
	cshim.CallInt(nil, fn)
	before := mappings()
	for range 5 {
		cshim.CallInt(nil, fn)
	}
	// Go's own come and go, but not as many as there were threads.
	if grown := mappings() - before; grown > 250 {
		t.Errorf("500 threads left %d mappings", grown)
	}
}

func TestSignals(t *testing.T) {
	out, err := child(t, "signals", nil, compile(t, "calls"))
	const ours, ignored, onStack = 1, 2, 8 // as disposition in testdata/calls.c
	// SIGSEGV, SIGUSR1, SIGINT, SIGXFSZ, SIGPIPE, SIGTERM. The module keeps its own
	// handler of SIGUSR1, and SIGXFSZ ignored.
	want := fmt.Sprintln([]int{onStack, ours | onStack, onStack, ignored, onStack, onStack})
	if err != nil || string(out) != want {
		t.Errorf("got %v, %q, need %q", err, out, want)
	}
}
