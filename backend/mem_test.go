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
