package client

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"syscall"

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
	// TLS does the client's side of a TLS handshake with the server of an nbds
	// URI, within ctx: nbdtls.Client, for example. Without it such URIs fail.
	TLS func(ctx context.Context, nc net.Conn, uri *protocol.URI) (net.Conn, error)

	secure *protocol.URI // the one that demands TLS, or nil
}

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
	nc         net.Conn
	in         io.Reader // nc, buffered
	export     Export
	structured bool
	extended   bool
	contexts   map[uint32]string // meta contexts by their number
	strict     Strict

	wake    chan struct{} // tells the sender that the queue has grown; holds one
	broken  chan struct{} // closed with err set: the sender must end
	ended   chan struct{} // closed when both goroutines have ended and all is completed
	running sync.WaitGroup

	mu       sync.Mutex // guards what follows; never held while a completion runs
	cookie   uint64     // the last one given out
	commands map[uint64]*command
	queue    []*command // issued, not yet sent
	leaving  bool       // Disconnect was called: no new commands
	err      error      // why the connection ended
}

// Dial connects to the server and export that an NBD URI names, and negotiates.
// ctx bounds the connecting and the handshake only. opts may be nil.
func Dial(ctx context.Context, uri string, opts *Options) (*Conn, error) {
	nc, opts, err := dial(ctx, uri, opts)
	if err != nil {
		return nil, err
	}
	return New(ctx, nc, opts)
}

// dial opens the socket, and completes the options from the URI.
func dial(ctx context.Context, uri string, opts *Options) (net.Conn, *Options, error) {
	u, err := protocol.ParseURI(uri)
	if err != nil {
		return nil, nil, err
	}
	if u.Transport == protocol.TransportVsock {
		return nil, nil, fmt.Errorf("dial %s: this client has no vsock; use TCP or a Unix socket", u)
	}
	var o Options
	if opts != nil {
		o = *opts
	}
	if u.TLS {
		if o.secure = u; o.TLS == nil {
			return nil, nil, fmt.Errorf("dial %s: got no Options.TLS: need it for a URI with TLS", u)
		}
	}
	if o.Export == "" {
		o.Export = u.Export
	}
	network, address := u.Address()
	var d net.Dialer
	nc, err := d.DialContext(ctx, network, address)
	return nc, &o, err
}

// New negotiates on a connection, which it owns from now on: it is closed when
// New fails. ctx bounds the handshake only. opts may be nil.
func New(ctx context.Context, nc net.Conn, opts *Options) (*Conn, error) {
	h, err := shake(ctx, nc, opts, (*handshake).enter)
	if err != nil {
		h.nc.Close()
		return nil, err
	}
	c := &Conn{
		nc:         h.nc,
		in:         h.in,
		export:     h.export,
		structured: h.structured,
		extended:   h.extended,
		contexts:   h.contexts,
		wake:       make(chan struct{}, 1),
		broken:     make(chan struct{}),
		ended:      make(chan struct{}),
		commands:   make(map[uint64]*command),
	}
	if opts != nil {
		c.strict = opts.Strict
	}
	c.running.Add(2)
	go c.send()
	go c.receive()
	go c.finish()
	return c, nil
}

// List asks the server that an NBD URI names for its exports.
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
	nc, opts, err := dial(ctx, uri, opts)
	if err != nil {
		return err
	}
	h, err := shake(ctx, nc, opts, func(h *handshake) error {
		if err := question(h); err != nil {
			return err
		}
		return h.abort()
	})
	h.nc.Close()
	return err
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

// Disconnect sends NBD_CMD_DISC after what is queued, and waits until the
// server has answered what is in flight and closed the connection. It returns
// an error if the connection ended in another way. No command can be issued
// any more.
func (c *Conn) Disconnect() error {
	c.mu.Lock()
	if c.err == nil && !c.leaving {
		c.leaving = true
		c.enqueue(&command{request: protocol.Request{Type: protocol.CmdDisc}})
	}
	c.mu.Unlock()
	<-c.ended
	c.mu.Lock()
	defer c.mu.Unlock()
	if errors.Is(c.err, errGone) {
		return nil
	}
	return c.err
}

// errGone: the server closed the connection where it should, after NBD_CMD_DISC.
var errGone = fmt.Errorf("%w, as asked", ErrDisconnected)

// Close ends the connection at once, completes what is in flight with an error
// and returns when no completion runs any more. It must not be called from one.
func (c *Conn) Close() error {
	c.fail(fmt.Errorf("%w: the connection was closed here", ErrDisconnected))
	<-c.ended
	return nil
}

// Done is closed once the connection has ended and every command has completed.
func (c *Conn) Done() <-chan struct{} { return c.ended }

// fail ends the connection for the first reason given.
func (c *Conn) fail(err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.err != nil {
		return
	}
	c.err = err
	close(c.broken)
	c.nc.Close()
}

// finish completes what is left when neither goroutine can touch it any more.
func (c *Conn) finish() {
	c.running.Wait()
	c.mu.Lock()
	err := c.err
	left := make([]*command, 0, len(c.commands))
	for _, cmd := range c.commands {
		if !cmd.completed {
			left = append(left, cmd)
		}
	}
	c.queue = nil
	c.mu.Unlock()
	for _, cmd := range left {
		result := cmd.result // if the server answered before it had read all
		if !cmd.replied {
			result = fmt.Errorf("%v: %w", cmd.request.Type, err)
		}
		c.complete(cmd, result)
	}
	close(c.ended)
}
