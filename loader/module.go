package loader

import (
	"fmt"
	"strings"
	"unsafe"

	"nbdhost/backend"
	"nbdhost/cshim"
)

// A module is what plugins and filters have in common.
type module struct {
	kind Kind
	path string
	lib  library
	fn   [backend.Cache + 1]unsafe.Pointer // the callbacks, nil where there is none

	name, longName, version, description, configHelp string
}

// Path returns the path that the module was opened with.
func (m *module) Path() string { return m.path }

// Name returns the module's own name, such as "file".
func (m *module) Name() string { return m.name }

// LongName returns the module's long name, or "".
func (m *module) LongName() string { return m.longName }

// Version returns a plugin's version, or "", or the release of nbdkit that a filter
// was built for.
func (m *module) Version() string { return m.version }

// Description returns what the module is for, or "".
func (m *module) Description() string { return m.description }

// ConfigHelp returns the lines that describe the module's parameters, or "".
func (m *module) ConfigHelp() string { return m.configHelp }

// Help returns what --help adds to the program's own help.
func (m *module) Help() string {
	var b strings.Builder
	fmt.Fprintf(&b, "%v: %s", m.kind, m.name)
	if m.longName != "" {
		fmt.Fprintf(&b, " (%s)", m.longName)
	}
	fmt.Fprintf(&b, "\n(%s)\n", m.path)
	for _, text := range []string{m.description, m.configHelp} {
		if text != "" {
			b.WriteString(strings.TrimSuffix(text, "\n") + "\n")
		}
	}
	return b.String()
}

// nameCallbacks lets crash reports and log lines name the module's calls.
func (m *module) nameCallbacks() {
	for cb, fn := range m.fn {
		if fn != nil {
			cshim.NameCallback(fn, m.kind.String(), m.name, backend.Callback(cb).String())
		}
	}
}

// Load calls .load, if there is one.
func (m *module) Load() {
	if m.fn[backend.Load] == nil {
		return
	}
	cshim.SaveSignals()
	defer cshim.RestoreSignals()
	cshim.CallVoid(nil, m.fn[backend.Load])
}

// Unload calls .unload, if there is one. The library stays in memory.
func (m *module) Unload() {
	if m.fn[backend.Unload] != nil {
		cshim.CallVoid(nil, m.fn[backend.Unload])
	}
}

// dump calls .dump_plugin, which prints to C's standard output.
func (m *module) dump() {
	if fn := m.fn[backend.DumpPlugin]; fn != nil {
		cshim.CallVoid(nil, fn)
		flushC()
	}
}

// outcome turns a failed call into an error. What the module said with
// nbdkit_error has been logged.
func (m *module) outcome(cb backend.Callback, r cshim.Result) error {
	if r.Ret >= 0 {
		return nil
	}
	return m.failure(cb, r)
}

func (m *module) failure(cb backend.Callback, r cshim.Result) error {
	msg := r.Msg
	if msg != "" && hostRedact != nil {
		msg = hostRedact(msg)
	}
	from := r.Module
	if from == "" {
		from = m.name
	}
	return &backend.Error{Module: from, Op: cb.String(), Errno: r.Errno, Msg: msg}
}

// hostRedact takes secrets out of a text, if it is not nil; set by Init.
var hostRedact func(text string) string

// checkName refuses what nbdkit would not have as a module's name.
func checkName(name string) error {
	if name == "" {
		return fmt.Errorf("%w: .name is empty: need a name such as \"file\"", ErrInvalid)
	}
	for i, r := range []byte(name) {
		alnum := r >= '0' && r <= '9' || r >= 'A' && r <= 'Z' || r >= 'a' && r <= 'z'
		if !alnum && (r != '-' || i == 0) {
			return fmt.Errorf("%w: got .name %q, need ASCII letters, digits and, after the first, dashes", ErrInvalid, name)
		}
	}
	return nil
}
