package server

import (
	"errors"
	"log/slog"
	"maps"
	"net"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"nbdhost/backend"
	"nbdhost/protocol"
)

// Options say what to serve and how.
type Options struct {
	// Chain is ready to serve: after_fork has been called. It is this server's alone, which
	// sees to its thread model.
	Chain *backend.Chain
	// ReadOnly opens every export read-only (nbdkit -r).
	ReadOnly bool
	// Threads is how many calls of one connection may run at a time, at least 1;
	// 0 stands for 16.
	Threads int
	// Log receives what there is to say; nil for nothing. Records carry the
	// attributes "conn", which counts the process's connections from 1, "peer" where the client
	// has an address, "export" once it is known, and "worker", which counts a
	// connection's workers from 0 and is absent in a handshake, and where requests of
	// a connection are never carried out side by side. Those about a request have
	// "command", "cookie", "offset", "length", and where they apply "errno", "module",
	// and "ms" and "unlogged" (SlowRequest). That clients come ("tls") and go
	// ("seconds"), and that requests fail, is said at slog.LevelInfo.
	Log *slog.Logger
	// NoStructuredReplies, NoExtendedHeaders and NoMetaContexts refuse these
	// options; without structured replies there are no extended headers either.
	NoStructuredReplies, NoExtendedHeaders, NoMetaContexts bool
	// StrictBlockSize refuses the requests of a client that asked for the block
	// sizes and breaks them. Without it they go to the module, which may well
	// know what to do, as nbdkit does (nbdkit-plugin(3), ".block_size").
	StrictBlockSize bool
	// SparseReads says when a read is answered with the holes in it.
	SparseReads SparseReads
	// Oldstyle speaks the oldstyle protocol, which has no options: every client
	// gets the default export.
	Oldstyle bool
	// TLS does the server's side of a TLS handshake, bounded by the deadlines
	// of the connection; nil refuses NBD_OPT_STARTTLS.
	TLS func(net.Conn) (TLSConn, error)
	// TLSRequired refuses whatever else a client wants before it has negotiated
	// TLS.
	TLSRequired bool
	// HandshakeMask hides handshake flags that would be offered otherwise.
	HandshakeMask protocol.HandshakeFlags
	// HandshakeTimeout is how long a client may take from the greeting to
	// the end of the handshake; 0 is for ever.
	HandshakeTimeout time.Duration
	// MaxProcs is up to where the server raises GOMAXPROCS while readers of connections
	// block in a receive; 0 leaves it alone. It is for one server of a process.
	MaxProcs int
	// SlowRequest is the longest time that a call into the chain may take, waiting
	// for its turn included, before there is a warning; 0 for none. There are at
	// most ten a second.
	SlowRequest time.Duration
	// DrainTimeout is how long a shutdown waits for requests in flight before
	// it cuts the connections off; 0 stands for 10 s.
	DrainTimeout time.Duration
	Limits       Limits

	maxHot int32         // how many sockets may be hot; 0 stands for maxHot()
	hotGap time.Duration // with it: how much time there may be between receives

	parkAfter time.Duration // 0 stands for the constant

	contended func(at time.Duration) bool // nil stands for processContention
}

// lastWords is how long an idle client has, after a shutdown, to send a command
// and be told NBD_ESHUTDOWN, before its connection is closed.
const lastWords = time.Second

// A Server serves one chain.
type Server struct {
	opts       Options
	log        *slog.Logger
	gate       *backend.Gate
	pinned     bool // all calls for a connection are made on the goroutine of its handshake, on one thread
	watcher    watcher
	hot        atomic.Int32 // how many sockets are
	slowLines  lineLimit
	exports    exports
	processors processors

	// Of opts.Limits.
	limited  bool // every request is
	requests budget
	bytes    budget
	delays   [limits]delays

	refusedLines lineLimit

	probing   atomic.Bool
	probeStep atomic.Value // a backend.Callback

	guard   guard
	workers atomic.Int64 // of all connections
	handed  atomic.Int64 // calls under way, or about to be, that are not a reader's own
	long    atomic.Int64 // calls under way where calls take long

	// For Stats.
	tlsFailures atomic.Uint64
	failures    [reasons]atomic.Uint64 // of handshakes

	quit     chan struct{} // closed by Shutdown
	stop     time.Time     // when an idle client is cut off, once quit is closed
	shutdown sync.Once

	mu    sync.Mutex // guards what follows
	conns map[uint64]*conn
	// admitted are the connections that no limit refused: how many are open, how
	// many there have been, and how many are open from each address.
	admitted  int
	accepted  uint64
	addresses map[string]int
	open      sync.WaitGroup // connections; Add only under mu and before quit
	accepting sync.WaitGroup // Serves, and drain; likewise
	listeners map[*net.Listener]struct{}
}

// New returns a server for o.Chain.
func New(o Options) *Server {
	if o.Threads <= 0 {
		o.Threads = 16
	}
	if o.DrainTimeout <= 0 {
		o.DrainTimeout = 10 * time.Second
	}
	if o.parkAfter == 0 {
		o.parkAfter = parkAfter
	}
	if o.contended == nil {
		o.contended = func(at time.Duration) bool { return processContention().is(at) }
	}
	if o.maxHot == 0 {
		o.maxHot, o.hotGap = maxHot(), quickGap
	}
	log := o.Log
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	if o.Limits.BytesPerConnection == 0 {
		o.Limits.BytesPerConnection = defaultBytesPerConnection
	}
	pinned := o.Chain.Pinned()
	if pinned && o.Limits.Connections == 0 {
		o.Limits.Connections = defaultPinned
	}
	s := &Server{
		opts:      o,
		log:       log,
		gate:      backend.NewGate(o.Chain.ThreadModel()),
		pinned:    pinned,
		quit:      make(chan struct{}),
		conns:     map[uint64]*conn{},
		addresses: map[string]int{},
		listeners: map[*net.Listener]struct{}{},
		requests:  newBudget(int64(o.Limits.Requests)),
		bytes:     newBudget(o.Limits.Bytes),
	}
	s.exports.bandwidth = o.Limits.Bandwidth
	s.limited = o.Limits.Requests > 0 || o.Limits.Bytes > 0 || o.Limits.Bandwidth > 0
	return s
}

// Serve accepts connections on l until Shutdown, then returns nil. It closes l.
// An error is one of Accept that will not pass, such as [net.ErrClosed] where somebody
// else has closed l, which takes that listener away and leaves its connections.
func (s *Server) Serve(l net.Listener) error {
	s.mu.Lock()
	if s.quitting() {
		s.mu.Unlock()
		l.Close()
		return nil
	}
	s.accepting.Add(1)
	s.listeners[&l] = struct{}{}
	s.mu.Unlock()
	defer func() {
		s.mu.Lock()
		delete(s.listeners, &l)
		s.mu.Unlock()
		l.Close()
		s.accepting.Done()
	}()
	for {
		nc, err := l.Accept()
		if err != nil {
			if s.quitting() {
				return nil
			}
			if passing(err) {
				s.log.Error("accept connection: " + err.Error() + "; trying again")
				select { // out of descriptors: wait until some may be free
				case <-time.After(100 * time.Millisecond):
				case <-s.quit:
				}
				continue
			}
			return err
		}
		s.log.Debug("accepted connection")
		if c := s.admit(nc, false); c != nil {
			go c.serve()
		}
	}
}

// passing tells whether an error of Accept concerns one connection or a lack of resources, and not
// the listener: accept(2) also returns what has happened to the connection before.
func passing(err error) bool {
	if errors.Is(err, net.ErrClosed) {
		return false
	}
	var t interface{ Temporary() bool }
	if errors.As(err, &t) && t.Temporary() {
		return true
	}
	var op *net.OpError
	if errors.As(err, &op) && op.Op != "accept" {
		return false // of whatever the program's listener is made of
	}
	var errno syscall.Errno
	errors.As(err, &errno)
	switch errno {
	case syscall.ENOBUFS, syscall.ENOMEM, syscall.EPERM, syscall.EPROTO, syscall.ENOPROTOOPT, syscall.ECONNABORTED,
		syscall.ENETDOWN, syscall.ENETUNREACH, syscall.EHOSTDOWN, syscall.EHOSTUNREACH, syscall.ENONET:
		return true
	}
	return false
}

// ServeConn serves one connection and returns when it is over. It closes nc, which nobody else may
// use from here on: data goes past it where it is a socket ([Socket]), and a busy connection is moved
// to a descriptor of its own, so that to close nc would not end it. Shutdown does. Without deadlines
// (SSH's channels have none) an idle client stays until DrainTimeout, and HandshakeTimeout has no effect.
func (s *Server) ServeConn(nc net.Conn) {
	if c := s.admit(nc, false); c != nil {
		c.over = make(chan struct{})
		c.serve()
		<-c.over
	}
}

// admit makes nc a connection of the server's. After a shutdown it closes it; one
// beyond the limits is only there to be told so, if even that. A probe's is no
// client's: it does not count.
func (s *Server) admit(nc net.Conn, probe bool) *conn {
	c := s.enter(nc, probe)
	if c == nil {
		nc.Close()
	}
	return c
}

// enter is admit but for the closing, since a program's connection may do anything then.
func (s *Server) enter(nc net.Conn, probe bool) *conn {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.quitting() {
		return nil
	}
	c := newConn(s, nc)
	if !probe && !s.count(c, address(nc)) {
		return nil
	}
	s.conns[c.id] = c
	s.open.Add(1)
	return c
}

// forget ends what admit began.
func (s *Server) forget(c *conn) {
	s.mu.Lock()
	delete(s.conns, c.id)
	if c.counted {
		s.admitted--
		if s.addresses[c.address]--; s.addresses[c.address] == 0 {
			delete(s.addresses, c.address)
		}
	}
	s.mu.Unlock()
	s.open.Done()
}

// pin keeps the calling goroutine, which makes all calls for a connection, on its thread until
// unpin is called, if the chain wants that.
func (s *Server) pin() (unpin func()) {
	if !s.pinned {
		return func() {}
	}
	runtime.LockOSThread()
	return runtime.UnlockOSThread
}

// serial tells whether the requests of one connection are never carried out side by
// side. Who makes the calls is then no news for the log, as nbdkit has it.
func (s *Server) serial() bool {
	return s.opts.Threads == 1 || s.opts.Chain.ThreadModel() < backend.Parallel
}

// Quit returns a channel that is closed by Shutdown.
func (s *Server) Quit() <-chan struct{} { return s.quit }

func (s *Server) quitting() bool {
	select {
	case <-s.quit:
		return true
	default:
		return false
	}
}

// Shutdown begins to stop the server and returns: no connection is accepted any
// more, new commands are answered with NBD_ESHUTDOWN, those in flight go on. It
// may be called on any thread, also from within a call into the chain, and more
// than once.
func (s *Server) Shutdown() {
	s.shutdown.Do(func() {
		s.stop = time.Now().Add(lastWords)
		s.accepting.Add(1)
		close(s.quit)
		// Not here: this may be a thread of a module's, in a callback.
		go s.drain()
	})
}

func (s *Server) drain() {
	defer s.accepting.Done()
	s.mu.Lock()
	listeners, conns := slices.Collect(maps.Keys(s.listeners)), slices.Collect(maps.Values(s.conns))
	s.mu.Unlock()
	// Without mu, and without waiting: the program's listeners and connections may do anything.
	for _, c := range conns {
		c.sock.wake(lastWords)
	}
	for _, l := range listeners {
		s.accepting.Go(func() { (*l).Close() })
	}
}

// Wait waits for Shutdown, and then until every connection has been closed and every Serve
// is about to return, so that its address is free. Connections that are still there after
// DrainTimeout are cut off: their clients get no answer any more. It returns false where a call
// into the chain, or Accept, has not come back even a second later; then the chain must not be
// touched any more. Clients without a request in flight are cut off a second after Shutdown.
func (s *Server) Wait() bool {
	<-s.quit
	// Who was being admitted when quit was closed is counted once mu is free.
	s.mu.Lock()
	closed := make(chan struct{})
	s.mu.Unlock()
	go func() {
		s.accepting.Wait()
		s.open.Wait()
		close(closed)
	}()
	select {
	case <-closed:
		return true
	case <-time.After(s.opts.DrainTimeout):
	}
	s.mu.Lock()
	conns := slices.Collect(maps.Values(s.conns))
	s.mu.Unlock()
	for _, c := range conns {
		go c.disconnect(true)
	}
	select {
	case <-closed:
		return true
	case <-time.After(lastWords):
		return false
	}
}
