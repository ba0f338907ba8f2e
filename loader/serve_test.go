package loader

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"strings"
	"syscall"
	"testing"

	"nbdhost/backend"
	"nbdhost/cshim"
)

// serve loads the fixture and takes it to the point where it can be opened. The
// test's end unloads it.
func serve(t testing.TB, options []string, params ...string) (*backend.Chain, *Plugin) {
	t.Helper()
	p, err := Open(compile(t, "plugin.c", options...))
	if err != nil {
		t.Fatal(err)
	}
	ch := backend.NewChain(p, nil, backend.Trace{})
	ch.Load()
	t.Cleanup(ch.Unload)
	for _, param := range params {
		k, v, _ := strings.Cut(param, "=")
		if err := ch.Config(k, v); err != nil {
			t.Fatal(err)
		}
	}
	for _, f := range []func() error{ch.ConfigComplete, func() error { return ch.SetThreadModel(backend.Parallel) }, ch.GetReady, ch.AfterFork} {
		if err := f(); err != nil {
			t.Fatal(err)
		}
	}
	t.Cleanup(ch.Cleanup)
	return ch, p
}

var nextConn uint64

func connect(t testing.TB) *backend.Call {
	nextConn++
	c := &backend.Call{Conn: &backend.Conn{ID: nextConn, FD: -1}, Worker: backend.Handshake}
	t.Cleanup(c.Conn.Release)
	return c
}

func verbose(t testing.TB) {
	SetVerbose(true)
	t.Cleanup(func() { SetVerbose(false) })
	logged()
}

// said holds what modules have logged since the last time against want, one line
// a line.
func said(t *testing.T, want string) {
	t.Helper()
	if got, _ := logged(); got != strings.TrimSpace(want) {
		t.Errorf("got:\n%s\nneed:\n%s", got, want)
	}
}

func TestLifeCycle(t *testing.T) {
	verbose(t)
	live := cshim.LiveObjects()
	nextConn = 6
	t.Run("serve", func(t *testing.T) {
		ch, _ := serve(t, nil, "keep=this")
		if ch.ThreadModel() != backend.SerializeRequests {
			t.Errorf("got thread model %v", ch.ThreadModel())
		}
		c := connect(t)
		if err := ch.Preconnect(c, true); err != nil {
			t.Fatal(err)
		}
		c.Conn.TLS = true
		list, err := ch.ListExports(c, false)
		if want := "[{a first} {b } {main }]"; err != nil || fmt.Sprint(list) != want {
			t.Errorf("got %v, %v, need %s", list, err, want)
		}
		s, err := ch.Open(c, true, "")
		if err != nil {
			t.Fatal(err)
		}
		if s.Export() != "main" {
			t.Errorf("got export %q", s.Export())
		}
		if err := s.Prepare(c); err != nil {
			t.Fatal(err)
		}
		if text, ok := s.ExportDescription(c); text != "it is main" || !ok {
			t.Errorf("got description %q, %v", text, ok)
		}
		if b, err := s.BlockSize(c); err != nil || b != (backend.BlockSize{Min: 512, Preferred: 4096, Max: 1<<32 - 1}) {
			t.Errorf("got %v, %v", b, err)
		}
		s.Finalize(c)
		s.Close(c)
	})
	said(t, `
load one=1 two_three=0
config keep=this
config_complete keep=this
thread_model
get_ready
after_fork
[7.-1] preconnect readonly=1 tls=0
[7.-1] list_exports readonly=0 tls=1
[7.-1] default_export tls=1
[7.-1] open readonly=1 export=main tls=1
[7.-1] block_size
[7.-1] close main
cleanup
unload`)
	if n := cshim.LiveObjects(); n != live {
		t.Errorf("%d objects in C, %d before", n, live)
	}
}

// The strings given to .config stay where they are.
func TestConfigStringsLive(t *testing.T) {
	ch, _ := serve(t, nil, "keep=me")
	for i := range 1000 {
		if err := ch.Config("quiet", fmt.Sprint(i%2)); err != nil {
			t.Fatal(err)
		}
	}
	verbose(t)
	if err := ch.ConfigComplete(); err != nil {
		t.Fatal(err)
	}
	said(t, "config_complete keep=me")
}

// Every data callback is called with what it takes, in each version of the API.
func TestDataCallbacks(t *testing.T) {
	const all = backend.MayTrim | backend.FUA | backend.FastZero
	data := bytes.Repeat([]byte("data"), 128)
	for _, tt := range []struct {
		name    string
		options []string
		caps    backend.Caps
		calls   string
		extents string
		fast    error // of a fast zero
		cache   error
	}{
		{
			"version 2", nil,
			backend.Caps{Size: 1 << 20, Write: true, Flush: true, Rotational: true, Trim: true, Zero: backend.Native, FastZero: true,
				FUA: backend.Native, MultiConn: true, Cache: backend.Native, Extents: true},
			`pwrite 512@4096 flags=2
pread 512@4096 flags=0
flush flags=0
trim 512@8192 flags=2
zero 512@4096 flags=1
zero 512@4096 flags=11
cache 512@4096 flags=0
extents 512@524032 flags=4`,
			"[{524032 256 3} {524288 524288 0}]", nil, nil,
		},
		{
			"version 1", []string{"-DAPI=1"},
			backend.Caps{Size: 1 << 20, Write: true, Flush: true, Rotational: true, Trim: true, Zero: backend.Native, FastZero: true,
				FUA: backend.Emulate, MultiConn: true, Cache: backend.Native},
			`pwrite 512@4096 flags=0
flush flags=0
pread 512@4096 flags=0
flush flags=0
trim 512@8192 flags=0
flush flags=0
zero 512@4096 may_trim=1`,
			"[{524032 512 0}]", syscall.EOPNOTSUPP, nil,
		},
		{
			"first release", []string{"-DAPI=1", "-DBEFORE=dump_plugin"},
			backend.Caps{Size: 1 << 20, Write: true, Flush: true, Rotational: true, Trim: true, Zero: backend.Native, FastZero: true,
				FUA: backend.Emulate},
			`pwrite 512@4096 flags=0
flush flags=0
pread 512@4096 flags=0
flush flags=0
trim 512@8192 flags=0
flush flags=0
zero 512@4096 may_trim=1`,
			"[{524032 512 0}]", syscall.EOPNOTSUPP, syscall.EOPNOTSUPP,
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			ch, _ := serve(t, tt.options)
			c := connect(t)
			s, err := ch.Open(c, false, "x")
			if err != nil {
				t.Fatal(err)
			}
			defer s.Close(c)
			caps, err := s.Caps(c)
			if err != nil || caps != tt.caps {
				t.Errorf("got %+v, %v\nneed %+v", caps, err, tt.caps)
			}
			verbose(t)
			c.Worker = 3
			b, err := backend.GetBuffer(512)
			if err != nil {
				t.Fatal(err)
			}
			defer b.Release()
			got := b.B[:512]
			var x backend.Extents
			for _, step := range []struct {
				op   string
				err  error
				need error
			}{
				{"pwrite", s.Pwrite(c, data, 4096, backend.FUA), nil},
				{"pread", s.Pread(c, got, 4096), nil},
				{"flush", s.Flush(c), nil},
				{"trim", s.Trim(c, 512, 8192, backend.FUA), nil},
				{"zero", s.Zero(c, 512, 4096, backend.MayTrim), nil},
				{"fast zero", s.Zero(c, 512, 4096, all), tt.fast},
				{"cache", s.Cache(c, 512, 4096), tt.cache},
				{"extents", s.Extents(c, 512, 524032, backend.ReqOne, &x), nil},
			} {
				if step.need == nil && step.err != nil || !errors.Is(step.err, step.need) {
					t.Errorf("%s: got %v, need %v", step.op, step.err, step.need)
				}
			}
			if !bytes.Equal(got, data) {
				t.Errorf("read something else than was written")
			}
			if got := fmt.Sprint(x.List()); got != tt.extents {
				t.Errorf("got extents %s, need %s", got, tt.extents)
			}
			calls, _ := logged()
			calls = strings.ReplaceAll(calls, fmt.Sprintf("[%d.3] ", c.Conn.ID), "")
			// The v1 plugin has can_cache but no cache: there is nothing to call.
			if calls != tt.calls {
				t.Errorf("called:\n%s\nneed:\n%s", calls, tt.calls)
			}
		})
	}
}

// The error number is that of nbdkit_set_error, else errno where the module
// preserves it, else EIO; the text is that of nbdkit_error, if there was one.
func TestErrors(t *testing.T) {
	calls := map[string]func(*backend.Session, *backend.Call) error{
		"get_size":   func(s *backend.Session, c *backend.Call) error { _, err := s.Size(c); return err },
		"block_size": func(s *backend.Session, c *backend.Call) error { _, err := s.BlockSize(c); return err },
		"can_write":  func(s *backend.Session, c *backend.Call) error { _, err := s.Caps(c); return err },
		"can_fua":    func(s *backend.Session, c *backend.Call) error { _, err := s.Caps(c); return err },
		"pread":      func(s *backend.Session, c *backend.Call) error { return s.Pread(c, make([]byte, 1), 0) },
		"pwrite":     func(s *backend.Session, c *backend.Call) error { return s.Pwrite(c, make([]byte, 1), 0, 0) },
		"flush":      func(s *backend.Session, c *backend.Call) error { return s.Flush(c) },
		"trim":       func(s *backend.Session, c *backend.Call) error { return s.Trim(c, 1, 0, 0) },
		"zero":       func(s *backend.Session, c *backend.Call) error { return s.Zero(c, 1, 0, 0) },
		"cache":      func(s *backend.Session, c *backend.Call) error { return s.Cache(c, 1, 0) },
		"extents":    func(s *backend.Session, c *backend.Call) error { return s.Extents(c, 1, 0, 0, new(backend.Extents)) },
	}
	v1 := []string{"get_size", "can_write", "can_fua", "pread", "pwrite", "flush", "trim", "zero"}
	for _, build := range []struct {
		options []string
		errno   syscall.Errno // of an error whose errno is ENXIO
	}{
		{[]string{"-DPRESERVED=0"}, syscall.EIO},
		{[]string{"-DPRESERVED=1"}, syscall.ENXIO},
		{[]string{"-DAPI=1"}, syscall.EIO},
		{[]string{"-DAPI=1", "-DPRESERVED=1"}, syscall.ENXIO},
	} {
		t.Run(strings.Join(build.options, " "), func(t *testing.T) {
			ch, p := serve(t, build.options, fmt.Sprintf("errno=%d", syscall.ENXIO))
			set := func(k, v string) {
				t.Helper()
				if err := ch.Config(k, v); err != nil {
					t.Fatal(err)
				}
			}
			for _, how := range []struct {
				set, quiet string
				errno      syscall.Errno
			}{
				{"0", "0", build.errno},
				{"0", "1", build.errno},
				{fmt.Sprint(int(syscall.ENOSPC)), "0", syscall.ENOSPC},
				{fmt.Sprint(int(syscall.ENOSPC)), "1", syscall.ENOSPC},
			} {
				set("set", how.set)
				set("quiet", how.quiet)
				check := func(op string, err error) {
					t.Helper()
					want := backend.Error{Module: "fixture", Op: op, Errno: how.errno}
					if how.quiet == "0" {
						want.Msg = op + " was told to fail"
					}
					var e *backend.Error
					if !errors.As(err, &e) || *e != want {
						t.Errorf("%s: got %#v, need %#v", op, err, want)
					}
					if _, got := logged(); strings.Count(got, "told to fail") != strings.Count(want.Msg, "told to fail") {
						t.Errorf("%s: logged %q, need %q once", op, got, want.Msg)
					}
				}
				for op, do := range calls {
					if p.v1 && !strings.Contains(" "+strings.Join(v1, " ")+" ", " "+op+" ") {
						continue
					}
					set("fail", op)
					c := connect(t)
					s, err := ch.Open(c, false, "x")
					if err != nil {
						t.Fatal(err)
					}
					logged()
					check(op, do(s, c))
					s.Close(c)
				}
				set("fail", "open")
				_, err := ch.Open(connect(t), false, "x")
				check("open", err)
				if !p.v1 {
					set("fail", "preconnect")
					check("preconnect", ch.Preconnect(connect(t), false))
					set("fail", "list_exports")
					_, err = ch.ListExports(connect(t), false)
					check("list_exports", err)
					set("fail", "default_export")
					if name, ok := ch.DefaultExport(connect(t), false); ok {
						t.Errorf("default_export: got %q", name)
					}
				}
				set("fail", "")
			}
		})
	}
}

func TestConfigErrors(t *testing.T) {
	for _, step := range []string{"config", "config_complete", "thread_model", "get_ready", "after_fork"} {
		t.Run(step, func(t *testing.T) {
			ch, _ := serve(t, nil)
			if err := ch.Config("fail", step); err != nil {
				t.Fatal(err)
			}
			err := map[string]func() error{
				"config":          func() error { return ch.Config("keep", "x") },
				"config_complete": ch.ConfigComplete,
				"thread_model":    func() error { return ch.SetThreadModel(backend.Parallel) },
				"get_ready":       ch.GetReady,
				"after_fork":      ch.AfterFork,
			}[step]()
			if want := "fixture: " + step + ": " + step + " was told to fail"; err == nil || err.Error() != want {
				t.Errorf("got %v, need %s", err, want)
			}
		})
	}
	ch, _ := serve(t, nil)
	if err := ch.Config("nosuch", "x"); err == nil || !strings.Contains(err.Error(), "unknown parameter 'nosuch'") {
		t.Errorf("got %v", err)
	}
	p, err := Open(compile(t, "bad.c"))
	if err != nil {
		t.Fatal(err)
	}
	if err := backend.NewChain(p, nil, backend.Trace{}).Config("a", "b"); !errors.Is(err, backend.ErrNoConfig) {
		t.Errorf("got %v", err)
	}
}

func TestThreadModels(t *testing.T) {
	for m := backend.SerializeConnections; m <= backend.Parallel; m++ {
		// A struct that ends before .thread_model, which would answer too.
		ch, p := serve(t, []string{fmt.Sprintf("-DTHREAD_MODEL=%d", m), "-DBEFORE=thread_model"})
		if p.ThreadModel() != m || ch.ThreadModel() != m {
			t.Errorf("got %v, %v, need %v", p.ThreadModel(), ch.ThreadModel(), m)
		}
		if ch, _ = serve(t, []string{fmt.Sprintf("-DTHREAD_MODEL=%d", m)}); ch.ThreadModel() != min(m, backend.SerializeRequests) {
			t.Errorf("with .thread_model: got %v", ch.ThreadModel())
		}
	}
}

// Several handles on one connection, and on several, know their own export.
func TestHandles(t *testing.T) {
	ch, p := serve(t, nil)
	verbose(t)
	c := connect(t)
	a, err := p.Open(c, false, "a")
	if err != nil {
		t.Fatal(err)
	}
	if got, want := fmt.Sprint(a), "0x"; !strings.HasPrefix(got, want) || len(got) < 5 {
		t.Errorf("the handle prints as %q, need a pointer", got)
	}
	a.Close(c)
	d := connect(t)
	s, err := ch.Open(d, false, "b")
	if err != nil {
		t.Fatal(err)
	}
	s.Close(d)
	said(t, fmt.Sprintf(`
[%[1]d.-1] open readonly=0 export=a tls=0
[%[1]d.-1] close a
[%[2]d.-1] open readonly=0 export=b tls=0
[%[2]d.-1] close b`, c.Conn.ID, d.Conn.ID))
}

// A module may end a connection it has seen, as long as it is there.
func TestDisconnect(t *testing.T) {
	_, p := serve(t, nil)
	c := &backend.Call{Conn: &backend.Conn{ID: 1 << 40, FD: -1}, Worker: backend.Handshake}
	var got []bool
	c.Conn.Disconnect = func(force bool) { got = append(got, force) }
	if err := p.Preconnect(c, false); err != nil {
		t.Fatal(err)
	}
	disconnect(1<<40, true)
	disconnect(1<<40, false)
	disconnect(1<<40+1, true)
	c.Conn.Release()
	disconnect(1<<40, true)
	if fmt.Sprint(got) != "[true false]" {
		t.Errorf("got %v", got)
	}
}

func TestNoAllocations(t *testing.T) {
	for _, options := range [][]string{nil, {"-DAPI=1"}} {
		ch, _ := serve(t, options)
		c := connect(t)
		s, err := ch.Open(c, false, "x")
		if err != nil {
			t.Fatal(err)
		}
		if _, err := s.Caps(c); err != nil {
			t.Fatal(err)
		}
		b, err := backend.GetBuffer(4096)
		if err != nil {
			t.Fatal(err)
		}
		var x backend.Extents
		for name, f := range map[string]func() error{
			"pread":   func() error { return s.Pread(c, b.B[:4096], 0) },
			"pwrite":  func() error { return s.Pwrite(c, b.B[:4096], 0, 0) },
			"flush":   func() error { return s.Flush(c) },
			"trim":    func() error { return s.Trim(c, 4096, 0, 0) },
			"zero":    func() error { return s.Zero(c, 4096, 0, 0) },
			"cache":   func() error { return s.Cache(c, 4096, 0) },
			"extents": func() error { return s.Extents(c, 4096, 0, 0, &x) },
		} {
			n := testing.AllocsPerRun(100, func() {
				if err := f(); err != nil {
					t.Error(err)
				}
			})
			if n != 0 {
				t.Errorf("%v: %s allocates %v times", options, name, n)
			}
		}
		b.Release()
		s.Close(c)
	}
}

// A module's own signal handlers must not take the Go runtime's.
func TestSignalsArePutBack(t *testing.T) {
	p, err := Open(compile(t, "signals.c"))
	if err != nil {
		t.Fatal(err)
	}
	p.Load()
	// A nil dereference is a panic again and not the end of the process.
	defer func() {
		if recover() == nil {
			t.Error("no panic")
		}
	}()
	var nothing *os.File
	_ = nothing.Name()
}

func BenchmarkPread(b *testing.B) {
	ch, _ := serve(b, nil)
	c := connect(b)
	s, err := ch.Open(c, false, "x")
	if err != nil {
		b.Fatal(err)
	}
	defer s.Close(c)
	buf, err := backend.GetBuffer(4096)
	if err != nil {
		b.Fatal(err)
	}
	defer buf.Release()
	b.SetBytes(4096)
	b.ReportAllocs()
	for b.Loop() {
		if err := s.Pread(c, buf.B[:4096], 0); err != nil {
			b.Fatal(err)
		}
	}
}
