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

// Add adds a call to the burst, which has room for it. buf is the callee's for this call;
// who runs the burst keeps it alive.
func (b *Burst) Add(write bool, buf unsafe.Pointer, n uint32, off, cookie uint64) {
	if b.c.len == 0 {
		b.begun().Store(1)
	}
	b.c.calls[b.c.len] = C.struct_nbdhost_burst_call{
		buf: number(buf), count: C.uint32_t(n), offset: C.uint64_t(off), cookie: C.uint64_t(cookie), write: C.bool(write),
	}
	b.c.len++
}

func (b *Burst) begun() *atomic.Uint32 { return (*atomic.Uint32)(unsafe.Pointer(&b.c.begun)) }

// Run makes the calls of a burst that is not empty, until one fails or Stop is called, and
// empties it. It returns how many were made, whether the last of them was a write, and its
// outcome.
func (b *Burst) Run(worker int) (done int, write bool, r Result) {
	b.c.worker = C.int(worker)
	r = result(C.nbdhost_call_burst(&b.c))
	b.c.len = 0
	return int(b.c.done), bool(b.c.calls[b.c.done-1].write), r
}

// Stop lets no more calls begin, and returns how many have. Any goroutine may call it
// between the first Add and the end of Run, any number of times; at other times it does
// nothing.
func (b *Burst) Stop() (begun int) {
	return int(b.begun().Or(C.NBDHOST_BURST_STOPPED) &^ C.NBDHOST_BURST_STOPPED)
}
