package backend

import (
	"sync"
	"testing"
	"unsafe"
)

func TestBuffer(t *testing.T) {
	for _, tt := range []struct{ n, size int }{
		{0, 64 << 10}, {1, 64 << 10}, {64 << 10, 64 << 10}, {64<<10 + 1, 96 << 10},
		{96 << 10, 96 << 10}, {96<<10 + 1, 128 << 10}, {128 << 10, 128 << 10}, {128<<10 + 1, 192 << 10},
		{256 << 10, 256 << 10}, {64 << 20, 64 << 20}, {64<<20 + 1, 96 << 20}, {96<<20 + 1, 128 << 20}, {128 << 20, 128 << 20},
	} {
		b, err := GetBuffer(tt.n)
		if err != nil || len(b.B) != tt.size {
			t.Fatalf("%d: got %d bytes, %v, need %d", tt.n, len(b.B), err, tt.size)
		}
		if uintptr(unsafe.Pointer(&b.B[0]))%4096 != 0 {
			t.Errorf("%d: not at the start of a page", tt.n)
		}
		b.B[0], b.B[tt.size-1] = 1, 1
		if n := BuffersInUse(); n != 1 {
			t.Errorf("%d in use", n)
		}
		b.Release()
	}
	if _, err := GetBuffer(128<<20 + 1); err == nil {
		t.Error("got more than 128 MiB")
	}
	(*Buffer)(nil).Release()
	if n := BuffersInUse(); n != 0 {
		t.Errorf("%d in use", n)
	}
}

// The buffer that was used last comes first; one with an owner comes to no other.
func TestBufferReuse(t *testing.T) {
	get := func() *Buffer {
		b, err := GetBuffer(1)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	a, b := get(), get()
	if &a.B[0] == &b.B[0] {
		t.Fatal("one buffer has two owners")
	}
	a.Release()
	b.Release()
	if c, d := get(), get(); c != b || d != a {
		t.Error("not last in, first out")
	} else {
		c.Release()
		d.Release()
	}
	// No more is kept than keptBytes.
	var all []*Buffer
	for range keptBytes>>minBufferShift + 5 {
		all = append(all, get())
	}
	for _, b := range all {
		b.Release()
	}
	if n := len(bufferClasses[0].free); n != keptBytes>>minBufferShift {
		t.Errorf("%d are kept, need %d", n, keptBytes>>minBufferShift)
	}
	if n := testing.AllocsPerRun(100, func() { get().Release() }); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

// An owner gets back what it had, where it is one of the last, with what it left there; another
// one gets it without that.
func TestBufferOwner(t *testing.T) {
	const n = 100
	get := func(owner uint64) *Buffer {
		b, err := GetBufferFor(owner, 3<<20)
		if err != nil {
			t.Fatal(err)
		}
		b.Claim(n)
		return b
	}
	ones, others := get(1), get(2)
	ones.B[0], others.B[0] = 1, 2
	ones.Release()
	others.Release()
	b := get(1)
	if b != ones || b.B[0] != 1 {
		t.Errorf("its owner got another one, or %d in it", b.B[0])
	}
	third := get(3)
	if third != others || third.B[0] != 0 {
		t.Errorf("got %d in a buffer that was another one's", third.B[0])
	}
	third.B[n] = 3
	if third.Claim(n + 1); third.B[n] != 0 {
		t.Errorf("got %d where nobody has claimed it", third.B[n])
	}
	b.B[0] = 1
	b.Release()
	third.Release()
	if b, err := GetBuffer(3 << 20); err != nil {
		t.Error(err)
	} else {
		b.B[0] = 4
		b.Release()
	}
	for _, owner := range []uint64{1, 3} {
		b := get(owner)
		if b.B[0] == 4 {
			t.Errorf("%d has what one without owner has left", owner)
		}
		defer b.Release()
	}
}

func TestBufferInParallel(t *testing.T) {
	var wg sync.WaitGroup
	for i := range 4 {
		wg.Go(func() {
			for range 1000 {
				b, err := GetBuffer(100)
				if err != nil {
					t.Error(err)
					return
				}
				b.B[0] = byte(i)
				if b.B[0] != byte(i) {
					t.Error("two owners")
				}
				b.Release()
			}
		})
	}
	wg.Wait()
	if n := BuffersInUse(); n != 0 {
		t.Errorf("%d in use", n)
	}
}
