package server

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math"
	"os"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"nbdhost/protocol"
)

// A reader has the connection: it receives requests, and carries them out or
// hands them to workers. One whose call lost the connection may have it again.
type reader struct {
	task
	in    input
	burst burst
	query protocol.BlockStatusRequest

	// state is what the watcher and the guard go by: a count of calls times 4, plus
	// quiet, busy, guarded or taken.
	state  atomic.Uint64
	seen   uint64     // the watcher's: state at its last tick
	got    uint64     // state when r got the connection
	moving sync.Mutex // held while the connection is moved from r to another reader

	// The calls since the last sample of what one costs.
	began time.Duration
	calls int
	bytes uint64

	tempered time.Duration // when in.receives was looked at
	yielded  time.Duration // when Go's scheduler ran last
}

// yieldEvery is how often the reader of a hot socket lets Go's scheduler run. It blocks
// in system calls and in C only, and never meets the scheduler by itself. After 10 ms of
// that the runtime's monitor takes such a goroutine for a problem: it interrupts it, takes
// its processor away, and looks after all of them every 20 µs for a while, again and again.
const yieldEvery = 2 * time.Millisecond

// Where many sockets are hot their readers share the memory for more than ownReplies bytes of
// replies: what was used last is still in the processor's cache. For less it is not worth it.
const ownReplies = 16 << 10

const (
	quiet   = 0
	busy    = 1 // a call is under way
	guarded = 2 // a long call is under way, which loses the connection to the guard only
	taken   = 3 // the call under way lost the connection, or where that is pinned what it held up
	mask    = 3
	next    = 4
)

func newReader(c *conn, number int) *reader {
	r := &reader{}
	r.task.init(c, number)
	r.in.init(c)
	r.in.head = c.negotiated.RequestSize()
	r.in.idle = func() {
		if r.out.empty() { // always: what waits is sent before waiting
			r.out.release()
		}
	}
	return r
}

// transmit begins the transmission phase, of which in may have received something
// already. It returns when others have the connection. The phase is over when all calls
// have returned and all replies are sent; done sees to what comes then.
func (c *conn) transmit(in *input) {
	c.jobs = make(chan job)
	c.slots = make(chan struct{}, c.s.opts.Threads)
	c.s.exports.enter(c, c.session.Export())
	c.sock.widen()
	number := c.number()
	if len(in.unread()) == 0 && c.parkable() && c.sock.raw != nil {
		in.release()
		c.park(number)
		return
	}
	r := newReader(c, number)
	r.in.buf, r.in.start, r.in.end = in.buf, in.start, in.end
	r.arrived = now()
	c.calling.Add(1)
	c.hand(r)
	c.start(r)
}

// hand makes r the reader of the connection, which does not end meanwhile.
func (c *conn) hand(r *reader) {
	if r.burst.calls == nil {
		r.newBurst()
	}
	c.reader.Store(r)
}

// start runs r, to which the connection was handed, and returns when it has it not any
// more. c.calling counts it already.
func (c *conn) start(r *reader) {
	defer c.done()
	r.send() // what another reader has put there
	why := r.loop()
	if why == over {
		r.send()
		c.sending.Wait()
		close(c.jobs)
	}
	r.in.release()
	r.out.release()
	if why == lost {
		c.spares.put(r)
	}
}

// An outcome is why a reader has the connection no longer.
type outcome int

const (
	over   outcome = iota // nobody has it any more
	parked                // nobody has it until the client says something
	lost                  // another reader has it
)

func (r *reader) loop() outcome {
	for {
		gone, err := r.step()
		switch {
		case err == errIdle:
			r.c.park(r.call.Worker)
			return parked
		case err != nil:
			r.ended(err)
			return over
		case gone:
			return lost
		}
	}
}

// step carries out the next request, or several that are in hand. gone is true where another
// reader has the connection now. An error ends the connection, or says that it is idle.
func (r *reader) step() (gone bool, err error) {
	if len(r.in.unread()) < r.in.head {
		r.in.boundary = r.c.parkable()
		err := r.wait(r.in.head)
		r.in.boundary = false
		if err != nil {
			return false, err
		}
	}
	if err := r.gather(); err != nil {
		return false, err
	}
	if r.burst.n > 0 {
		return r.runBurst()
	}
	r.in.take(r.in.head)
	if r.req.Type == protocol.CmdDisc {
		return false, errDisc
	}
	return r.request()
}

// wait sends what there is to send, then waits for n bytes in hand.
func (r *reader) wait(n int) error {
	waiting := r.out.end - r.out.start
	r.sendAt(r.sample())
	if waiting > ownReplies && r.c.sock.hot() && r.c.s.hot.Load() > r.c.s.opts.maxHot {
		r.out.release()
	}
	r.in.shrink(r.req.PayloadLength(r.c.negotiated.ExtendedHeaders))
	r.temper()
	for {
		_, err := r.in.need(n)
		if err == errIdle {
			if r.parks() {
				return err
			}
			continue
		}
		r.arrived = now()
		r.yield(r.arrived)
		r.batches()
		if err == nil || !errors.Is(err, os.ErrDeadlineExceeded) {
			return err
		}
		// The server stops. As long as something is in flight the client may
		// go on waiting for it.
		if len(r.c.slots) == 0 {
			return err
		}
		r.c.sock.wake(lastWords)
	}
}

// batches settles at how many bytes replies leave: at half of those to the requests in
// hand, as far as one can see, so that the client has something to do while the other
// half is made.
func (r *reader) batches() {
	requests := uint64(len(r.in.unread()) / r.in.head)
	reply := uint64(r.c.replyHead())
	if r.req.Type == protocol.CmdRead { // the last one
		reply += min(r.req.Length, maxBatch)
	}
	r.batch = int(min(max(requests*reply/2, minBatch), maxBatch))
}

var errDisc = fmt.Errorf("client sent %v", protocol.CmdDisc)

// ended says why the connection ends.
func (r *reader) ended(err error) {
	switch {
	case err == io.EOF:
		r.call.Debugf("client closed input socket, closing connection")
	case err == errGone, err == errDisc:
		r.call.Debugf("%v, closing connection", err)
	case status(r.c.status.Load()) == dead:
		r.call.Debugf("connection was cut off")
	case errors.Is(err, os.ErrDeadlineExceeded):
		r.call.Debugf("server stops, closing connection")
	default:
		r.c.log.Error("receive request: " + err.Error() + "; closing the connection")
	}
}

// request deals with r.req, whose header is consumed. gone is true where another
// reader has the connection now. An error ends the connection.
func (r *reader) request() (gone bool, err error) {
	extended := r.c.negotiated.ExtendedHeaders
	payload := r.req.PayloadLength(extended)
	if payload > math.MaxUint32 {
		return false, fmt.Errorf("%v: got a payload of %d bytes, need at most %d", r.req.Type, payload, uint32(math.MaxUint32))
	}
	r.tail = nil
	if r.err = r.check(); r.err != nil && !r.truncate() {
		if err := r.reject(payload); err != nil {
			return false, err
		}
		if extended && r.req.Type == protocol.CmdWrite && payload < r.req.Length {
			// Nobody knows whether the data follows or not, and it must
			// never be taken for requests.
			return false, r.err
		}
		return false, nil
	}
	if r.req.Type == protocol.CmdBlockStatus && payload > 0 {
		if err := r.selectContexts(int(payload)); err != nil || r.err != nil {
			return false, err
		}
		payload = 0
	}
	way := r.way(int(payload))
	if err := r.limit(way != byReader); err != nil {
		return false, err
	}
	if r.err != nil {
		return false, r.reject(payload)
	}
	if way == byWorker {
		return false, r.delegate(int(payload))
	}
	if err := r.receive(int(payload)); err != nil {
		r.c.giveBack(&r.held)
		return false, err
	}
	if r.err != nil {
		return false, r.rejectForMemory(payload)
	}
	if way == underGuard && r.more(int(payload)) || way == byReader && r.ahead(int(payload)) {
		return false, r.delegate(int(payload))
	}
	if way == underGuard || r.c.pace.slow.Load() {
		r.sample()
		r.send() // what is ready need not wait for the call
	}
	if r.err = r.reserve(); r.err != nil {
		return false, r.rejectForMemory(payload)
	}
	p := r.in.unread()[:payload]
	r.in.take(int(payload)) // before the call: what is in hand after it is the next reader's
	if way == underGuard {
		return r.guarded(p)
	}
	return r.inline(p)
}

// receive waits until the n bytes of the payload are in hand. An error ends the connection,
// unless it is in r.err: then there is no memory for them, and nothing is consumed.
func (r *reader) receive(n int) error {
	if len(r.in.unread()) >= n {
		return nil
	}
	err := r.wait(n)
	if err == unix.ENOMEM {
		r.err, err = err, nil
	}
	return err
}

// truncate turns a read that begins within the export and ends beyond it into one
// of what there is, where a reply can carry both that and the error.
func (r *reader) truncate() bool {
	n := &r.c.negotiated
	req := r.req
	if req.Type != protocol.CmdRead || !n.StructuredReplies || req.Offset >= n.Size ||
		req.Length <= n.Size-req.Offset || req.Length > protocol.MaxRequestLength || r.c.refused() {
		return false
	}
	req.Length = n.Size - req.Offset
	if n.Validate(&req) != nil {
		return false
	}
	r.req, r.tail, r.err = req, r.err, nil
	return true
}

// selectContexts consumes the payload of an NBD_CMD_BLOCK_STATUS, and makes r.req
// the request that it stands for. Where it is refused r.err is set.
func (r *reader) selectContexts(payload int) error {
	if len(r.in.unread()) < payload {
		if err := r.wait(payload); err != nil {
			return err
		}
	}
	r.err = r.query.Decode(r.in.unread()[:payload])
	r.in.take(payload)
	switch {
	case r.err != nil:
	case len(r.query.ContextIDs) > 1 || r.query.ContextIDs[0] != baseAllocation:
		r.err = fmt.Errorf("got contexts %d, need none but %d", r.query.ContextIDs, baseAllocation)
	default:
		r.query.Apply(&r.req)
		if r.err = r.check(); r.err != nil {
			return r.reject(0)
		}
		return nil
	}
	r.err = &protocol.RequestError{Command: r.req.Type, Errno: protocol.EINVAL, Msg: r.err.Error()}
	r.call.Log.Error("invalid request: " + r.err.Error())
	return r.reject(0)
}

// check refuses what must not reach the chain.
func (r *reader) check() error {
	if err := r.c.negotiated.Validate(&r.req); err != nil {
		r.call.Log.LogAttrs(context.Background(), slog.LevelError, "invalid request: "+err.Error(),
			append(r.attributes(), slog.String("errno", protocol.ErrnoFor(err, r.req.Flags).String()))...)
		return err
	}
	if r.c.refused() {
		return r.stopping()
	}
	return nil
}

func (r *reader) stopping() error {
	return &protocol.RequestError{Command: r.req.Type, Errno: protocol.ESHUTDOWN,
		Msg: "the server or this connection is shutting down; disconnect"}
}

// reject consumes the payload, received or not, and replies with r.err.
func (r *reader) reject(payload uint64) error {
	if uint64(len(r.in.unread())) < payload {
		r.sample()
		r.send()
	}
	if err := r.in.discard(payload); err != nil {
		return err
	}
	r.count()
	return r.refuse()
}

// rejectForMemory is reject where there is no memory for the request.
func (r *reader) rejectForMemory(payload uint64) error {
	r.reportMemory()
	r.c.giveBack(&r.held)
	return r.reject(payload)
}

// guarded carries a request out on this goroutine that takes long.
func (r *reader) guarded(payload []byte) (gone bool, err error) {
	g := &r.c.s.guard
	state := r.state.Load() + next + guarded
	r.state.Store(state)
	g.arm(r.c)
	r.long(payload)
	if !r.state.CompareAndSwap(state, state&^mask) {
		return r.finishTaken()
	}
	g.disarm(r.c)
	return false, r.finish()
}

// inline carries the request out on this goroutine.
func (r *reader) inline(payload []byte) (gone bool, err error) {
	r.begin()
	if !r.tryTurn() {
		// Other calls are under way. The replies that are ready need not wait
		// for them.
		r.sample()
		r.send()
		if r.err = r.reserve(); r.err != nil {
			r.reportMemory()
			return false, r.finish()
		}
		r.takeTurn()
	}
	state := r.enter()
	r.run(payload)
	r.endTurn()
	if !r.state.CompareAndSwap(state, state&^mask) {
		return r.finishTaken()
	}
	r.bytes += r.req.Length
	r.called(1)
	return false, r.finish()
}

// enter begins calls on this goroutine, which the watcher may find to take long.
func (r *reader) enter() (state uint64) {
	if r.calls == 0 {
		r.began = now()
	}
	state = r.state.Load() + next + busy
	r.state.Store(state)
	r.c.watch()
	return state
}

// called takes in that n calls have returned.
func (r *reader) called(n int) {
	r.calls += n
	if r.calls >= sampleCalls || r.bytes >= sampleBytes {
		r.yield(r.sample())
	}
}

// finishTaken replies to a call that lost the connection. gone is false where r has the
// connection again: it takes it from a reader that makes a long call, so that nobody
// needs to be woken when the next request comes.
func (r *reader) finishTaken() (gone bool, err error) {
	c := r.c
	r.moving.Lock() // waits until the connection has been moved
	// The sender has what was before it in the batch.
	r.out.start = r.at
	kept := c.reader.Load() == r
	if kept {
		r.state.Store(r.state.Load() &^ mask)
	}
	r.moving.Unlock()
	r.calls, r.bytes = 0, 0 // pace.lost has seen to those
	if err := r.finish(); err != nil {
		c.disconnect(true)
	}
	r.send()
	if kept || r.regain() {
		return false, nil
	}
	c.freeSlot()
	return true, nil
}

// regain takes the connection from a reader that makes a long call, which gets r's slot.
func (r *reader) regain() bool {
	c := r.c
	from := c.reader.Load()
	if from == nil {
		return false
	}
	state := from.state.Load()
	if state&mask != guarded {
		return false
	}
	from.moving.Lock()
	defer from.moving.Unlock()
	if !c.transfer(from, state, r) {
		return false
	}
	c.s.guard.disarm(c)
	return true
}

// A sample is of so many calls, or of fewer that moved so many bytes.
const (
	sampleCalls = 8
	sampleBytes = 256 << 10
)

// sample takes the time of the calls since the last sample, if there were any, and returns
// what time it is then; else 0.
func (r *reader) sample() (at time.Duration) {
	if r.calls > 0 {
		at = now()
		r.c.pace.inline(at-r.began, r.calls, r.bytes)
		r.calls, r.bytes = 0, 0
	}
	return at
}

// yield lets Go's scheduler run, unless it has not long ago. On a cold socket that changes
// nothing, since it runs whenever the reader waits. One that is pinned to its thread could go on
// only after another thread has run, which costs more than what the monitor does.
func (r *reader) yield(at time.Duration) {
	if !r.c.s.pinned && at-r.yielded > yieldEvery {
		r.yielded = at
		runtime.Gosched()
	}
}
