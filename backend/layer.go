package backend

import (
	"fmt"
	"slices"
	"syscall"
)

// A Layer is one module in its place in a chain. Its methods are what the layer
// above, or the chain, calls: they write the debug line, and pass over a filter
// that has no say. Those of the plugin do what nbdkit-plugin(3) says of a
// callback that is not there.
type Layer struct {
	chain  *Chain
	module Module
	plugin Backend // or
	filter Filter
	next   *Layer          // nil for the plugin
	index  int             // counts layers from the plugin, which is 0
	passes [callbacks]bool // a filter without the callback
	model  ThreadModel
}

// Name returns the module's name.
func (l *Layer) Name() string { return l.module.Name() }

// Chain returns the chain that the layer is part of.
func (l *Layer) Chain() *Chain { return l.chain }

// ThreadModel returns the strictest model of this layer and those below, once
// they have been asked.
func (l *Layer) ThreadModel() ThreadModel { return l.model }

// Shared returns the connection of sessions that outlive clients. It has the
// number 0 and no socket.
func (l *Layer) Shared() *Conn { return &l.chain.shared }

// Config is [Chain.Config] from this layer inwards.
func (l *Layer) Config(key, value string) error {
	l.chain.tracef("%s: config key=%s, value=%s", l.Name(), key, value)
	switch {
	case l.passes[Config]:
		return l.next.Config(key, value)
	case !l.module.Has(Config):
		return fmt.Errorf("%s: got %s=%s: %w", l.Name(), key, value, ErrNoConfig)
	}
	return l.module.Config(key, value)
}

// ConfigComplete is [Chain.ConfigComplete] from this layer inwards.
func (l *Layer) ConfigComplete() error {
	l.chain.tracef("%s: config_complete", l.Name())
	switch {
	case l.passes[ConfigComplete]:
		return l.next.ConfigComplete()
	case !l.module.Has(ConfigComplete):
		return nil
	}
	return l.module.ConfigComplete()
}

// Preconnect is [Chain.Preconnect] from this layer inwards.
func (l *Layer) Preconnect(c *Call, readonly bool) error {
	l.chain.traceCall(c, "%s: preconnect", l.Name())
	switch {
	case l.passes[Preconnect]:
		return l.next.Preconnect(c, readonly)
	case !l.module.Has(Preconnect):
		return nil
	}
	return l.module.Preconnect(c, readonly)
}

// ListExports is [Chain.ListExports] from this layer inwards.
func (l *Layer) ListExports(c *Call, readonly bool) ([]Export, error) {
	l.chain.traceCall(c, "%s: list_exports readonly=%d tls=%d", l.Name(), digit(readonly), digit(c.Conn.TLS))
	list, err := l.listExports(c, readonly)
	if err != nil {
		l.chain.traceCall(c, "%s: list_exports failed", l.Name())
		return nil, err
	}
	l.chain.traceCall(c, "%s: list_exports returned %d names", l.Name(), len(list))
	return list, nil
}

func (l *Layer) listExports(c *Call, readonly bool) ([]Export, error) {
	if l.passes[ListExports] {
		return l.next.ListExports(c, readonly)
	}
	var list []Export
	useDefault := true
	if l.module.Has(ListExports) {
		var err error
		if list, useDefault, err = l.module.ListExports(c, readonly); err != nil {
			return nil, err
		}
		list = slices.DeleteFunc(slices.Clone(list), func(e Export) bool { return len(e.Name) > MaxString || len(e.Description) > MaxString })
	}
	if useDefault {
		if name, ok := l.DefaultExport(c, readonly); ok {
			list = append(list, Export{Name: name})
		}
	}
	return list, nil
}

// defaultExport is what a layer answered while TLS was, or was not, negotiated.
type defaultExport struct {
	name string
	tls  bool
}

// DefaultExport is [Chain.DefaultExport] from this layer inwards. Each layer is
// asked once for a connection.
func (l *Layer) DefaultExport(c *Call, readonly bool) (name string, ok bool) {
	l.chain.traceCall(c, "%s: default_export readonly=%d tls=%d", l.Name(), digit(readonly), digit(c.Conn.TLS))
	if !l.passes[DefaultExport] && !l.module.Has(DefaultExport) {
		return "", true
	}
	c.Conn.mu.Lock()
	known, ok := c.Conn.defaults[l]
	c.Conn.mu.Unlock()
	if ok && known.tls == c.Conn.TLS {
		return known.name, true
	}
	if l.passes[DefaultExport] {
		name, ok = l.next.DefaultExport(c, readonly)
	} else {
		name, ok = l.module.DefaultExport(c, readonly)
	}
	if len(name) > MaxString {
		l.chain.traceCall(c, "%s: default_export: ignoring invalid string", l.Name())
		return "", false
	}
	if ok && c.Conn != l.Shared() {
		c.Conn.mu.Lock()
		defer c.Conn.mu.Unlock()
		if c.Conn.defaults == nil {
			c.Conn.defaults = map[*Layer]defaultExport{}
		}
		c.Conn.defaults[l] = defaultExport{name, c.Conn.TLS}
	}
	return name, ok
}

// Open opens this layer, and all below that it opens in turn. The session must be
// ended with Close.
func (l *Layer) Open(c *Call, readonly bool, export string) (*Session, error) {
	l.chain.traceCall(c, "%s: open readonly=%d exportname=%q tls=%d", l.Name(), digit(readonly), export, digit(c.Conn.TLS))
	if export == "" {
		name, ok := l.DefaultExport(c, readonly)
		if !ok {
			return nil, reported(c, &Error{Module: l.Name(), Op: Open.String(), Errno: syscall.ENOENT,
				Msg: `default export ("") not permitted`})
		}
		export = name
	}
	s := &Session{layer: l, chain: l.chain, module: l.module, readonly: readonly, export: export}
	var err error
	if l.filter != nil {
		s.filter, err = l.filter.OpenOver(c, s)
		s.handle = s.filter
	} else {
		s.handle, err = l.plugin.Open(c, readonly, export)
	}
	if err == nil && s.handle == nil {
		err = reported(c, &Error{Module: l.Name(), Op: Open.String(), Errno: syscall.EIO, Msg: "got neither a handle nor an error: need one of them"})
	}
	if err != nil {
		l.chain.traceCall(c, "%s: open returned handle (nil)", l.Name())
		if next := s.next.Load(); next != nil {
			next.Close(c)
		}
		return nil, err
	}
	l.chain.traceCall(c, "%s: open returned handle %v", l.Name(), s.handle)
	return s, nil
}
