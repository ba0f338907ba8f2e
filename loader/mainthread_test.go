package loader

import (
	"bytes"
	"errors"
	"fmt"
	"maps"
	"os"
	"runtime"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"

	"nbdhost/backend"
)

// ruby is the option that makes a plugin one that is called on the main thread.
const ruby = `-DNAME="ruby"`

// threads starts to note the threads that modules log on, and returns a function
// that ends it.
func threads(t *testing.T) (stop func() []int) {
	t.Helper()
	lines.Lock()
	defer lines.Unlock()
	lines.threads = map[int]bool{}
	return func() []int {
		lines.Lock()
		defer lines.Unlock()
		ids := slices.Sorted(maps.Keys(lines.threads))
		lines.threads = nil
		return ids
	}
}

// A plugin that serializes all requests, and one that was built to serialize connections,
// wants one thread for each connection; Ruby's is called on the main thread.
func TestThreadOfCalls(t *testing.T) {
	for option, pinned := range map[string]bool{"-DTHREAD_MODEL=0": true, "-DTHREAD_MODEL=1": true,
		"-DTHREAD_MODEL=2": false, "-DTHREAD_MODEL=3": false, ruby: false} {
		t.Run(option, func(t *testing.T) {
			onMain := option == ruby
			ch, p := serve(t, []string{option})
			if ch.Pinned() != pinned {
				t.Errorf("pinned: got %v, need %v", ch.Pinned(), pinned)
			}
			verbose(t)
			stop := threads(t)
			var wg sync.WaitGroup
			data := bytes.Repeat([]byte("data"), 128)
			conns := []*backend.Call{connect(t), connect(t), connect(t), connect(t)}
			for i, c := range conns {
				wg.Go(func() {
					runtime.LockOSThread() // each has a thread of its own
					defer runtime.UnlockOSThread()
					off := uint64(i) * 4096
					got := make([]byte, len(data))
					var x backend.Extents
					var caps backend.Caps
					step := func(op string, err error) {
						if err != nil {
							t.Errorf("%s: %v", op, err)
						}
					}
					step("preconnect", p.Preconnect(c, false))
					list, useDefault, err := p.ListExports(c, false)
					step("list_exports", err)
					if fmt.Sprint(list, useDefault) != "[{a first} {b }] true" {
						t.Errorf("got exports %v, %v", list, useDefault)
					}
					if name, ok := p.DefaultExport(c, false); name != "main" || !ok {
						t.Errorf("got default export %q, %v", name, ok)
					}
					s, err := ch.Open(c, false, "x")
					if err != nil {
						t.Errorf("open: %v", err)
						return
					}
					if text, ok := s.ExportDescription(c); text != "it is x" || !ok {
						t.Errorf("got description %q, %v", text, ok)
					}
					b, err := s.BlockSize(c)
					step("block_size", err)
					if b.Preferred != 4096 {
						t.Errorf("got %+v", b)
					}
					size, err := s.Size(c)
					step("get_size", err)
					caps, err = s.Caps(c)
					step("can", err)
					if size != 1<<20 || !caps.Write || caps.FUA != backend.Native {
						t.Errorf("got size %d, %+v", size, caps)
					}
					step("pwrite", s.Pwrite(c, data, off, 0))
					step("pread", s.Pread(c, got, off))
					if !bytes.Equal(got, data) {
						t.Error("read something else than was written")
					}
					step("flush", s.Flush(c))
					step("trim", s.Trim(c, 512, off, 0))
					step("zero", s.Zero(c, 512, off, 0))
					step("cache", s.Cache(c, 512, off))
					step("extents", s.Extents(c, 512, 524032, 0, &x))
					if len(x.List()) != 2 {
						t.Errorf("got extents %v", x.List())
					}
					s.Close(c)
				})
			}
			wg.Wait()
			ids, main := stop(), os.Getpid()
			if onMain && !slices.Equal(ids, []int{main}) || !onMain && slices.Contains(ids, main) {
				t.Errorf("called on threads %v: the main one is %d", ids, main)
			}
		})
	}
}

func TestErrorsOnMain(t *testing.T) {
	ch, p := serve(t, []string{ruby}, fmt.Sprintf("set=%d", syscall.ENOSPC))
	var x backend.Extents
	for op, do := range map[string]func(*backend.Session, *backend.Call) error{
		"preconnect":   func(_ *backend.Session, c *backend.Call) error { return p.Preconnect(c, false) },
		"list_exports": func(_ *backend.Session, c *backend.Call) error { _, _, err := p.ListExports(c, false); return err },
		"open":         func(_ *backend.Session, c *backend.Call) error { _, err := ch.Open(c, false, "y"); return err },
		"get_size":     func(s *backend.Session, c *backend.Call) error { _, err := s.Size(c); return err },
		"block_size":   func(s *backend.Session, c *backend.Call) error { _, err := s.BlockSize(c); return err },
		"can_write":    func(s *backend.Session, c *backend.Call) error { _, err := s.Caps(c); return err },
		"pread":        func(s *backend.Session, c *backend.Call) error { return s.Pread(c, make([]byte, 1), 0) },
		"pwrite":       func(s *backend.Session, c *backend.Call) error { return s.Pwrite(c, make([]byte, 1), 0, 0) },
		"flush":        func(s *backend.Session, c *backend.Call) error { return s.Flush(c) },
		"trim":         func(s *backend.Session, c *backend.Call) error { return s.Trim(c, 1, 0, 0) },
		"zero":         func(s *backend.Session, c *backend.Call) error { return s.Zero(c, 1, 0, 0) },
		"cache":        func(s *backend.Session, c *backend.Call) error { return s.Cache(c, 1, 0) },
		"extents":      func(s *backend.Session, c *backend.Call) error { return s.Extents(c, 1, 0, 0, &x) },
	} {
		c := connect(t)
		s, err := ch.Open(c, false, "x")
		if err != nil {
			t.Fatal(err)
		}
		if err := ch.Config("fail", op); err != nil {
			t.Fatal(err)
		}
		err = do(s, c)
		want := backend.Error{Module: "ruby", Op: op, Errno: syscall.ENOSPC, Msg: op + " was told to fail"}
		var e *backend.Error
		if !errors.As(err, &e) || *e != want {
			t.Errorf("%s: got %#v, need %#v", op, err, want)
		}
		if err := ch.Config("fail", ""); err != nil {
			t.Fatal(err)
		}
		s.Close(c)
	}
	logged()
}

// A call that asks for the shutdown goes on while connections are closed, whose calls
// wait for it: all come to their end.
func TestShutdownOnMain(t *testing.T) {
	ch, _ := serve(t, []string{ruby}, "shutdown=1")
	asked, finish := make(chan struct{}), make(chan struct{})
	shutdown = func() {
		close(asked)
		<-finish
	}
	defer func() { shutdown = func() {} }()
	var sessions [3]*backend.Session
	calls := [3]*backend.Call{connect(t), connect(t), connect(t)}
	for i, c := range calls {
		var err error
		if sessions[i], err = ch.Open(c, false, "x"); err != nil {
			t.Fatal(err)
		}
	}
	verbose(t)
	var wg sync.WaitGroup
	wg.Go(func() {
		if err := sessions[0].Pread(calls[0], make([]byte, 512), 0); err != nil {
			t.Error(err)
		}
	})
	<-asked
	for i := range sessions[1:] {
		wg.Go(func() { sessions[1+i].Close(calls[1+i]) })
	}
	close(finish)
	wg.Wait()
	sessions[0].Close(calls[0])
	got, _ := logged()
	if n := strings.Count(got, "close x"); n != 3 || !strings.Contains(got, "pread 512@0") {
		t.Errorf("got\n%s\nneed a read and three closes", got)
	}
}
