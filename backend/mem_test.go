package backend

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"sync"
	"testing"
)

// Mem against a plain slice, over random requests of all kinds.
func TestMem(t *testing.T) {
	const size = 5*pageSize + 777
	c := newCall()
	s, err := NewChain(NewMem(size), nil, Trace{}).Open(c, false, "")
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close(c)
	caps, err := s.Caps(c)
	if want := (Caps{size, true, true, false, true, Native, true, Native, true, Native, true}); err != nil || caps != want {
		t.Errorf("got %+v, %v", caps, err)
	}
	plain := make([]byte, size)
	rnd := rand.New(rand.NewPCG(1, 2))
	for i := range 2000 {
		off := rnd.Uint64N(size)
		n := rnd.Uint64N(min(size-off, 2*pageSize)) + 1
		if i%5 == 0 { // whole pages
			off = off / pageSize * pageSize
			n = min(size-off, pageSize)
		}
		p := plain[off : off+n]
		var err error
		switch rnd.IntN(5) {
		case 0:
			for i := range p {
				p[i] = byte(rnd.Uint32() | 1)
			}
			err = s.Pwrite(c, p, off, FUA)
		case 1:
			clear(p)
			err = s.Zero(c, uint32(n), off, MayTrim)
		case 2:
			clear(p)
			err = s.Zero(c, uint32(n), off, FastZero)
		case 3:
			clear(p)
			err = s.Trim(c, uint32(n), off, 0)
		case 4:
			got := bytes.Repeat([]byte{0xee}, int(n))
			if err = s.Pread(c, got, off); !bytes.Equal(got, p) {
				t.Fatalf("pread %d@%d differs", n, off)
			}
			var x Extents
			if err := s.Extents(c, uint32(n), off, 0, &x); err != nil {
				t.Fatal(err)
			}
			next := off
			for _, e := range x.List() {
				if e.Offset != next || e.Type&ExtentZero != 0 && len(bytes.Trim(plain[e.Offset:e.Offset+e.Length], "\x00")) != 0 {
					t.Fatalf("extents of %d@%d: %v", n, off, x.List())
				}
				next += e.Length
			}
			if next < off+n {
				t.Fatalf("extents of %d@%d end at %d", n, off, next)
			}
		}
		if err != nil {
			t.Fatal(err)
		}
	}
}

func TestMemExtents(t *testing.T) {
	m := NewMem(4 * pageSize)
	c := newCall()
	s, err := NewChain(m, nil, Trace{}).Open(c, false, "")
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Pwrite(c, []byte{1}, pageSize+5, 0); err != nil {
		t.Fatal(err)
	}
	var x Extents
	if err := s.Extents(c, 4*pageSize, 0, 0, &x); err != nil {
		t.Fatal(err)
	}
	if got, want := fmt.Sprint(x.List()), "[{0 65536 3} {65536 65536 0} {131072 131072 3}]"; got != want {
		t.Errorf("got %s, need %s", got, want)
	}
}

// A zero touches what is in its range, whichever way it finds the pages, and those that
// are absent stay so.
func TestMemZero(t *testing.T) {
	const size = 1<<63 - 1
	// Half of page 1 to half of page 1000.
	const off, n = pageSize + pageSize/2, 999 * pageSize
	written := []uint64{0, 1, 2, 500, 1000, 1001}
	for _, tt := range []struct {
		name string
		most int
		zero func(*Session, *Call) error
		left int // pages
	}{
		{"zero, by the pages there are", 0, func(s *Session, c *Call) error { return s.Zero(c, n, off, 0) }, 6},
		{"zero, by the range", 1000, func(s *Session, c *Call) error { return s.Zero(c, n, off, 0) }, 6},
		{"zero that may trim, by the pages there are", 0, func(s *Session, c *Call) error { return s.Zero(c, n, off, MayTrim) }, 4},
		{"zero that may trim, by the range", 1000, func(s *Session, c *Call) error { return s.Zero(c, n, off, MayTrim) }, 4},
		{"trim, by the pages there are", 0, func(s *Session, c *Call) error { return s.Trim(c, n, off, 0) }, 4},
	} {
		t.Run(tt.name, func(t *testing.T) {
			m := NewMem(size)
			c := newCall()
			s, err := NewChain(m, nil, Trace{}).Open(c, false, "")
			if err != nil {
				t.Fatal(err)
			}
			for _, page := range written {
				if err := s.Pwrite(c, bytes.Repeat([]byte{1}, pageSize), page*pageSize, 0); err != nil {
					t.Fatal(err)
				}
			}
			if m.most != len(written) {
				t.Errorf("got %d pages at most, need %d", m.most, len(written))
			}
			m.most += tt.most
			if err := tt.zero(s, c); err != nil {
				t.Fatal(err)
			}
			if len(m.pages) != tt.left {
				t.Errorf("got %d pages, need %d", len(m.pages), tt.left)
			}
			got := make([]byte, pageSize)
			for _, page := range written {
				if err := s.Pread(c, got, page*pageSize); err != nil {
					t.Fatal(err)
				}
				for i, b := range got {
					at := page*pageSize + uint64(i)
					if want := at < off || at >= off+n; (b == 1) != want {
						t.Fatalf("got %d at %d of page %d", b, i, page)
					}
				}
			}
		})
	}
}

// Connections that share the disk may do so at the same time.
func TestMemInParallel(t *testing.T) {
	ch := NewChain(NewMem(1<<20), nil, Trace{})
	var wg sync.WaitGroup
	for i := range 4 {
		wg.Go(func() {
			c := newCall()
			s, err := ch.Open(c, false, "")
			if err != nil {
				t.Error(err)
				return
			}
			data, got := bytes.Repeat([]byte{byte(i + 1)}, 4096), make([]byte, 4096)
			for range 100 {
				off := uint64(i) * 4096
				if err := s.Pwrite(c, data, off, 0); err != nil {
					t.Error(err)
				}
				if err := s.Pread(c, got, off); err != nil || !bytes.Equal(got, data) {
					t.Errorf("read something else: %v", err)
				}
			}
		})
	}
	wg.Wait()
}
