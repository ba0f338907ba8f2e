package cshim

// #include "shim.h"
// // What cgo generates has parameters that it does not use.
// #pragma GCC diagnostic ignored "-Wunused-parameter"
import "C"

import (
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"unsafe"

	"nbdhost/abi"
)

// Workers of calls that no worker of a connection makes.
const (
	Handshake = C.NBDHOST_HANDSHAKE
	Foreign   = C.NBDHOST_FOREIGN // a thread that a module made
)

// Below is what a filter may ask of the next layer outside of sessions. conn is the
// number of the connection of the thread that asks, 0 for none; worker is that
// thread's, Handshake or Foreign. As with [Host], a panic answers EIO.
type Below interface {
	Config(key, value string) Result
	ConfigComplete() Result
	Preconnect(conn uint64, worker int, readonly bool) Result
	ListExports(conn uint64, worker int, readonly bool) ([]Export, Result)
	DefaultExport(conn uint64, worker int, readonly bool) (string, bool)
	// Open is nbdkit_next_context_open(3).
	Open(conn uint64, worker int, readonly bool, export string, shared bool) (*Next, Result)
}

// OpenFilter is what a filter may ask of its own open session.
type OpenFilter interface {
	// OpenNext is the next of .open.
	OpenNext(worker int, readonly bool, export string) Result
	// SetNext is nbdkit_context_set_next(3); next and previous may be nil, and
	// previous may have been freed.
	SetNext(next *Next) (previous *Next)
}

// NextSession is what a filter may ask of an open session of the next layer: struct
// nbdkit_next_ops. Numbers are in Ret.
type NextSession interface {
	Prepare(worker int) Result
	Finalize(worker int) Result
	// Close is nbdkit_next_context_close(3).
	Close(worker int)
	GetSize(worker int) Result
	ExportDescription(worker int) (string, bool)
	BlockSize(worker int) (minimum, preferred, maximum uint32, r Result)
	Can(worker int, what Capability) Result

	// p is the filter's, and the callee's for the call.
	Pread(worker int, p []byte, off uint64) Result
	Pwrite(worker int, p []byte, off uint64, flags uint32) Result
	Flush(worker int) Result
	Trim(worker int, n uint32, off uint64, flags uint32) Result
	Zero(worker int, n uint32, off uint64, flags uint32) Result
	Cache(worker int, n uint32, off uint64) Result
	Extents(worker int, n uint32, off uint64, flags uint32) ([]Extent, Result)
}

// A Capability is one of the questions with a number for an answer.
type Capability int

// What [NextSession].Can is asked.
const (
	CanWrite     Capability = C.NBDHOST_CAN_WRITE
	CanFlush     Capability = C.NBDHOST_CAN_FLUSH
	IsRotational Capability = C.NBDHOST_IS_ROTATIONAL
	CanTrim      Capability = C.NBDHOST_CAN_TRIM
	CanZero      Capability = C.NBDHOST_CAN_ZERO
	CanFastZero  Capability = C.NBDHOST_CAN_FAST_ZERO
	CanExtents   Capability = C.NBDHOST_CAN_EXTENTS
	CanFUA       Capability = C.NBDHOST_CAN_FUA
	CanMultiConn Capability = C.NBDHOST_CAN_MULTI_CONN
	CanCache     Capability = C.NBDHOST_CAN_CACHE
)

// The objects that filters hold, by the handle in them.
var (
	backends handles[Below]
	contexts handles[OpenFilter]
	nexts    handles[*Next]
)

// Backend is the C object for a [Below]: the nxdata of a filter's callbacks. It is
// never freed, as the filter may keep it until the process ends.
type Backend struct{ c *C.struct_nbdkit_backend }

// NewBackend makes the object for b.
func NewBackend(b Below) *Backend {
	c := C.nbdhost_backend_new(C.uint64_t(backends.add(b)))
	if c == nil {
		panic("cshim: out of memory")
	}
	// Not a leak: see the type.
	C.nbdhost_live_add(-1)
	return &Backend{c}
}

func (b *Backend) ptr() *C.struct_nbdkit_backend {
	if b == nil {
		return nil
	}
	return b.c
}

// FilterContext is the C object for an [OpenFilter]: the context of .open.
type FilterContext struct {
	c      *C.struct_nbdkit_context
	handle uint64
	next   *Next // of links
}

// links is held while a filter gets another session below it, while C learns of a direct
// way to one, and while one goes away: C keeps no pointer to a [Next] that is freed, however
// many filters have it.
var links sync.Mutex

// NewFilterContext makes the object for o, a session of the filter that has b.
func NewFilterContext(o OpenFilter, b *Backend) *FilterContext {
	handle := contexts.add(o)
	c := C.nbdhost_filter_context_new(C.uint64_t(handle), b.c)
	if c == nil {
		panic("cshim: out of memory")
	}
	return &FilterContext{c: c, handle: handle}
}

// Handle returns what stands for the handle of a filter that has no .open.
func (f *FilterContext) Handle() unsafe.Pointer { return unsafe.Pointer(f.c) }

// SetNext says what is below the filter from now on; nil for nothing.
func (f *FilterContext) SetNext(next *Next) {
	links.Lock()
	defer links.Unlock()
	if was := f.next; was != nil {
		was.over = slices.DeleteFunc(was.over, func(over *FilterContext) bool { return over == f })
	}
	if next.ptr() == nil { // freed already, or none
		next = nil
	}
	f.next = next
	if next != nil {
		next.over = append(next.over, f)
	}
	C.nbdhost_filter_set_next(f.c, next.ptr())
}

// Free frees the object once .close has returned.
func (f *FilterContext) Free() {
	f.SetNext(nil)
	contexts.remove(f.handle)
	C.nbdhost_filter_object_free(unsafe.Pointer(f.c))
	f.c = nil
}

// Next is the C object for a [NextSession], which begins with struct
// nbdkit_next_ops.
type Next struct {
	Session NextSession
	c       C.nbdhost_next // not to be followed once it is freed
	handle  uint64
	freed   atomic.Bool
	over    []*FilterContext // whose next it is; of links
	calls   runtime.Pinner   // of links
}

// NewNext makes the object for s, in the layout of the filter that is given it.
func NewNext(s NextSession, r abi.Release) *Next {
	n := &Next{Session: s}
	n.handle = nexts.add(n)
	n.c = C.nbdhost_next_new(C.uint64_t(n.handle), C.bool(r.NextHasBlockSize()), C.bool(r.Extents64()))
	if n.c == nil {
		panic("cshim: out of memory")
	}
	return n
}

// Direct makes the filter's reads, or its writes without flags, go to the module below
// without Session: d says what is called, but for the arguments, over is the module's if it is
// a filter, ranges that are not within size bytes still go to Session, and calls counts. Once
// at most for reads and for writes, while the session is open.
func (n *Next) Direct(write bool, d *Data, over *FilterContext, size uint64, calls *atomic.Uint64) {
	var c *C.struct_nbdkit_context
	if over != nil {
		c = over.c
	}
	links.Lock()
	defer links.Unlock()
	if n.freed.Load() {
		return
	}
	n.calls.Pin(calls)
	C.nbdhost_next_direct(n.c, C.bool(write), d.c(), c, C.uint64_t(size), (*C.uint64_t)(unsafe.Pointer(calls)))
}

// Free frees the object once its session has been closed.
func (n *Next) Free() {
	links.Lock()
	n.freed.Store(true)
	for _, f := range n.over {
		f.next = nil
		C.nbdhost_filter_set_next(f.c, nil)
	}
	n.calls.Unpin()
	links.Unlock()
	nexts.remove(n.handle)
	C.nbdhost_filter_object_free(unsafe.Pointer(n.c))
}

func (n *Next) ptr() C.nbdhost_next {
	if n == nil || n.freed.Load() {
		return nil
	}
	return n.c
}

// address is where the object is or was: filters compare it.
func (n *Next) address() unsafe.Pointer {
	if n == nil {
		return nil
	}
	return unsafe.Pointer(n.c)
}

// Calls into filters. A nil *Next is NULL: nothing is open below.

// CallFilterConfig calls .config.
func CallFilterConfig(fn unsafe.Pointer, b *Backend, key, value CStr) Result {
	return result(C.nbdhost_filter_config(fn, b.ptr(), key.p, value.p))
}

// CallFilterConfigComplete calls .config_complete.
func CallFilterConfigComplete(fn unsafe.Pointer, b *Backend) Result {
	return result(C.nbdhost_filter_config_complete(fn, b.ptr()))
}

// CallFilterModel calls .thread_model, to which older filters have no parameter, or
// .get_ready.
func CallFilterModel(fn unsafe.Pointer, model int) Result {
	return result(C.nbdhost_filter_model(fn, C.int(model)))
}

// CallFilterAfterFork calls .after_fork.
func CallFilterAfterFork(fn unsafe.Pointer, b *Backend) Result {
	return result(C.nbdhost_filter_after_fork(fn, b.ptr()))
}

// CallFilterCleanup calls .cleanup.
func CallFilterCleanup(fn unsafe.Pointer, b *Backend) { C.nbdhost_filter_cleanup(fn, b.ptr()) }

// CallFilterPreconnect calls .preconnect.
func CallFilterPreconnect(ctx *Context, fn unsafe.Pointer, b *Backend, readonly bool) Result {
	return result(C.nbdhost_filter_preconnect(ctx.ptr(), fn, b.ptr(), cbool(readonly)))
}

// CallFilterListExports calls .list_exports, as [CallListExports].
func CallFilterListExports(ctx *Context, fn unsafe.Pointer, b *Backend, readonly, tls bool) ([]Export, Result) {
	return exportList(C.nbdhost_filter_list_exports(ctx.ptr(), fn, b.ptr(), cbool(readonly), cbool(tls)))
}

// CallFilterDefaultExport calls .default_export, as [CallDefaultExport].
func CallFilterDefaultExport(ctx *Context, fn unsafe.Pointer, b *Backend, readonly, tls bool) (name string, ok bool) {
	return str(C.nbdhost_filter_default_export(ctx.ptr(), fn, b.ptr(), cbool(readonly), cbool(tls)))
}

// CallFilterOpen calls .open; the handle is in Ptr.
func CallFilterOpen(ctx *Context, worker int, fn unsafe.Pointer, f *FilterContext, readonly bool, export string, tls bool) Result {
	name := C.CString(export)
	defer C.free(unsafe.Pointer(name))
	return result(C.nbdhost_filter_open(ctx.ptr(), C.int(worker), fn, f.c, cbool(readonly), name, cbool(tls)))
}

// CallFilterClose calls .close.
func CallFilterClose(ctx *Context, worker int, fn, handle unsafe.Pointer) {
	C.nbdhost_filter_close(ctx.ptr(), C.int(worker), fn, handle)
}

// CallFilterPrepare calls .prepare.
func CallFilterPrepare(ctx *Context, worker int, fn unsafe.Pointer, n *Next, handle unsafe.Pointer, readonly bool) Result {
	return result(C.nbdhost_filter_prepare(ctx.ptr(), C.int(worker), fn, n.ptr(), handle, cbool(readonly)))
}

// CallFilterInt calls .finalize, .can_* or .is_rotational.
func CallFilterInt(ctx *Context, worker int, fn unsafe.Pointer, n *Next, handle unsafe.Pointer) Result {
	return result(C.nbdhost_filter_int(ctx.ptr(), C.int(worker), fn, n.ptr(), handle))
}

// CallFilterInt64 calls .get_size.
func CallFilterInt64(ctx *Context, worker int, fn unsafe.Pointer, n *Next, handle unsafe.Pointer) Result {
	return result(C.nbdhost_filter_int64(ctx.ptr(), C.int(worker), fn, n.ptr(), handle))
}

// CallFilterString calls .export_description, as [CallHandleString].
func CallFilterString(ctx *Context, worker int, fn unsafe.Pointer, n *Next, handle unsafe.Pointer) (string, bool) {
	return str(C.nbdhost_filter_string(ctx.ptr(), C.int(worker), fn, n.ptr(), handle))
}

// CallFilterBlockSize calls .block_size. Sizes are in bytes.
func CallFilterBlockSize(ctx *Context, worker int, fn unsafe.Pointer, n *Next, handle unsafe.Pointer) (minimum, preferred, maximum uint32, r Result) {
	b := C.nbdhost_filter_block_size(ctx.ptr(), C.int(worker), fn, n.ptr(), handle)
	return uint32(b.minimum), uint32(b.preferred), uint32(b.maximum), result(b.r)
}

// CallFilterIO calls .pread or .pwrite, as [CallPread].
func CallFilterIO(d *Data) Result { return result(C.nbdhost_filter_io(d.c())) }

// CallFilterFlush calls .flush.
func CallFilterFlush(d *Data) Result { return result(C.nbdhost_filter_flush(d.c())) }

// CallFilterRange calls .trim, .zero or .cache.
func CallFilterRange(d *Data) Result { return result(C.nbdhost_filter_range(d.c())) }

// CallFilterExtents calls .extents, as [CallExtents].
func CallFilterExtents(d *Data, add func(offset, length uint64, typ uint32) error) (Result, error) {
	return eachExtent(C.nbdhost_filter_extents(d.c()), add)
}

// Requests of filters.

// failure puts an error into a request; the text is C's.
func failure(q *C.struct_nbdhost_request, r Result) {
	if r.Errno == 0 {
		r.Errno = syscall.EIO
	}
	q.ret, q.err = -1, C.int(r.Errno)
	if r.Msg != "" {
		q.text = C.CString(r.Msg)
	}
	if name, ok := moduleNames.Load(r.Module); ok {
		q.module = name.(CStr).p
	}
}

func outcome(q *C.struct_nbdhost_request, r Result) {
	if r.Errno != 0 || r.Ret < 0 {
		failure(q, r)
		return
	}
	q.ret = C.int64_t(r.Ret)
}

// answerText puts a text, or that there is none, into a request.
func answerText(q *C.struct_nbdhost_request, text string, ok bool) {
	if !ok {
		failure(q, Result{})
		return
	}
	q.ret, q.text = 0, C.CString(text)
}

// stale answers a request to what is not there: it was closed, or never opened.
func stale(q *C.struct_nbdhost_request, what string) {
	failure(q, Result{Errno: syscall.EBADF, Msg: "the filter uses " + what + " that is not open"})
}

//export nbdhost_go_backend
func nbdhost_go_backend(q *C.struct_nbdhost_request) {
	defer recovered("request of a filter")
	b, ok := backends.get(uint64(q.id))
	if !ok {
		stale(q, "a next layer")
		return
	}
	conn, worker, readonly := uint64(q.conn), int(q.worker), q.readonly != 0
	switch q.op {
	case C.NBDHOST_CONFIG:
		outcome(q, b.Config(C.GoString(q.key), C.GoString(q.value)))
	case C.NBDHOST_CONFIG_COMPLETE:
		outcome(q, b.ConfigComplete())
	case C.NBDHOST_PRECONNECT:
		outcome(q, b.Preconnect(conn, worker, readonly))
	case C.NBDHOST_LIST_EXPORTS:
		list, r := b.ListExports(conn, worker, readonly)
		for _, e := range list {
			if r.Errno == 0 {
				r.Errno = addExport((*C.struct_nbdkit_exports)(q.list), e)
			}
		}
		outcome(q, r)
	case C.NBDHOST_DEFAULT_EXPORT:
		name, ok := b.DefaultExport(conn, worker, readonly)
		answerText(q, name, ok)
	case C.NBDHOST_CONTEXT_OPEN:
		next, r := b.Open(conn, worker, readonly, C.GoString(q.value), q.shared != 0)
		q.ptr = unsafe.Pointer(next.ptr())
		outcome(q, r)
	}
}

func addExport(list *C.struct_nbdkit_exports, e Export) syscall.Errno {
	name, description := C.CString(e.Name), (*C.char)(nil)
	defer C.free(unsafe.Pointer(name))
	if e.Description != "" {
		description = C.CString(e.Description)
		defer C.free(unsafe.Pointer(description))
	}
	if C.nbdkit_add_export(list, name, description) == -1 {
		return syscall.EINVAL
	}
	return 0
}

//export nbdhost_go_context
func nbdhost_go_context(q *C.struct_nbdhost_request) {
	defer recovered("request of a filter")
	o, ok := contexts.get(uint64(q.id))
	if !ok {
		stale(q, "a context")
		return
	}
	switch q.op {
	case C.NBDHOST_OPEN:
		outcome(q, o.OpenNext(int(q.worker), q.readonly != 0, C.GoString(q.value)))
	case C.NBDHOST_SET_NEXT:
		var next *Next
		if q.next != 0 {
			if next, ok = nexts.get(uint64(q.next)); !ok {
				stale(q, "a next")
				return
			}
		}
		q.ptr = o.SetNext(next).address()
		q.ret = 0
	}
}

//export nbdhost_go_next
func nbdhost_go_next(q *C.struct_nbdhost_request) {
	defer recovered("request of a filter")
	n, ok := nexts.get(uint64(q.id))
	if !ok {
		stale(q, "a next")
		return
	}
	s, worker := n.Session, int(q.worker)
	count, offset, flags := uint32(q.count), uint64(q.offset), uint32(q.flags)
	switch q.op {
	case C.NBDHOST_PREAD:
		outcome(q, s.Pread(worker, unsafe.Slice((*byte)(q.buf), count), offset))
	case C.NBDHOST_PWRITE:
		outcome(q, s.Pwrite(worker, unsafe.Slice((*byte)(q.buf), count), offset, flags))
	case C.NBDHOST_FLUSH:
		outcome(q, s.Flush(worker))
	case C.NBDHOST_TRIM:
		outcome(q, s.Trim(worker, count, offset, flags))
	case C.NBDHOST_ZERO:
		outcome(q, s.Zero(worker, count, offset, flags))
	case C.NBDHOST_CACHE:
		outcome(q, s.Cache(worker, count, offset))
	case C.NBDHOST_EXTENTS:
		list, r := s.Extents(worker, count, offset, flags)
		if r.Errno == 0 && len(list) > 0 {
			// An Extent is a struct nbdkit_extent, without pointers.
			e := (*C.struct_nbdkit_extent)(unsafe.Pointer(unsafe.SliceData(list)))
			r.Errno = syscall.Errno(C.nbdhost_extents_append((*C.struct_nbdkit_extents)(q.list), e, C.size_t(len(list))))
		}
		outcome(q, r)
	case C.NBDHOST_PREPARE:
		outcome(q, s.Prepare(worker))
	case C.NBDHOST_FINALIZE:
		outcome(q, s.Finalize(worker))
	case C.NBDHOST_CLOSE:
		s.Close(worker)
		q.ret = 0
	case C.NBDHOST_GET_SIZE:
		outcome(q, s.GetSize(worker))
	case C.NBDHOST_EXPORT_DESCRIPTION:
		text, ok := s.ExportDescription(worker)
		answerText(q, text, ok)
	case C.NBDHOST_BLOCK_SIZE:
		minimum, preferred, maximum, r := s.BlockSize(worker)
		q.minimum, q.preferred, q.maximum = C.uint32_t(minimum), C.uint32_t(preferred), C.uint32_t(maximum)
		outcome(q, r)
	default:
		outcome(q, s.Can(worker, Capability(q.op)))
	}
}
