package client

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net"
	"slices"
	"sync"
	"syscall"
	"time"

	"nbdhost/protocol"
)

// ErrDisconnected: the connection has ended, or ended before the command did. It
// wraps syscall.ENOTCONN.
var ErrDisconnected = fmt.Errorf("disconnected from the server: %w", syscall.ENOTCONN)

// Options are what to ask of a server. The zero value, or a nil pointer, asks
// for everything that this client knows.
type Options struct {
	// Export is the export's name; empty takes the URI's, or the default export.
	Export string
	// SimpleReplies does without structured replies, and so without extended
	// headers and meta contexts.
	SimpleReplies bool
	// CompactHeaders does without extended headers, and so without commands of
	// more than 32 bits of length.
	CompactHeaders bool
	// MetaContexts are the contexts to select. nil selects base:allocation, an
	// empty slice none.
	MetaContexts []string
	// NoGo asks for the export with NBD_OPT_EXPORT_NAME instead of NBD_OPT_GO.
	NoGo bool
	// Strict are the commands to refuse instead of sending them to the server.
	Strict Strict
	// Decline are handshake flags to do without although the server has them.
	Decline protocol.HandshakeFlags
	// Blocking has replies awaited in the kernel by a thread of the connection's own,
	// instead of in Go's poller: a reply is there some microseconds earlier, and
	// costs less. It is for few connections at a time, and has no effect under TLS.
	Blocking bool
	// Dial connects to the server that a URI names, within ctx, by a tunnel for
	// example; the connection is the client's to close. The URI's export is Export
	// where that is not empty. nil dials by TCP, Unix socket or vsock, as the URI says.
	Dial func(ctx context.Context, uri *protocol.URI) (net.Conn, error)
	// TLS does the client's side of a TLS handshake with the server of an nbds
	// URI, within ctx. nil is what RegisterTLS was given; without either such URIs
	// fail. New has no URI and fails if it is set: it must never go on in plain text.
	TLS TLSFunc

	secure *protocol.URI // the one that demands TLS, or nil
}

// TLSFunc does the client's side of a TLS handshake on nc with the server that an
// nbds URI names, within ctx, and returns the connection to go on with: nbdtls.Client,
// for example.
type TLSFunc func(ctx context.Context, nc net.Conn, uri *protocol.URI) (net.Conn, error)

var registeredTLS TLSFunc

// RegisterTLS sets what does TLS where Options.TLS is nil. It is for init functions:
// importing nbdhost/client/nbds calls it.
func RegisterTLS(f TLSFunc) { registeredTLS = f }

// Export is what a server says of one of its exports.
type Export struct {
	Name        string // the canonical one if the server told it
	Description string
	Size        uint64 // in bytes; unknown in a list
	Flags       protocol.ExportFlags
	BlockSize   protocol.BlockSizeInfo // zero if the server told none
}

// Conn is a connection in the transmission phase. See the package's
// documentation for what may be called when.
type Conn struct {
	// Calls are the commands that wait for their reply, without a limit.
	Calls

	link       *link
	in         *receiver
	out        outbox
	drainFunc  func() // drain
	export     Export
	structured bool
	extended   bool
	contexts   map[uint32]string // meta contexts by their number
	strict     Strict

	drained chan struct{} // closed when NBD_CMD_DISC has left and nothing is in flight
	ended   chan struct{} // closed when all is completed and nothing of ours runs

	// use is held while the receiver uses what came with a command: its buffer and
	// its functions. It is taken before mu.
	use sync.Mutex

	mu         sync.Mutex // guards what follows; never held while a completion runs
	quiet      sync.Cond  // sending or completing has fallen
	cookie     uint64     // the last one given out
	slots      []*command // by cookie modulo their number, a power of two
	used       int        // slots that are not nil
	idle       []*command // retired, for use again
	queue      []*command // issued, not yet in the outbox
	pending    int        // commands without a complete reply
	owed       uint64     // bytes of their requests
	due        uint64     // bytes of their replies, at most
	awake      bool       // the receiver will send what is queued
	sending    bool       // somebody owns the outbox
	completing int        // completions that run elsewhere than on the receiver
	leaving    bool       // Disconnect was called: no new commands
	err        error      // why the connection ended
}

// Dial connects to the server and export that an NBD URI names, and negotiates.
// ctx bounds the connecting and the handshake only; if it ends them, the error wraps
// its cause. opts may be nil.
func Dial(ctx context.Context, uri string, opts *Options) (*Conn, error) {
	h, err := dial(ctx, uri, opts, (*handshake).enter)
	if err != nil {
		return nil, err
	}
	return h.conn()
}

// dial connects and does the handshake up to what then asks; its errors name the URI.
func dial(ctx context.Context, uri string, opts *Options, then func(*handshake) error) (*handshake, error) {
	u, err := protocol.ParseURI(uri)
	if err != nil {
		return nil, err
	}
	var o Options
	if opts != nil {
		o = *opts
	}
	if o.Export != "" {
		u.Export = o.Export
	}
	o.Export = u.Export
	fail := func(err error) (*handshake, error) { return nil, fmt.Errorf("%v: %w", u, err) }
	if u.TLS {
		if o.secure = u; o.TLS == nil {
			o.TLS = registeredTLS
		}
		if o.TLS == nil {
			return fail(errors.New("no TLS in this program: import nbdhost/client/nbds, or set Options.TLS"))
		}
	}
	if o.Dial == nil {
		o.Dial = dialSocket
	}
	nc, err := o.Dial(ctx, u)
	if err == nil && nc == nil {
		err = errors.New("Options.Dial returned neither a connection nor an error: need one of them")
	}
	if err != nil {
		if end, ok := ctx.Deadline(); ok && !time.Now().Before(end) {
			<-ctx.Done() // it is about to end: package net watches the time by itself
		}
		if cause := context.Cause(ctx); cause != nil && !errors.Is(err, cause) {
			err = fmt.Errorf("%w: %w", err, cause)
		}
		return fail(err)
	}
	h, err := shake(ctx, nc, &o, then)
	if err != nil {
		return fail(err)
	}
	return h, nil
}

// dialSocket dials what a URI names.
func dialSocket(ctx context.Context, u *protocol.URI) (net.Conn, error) {
	if u.Transport == protocol.TransportVsock {
		return dialVsock(ctx, u.CID, u.Port)
	}
	network, address := u.Address()
	var d net.Dialer
	return d.DialContext(ctx, network, address)
}

// New negotiates on a connection, which it owns from now on: it is closed when
// New fails. ctx bounds the handshake only; if it ends that, the error wraps its cause.
// opts may be nil. New does no TLS: for that use Dial with an nbds URI and Options.Dial.
func New(ctx context.Context, nc net.Conn, opts *Options) (*Conn, error) {
	if opts != nil && opts.TLS != nil {
		nc.Close()
		return nil, errors.New("got Options.TLS without a URI, need none: use Dial with an nbds URI, and Options.Dial for the connection")
	}
	h, err := shake(ctx, nc, opts, (*handshake).enter)
	if err != nil {
		return nil, err
	}
	return h.conn()
}

// conn goes on from a handshake that has ended.
func (h *handshake) conn() (*Conn, error) {
	l, err := newLink(h.socket, h.nc, h.opts.Blocking)
	if err != nil {
		h.nc.Close()
		return nil, err
	}
	c := &Conn{
		link:       l,
		export:     h.export,
		structured: h.structured,
		extended:   h.extended,
		contexts:   h.contexts,
		strict:     h.opts.Strict,
		drained:    make(chan struct{}),
		ended:      make(chan struct{}),
		slots:      make([]*command, 16),
	}
	c.Calls = Calls{c, context.Background()}
	c.drainFunc = c.drain
	c.quiet.L = &c.mu
	c.out.init()
	early, _ := h.in.Peek(h.in.Buffered())
	c.in = newReceiver(c, early)
	go c.receive()
	return c, nil
}

// List asks the server that an NBD URI names for its exports. More than
// protocol.MaxExports of them are an error. With an error it returns the exports that
// were told before it, if any.
func List(ctx context.Context, uri string, opts *Options) ([]Export, error) {
	var exports []Export
	err := ask(ctx, uri, opts, func(h *handshake) (err error) {
		exports, err = h.list()
		return err
	})
	return exports, err
}

// Info asks about the export that an NBD URI names, without entering the
// transmission phase. It fails with an *OptionError if there is none.
func Info(ctx context.Context, uri string, opts *Options) (Export, error) {
	var export Export
	err := ask(ctx, uri, opts, func(h *handshake) error {
		err := h.info(protocol.OptInfo)
		export = h.export
		return err
	})
	return export, err
}

// ask opens a connection for one question.
func ask(ctx context.Context, uri string, opts *Options, question func(*handshake) error) error {
	h, err := dial(ctx, uri, opts, func(h *handshake) error {
		if err := question(h); err != nil {
			return err
		}
		return h.abort()
	})
	if err != nil {
		return err
	}
	h.nc.Close()
	return nil
}

// Export is what the server said of the export in the handshake.
func (c *Conn) Export() Export { return c.export }

// Size is the export's size in bytes.
func (c *Conn) Size() uint64 { return c.export.Size }

// Flags are the export's transmission flags.
func (c *Conn) Flags() protocol.ExportFlags { return c.export.Flags }

// BlockSize is the export's block size constraints, zero if the server told none.
func (c *Conn) BlockSize() protocol.BlockSizeInfo { return c.export.BlockSize }

// Name is the export's canonical name if the server told it, else the one asked for.
func (c *Conn) Name() string { return c.export.Name }

// Description is the export's description, empty if the server told none.
func (c *Conn) Description() string { return c.export.Description }

// Structured tells whether structured replies were negotiated, which extended
// headers include.
func (c *Conn) Structured() bool { return c.structured }

// Extended tells whether extended headers were negotiated.
func (c *Conn) Extended() bool { return c.extended }

// HasContext tells whether a meta context was selected.
func (c *Conn) HasContext(name string) bool {
	_, ok := c.contextID(name)
	return ok
}

func (c *Conn) contextID(name string) (uint32, bool) {
	for id, n := range c.contexts {
		if n == name {
			return id, true
		}
	}
	return 0, false
}

// The ends that were wanted here.
var (
	// errGone: the server closed the connection where it should, after NBD_CMD_DISC.
	errGone   = fmt.Errorf("%w, as asked", ErrDisconnected)
	errClosed = fmt.Errorf("%w: the connection was closed here", ErrDisconnected)
)

// Close ends the connection at once, completes what is in flight with an error
// and returns when no completion runs any more. It must not be called from one.
func (c *Conn) Close() error {
	c.fail(errClosed)
	<-c.ended
	return nil
}

// Done is closed once the connection has ended and every command has completed; Err
// then tells why.
func (c *Conn) Done() <-chan struct{} { return c.ended }

// Err is why the connection ended: an error that wraps ErrDisconnected. It is nil until
// Done is closed, and if it was Close or a Disconnect without error that ended it.
func (c *Conn) Err() error {
	select {
	case <-c.ended:
	default:
		return nil
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.err == errGone || c.err == errClosed {
		return nil
	}
	return c.err
}

// fail ends the connection for the first reason given.
func (c *Conn) fail(err error) {
	c.mu.Lock()
	if c.err == nil {
		c.err = err
	}
	c.mu.Unlock()
	c.link.close()
}

// settled tells Disconnect when nothing is left to wait for. The caller holds mu.
func (c *Conn) settled() {
	if c.leaving && c.pending == 0 && len(c.queue) == 0 && !c.sending {
		select {
		case <-c.drained:
		default:
			close(c.drained)
		}
	}
}

// finish completes what is left, when the receiver has ended.
func (c *Conn) finish() {
	c.mu.Lock()
	for c.sending {
		c.quiet.Wait()
	}
	c.sending = true // nobody sends any more
	c.queue = nil
	var left []*command
	for _, cmd := range c.slots {
		if cmd == nil {
			continue
		}
		if !cmd.replied {
			cmd.replied = true
			if !cmd.claimed {
				cmd.result = fmt.Errorf("%v: %w", cmd.request.Type, c.err)
			}
		}
		cmd.sent = true
		if cmd.claim() {
			left = append(left, cmd)
		} else {
			c.release(cmd)
		}
	}
	c.mu.Unlock()
	slices.SortFunc(left, func(a, b *command) int { return cmp.Compare(a.request.Cookie, b.request.Cookie) })
	for _, cmd := range left {
		c.complete(cmd, cmd.result)
	}
	c.mu.Lock()
	for c.completing > 0 {
		c.quiet.Wait()
	}
	c.mu.Unlock()
	c.link.free()
	close(c.ended)
}
