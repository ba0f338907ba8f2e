package backend

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
)

// Trace says which callbacks write a debug line: the two server flags
// -D nbdkit.backend.controlpath and -D nbdkit.backend.datapath.
type Trace struct{ Control, Data bool }

// A Chain is a plugin with the filters over it.
type Chain struct {
	layers []*Layer // the plugin first
	log    *slog.Logger
	trace  Trace
	model  ThreadModel
	shared Conn // of sessions that belong to no client
	counts callTotals
}

// NewChain returns a chain around plugin; filters go from the outermost to the
// one next to the plugin, as on the command line. Debug lines of the life cycle go to
// log, which may be nil; trace chooses them, and those of the sessions.
func NewChain(plugin Backend, log *slog.Logger, trace Trace, filters ...Filter) *Chain {
	ch := &Chain{log: log, trace: trace, model: plugin.ThreadModel()}
	ch.shared = Conn{FD: -1, log: log, elsewhere: log}
	l := &Layer{chain: ch, module: plugin, plugin: plugin}
	ch.layers = append(ch.layers, l)
	for _, f := range slices.Backward(filters) {
		f.SetNext(l)
		l = &Layer{chain: ch, module: f, filter: f, next: l, index: len(ch.layers)}
		for cb := range callbacks {
			l.passes[cb] = !f.Has(cb)
		}
		ch.layers = append(ch.layers, l)
	}
	ch.enter(&ch.shared)
	return ch
}

// RequireTLS says that every client must use TLS. A session that belongs to none then
// counts as secured too, as with nbdkit. Call it before anything is opened.
func (ch *Chain) RequireTLS() { ch.shared.TLS = true }

func (ch *Chain) top() *Layer { return ch.layers[len(ch.layers)-1] }

// Name returns the name of the plugin, which stands for the whole chain in log
// lines.
func (ch *Chain) Name() string { return ch.layers[0].module.Name() }

// ThreadModel returns the model to serve the chain with; it is final once
// SetThreadModel has been called.
func (ch *Chain) ThreadModel() ThreadModel { return ch.model }

func (ch *Chain) tracef(format string, args ...any) {
	if ch.trace.Control && ch.log != nil && ch.log.Enabled(context.Background(), slog.LevelDebug) {
		ch.log.Debug(fmt.Sprintf(format, args...))
	}
}

func (ch *Chain) traceCall(c *Call, format string, args ...any) {
	if ch.trace.Control {
		c.Debugf(format, args...)
	}
}

// Load calls .load of each layer, the plugin's first. Unload must be called after
// it, whatever happens between.
func (ch *Chain) Load() {
	for _, l := range ch.layers {
		ch.tracef("%s: load", l.module.Name())
		if l.module.Has(Load) {
			l.module.Load()
		}
	}
}

// ErrNoConfig is a parameter for a module that takes none.
var ErrNoConfig = errors.New("this plugin does not need command line configuration")

// Config passes one key=value parameter to the outermost layer; the filters decide
// which reach the plugin.
func (ch *Chain) Config(key, value string) error { return ch.top().Config(key, value) }

// ConfigComplete ends the configuration.
func (ch *Chain) ConfigComplete() error { return ch.top().ConfigComplete() }

// SetThreadModel settles the thread model: the strictest of limit, what the
// plugin was built for, and what each .thread_model says now.
func (ch *Chain) SetThreadModel(limit ThreadModel) error {
	model := min(limit, ch.layers[0].module.ThreadModel())
	for _, l := range ch.layers {
		if l.module.Has(GetThreadModel) {
			m, err := l.module.GetThreadModel()
			if err != nil {
				return err
			}
			if !m.Valid() {
				return fmt.Errorf("%s: thread_model returned %d: need 0 (%v) to %d (%v)",
					l.module.Name(), m, SerializeConnections, Parallel, Parallel)
			}
			model = min(model, m)
		}
		l.model = model
	}
	ch.model = model
	if ch.log != nil {
		ch.log.Debug("using thread model: " + model.String())
	}
	return nil
}

// GetReady is the last step whose errors the user is sure to see.
func (ch *Chain) GetReady() error {
	for _, l := range ch.layers {
		if l.filter != nil {
			ch.tracef("%s: get_ready thread_model=%d", l.module.Name(), ch.model)
		} else {
			ch.tracef("%s: get_ready", l.module.Name())
		}
		if l.module.Has(GetReady) {
			if err := l.module.GetReady(); err != nil {
				return err
			}
		}
	}
	return nil
}

// AfterFork is called in the process that will serve. Cleanup must be called
// after it has been, whatever it returned.
func (ch *Chain) AfterFork() error {
	for _, l := range ch.layers {
		ch.tracef("%s: after_fork", l.module.Name())
		if l.module.Has(AfterFork) {
			if err := l.module.AfterFork(); err != nil {
				return err
			}
		}
	}
	return nil
}

// Pinned tells whether all calls for one connection have to be made on one thread.
func (ch *Chain) Pinned() bool {
	p, ok := ch.layers[0].module.(Pinned)
	return ok && p.Pinned()
}

// Cleanup is called once no connection is left; the outermost layer comes first.
func (ch *Chain) Cleanup() {
	for _, l := range slices.Backward(ch.layers) {
		ch.tracef("%s: cleanup", l.module.Name())
		if l.module.Has(Cleanup) {
			l.module.Cleanup()
		}
	}
}

// Unload is the last call; the plugin comes first, as in nbdkit.
func (ch *Chain) Unload() {
	for _, l := range ch.layers {
		kind := "plugin"
		if l.filter != nil {
			kind = "filter"
		}
		ch.tracef("%s: unload %s", l.module.Name(), kind)
		if l.module.Has(Unload) {
			l.module.Unload()
		}
	}
}

// MaxString is the longest string of the NBD protocol, in bytes; a longer one
// from a module is ignored (nbdkit-plugin(3), ".default_export").
const MaxString = 4096

// Preconnect asks whether the peer may connect at all. The connection's first
// call is this one, or one of those below.
func (ch *Chain) Preconnect(c *Call, readonly bool) error {
	c.Conn.adopt(c, ch)
	return ch.top().Preconnect(c, readonly)
}

// ListExports returns what NBD_OPT_LIST answers.
func (ch *Chain) ListExports(c *Call, readonly bool) ([]Export, error) {
	c.Conn.adopt(c, ch)
	return ch.top().ListExports(c, readonly)
}

// DefaultExport returns the name that the empty export name stands for, or
// ok = false where the empty name is not permitted.
func (ch *Chain) DefaultExport(c *Call, readonly bool) (name string, ok bool) {
	c.Conn.adopt(c, ch)
	return ch.top().DefaultExport(c, readonly)
}

// Open opens the chain for a connection. The session must be ended with Close.
func (ch *Chain) Open(c *Call, readonly bool, export string) (*Session, error) {
	c.Conn.adopt(c, ch)
	return ch.top().Open(c, readonly, export)
}

func digit(b bool) int {
	if b {
		return 1
	}
	return 0
}
