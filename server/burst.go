package server

import (
	"time"

	"nbdhost/backend"
	"nbdhost/protocol"
)

const (
	// burstTime is how long a burst takes at most beyond what the size of its calls explains,
	// by what calls have taken so far.
	burstTime = longCall
	// maxBurstLength is the longest request of a burst in bytes. What one saves is little
	// beside the time that a longer one takes.
	maxBurstLength = 16 << 10
)

// A burst is reads and writes in hand that are carried out together: one crossing into the
// module, one change of the reader's state, one look at the clock. Each is consumed when it
// joins, and its reply composed as if it had succeeded. What is then not carried out, since a
// call failed or lost the connection, is in hand again, as if nothing had happened to it.
type burst struct {
	calls    *backend.Burst // nil where each request needs something of its own
	n        int
	cost     time.Duration // of a call, as far as one knows
	bytes    uint64
	requests [backend.MaxBurst]struct {
		req       protocol.Request
		at, after int // where its reply begins, and in the input what follows it
	}
}

// newBurst prepares r for bursts, if its requests have no limits to wait for and nobody
// wants to know how long each takes.
func (r *reader) newBurst() {
	if s := r.c.s; s.opts.SlowRequest <= 0 && !s.limited {
		r.burst.calls = r.c.session.NewBurst(&r.call)
	}
}

// gather makes what is in hand part of the burst, as far as it can be. Where that is nothing
// r.req is the next request, whose header is not consumed.
func (r *reader) gather() error {
	for len(r.in.unread()) >= r.in.head {
		err := r.c.negotiated.DecodeRequest(&r.req, r.in.unread())
		if err != nil && r.burst.n == 0 {
			return err
		}
		if err != nil || !r.join() {
			break
		}
	}
	return nil
}

// join makes r.req, whose header is not consumed, part of the burst, if it can be. From the
// first one on the reader has its turn, until the burst has been run.
func (r *reader) join() bool {
	b, c, req := &r.burst, r.c, &r.req
	head, room, payload := r.in.head, c.replyHead(), 0
	switch {
	case b.calls == nil || b.n == backend.MaxBurst || req.Length > maxBurstLength ||
		req.Flags&^protocol.CmdFlagPayloadLen != 0:
		return false
	case req.Type == protocol.CmdRead:
		room += int(req.Length)
	case req.Type == protocol.CmdWrite && b.calls.Writable():
		payload = int(req.Length)
	default:
		return false
	}
	if len(r.in.unread()) < head+payload || c.negotiated.Validate(req) != nil {
		return false
	}
	if time.Duration(b.n)*b.cost > burstTime || b.n == 0 && !r.begins(room) || b.n > 0 && !r.fits(room) {
		return false
	}
	r.err, r.tail, r.filled, r.at = nil, nil, 0, r.out.end
	p := r.in.unread()[head : head+payload]
	if req.Type == protocol.CmdRead {
		p = r.out.buf.B[r.at+room-int(req.Length) : r.at+room]
	}
	b.calls.Add(req.Type == protocol.CmdWrite, p, req.Offset, req.Cookie)
	_ = r.reply() // there is room
	r.in.take(head + payload)
	x := &b.requests[b.n]
	x.req, x.at, x.after = *req, r.at, r.in.start
	b.n++
	b.bytes += req.Length
	return true
}

// begins tells whether there can be a burst now, and makes room for its first reply.
func (r *reader) begins(room int) bool {
	c := r.c
	r.burst.cost = time.Duration(c.pace.cost.Load())
	return r.burst.cost <= burstTime/2 && !c.pace.slow.Load() && len(c.slots) < cap(c.slots) && !c.refused() &&
		r.room(room) == nil && r.tryTurn()
}

// runBurst carries the burst out on this goroutine.
func (r *reader) runBurst() (gone bool, err error) {
	b := &r.burst
	state := r.enter()
	done, failure := b.calls.Run(&r.call)
	r.endTurn()
	last := &b.requests[done-1]
	r.req, r.at, r.err, r.tail, r.filled, r.failedAt = last.req, last.at, failure, nil, 0, 0
	if !r.state.CompareAndSwap(state, state&^mask+uint64(done-1)*next) {
		return r.finishTaken()
	}
	r.settle(done)
	r.called(done)
	return false, r.finish()
}

// settle ends a burst of which so many calls have begun. All but the last have succeeded; what
// the reply to that is finish will say, and what follows it is in hand again.
func (r *reader) settle(begun int) {
	b := &r.burst
	for i := range begun - 1 {
		r.tally.add(&b.requests[i].req, nil)
	}
	r.bytes += b.bytes
	b.bytes = 0
	r.in.start, r.out.end = b.requests[begun-1].after, b.requests[begun-1].at
	b.n = 0
}
