package main

import (
	"bytes"
	"encoding/xml"
	"errors"
	"io"
	"math"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// The program starts itself as the load generator.
func TestMain(m *testing.M) {
	if len(os.Args) > 1 && os.Args[1] == "load" {
		runLoad()
	}
	os.Exit(m.Run())
}

// The program measures nbdkit beside itself: what is tested is that each kind of
// row and figure can be measured and written down, not what comes out.
func TestRun(t *testing.T) {
	// With -race a process sleeps for a second at its end, else.
	t.Setenv("GORACE", "atexit_sleep_ms=0")
	doc := filepath.Join(t.TempDir(), "performance.md")
	if err := os.WriteFile(doc, []byte("before\n"+beginMark+"\nold\n"+endMark+"\nafter\n"), 0o666); err != nil {
		t.Fatal(err)
	}
	rows := []string{
		"memory/(read|write)/(4k|1m)/d(1|8)/c1/unix/f0", "memory/read/4k/d64/c16/tcp/f3", "memory/write/4k/d64/c1/unix/f0/n8", "file/read/4k/d1/c1/unix/f0",
		"memory/status/1m/d8/c1/unix/f0", "memory/read/4k/d1/c4/unix/f0/busy", "slow/write/4k/d16/c1/unix/f0", "(serial|perl)/write/4k/d64/c1/unix/f0",
		"fio:memory/read/4k/d64/c1/unix/f0", "nbdcopy:memory/write/256k/d64/c4/(unix|tls|psk)/f0", "memory/read/4k/d64/c1/(tlstcp|psk)/f0",
		"qemu-img:file/read/2m/d8/c1/unix/f0", "start to first reply, --run", "resident memory",
	}
	var out bytes.Buffer
	err := run([]string{"--nbdhost", "/usr/bin/nbdkit", "--patience", "0", "--rounds", "1", "--seconds", "0.2", "--copy", "16", "--doc", doc,
		"--rows", "^(" + strings.Join(rows, "|") + ")$"}, &out, io.Discard)
	if err != nil || strings.Contains(out.String(), "FAILED") {
		t.Fatalf("%v\n%s", err, &out)
	}
	md, err := os.ReadFile(doc)
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"before\n", "after\n", "`memory/read/4k/d1/c1/unix/f0` | nbdhost |", "|  | qemu-nbd |", "|  | floor |", "-depth-read.svg)", "\nRows of tlstcp: TLS 1.3 TLS_AES_128_GCM_SHA256.", "\nRows of psk: (TLS1.3", "resident memory, idle", "\nThe host took more than 2 % of the processors away in "} {
		if !strings.Contains(string(md), want) {
			t.Errorf("%s: got no %q:\n%s", doc, want, md)
		}
	}
	if strings.Contains(string(md), "old") {
		t.Errorf("%s: what was between the marks is still there", doc)
	}
	plots, _ := filepath.Glob(filepath.Join(filepath.Dir(doc), "*.svg"))
	if len(plots) == 0 {
		t.Error("got no plots")
	}
	for _, p := range plots {
		f, err := os.Open(p)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		d := xml.NewDecoder(f)
		for {
			if _, err := d.Token(); err != nil {
				if !errors.Is(err, io.EOF) {
					t.Errorf("%s: %v", p, err)
				}
				break
			}
		}
	}
}

// A row that cannot be measured is told, and the others are measured.
func TestFailure(t *testing.T) {
	var out bytes.Buffer
	err := run([]string{"--nbdhost", "/bin/false", "--patience", "0", "--rounds", "1", "--seconds", "0.02", "--rows", "^null/read/4k/d[18]/c1/unix/f0$"}, &out, io.Discard)
	if err == nil || strings.Count(out.String(), "FAILED: start nbdhost: exit status 1") != 2 || strings.Count(out.String(), "nbdkit") != 2 {
		t.Errorf("got %v\n%s", err, &out)
	}
	if err := run([]string{"--rows", "no such row"}, &out, io.Discard); err == nil {
		t.Error("an expression that matches nothing is no error")
	}
	out.Reset()
	doc := filepath.Join(t.TempDir(), "none.md")
	if err := run([]string{"--doc", doc}, &out, io.Discard); !errors.Is(err, os.ErrNotExist) || out.Len() > 0 {
		t.Errorf("got %v, need that there is no %s before the first row:\n%s", err, doc, &out)
	}
}

func TestStandardRowsAreAmongAll(t *testing.T) {
	all := map[string]bool{}
	for _, r := range allRows() {
		if all[r.name()] {
			t.Errorf("%s is there twice", r.name())
		}
		all[r.name()] = true
	}
	seen := map[string]bool{}
	for _, r := range standardRows() {
		if !all[r.name()] || seen[r.name()] {
			t.Errorf("%s: known %v, standard before %v", r.name(), all[r.name()], seen[r.name()])
		}
		seen[r.name()] = true
	}
}

func TestGoals(t *testing.T) {
	for _, tt := range []struct {
		row   string
		other string
		want  goal
	}{
		{"memory/read/4k/d64/c1/unix/f0", "nbdkit", goal{ops: 3.5, cpu: 0.3}},
		{"memory/write/4k/d64/c1/unix/f0", "floor", goal{ops: 0.9}},
		{"memory/read/4k/d8/c1/unix/f0", "nbdkit", goal{ops: 2, cpu: 0.45}},
		{"memory/read/64k/d1/c1/unix/f0", "nbdkit", goal{ops: 1.5, cpu: 0.75, p99: 1}},
		{"memory/read/64k/d64/c1/unix/f0", "nbdkit", goal{ops: 1.2, cpu: 0.9}},
		{"memory/write/1m/d8/c1/unix/f0", "nbdkit", goal{ops: 1.1, cpu: 0.95}},
		{"memory/write/1m/d8/c1/unix/f0", "floor", goal{ops: 1}},
		{"memory/read/4k/d1/c16/unix/f0", "nbdkit", goal{ops: 1.3}},
		{"memory/read/4k/d64/c16/unix/f0", "floor", goal{ops: 0.7}},
		{"memory/read/4k/d64/c1/unix/f0/busy", "nbdkit", goal{ops: 1}},
		{"slow/read/4k/d64/c1/unix/f0/t64", "nbdkit", goal{ops: 3.5}},
		{"file/read/4k/d64/c1/unix/f0", "qemu-nbd", goal{}},
		{"fio:memory/read/4k/d64/c1/unix/f0", "nbdkit", goal{ops: 1}},
		{"metrics:memory/read/4k/d64/c1/unix/f0", "without", goal{ops: 0.98}},
	} {
		for _, r := range standardRows() {
			if r.name() == tt.row {
				if got := r.goal(tt.other); got != tt.want {
					t.Errorf("%s beside %s: got %v, want %v", tt.row, tt.other, got, tt.want)
				}
				tt.row = ""
			}
		}
		if tt.row != "" {
			t.Errorf("%s is no standard row", tt.row)
		}
	}
	g := goal{ops: 2, cpu: 0.5, p99: 1}
	if !g.met(1.996, 0.504, 1.004) || g.met(1.98, 0.5, 1) || g.met(2, 0.52, 1) || g.met(2, 0.5, 1.02) {
		t.Errorf("%v: wrong verdict", g)
	}
}

// Where a goal is missed the table says what does the least reaches, and whether that misses
// it as well.
func TestLeast(t *testing.T) {
	r := row{op: "write", depth: 64}.fill()
	slow := row{plugin: "slow", depth: 64, threads: 64}.fill()
	for _, tt := range []struct {
		row                     row
		host, floor, withPlugin float64 // operations for each of nbdkit's
		verdicts                []string
		beyond                  []bool
	}{
		{r, 3.6, 3.9, 3.8, []string{"met", "met", ""}, []bool{false, false, false}},
		{r, 3.1, 3.3, 3.2, []string{"BELOW (floor 3.30)", "met", ""}, []bool{true, false, false}},
		{r, 3.4, 4, 3.5, []string{"BELOW (floor 4.00)", "BELOW (floor+plugin 0.88)", ""}, []bool{false, true, false}},
		{r, 3.4, 4, 3.8, []string{"BELOW (floor 4.00)", "BELOW (floor+plugin 0.95)", ""}, []bool{false, false, false}},
		{slow, 3.4, 3.6, 0, []string{"BELOW (nbdkit -t 3.60)", ""}, []bool{false, false}},
		{slow, 3.4, 3.45, 0, []string{"BELOW (nbdkit -t 3.45)", ""}, []bool{true, false}},
	} {
		measured := func(kind string, ops float64) *series {
			return &series{kind: kind, samples: []sample{{ops: ops, cpu: 1 / (4 * ops)}}}
		}
		res := &result{row: tt.row, host: measured("nbdhost", tt.host)}
		for i, kind := range tt.row.others() {
			res.others = append(res.others, measured(kind, []float64{1, tt.floor, tt.withPlugin}[i]))
		}
		for i, c := range res.lines()[1:] {
			if c.verdict != tt.verdicts[i] || c.beyond != tt.beyond[i] {
				t.Errorf("%v beside %s: got %q, %v; want %q, %v", tt.host, c.server, c.verdict, c.beyond, tt.verdicts[i], tt.beyond[i])
			}
		}
	}
}

func TestRatioIsOfTheSameRound(t *testing.T) {
	a := &series{samples: []sample{{ops: 2}, {ops: 30}, {ops: 8}}}
	b := &series{samples: []sample{{ops: 1}, {ops: 10}, {ops: 2}}}
	if got := ratio(a, b, opsOf); got != 3 {
		t.Errorf("got %g, want the median of 2, 3 and 4", got)
	}
	if got := median([]float64{4, 1, 3, 2}); got != 2.5 {
		t.Errorf("median: got %g", got)
	}
	if got := ratio(a, &series{}, opsOf); got != 0 {
		t.Errorf("ratio to nothing: got %g", got)
	}
}

func TestScale(t *testing.T) {
	for _, highest := range []float64{0, 0.3, 1, 4.9, 99, 100, 101, 123456} {
		step, n := scale(highest)
		if top := step * float64(n); top < highest || n < 1 || n > 6 || highest > 0 && top > 2.5*highest {
			t.Errorf("scale of %g: got %d steps of %g", highest, n, step)
		}
	}
	if math.IsNaN(median(nil)) {
		t.Error("median of nothing is not a number")
	}
}

// What fills an export is no zeroes, which some clients do not copy.
func TestFill(t *testing.T) {
	uri := filepath.Join(t.TempDir(), "socket")
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	const mapped = `"$0" load uri="$uri" mode=fill size=65536 span=1048576 && nbdinfo --map "$uri"`
	cmd := exec.Command("/usr/bin/nbdkit", "-U", uri, "memory", "1M", "--run", strings.ReplaceAll(mapped, "$0", self))
	out, err := cmd.CombinedOutput()
	if got := strings.Fields(string(out)); err != nil || !slices.Equal(got, []string{"0", "1048576", "0", "data"}) {
		t.Errorf("got %v and a map of %q, want 1 MiB of data", err, out)
	}
}
