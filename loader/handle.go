package loader

import (
	"fmt"
	"runtime"
	"unsafe"

	"nbdhost/backend"
	"nbdhost/cshim"
)

// A handle is what a plugin's .open returned, with the context that stays the
// same for every call on it.
type handle struct {
	p   *Plugin
	ctx *cshim.Context
	ptr unsafe.Pointer // the plugin's, not to be looked into
}

// String returns the pointer as C's %p prints it.
func (h *handle) String() string { return fmt.Sprintf("%#x", uintptr(h.ptr)) }

func (h *handle) Close(*backend.Call) {
	if h.p.Has(backend.Close) {
		cshim.CallClose(h.ctx, h.p.fn[backend.Close], h.ptr)
	}
	h.ctx.Free()
}

func (h *handle) GetSize(*backend.Call) (int64, error) {
	r := cshim.CallHandleInt64(h.ctx, h.p.fn[backend.GetSize], h.ptr)
	return r.Ret, h.p.outcome(backend.GetSize, r)
}

func (h *handle) ExportDescription(*backend.Call) (string, bool) {
	return cshim.CallHandleString(h.ctx, h.p.fn[backend.ExportDescription], h.ptr)
}

func (h *handle) BlockSize(*backend.Call) (backend.BlockSize, error) {
	minimum, preferred, maximum, r := cshim.CallBlockSize(h.ctx, h.p.fn[backend.BlockSizes], h.ptr)
	return backend.BlockSize{Min: minimum, Preferred: preferred, Max: maximum}, h.p.outcome(backend.BlockSizes, r)
}

func (h *handle) Can(_ *backend.Call, cb backend.Callback) (int, error) {
	if h.p.fn[cb] == nil {
		// can_fast_zero of a version 1 plugin: its .zero has no flag to ask for
		// it, so that a fast zero fails at once, as it should.
		return 1, nil
	}
	r := cshim.CallHandleInt(h.ctx, h.p.fn[cb], h.ptr)
	if err := h.p.outcome(cb, r); err != nil {
		return 0, err
	}
	n := int(r.Ret)
	if h.p.v1 && cb == backend.CanFUA {
		n = min(n, backend.Emulate) // the data callbacks have no flags to put FUA in
	}
	return n, nil
}

// The data calls. The flags have the same values on both sides.

func (h *handle) data(c *backend.Call, cb backend.Callback, n uint32, off uint64, flags backend.Flags) cshim.Data {
	return cshim.Data{Ctx: h.ctx, Fn: h.p.fn[cb], Handle: h.ptr, Worker: c.Worker, Cookie: c.Request.Cookie,
		Count: n, Offset: off, Flags: uint32(flags)}
}

func (h *handle) Pread(c *backend.Call, b []byte, off uint64) error {
	d := h.data(c, backend.Pread, uint32(len(b)), off, 0)
	d.Buf = unsafe.Pointer(unsafe.SliceData(b))
	defer runtime.KeepAlive(b)
	if h.p.v1 {
		return h.p.outcome(backend.Pread, cshim.CallPreadV1(&d))
	}
	return h.p.outcome(backend.Pread, cshim.CallPread(&d))
}

func (h *handle) Pwrite(c *backend.Call, b []byte, off uint64, flags backend.Flags) error {
	d := h.data(c, backend.Pwrite, uint32(len(b)), off, flags)
	d.Buf = unsafe.Pointer(unsafe.SliceData(b))
	defer runtime.KeepAlive(b)
	if h.p.v1 {
		return h.p.outcome(backend.Pwrite, cshim.CallPwriteV1(&d))
	}
	return h.p.outcome(backend.Pwrite, cshim.CallPwrite(&d))
}

func (h *handle) Flush(c *backend.Call) error {
	d := h.data(c, backend.Flush, 0, 0, 0)
	if h.p.v1 {
		return h.p.outcome(backend.Flush, cshim.CallFlushV1(&d))
	}
	return h.p.outcome(backend.Flush, cshim.CallFlush(&d))
}

func (h *handle) Trim(c *backend.Call, n uint32, off uint64, flags backend.Flags) error {
	d := h.data(c, backend.Trim, n, off, flags)
	if h.p.v1 {
		return h.p.outcome(backend.Trim, cshim.CallTrimV1(&d))
	}
	return h.p.outcome(backend.Trim, cshim.CallRange(&d))
}

func (h *handle) Zero(c *backend.Call, n uint32, off uint64, flags backend.Flags) error {
	d := h.data(c, backend.Zero, n, off, flags)
	if h.p.v1 {
		if flags&backend.FastZero != 0 {
			return h.p.outcome(backend.Zero, cshim.Result{Ret: -1, Errno: errNotFast})
		}
		d.Flags &= uint32(backend.MayTrim)
		return h.p.outcome(backend.Zero, cshim.CallZeroV1(&d))
	}
	return h.p.outcome(backend.Zero, cshim.CallRange(&d))
}

func (h *handle) Extents(c *backend.Call, n uint32, off uint64, flags backend.Flags, x *backend.Extents) error {
	d := h.data(c, backend.GetExtents, n, off, flags)
	r, err := cshim.CallExtents(&d, x.Add)
	if err != nil {
		return err
	}
	return h.p.outcome(backend.GetExtents, r)
}

func (h *handle) Cache(c *backend.Call, n uint32, off uint64) error {
	d := h.data(c, backend.Cache, n, off, 0)
	return h.p.outcome(backend.Cache, cshim.CallRange(&d))
}
