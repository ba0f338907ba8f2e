package backend

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"syscall"
)

// Trace says which callbacks write a debug line: the two server flags
// -D nbdkit.backend.controlpath and -D nbdkit.backend.datapath.
type Trace struct{ Control, Data bool }

// A Chain is a plugin with the filters over it.
type Chain struct {
	plugin Backend
	log    *slog.Logger
	trace  Trace
	model  ThreadModel
}

// NewChain returns a chain around plugin. Debug lines of the life cycle go to
// log, which may be nil; trace chooses them, and those of the sessions.
func NewChain(plugin Backend, log *slog.Logger, trace Trace) *Chain {
	return &Chain{plugin: plugin, log: log, trace: trace, model: plugin.ThreadModel()}
}

// Name returns the name of the plugin, which stands for the whole chain in log
// lines.
func (ch *Chain) Name() string { return ch.plugin.Name() }

// ThreadModel returns the model to serve the chain with; it is final once
// SetThreadModel has been called.
func (ch *Chain) ThreadModel() ThreadModel { return ch.model }

func (ch *Chain) tracef(format string, args ...any) {
	if ch.trace.Control && ch.log != nil && ch.log.Enabled(context.Background(), slog.LevelDebug) {
		ch.log.Debug(fmt.Sprintf(format, args...))
	}
}

// Load calls .load. Unload must be called after it, whatever happens between.
func (ch *Chain) Load() {
	ch.tracef("%s: load", ch.Name())
	if ch.plugin.Has(Load) {
		ch.plugin.Load()
	}
}

// ErrNoConfig is a parameter for a module that takes none.
var ErrNoConfig = errors.New("this plugin does not need command line configuration")

// Config passes one key=value parameter on.
func (ch *Chain) Config(key, value string) error {
	ch.tracef("%s: config key=%s, value=%s", ch.Name(), key, value)
	if !ch.plugin.Has(Config) {
		return fmt.Errorf("%s: got %s=%s: %w", ch.Name(), key, value, ErrNoConfig)
	}
	return ch.plugin.Config(key, value)
}

// ConfigComplete ends the configuration.
func (ch *Chain) ConfigComplete() error {
	ch.tracef("%s: config_complete", ch.Name())
	if !ch.plugin.Has(ConfigComplete) {
		return nil
	}
	return ch.plugin.ConfigComplete()
}

// SetThreadModel settles the thread model: the strictest of limit, what the
// plugin was built for, and what its .thread_model says now.
func (ch *Chain) SetThreadModel(limit ThreadModel) error {
	model := min(limit, ch.plugin.ThreadModel())
	if ch.plugin.Has(GetThreadModel) {
		m, err := ch.plugin.GetThreadModel()
		if err != nil {
			return err
		}
		if !m.Valid() {
			return fmt.Errorf("%s: thread_model returned %d: need 0 (%v) to %d (%v)",
				ch.Name(), m, SerializeConnections, Parallel, Parallel)
		}
		model = min(model, m)
	}
	ch.model = model
	if ch.log != nil {
		ch.log.Debug("using thread model: " + model.String())
	}
	return nil
}

// GetReady is the last step whose errors the user is sure to see.
func (ch *Chain) GetReady() error {
	ch.tracef("%s: get_ready", ch.Name())
	if !ch.plugin.Has(GetReady) {
		return nil
	}
	return ch.plugin.GetReady()
}

// AfterFork is called in the process that will serve. Cleanup must be called
// after it has been, whatever it returned.
func (ch *Chain) AfterFork() error {
	ch.tracef("%s: after_fork", ch.Name())
	if !ch.plugin.Has(AfterFork) {
		return nil
	}
	return ch.plugin.AfterFork()
}

// Cleanup is called once no connection is left.
func (ch *Chain) Cleanup() {
	ch.tracef("%s: cleanup", ch.Name())
	if ch.plugin.Has(Cleanup) {
		ch.plugin.Cleanup()
	}
}

// Unload is the last call.
func (ch *Chain) Unload() {
	ch.tracef("%s: unload plugin", ch.Name())
	if ch.plugin.Has(Unload) {
		ch.plugin.Unload()
	}
}

func (ch *Chain) traceCall(c *Call, format string, args ...any) {
	if ch.trace.Control {
		c.Debugf(format, args...)
	}
}

// Preconnect asks whether the peer may connect at all.
func (ch *Chain) Preconnect(c *Call, readonly bool) error {
	ch.traceCall(c, "%s: preconnect", ch.Name())
	if !ch.plugin.Has(Preconnect) {
		return nil
	}
	return ch.plugin.Preconnect(c, readonly)
}

// MaxString is the longest string of the NBD protocol, in bytes; a longer one
// from a module is ignored (nbdkit-plugin(3), ".default_export").
const MaxString = 4096

// ListExports returns what NBD_OPT_LIST answers.
func (ch *Chain) ListExports(c *Call, readonly bool) ([]Export, error) {
	ch.traceCall(c, "%s: list_exports readonly=%d tls=%d", ch.Name(), digit(readonly), digit(c.Conn.TLS))
	var list []Export
	useDefault := true
	if ch.plugin.Has(ListExports) {
		var err error
		if list, useDefault, err = ch.plugin.ListExports(c, readonly); err != nil {
			ch.traceCall(c, "%s: list_exports failed", ch.Name())
			return nil, err
		}
	}
	if useDefault {
		if name, ok := ch.DefaultExport(c, readonly); ok {
			list = append(list, Export{Name: name})
		}
	}
	ch.traceCall(c, "%s: list_exports returned %d names", ch.Name(), len(list))
	return list, nil
}

// DefaultExport returns the name that the empty export name stands for, or
// ok = false where the empty name is not permitted.
func (ch *Chain) DefaultExport(c *Call, readonly bool) (name string, ok bool) {
	ch.traceCall(c, "%s: default_export readonly=%d tls=%d", ch.Name(), digit(readonly), digit(c.Conn.TLS))
	if !ch.plugin.Has(DefaultExport) {
		return "", true
	}
	name, ok = ch.plugin.DefaultExport(c, readonly)
	if len(name) > MaxString {
		ch.traceCall(c, "%s: default_export: ignoring invalid string", ch.Name())
		return "", false
	}
	return name, ok
}

// Open opens the chain for a connection. The session must be ended with Close.
func (ch *Chain) Open(c *Call, readonly bool, export string) (*Session, error) {
	ch.traceCall(c, "%s: open readonly=%d exportname=%q tls=%d", ch.Name(), digit(readonly), export, digit(c.Conn.TLS))
	if export == "" {
		name, ok := ch.DefaultExport(c, readonly)
		if !ok {
			return nil, reported(c, &Error{Module: ch.Name(), Op: Open.String(), Errno: syscall.ENOENT,
				Msg: `default export ("") not permitted`})
		}
		export = name
	}
	h, err := ch.plugin.Open(c, readonly, export)
	if err != nil {
		return nil, err
	}
	ch.traceCall(c, "%s: open returned handle %v", ch.Name(), h)
	return newSession(ch, ch.plugin, h, readonly, export), nil
}

func digit(b bool) int {
	if b {
		return 1
	}
	return 0
}
