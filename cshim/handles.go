package cshim

import (
	"sync"
	"sync/atomic"
)

// handles gives Go values integers that C keeps. A handle is never used again, so
// that one which outlived its value is found out. The zero value is ready for use.
type handles[T any] struct {
	mu    sync.Mutex
	free  []uint32 // indices into slots
	slots atomic.Pointer[[]*slot[T]]
}

type slot[T any] struct {
	uses  uint32 // on mu
	entry atomic.Pointer[entry[T]]
}

type entry[T any] struct {
	handle uint64 // uses of the slot, then its index
	value  T
}

// add returns a handle, which is not 0, for v.
func (h *handles[T]) add(v T) uint64 {
	h.mu.Lock()
	defer h.mu.Unlock()
	var slots []*slot[T]
	if p := h.slots.Load(); p != nil {
		slots = *p
	}
	if len(h.free) == 0 {
		// A reader holds the slice that it loaded; what is there stays there.
		h.free = append(h.free, uint32(len(slots)))
		slots = append(slots, &slot[T]{})
		h.slots.Store(&slots)
	}
	i := h.free[len(h.free)-1]
	h.free = h.free[:len(h.free)-1]
	s := slots[i]
	s.uses++
	handle := uint64(s.uses)<<32 | uint64(i)
	s.entry.Store(&entry[T]{handle, v})
	return handle
}

// get returns the value of a handle, or ok = false if it has none (any more).
func (h *handles[T]) get(handle uint64) (v T, ok bool) {
	if p := h.slots.Load(); p != nil && uint64(uint32(handle)) < uint64(len(*p)) {
		if e := (*p)[uint32(handle)].entry.Load(); e != nil && e.handle == handle {
			return e.value, true
		}
	}
	return v, false
}

// remove ends a handle that add returned.
func (h *handles[T]) remove(handle uint64) {
	h.mu.Lock()
	defer h.mu.Unlock()
	i := uint32(handle)
	(*h.slots.Load())[i].entry.Store(nil)
	h.free = append(h.free, i)
}
