package loader

import (
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"nbdhost/backend"
	"nbdhost/cshim"
)

// dumpEnv makes the test binary dump the plugin it names, as a process of its
// own: some language plugins do not bear another beside them, and some insist
// on the main thread.
const dumpEnv = "NBDHOST_TEST_DUMP"

func init() { runtime.LockOSThread() }

func TestMain(m *testing.M) {
	if name, ok := os.LookupEnv(dumpEnv); ok {
		Exit(dumpMain(name))
	}
	if err := Init(Host{Log: record, Shutdown: func() { shutdown() }}); err != nil {
		panic(err)
	}
	code := 0
	OnMain(func() { code = m.Run() })
	if n := cshim.LiveObjects(); n != 0 && code == 0 {
		fmt.Fprintf(os.Stderr, "%d objects in C were not freed\n", n)
		code = 1
	}
	Exit(code)
}

func dumpMain(name string) int {
	err := func() error {
		err := Init(Host{Log: func(m Message) { fmt.Fprintln(os.Stderr, m.Text) }})
		if err != nil {
			return err
		}
		found, err := Find(PluginKind, name)
		if err != nil {
			return err
		}
		p, err := Open(found.Path)
		if err != nil {
			return err
		}
		ch := backend.NewChain(p, nil, backend.Trace{})
		ch.Load()
		defer ch.Unload()
		if found.Script != "" {
			if err := ch.Config("script", found.Script); err != nil {
				return err
			}
		}
		if err := ch.SetThreadModel(backend.Parallel); err != nil {
			return err
		}
		return p.Dump(os.Stdout, ch.ThreadModel())
	}()
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}

// lines is what modules have logged.
var lines struct {
	sync.Mutex
	debug, errors []string
	threads       map[int]bool // that they came from
}

// shutdown is what a module's nbdkit_shutdown(3) does.
var shutdown = func() {}

func record(m Message) {
	level, conn, worker, text := m.Level, m.Conn, m.Worker, m.Text
	lines.Lock()
	defer lines.Unlock()
	if lines.threads != nil {
		lines.threads[unix.Gettid()] = true
	}
	if conn != 0 {
		text = fmt.Sprintf("[%d.%d] %s", conn, worker, text)
	}
	if level == slog.LevelError {
		lines.errors = append(lines.errors, text)
	} else {
		lines.debug = append(lines.debug, text)
	}
}

// logged returns the debug lines since the last time, and the errors.
func logged() (debug, errors string) {
	lines.Lock()
	defer lines.Unlock()
	debug, errors = strings.Join(lines.debug, "\n"), strings.Join(lines.errors, "\n")
	lines.debug, lines.errors = nil, nil
	return debug, errors
}

// compile makes a shared library of a file in testdata. Each has a path of its
// own, since dlopen loads a path only once, and uses its own symbols, not those of
// one that was loaded before.
func compile(t testing.TB, source string, options ...string) string {
	t.Helper()
	if _, err := os.Stat("/usr/include/nbdkit-plugin.h"); err != nil {
		t.Skip("needs nbdkit's headers (package nbdkit-plugin-dev)")
	}
	so := filepath.Join(t.TempDir(), strings.TrimSuffix(source, ".c")+".so")
	args := append([]string{"-shared", "-fPIC", "-Wall", "-Werror", "-Wl,-Bsymbolic", "-o", so, filepath.Join("testdata", source)}, options...)
	if out, err := exec.Command("gcc", args...).CombinedOutput(); err != nil {
		t.Fatalf("gcc: %v\n%s", err, out)
	}
	return so
}
