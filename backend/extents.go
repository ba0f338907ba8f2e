package backend

import (
	"fmt"
	"syscall"
)

// Types of an extent (nbdkit-plugin(3), "Extents list").
const (
	ExtentHole uint32 = 1 << iota // not allocated
	ExtentZero                    // reads as zeroes
)

// An Extent is a run of bytes of the same type.
type Extent struct {
	Offset, Length uint64
	Type           uint32
}

// MaxExtents is how many extents a list holds; what is added beyond is ignored, and who wants
// to know asks again from there. nbdkit's lists hold 2^20: each of the calls that a client may
// have under way would cost 24 MiB several times over.
const MaxExtents = 1 << 16

// Extents collects extents over [start, end) in ascending order without gaps,
// with the rules of nbdkit_add_extent: what lies before start or after end is
// cut off, and neighbours of the same type are one. The zero value is ready for
// Reset.
type Extents struct {
	start, end, next uint64
	added            bool
	list             []Extent
}

// Reset empties the list and sets its range. The memory of the list is used
// again, so a slice that List returned is no longer valid.
func (x *Extents) Reset(start, end uint64) {
	x.start, x.end = start, end
	x.added = false
	x.list = x.list[:0]
}

// List returns what was collected; it is valid until the next Reset.
func (x *Extents) List() []Extent { return x.list }

// Cut takes away what lies at end or behind it.
func (x *Extents) Cut(end uint64) {
	x.end = min(x.end, end)
	for i := len(x.list) - 1; i >= 0 && x.list[i].Offset+x.list[i].Length > end; i-- {
		if x.list[i].Offset < end {
			x.list[i].Length = end - x.list[i].Offset
			return
		}
		x.list = x.list[:i]
	}
}

// Add appends an extent. It fails where the extent does not follow the one
// before, or where the first one lies behind the start of the range. What clients
// do not know is taken out of its type.
func (x *Extents) Add(off, n uint64, typ uint32) error {
	if n == 0 {
		return nil
	}
	if x.added && off != x.next {
		return fmt.Errorf("add extent: got offset %d, need %d: extents must follow each other: %w", off, x.next, syscall.ERANGE)
	}
	if !x.added && off > x.start {
		return fmt.Errorf("add extent: got offset %d for the first one, need at most %d: %w", off, x.start, syscall.ERANGE)
	}
	x.added, x.next = true, off+n

	typ &= ExtentHole | ExtentZero
	end := off + n
	if end < off || end > x.end {
		end = x.end
	}
	off = max(off, x.start)
	if off >= end {
		return nil
	}
	if i := len(x.list) - 1; i >= 0 && x.list[i].Type == typ && x.list[i].Offset+x.list[i].Length == off {
		x.list[i].Length += end - off
		return nil
	}
	if len(x.list) < MaxExtents {
		x.list = append(x.list, Extent{off, end - off, typ})
	}
	return nil
}
