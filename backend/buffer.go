package backend

import (
	"math/bits"
	"slices"
	"sync"

	"golang.org/x/sys/unix"
)

// A Buffer is page-aligned memory outside Go's heap, so that a module in C may
// be given it without the checks that cgo makes on Go's pointers. It has one
// owner at a time, who calls Release.
type Buffer struct {
	B     []byte // as long as its size class, at least what was asked for
	class int
	owner uint64 // whose it is or was last; 0 where nobody has said
	clean int    // behind it lies what others than owner have left
}

const (
	minBufferShift = 16 // 64 KiB
	maxBufferShift = 27 // 128 MiB: a request of 64 MiB with its header
	bufferSizes    = 2*(maxBufferShift-minBufferShift) + 1
	// keptBytes bounds the memory that is kept of each class for later use.
	// The class is emptied last in, first out: what was used last is still in
	// the processor's cache.
	keptBytes = 16 << 20
	// An owner gets one of the last that had it back, if there is one: there is less to clear.
	lookBack = 16
)

type bufferClass struct {
	mu    sync.Mutex
	free  []*Buffer
	inUse int // buffers that have an owner
}

// Classes are powers of two and what lies in the middle between two of them. What input and
// what replies need are of different ones: a buffer that went from one to the other would
// come to be touched, and so resident, as far as either goes.
var bufferClasses [bufferSizes]bufferClass

func classSize(class int) int {
	return (2 + class&1) << (minBufferShift - 1 + class/2)
}

// classOf is the least class of n bytes, which may be beyond the last.
func classOf(n int) int {
	shift := max(minBufferShift, bits.Len(uint(max(n, 1)-1)))
	class := 2 * (shift - minBufferShift)
	if class > 0 && n <= classSize(class-1) {
		class--
	}
	return class
}

// GetBuffer returns a buffer of at least n bytes; n is at most 128 MiB. Its
// content is whatever the last owner left there. An error means that the system
// has no memory left.
func GetBuffer(n int) (*Buffer, error) { return GetBufferFor(0, n) }

// GetBufferFor is GetBuffer for an owner, which is not 0: see [Buffer.Claim].
func GetBufferFor(owner uint64, n int) (*Buffer, error) {
	class := classOf(n)
	if class >= len(bufferClasses) {
		return nil, unix.ENOMEM
	}
	c := &bufferClasses[class]
	c.mu.Lock()
	c.inUse++
	b := c.take(owner)
	c.mu.Unlock()
	if b == nil {
		m, err := unix.Mmap(-1, 0, classSize(class), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANON)
		if err != nil {
			c.mu.Lock()
			c.inUse--
			c.mu.Unlock()
			return nil, err
		}
		return &Buffer{B: m, class: class, owner: owner, clean: len(m)}, nil
	}
	if b.owner != owner {
		b.owner, b.clean = owner, 0
	}
	return b, nil
}

// take takes a free buffer, the best there is for owner; nil if there is none. mu is held.
func (c *bufferClass) take(owner uint64) *Buffer {
	last := len(c.free) - 1
	if last < 0 {
		return nil
	}
	best := last
	for i := last; i >= max(0, last-lookBack+1); i-- {
		if c.free[i].owner == owner {
			best = i
			break
		}
	}
	b := c.free[best]
	c.free = slices.Delete(c.free, best, best+1)
	return b
}

// Claim makes the first n bytes of an owner's buffer free of what others have left there. It
// comes before they are used.
func (b *Buffer) Claim(n int) {
	if n > b.clean {
		clear(b.B[b.clean:n])
		b.clean = n
	}
}

// Release gives the buffer back. A nil buffer is allowed.
func (b *Buffer) Release() {
	if b == nil {
		return
	}
	c := &bufferClasses[b.class]
	c.mu.Lock()
	c.inUse--
	if (len(c.free)+1)*len(b.B) <= keptBytes {
		c.free = append(c.free, b)
		b = nil
	}
	c.mu.Unlock()
	if b != nil {
		// Unmapping what was mapped cannot fail.
		_ = unix.Munmap(b.B)
	}
}

// BufferStats describes the pool of all buffers of the process.
type BufferStats struct {
	InUse, Kept           int   // buffers that have an owner, and that wait for one
	InUseBytes, KeptBytes int64 // their sizes, added up
}

// Buffers tells how the pool stands.
func Buffers() (s BufferStats) {
	for class := range bufferClasses {
		c := &bufferClasses[class]
		c.mu.Lock()
		inUse, kept := c.inUse, len(c.free)
		c.mu.Unlock()
		s.InUse += inUse
		s.Kept += kept
		s.InUseBytes += int64(inUse) * int64(classSize(class))
		s.KeptBytes += int64(kept) * int64(classSize(class))
	}
	return s
}

// BuffersInUse is how many buffers have an owner. It is 0 when the server is
// idle; a test holds it to that.
func BuffersInUse() int64 { return int64(Buffers().InUse) }
