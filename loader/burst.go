package loader

import (
	"sync/atomic"
	"unsafe"

	"nbdhost/backend"
	"nbdhost/cshim"
)

// A burst makes several calls of a module in one crossing.
type burst struct {
	m     *module
	calls *cshim.Burst
}

const _ = uint(cshim.MaxBurst - backend.MaxBurst) // there is room

// direct says how .pread or .pwrite is called, but for the arguments, and of which filter it is,
// nil for a plugin. ok is false where that takes more than the call.
func (h *handle) direct(c *backend.Call, cb backend.Callback) (d cshim.Data, filter *cshim.FilterContext, ok bool) {
	return h.data(c, cb, 0, 0, 0), nil, !h.p.v1
}

func (h *filterHandle) direct(c *backend.Call, cb backend.Callback) (d cshim.Data, filter *cshim.FilterContext, ok bool) {
	return h.data(c, cb, 0, 0, 0), h.own, true
}

// A directHandle is a handle or a filterHandle.
type directHandle interface {
	direct(*backend.Call, backend.Callback) (cshim.Data, *cshim.FilterContext, bool)
}

func newBurst(m *module, h directHandle, c *backend.Call) backend.Calls {
	read, filter, ok := h.direct(c, backend.Pread)
	if !ok {
		return nil
	}
	write, _, _ := h.direct(c, backend.Pwrite)
	return burst{m, cshim.NewBurst(&read, &write, filter)}
}

// NewCalls is that of [backend.BurstHandle].
func (h *handle) NewCalls(c *backend.Call) backend.Calls { return newBurst(&h.p.module, h, c) }

// NewCalls is that of [backend.BurstHandle].
func (h *filterHandle) NewCalls(c *backend.Call) backend.Calls { return newBurst(&h.f.module, h, c) }

// NewCalls is that of [backend.BurstHandle].
func (m mainHandle) NewCalls(c *backend.Call) backend.Calls {
	if calls := m.h.NewCalls(c); calls != nil {
		return mainBurst{calls}
	}
	return nil
}

// A mainBurst is handed over to the main thread whole.
type mainBurst struct{ backend.Calls }

func (b mainBurst) Run(c *backend.Call, n int, begun *atomic.Uint32) (done int, err error) {
	onMain(func() { done, err = b.Calls.Run(c, n, begun) })
	return done, err
}

func (b burst) Set(i int, write bool, p []byte, off, cookie uint64) {
	b.calls.Set(i, write, unsafe.Pointer(unsafe.SliceData(p)), uint32(len(p)), off, cookie)
}

func (b burst) Run(c *backend.Call, n int, begun *atomic.Uint32) (done int, err error) {
	done, write, r := b.calls.Run(c.Worker, n, begun)
	if r.Ret >= 0 {
		return done, nil
	}
	cb := backend.Pread
	if write {
		cb = backend.Pwrite
	}
	return done, b.m.failure(cb, r)
}
