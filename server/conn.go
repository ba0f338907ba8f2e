package server

import (
	"context"
	"log/slog"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"nbdhost/backend"
	"nbdhost/protocol"
)

// A status says which commands of a connection are still carried out.
type status int32

const (
	serving  status = iota
	refusing        // new commands get NBD_ESHUTDOWN: nbdkit_disconnect(0)
	dead            // nothing is answered any more: nbdkit_disconnect(1), or a write failed
)

// A conn is one client's connection.
type conn struct {
	s      *Server
	id     uint64 // also of who owns memory for replies
	sock   socket
	log    *slog.Logger
	peer   backend.Conn
	call   backend.Call // of the handshake and of close
	lane   *backend.Lane
	status atomic.Int32
	sender sender

	// What the handshake settled.
	secure     TLSConn // over sock; nil without TLS
	session    *backend.Session
	negotiated protocol.Negotiated
	sparse     SparseReads
	refusal    Reason // why the last option was refused, or ReasonClient
	counted    bool   // among Server.admitted
	denied     string // why there is no more than a handshake; "" where there is
	export     *export
	counters   counters

	// The transmission phase.
	reader  atomic.Pointer[reader] // who has the connection; for the watcher
	watched atomic.Bool
	slots   chan struct{} // holds a token for each call that is not the reader's own
	spares  spares
	workers int          // started so far; the reader's
	slow    bool         // calls take long, or did; the reader's
	guarded bool         // it has joined the guard; the reader's
	full    bool         // TLS may hold more than it has given; the reader's
	numbers atomic.Int32 // of tasks so far
	jobs    chan job
	pace    pace
	calling atomic.Int32   // goroutines that have a part in it; the last ends the connection
	sending sync.WaitGroup // those that send for a reader which keeps the connection
	span    atomic.Uint64  // about how many bytes block status asks the module at most; 0 for all
	began   time.Time
	over    chan struct{} // closed at the end of the connection, where somebody waits for that

	// Of the limits.
	address string // see there
	bytes   budget
	delays  atomic.Uint32 // a bit for each Limit that was reached
}

func newConn(s *Server, nc net.Conn) *conn {
	id := backend.NewConnID()
	c := &conn{s: s, id: id, log: s.log.With("conn", id)}
	if peer := nc.RemoteAddr(); peer != nil { // the client may have gone already
		if name := peer.String(); name != "" && name != "@" { // a Unix socket's has none
			c.log = c.log.With("peer", name)
		}
	}
	c.sock.init(nc)
	// It stays valid as long as calls are made: it is closed after the last one.
	c.peer = backend.Conn{ID: id, FD: c.sock.descriptor(), Disconnect: c.disconnect}
	c.call = backend.Call{Conn: &c.peer, Worker: backend.Handshake, Log: c.log}
	c.bytes = newBudget(s.opts.Limits.BytesPerConnection)
	c.sender.init(c)
	c.pace.cost.Store(int64(unknownCall))
	return c
}

// serve takes the connection from preconnect to the transmission phase, which other
// goroutines may end, or to close where it does not come to that.
func (c *conn) serve() {
	if c.denied == "" {
		defer c.s.pin()()
	}
	var in input
	in.init(c)
	if c.greet(&in) {
		c.transmit(&in)
	} else {
		in.release()
		c.leave()
	}
}

// greet makes the handshake. It returns false where there is to be no more.
func (c *conn) greet(in *input) bool {
	if c.denied != "" {
		c.turnAway(in)
		return false
	}
	if c.lane = c.s.gate.TryConnect(); c.lane == nil {
		c.attended(func(ctx context.Context) { c.lane = c.s.gate.Connect(ctx.Done()) })
	}
	if c.lane == nil {
		c.call.Debugf("closing the connection, which waited for its turn")
		return false
	}
	if err := c.preconnect(); err != nil {
		c.s.failures[ReasonPreconnect].Add(1)
		c.call.Debugf("preconnect refused the connection: %v", err)
		return false
	}
	if err := c.handshake(in); err != nil {
		c.failed(err)
		c.call.Debugf("handshake: %v", err)
		return false
	}
	if c.s.serial() {
		c.call.Debugf("handshake complete, processing requests serially")
	} else {
		c.call.Debugf("handshake complete, processing requests with %d threads", c.s.opts.Threads)
	}
	c.log = c.log.With("export", c.session.Export())
	c.call.Log = c.log
	c.began = time.Now()
	c.log.Info("client connected", "tls", c.secure != nil)
	return true
}

// done ends a goroutine's part in the transmission phase, and with the last one the
// connection.
func (c *conn) done() {
	if c.calling.Add(-1) > 0 {
		return
	}
	c.s.exports.leave(c)
	c.log.Info("client disconnected", "seconds", time.Since(c.began).Seconds())
	if c.guarded {
		c.s.guard.leave(c)
	}
	c.closeSession()
	c.leave()
}

// leave ends the connection.
func (c *conn) leave() {
	if c.lane != nil {
		c.peer.Release()
		c.lane.Leave()
	}
	c.close()
	c.s.forget(c)
	if c.over != nil {
		close(c.over)
	}
}

// number is the next number of a goroutine that makes calls.
func (c *conn) number() int {
	if c.s.serial() {
		return backend.Handshake
	}
	return int(c.numbers.Add(1) - 1)
}

func (c *conn) preconnect() error {
	c.lane.Lock()
	defer c.lane.Unlock()
	return c.s.opts.Chain.Preconnect(&c.call, c.s.opts.ReadOnly)
}

// openSession opens and prepares the chain and asks for everything that a client
// is told.
func (c *conn) openSession(export string) (caps backend.Caps, err error) {
	c.lane.Lock()
	defer c.lane.Unlock()
	session, err := c.s.opts.Chain.Open(&c.call, c.s.opts.ReadOnly, export)
	if err != nil {
		return caps, err
	}
	c.session = session
	if err = session.Prepare(&c.call); err == nil {
		caps, err = session.Caps(&c.call)
	}
	if err != nil {
		c.endSession()
	}
	return caps, err
}

// closeSession ends what openSession began; no call is under way.
func (c *conn) closeSession() {
	c.lane.Lock()
	defer c.lane.Unlock()
	c.endSession()
}

func (c *conn) endSession() {
	if err := c.session.Finalize(&c.call); err != nil {
		c.disconnect(true) // nbdkit-filter(3), .finalize
	}
	c.session.Close(&c.call)
	c.session = nil
}

// disconnect is nbdkit_disconnect(3): it may be called on any thread, within a
// call, and does not wait.
func (c *conn) disconnect(force bool) {
	defer c.stopBurst()
	if !force {
		c.status.CompareAndSwap(int32(serving), int32(refusing))
		return
	}
	c.status.Store(int32(dead))
	c.sock.shutdown()
}

// stopBurst keeps requests that are in hand from being carried out.
func (c *conn) stopBurst() {
	if r := c.reader.Load(); r != nil && r.burst.calls != nil {
		r.burst.calls.Stop()
	}
}

// refused tells whether new commands are refused.
func (c *conn) refused() bool {
	return status(c.status.Load()) != serving || c.s.quitting()
}
