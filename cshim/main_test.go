package cshim_test

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"sync"
	"syscall"
	"testing"
	"unsafe"

	"github.com/ebitengine/purego"

	"nbdhost/abi"
	"nbdhost/cshim"
)

// childEnv makes the test binary play another part: one of the children below.
const childEnv = "CSHIM_TEST_CHILD"

// children are tests' second processes: what changes the process for good
// happens there. Arguments are those of the command line.
var children = map[string]func(args []string){
	// Run .dump_plugin of the plugin api.so.
	"api": func(args []string) {
		lib := must(purego.Dlopen(args[0], purego.RTLD_NOW|purego.RTLD_GLOBAL))
		init := must(purego.Dlsym(lib, "plugin_init"))
		p, _, _ := purego.SyscallN(init)
		plugin := must(abi.CopyPlugin(cshim.Fn(p)))
		cshim.CallVoid(nil, plugin.DumpPlugin)
		cshim.Exit(0)
	},
	"exit": func(args []string) {
		f := open(args[0])
		if r := cshim.CallInt(nil, f("at_exit")); r.Ret != 0 {
			panic("atexit")
		}
		cshim.Exit(3)
	},
	"password": func(args []string) {
		f := open(args[0])
		r := cshim.CallInt(nil, f("ask_password"))
		fmt.Println(r.Ret, r.Msg)
		cshim.Exit(0)
	},
	// A sleep of many days that ends when the server stops, and one that begins then.
	"quit": func(args []string) {
		f := open(args[0])
		asleep := make(chan struct{}, 2)
		cshim.SetHost(cshim.Host{Log: func(m cshim.Message) {
			if m.Level == cshim.LevelDebug {
				asleep <- struct{}{}
			}
		}})
		cshim.SetVerbose(true)
		done := make(chan cshim.Result)
		go func() {
			done <- cshim.CallHandleInt(nil, f("sleep_long"), nil)
			done <- cshim.CallHandleInt(nil, f("sleep_long"), nil)
		}()
		<-asleep
		cshim.SetQuit()
		for range 2 {
			r := <-done
			fmt.Println(r.Ret, r.Msg)
		}
		cshim.Exit(0)
	},
	"signals": func(args []string) {
		f := open(args[0])
		cshim.SaveSignals()
		if r := cshim.CallInt(nil, f("take_signals")); r.Ret != 0 {
			panic("take_signals")
		}
		cshim.RestoreSignals()
		cshim.CallInt(nil, f("check_signals"))
		fmt.Println(seen(f)[:6])
		cshim.Exit(0)
	},
}

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

// open loads a library and returns a function that finds its symbols.
func open(path string) func(name string) unsafe.Pointer {
	lib := must(purego.Dlopen(path, purego.RTLD_NOW|purego.RTLD_GLOBAL))
	return func(name string) unsafe.Pointer {
		return cshim.Fn(must(purego.Dlsym(lib, name)))
	}
}

// seen are the arguments of the last callback in testdata/calls.c.
func seen(f func(string) unsafe.Pointer) []uint64 {
	return unsafe.Slice((*uint64)(f("seen")), 8)
}

func TestMain(m *testing.M) {
	if err := cshim.Init(); err != nil {
		panic(err)
	}
	if child := children[os.Getenv(childEnv)]; child != nil {
		child(os.Args[1:])
	}
	// What this process frees is counted, so that nothing stays behind.
	code := m.Run()
	if n := cshim.LiveObjects(); n != 0 && code == 0 {
		fmt.Fprintf(os.Stderr, "%d objects of cshim were not freed\n", n)
		code = 1
	}
	cshim.Exit(code)
}

// compile builds testdata/name.c as a shared library, once.
func compile(t testing.TB, name string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), name+".so")
	cmd := exec.Command("gcc", "-shared", "-fPIC", "-pthread", "-Wall", "-Wextra", "-Werror",
		"-o", path, filepath.Join("testdata", name+".c"))
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("gcc: %v\n%s", err, out)
	}
	return path
}

// calls loads testdata/calls.c, once for all tests.
var calls = sync.OnceValue(func() func(string) unsafe.Pointer {
	dir := must(os.MkdirTemp("", "cshim"))
	defer os.RemoveAll(dir)
	path := filepath.Join(dir, "calls.so")
	cmd := exec.Command("gcc", "-shared", "-fPIC", "-pthread", "-Wall", "-Wextra", "-Werror",
		"-o", path, "testdata/calls.c")
	if out, err := cmd.CombinedOutput(); err != nil {
		panic(fmt.Sprintf("gcc: %v\n%s", err, out))
	}
	return open(path)
})

// child runs the test binary as one of the children, and returns what it printed.
func child(t *testing.T, name string, set func(*exec.Cmd), args ...string) ([]byte, error) {
	t.Helper()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(exe, args...)
	cmd.Env = append(os.Environ(), childEnv+"="+name)
	cmd.Stderr = os.Stderr
	if set != nil {
		set(cmd)
	}
	return cmd.Output()
}

// recorder is a Host that keeps what it is asked.
type recorder struct {
	mu    sync.Mutex
	lines []string
	onLog func(text string) // called before the line is kept, may be nil
}

func (r *recorder) add(format string, args ...any) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.lines = append(r.lines, fmt.Sprintf(format, args...))
}

func (r *recorder) expect(t *testing.T, want ...string) {
	t.Helper()
	r.mu.Lock()
	defer r.mu.Unlock()
	if !slices.Equal(r.lines, want) {
		t.Errorf("got\n%q\nneed\n%q", r.lines, want)
	}
}

// record makes a recorder the host until the test ends. Tests that record are
// not parallel.
func record(t testing.TB, name string, verbose bool) *recorder {
	r := &recorder{}
	cshim.SetHost(cshim.Host{
		Name: name,
		Log: func(m cshim.Message) {
			if r.onLog != nil {
				r.onLog(m.Text)
			}
			r.add("%s[%d].%d: %s", []string{"error", "debug"}[m.Level], m.Conn, m.Worker, m.Text)
		},
		Shutdown:   func() { r.add("shutdown") },
		Disconnect: func(conn uint64, force bool) { r.add("disconnect %d %v", conn, force) },
	})
	cshim.SetVerbose(verbose)
	t.Cleanup(func() {
		cshim.SetHost(cshim.Host{})
		cshim.SetVerbose(false)
	})
	return r
}

// connection makes a connection and a context in it, freed when the test ends.
func connection(t testing.TB, id uint64, fd int, export string) (*cshim.Conn, *cshim.Context) {
	conn := cshim.NewConn(id, fd)
	ctx := cshim.NewContext(conn, export, true, false)
	t.Cleanup(func() {
		ctx.Free()
		conn.Free()
	})
	return conn, ctx
}

// failed checks that a callback failed with errno and message.
func failed(t *testing.T, r cshim.Result, errno syscall.Errno, msg string) {
	t.Helper()
	if r.Ret >= 0 && r.Ptr != nil || r.Errno != errno || r.Msg != msg {
		t.Errorf("got %d, %v, %q, need failure, %v, %q", r.Ret, r.Errno, r.Msg, errno, msg)
	}
}
