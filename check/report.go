package check

import (
	"encoding/json"
	"fmt"
	"io"
	"strings"
)

// A Reporter writes results in one of the formats.
type Reporter interface {
	// Begin tells of a check that begins.
	Begin(name string)
	// End tells how it ended.
	End(Result)
	// Close ends the report, and returns the first error of writing it.
	Close() error
}

// Formats are the names of the formats of reports.
var Formats = []string{"text", "tap", "json"}

// NewReporter returns a reporter to w of total checks of what subject names. The
// text has a progress bar with terminal.
func NewReporter(format string, w io.Writer, subject string, total int, terminal bool) (Reporter, error) {
	out := &writer{w: w}
	switch format {
	case "text":
		return &text{writer: out, total: total, terminal: terminal}, nil
	case "tap":
		out.printf("TAP version 13\n1..%d\n", total)
		return &tap{writer: out}, nil
	case "json":
		return &jsonReport{writer: out, Subject: subject}, nil
	}
	return nil, fmt.Errorf("report checks: got format %q: need one of %s", format, strings.Join(Formats, ", "))
}

// writer keeps the first error.
type writer struct {
	w   io.Writer
	err error
}

func (w *writer) printf(format string, args ...any) {
	if w.err == nil {
		_, w.err = fmt.Fprintf(w.w, format, args...)
	}
}

// text is for people.
type text struct {
	*writer
	total, done, failed, skipped int
	terminal                     bool
}

// barWidth is that of the progress bar, in columns.
const barWidth = 24

func (t *text) Begin(name string) {
	if t.terminal {
		full := barWidth * t.done / max(1, t.total)
		t.printf("\r\033[K[%s%s] %d/%d %s", strings.Repeat("#", full), strings.Repeat(".", barWidth-full), t.done, t.total, name)
	}
}

func (t *text) End(r Result) {
	if t.terminal {
		t.printf("\r\033[K")
	}
	t.done++
	switch r.Status {
	case Pass:
		t.printf("ok    %s%s\n", r.Name, notes(r.Notes))
	case Skip:
		t.skipped++
		t.printf("skip  %s: %s\n", r.Name, oneLine(r.Why))
	case Fail:
		t.failed++
		t.printf("FAIL  %s%s\n      promised: %s\n      seen:     %s\n      again:    %s\n", r.Name, notes(r.Notes), r.Promise, oneLine(r.Saw), r.Again)
	}
}

func notes(list []string) string {
	if len(list) == 0 {
		return ""
	}
	return " (" + strings.Join(list, "; ") + ")"
}

// maxLine bounds what is seen in a report of lines, in bytes: a language's traceback
// has no end. JSON has all of it.
const maxLine = 600

func oneLine(s string) string {
	s = strings.ReplaceAll(s, "\n", "; ")
	if len(s) > maxLine {
		s = strings.ToValidUTF8(s[:maxLine], "") + "..."
	}
	return s
}

func (t *text) Close() error {
	t.printf("%s: %d hold, %d fail, %d skipped\n", several(t.done, "check"), t.done-t.failed-t.skipped, t.failed, t.skipped)
	return t.err
}

// tap is the Test Anything Protocol, version 13.
type tap struct {
	*writer
	n int
}

func (t *tap) Begin(string) {}

func (t *tap) End(r Result) {
	t.n++
	switch r.Status {
	case Pass:
		t.printf("ok %d - %s\n", t.n, r.Name)
	case Skip:
		t.printf("ok %d - %s # SKIP %s\n", t.n, r.Name, oneLine(r.Why))
	case Fail:
		t.printf("not ok %d - %s\n  ---\n  promised: %s\n  seen: %s\n  again: %s\n  ...\n", t.n, r.Name, yaml(r.Promise), yaml(r.Saw), yaml(r.Again))
	}
	for _, note := range r.Notes {
		t.printf("# %s\n", oneLine(note))
	}
}

// yaml quotes a text: what JSON has, YAML has too.
func yaml(s string) string {
	b, _ := json.Marshal(s) // a string always can be
	return string(b)
}

func (t *tap) Close() error { return t.err }

// jsonReport is one object, written at the end.
type jsonReport struct {
	*writer `json:"-"`
	Subject string   `json:"subject"`
	Pass    int      `json:"pass"`
	Fail    int      `json:"fail"`
	Skip    int      `json:"skip"`
	Checks  []Result `json:"checks"`
}

func (j *jsonReport) Begin(string) {}

func (j *jsonReport) End(r Result) {
	j.Checks = append(j.Checks, r)
	switch r.Status {
	case Pass:
		j.Pass++
	case Fail:
		j.Fail++
	case Skip:
		j.Skip++
	}
}

func (j *jsonReport) Close() error {
	b, err := json.MarshalIndent(j, "", "  ")
	if err != nil {
		return err
	}
	j.printf("%s\n", b)
	return j.err
}

// several is "1 thing" or "2 things".
func several(n int, thing string) string {
	if n == 1 {
		return "1 " + thing
	}
	return fmt.Sprintf("%d %ss", n, thing)
}
