package backend

import (
	"bytes"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"syscall"
	"testing"
)

// Each step of the life cycle reaches the module if it has the callback, and is
// passed over if not.
func TestLifeCycle(t *testing.T) {
	walk := func(r *recorder) error {
		ch := NewChain(r, nil, Trace{})
		ch.Load()
		err := errors.Join(ch.Config("k", "v"), ch.ConfigComplete(), ch.SetThreadModel(Parallel), ch.GetReady(), ch.AfterFork())
		c := newCall()
		err = errors.Join(err, ch.Preconnect(c, true))
		list, lerr := ch.ListExports(c, true)
		s, oerr := ch.Open(c, true, "")
		err = errors.Join(err, lerr, oerr, s.Prepare(c))
		r.calls = append(r.calls, fmt.Sprint(list))
		s.Finalize(c)
		s.Close(c)
		ch.Cleanup()
		ch.Unload()
		return err
	}
	r := newRecorder(Load, Unload, Config, ConfigComplete, GetThreadModel, GetReady, AfterFork, Cleanup, Preconnect, ListExports, DefaultExport)
	r.text, r.can[DefaultExport], r.can[ListExports] = "main", 1, 1
	r.exports = []Export{{"a", "first"}}
	if err := walk(r); err != nil {
		t.Error(err)
	}
	want := `load, config k=v, config_complete, thread_model, get_ready, after_fork, preconnect true, list_exports true, default_export true, open true "main", [{a first} {main }], close, cleanup, unload`
	if got := r.take(); got != want {
		t.Errorf("called %s\nneed %s", got, want)
	}
	r = newRecorder()
	if err := walk(r); !errors.Is(err, ErrNoConfig) {
		t.Errorf("got %v, need %v", err, ErrNoConfig)
	}
	if got, want := r.take(), `open true "", [{ }], close`; got != want {
		t.Errorf("called %s\nneed %s", got, want)
	}
}

func TestSetThreadModel(t *testing.T) {
	for _, tt := range []struct {
		built, says, limit ThreadModel
		asked              bool
		want               ThreadModel
	}{
		{Parallel, 0, Parallel, false, Parallel},
		{SerializeRequests, Parallel, Parallel, true, SerializeRequests},
		{Parallel, SerializeConnections, Parallel, true, SerializeConnections},
		{Parallel, Parallel, SerializeAllRequests, true, SerializeAllRequests},
		{SerializeConnections, 0, SerializeRequests, false, SerializeConnections},
	} {
		r := newRecorder()
		r.model = tt.built
		if tt.asked {
			r.answer(GetThreadModel, int(tt.says))
		}
		ch := NewChain(r, nil, Trace{})
		if err := ch.SetThreadModel(tt.limit); err != nil || ch.ThreadModel() != tt.want {
			t.Errorf("%+v: got %v, %v", tt, ch.ThreadModel(), err)
		}
	}
	for _, m := range []int{-1, 4} {
		if err := NewChain(newRecorder().answer(GetThreadModel, m), nil, Trace{}).SetThreadModel(Parallel); err == nil {
			t.Errorf("model %d: no error", m)
		}
	}
	if err := NewChain(newRecorder().failing(GetThreadModel, syscall.EIO), nil, Trace{}).SetThreadModel(Parallel); !errors.Is(err, syscall.EIO) {
		t.Errorf("got %v", err)
	}
}

func TestDefaultExport(t *testing.T) {
	for _, tt := range []struct {
		name      string
		text      string
		ok        int
		wantName  string
		wantOK    bool
		openErrno syscall.Errno
	}{
		{"a name", "main", 1, "main", true, 0},
		{"the empty name", "", 1, "", true, 0},
		{"none", "", 0, "", false, syscall.ENOENT},
		{"longest", strings.Repeat("n", MaxString), 1, strings.Repeat("n", MaxString), true, 0},
		{"too long", strings.Repeat("n", MaxString+1), 1, "", false, syscall.ENOENT},
	} {
		r := newRecorder(DefaultExport)
		r.text, r.can[DefaultExport] = tt.text, tt.ok
		ch := NewChain(r, nil, Trace{})
		if name, ok := ch.DefaultExport(newCall(), false); name != tt.wantName || ok != tt.wantOK {
			t.Errorf("%s: got %.10q, %v", tt.name, name, ok)
		}
		s, err := ch.Open(newCall(), false, "")
		if tt.openErrno == 0 && err != nil || tt.openErrno != 0 && !errors.Is(err, tt.openErrno) {
			t.Errorf("%s: open: got %v, need %v", tt.name, err, tt.openErrno)
		}
		if err == nil && s.Export() != tt.wantName {
			t.Errorf("%s: opened %.10q", tt.name, s.Export())
		}
		// A name that is given is not asked for.
		r.take()
		if _, err := ch.Open(newCall(), false, "given"); err != nil || r.take() != `open false "given"` {
			t.Errorf("%s: open given: %v", tt.name, err)
		}
	}
}

func TestFailuresOfTheHandshake(t *testing.T) {
	for _, cb := range []Callback{Preconnect, ListExports, Open} {
		ch := NewChain(newRecorder().failing(cb, syscall.EACCES), nil, Trace{})
		var err error
		switch cb {
		case Preconnect:
			err = ch.Preconnect(newCall(), false)
		case ListExports:
			_, err = ch.ListExports(newCall(), false)
		case Open:
			_, err = ch.Open(newCall(), false, "x")
		}
		if !errors.Is(err, syscall.EACCES) {
			t.Errorf("%v: got %v", cb, err)
		}
	}
}

// The debug lines that users look for.
func TestTrace(t *testing.T) {
	for _, tt := range []struct {
		trace Trace
		level slog.Level
		want  string
	}{
		{Trace{Control: true, Data: true}, slog.LevelDebug, "load get_size can_write pread pwrite close"},
		{Trace{Control: true}, slog.LevelDebug, "load get_size can_write close"},
		{Trace{Data: true}, slog.LevelDebug, "pread pwrite"},
		{Trace{}, slog.LevelDebug, ""},
		{Trace{Control: true, Data: true}, slog.LevelInfo, ""},
	} {
		var b bytes.Buffer
		log := slog.New(slog.NewTextHandler(&b, &slog.HandlerOptions{Level: tt.level}))
		r := newRecorder(Pwrite)
		ch := NewChain(r, log, tt.trace)
		ch.Load()
		c := newCall()
		c.Log = log
		s, err := ch.Open(c, false, "x")
		if err != nil {
			t.Fatal(err)
		}
		if err := errors.Join(s.Pread(c, make([]byte, 5), 7), s.Pwrite(c, make([]byte, 3), 2, 0)); err != nil {
			t.Fatal(err)
		}
		s.Close(c)
		for _, op := range []string{"load", "get_size", "can_write", "pread count=5 offset=7", "pwrite count=3 offset=2 fua=0", "close"} {
			word, _, _ := strings.Cut(op, " ")
			want := strings.Contains(" "+tt.want+" ", " "+word+" ")
			if got := strings.Contains(b.String(), `"recorder: `+op+`"`); got != want {
				t.Errorf("%+v: line for %s: got %v, need %v in\n%s", tt.trace, op, got, want, b.String())
			}
		}
	}
}

// An error of the session's own is logged once; one of a module was logged by it.
func TestErrorsLoggedOnce(t *testing.T) {
	var b bytes.Buffer
	c := newCall()
	c.Log = slog.New(slog.NewTextHandler(&b, nil))
	s, err := NewChain(newRecorder().failing(Pread, syscall.EIO), nil, Trace{}).Open(c, false, "x")
	if err != nil {
		t.Fatal(err)
	}
	_ = s.Pread(c, make([]byte, 1), 0)
	if b.Len() != 0 {
		t.Errorf("logged %s", b.String())
	}
	_ = s.Pread(c, make([]byte, 1), 1<<20)
	if got := strings.Count(b.String(), "level=ERROR"); got != 1 {
		t.Errorf("logged %s", b.String())
	}
}

func TestError(t *testing.T) {
	for _, tt := range []struct {
		e    Error
		want string
	}{
		{Error{"file", "pread", syscall.EIO, ""}, "file: pread: input/output error"},
		{Error{"file", "pread", syscall.ENOSPC, "disk is full"}, "file: pread: disk is full"},
	} {
		if got := tt.e.Error(); got != tt.want || !errors.Is(&tt.e, tt.e.Errno) {
			t.Errorf("got %s, need %s", got, tt.want)
		}
	}
}

func TestConnRelease(t *testing.T) {
	n := 0
	c := &Conn{Local: 1, OnRelease: func() { n++ }}
	c.Release()
	c.Release()
	if n != 1 || c.Local != nil {
		t.Errorf("OnRelease was called %d times, Local is %v", n, c.Local)
	}
}

func TestNamesOfCallbacks(t *testing.T) {
	seen := map[string]Callback{}
	for cb := range callbacks {
		name := cb.String()
		if other, ok := seen[name]; ok || name == "" {
			t.Errorf("%d is named %q, as %d", cb, name, other)
		}
		seen[name] = cb
	}
}
