package cshim

// #include "shim.h"
import "C"

import (
	"sync/atomic"
	"unsafe"
)

// MaxBurst is how many calls a [Burst] has room for.
const MaxBurst = C.NBDHOST_MAX_BURST

// A Burst is several calls of .pread and .pwrite without flags that are made one after the
// other in one crossing. One goroutine fills and runs it, and may do so again and again.
type Burst struct{ c C.struct_nbdhost_burst }

// NewBurst returns an empty one. read and write say what is called, but for the arguments;
// filter is the module's if it is a filter, and its next is taken at each call. They are
// used until the last Run has returned.
func NewBurst(read, write *Data, filter *FilterContext) *Burst {
	b := &Burst{C.struct_nbdhost_burst{read: read.c(), write: write.c()}}
	if filter != nil {
		b.c.filter = number(unsafe.Pointer(filter.c))
	}
	return b
}

// Set makes call i, of MaxBurst, one of .pwrite or of .pread. buf is the callee's for this
// call; who runs the burst keeps it alive.
func (b *Burst) Set(i int, write bool, buf unsafe.Pointer, n uint32, off, cookie uint64) {
	b.c.calls[i] = C.struct_nbdhost_burst_call{
		buf: number(buf), count: C.uint32_t(n), offset: C.uint64_t(off), cookie: C.uint64_t(cookie), write: C.bool(write),
	}
}

// Run makes the first n calls, at least one, until one fails. The first has begun; each other
// one does by raising begun by 1, from how many had, and where that is not its value any more
// there is none. It returns how many were made, whether the last of them was a write, and its
// outcome.
func (b *Burst) Run(worker, n int, begun *atomic.Uint32) (done int, write bool, r Result) {
	b.c.worker, b.c.len = C.int(worker), C.uint32_t(n)
	r = result(C.nbdhost_call_burst(&b.c, (*C.uint32_t)(unsafe.Pointer(begun))))
	return int(b.c.done), bool(b.c.calls[b.c.done-1].write), r
}
