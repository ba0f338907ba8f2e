package loader

import (
	"fmt"
	"sync"
	"syscall"
	"unsafe"

	"nbdhost/abi"
	"nbdhost/backend"
	"nbdhost/cshim"
)

// errNotFast is the answer to a fast zero where the callback has no flags.
const errNotFast = syscall.EOPNOTSUPP

// A Plugin is a plugin that has been loaded and checked. Give it to [backend.NewChain]: of
// what [backend.Module] has only that may be called which Has reports.
type Plugin struct {
	module // in fn, callbacks of version 1 stand where their successors do
	raw    abi.Plugin
	v1     bool // the data callbacks have no flags

	magicConfigKey string
}

var _ backend.Backend = (*Plugin)(nil)

// loaded has the libraries of the plugins between Load and Unload.
var loaded sync.Map

// Open loads the plugin in the shared library at path and checks it. The code in
// the library runs from here on. It fails with [ErrInUse] where a plugin of the same file has been
// loaded and not unloaded: of several that were opened before only one may be loaded. Errors are of type [*Error].
func Open(path string) (*Plugin, error) {
	p := &Plugin{module: module{kind: PluginKind, path: path}}
	if err := p.open(); err != nil {
		return nil, &Error{Op: "open plugin", Path: path, Err: err}
	}
	return p, nil
}

func (p *Plugin) open() (err error) {
	cshim.SaveSignals()
	defer cshim.RestoreSignals()
	if p.lib, err = dlopen(p.path); err != nil {
		return err
	}
	if _, ok := loaded.Load(p.lib); ok {
		return fmt.Errorf("%w: unload it first, or serve it from a process of its own: its variables exist once in each", ErrInUse)
	}
	init := p.lib.lookup("plugin_init")
	if init == nil {
		if p.lib.lookup("filter_init") != nil {
			return fmt.Errorf("%w: this is a filter: use it with --filter in front of a plugin", ErrNotModule)
		}
		return fmt.Errorf("%w: the library has no function plugin_init: need a library made with NBDKIT_REGISTER_PLUGIN", ErrNotModule)
	}
	plugin := call(init)
	if plugin == nil {
		return fmt.Errorf("%w: plugin_init returned NULL: the plugin refuses to be loaded", ErrNotModule)
	}
	if p.raw, err = abi.CopyPlugin(plugin); err != nil {
		return err
	}
	p.read()
	if err := p.check(); err != nil {
		return err
	}
	p.nameCallbacks()
	return nil
}

// read takes what is used later out of the plugin's struct.
func (p *Plugin) read() {
	r := &p.raw
	p.name, p.longName = r.Name.String(), r.LongName.String()
	p.version, p.description = r.Version.String(), r.Description.String()
	p.configHelp, p.magicConfigKey = r.ConfigHelp.String(), r.MagicConfigKey.String()
	p.fn = [...]unsafe.Pointer{
		backend.Load: r.Load, backend.Unload: r.Unload, backend.DumpPlugin: r.DumpPlugin,
		backend.Config: r.Config, backend.ConfigComplete: r.ConfigComplete,
		backend.GetThreadModel: r.GetThreadModel,
		backend.GetReady:       r.GetReady, backend.AfterFork: r.AfterFork, backend.Cleanup: r.Cleanup,
		backend.Preconnect: r.Preconnect, backend.ListExports: r.ListExports,
		backend.DefaultExport: r.DefaultExport,
		backend.Open:          r.Open, backend.Close: r.Close,
		backend.ExportDescription: r.ExportDescription, backend.GetSize: r.GetSize,
		backend.BlockSizes: r.BlockSize,
		backend.CanWrite:   r.CanWrite, backend.CanFlush: r.CanFlush,
		backend.IsRotational: r.IsRotational, backend.CanTrim: r.CanTrim,
		backend.CanZero: r.CanZero, backend.CanFastZero: r.CanFastZero,
		backend.CanExtents: r.CanExtents, backend.CanFUA: r.CanFUA,
		backend.CanMultiConn: r.CanMultiConn, backend.CanCache: r.CanCache,
		backend.Pread: r.Pread, backend.Pwrite: r.Pwrite, backend.Flush: r.Flush,
		backend.Trim: r.Trim, backend.Zero: r.Zero,
		backend.GetExtents: r.Extents, backend.Cache: r.Cache,
	}
	if p.v1 = r.APIVersion == 1; p.v1 {
		p.fn[backend.Pread], p.fn[backend.Pwrite] = r.PreadV1, r.PwriteV1
		p.fn[backend.Flush], p.fn[backend.Trim], p.fn[backend.Zero] = r.FlushV1, r.TrimV1, r.ZeroV1
	}
}

// check refuses a plugin that nbdkit would refuse, or that could not be served.
func (p *Plugin) check() error {
	if err := checkName(p.name); err != nil {
		return err
	}
	if m := p.ThreadModel(); !m.Valid() {
		return fmt.Errorf("%w: got thread model %d, need 0 (%v) to %d (%v)",
			ErrInvalid, m, backend.SerializeConnections, backend.Parallel, backend.Parallel)
	}
	for _, cb := range []backend.Callback{backend.Open, backend.GetSize, backend.Pread} {
		if !p.Has(cb) {
			return fmt.Errorf("%w: %s has no .%v: need .open, .get_size and .pread", ErrMissingCallback, p.name, cb)
		}
	}
	return nil
}

// MagicConfigKey returns the key of a parameter that is given without one, or "".
func (p *Plugin) MagicConfigKey() string { return p.magicConfigKey }

// Has tells whether the plugin has the callback, or what is here can answer for it: Load and Unload
// also say whether the file is in use.
func (p *Plugin) Has(cb backend.Callback) bool {
	return p.fn[cb] != nil || p.v1 && cb == backend.CanFastZero || cb == backend.Load || cb == backend.Unload
}

// ThreadModel returns the model that the plugin was compiled with.
func (p *Plugin) ThreadModel() backend.ThreadModel { return backend.ThreadModel(p.raw.ThreadModel) }

// The life cycle.

// Load calls .load, if there is one. Until Unload this file cannot be opened again.
func (p *Plugin) Load() {
	loaded.LoadOrStore(p.lib, p)
	p.module.Load()
}

// Unload calls .unload, if there is one. The library stays in memory.
func (p *Plugin) Unload() {
	p.module.Unload()
	loaded.CompareAndDelete(p.lib, p)
}

func (p *Plugin) Cleanup() { cshim.CallVoid(nil, p.fn[backend.Cleanup]) }

func (p *Plugin) Config(key, value string) error {
	defer cshim.RestoreSignals()
	// Plugins keep the pointers, which nbdkit takes from its argv.
	return p.outcome(backend.Config, cshim.CallConfig(nil, p.fn[backend.Config], cshim.NewCStr(key), cshim.NewCStr(value)))
}

func (p *Plugin) ConfigComplete() error { return p.step(backend.ConfigComplete) }
func (p *Plugin) GetReady() error       { return p.step(backend.GetReady) }
func (p *Plugin) AfterFork() error      { return p.step(backend.AfterFork) }

func (p *Plugin) step(cb backend.Callback) error {
	defer cshim.RestoreSignals()
	return p.outcome(cb, cshim.CallInt(nil, p.fn[cb]))
}

func (p *Plugin) GetThreadModel() (backend.ThreadModel, error) {
	r := cshim.CallInt(nil, p.fn[backend.GetThreadModel])
	return backend.ThreadModel(r.Ret), p.outcome(backend.GetThreadModel, r)
}

// The handshake.

// context returns what the module may know while no export is open.
func (p *Plugin) context(c *backend.Call) *cshim.Context {
	return cshim.NewContext(shimConn(c), "", false, p.raw.ErrnoIsPreserved != 0)
}

func (p *Plugin) Preconnect(c *backend.Call, readonly bool) (err error) {
	if p.isOnMain() {
		onMain(func() { err = p.preconnect(c, readonly) })
		return err
	}
	return p.preconnect(c, readonly)
}

func (p *Plugin) preconnect(c *backend.Call, readonly bool) error {
	ctx := p.context(c)
	defer ctx.Free()
	return p.outcome(backend.Preconnect, cshim.CallPreconnect(ctx, p.fn[backend.Preconnect], readonly))
}

func (p *Plugin) ListExports(c *backend.Call, readonly bool) (list []backend.Export, useDefault bool, err error) {
	if p.isOnMain() {
		onMain(func() { list, useDefault, err = p.listExports(c, readonly) })
		return list, useDefault, err
	}
	return p.listExports(c, readonly)
}

func (p *Plugin) listExports(c *backend.Call, readonly bool) (list []backend.Export, useDefault bool, err error) {
	ctx := p.context(c)
	defer ctx.Free()
	exports, r := cshim.CallListExports(ctx, p.fn[backend.ListExports], readonly, c.Conn.TLS)
	if err := p.outcome(backend.ListExports, r); err != nil {
		return nil, false, err
	}
	list, useDefault = exportList(exports)
	return list, useDefault, nil
}

// exportList takes the default export, if it is among them, out of exports.
func exportList(exports []cshim.Export) (list []backend.Export, useDefault bool) {
	for _, e := range exports {
		if e.Default {
			useDefault = true
			continue
		}
		list = append(list, backend.Export{Name: e.Name, Description: e.Description})
	}
	return list, useDefault
}

func (p *Plugin) DefaultExport(c *backend.Call, readonly bool) (name string, ok bool) {
	if p.isOnMain() {
		onMain(func() { name, ok = p.defaultExport(c, readonly) })
		return name, ok
	}
	return p.defaultExport(c, readonly)
}

func (p *Plugin) defaultExport(c *backend.Call, readonly bool) (name string, ok bool) {
	ctx := p.context(c)
	defer ctx.Free()
	return cshim.CallDefaultExport(ctx, p.fn[backend.DefaultExport], readonly, c.Conn.TLS)
}

func (p *Plugin) Open(c *backend.Call, readonly bool, export string) (backend.Handle, error) {
	if !p.isOnMain() {
		h, err := p.openHandle(c, readonly, export)
		if err != nil {
			return nil, err
		}
		return h, nil
	}
	var m mainHandle
	var err error
	onMain(func() { m.h, err = p.openHandle(c, readonly, export) })
	if err != nil {
		return nil, err
	}
	return m, nil
}

func (p *Plugin) openHandle(c *backend.Call, readonly bool, export string) (*handle, error) {
	ctx := cshim.NewContext(shimConn(c), export, true, p.raw.ErrnoIsPreserved != 0)
	ctx.SetTLS(c.Conn.TLS)
	r := cshim.CallOpen(ctx, p.fn[backend.Open], readonly)
	cshim.RestoreSignals() // at each: a handler that was set at a later one is as harmful
	if r.Ptr == nil {
		ctx.Free()
		return nil, p.failure(backend.Open, r)
	}
	return &handle{p: p, ctx: ctx, ptr: r.Ptr}, nil
}
