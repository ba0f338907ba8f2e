package loader

import (
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

// NewCalls is that of [backend.BurstHandle].
func (h *handle) NewCalls(c *backend.Call) backend.Calls {
	if h.p.v1 {
		return nil
	}
	read, write := h.data(c, backend.Pread, 0, 0, 0), h.data(c, backend.Pwrite, 0, 0, 0)
	return burst{&h.p.module, cshim.NewBurst(&read, &write, nil)}
}

// NewCalls is that of [backend.BurstHandle].
func (h *filterHandle) NewCalls(c *backend.Call) backend.Calls {
	read, write := h.data(c, backend.Pread, 0, 0, 0), h.data(c, backend.Pwrite, 0, 0, 0)
	return burst{&h.f.module, cshim.NewBurst(&read, &write, h.own)}
}

// NewCalls is that of [backend.BurstHandle].
func (m mainHandle) NewCalls(c *backend.Call) backend.Calls {
	if calls := m.h.NewCalls(c); calls != nil {
		return mainBurst{calls}
	}
	return nil
}

// A mainBurst is handed over to the main thread whole.
type mainBurst struct{ backend.Calls }

func (b mainBurst) Run(c *backend.Call) (done int, err error) {
	onMain(func() { done, err = b.Calls.Run(c) })
	return done, err
}

func (b burst) Add(write bool, p []byte, off, cookie uint64) {
	b.calls.Add(write, unsafe.Pointer(unsafe.SliceData(p)), uint32(len(p)), off, cookie)
}

func (b burst) Run(c *backend.Call) (done int, err error) {
	done, write, r := b.calls.Run(c.Worker)
	if r.Ret >= 0 {
		return done, nil
	}
	cb := backend.Pread
	if write {
		cb = backend.Pwrite
	}
	return done, b.m.failure(cb, r)
}

func (b burst) Stop() (begun int) { return b.calls.Stop() }
