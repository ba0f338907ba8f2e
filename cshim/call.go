package cshim

// #cgo CFLAGS: -Wall -Wextra -Werror -fvisibility=hidden -O2
// #cgo LDFLAGS: -Wl,--export-dynamic -lm
// #include "shim.h"
// // What cgo generates has parameters that it does not use.
// #pragma GCC diagnostic ignored "-Wunused-parameter"
import "C"

import (
	"strings"
	"syscall"
	"unsafe"
)

// maxString bounds what is read from a C string that should hold at most 4096
// bytes: one more, so that the caller can tell that it is too long.
const maxString = 4097

// Result is the outcome of a callback.
type Result struct {
	Ret int64          // what the callback returned; negative: it failed
	Ptr unsafe.Pointer // what .open returned; nil: it failed
	// Errno of a callback that failed: nbdkit_set_error's value, else errno if
	// the module preserves it, else EIO. 0 on success.
	Errno syscall.Errno
	Msg   string // last nbdkit_error of a callback that failed
	// Module is the name of the one that the error is from: which of those that a
	// filter called has failed, if the filter has not called nbdkit_error since. "" is unknown.
	Module string
}

func result(r C.struct_nbdhost_result) Result {
	res := Result{Ret: int64(r.ret), Ptr: r.ptr, Errno: syscall.Errno(r.err)}
	if r.message != nil {
		res.Msg = C.GoString(r.message)
		C.free(unsafe.Pointer(r.message))
	}
	if r.module != nil {
		res.Module = C.GoString(r.module)
	}
	return res
}

func cbool(b bool) C.int {
	if b {
		return 1
	}
	return 0
}

// boundedString copies at most [maxString] bytes of a C string.
func boundedString(p unsafe.Pointer) string {
	b := unsafe.Slice((*byte)(p), maxString)
	for i := range b {
		// Element by element: memory beyond the NUL may not be there.
		if b[i] == 0 {
			return string(b[:i])
		}
	}
	return string(b)
}

// CStr is a C string that lives until the process exits.
type CStr struct{ p *C.char }

// NewCStr copies s, up to its first NUL, into C memory that is never freed:
// modules keep the keys and values they are given.
func NewCStr(s string) CStr {
	s, _, _ = strings.Cut(s, "\x00")
	c := C.CString(s)
	defer C.free(unsafe.Pointer(c))
	return CStr{C.nbdhost_intern(nil, c, C.size_t(len(s)))}
}

// Fn converts the address that dlsym gave to a pointer.
func Fn(addr uintptr) unsafe.Pointer { return *(*unsafe.Pointer)(unsafe.Pointer(&addr)) }

// Conn is a client connection as modules see it. It is C memory: Free it
// after the last call and the last [Context] that use it.
type Conn struct{ c *C.struct_nbdhost_conn }

// NewConn makes the connection with number id, counted from 1. fd is its socket,
// -1 if there is none; it is borrowed and must stay open until Free.
func NewConn(id uint64, fd int) *Conn {
	c := C.nbdhost_conn_new(C.uint64_t(id), C.int(fd))
	if c == nil {
		panic("cshim: out of memory")
	}
	return &Conn{c}
}

// SetFD changes the socket. Not during a call.
func (c *Conn) SetFD(fd int) { c.c.fd = C.int(fd) }

// SetTLS says whether TLS has been negotiated. A change must not come during a call.
func (c *Conn) SetTLS(on bool) {
	if v := cbool(on); c.c.tls != v {
		c.c.tls = v
	}
}

// TLS tells whether TLS has been negotiated.
func (c *Conn) TLS() bool { return c.c.tls != 0 }

// SetTLSDN sets the distinguished names (RFC 4514) of the client's certificate and
// of its issuer. Not during a call.
func (c *Conn) SetTLSDN(dn, issuer string) {
	d, i := C.CString(dn), C.CString(issuer)
	defer C.free(unsafe.Pointer(d))
	defer C.free(unsafe.Pointer(i))
	C.nbdhost_conn_set_dn(c.c, d, i)
}

// Free frees the connection and the strings that modules interned in it.
func (c *Conn) Free() {
	C.nbdhost_conn_free(c.c)
	c.c = nil
}

// Context is what a module may ask about the call it is in: the connection,
// the export's name. One per open handle, and one per phase before .open.
// It is C memory, may be used by any number of calls at once, and is not
// changed after the first. A nil *Context is a call outside any connection.
type Context struct{ c *C.struct_nbdhost_context }

// NewContext makes a context. conn may be nil. exportName counts only if
// hasExport is set. errnoIsPreserved is the field of the module's struct.
func NewContext(conn *Conn, exportName string, hasExport, errnoIsPreserved bool) *Context {
	var cc *C.struct_nbdhost_conn
	if conn != nil {
		cc = conn.c
	}
	var name *C.char
	if hasExport {
		name = C.CString(exportName)
		defer C.free(unsafe.Pointer(name))
	}
	c := C.nbdhost_context_new(cc, name, cbool(errnoIsPreserved))
	if c == nil {
		panic("cshim: out of memory")
	}
	return &Context{c}
}

// SetTLS says what nbdkit_is_tls(3) returns in a session of no connection. It comes
// before the first call that uses the context.
func (c *Context) SetTLS(on bool) { c.c.tls = cbool(on) }

// Free frees the context, after the last call that uses it.
func (c *Context) Free() {
	C.nbdhost_context_free(c.c)
	c.c = nil
}

func (c *Context) ptr() *C.struct_nbdhost_context {
	if c == nil {
		return nil
	}
	return c.c
}

// A Within is the callback of a module that a thread is in.
type Within struct{ f *C.struct_nbdhost_frame }

// CurrentCall returns the innermost callback that this thread is in, if it is in one. The
// goroutine must be locked to it, as it is wherever that matters: in a callback.
func CurrentCall() Within { return Within{C.nbdhost_get_frame()} }

// Do makes call's calls into modules those of w, whose thread waits until it returns.
// The goroutine must be locked to its thread.
func (w Within) Do(call func()) {
	before := C.nbdhost_set_frame(w.f)
	defer C.nbdhost_set_frame(before)
	call()
}

// CallVoid calls .load, .unload, .dump_plugin or .cleanup.
func CallVoid(ctx *Context, fn unsafe.Pointer) { C.nbdhost_call_void(ctx.ptr(), fn) }

// CallInt calls .config_complete, .thread_model, .get_ready or .after_fork.
func CallInt(ctx *Context, fn unsafe.Pointer) Result {
	return result(C.nbdhost_call_int(ctx.ptr(), fn))
}

// CallConfig calls .config.
func CallConfig(ctx *Context, fn unsafe.Pointer, key, value CStr) Result {
	return result(C.nbdhost_call_config(ctx.ptr(), fn, key.p, value.p))
}

// CallPreconnect calls .preconnect.
func CallPreconnect(ctx *Context, fn unsafe.Pointer, readonly bool) Result {
	return result(C.nbdhost_call_preconnect(ctx.ptr(), fn, cbool(readonly)))
}

// Export is an entry of the list that .list_exports made.
type Export struct {
	Name, Description string
	// Default: the module called nbdkit_use_default_export. The caller puts
	// the answer of .default_export here, or drops the entry if there is none.
	Default bool
}

// CallListExports calls .list_exports. A Default entry comes last.
func CallListExports(ctx *Context, fn unsafe.Pointer, readonly, tls bool) ([]Export, Result) {
	return exportList(C.nbdhost_call_list_exports(ctx.ptr(), fn, cbool(readonly), cbool(tls)))
}

func exportList(r C.struct_nbdhost_result) ([]Export, Result) {
	res := result(r)
	list := (*C.struct_nbdkit_exports)(res.Ptr)
	res.Ptr = nil
	if list == nil {
		return nil, res
	}
	defer C.nbdkit_exports_free(list)
	if res.Ret < 0 {
		return nil, res
	}
	exports := make([]Export, 0, len(unsafe.Slice(list.list, list.len))+1)
	for _, e := range unsafe.Slice(list.list, list.len) {
		exports = append(exports, Export{Name: C.GoString(e.name), Description: C.GoString(e.description)})
	}
	if list.use_default {
		exports = append(exports, Export{Default: true})
	}
	return exports, res
}

// CallDefaultExport calls .default_export. A name is cut at 4097 bytes, one more
// than a valid one has. Not ok: the module returned NULL.
func CallDefaultExport(ctx *Context, fn unsafe.Pointer, readonly, tls bool) (name string, ok bool) {
	return str(C.nbdhost_call_default_export(ctx.ptr(), fn, cbool(readonly), cbool(tls)))
}

func str(r C.struct_nbdhost_result) (string, bool) {
	if res := result(r); res.Ptr != nil {
		return boundedString(res.Ptr), true
	}
	return "", false
}

// CallOpen calls .open; the handle is in Ptr.
func CallOpen(ctx *Context, fn unsafe.Pointer, readonly bool) Result {
	return result(C.nbdhost_call_open(ctx.ptr(), fn, cbool(readonly)))
}

// CallClose calls .close.
func CallClose(ctx *Context, fn, handle unsafe.Pointer) {
	C.nbdhost_call_close(ctx.ptr(), fn, handle)
}

// CallHandleInt calls .can_* or .is_rotational.
func CallHandleInt(ctx *Context, fn, handle unsafe.Pointer) Result {
	return result(C.nbdhost_call_handle_int(ctx.ptr(), fn, handle))
}

// CallHandleInt64 calls .get_size.
func CallHandleInt64(ctx *Context, fn, handle unsafe.Pointer) Result {
	return result(C.nbdhost_call_handle_int64(ctx.ptr(), fn, handle))
}

// CallHandleString calls .export_description. A text is cut at 4097 bytes, one
// more than a valid one has. Not ok: the module returned NULL.
func CallHandleString(ctx *Context, fn, handle unsafe.Pointer) (string, bool) {
	return str(C.nbdhost_call_handle_string(ctx.ptr(), fn, handle))
}

// CallBlockSize calls .block_size. Sizes are in bytes.
func CallBlockSize(ctx *Context, fn, handle unsafe.Pointer) (minimum, preferred, maximum uint32, r Result) {
	b := C.nbdhost_call_block_size(ctx.ptr(), fn, handle)
	return uint32(b.minimum), uint32(b.preferred), uint32(b.maximum), result(b.r)
}

// Data is a data callback with its arguments, as far as it has them.
type Data struct {
	Ctx    *Context
	Fn     unsafe.Pointer
	Next   *Next // of a filter
	Handle unsafe.Pointer
	// Worker and Cookie say which of a client's requests the call is for: the worker of
	// the connection, from 0, or Handshake or Foreign, for log lines, and the client's
	// cookie, for crash reports as well. Where a callback of a filter makes the call, on
	// the same thread, it is the filter's request.
	Worker int
	Cookie uint64
	Buf    unsafe.Pointer // the callee's for this call; who calls keeps it alive
	Count  uint32
	Offset uint64
	Flags  uint32
}

func (d *Data) c() C.struct_nbdhost_data {
	return C.struct_nbdhost_data{
		ctx: number(unsafe.Pointer(d.Ctx.ptr())), fn: number(d.Fn),
		next: number(unsafe.Pointer(d.Next.ptr())), handle: number(d.Handle),
		worker: C.int(d.Worker), cookie: C.uint64_t(d.Cookie),
		buf: number(d.Buf), count: C.uint32_t(d.Count), flags: C.uint32_t(d.Flags), offset: C.uint64_t(d.Offset),
	}
}

// number is for pointers to what does not move: the garbage collector does not see it.
func number(p unsafe.Pointer) C.uintptr_t { return C.uintptr_t(uintptr(p)) }

// CallPread calls .pread: Count bytes at Offset into Buf.
func CallPread(d *Data) Result { return result(C.nbdhost_call_pread(d.c())) }

// CallPwrite calls .pwrite, as [CallPread].
func CallPwrite(d *Data) Result { return result(C.nbdhost_call_pwrite(d.c())) }

// CallFlush calls .flush.
func CallFlush(d *Data) Result { return result(C.nbdhost_call_flush(d.c())) }

// CallRange calls .trim, .zero or .cache.
func CallRange(d *Data) Result { return result(C.nbdhost_call_range(d.c())) }

// Extent is a run of bytes of one type (NBDKIT_EXTENT_HOLE, NBDKIT_EXTENT_ZERO).
type Extent struct {
	Offset, Length uint64
	Type           uint32
}

// CallExtents calls .extents for [Offset, Offset+Count) and, if it succeeds, add for
// each extent that it added: contiguous, from offset on, neighbours of different
// types, at most 1 Mi of them. They may reach beyond the range, and even the disk:
// the caller cuts them. On success there may be none: that is the module's error.
// An error of add ends this and is returned.
func CallExtents(d *Data, add func(offset, length uint64, typ uint32) error) (Result, error) {
	return eachExtent(C.nbdhost_call_extents(d.c()), add)
}

// eachExtent frees the list, which no copy is made of: block status, which clients ask
// for as often as they read, allocates nothing in Go.
func eachExtent(r C.struct_nbdhost_result, add func(offset, length uint64, typ uint32) error) (Result, error) {
	res := result(r)
	list := (*C.struct_nbdkit_extents)(res.Ptr)
	res.Ptr = nil
	if list == nil {
		return res, nil
	}
	defer C.nbdkit_extents_free(list)
	if res.Ret >= 0 {
		for _, e := range unsafe.Slice(list.list, list.len) {
			if err := add(uint64(e.offset), uint64(e.length), uint32(e._type)); err != nil {
				return res, err
			}
		}
	}
	return res, nil
}

// CallPreadV1 calls the .pread of plugin API version 1.
func CallPreadV1(d *Data) Result { return result(C.nbdhost_call_pread_v1(d.c())) }

// CallPwriteV1 calls the .pwrite of plugin API version 1.
func CallPwriteV1(d *Data) Result { return result(C.nbdhost_call_pwrite_v1(d.c())) }

// CallFlushV1 calls the .flush of plugin API version 1.
func CallFlushV1(d *Data) Result { return result(C.nbdhost_call_flush_v1(d.c())) }

// CallTrimV1 calls the .trim of plugin API version 1.
func CallTrimV1(d *Data) Result { return result(C.nbdhost_call_trim_v1(d.c())) }

// CallZeroV1 calls the .zero of plugin API version 1.
func CallZeroV1(d *Data) Result { return result(C.nbdhost_call_zero_v1(d.c())) }

// LiveObjects counts the connections, contexts and lists that have not been freed.
func LiveObjects() int { return int(C.nbdhost_live_objects()) }
