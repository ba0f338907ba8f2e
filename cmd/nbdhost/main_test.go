package main

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/rogpeppe/go-internal/testscript"
	"golang.org/x/sys/unix"
)

// tools are what the scripts run, and the Debian package that has it. A tool that is
// missing is a failure, not a reason to test less.
var tools = map[string]string{
	"nbdkit":         "nbdkit",
	"nbdinfo":        "libnbd-bin",
	"/usr/bin/nbdsh": "python3-libnbd",
	"curl":           "curl",
	"gcc":            "gcc",
	"make":           "make",
	"setpriv":        "util-linux",
	"mandoc":         "mandoc",
	"groff":          "groff",
	"bash":           "bash",
	"fish":           "fish",
	"zsh":            "zsh",
}

// In scripts, nbdhost is this test binary.
func TestMain(m *testing.M) {
	testscript.Main(m, map[string]func(){"nbdhost": main})
}

// The scripts in testdata. A server in the background writes its process ID to
// $WORK/pid, so that none outlives its script.
func TestScripts(t *testing.T) {
	for tool, pkg := range tools {
		if _, err := exec.LookPath(tool); err != nil {
			t.Fatalf("find tools: %s is missing: apt-get install %s", tool, pkg)
		}
	}
	testscript.Run(t, testscript.Params{
		Dir: "testdata",
		Setup: func(env *testscript.Env) error {
			env.Defer(func() {
				if pid, err := readPID(filepath.Join(env.WorkDir, "pid")); err == nil && isOurs(pid, env.WorkDir) {
					unix.Kill(pid, unix.SIGKILL)
				}
			})
			return nil
		},
		Condition: func(c string) (bool, error) {
			if c == "root" {
				return os.Geteuid() == 0, nil
			}
			return false, fmt.Errorf("unknown condition %q", c)
		},
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			// signal SIGNAL PIDFILE sends a signal and waits for the process's end.
			"signal": func(ts *testscript.TestScript, neg bool, args []string) {
				if neg || len(args) != 2 {
					ts.Fatalf("usage: signal SIGNAL PIDFILE")
				}
				pid, err := readPID(ts.MkAbs(args[1]))
				ts.Check(err)
				fd, err := unix.PidfdOpen(pid, 0)
				ts.Check(err)
				defer unix.Close(fd)
				ts.Check(unix.Kill(pid, unix.SignalNum(args[0])))
				for {
					n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 60000)
					if err == unix.EINTR {
						continue
					}
					ts.Check(err)
					if n == 0 {
						ts.Fatalf("process %d goes on after %s", pid, args[0])
					}
					return
				}
			},
		},
	})
}

func readPID(path string) (int, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return 0, err
	}
	if !strings.HasSuffix(string(b), "\n") {
		return 0, fmt.Errorf("%s: got %q: need a number and an end of line", path, b)
	}
	return strconv.Atoi(strings.TrimSuffix(string(b), "\n"))
}

// isOurs tells whether a process was started by the script in directory work.
func isOurs(pid int, work string) bool {
	b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/environ", pid))
	return strings.Contains(string(b), "WORK="+work+"\x00")
}
