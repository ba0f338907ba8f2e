package cshim

import (
	"sync"
	"testing"
)

func TestHandles(t *testing.T) {
	var h handles[int]
	if _, ok := h.get(0); ok {
		t.Error("0 is a handle")
	}
	a, b := h.add(1), h.add(2)
	if v, ok := h.get(a); !ok || v != 1 || a == 0 || a == b {
		t.Errorf("got %d, %v", v, ok)
	}
	h.remove(a)
	c := h.add(3)
	if _, ok := h.get(a); ok || c == a {
		t.Error("a handle that was removed is used again")
	}
	for _, stale := range []uint64{a, 0, 1 << 40, ^uint64(0), c + 1<<32} {
		if v, ok := h.get(stale); ok {
			t.Errorf("%#x: got %d", stale, v)
		}
	}
	if v, ok := h.get(c); !ok || v != 3 {
		t.Errorf("got %d, %v", v, ok)
	}
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			for range 200 {
				x := h.add(i)
				if v, ok := h.get(x); !ok || v != i {
					t.Errorf("got %d, %v, need %d", v, ok, i)
				}
				h.remove(x)
			}
		})
	}
	wg.Wait()
}
