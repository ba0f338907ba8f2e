package server

import (
	"sync"
	"sync/atomic"
	"time"
)

const (
	// The watcher looks every minTick. A call that is under way at two looks loses
	// the connection. After calmTicks without such a call the time between two
	// looks doubles, up to maxTick: a look costs two wake-ups, which is a tenth
	// of the speed where requests keep both of two processors busy.
	minTick   = time.Millisecond
	maxTick   = 8 * time.Millisecond
	calmTicks = 64
	// quietTicks is for how long it goes on looking at a connection where
	// nothing happens.
	quietTicks = 16
)

// A watcher looks at the connections on which calls are made, and takes the
// connection away from a call that takes long. It runs only as long as there is
// something to look at.
type watcher struct {
	mu      sync.Mutex
	running bool
	conns   []watched
	active  atomic.Int32 // len(conns)
	calm    int          // looks without a call that lost its connection
}

type watched struct {
	c     *conn
	quiet int // ticks since something happened
}

// watch makes sure that the watcher looks at c. The caller has set its state to
// busy before, which the watcher looks at once more before it turns away: one
// of the two sees the other.
func (c *conn) watch() {
	if !c.watched.Load() && c.watched.CompareAndSwap(false, true) {
		c.s.watcher.add(c)
	}
}

func (w *watcher) add(c *conn) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.conns = append(w.conns, watched{c: c})
	w.active.Store(int32(len(w.conns)))
	if !w.running {
		w.running = true
		go w.run()
	}
}

func (w *watcher) run() {
	tick := minTick
	ticker := time.NewTicker(tick)
	defer ticker.Stop()
	for range ticker.C {
		next := w.look(tick)
		switch next {
		case 0:
			return
		case tick:
		default:
			tick = next
			ticker.Reset(tick)
		}
	}
}

// look looks at every connection once, tick after the last time. It returns when
// to look next, or 0 when no connection is left.
func (w *watcher) look(tick time.Duration) time.Duration {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.calm++
	kept := w.conns[:0]
	for _, x := range w.conns {
		watch, lost := x.look()
		if watch {
			kept = append(kept, x)
		}
		if lost {
			tick, w.calm = minTick, 0
		}
	}
	if w.calm == calmTicks {
		tick, w.calm = min(2*tick, maxTick), 0
	}
	clear(w.conns[len(kept):])
	w.conns = kept
	w.active.Store(int32(len(kept)))
	w.running = len(kept) > 0
	if !w.running {
		return 0
	}
	return tick
}

// look tells whether the connection must be looked at again, and whether a call
// has just lost it.
func (x *watched) look() (watch, lost bool) {
	r := x.c.reader.Load()
	state := r.state.Load()
	if state != r.seen {
		r.seen, x.quiet = state, 0
		return true, false
	}
	if state&mask == busy {
		x.c.takeAway(r, state)
		return true, true
	}
	if x.quiet++; x.quiet < quietTicks {
		return true, false
	}
	x.c.watched.Store(false)
	return r.state.Load() != state && x.c.watched.CompareAndSwap(false, true), false
}

// takeAway gives the connection to another goroutine, unless the call under way of r
// returns just now.
func (c *conn) takeAway(r *reader, state uint64) {
	r.moving.Lock()
	defer r.moving.Unlock()
	if r.state.Load() != state {
		return // before it has a slot, which another call might want
	}
	if c.s.pinned {
		if r.lose(state) { // but not the connection
			c.sending.Go(func() { c.sender.send(&batch{}) })
		}
		return
	}
	if !c.trySlot() { // the call's from now on
		return // cannot be: the reader makes no call of its own then
	}
	n := c.spares.get()
	if n == nil {
		n = newReader(c, c.number())
	}
	if !c.transfer(r, state, n) {
		c.spares.put(n)
		c.freeSlot()
		return
	}
	c.calling.Add(1)
	go c.start(n)
}

// transfer gives the connection of from, whose call under way has a slot now, to to,
// which has nothing to do. from.moving is held. It fails where state is not from's any
// more.
func (c *conn) transfer(from *reader, state uint64, to *reader) bool {
	if !from.lose(state) {
		return false
	}
	to.got = to.state.Load()&^mask + next
	to.state.Store(to.got)
	to.arrived = from.arrived
	if err := from.in.handOver(&to.in); err != nil {
		c.log.Error("take over connection: " + err.Error() + "; closing it")
		c.disconnect(true)
	}
	c.hand(to)
	return true
}

// lose takes from r what its call under way holds up: the rest of its burst is in hand again, and
// the replies that wait go to the sender, before that to the call; somebody has to send them.
// The buffers belong to the call. r.moving is held. It fails where state is not r's any more.
func (r *reader) lose(state uint64) bool {
	c := r.c
	if !r.state.CompareAndSwap(state, state&^mask|taken) {
		return false
	}
	if state&mask == busy {
		at := now()
		c.pace.lost(at, c.s.opts.contended(at), (state-r.got)/next)
	}
	if r.burst.n > 0 {
		r.settle(r.burst.calls.Stop())
	}
	if r.out.empty() {
		return true
	}
	r.account(0)
	var out batch
	if err := out.grow(c.id, c.replyHead(), r.out.end-r.out.start); err != nil {
		c.log.Error("send replies: " + err.Error() + "; closing the connection")
		c.disconnect(true)
		return true
	}
	out.end += copy(out.buf.B[out.end:], r.out.buf.B[r.out.start:r.out.end])
	out.held.add(&r.out.held)
	c.sender.put(&out)
	return true
}

// spares are readers of a connection that have no goroutine, for the next one that has
// to be started.
type spares struct {
	mu      sync.Mutex
	readers []*reader
}

func (s *spares) put(r *reader) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.readers = append(s.readers, r)
}

// get returns nil where there is none.
func (s *spares) get() *reader {
	s.mu.Lock()
	defer s.mu.Unlock()
	n := len(s.readers)
	if n == 0 {
		return nil
	}
	r := s.readers[n-1]
	s.readers = s.readers[:n-1]
	return r
}
