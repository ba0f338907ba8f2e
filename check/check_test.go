package check_test

import (
	"slices"
	"strings"
	"testing"

	"nbdhost/backend"
	"nbdhost/check"
)

// subject notes in called which of its functions are.
func subject(called *[]string) *check.Subject {
	d := disk{backend.NewMem(1 << 20)}
	note := func(name string) { *called = append(*called, name) }
	return &check.Subject{
		Open: func() (check.Plugin, error) { note("Open"); return d, nil },
		Start: func() (*backend.Chain, error) {
			note("Start")
			return backend.NewChain(d, nil, backend.Trace{}), nil
		},
		Serving: func(serve func()) { note("Serving"); serve() },
		Stop:    func() { note("Stop") },
	}
}

// What is selected runs, in the table's order.
func TestRun(t *testing.T) {
	var called, begun, ended []string
	err := subject(&called).Run([]string{"size.blocks", "file"},
		func(name string) { begun = append(begun, name) },
		func(r check.Result) { ended = append(ended, strings.TrimSpace(r.Name+" "+string(r.Status)+" "+r.Why)) })
	if err != nil {
		t.Fatal(err)
	}
	if want := []string{"Open", "Start", "Serving", "Stop"}; !slices.Equal(called, want) {
		t.Errorf("called %q, need %q", called, want)
	}
	if want := []string{"file.symbols", "file.load", "file.struct", "file.callbacks", "size.blocks"}; !slices.Equal(begun, want) {
		t.Errorf("began %q, need %q", begun, want)
	}
	if want := []string{"file.symbols skip there is no file", "file.load pass", "file.struct pass", "file.callbacks pass",
		"size.blocks skip the plugin has no block size"}; !slices.Equal(ended, want) {
		t.Errorf("ended %q, need %q", ended, want)
	}
}

// Who asks for what is not there, or leaves out what is needed, does not believe that all is well.
func TestRunMisuse(t *testing.T) {
	for _, tt := range []struct {
		patterns []string
		spoil    func(*check.Subject)
		err      []string // what the error says
	}{
		{[]string{"size", "nosuch"}, func(*check.Subject) {}, []string{`"nosuch"`, "size.stable", "zero.fast", "before a dot"}},
		{[]string{"size.nosuch"}, func(*check.Subject) {}, []string{`"size.nosuch"`}},
		{[]string{""}, func(*check.Subject) {}, []string{`""`}},
		{nil, func(s *check.Subject) { s.Open = nil }, []string{"without Open"}},
		{nil, func(s *check.Subject) { s.Serving = nil }, []string{"without Serving"}},
		{nil, func(s *check.Subject) { s.Start = nil }, []string{"without Start"}},
		{nil, func(s *check.Subject) { s.Stop = nil }, []string{"without Stop"}},
	} {
		var called []string
		s := subject(&called)
		tt.spoil(s)
		err := s.Run(tt.patterns, func(name string) { called = append(called, name) }, func(check.Result) {})
		for _, word := range tt.err {
			if err == nil || !strings.Contains(err.Error(), word) {
				t.Errorf("%q: got error %v, need one with %q", tt.patterns, err, word)
			}
		}
		if len(called) > 0 {
			t.Errorf("%q: called %q", tt.patterns, called)
		}
	}
}
