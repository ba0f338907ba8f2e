package backend

import (
	"math/bits"
	"sync/atomic"
)

// MaxBurst is how many calls a [Burst] has room for.
const MaxBurst = 32

// Calls are several data calls without flags that a handle makes one after the other on one
// goroutine, each once the one before has succeeded.
type Calls interface {
	// Set makes call i, of MaxBurst, one of Pwrite or of Pread. The request's cookie is for log
	// lines.
	Set(i int, write bool, p []byte, off, cookie uint64)
	// Run makes the first n calls, at least one, until one fails. The first has begun; each
	// other one does by raising begun by 1, from how many had, and where that is not its
	// value any more there is none. It returns how many were made; err is that of the last.
	Run(c *Call, n int, begun *atomic.Uint32) (done int, err error)
}

// A BurstHandle is a handle that can make several calls with less ado than one by one.
type BurstHandle interface {
	Handle
	// NewCalls returns what makes such calls until the handle is closed; nil where it
	// cannot.
	NewCalls(c *Call) Calls
}

// A Burst makes reads and writes of a session that were checked against its size before. One
// goroutine fills and runs it, and may do so again and again.
type Burst struct {
	calls         Calls
	writable      bool
	reads, writes *atomic.Uint64 // count the calls
	n             int
	isWrite       uint32        // a bit for each call
	begun         atomic.Uint32 // calls, and stopped
}

// stopped is above any number of calls.
const stopped = 1 << 16

// NewBurst returns what makes several calls at once, for one goroutine, until the session is
// closed; nil where each needs more than the handle can do. What the session is asked once
// is known.
func (s *Session) NewBurst(c *Call) *Burst {
	r, ok := s.Direct(c, Pread)
	if !ok {
		return nil
	}
	w, writable := s.Direct(c, Pwrite)
	b := &Burst{writable: writable, reads: r.Calls, writes: w.Calls}
	if h, ok := s.handle.(BurstHandle); ok {
		b.calls = h.NewCalls(c)
	}
	if b.calls == nil {
		b.calls = &oneByOne{h: s.handle}
	}
	return b
}

// Writable tells whether there may be writes.
func (b *Burst) Writable() bool { return b.writable }

// Add adds a call of Pwrite, or of Pread, to at most MaxBurst.
func (b *Burst) Add(write bool, p []byte, off, cookie uint64) {
	if b.n == 0 {
		b.begun.Store(1)
	}
	if write {
		b.isWrite |= 1 << b.n
	}
	b.calls.Set(b.n, write, p, off, cookie)
	b.n++
}

// Stop lets no more calls begin, and returns how many have: one at least. Any goroutine may
// call it between the first Add and the end of Run, any number of times; at other times it
// does nothing.
func (b *Burst) Stop() (begun int) { return int(b.begun.Or(stopped) &^ stopped) }

// Run makes the calls, of which there is one at least, until one fails or Stop is called, and
// empties the burst. It returns how many were made; err is that of the last.
func (b *Burst) Run(c *Call) (done int, err error) {
	done, err = b.calls.Run(c, b.n, &b.begun)
	if n := bits.OnesCount32(b.isWrite & (1<<done - 1)); n > 0 {
		b.writes.Add(uint64(n))
		b.reads.Add(uint64(done - n))
	} else {
		b.reads.Add(uint64(done))
	}
	b.n, b.isWrite = 0, 0
	return done, err
}

// oneByOne are calls of a handle that knows of no others.
type oneByOne struct {
	h     Handle
	calls [MaxBurst]struct {
		write       bool
		p           []byte
		off, cookie uint64
	}
}

func (b *oneByOne) Set(i int, write bool, p []byte, off, cookie uint64) {
	x := &b.calls[i]
	x.write, x.p, x.off, x.cookie = write, p, off, cookie
}

func (b *oneByOne) Run(c *Call, n int, begun *atomic.Uint32) (done int, err error) {
	for {
		x := &b.calls[done]
		c.Request.Cookie = x.cookie
		if x.write {
			err = b.h.Pwrite(c, x.p, x.off, 0)
		} else {
			err = b.h.Pread(c, x.p, x.off)
		}
		done++
		if err != nil || done == n || !begun.CompareAndSwap(uint32(done), uint32(done+1)) {
			return done, err
		}
	}
}
