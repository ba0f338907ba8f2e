package check

import (
	"debug/elf"
	"errors"
	"fmt"
	"math"
	"slices"
	"strings"
	"syscall"

	"nbdhost/backend"
)

// releases has the functions that modules may call, and the first stable release
// of nbdkit with each, as 1.MINOR (nbdkit_*(3), "History"; 0 is before 1.2).
var releases = map[string]int{
	"nbdkit_absolute_path": 0, "nbdkit_debug": 0, "nbdkit_vdebug": 0, "nbdkit_error": 0,
	"nbdkit_verror": 0, "nbdkit_parse_size": 0,
	"nbdkit_set_error":     2,
	"nbdkit_realpath":      4,
	"nbdkit_parse_bool":    8,
	"nbdkit_read_password": 12,
	"nbdkit_add_extent":    12, "nbdkit_extents_new": 12, "nbdkit_extents_free": 12,
	"nbdkit_extents_count": 12, "nbdkit_get_extent": 12,
	"nbdkit_export_name": 16, "nbdkit_nanosleep": 16, "nbdkit_peer_name": 16,
	"nbdkit_parse_int": 16, "nbdkit_parse_unsigned": 16,
	"nbdkit_parse_int8_t": 16, "nbdkit_parse_int16_t": 16, "nbdkit_parse_int32_t": 16, "nbdkit_parse_int64_t": 16,
	"nbdkit_parse_uint8_t": 16, "nbdkit_parse_uint16_t": 16, "nbdkit_parse_uint32_t": 16, "nbdkit_parse_uint64_t": 16,
	"nbdkit_shutdown": 20, "nbdkit_stdio_safe": 20,
	"nbdkit_is_tls": 22, "nbdkit_add_export": 22, "nbdkit_extents_full": 22, "nbdkit_extents_aligned": 22,
	"nbdkit_exports_new": 22, "nbdkit_exports_free": 22, "nbdkit_exports_count": 22, "nbdkit_get_export": 22,
	"nbdkit_use_default_export": 24, "nbdkit_strdup_intern": 24, "nbdkit_strndup_intern": 24,
	"nbdkit_printf_intern": 24, "nbdkit_vprintf_intern": 24,
	"nbdkit_peer_pid": 24, "nbdkit_peer_uid": 24, "nbdkit_peer_gid": 24,
	"nbdkit_context_get_backend": 26, "nbdkit_context_set_next": 26,
	"nbdkit_next_context_open": 26, "nbdkit_next_context_close": 26,
	"nbdkit_disconnect":        34,
	"nbdkit_parse_probability": 36, "nbdkit_peer_security_context": 36,
	"nbdkit_parse_delay": 40, "nbdkit_peer_tls_dn": 40, "nbdkit_peer_tls_issuer_dn": 40,
	"nbdkit_debug_hexdump": 46,
	"nbdkit_debug_hexdiff": 48, "nbdkit_name": 48, "nbdkit_timestamp": 48,
}

// fileSymbols looks at what the file wants from the server. It does so without
// loading it: a symbol that nobody has keeps it from being loaded.
func (s *Subject) fileSymbols() error {
	if s.Path == "" {
		return skipf("there is no file")
	}
	f, err := elf.Open(s.Path)
	if err != nil {
		return skipf("the file cannot be read as ELF: %v", err)
	}
	defer f.Close()
	symbols, err := f.DynamicSymbols()
	if err != nil {
		return skipf("the file has no dynamic symbols: %v", err)
	}
	newest := 0
	var need, unknown []string
	for _, sym := range symbols {
		if sym.Section != elf.SHN_UNDEF || !strings.HasPrefix(sym.Name, "nbdkit_") {
			continue
		}
		minor, ok := releases[sym.Name]
		switch {
		case !ok && elf.ST_BIND(sym.Info) != elf.STB_WEAK:
			unknown = append(unknown, sym.Name)
		case minor > newest:
			newest, need = minor, []string{sym.Name}
		case minor == newest && minor > 0:
			need = append(need, sym.Name)
		}
	}
	if len(unknown) > 0 {
		s.unresolved = true
		slices.Sort(unknown)
		return fmt.Errorf("undefined symbol %s, which no release up to 1.48 has: a misspelled name, or a later release", strings.Join(unknown, ", "))
	}
	if newest > 0 {
		slices.Sort(need)
		s.notef("needs nbdkit 1.%d or later, for %s", newest, strings.Join(need, ", "))
	}
	return nil
}

// fileLoad loads the file; all that the loader refuses is a promise broken.
func (s *Subject) fileLoad() error {
	p, err := s.Open()
	switch {
	case err != nil && s.unresolved:
		return skipf("a symbol is missing")
	case err != nil:
		return err
	}
	s.plugin = p
	s.notef("%s %s, API version %d, %d bytes of struct nbdkit_plugin, built for thread model %v",
		p.Name(), p.Version(), p.APIVersion(), p.StructSize(), p.ThreadModel())
	if p.APIVersion() == 1 {
		s.notef("API version 1: no FUA, fast zero or other flags; API version 2 is there since nbdkit 1.2")
	}
	return nil
}

// fileStruct: nbdkit copies as many bytes as the struct says it has.
func (s *Subject) fileStruct() error {
	size := s.plugin.StructSize()
	if size%8 != 0 {
		return fmt.Errorf("_struct_size is %d, in the middle of a pointer: set it to sizeof (struct nbdkit_plugin), as NBDKIT_REGISTER_PLUGIN does", size)
	}
	return nil
}

// vain are callbacks that are never called where all of needs are missing.
var vain = []struct {
	callback backend.Callback
	needs    []backend.Callback
	because  string
}{
	{backend.Trim, []backend.Callback{backend.Pwrite}, "an export without .pwrite is read-only"},
	{backend.Zero, []backend.Callback{backend.Pwrite}, "an export without .pwrite is read-only"},
	{backend.CanTrim, []backend.Callback{backend.Pwrite}, "an export without .pwrite is read-only"},
	{backend.CanZero, []backend.Callback{backend.Pwrite}, "an export without .pwrite is read-only"},
	{backend.CanFUA, []backend.Callback{backend.Pwrite}, "an export without .pwrite is read-only"},
	{backend.ConfigComplete, []backend.Callback{backend.Config, backend.Load, backend.Open}, "nothing was configured"},
}

func (s *Subject) fileCallbacks() error {
	p := s.plugin
	var odd []string
	for _, v := range vain {
		if p.Has(v.callback) && !slices.ContainsFunc(v.needs, p.Has) {
			odd = append(odd, fmt.Sprintf(".%v without .%v: %s", v.callback, v.needs[0], v.because))
		}
	}
	if !p.Has(backend.Config) {
		if p.MagicConfigKey() != "" {
			odd = append(odd, fmt.Sprintf(".magic_config_key %q without .config: no parameter is accepted", p.MagicConfigKey()))
		}
		if p.ConfigHelp() != "" {
			odd = append(odd, ".config_help without .config: no parameter is accepted")
		}
	}
	if !p.Has(backend.Close) {
		s.notef("no .close: right only where .open allocates nothing")
	}
	if len(odd) > 0 {
		return errors.New(strings.Join(odd, "; "))
	}
	return nil
}

// start makes the plugin ready to serve.
func (s *Subject) start() error {
	s.started = true
	chain, err := s.Start()
	if err != nil {
		return err
	}
	s.chain = chain
	if len(s.Filters) > 0 {
		s.notef("filters %s", strings.Join(s.Filters, ", "))
	}
	s.notef("served with thread model %v", chain.ThreadModel())
	return nil
}

func (s *Subject) threadModel() error {
	if !s.plugin.Has(backend.GetThreadModel) {
		return nil
	}
	m, err := s.plugin.GetThreadModel()
	if err != nil {
		return err
	}
	if built := s.plugin.ThreadModel(); !m.Valid() || m > built {
		return fmt.Errorf(".thread_model returned %v, and THREAD_MODEL is %v: nbdkit takes the stricter one", m, built)
	}
	return nil
}

// session opens an export without a server between, and calls f with it. No other
// connection is open.
func (s *Subject) session(export string, f func(*backend.Call, *backend.Session) error) error {
	// A plugin may ask who the peer is.
	fds, err := syscall.Socketpair(syscall.AF_UNIX, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("make socket pair: %w", err)
	}
	defer syscall.Close(fds[0])
	defer syscall.Close(fds[1])
	c := &backend.Call{Conn: &backend.Conn{ID: math.MaxUint64, FD: fds[0]}, Worker: backend.Handshake, Log: s.Log}
	defer c.Conn.Release()
	if err := s.chain.Preconnect(c, !s.Writes); err != nil {
		return fmt.Errorf("preconnect: %w", err)
	}
	session, err := s.chain.Open(c, !s.Writes, export)
	if err != nil {
		return err
	}
	defer session.Close(c)
	defer session.Finalize(c)
	if err := session.Prepare(c); err != nil {
		return fmt.Errorf("prepare: %w", err)
	}
	return f(c, session)
}

func (s *Subject) open() error {
	s.broken = s.session("", func(c *backend.Call, session *backend.Session) error {
		caps, err := session.Caps(c)
		if err != nil {
			return err
		}
		b, err := session.BlockSize(c)
		blocks := "no block size"
		if b.Min > 0 {
			blocks = fmt.Sprintf("block size %d, %d, %d", b.Min, b.Preferred, b.Max)
		}
		s.notef("%d bytes; %s; %s", caps.Size, blocks, describe(caps))
		return err
	})
	return s.broken
}

// describe names the capabilities.
func describe(caps backend.Caps) string {
	modes := []string{"none", "emulated", "native"}
	words := []string{"zero " + modes[caps.Zero], "fua " + modes[caps.FUA], "cache " + modes[caps.Cache]}
	for _, w := range []struct {
		on   bool
		name string
	}{{caps.Write, "write"}, {caps.Flush, "flush"}, {caps.Trim, "trim"}, {caps.FastZero, "fast_zero"},
		{caps.Extents, "extents"}, {caps.MultiConn, "multi_conn"}, {caps.Rotational, "rotational"}} {
		if w.on {
			words = append(words, w.name)
		}
	}
	slices.Sort(words)
	return strings.Join(words, ", ")
}

// capabilities asks for them in order, and wants the callbacks behind them.
func (s *Subject) capabilities() error {
	if len(s.Filters) > 0 {
		return skipf("the filters speak for the plugin")
	}
	has := s.plugin.Has
	return s.session("", func(c *backend.Call, session *backend.Session) error {
		caps, err := session.Caps(c)
		if err != nil {
			return err
		}
		var odd []string
		for _, claim := range []struct {
			made          bool
			can, callback backend.Callback
		}{
			{caps.Write, backend.CanWrite, backend.Pwrite},
			{caps.Flush, backend.CanFlush, backend.Flush},
			{caps.Trim, backend.CanTrim, backend.Trim},
			{caps.Extents, backend.CanExtents, backend.GetExtents},
			{caps.Zero == backend.Native, backend.CanZero, backend.Zero},
			{caps.FUA == backend.Emulate, backend.CanFUA, backend.Flush},
		} {
			if claim.made && !has(claim.callback) {
				odd = append(odd, fmt.Sprintf("%v is %s, and there is no .%v", claim.can,
					map[bool]string{true: "NBDKIT_FUA_EMULATE", false: "true"}[claim.can == backend.CanFUA], claim.callback))
			}
		}
		if len(odd) > 0 {
			return errors.New(strings.Join(odd, "; "))
		}
		return nil
	})
}

// maxExports is how many exports of a list are opened.
const maxExports = 16

func (s *Subject) exports() error {
	c := &backend.Call{Conn: &backend.Conn{ID: math.MaxUint64, FD: -1}, Worker: backend.Handshake, Log: s.Log}
	list, err := s.chain.ListExports(c, !s.Writes)
	c.Conn.Release()
	if err != nil {
		return fmt.Errorf("list exports: %w", err)
	}
	s.notef("%s", several(len(list), "export"))
	for _, e := range list[:min(len(list), maxExports)] {
		err := s.session(e.Name, func(c *backend.Call, session *backend.Session) error {
			_, err := session.Caps(c)
			return err
		})
		if err != nil {
			return fmt.Errorf("export %q is listed, but: %w", e.Name, err)
		}
	}
	return nil
}

// noSuchExport is a name that no plugin has an export of.
const noSuchExport = "no-such-export/no-such-export"

// errors looks at a failure that can be brought about without harm.
func (s *Subject) errors() error {
	err := s.session(noSuchExport, func(*backend.Call, *backend.Session) error { return nil })
	if err == nil {
		return skipf("no call fails: the plugin opens an export of any name")
	}
	if silent(err) {
		return fmt.Errorf("open of export %q: %w, which is what the server says of a plugin that says nothing", noSuchExport, err)
	}
	return nil
}

// silent tells whether a plugin gave neither text nor number with an error.
func silent(err error) bool {
	var e *backend.Error
	return errors.As(err, &e) && e.Msg == "" && e.Errno == syscall.EIO
}
