package backend

import (
	"context"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
)

// Flags modify a data call (nbdkit-plugin(3), "Flags").
type Flags uint32

const (
	MayTrim  Flags = 1 << iota // zero may punch a hole
	FUA                        // done only when the data is on permanent storage
	ReqOne                     // extents: only the first one is wanted
	FastZero                   // zero: fail at once rather than be slow
)

// Modes that can_fua and can_cache return. NBDKIT_FUA_* and NBDKIT_CACHE_* have the same values
// in nbdkit's headers; can_zero of a [Session] uses them too.
const (
	None    = 0
	Emulate = 1
	Native  = 2
)

// An Export is one entry of what a backend has to offer.
type Export struct {
	Name        string // UTF-8, at most 4096 bytes; "" is the default export
	Description string // "" when there is none
}

// BlockSize is what block_size returns, in bytes. All zero means that the module
// has nothing to say.
type BlockSize struct {
	Min, Preferred, Max uint32
}

// A Module is what plugins and filters have in common. It performs the callbacks
// that Has reports and is never asked for another; what is to be done instead is
// the business of [Layer] and [Session].
//
// Errors are of type *Error; any other one counts as the server's own in logs and
// figures. The client gets the [syscall.Errno] that is in an error, or EIO, and with
// structured replies the text. A panic ends the process, as one in any goroutine does.
type Module interface {
	// Name is the module's own name, such as "file".
	Name() string
	// Has tells whether the module has the callback. The answer never changes.
	Has(Callback) bool
	// ThreadModel is the most parallel model that the module was built for.
	ThreadModel() ThreadModel

	Load()
	Unload()
	Config(key, value string) error
	ConfigComplete() error
	GetThreadModel() (ThreadModel, error)
	GetReady() error
	AfterFork() error
	Cleanup()

	Preconnect(c *Call, readonly bool) error
	// ListExports returns the exports; where the module asked for its default
	// export to be listed, useDefault is true.
	ListExports(c *Call, readonly bool) (list []Export, useDefault bool, err error)
	// DefaultExport returns ok = false where the module wants no client to
	// reach it by the empty name.
	DefaultExport(c *Call, readonly bool) (name string, ok bool)
}

// A Backend is the innermost module of a chain, which holds the data: a plugin that package
// loader has loaded, [Mem], or one that a Go program brings.
type Backend interface {
	Module
	// Open is given the export name after the default one was resolved. Without an error it
	// returns a Handle.
	Open(c *Call, readonly bool, export string) (Handle, error)
}

// Pinned is a Backend that may want all calls for one connection on one thread.
type Pinned interface {
	Backend
	Pinned() bool
}

// A Filter is a module over another layer, which it is free to call in each of
// its own callbacks, and on goroutines and threads of its own.
type Filter interface {
	Module
	// SetNext says what the filter stands over, before anything else is called.
	SetNext(*Layer)
	// OpenOver is Open for s, a session that is not open yet: s.ReadOnly and
	// s.Export are the arguments. A filter that has something below it there
	// calls s.OpenNext or s.SetNext, now or at any time until it is closed.
	OpenOver(c *Call, s *Session) (FilterHandle, error)
}

// A FilterHandle is what a Filter's OpenOver returned.
type FilterHandle interface {
	Handle
	// Prepare follows the opening, once the layer below has been prepared.
	Prepare(c *Call, readonly bool) error
	// Finalize precedes Close, before the layer below is finalized; it is not
	// called where Prepare was not or failed.
	Finalize(c *Call) error
}

// A Handle is what a Backend's Open returned. Close is called exactly once,
// last, after every other call has returned.
type Handle interface {
	Close(c *Call)

	// GetSize returns bytes, at least 0.
	GetSize(c *Call) (int64, error)
	ExportDescription(c *Call) (string, bool)
	BlockSize(c *Call) (BlockSize, error)
	// Can asks one of CanWrite ... CanCache and returns what the module said.
	Can(c *Call, cb Callback) (int, error)

	// The data calls, for n bytes or all of p, off bytes into the export, and within its size. p is
	// the callee's for the call only. A backend in C is
	// given memory outside Go's heap (see [GetBuffer]) wherever speed matters.
	Pread(c *Call, p []byte, off uint64) error
	Pwrite(c *Call, p []byte, off uint64, flags Flags) error
	Flush(c *Call) error
	Trim(c *Call, n uint32, off uint64, flags Flags) error
	Zero(c *Call, n uint32, off uint64, flags Flags) error
	// Extents adds to x, which covers [off, size of the export), and returns the errors of that.
	Extents(c *Call, n uint32, off uint64, flags Flags, x *Extents) error
	Cache(c *Call, n uint32, off uint64) error
}

// Workers of calls that no worker of a connection makes.
const (
	Handshake = -1 // the goroutine that opens and closes the connection
	Foreign   = -2 // a thread that a module made
)

// A Call says on whose behalf calls into a chain are made. Each goroutine that
// makes calls has its own, and reuses it from call to call.
type Call struct {
	Conn *Conn
	// Worker counts the workers of the connection from 0, or is Handshake or
	// Foreign. Only log lines show it.
	Worker int
	// Log receives a line for each callback at debug level; nil for none.
	Log *slog.Logger
	// Request is what the client asked for. Only messages show it.
	Request Request
}

// A Request names a client's request, in the words of the protocol.
type Request struct {
	Command string // "" for none
	Cookie  uint64 // the client's own number
}

// tracing tells whether debug lines are wanted at all.
func (c *Call) tracing() bool {
	return c.Log != nil && c.Log.Enabled(context.Background(), slog.LevelDebug)
}

// Debugf writes a debug line; the arguments are only formatted if it is wanted.
func (c *Call) Debugf(format string, args ...any) {
	if c.tracing() {
		c.Log.LogAttrs(context.Background(), slog.LevelDebug, fmt.Sprintf(format, args...), c.attributes()...)
	}
}

// attributes are what log lines of the call carry.
func (c *Call) attributes() []slog.Attr {
	if c.Request.Command == "" {
		return nil
	}
	return []slog.Attr{slog.String("command", c.Request.Command), slog.Uint64("cookie", c.Request.Cookie)}
}

var connIDs atomic.Uint64

// NewConnID returns a number for [Conn.ID]: the process's connections count from 1, whichever server has
// them, since modules do not know of servers.
func NewConnID() uint64 { return connIDs.Add(1) }

// A Conn is what modules may know of a connection and do to it. The server makes
// one for each connection and sets the fields before the first call; TLS and the
// like change only between calls.
type Conn struct {
	ID  uint64 // of NewConnID; 0 for no client's
	FD  int    // the socket, for questions about the peer; -1 if there is none
	TLS bool   // TLS has been negotiated

	// TLSDN and TLSIssuerDN are the distinguished names (RFC 4514) of the
	// client's certificate and of its issuer, or empty.
	TLSDN, TLSIssuerDN string

	// Disconnect ends the connection as nbdkit_disconnect(3) says. It does not
	// wait, and may be called on any thread at any time.
	Disconnect func(force bool)

	// Local belongs to the package that implements the backends; it is set on
	// the connection's first call, as are the functions that follow. They may be
	// nil. OnMove is called with a new FD while no call is under way, OnRelease
	// once the last call has returned.
	Local     any
	OnMove    func(fd int)
	OnRelease func()

	mu        sync.Mutex
	log       *slog.Logger             // of the connection's first call
	elsewhere *slog.Logger             // of the chain
	calls     atomic.Pointer[[]*Call]  // by Worker - Foreign
	chain     *Chain                   // of the connection's first call
	counts    []atomic.Uint64          // see callTotals
	defaults  map[*Layer]defaultExport // what default_export has answered
}

// adopt takes note of the connection's first call, which must come before any
// other goroutine makes one.
func (c *Conn) adopt(first *Call, ch *Chain) {
	if c.log == nil {
		c.log, c.elsewhere = first.Log, ch.log
	}
	if c.chain == nil {
		ch.enter(c)
	}
}

// Call returns the call that the given worker, or Handshake or Foreign, uses. It
// is for modules, which know of a call only the connection and the worker.
func (c *Conn) Call(worker int) *Call {
	i := worker - Foreign
	if calls := c.calls.Load(); calls != nil && i < len(*calls) && (*calls)[i] != nil {
		return (*calls)[i]
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	var calls []*Call
	if old := c.calls.Load(); old != nil {
		calls = *old
	}
	calls = append(make([]*Call, 0, max(len(calls), i+1)), calls...)[:max(len(calls), i+1)]
	call := &Call{Conn: c, Worker: worker, Log: c.log}
	switch {
	case worker == Foreign:
		call.Log = c.elsewhere
	case worker != Handshake && c.log != nil:
		call.Log = c.log.With("worker", worker)
	}
	calls[i] = call
	c.calls.Store(&calls)
	return call
}

// Logger returns the log of the connection's first call, which names the connection;
// nil for none.
func (c *Conn) Logger() *slog.Logger { return c.log }

// Move changes FD. No call is under way.
func (c *Conn) Move(fd int) {
	c.FD = fd
	if c.OnMove != nil {
		c.OnMove(fd)
	}
}

// Release ends the life of the connection; no call follows.
func (c *Conn) Release() {
	if c.OnRelease != nil {
		c.OnRelease()
		c.OnRelease = nil
	}
	c.Local = nil
	if c.chain != nil {
		c.chain.leave(c)
	}
}
