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
	// Add adds a call of Pwrite, or of Pread, to at most MaxBurst. The request's cookie is for
	// log lines.
	Add(write bool, p []byte, off, cookie uint64)
	// Run makes the calls, of which there is one at least, until one fails or Stop is called,
	// and empties the burst. It returns how many were made; err is that of the last.
	Run(c *Call) (done int, err error)
	// Stop lets no more calls begin, and returns how many have: one at least. Any goroutine
	// may call it between the first Add and the end of Run, any number of times; at other
	// times it does nothing.
	Stop() (begun int)
}

// A BurstHandle is a handle that can make several calls with less ado than one by one.
type BurstHandle interface {
	Handle
	// NewCalls returns what makes such calls until the handle is closed; nil where it
	// cannot.
	NewCalls(c *Call) Calls
}

// A Burst makes reads and writes of a session that were checked against its size before, as
// [Calls] does.
type Burst struct {
	Calls
	writable      bool
	reads, writes *atomic.Uint64 // count the calls
	n             int
	isWrite       uint32 // a bit for each call
}

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
		b.Calls = h.NewCalls(c)
	}
	if b.Calls == nil {
		b.Calls = &oneByOne{h: s.handle}
	}
	return b
}

// Writable tells whether there may be writes.
func (b *Burst) Writable() bool { return b.writable }

func (b *Burst) Add(write bool, p []byte, off, cookie uint64) {
	if write {
		b.isWrite |= 1 << b.n
	}
	b.n++
	b.Calls.Add(write, p, off, cookie)
}

func (b *Burst) Run(c *Call) (done int, err error) {
	done, err = b.Calls.Run(c)
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
	n     int
	begun atomic.Uint32 // with stopped
	calls [MaxBurst]struct {
		write       bool
		p           []byte
		off, cookie uint64
	}
}

// stopped is above any number of calls.
const stopped = 1 << 16

func (b *oneByOne) Add(write bool, p []byte, off, cookie uint64) {
	if b.n == 0 {
		b.begun.Store(1)
	}
	x := &b.calls[b.n]
	x.write, x.p, x.off, x.cookie = write, p, off, cookie
	b.n++
}

func (b *oneByOne) Run(c *Call) (done int, err error) {
	defer func() { b.n = 0 }()
	for {
		x := &b.calls[done]
		c.Request.Cookie = x.cookie
		if x.write {
			err = b.h.Pwrite(c, x.p, x.off, 0)
		} else {
			err = b.h.Pread(c, x.p, x.off)
		}
		done++
		if err != nil || done == b.n || !b.begun.CompareAndSwap(uint32(done), uint32(done+1)) {
			return done, err
		}
	}
}

func (b *oneByOne) Stop() int { return int(b.begun.Or(stopped) &^ stopped) }
