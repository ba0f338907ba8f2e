package backend

import (
	"sync"
)

// pageSize is the grain in which Mem allocates, and so of its extents.
const pageSize = 64 << 10

// Mem is a sparse disk in memory: a complete Backend without C, for tests and
// for embedders. Its data outlives connections, which all see the same. Only what
// is written takes memory: a zero frees some where it may trim, and never takes any.
//
// Of a chain's life cycle it needs no step: those from [Chain.Load] to
// [Chain.AfterFork], [Chain.Cleanup] and [Chain.Unload] may be left out, and what
// [NewChain] returns can be served at once. [Chain.Config] fails with [ErrNoConfig]. A
// chain with filters, or around a backend that adds callbacks of the life cycle to a
// Mem, needs all steps, in order.
type Mem struct {
	size  uint64
	mu    sync.RWMutex
	pages map[uint64]*[pageSize]byte // by offset / pageSize; absent reads as zeroes
	most  int                        // pages there have been at once: a map does not shrink, and takes as long to walk
}

// NewMem returns a disk of size bytes, 0 to 2^63-1, all zero.
func NewMem(size uint64) *Mem {
	return &Mem{size: size, pages: map[uint64]*[pageSize]byte{}}
}

func (m *Mem) Name() string             { return "mem" }
func (m *Mem) ThreadModel() ThreadModel { return Parallel }

func (m *Mem) Has(cb Callback) bool {
	switch cb {
	case Open, Close, GetSize, CanMultiConn, CanFUA, CanFastZero,
		Pread, Pwrite, Flush, Trim, Zero, GetExtents, Cache:
		return true
	}
	return false
}

func (m *Mem) Load()                                           {}
func (m *Mem) Unload()                                         {}
func (m *Mem) Config(key, value string) error                  { return ErrNoConfig }
func (m *Mem) ConfigComplete() error                           { return nil }
func (m *Mem) GetThreadModel() (ThreadModel, error)            { return Parallel, nil }
func (m *Mem) GetReady() error                                 { return nil }
func (m *Mem) AfterFork() error                                { return nil }
func (m *Mem) Cleanup()                                        {}
func (m *Mem) Preconnect(*Call, bool) error                    { return nil }
func (m *Mem) ListExports(*Call, bool) ([]Export, bool, error) { return nil, true, nil }
func (m *Mem) DefaultExport(*Call, bool) (string, bool)        { return "", true }
func (m *Mem) Open(*Call, bool, string) (Handle, error)        { return memHandle{m}, nil }

type memHandle struct{ *Mem }

func (h memHandle) Close(*Call)                            {}
func (h memHandle) GetSize(*Call) (int64, error)           { return int64(h.size), nil }
func (h memHandle) ExportDescription(*Call) (string, bool) { return "", false }
func (h memHandle) BlockSize(*Call) (BlockSize, error)     { return BlockSize{}, nil }

func (h memHandle) Can(_ *Call, cb Callback) (int, error) {
	if cb == CanFUA {
		return Native, nil
	}
	return 1, nil
}

// pieces calls f for each page that [off, off+n) touches, with the part of it
// that lies within and where that part is in the whole range.
func pieces(n, off uint64, f func(page uint64, from, to, done uint64)) {
	for done := uint64(0); done < n; {
		from := (off + done) % pageSize
		to := min(pageSize, from+n-done)
		f((off+done)/pageSize, from, to, done)
		done += to - from
	}
}

func (h memHandle) Pread(_ *Call, p []byte, off uint64) error {
	h.mu.RLock()
	defer h.mu.RUnlock()
	pieces(uint64(len(p)), off, func(page, from, to, done uint64) {
		dst := p[done : done+to-from]
		if data := h.pages[page]; data != nil {
			copy(dst, data[from:to])
		} else {
			clear(dst)
		}
	})
	return nil
}

func (h memHandle) Pwrite(_ *Call, p []byte, off uint64, _ Flags) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	pieces(uint64(len(p)), off, func(page, from, to, done uint64) {
		data := h.pages[page]
		if data == nil {
			data = new([pageSize]byte)
			h.pages[page] = data
			h.most = max(h.most, len(h.pages))
		}
		copy(data[from:to], p[done:])
	})
	return nil
}

func (h memHandle) Flush(*Call) error { return nil }

func (h memHandle) Trim(c *Call, n uint32, off uint64, flags Flags) error {
	return h.Zero(c, n, off, flags|MayTrim)
}

// Zero leaves absent what is, also where it may not trim: it makes no hole, and a
// client that sends no data must not be able to fill the memory.
func (h memHandle) Zero(_ *Call, n uint32, off uint64, flags Flags) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	zero := func(page, from, to, _ uint64) {
		switch data := h.pages[page]; {
		case data == nil:
		case to-from == pageSize && flags&MayTrim != 0:
			delete(h.pages, page)
		default:
			clear(data[from:to])
		}
	}
	if int(n/pageSize) <= h.most {
		pieces(uint64(n), off, zero)
		return nil
	}
	// The others wait for the lock: absent pages must not be looked for one by one.
	for page := range h.pages {
		start := page * pageSize
		from, to := max(start, off), min(start+pageSize, off+uint64(n))
		if from < to {
			zero(page, from-start, to-start, 0)
		}
	}
	return nil
}

func (h memHandle) Extents(_ *Call, n uint32, off uint64, flags Flags, x *Extents) error {
	h.mu.RLock()
	defer h.mu.RUnlock()
	for end := off + uint64(n); off < end; {
		typ := ExtentHole | ExtentZero
		if h.pages[off/pageSize] != nil {
			typ = 0
		}
		next := min((off/pageSize+1)*pageSize, h.size)
		if err := x.Add(off, next-off, typ); err != nil {
			return err
		}
		off = next
	}
	return nil
}

func (h memHandle) Cache(*Call, uint32, uint64) error { return nil }
