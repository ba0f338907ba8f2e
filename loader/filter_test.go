package loader

import (
	"bytes"
	"errors"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"

	"nbdhost/backend"
	"nbdhost/cshim"
)

const installedFilters = "/usr/lib/x86_64-linux-gnu/nbdkit/filters/nbdkit-"

// filtered starts a chain of filters, the first one outermost, over the fixture.
func filtered(t testing.TB, filters ...*Filter) *backend.Chain {
	t.Helper()
	p, err := Open(compile(t, "plugin.c"))
	if err != nil {
		t.Fatal(err)
	}
	var layers []backend.Filter
	for _, f := range filters {
		layers = append(layers, f)
	}
	ch := backend.NewChain(p, nil, backend.Trace{}, layers...)
	ch.Load()
	t.Cleanup(ch.Unload)
	for _, step := range []func() error{ch.ConfigComplete, func() error { return ch.SetThreadModel(backend.Parallel) }, ch.GetReady, ch.AfterFork} {
		if err := step(); err != nil {
			t.Fatal(err)
		}
	}
	t.Cleanup(ch.Cleanup)
	return ch
}

func openFilter(t testing.TB, path string) *Filter {
	t.Helper()
	f, err := OpenFilter(path, false)
	if err != nil {
		t.Fatal(err)
	}
	return f
}

// prepared returns an open session of which everything has been asked.
func prepared(t *testing.T, ch *backend.Chain, c *backend.Call) *backend.Session {
	t.Helper()
	s, err := ch.Open(c, false, "x")
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Prepare(c); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Caps(c); err != nil {
		t.Fatal(err)
	}
	return s
}

// A filter may call next on threads of its own, and share one session of it; what it
// does wrong is an error and no more.
func TestFilterThreads(t *testing.T) {
	ch := filtered(t, openFilter(t, compile(t, "filter.c", "-pthread")))
	var wg sync.WaitGroup
	for range 4 {
		c := connect(t)
		s := prepared(t, ch, c)
		wg.Go(func() {
			call := c.Conn.Call(0)
			buf, err := backend.GetBuffer(512)
			if err != nil {
				t.Error(err)
				return
			}
			defer buf.Release()
			for range 50 {
				for off, errno := range map[uint64]syscall.Errno{0: 0, 512: 0, 1024: syscall.EBADF, 2048: syscall.EINVAL, 2560: syscall.EINVAL} {
					if err := s.Pread(call, buf.B[:512], off); errno == 0 && err != nil || errno != 0 && !errors.Is(err, errno) {
						t.Errorf("at %d: got %v, need %v", off, err, errno)
					}
				}
			}
		})
		t.Cleanup(func() { s.Finalize(c); s.Close(c) })
	}
	wg.Wait()
	if _, errs := logged(); strings.Contains(errs, "panic") {
		t.Error(errs)
	}
}

// A filter may close the session below it before it has another, and never have one:
// what is asked in the meantime fails, and reaches no module.
func TestFilterClosesNext(t *testing.T) {
	SetVerbose(true)
	t.Cleanup(func() { SetVerbose(false) })
	ch := filtered(t, openFilter(t, compile(t, "filter.c", "-pthread")))
	c := connect(t)
	s := prepared(t, ch, c)
	buf := make([]byte, 512)
	logged() // what came before
	if err := s.Pread(c, buf, 3072); !errors.Is(err, syscall.EIO) {
		t.Errorf("pread that closes next: got %v, need EIO", err)
	}
	if debug, _ := logged(); !strings.HasSuffix(debug, "] close x") || strings.Contains(debug, "\n") {
		t.Errorf("got %q, need one close of the plugin", debug)
	}
	for name, err := range map[string]error{"pwrite": s.Pwrite(c, buf, 0, 0), "flush": s.Flush(c)} { // not of the filter
		if !errors.Is(err, syscall.EIO) || !strings.Contains(err.Error(), "has not opened the next layer") {
			t.Errorf("%s without next: got %v", name, err)
		}
	}
	if err := s.Finalize(c); err != nil {
		t.Error(err)
	}
	s.Close(c)
	if debug, _ := logged(); debug != "" {
		t.Errorf("the plugin has seen after its close: %q", debug)
	}
}

// Reads and writes that filters pass on do not come back to Go, but count, fail and write
// debug lines as if they did.
func TestDirect(t *testing.T) {
	forward := compile(t, "forward.c")
	for _, tt := range []struct {
		name      string
		filters   []string
		crossings int64 // of one call from Go to C
	}{
		{"all have callbacks", []string{forward, forward}, 1},
		{"one has none", []string{forward, installedFilters + "nofilter-filter.so", forward}, 2},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var filters []*Filter
			for _, path := range tt.filters {
				filters = append(filters, openFilter(t, path))
			}
			testDirect(t, filtered(t, filters...), tt.crossings)
		})
	}
}

func testDirect(t *testing.T, ch *backend.Chain, want int64) {
	c := connect(t)
	open := func() *backend.Session {
		s := prepared(t, ch, c)
		t.Cleanup(func() { s.Finalize(c); s.Close(c) })
		return s
	}
	buf, err := backend.GetBuffer(512)
	if err != nil {
		t.Fatal(err)
	}
	defer buf.Release()
	b := buf.B[:512]
	s := open()
	read := func(s *backend.Session, off uint64) error { return s.Pread(c, b, off) }
	write := func(s *backend.Session, off uint64) error { return s.Pwrite(c, b, off, 0) }
	for _, tt := range []struct {
		cb   backend.Callback
		call func(s *backend.Session, off uint64) error
	}{{backend.Pread, read}, {backend.Pwrite, write}} {
		crossings := func() int64 {
			const n = 100
			before := runtime.NumCgoCall()
			for range n {
				if err := tt.call(s, 512); err != nil {
					t.Fatal(err)
				}
			}
			return (runtime.NumCgoCall() - before) / n
		}
		if err := tt.call(s, 0); err != nil {
			t.Fatal(err)
		}
		if n := crossings(); n != want {
			t.Errorf("%s: %d crossings, need %d", tt.cb, n, want)
		}
		SetVerbose(true)
		if n := crossings(); n < 3 {
			t.Errorf("%s with debug lines: %d crossings, need 3", tt.cb, n)
		}
		SetVerbose(false)
		logged()
		for _, m := range ch.Calls() {
			m.Each(func(cb backend.Callback, calls uint64) {
				if cb == tt.cb && calls != 201 && m.Module != "nofilter" {
					t.Errorf("%s of %s: counted %d calls, need 201", cb, m.Module, calls)
				}
			})
		}
		// The first one of a session is not direct.
		first, second := open(), s
		config := func(value string) {
			if err := ch.Config("fail", value); err != nil {
				t.Fatal(err)
			}
		}
		config(tt.cb.String())
		through := tt.call(first, 0)
		_, throughLog := logged()
		direct := tt.call(second, 0)
		_, directLog := logged()
		config("")
		if through == nil || direct == nil || direct.Error() != through.Error() || directLog != throughLog || throughLog == "" {
			t.Errorf("%s failed with %v, logged %q, need %v, %q", tt.cb, direct, directLog, through, throughLog)
		}
	}
	for i := range b {
		b[i] = byte(i)
	}
	if err := write(s, 1024); err != nil {
		t.Fatal(err)
	}
	clear(b)
	if err := read(s, 1024); err != nil || b[511] != 255 {
		t.Errorf("read %d, %v", b[511], err)
	}
}

// What a filter gets for the layer below it is never one that was closed, also where two of
// its sessions had it.
func TestDirectClosesNext(t *testing.T) {
	const (
		same, closeNext, isNothing, share, nothing = 0, 3072, 4096, 4608, 5120 // see filter.c
	)
	type read struct {
		off  uint64
		want error
	}
	for _, tt := range []struct {
		name  string
		reads []read
	}{
		{"one session", []read{{same, nil}, {same, nil}, {isNothing, nil}, {closeNext, syscall.EIO}, {isNothing, syscall.ENOTCONN}}},
		{"two sessions", []read{{same, nil}, {same, nil}, {share, nil}, {closeNext, syscall.EIO}, {isNothing, syscall.ENOTCONN}, {nothing, nil}}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			ch := filtered(t, openFilter(t, compile(t, "forward.c")), openFilter(t, compile(t, "filter.c", "-pthread")))
			c, other := connect(t), connect(t)
			s, otherSession := prepared(t, ch, c), prepared(t, ch, other)
			buf := make([]byte, 512)
			for _, r := range tt.reads {
				if err := s.Pread(c, buf, r.off); !errors.Is(err, r.want) {
					t.Errorf("at %d: got %v, need %v", r.off, err, r.want)
				}
			}
			for c, s := range map[*backend.Call]*backend.Session{c: s, other: otherSession} {
				if err := s.Finalize(c); err != nil {
					t.Error(err)
				}
				s.Close(c)
			}
		})
	}
}

func TestOpenFilterFails(t *testing.T) {
	for _, tt := range []struct {
		name, path string
		want       error
		text       string
	}{
		{"plugin", compile(t, "plugin.c"), ErrNotFilter, "leave --filter out"},
		{"plain library", compile(t, "bad.c", "-DINIT=other_init"), ErrNotFilter, "no function filter_init"},
		{"NULL", compile(t, "bad.c", "-DINIT=filter_init", "-DRETURN=NULL"), ErrNotFilter, "returned NULL"},
		{"another API", compile(t, "bad.c", "-DINIT=filter_init"), ErrVersion, "need 6"},
	} {
		if _, err := OpenFilter(tt.path, false); !errors.Is(err, tt.want) || !strings.Contains(err.Error(), tt.text) {
			t.Errorf("%s: got %v, need %v (%s)", tt.name, err, tt.want, tt.text)
		}
	}
}

// Every installed filter loads, and asks for nothing that is not there.
func TestInstalledFilters(t *testing.T) {
	for _, name := range debianModules[FilterKind] {
		found, err := Find(FilterKind, name)
		if err != nil {
			continue // of a later release
		}
		f, err := OpenFilter(found.Path, false)
		if err != nil {
			t.Error(err)
			continue
		}
		var b bytes.Buffer
		if !strings.HasPrefix(f.Help(), "filter: "+f.Name()+" (") || f.Version() == "" || f.Dump(&b) != nil ||
			!strings.Contains(b.String(), f.Name()+"_path="+realPath(found.Path)) {
			t.Errorf("%s: got %q, %q, %q", name, f.Help(), f.Version(), b.String())
		}
	}
}

// Handles of C objects that are gone are found out, and never come back.
func TestObjectsAreFreed(t *testing.T) {
	live := cshim.LiveObjects()
	t.Run("chain", func(t *testing.T) {
		ch := filtered(t, openFilter(t, installedFilters+"nofilter-filter.so"), openFilter(t, installedFilters+"readahead-filter.so"))
		for range 3 {
			c := connect(t)
			s, err := ch.Open(c, true, "x")
			if err != nil {
				t.Fatal(err)
			}
			if err := s.Prepare(c); err != nil {
				t.Fatal(err)
			}
			if err := s.Finalize(c); err != nil {
				t.Fatal(err)
			}
			s.Close(c)
		}
	})
	if n := cshim.LiveObjects(); n != live {
		t.Errorf("%d objects in C, %d before", n, live)
	}
}

func BenchmarkPreadThroughFilters(b *testing.B) {
	for _, n := range []int{1, 3, 8} {
		b.Run(map[int]string{1: "filters=1", 3: "filters=3", 8: "filters=8"}[n], func(b *testing.B) {
			f := compile(b, "forward.c")
			var filters []*Filter
			for range n {
				filters = append(filters, openFilter(b, f))
			}
			ch := filtered(b, filters...)
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
			b.ReportAllocs()
			for b.Loop() {
				if err := s.Pread(c, buf.B[:4096], 0); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
