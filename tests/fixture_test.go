package tests

import (
	"bufio"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

var compiled sync.Map // of sync.OnceValues functions, by file name

// fixture compiles fixtures/NAME.c, once for each set of options, and returns
// the plugin's path.
func fixture(t testing.TB, name string, options ...string) string {
	t.Helper()
	path := filepath.Join(scratch, name+strings.Join(options, "")+".so")
	compile, _ := compiled.LoadOrStore(path, sync.OnceValue(func() error {
		args := []string{"-Wall", "-Wextra", "-Wno-unused-parameter", "-Werror", "-g", "-O1", "-fPIC", "-shared"}
		args = append(args, options...)
		out, err := exec.Command("gcc", append(args, "-o", path, "fixtures/"+name+".c")...).CombinedOutput()
		if err != nil {
			return fmt.Errorf("compile %s: %w\n%s", name, err, out)
		}
		return nil
	}))
	if err := compile.(func() error)(); err != nil {
		t.Fatal(err)
	}
	return path
}

func makeFIFO(t testing.TB, path string) *os.File {
	t.Helper()
	if err := syscall.Mkfifo(path, 0o600); err != nil {
		t.Fatalf("make fifo %s: %v", path, err)
	}
	// Open for both, so that there is never an end of file.
	f, err := os.OpenFile(path, os.O_RDWR|syscall.O_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

// A journal has the lines that a fixture wrote: a callback's name and arguments.
type journal struct {
	t    testing.TB
	fifo *os.File

	mu    sync.Mutex
	more  *sync.Cond // on mu: lines or ended changed
	lines []string
	ended bool
}

// The line that ends a journal. No fixture writes it.
const endOfJournal = "(end)"

// newJournal makes the FIFO, DIR/journal for the server's arguments, and reads it.
func newJournal(t testing.TB, dir string) *journal {
	t.Helper()
	j := &journal{t: t, fifo: makeFIFO(t, filepath.Join(dir, "journal"))}
	j.more = sync.NewCond(&j.mu)
	go j.read()
	return j
}

func (j *journal) read() {
	scanner := bufio.NewScanner(j.fifo)
	for scanner.Scan() && scanner.Text() != endOfJournal {
		j.mu.Lock()
		j.lines = append(j.lines, scanner.Text())
		j.mu.Unlock()
		j.more.Broadcast()
	}
	j.mu.Lock()
	j.ended = true
	j.mu.Unlock()
	j.more.Broadcast()
}

// wait returns when the line has been written n times.
func (j *journal) wait(line string, n int) {
	j.t.Helper()
	j.await(fmt.Sprintf("%q %d times", line, n), func() bool { return count(j.lines, line) >= n })
}

// waitLines returns when n lines have been written.
func (j *journal) waitLines(n int) {
	j.t.Helper()
	j.await(fmt.Sprintf("%d lines", n), func() bool { return len(j.lines) >= n })
}

func (j *journal) await(what string, come func() bool) {
	j.t.Helper()
	hangs := time.AfterFunc(patience, func() {
		j.mu.Lock()
		j.ended = true
		j.mu.Unlock()
		j.more.Broadcast()
	})
	defer hangs.Stop()
	j.mu.Lock()
	defer j.mu.Unlock()
	for !come() && !j.ended {
		j.more.Wait()
	}
	if !come() {
		j.t.Fatalf("wait for %s: got only\n%s", what, strings.Join(j.lines, "\n"))
	}
}

// all returns every line. No server may be writing any more.
func (j *journal) all() []string {
	j.t.Helper()
	if _, err := j.fifo.WriteString(endOfJournal + "\n"); err != nil {
		j.t.Fatal(err)
	}
	j.mu.Lock()
	defer j.mu.Unlock()
	for !j.ended {
		j.more.Wait()
	}
	return j.lines
}

// sofar returns the lines that have been read.
func (j *journal) sofar() []string {
	j.mu.Lock()
	defer j.mu.Unlock()
	return append([]string(nil), j.lines...)
}

func count(lines []string, line string) (n int) {
	for _, l := range lines {
		if l == line {
			n++
		}
	}
	return n
}

// paired wants each "open N" in a journal to have one "close N" after it, and
// no callback of N after that.
func paired(t testing.TB, lines []string) (opened int) {
	t.Helper()
	state := map[string]string{}
	for _, line := range lines {
		f := strings.Fields(line)
		if len(f) < 2 || !strings.Contains("0123456789", f[1][:1]) {
			continue
		}
		name, id := f[0], strings.TrimSuffix(f[1], ",")
		switch {
		case name == "open" && state[id] == "":
			state[id] = "open"
			opened++
		case name == "close" && state[id] == "open":
			state[id] = "closed"
		case state[id] != "open":
			t.Errorf("%q: handle %s is not open (%q)", line, id, state[id])
		}
	}
	for id, s := range state {
		if s != "closed" {
			t.Errorf("handle %s: opened, and not closed", id)
		}
	}
	return opened
}

// A gate is what a fixture's slow call waits at.
type gate struct {
	t    testing.TB
	fifo *os.File
}

// newGate makes the FIFO, DIR/gate for the server's arguments.
func newGate(t testing.TB, dir string) *gate {
	t.Helper()
	return &gate{t, makeFIFO(t, filepath.Join(dir, "gate"))}
}

// open lets n calls go on.
func (g *gate) open(n int) {
	g.t.Helper()
	if _, err := g.fifo.Write(make([]byte, n)); err != nil {
		g.t.Fatal(err)
	}
}
