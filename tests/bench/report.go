package main

import (
	"bytes"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// report gathers what was measured.
type report struct {
	b       *bench
	began   time.Time
	rows    []*result
	singles []figure
}

func newReport(b *bench) *report { return &report{b: b, began: time.Now()} }

// cells are a line of the table: a server, and nbdhost's ratios to it.
type cells struct {
	server, ops, p50, p99, cpu, memory, client string
	ratioOps, ratioCPU, ratioP99               string
	goal, verdict                              string
	beyond                                     bool // what does the least does not reach the goal either
}

var header = cells{"server", "ops/s", "p50 µs", "p99 µs", "CPU/op µs", "peak MiB", "client µs", "ops ×", "CPU ×", "p99 ×", "goal", "", false}

func (res *result) lines() []cells {
	lines := []cells{res.cells(res.host)}
	for _, s := range res.others {
		lines = append(lines, res.cells(s))
	}
	return lines
}

func (res *result) cells(s *series) cells {
	if s.err != nil {
		return cells{server: s.kind, goal: "FAILED: " + lastLine(s.err.Error())}
	}
	micro := func(of func(sample) float64) string { return digits(s.median(of) / 1e3) }
	c := cells{
		server: s.kind, ops: fmt.Sprintf("%.0f", s.median(opsOf)), p50: micro(p50Of), p99: micro(p99Of),
		cpu: micro(cpuOf), memory: fmt.Sprintf("%.0f", s.median(memoryOf)/mib), client: micro(clientOf),
	}
	if s == res.host || res.host.err != nil {
		return c
	}
	ops, cpu, p99 := ratio(res.host, s, opsOf), ratio(res.host, s, cpuOf), ratio(res.host, s, p99Of)
	c.ratioOps, c.ratioCPU, c.ratioP99 = ratioText(ops), ratioText(cpu), ratioText(p99)
	if g := res.row.goal(s.kind); g != (goal{}) {
		c.goal, c.verdict = g.String(), verdict(g.met(ops, cpu, p99))
		if least := res.least(s.kind); c.verdict == below && least != nil {
			ops := ratio(least, s, opsOf)
			c.beyond = !g.met(ops, ratio(least, s, cpuOf), ratio(least, s, p99Of))
			c.verdict += fmt.Sprintf(" (%s %.2f)", least.kind, ops)
		}
	}
	return c
}

// least is what shows how far one can get beside a server of that kind: beside nbdkit the
// floor, or itself with as many threads, and beside the floor that which has the plugin's work
// to do as well. It is nil where nothing does.
func (res *result) least(kind string) *series {
	least := map[string][]string{"nbdkit": {"floor", "nbdkit -t"}, "floor": {"floor+plugin"}}[kind]
	for _, s := range res.others {
		if slices.Contains(least, s.kind) && s.err == nil {
			return s
		}
	}
	return nil
}

const below = "BELOW"

func verdict(met bool) string {
	if met {
		return "met"
	}
	return below
}

// digits shows about three digits, and nothing for 0.
func digits(v float64) string {
	switch {
	case v == 0:
		return ""
	case v < 10:
		return fmt.Sprintf("%.2f", v)
	case v < 100:
		return fmt.Sprintf("%.1f", v)
	}
	return fmt.Sprintf("%.0f", v)
}

func ratioText(v float64) string {
	if v == 0 {
		return ""
	}
	return fmt.Sprintf("%.2f", v)
}

// textTable prints rows as they are measured.
type textTable struct {
	w     io.Writer
	width int // of the names of rows
	begun bool
}

func newTextTable(w io.Writer, rows []row) *textTable {
	t := &textTable{w: w}
	for _, r := range rows {
		t.width = max(t.width, len(r.name()))
	}
	return t
}

func (t *textTable) line(name string, c cells) {
	s := fmt.Sprintf("%-*s  %-12s %9s %8s %8s %9s %8s %9s %6s %6s %6s  %s %s", t.width, name, c.server, c.ops, c.p50, c.p99,
		c.cpu, c.memory, c.client, c.ratioOps, c.ratioCPU, c.ratioP99, c.goal, c.verdict)
	fmt.Fprintln(t.w, strings.TrimRight(s, " "))
}

func (t *textTable) row(res *result) {
	if !t.begun {
		t.begun = true
		t.line("row", header)
	}
	name := res.row.name()
	for _, c := range res.lines() {
		t.line(name, c)
		name = ""
	}
}

func (t *textTable) legend(rows []*result, h *host) {
	if !t.begun {
		return
	}
	fmt.Fprintln(t.w, "\nThe columns with × are nbdhost's figure divided by that of the line's server, median of the rounds.")
	fmt.Fprintln(t.w, h)
	for _, s := range suites(rows) {
		fmt.Fprintln(t.w, s)
	}
}

func (t *textTable) singles(figures []figure, first bool) {
	if first {
		fmt.Fprintf(t.w, "\n%-52s %-5s %9s %9s %7s  %s\n", "", "unit", "nbdhost", "nbdkit", "ratio", "goal")
	}
	for _, f := range figures {
		host, kit, ratio, goal := f.texts()
		fmt.Fprintf(t.w, "%s\n", strings.TrimRight(fmt.Sprintf("%-52s %-5s %9s %9s %7s  %s", f.name, f.unit, host, kit, ratio, goal), " "))
	}
}

func (f *figure) texts() (host, kit, ratio, goal string) {
	if f.err != nil {
		return "", "", "", "FAILED: " + lastLine(f.err.Error())
	}
	if goal = f.goal(); goal != "" {
		goal += " " + verdict(f.met())
	}
	return digits(f.host), digits(f.kit), ratioText(f.ratio), goal
}

// suites says what was negotiated in the rows with TLS, by both servers.
func suites(rows []*result) (lines []string) {
	for _, res := range rows {
		if res.tls == "" {
			continue
		}
		if s := fmt.Sprintf("Rows of %s: %s.", res.row.transport, res.tls); !slices.Contains(lines, s) {
			lines = append(lines, s)
		}
	}
	return lines
}

const (
	beginMark = "<!-- bench: begin -->"
	endMark   = "<!-- bench: end -->"
)

// around returns what the file of the tables has before and after them.
func around(path string) (before, after []byte, err error) {
	old, err := os.ReadFile(path)
	if err != nil {
		return nil, nil, err
	}
	before, rest, ok := bytes.Cut(old, []byte(beginMark))
	_, after, ok2 := bytes.Cut(rest, []byte(endMark))
	if !ok || !ok2 {
		return nil, nil, fmt.Errorf("write %s: need a line %s and after it a line %s", path, beginMark, endMark)
	}
	return before, after, nil
}

// write puts the tables between the marks of a Markdown file, and the plots into
// files beside it.
func (rep *report) write(path string) error {
	before, after, err := around(path)
	if err != nil {
		return err
	}
	var w bytes.Buffer
	w.Write(before)
	fmt.Fprintln(&w, beginMark)
	rep.markdown(&w)
	for _, p := range rep.plots() {
		file := strings.TrimSuffix(filepath.Base(path), ".md") + "-" + p.file + ".svg"
		if err := os.WriteFile(filepath.Join(filepath.Dir(path), file), p.svg(), 0o666); err != nil {
			return err
		}
		fmt.Fprintf(&w, "\n![%s](%s)\n", p.title, file)
	}
	w.WriteString("\n" + endMark)
	w.Write(after)
	return os.WriteFile(path, w.Bytes(), 0o666)
}

func (rep *report) markdown(w io.Writer) {
	fmt.Fprintf(w, "\nMeasured on %s in %d rounds of %g s: %s.\n", rep.began.Format(time.DateOnly), rep.b.rounds, rep.b.seconds, rep.machine())
	fmt.Fprintf(w, "\n%v\n", &rep.b.host)
	met, missed, beyond := 0, 0, 0
	tally := func(goal string) {
		switch {
		case strings.HasSuffix(goal, "met"):
			met++
		case strings.Contains(goal, below), strings.HasPrefix(goal, "FAILED"):
			missed++
		}
	}
	var rows bytes.Buffer
	for _, res := range rep.rows {
		for i, c := range res.lines() {
			name := ""
			if i == 0 {
				name = "`" + res.row.name() + "`"
			}
			goal := strings.TrimSpace(c.goal + " " + c.verdict)
			tally(goal)
			if c.beyond {
				beyond++
			}
			c.goal = strings.ReplaceAll(strings.ReplaceAll(goal, ">=", "≥"), "<=", "≤")
			fmt.Fprintf(&rows, "| %s | %s |\n", name, strings.Join(c.list(), " | "))
		}
	}
	var others bytes.Buffer
	for _, f := range rep.singles {
		host, kit, ratio, goal := f.texts()
		tally(goal)
		goal = strings.ReplaceAll(goal, "<=", "≤")
		fmt.Fprintf(&others, "| %s | %s | %s | %s | %s | %s |\n", f.name, f.unit, host, kit, ratio, goal)
	}
	fmt.Fprintf(w, "\nGoals met: %d of %d. Of the others the floor misses %d as well.\n", met, met+missed, beyond)
	if rows.Len() > 0 {
		fmt.Fprintf(w, "\n| row | %s |\n|---|---|%s\n%s", strings.Join(header.list(), " | "), strings.Repeat("--:|", 9)+"---|", &rows)
	}
	for _, s := range suites(rep.rows) {
		fmt.Fprintf(w, "\n%s\n", s)
	}
	if others.Len() > 0 {
		fmt.Fprintf(w, "\n| figure | unit | nbdhost | nbdkit | ratio | goal |\n|---|---|--:|--:|--:|---|\n%s", &others)
	}
}

func (c cells) list() []string {
	return []string{c.server, c.ops, c.p50, c.p99, c.cpu, c.memory, c.client, c.ratioOps, c.ratioCPU, c.ratioP99, c.goal}
}

// machine describes what it was measured on, and with which versions.
func (rep *report) machine() string {
	model := runtime.GOARCH
	if b, err := os.ReadFile("/proc/cpuinfo"); err == nil {
		for line := range strings.Lines(string(b)) {
			if key, value, _ := strings.Cut(line, ":"); strings.TrimSpace(key) == "model name" {
				model = strings.TrimSpace(value)
				break
			}
		}
	}
	var u unix.Utsname
	unix.Uname(&u)
	parts := []string{fmt.Sprintf("%d processors %s", runtime.NumCPU(), model), "Linux " + strings.TrimRight(string(u.Release[:]), "\x00")}
	for _, program := range [][]string{{rep.b.nbdhost, "--version"}, {"/usr/bin/nbdkit", "--version"}, {"qemu-nbd", "--version"}, {"fio", "--version"}, {"nbdcopy", "--version"}} {
		if out, err := exec.Command(program[0], program[1:]...).Output(); err == nil {
			first, _, _ := strings.Cut(string(out), "\n")
			parts = append(parts, strings.TrimSpace(first))
		}
	}
	return strings.Join(parts, ", ")
}
