package tests

import (
	"bytes"
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

// asNbdkit returns a link named nbdkit to the program under test, as those make
// who put it in nbdkit's place.
func asNbdkit(t *testing.T) string {
	t.Helper()
	link := filepath.Join(tempDir(t), "nbdkit")
	if err := os.Symlink(nbdhost, link); err != nil {
		t.Fatal(err)
	}
	return link
}

// An outcome is what a caller sees of a program that has ended.
type outcome struct {
	status         int // 128 and the signal, as in a shell
	stdout, stderr string
}

// runCLI runs a command line to its end, in dir, with nothing to read but stdin.
func runCLI(t *testing.T, dir, stdin, program string, args ...string) outcome {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	cmd := exec.CommandContext(ctx, program, args...)
	var stdout, stderr bytes.Buffer
	cmd.Dir, cmd.Stdin, cmd.Stdout, cmd.Stderr = dir, strings.NewReader(stdin), &stdout, &stderr
	cmd.Env = append(os.Environ(), "LC_ALL=C", "TMPDIR="+dir)
	// A server that goes on in the background keeps the pipes: with it the test
	// would wait for ever.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	err := cmd.Run()
	if ctx.Err() != nil {
		t.Fatalf("%s %q: it has not ended\n%s", program, args, stderr.String())
	}
	o := outcome{stdout: stdout.String(), stderr: stderr.String()}
	if err != nil && cmd.ProcessState == nil {
		t.Fatal(err)
	}
	w := cmd.ProcessState.Sys().(syscall.WaitStatus)
	if o.status = w.ExitStatus(); w.Signaled() {
		o.status = 128 + int(w.Signal())
	}
	return o
}
