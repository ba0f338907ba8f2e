package backend

import (
	"context"
	"fmt"
	"log/slog"
)

// Flags modify a data call (nbdkit-plugin(3), "Flags").
type Flags uint32

const (
	MayTrim  Flags = 1 << iota // zero may punch a hole
	FUA                        // done only when the data is on permanent storage
	ReqOne                     // extents: only the first one is wanted
	FastZero                   // zero: fail at once rather than be slow
)

// Modes that can_fua and can_cache return. FUA* and Cache* have the same values
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

// A Backend is one module of a chain. It performs the callbacks that Has
// reports and is never asked for another; what is to be done instead is the
// business of [Chain] and [Session]. Errors are of type *Error.
//
// All implementations but [Mem] are in package loader.
type Backend interface {
	// Name is the module's own name, such as "file".
	Name() string
	// Has tells whether the module has the callback.
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
	// Open is given the export name after the default one was resolved.
	Open(c *Call, readonly bool, export string) (Handle, error)
}

// A Handle is what a Backend's Open returned. Close is called exactly once,
// last, after every other call has returned.
type Handle interface {
	Close(c *Call)

	GetSize(c *Call) (int64, error)
	ExportDescription(c *Call) (string, bool)
	BlockSize(c *Call) (BlockSize, error)
	// Can asks one of CanWrite ... CanCache and returns what the module said.
	Can(c *Call, cb Callback) (int, error)

	// The data calls. p is the callee's for the call only. A backend in C is
	// given memory outside Go's heap (see [GetBuffer]) wherever speed matters.
	Pread(c *Call, p []byte, off uint64) error
	Pwrite(c *Call, p []byte, off uint64, flags Flags) error
	Flush(c *Call) error
	Trim(c *Call, n uint32, off uint64, flags Flags) error
	Zero(c *Call, n uint32, off uint64, flags Flags) error
	// Extents adds to x, which covers [off, size of the export).
	Extents(c *Call, n uint32, off uint64, flags Flags, x *Extents) error
	Cache(c *Call, n uint32, off uint64) error
}

// Handshake is the Worker of a call made outside the workers of a connection.
const Handshake = -1

// A Call says on whose behalf calls into a chain are made. Each goroutine that
// makes calls has its own, and reuses it from call to call.
type Call struct {
	Conn *Conn
	// Worker counts the workers of the connection from 0, or is Handshake.
	// Only log lines show it.
	Worker int
	// Log receives a line for each callback at debug level; nil for none.
	Log *slog.Logger
}

// tracing tells whether debug lines are wanted at all.
func (c *Call) tracing() bool {
	return c.Log != nil && c.Log.Enabled(context.Background(), slog.LevelDebug)
}

// Debugf writes a debug line; the arguments are only formatted if it is wanted.
func (c *Call) Debugf(format string, args ...any) {
	if c.tracing() {
		c.Log.Debug(fmt.Sprintf(format, args...))
	}
}

// A Conn is what modules may know of a connection and do to it. The server makes
// one for each connection and sets the fields before the first call; TLS and the
// like change only between calls.
type Conn struct {
	ID  uint64 // counts connections from 1
	FD  int    // the socket, for questions about the peer; -1 if there is none
	TLS bool   // TLS has been negotiated

	// TLSDN and TLSIssuerDN are the distinguished names (RFC 4514) of the
	// client's certificate and of its issuer, or empty.
	TLSDN, TLSIssuerDN string

	// Disconnect ends the connection as nbdkit_disconnect(3) says. It does not
	// wait, and may be called on any thread at any time.
	Disconnect func(force bool)

	// Local belongs to the package that implements the backends; it is set on
	// the connection's first call. OnRelease, if not nil, is called once the
	// last call has returned.
	Local     any
	OnRelease func()
}

// Release ends the life of the connection; no call follows.
func (c *Conn) Release() {
	if c.OnRelease != nil {
		c.OnRelease()
		c.OnRelease = nil
	}
	c.Local = nil
}
