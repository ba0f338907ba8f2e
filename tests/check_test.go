package tests

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"nbdhost/check"
)

// report is what --check=json writes.
type report struct {
	Subject          string
	Pass, Fail, Skip int
	Checks           []check.Result
}

func (r *report) failed() (names []string) {
	for _, c := range r.Checks {
		if c.Status == check.Fail {
			names = append(names, c.Name)
		}
	}
	return names
}

// checkPlugin runs nbdhost --check=json and holds its exit status against what it
// reports.
func checkPlugin(t testing.TB, args ...string) *report {
	t.Helper()
	var r report
	out, err := runCheck(t, nbdhost, append([]string{"--check=json"}, args...)...)
	if e := json.Unmarshal([]byte(out), &r); e != nil {
		t.Fatalf("%v: %v\n%s", args, errors.Join(err, e), out)
	}
	if (err == nil) != (r.Fail == 0) {
		t.Errorf("%v: %d checks failed, and the exit status is %v", args, r.Fail, err)
	}
	return &r
}

// runCheck runs a program and returns what it writes to its standard output.
func runCheck(t testing.TB, program string, args ...string) (string, error) {
	t.Helper()
	cmd := exec.Command(program, args...)
	cmd.Env = append(os.Environ(), "GORACE=halt_on_error=1 exitcode=66", "LC_ALL=C", "TMPDIR="+tempDir(t))
	var stderr strings.Builder
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	for _, report := range []string{"DATA RACE", "AddressSanitizer"} {
		if strings.Contains(stderr.String(), report) {
			t.Errorf("%s %v printed %q:\n%s", program, args, report, stderr.String())
		}
	}
	return string(out), err
}

// checkFixture is fixture for the plugins in fixtures/check.
func checkFixture(t testing.TB, name string, options ...string) string {
	t.Helper()
	if err := os.MkdirAll(filepath.Join(scratch, "check"), 0o755); err != nil {
		t.Fatal(err)
	}
	return fixture(t, "check/"+name, append(options, "-pthread")...)
}

func promises(t testing.TB, options ...string) string {
	t.Helper()
	return checkFixture(t, "promises", options...)
}

// Each broken promise is found by its own check, and by no other; what it says can
// be seen again with the command that it names.
func TestCheckFindsEachBrokenPromise(t *testing.T) {
	t.Parallel()
	onlyNbdhost(t)
	compiled := map[string][]string{ // those that are broken by the compiler's options
		"file.symbols":        {"-DNO_SYMBOL"},
		"file.load":           {"-DAPI=3"},
		"file.struct":         {"-DSIZE_OFF=4"},
		"file.callbacks":      {"-DNO_PWRITE"},
		"plugin.thread_model": {"-DMODEL=NBDKIT_THREAD_MODEL_SERIALIZE_REQUESTS"},
		// Where flush is a lie, so is what relies on it: nothing is written.
		"plugin.capabilities": {"-DNO_FLUSH"},
	}
	for _, name := range check.Names() {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			options, ok := compiled[name]
			args := []string{promises(t, options...)}
			if !ok {
				args = append(args, "break="+name)
			}
			if name != "plugin.capabilities" {
				args = append(args, "--check-writes")
			}
			r := checkPlugin(t, args...)
			if got := r.failed(); !slices.Equal(got, []string{name}) {
				for _, c := range r.Checks {
					if c.Status == check.Fail {
						t.Logf("%s: %s", c.Name, c.Saw)
					}
				}
				t.Fatalf("got %q, want %s", got, name)
			}
			i := slices.IndexFunc(r.Checks, func(c check.Result) bool { return c.Name == name })
			c := r.Checks[i]
			if c.Promise == "" || c.Saw == "" {
				t.Errorf("got %+v, want it to say what was promised and seen", c)
			}
			again, err := runCheck(t, "/bin/sh", "-c", c.Again)
			var exit *exec.ExitError
			if !errors.As(err, &exit) || exit.ExitCode() != 1 || !strings.Contains(again, "FAIL  "+name) {
				t.Errorf("%s: got %v\n%s", c.Again, err, again)
			}
		})
	}
}

// A plugin that keeps its promises passes everything, with each thread model, and
// without --check-writes nothing is written to it.
func TestCheckPasses(t *testing.T) {
	t.Parallel()
	onlyNbdhost(t)
	r := checkPlugin(t, promises(t), "--check-writes")
	if len(r.Checks) != len(check.Checks) || r.Pass+r.Fail+r.Skip != len(r.Checks) || r.Fail > 0 {
		t.Errorf("got %+v", r)
	}
	for _, c := range r.Checks {
		if c.Status != check.Pass && c.Name != "size.blocks" {
			t.Errorf("%s: got %s (%s)", c.Name, c.Status, c.Why)
		}
	}

	dir := tempDir(t)
	image := filepath.Join(dir, "image")
	copyFile(t, image, testImages(t).sparse)
	before := digest(t, image)
	if got := checkPlugin(t, "file", image).failed(); got != nil {
		t.Errorf("file: got %q", got)
	}
	if after := digest(t, image); after != before {
		t.Errorf("without --check-writes: got %swant %s", after, before)
	}
	// What is written is put back.
	checkPlugin(t, "file", image, "--check-writes")
	if after := digest(t, image); after != before {
		t.Errorf("with --check-writes: got %swant %s", after, before)
	}
}

// A crash fails the check that runs, and the rest goes on, or is skipped where it
// cannot.
func TestCheckCrash(t *testing.T) {
	t.Parallel()
	onlyNbdhost(t)
	r := checkPlugin(t, promises(t), "break=crash")
	if got := r.failed(); !slices.Equal(got, []string{"plugin.start"}) || len(r.Checks) != len(check.Checks) {
		t.Errorf("got %q of %d", got, len(r.Checks))
	}
	for _, c := range r.Checks {
		if c.Status == check.Fail && !strings.Contains(c.Saw, "plugin promises aborted (SIGABRT) in .") {
			t.Errorf("got %q, want the signal", c.Saw)
		}
	}
	r = checkPlugin(t, promises(t), "break=crash_in_cache")
	if got := r.failed(); !slices.Equal(got, []string{"cache.data"}) || len(r.Checks) != len(check.Checks) {
		t.Errorf("got %q of %d", got, len(r.Checks))
	}
}

func TestCheckFormats(t *testing.T) {
	t.Parallel()
	onlyNbdhost(t)
	args := []string{"--check-only=size,plugin.errors", promises(t), "break=size.stable"}

	text, err := runCheck(t, nbdhost, append([]string{"--check"}, args...)...)
	for _, want := range []string{"ok    plugin.errors\n", "FAIL  size.stable\n      promised: each", "skip  size.blocks: ", "3 checks: 1 hold, 1 fail, 1 skipped\n"} {
		if !strings.Contains(text, want) {
			t.Errorf("text: got %v\n%s\nwant %q in it", err, text, want)
		}
	}

	tap, _ := runCheck(t, nbdhost, append([]string{"--check=tap"}, args...)...)
	var plan, points int
	for s := bufio.NewScanner(strings.NewReader(tap)); s.Scan(); {
		line := s.Text()
		if rest, ok := strings.CutPrefix(line, "1.."); ok {
			fmt.Sscan(rest, &plan)
		}
		if point := strings.TrimPrefix(line, "not "); strings.HasPrefix(point, "ok ") {
			points++
			if want := fmt.Sprintf("ok %d - ", points); !strings.HasPrefix(point, want) {
				t.Errorf("tap: got %q, want %q", line, want)
			}
		}
	}
	if plan != 3 || points != 3 || !strings.Contains(tap, "not ok 2 - size.stable\n  ---\n") || !strings.HasPrefix(tap, "TAP version 13\n") {
		t.Errorf("tap: got\n%s", tap)
	}

	for _, bad := range [][]string{{"--check=xml", "null"}, {"--check", "--check-only=sizes", "null"}, {"--check", "no-such-plugin"}} {
		if out, err := runCheck(t, nbdhost, bad...); err == nil || out != "" {
			t.Errorf("%q: got %v, %q", bad, err, out)
		}
	}
}
