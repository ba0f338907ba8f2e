package tests

import (
	"cmp"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
)

var update = flag.Bool("update", false, "write ../docs/compatibility.md from the results")

const compatibility = "../docs/compatibility.md"

// A release of Debian, and how its nbdkit and the program under test start in it:
// two scripts that enter its tree, in which this machine's files for temporary
// use are where they are outside.
type release struct {
	name            string
	tree            string // "/" for this machine's own
	nbdkit, nbdhost string
	// enter runs what its arguments say in the tree.
	enter string
}

// plugins is where the release has them, seen from outside.
func (r *release) plugins() string {
	return filepath.Join(r.tree, "usr/lib/x86_64-linux-gnu/nbdkit/plugins")
}

// has tells whether the release has a plugin.
func (r *release) has(plugin string) bool {
	for _, suffix := range []string{"-plugin.so", "-plugin"} {
		if _, err := os.Stat(filepath.Join(r.plugins(), "nbdkit-"+plugin+suffix)); err == nil {
			return true
		}
	}
	return false
}

// newest is the release whose manual pages say what is right.
func newest(t *testing.T) *release {
	t.Helper()
	all := releases(t)
	return all[len(all)-1]
}

var findReleases = sync.OnceValues(func() ([]*release, error) {
	all := []*release{{name: "bookworm", tree: "/"}, {name: "trixie"}, {name: "sid"}}
	out, err := exec.Command("./trees.sh", "trixie", "sid").Output()
	if err != nil {
		if exit, ok := err.(*exec.ExitError); ok {
			err = fmt.Errorf("%w\n%s", err, exit.Stderr)
		}
		return nil, fmt.Errorf("make trees of other releases: %w", err)
	}
	trees := strings.Fields(string(out))
	if err := makeStandIns(); err != nil {
		return nil, err
	}
	temp := os.TempDir()
	for i, r := range all {
		// Programs that make file systems use these for what is the time of day.
		enter := "export SOURCE_DATE_EPOCH=1000000000 E2FSPROGS_FAKE_TIME=1000000000 HOME=/root PATH=" +
			filepath.Join(scratch, "bin") + ":$PATH PYTHONPATH=" + filepath.Join(scratch, "python") + " LIBGUESTFS_PATH=" +
			filepath.Join(scratch, "appliance") + " LIBGUESTFS_BACKEND=direct LIBGUESTFS_BACKEND_SETTINGS=force_tcg\n"
		inside := nbdhost
		if i == 0 {
			enter += `exec "$@"`
		} else {
			r.tree = trees[i-1]
			mounts := "mkdir -p " + r.tree + temp + " && mount --bind " + temp + " " + r.tree + temp +
				" && mount --rbind /proc " + r.tree + "/proc && mount --rbind /sys " + r.tree +
				"/sys && mount --rbind /dev " + r.tree + "/dev"
			if !strings.HasPrefix(nbdhost, temp) {
				// A program from elsewhere must be seen from inside too.
				inside = filepath.Join(scratch, filepath.Base(nbdhost)+"-under-test")
				if out, err := exec.Command("cp", nbdhost, inside).CombinedOutput(); err != nil {
					return nil, fmt.Errorf("copy %s: %w\n%s", nbdhost, err, out)
				}
			}
			// The mounts are gone with the processes.
			enter += `exec unshare --mount sh -c '` + mounts + ` && exec chroot ` + r.tree + ` "$@"' sh "$@"`
		}
		r.enter = filepath.Join(scratch, r.name)
		r.nbdkit, r.nbdhost = r.enter+"-nbdkit", r.enter+"-nbdhost"
		for path, script := range map[string]string{
			r.enter:   enter,
			r.nbdkit:  "exec " + r.enter + " " + nbdkit + ` "$@"`,
			r.nbdhost: "exec " + r.enter + " " + inside + ` "$@"`,
		} {
			if err := os.WriteFile(path, []byte("#!/bin/sh\n"+script+"\n"), 0o755); err != nil {
				return nil, err
			}
		}
	}
	return all, nil
})

// releases returns the three releases, oldest first, and makes the trees of the
// others where they are missing, which takes a minute or two.
func releases(t *testing.T) []*release {
	t.Helper()
	if testing.Short() {
		t.Skip("short: no trees of other releases")
	}
	all, err := findReleases()
	if err != nil {
		t.Fatal(err)
	}
	return all
}

// same is compare in a release: it returns what both servers did alike.
func (r *release) same(t *testing.T, sc scenario) string {
	t.Helper()
	want := sc.run(t, r.nbdkit)
	got := sc.run(t, r.nbdhost)
	if got != want {
		t.Errorf("%s is unlike nbdkit in this:\n%s", underTest(), difference(want, got))
	}
	return got
}

// A table of results. A cell says what a test did, and is there only if it
// found nothing wrong.
type table struct {
	title   string
	text    string // what a row and a cell are
	columns []string

	mu    sync.Mutex
	rows  []string
	cells map[[2]string][]done // by row and column
}

// done is a part of a cell. Tests end in any order; rank says where it stands.
type done struct {
	rank int
	what string
}

var (
	pluginTable = &table{title: "Plugins", columns: []string{"plugin", "bookworm", "trixie", "sid"},
		text: "Each plugin of Debian's packages, what was done with it, and how that compares with the\n" +
			"release's own nbdkit. \"dump\": `--dump-plugin` prints the same. \"read\": a copy of the disk has\n" +
			"the same bytes. \"map\": so has the list of extents. \"write\": written, zeroed, trimmed and flushed,\n" +
			"with the same result for the client and on the disk. A dash: the release does not have it.\n" +
			"What runs programs in a language has a table of its own, below. torrent\n" +
			"downloads from a web seed; libvirt reads the disk of a domain of qemu's; guestfs boots its virtual\n" +
			"machine without acceleration."}
	filterTable = &table{title: "Filters", columns: []string{"filter", "bookworm", "trixie", "sid"},
		text: "Each filter of Debian's packages over one of the release's plugins, with the same result as under\n" +
			"the release's own nbdkit, for the client and on the disk. \"help, dump\": `--help` and\n" +
			"`--dump-plugin` print the same. \"calls below\": a log filter between it and the plugin has written\n" +
			"the same. Where a job is done with several settings, the number is how many. A dash: the release\n" +
			"does not have it. Filters of three releases in one chain, which nbdkit refuses, and every callback\n" +
			"in the same order as in nbdkit, are other tests."}
	languageTable = &table{title: "Languages", columns: []string{"language", "bookworm", "trixie", "sid"},
		text: "A plugin in each language, with the same result as under nbdkit. \"error\": an error of the\n" +
			"plugin reaches the client, with its number where the language can give one. \"children\": programs\n" +
			"that it starts have the same signals ignored and blocked. \"threads\": it is configured on the main\n" +
			"thread, and threads of its own run and sleep as they should. A dash: the release has no package\n" +
			"for it. Go in a plugin is experimental: two Go runtimes in one\n" +
			"process are not supported upstream."}
	functionTable = &table{title: "Functions", columns: []string{"function", "bookworm", "trixie", "sid"},
		text: "Each function that a plugin may call, in each phase of the life cycle and from a thread of the\n" +
			"plugin's own. \"same\": it returned and printed what it does under the release's nbdkit. \"new\":\n" +
			"that nbdkit does not have it yet, and it works."}
	sessionTable = &table{title: "Callbacks", columns: []string{"session", "bookworm", "trixie", "sid"},
		text: "What a plugin with all callbacks sees in each session: callbacks, arguments, and whether it\n" +
			"is called on the main thread."}
	structTable = &table{title: "Older plugins", columns: []string{"plugin", "result"},
		text: "Plugins whose struct ends where it did in an earlier release, beside nbdkit 1.32.5."}
	hazardTable = &table{title: "Hazards", columns: []string{"what the plugin does", "result"},
		text: "What plugins do that a host written in Go could trip over."}

	tables = []*table{pluginTable, filterTable, languageTable, functionTable, sessionTable, structTable, hazardTable}
)

// record notes that a test did what it says, unless it has failed.
func (tb *table) record(t *testing.T, row, column string, rank int, what string) {
	if t.Failed() {
		return
	}
	tb.mu.Lock()
	defer tb.mu.Unlock()
	if tb.cells == nil {
		tb.cells = map[[2]string][]done{}
	}
	if !slices.Contains(tb.rows, row) {
		tb.rows = append(tb.rows, row)
	}
	at := [2]string{row, column}
	tb.cells[at] = append(tb.cells[at], done{rank, what})
}

// cell returns what has been done, or a dash.
func (tb *table) cell(row, column string) string {
	parts := tb.cells[[2]string{row, column}]
	slices.SortFunc(parts, func(a, b done) int {
		return cmp.Or(a.rank-b.rank, strings.Compare(a.what, b.what))
	})
	times := map[string]int{}
	for _, p := range parts {
		times[p.what]++
	}
	var texts []string
	for _, p := range parts {
		switch n := times[p.what]; {
		case n == 1:
			texts = append(texts, p.what)
		case n > 1:
			texts = append(texts, fmt.Sprintf("%s (%d)", p.what, n))
		}
		times[p.what] = 0 // it has been said
	}
	return cmp.Or(strings.Join(texts, "; "), "-")
}

func (tb *table) render(b *strings.Builder) {
	fmt.Fprintf(b, "\n## %s\n\n%s\n\n| %s |\n|%s\n", tb.title, tb.text, strings.Join(tb.columns, " | "),
		strings.Repeat("---|", len(tb.columns)))
	slices.Sort(tb.rows)
	for _, row := range tb.rows {
		fmt.Fprintf(b, "| %s |", row)
		for _, column := range tb.columns[1:] {
			fmt.Fprintf(b, " %s |", tb.cell(row, column))
		}
		b.WriteString("\n")
	}
}

// TestCompatibility does everything with every plugin, and holds the results
// against docs/compatibility.md: what worked once must go on working. With
// -update it writes that file.
func TestCompatibility(t *testing.T) {
	t.Parallel()
	onlyNbdhost(t)
	releases(t)
	t.Run("all", func(t *testing.T) {
		for _, group := range []struct {
			name string
			run  func(*testing.T)
		}{
			{"dump", testDump}, {"plugins", testPlugins},
			{"filters", testFilters}, {"filter information", testFilterInformation}, {"languages", testLanguages},
			{"functions", testFunctions}, {"sessions", testSessions}, {"structs", testStructs},
			{"hazards", testHazards},
		} {
			t.Run(group.name, func(t *testing.T) {
				t.Parallel()
				group.run(t)
			})
		}
	})
	if run := flag.Lookup("test.run").Value.String(); strings.Contains(run, "/") {
		return // some rows were not asked for
	}
	var b strings.Builder
	b.WriteString("# Compatibility\n\nWritten by `go test ./tests -run TestCompatibility -update`; every cell is the result of a test.\n" +
		"The releases are Debian's: bookworm has nbdkit 1.32.5, trixie 1.42.3, sid 1.48.1. nbdhost is\nthe same program in all three.\n")
	for _, tb := range tables {
		tb.render(&b)
	}
	b.WriteString(findings())
	if *update {
		if t.Failed() {
			t.Fatalf("write %s: some tests failed", compatibility)
		}
		if err := os.MkdirAll(filepath.Dir(compatibility), 0o755); err != nil {
			t.Fatal(err)
		}
		writeFile(t, compatibility, b.String(), 0o644)
		return
	}
	want, err := os.ReadFile(compatibility)
	if err != nil {
		t.Fatal(err)
	}
	if b.String() != string(want) {
		t.Errorf("results differ from %s (run with -update if they are better):\n%s", compatibility,
			strings.ReplaceAll(difference(string(want), b.String()), "nbdkit:", "file:"))
	}
}
