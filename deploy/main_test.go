package deploy

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// nbdhost is the program under test, which the environment variable NBDHOST_UNDER_TEST
// may name.
var nbdhost string

// tools are what the tests run, and the Debian package that has it. A tool that is
// missing is a failure, not a reason to test less.
var tools = map[string]string{
	"buildah":                 "buildah",
	"mmdebstrap":              "mmdebstrap",
	"nbdcopy":                 "libnbd-bin",
	"nbdinfo":                 "libnbd-bin",
	"nbdkit":                  "nbdkit",
	"/usr/bin/nbdsh":          "python3-libnbd",
	"objdump":                 "binutils",
	"podman":                  "podman",
	"runc":                    "runc",
	"prometheus":              "prometheus",
	"promtool":                "prometheus",
	"xz":                      "xz-utils",
	"systemd-analyze":         "systemd",
	"systemd-socket-activate": "systemd",
}

func TestMain(m *testing.M) {
	os.Exit(func() int {
		for tool, pkg := range tools {
			if _, err := exec.LookPath(tool); err != nil {
				fmt.Fprintf(os.Stderr, "find tools: %s is missing: apt-get install %s\n", tool, pkg)
				return 1
			}
		}
		dir, err := os.MkdirTemp("", "nbdhost-deploy-")
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		defer os.RemoveAll(dir)
		if nbdhost = os.Getenv("NBDHOST_UNDER_TEST"); nbdhost != "" {
			return m.Run()
		}
		nbdhost = filepath.Join(dir, "nbdhost")
		if out, err := exec.Command("go", "build", "-C", "..", "-o", nbdhost, "./cmd/nbdhost").CombinedOutput(); err != nil {
			fmt.Fprintf(os.Stderr, "build nbdhost: %v\n%s", err, out)
			return 1
		}
		return m.Run()
	}())
}

// deadline ends what hangs. No test passes or fails by the time that something takes.
const deadline = 2 * time.Minute

// run runs a command and returns what it writes to standard output, without the last
// newline.
func run(t *testing.T, name string, args ...string) string {
	t.Helper()
	out, err := try(t, name, args...)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// try is run for a command that may fail. The error has what was written to standard
// error.
func try(t *testing.T, name string, args ...string) (string, error) {
	t.Helper()
	// Not t.Context: what is cleaned up at the end runs commands, too.
	ctx, cancel := context.WithTimeout(context.Background(), deadline)
	defer cancel()
	cmd := exec.CommandContext(ctx, name, args...)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		err = fmt.Errorf("%s: %w\n%s%s", strings.Join(cmd.Args, " "), err, out, stderr.Bytes())
	}
	return strings.TrimSuffix(string(out), "\n"), err
}

// await calls done until it returns true.
func await(t *testing.T, what string, done func() bool) {
	t.Helper()
	for end := time.Now().Add(deadline); !done(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("wait for %s: it did not come within %v", what, deadline)
		}
	}
}

// A process is a command that runs beside the test.
type process struct {
	*exec.Cmd
	out  bytes.Buffer // what it writes
	done chan error   // has one error, maybe nil, once it has ended
}

// start starts a command, which is ended with the test if it has not ended by then.
func start(t *testing.T, cmd *exec.Cmd) *process {
	t.Helper()
	p := &process{Cmd: cmd, done: make(chan error, 1)}
	cmd.Stdout, cmd.Stderr = &p.out, &p.out
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() { p.done <- cmd.Wait() }()
	t.Cleanup(func() {
		cmd.Process.Kill()
		err := <-p.done
		if t.Failed() {
			t.Logf("%s: %v:\n%s", strings.Join(cmd.Args, " "), err, p.out.String())
		}
	})
	return p
}

// wait waits for the process to end.
func (p *process) wait(t *testing.T) error {
	t.Helper()
	select {
	case err := <-p.done:
		p.done <- err
		return err
	case <-time.After(deadline):
		t.Fatalf("%s: it has not ended within %v", p.Args[0], deadline)
		return nil
	}
}

// await is await for what only a running process can do.
func (p *process) await(t *testing.T, what string, done func() bool) {
	t.Helper()
	await(t, what, func() bool {
		select {
		case err := <-p.done:
			p.done <- err
			t.Fatalf("wait for %s: %s has ended: %v", what, p.Args[0], err)
		default:
		}
		return done()
	})
}

// containers runs buildah or podman on the tests' own store of images.
func containers(t *testing.T, args ...string) string {
	t.Helper()
	return run(t, "./containers.sh", args...)
}

// tempDir returns a directory that any user may write to.
func tempDir(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	for d := dir; d != filepath.Dir(os.TempDir()) && d != os.TempDir(); d = filepath.Dir(d) {
		if err := os.Chmod(d, 0o777); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

func writeFile(t *testing.T, path, text string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}
