package server

import (
	"runtime"
	"time"

	"nbdhost/backend"
	"nbdhost/protocol"
)

// A job is a request for a worker.
type job struct {
	req     protocol.Request
	arrived time.Duration   // see task
	tail    error           // see task
	held    held            // see task
	payload []byte          // of a write
	memory  *backend.Buffer // it lies in; the worker's
}

// A way is how a request is carried out.
type way int

const (
	byReader   way = iota // by the reader, and the watcher sees whether it takes long
	underGuard            // by the reader, until the client sends something more
	byWorker
)

// guardedCalls is how many long calls of all connections may be under way where one more
// is made by a reader. Where there are more, one reader that hands several requests out
// costs less than several that get the connection one after the other.
const guardedCalls = 3

// way chooses one for the next request, which brings payload in bytes. Where as many calls
// are under way as there may be it is for a worker, so that the reader waits for one of
// them.
func (r *reader) way(payload int) way {
	c := r.c
	switch {
	case len(c.slots) == cap(c.slots):
		return byWorker
	case !c.pace.slow.Load() || c.s.opts.Threads == 1 || !c.lane.Parallel():
		return byReader
	}
	if !c.slow {
		c.slow = true
		if err := c.s.guard.join(c); err != nil {
			c.call.Debugf("join guard: %v", err)
		} else {
			c.guarded = true
		}
	}
	if !c.guarded || r.more(payload) || c.s.long.Load() > guardedCalls {
		return byWorker
	}
	return underGuard
}

// aheadLength is from how many bytes on a read or write takes longer than it takes to hand it
// over, however fast the module. Shorter payloads cost less to be copied than to lie in a
// buffer of their own.
const aheadLength = 256 << 10

// ahead tells whether a worker should carry the request out, which is in hand with its payload,
// so that the reader can go ahead with the next one: where both take their time, and no other
// client keeps the processors busy.
func (r *reader) ahead(payload int) bool {
	c := r.c
	workers := runtime.NumCPU()
	switch {
	case r.req.Length < aheadLength || workers == 1 || c.s.opts.Threads == 1 || !c.lane.Parallel():
		return false
	case r.req.Type == protocol.CmdRead:
		workers-- // who receives what was read needs a processor as well
	case r.req.Type != protocol.CmdWrite:
		return false
	}
	return c.sock.local && c.secure == nil && c.s.watcher.active.Load() <= 1 && c.s.handed.Load() < int64(workers) &&
		(r.more(payload) || readable(uintptr(c.sock.descriptor())))
}

// more tells whether there may be more requests of which the guard would not hear:
// in hand behind the payload, or held by TLS.
func (r *reader) more(payload int) bool {
	return len(r.in.unread()) > payload || r.c.full
}

// delegate hands r.req to a worker, when there is one free.
func (r *reader) delegate(payload int) error {
	j := job{req: r.req, tail: r.tail}
	if payload > 0 {
		if err := r.receivePayload(&j, payload); err != nil {
			r.c.giveBack(&r.held)
			return err
		}
		if r.err != nil {
			return r.rejectForMemory(uint64(payload))
		}
	}
	j.arrived, j.held = r.arrived, r.held
	r.held = held{}
	c := r.c
	if !c.trySlot() {
		// What is ready to be sent need not wait for a call to return.
		r.send()
		c.takeSlot()
	}
	select {
	case c.jobs <- j:
		return nil
	default:
	}
	if c.workers < c.s.opts.Threads {
		c.workers++
		c.s.workers.Add(1)
		c.calling.Add(1)
		go c.work(j)
		return nil
	}
	c.jobs <- j // one is about to be free: it has given up its slot
	return nil
}

// receivePayload gives j so many bytes, in hand or yet to come. An error ends the connection,
// unless it is in r.err: then nothing is consumed.
func (r *reader) receivePayload(j *job, n int) error {
	if n >= aheadLength {
		if err := r.receive(n); err != nil || r.err != nil {
			return err
		}
		j.payload, j.memory, r.err = r.in.part(n)
		return nil
	}
	if j.memory, r.err = backend.GetBuffer(n); r.err != nil {
		return nil
	}
	j.payload = j.memory.B[:n]
	if err := r.receiveInto(j.payload); err != nil {
		j.memory.Release()
		return err
	}
	return nil
}

// receiveInto fills p with what is in hand and what comes next.
func (r *reader) receiveInto(p []byte) error {
	for len(p) > 0 {
		if len(r.in.unread()) == 0 {
			if err := r.wait(1); err != nil {
				return err
			}
		}
		n := copy(p, r.in.unread())
		r.in.take(n)
		p = p[n:]
	}
	return nil
}

// work carries out j and then other jobs, until there will be none.
func (c *conn) work(j job) {
	defer c.done()
	defer c.s.workers.Add(-1)
	t := &task{}
	t.init(c, c.number())
	c.call.Debugf("starting worker thread %s.%d", c.s.opts.Chain.Name(), t.call.Worker)
	for ok := true; ok; j, ok = <-c.jobs {
		t.do(j)
	}
}

func (t *task) do(j job) {
	c := t.c
	t.req, t.arrived, t.tail, t.held = j.req, j.arrived, j.tail, j.held
	if t.err = t.reserve(); t.err == nil {
		t.long(j.payload)
	} else {
		t.reportMemory()
	}
	j.memory.Release()
	if err := t.finish(); err != nil {
		c.log.Error("send reply: " + err.Error() + "; closing the connection")
		c.disconnect(true)
	}
	t.send()
	t.out.release() // it may be long until the next job
	c.freeSlot()
}

// trySlot takes a slot for a call that is not the reader's own, if one is free.
func (c *conn) trySlot() bool {
	select {
	case c.slots <- struct{}{}:
		c.s.handed.Add(1)
		return true
	default:
		return false
	}
}

// takeSlot is trySlot, and waits until one is free.
func (c *conn) takeSlot() {
	c.slots <- struct{}{}
	c.s.handed.Add(1)
}

// freeSlot gives a slot back.
func (c *conn) freeSlot() {
	c.s.handed.Add(-1)
	<-c.slots
}

// long makes a call where calls take long.
func (t *task) long(payload []byte) {
	c := t.c
	c.s.long.Add(1)
	t.begin()
	t.takeTurn()
	each := c.pace.each()
	if t.longCalls++; t.longCalls%each == 0 {
		t.timed(payload, each)
	} else {
		t.run(payload)
		t.endTurn()
	}
	if each == sampleLong { // nearly all calls block
		c.s.processors.callsBlock(c.s.handed.Load())
	}
	c.s.long.Add(-1)
}

// timed makes a call that stands for so many that take long, and ends its turn, which
// nobody should wait for any longer than that.
func (t *task) timed(payload []byte, calls int) {
	c := t.c
	began := now()
	contended := c.s.opts.contended(began)
	var waits int64
	if contended {
		waits = threadWaits()
	}
	t.run(payload)
	d := now() - began
	t.endTurn()
	starved := contended && d > longCall && threadWaits() == waits
	c.pace.long(d, calls, t.req.Length, starved)
}
