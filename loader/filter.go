package loader

import (
	"errors"
	"fmt"
	"log/slog"
	"runtime"
	"sync/atomic"
	"syscall"
	"unsafe"

	"nbdhost/abi"
	"nbdhost/backend"
	"nbdhost/cshim"
)

// A Filter is a filter that has been loaded and checked. Give it to [backend.NewChain], as a [Plugin].
type Filter struct {
	module
	raw   abi.Filter
	below *cshim.Backend // f.next, as the filter sees it
	next  *backend.Layer
}

var _ backend.Filter = (*Filter)(nil)

// OpenFilter loads the filter in the shared library at path and checks it. The code
// in the library runs from here on. anyRelease accepts filters of releases of nbdkit
// that are later than any known, which is at the user's own risk. Errors are of
// type [*Error].
func OpenFilter(path string, anyRelease bool) (*Filter, error) {
	f := &Filter{module: module{kind: FilterKind, path: path}}
	if err := f.open(anyRelease); err != nil {
		return nil, &Error{Op: "open filter", Path: path, Err: err}
	}
	return f, nil
}

func (f *Filter) open(anyRelease bool) (err error) {
	cshim.SaveSignals()
	defer cshim.RestoreSignals()
	if f.lib, err = dlopen(f.path); err != nil {
		return err
	}
	init := f.lib.lookup("filter_init")
	if init == nil {
		if f.lib.lookup("plugin_init") != nil {
			return fmt.Errorf("%w: this is a plugin: leave --filter out", ErrNotFilter)
		}
		return fmt.Errorf("%w: the library has no function filter_init: need a library made with NBDKIT_REGISTER_FILTER", ErrNotFilter)
	}
	filter := call(init)
	if filter == nil {
		return fmt.Errorf("%w: filter_init returned NULL: the filter refuses to be loaded", ErrNotFilter)
	}
	if f.raw, err = abi.CopyFilter(filter, anyRelease); err != nil {
		return err
	}
	f.read()
	if err := checkName(f.name); err != nil {
		return err
	}
	f.nameCallbacks()
	f.below = cshim.NewBackend(below{f})
	return nil
}

// read takes what is used later out of the filter's struct.
func (f *Filter) read() {
	r := &f.raw
	f.name, f.longName, f.version = r.Name.String(), r.LongName.String(), r.Version
	f.description, f.configHelp = r.Description.String(), r.ConfigHelp.String()
	f.fn = [...]unsafe.Pointer{
		backend.Load: r.Load, backend.Unload: r.Unload, backend.DumpPlugin: r.DumpPlugin,
		backend.Config: r.Config, backend.ConfigComplete: r.ConfigComplete,
		backend.GetThreadModel: r.GetThreadModel,
		backend.GetReady:       r.GetReady, backend.AfterFork: r.AfterFork, backend.Cleanup: r.Cleanup,
		backend.Preconnect: r.Preconnect, backend.ListExports: r.ListExports,
		backend.DefaultExport: r.DefaultExport,
		backend.Open:          r.Open, backend.Close: r.Close,
		backend.Prepare: r.Prepare, backend.Finalize: r.Finalize,
		backend.ExportDescription: r.ExportDescription, backend.GetSize: r.GetSize,
		backend.BlockSizes: r.BlockSize,
		backend.CanWrite:   r.CanWrite, backend.CanFlush: r.CanFlush,
		backend.IsRotational: r.IsRotational, backend.CanTrim: r.CanTrim,
		backend.CanZero: r.CanZero, backend.CanFastZero: r.CanFastZero,
		backend.CanExtents: r.CanExtents, backend.CanFUA: r.CanFUA,
		backend.CanMultiConn: r.CanMultiConn, backend.CanCache: r.CanCache,
		backend.Pread: r.Pread, backend.Pwrite: r.Pwrite, backend.Flush: r.Flush,
		backend.Trim: r.Trim, backend.Zero: r.Zero,
		backend.GetExtents: r.Extents, backend.Cache: r.Cache,
	}
}

// SetNext says what the filter stands over.
func (f *Filter) SetNext(next *backend.Layer) { f.next = next }

// Has tells whether the filter has the callback.
func (f *Filter) Has(cb backend.Callback) bool { return f.fn[cb] != nil }

// ThreadModel is no limit: a filter that has one says so in .thread_model.
func (f *Filter) ThreadModel() backend.ThreadModel { return backend.Parallel }

// The life cycle.

func (f *Filter) Config(key, value string) error {
	defer cshim.RestoreSignals()
	// As with plugins, the strings stay where they are.
	return f.outcome(backend.Config, cshim.CallFilterConfig(f.fn[backend.Config], f.below, cshim.NewCStr(key), cshim.NewCStr(value)))
}

func (f *Filter) ConfigComplete() error {
	defer cshim.RestoreSignals()
	return f.outcome(backend.ConfigComplete, cshim.CallFilterConfigComplete(f.fn[backend.ConfigComplete], f.below))
}

func (f *Filter) GetThreadModel() (backend.ThreadModel, error) {
	r := cshim.CallFilterModel(f.fn[backend.GetThreadModel], int(f.next.ThreadModel()))
	return backend.ThreadModel(r.Ret), f.outcome(backend.GetThreadModel, r)
}

func (f *Filter) GetReady() error {
	defer cshim.RestoreSignals()
	model := int(f.next.Chain().ThreadModel())
	return f.outcome(backend.GetReady, cshim.CallFilterModel(f.fn[backend.GetReady], model))
}

func (f *Filter) AfterFork() error {
	defer cshim.RestoreSignals()
	return f.outcome(backend.AfterFork, cshim.CallFilterAfterFork(f.fn[backend.AfterFork], f.below))
}

func (f *Filter) Cleanup() { cshim.CallFilterCleanup(f.fn[backend.Cleanup], f.below) }

// The handshake.

func (f *Filter) Preconnect(c *backend.Call, readonly bool) error {
	ctx := cshim.NewContext(shimConn(c), "", false, false)
	defer ctx.Free()
	return f.outcome(backend.Preconnect, cshim.CallFilterPreconnect(ctx, f.fn[backend.Preconnect], f.below, readonly))
}

func (f *Filter) ListExports(c *backend.Call, readonly bool) (list []backend.Export, useDefault bool, err error) {
	ctx := cshim.NewContext(shimConn(c), "", false, false)
	defer ctx.Free()
	exports, r := cshim.CallFilterListExports(ctx, f.fn[backend.ListExports], f.below, readonly, c.Conn.TLS)
	list, useDefault = exportList(exports)
	return list, useDefault, f.outcome(backend.ListExports, r)
}

func (f *Filter) DefaultExport(c *backend.Call, readonly bool) (name string, ok bool) {
	ctx := cshim.NewContext(shimConn(c), "", false, false)
	defer ctx.Free()
	return cshim.CallFilterDefaultExport(ctx, f.fn[backend.DefaultExport], f.below, readonly, c.Conn.TLS)
}

// OpenOver opens the filter for s. A filter without .open opens the next layer as it
// was opened itself.
func (f *Filter) OpenOver(c *backend.Call, s *backend.Session) (backend.FilterHandle, error) {
	h := &filterHandle{f: f, s: s, conn: c.Conn}
	h.ctx = cshim.NewContext(shimConn(c), s.Export(), true, false)
	h.ctx.SetTLS(c.Conn.TLS)
	h.own = cshim.NewFilterContext(h, f.below)
	fn := f.fn[backend.Open]
	if fn == nil {
		h.ptr = h.own.Handle()
		if err := h.openNext(c, s.ReadOnly(), s.Export()); err != nil {
			h.free()
			return nil, err
		}
		return h, nil
	}
	r := cshim.CallFilterOpen(h.ctx, c.Worker, fn, h.own, s.ReadOnly(), s.Export(), c.Conn.TLS)
	if h.ptr = r.Ptr; h.ptr == nil {
		h.free()
		return nil, f.failure(backend.Open, r)
	}
	return h, nil
}

// A filterHandle is what a filter's .open returned, with what stays the same for
// every call on it, and with the next session, which may change.
type filterHandle struct {
	f    *Filter
	s    *backend.Session
	conn *backend.Conn
	ctx  *cshim.Context
	own  *cshim.FilterContext
	ptr  unsafe.Pointer // the filter's, not to be looked into
	next atomic.Pointer[cshim.Next]
}

// String returns the pointer as C's %p prints it.
func (h *filterHandle) String() string { return fmt.Sprintf("%#x", uintptr(h.ptr)) }

func (h *filterHandle) free() {
	h.own.Free()
	h.ctx.Free()
}

func (h *filterHandle) openNext(c *backend.Call, readonly bool, export string) error {
	s, err := h.s.OpenNext(c, readonly, export)
	if err == nil {
		h.SetNext(h.f.newNext(s, h.conn))
	}
	return err
}

// OpenNext is what the filter's .open calls.
func (h *filterHandle) OpenNext(worker int, readonly bool, export string) cshim.Result {
	return answer(h.openNext(h.conn.Call(worker), readonly, export))
}

// SetNext is nbdkit_context_set_next(3).
func (h *filterHandle) SetNext(next *cshim.Next) (previous *cshim.Next) {
	var s *backend.Session
	if next != nil {
		n := next.Session.(*nextSession)
		n.over.Store(h.s)
		s = n.s
	}
	h.s.SetNext(s)
	h.own.SetNext(next)
	return h.next.Swap(next)
}

func (h *filterHandle) Prepare(c *backend.Call, readonly bool) error {
	return h.f.outcome(backend.Prepare, cshim.CallFilterPrepare(h.ctx, c.Worker, h.f.fn[backend.Prepare], h.next.Load(), h.ptr, readonly))
}

func (h *filterHandle) Finalize(c *backend.Call) error {
	return h.f.outcome(backend.Finalize, cshim.CallFilterInt(h.ctx, c.Worker, h.f.fn[backend.Finalize], h.next.Load(), h.ptr))
}

func (h *filterHandle) Close(c *backend.Call) {
	if fn := h.f.fn[backend.Close]; fn != nil {
		cshim.CallFilterClose(h.ctx, c.Worker, fn, h.ptr)
	}
	h.free()
}

func (h *filterHandle) GetSize(c *backend.Call) (int64, error) {
	r := cshim.CallFilterInt64(h.ctx, c.Worker, h.f.fn[backend.GetSize], h.next.Load(), h.ptr)
	return r.Ret, h.f.outcome(backend.GetSize, r)
}

func (h *filterHandle) ExportDescription(c *backend.Call) (string, bool) {
	return cshim.CallFilterString(h.ctx, c.Worker, h.f.fn[backend.ExportDescription], h.next.Load(), h.ptr)
}

func (h *filterHandle) BlockSize(c *backend.Call) (backend.BlockSize, error) {
	minimum, preferred, maximum, r := cshim.CallFilterBlockSize(h.ctx, c.Worker, h.f.fn[backend.BlockSizes], h.next.Load(), h.ptr)
	return backend.BlockSize{Min: minimum, Preferred: preferred, Max: maximum}, h.f.outcome(backend.BlockSizes, r)
}

func (h *filterHandle) Can(c *backend.Call, cb backend.Callback) (int, error) {
	r := cshim.CallFilterInt(h.ctx, c.Worker, h.f.fn[cb], h.next.Load(), h.ptr)
	return int(r.Ret), h.f.outcome(cb, r)
}

// The data calls. The flags have the same values on both sides.

func (h *filterHandle) data(c *backend.Call, cb backend.Callback, n uint32, off uint64, flags backend.Flags) cshim.Data {
	return cshim.Data{Ctx: h.ctx, Fn: h.f.fn[cb], Next: h.next.Load(), Handle: h.ptr, Worker: c.Worker, Cookie: c.Request.Cookie,
		Count: n, Offset: off, Flags: uint32(flags)}
}

func (h *filterHandle) Pread(c *backend.Call, b []byte, off uint64) error {
	return h.io(c, backend.Pread, b, off, 0)
}

func (h *filterHandle) Pwrite(c *backend.Call, b []byte, off uint64, flags backend.Flags) error {
	return h.io(c, backend.Pwrite, b, off, flags)
}

func (h *filterHandle) io(c *backend.Call, cb backend.Callback, b []byte, off uint64, flags backend.Flags) error {
	d := h.data(c, cb, uint32(len(b)), off, flags)
	d.Buf = unsafe.Pointer(unsafe.SliceData(b))
	defer runtime.KeepAlive(b)
	return h.f.outcome(cb, cshim.CallFilterIO(&d))
}

func (h *filterHandle) Flush(c *backend.Call) error {
	d := h.data(c, backend.Flush, 0, 0, 0)
	return h.f.outcome(backend.Flush, cshim.CallFilterFlush(&d))
}

func (h *filterHandle) Trim(c *backend.Call, n uint32, off uint64, flags backend.Flags) error {
	return h.ranged(c, backend.Trim, n, off, flags)
}

func (h *filterHandle) Zero(c *backend.Call, n uint32, off uint64, flags backend.Flags) error {
	return h.ranged(c, backend.Zero, n, off, flags)
}

func (h *filterHandle) Cache(c *backend.Call, n uint32, off uint64) error {
	return h.ranged(c, backend.Cache, n, off, 0)
}

func (h *filterHandle) ranged(c *backend.Call, cb backend.Callback, n uint32, off uint64, flags backend.Flags) error {
	d := h.data(c, cb, n, off, flags)
	return h.f.outcome(cb, cshim.CallFilterRange(&d))
}

func (h *filterHandle) Extents(c *backend.Call, n uint32, off uint64, flags backend.Flags, x *backend.Extents) error {
	d := h.data(c, backend.GetExtents, n, off, flags)
	r, err := cshim.CallFilterExtents(&d, x.Add)
	if err != nil {
		return err
	}
	return h.f.outcome(backend.GetExtents, r)
}

// What a filter asks of the layers below.

// hostLog is where errors go that no module has logged; set by Init.
var hostLog func(Message)

// answer turns an error into what a filter is told. One that nobody has logged yet
// is logged here, since the filter will only pass its number on.
func answer(err error) cshim.Result {
	if err == nil {
		return cshim.Result{}
	}
	r := cshim.Result{Ret: -1, Errno: syscall.EIO}
	errors.As(err, &r.Errno)
	if failed := (*backend.Error)(nil); errors.As(err, &failed) {
		r.Msg, r.Module = failed.Msg, failed.Module
		return r
	}
	r.Msg = err.Error()
	if hostLog != nil {
		hostLog(Message{Level: slog.LevelError, Worker: backend.Handshake, Text: r.Msg})
	}
	return r
}

// below is the next layer of a filter, outside of sessions.
type below struct{ f *Filter }

// call returns the call that a thread makes; conn is 0 where it makes it on behalf
// of no client.
func (b below) call(conn uint64, worker int) *backend.Call {
	if c := connByID(conn); c != nil {
		return c.Call(worker)
	}
	return b.f.next.Shared().Call(worker)
}

func (b below) Config(key, value string) cshim.Result {
	return answer(b.f.next.Config(key, value))
}

func (b below) ConfigComplete() cshim.Result { return answer(b.f.next.ConfigComplete()) }

func (b below) Preconnect(conn uint64, worker int, readonly bool) cshim.Result {
	return answer(b.f.next.Preconnect(b.call(conn, worker), readonly))
}

func (b below) ListExports(conn uint64, worker int, readonly bool) ([]cshim.Export, cshim.Result) {
	list, err := b.f.next.ListExports(b.call(conn, worker), readonly)
	exports := make([]cshim.Export, 0, len(list))
	for _, e := range list {
		exports = append(exports, cshim.Export{Name: e.Name, Description: e.Description})
	}
	return exports, answer(err)
}

func (b below) DefaultExport(conn uint64, worker int, readonly bool) (string, bool) {
	return b.f.next.DefaultExport(b.call(conn, worker), readonly)
}

func (b below) Open(conn uint64, worker int, readonly bool, export string, shared bool) (*cshim.Next, cshim.Result) {
	if shared {
		conn = 0
	}
	c := b.call(conn, worker)
	s, err := b.f.next.Open(c, readonly, export)
	if err != nil {
		return nil, answer(err)
	}
	return b.f.newNext(s, c.Conn), cshim.Result{}
}

// newNext makes what the filter is given for a session of the next layer, which
// belongs to conn.
func (f *Filter) newNext(s *backend.Session, conn *backend.Conn) *cshim.Next {
	session := &nextSession{s: s, conn: conn}
	session.next = cshim.NewNext(session, f.raw.Release)
	s.OnClose = session.next.Free
	return session.next
}

// A nextSession is an open session of the layer below a filter.
type nextSession struct {
	s    *backend.Session
	conn *backend.Conn
	next *cshim.Next
	over atomic.Pointer[backend.Session] // the filter's, if it was ever put below one

	reads, writes atomic.Bool // it was looked whether they can be direct
}

func (n *nextSession) call(worker int) *backend.Call { return n.conn.Call(worker) }

func (n *nextSession) Prepare(worker int) cshim.Result { return answer(n.s.Prepare(n.call(worker))) }
func (n *nextSession) Finalize(worker int) cshim.Result {
	return answer(n.s.Finalize(n.call(worker)))
}

// Close takes the session away from where it is, since a filter may close it first
// and say so later.
func (n *nextSession) Close(worker int) {
	if over := n.over.Load(); over != nil {
		over.DropNext(n.s)
	}
	n.s.Close(n.call(worker))
}

func (n *nextSession) GetSize(worker int) cshim.Result {
	size, err := n.s.Size(n.call(worker))
	return number(int64(size), err)
}

// number is the answer to what has a number for one.
func number(v int64, err error) cshim.Result {
	r := answer(err)
	if err == nil {
		r.Ret = v
	}
	return r
}

func (n *nextSession) ExportDescription(worker int) (string, bool) {
	return n.s.ExportDescription(n.call(worker))
}

func (n *nextSession) BlockSize(worker int) (minimum, preferred, maximum uint32, r cshim.Result) {
	b, err := n.s.BlockSize(n.call(worker))
	return b.Min, b.Preferred, b.Max, answer(err)
}

var capabilities = map[cshim.Capability]backend.Callback{
	cshim.CanWrite: backend.CanWrite, cshim.CanFlush: backend.CanFlush,
	cshim.IsRotational: backend.IsRotational, cshim.CanTrim: backend.CanTrim,
	cshim.CanZero: backend.CanZero, cshim.CanFastZero: backend.CanFastZero,
	cshim.CanExtents: backend.CanExtents, cshim.CanFUA: backend.CanFUA,
	cshim.CanMultiConn: backend.CanMultiConn, cshim.CanCache: backend.CanCache,
}

func (n *nextSession) Can(worker int, what cshim.Capability) cshim.Result {
	v, err := n.s.Can(n.call(worker), capabilities[what])
	return number(int64(v), err)
}

func (n *nextSession) Pread(worker int, p []byte, off uint64) cshim.Result {
	c := n.call(worker)
	err := n.s.Pread(c, p, off)
	if err == nil && !n.reads.Swap(true) {
		n.direct(c, backend.Pread)
	}
	return answer(err)
}

func (n *nextSession) Pwrite(worker int, p []byte, off uint64, flags uint32) cshim.Result {
	c := n.call(worker)
	err := n.s.Pwrite(c, p, off, backend.Flags(flags))
	if err == nil && !n.writes.Swap(true) {
		n.direct(c, backend.Pwrite)
	}
	return answer(err)
}

// direct has the filter's calls of cb go to the module below without Go, where nothing more
// is to be decided about them. It comes after one that succeeded, so what the session asks once
// is known.
func (n *nextSession) direct(c *backend.Call, cb backend.Callback) {
	d, ok := n.s.Direct(c, cb)
	if !ok {
		return
	}
	if h, ok := d.Handle.(directHandle); ok {
		if data, filter, ok := h.direct(c, cb); ok {
			n.next.Direct(cb == backend.Pwrite, &data, filter, d.Size, d.Calls)
		}
	}
}

func (n *nextSession) Flush(worker int) cshim.Result { return answer(n.s.Flush(n.call(worker))) }

func (n *nextSession) Trim(worker int, count uint32, off uint64, flags uint32) cshim.Result {
	return answer(n.s.Trim(n.call(worker), count, off, backend.Flags(flags)))
}

func (n *nextSession) Zero(worker int, count uint32, off uint64, flags uint32) cshim.Result {
	return answer(n.s.Zero(n.call(worker), count, off, backend.Flags(flags)))
}

func (n *nextSession) Cache(worker int, count uint32, off uint64) cshim.Result {
	return answer(n.s.Cache(n.call(worker), count, off))
}

func (n *nextSession) Extents(worker int, count uint32, off uint64, flags uint32) ([]cshim.Extent, cshim.Result) {
	var x backend.Extents
	if err := n.s.Extents(n.call(worker), count, off, backend.Flags(flags), &x); err != nil {
		return nil, answer(err)
	}
	list := make([]cshim.Extent, 0, len(x.List()))
	for _, e := range x.List() {
		list = append(list, cshim.Extent(e))
	}
	return list, cshim.Result{}
}
