package server

import (
	"time"

	"nbdhost/backend"
	"nbdhost/protocol"
)

// A job is a request for a worker.
type job struct {
	req     protocol.Request
	arrived time.Time       // see task
	tail    error           // see task
	working int64           // see task
	held    held            // see task
	payload *backend.Buffer // of a write; the worker's
}

// delegates tells whether the next call goes to a worker: where calls take long, unless
// a worker could do nothing that the reader cannot, and where as many are under way as
// there may be, so that the reader must wait for one of them. payload is what the request
// brings, in bytes.
func (r *reader) delegates(payload int) bool {
	c := r.c
	return c.pace.slow.Load() && c.s.opts.Threads > 1 && c.lane.Parallel() && !r.alone(payload) ||
		len(c.slots) == cap(c.slots)
}

// loneRequests is how many requests tell that a client asks for one thing at a time.
const loneRequests = 4

// alone takes in that a request came, and tells whether the client waits for each reply
// before it asks again. To hand its calls over only costs time, unless they take so long
// that one more request had better not wait for the watcher.
func (r *reader) alone(payload int) bool {
	if len(r.c.slots) > 0 || len(r.in.unread()) > payload {
		r.lone = 0
		return false
	}
	r.lone = min(r.lone+1, loneRequests)
	return r.lone == loneRequests && r.c.pace.cost.Load() < int64(mostlyLong)
}

// delegate hands r.req to a worker, when there is one free.
func (r *reader) delegate(payload int) error {
	j := job{req: r.req, tail: r.tail}
	if payload > 0 {
		b, err := backend.GetBuffer(payload)
		if err != nil {
			r.drop()
			r.err = err
			return r.reject(uint64(payload))
		}
		if err := r.receiveInto(b.B[:payload]); err != nil {
			r.drop()
			b.Release()
			return err
		}
		j.payload = b
	}
	j.arrived, j.working, j.held = r.arrived, r.working, r.held
	r.working, r.held = 0, held{}
	c := r.c
	select {
	case c.slots <- struct{}{}:
	default:
		// What is ready to be sent need not wait for a call to return.
		r.send()
		c.slots <- struct{}{}
	}
	select {
	case c.jobs <- j:
		return nil
	default:
	}
	if c.workers < c.s.opts.Threads {
		c.workers++
		if c.workers == 1 {
			c.s.crews.Add(1)
		}
		c.s.workers.Add(1)
		c.calling.Add(1)
		go c.work(j)
		return nil
	}
	c.jobs <- j // one is about to be free: it has given up its slot
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
	t.req, t.arrived, t.tail, t.working, t.held = j.req, j.arrived, j.tail, j.working, j.held
	if t.err = t.reserve(); t.err == nil {
		began := time.Now()
		t.begin()
		c.lane.Lock()
		if j.payload != nil {
			t.run(j.payload.B[:j.req.Length])
		} else {
			t.run(nil)
		}
		c.lane.Unlock()
		d := time.Since(began)
		contended := d > longCall && c.s.opts.contended(began.Add(d))
		if c.pace.delegated(d, j.req.Length, contended) {
			c.s.blocks()
		}
	}
	t.worked()
	j.payload.Release()
	if err := t.finish(); err != nil {
		c.log.Error("send reply: " + err.Error() + "; closing the connection")
		c.disconnect(true)
	}
	t.send()
	t.out.release() // it may be long until the next job
	<-c.slots
}
