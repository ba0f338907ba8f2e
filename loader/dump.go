package loader

import (
	"bufio"
	"fmt"
	"io"

	"nbdhost/backend"
)

// Dump writes what --dump-plugin prints of a filter after the plugin and the filters
// below, as [Plugin.Dump] does.
func (f *Filter) Dump(w io.Writer) error {
	if _, err := fmt.Fprintf(w, "%[1]s_path=%[2]s\n%[1]s_name=%[1]s\n", f.name, realPath(f.path)); err != nil {
		return err
	}
	f.dump()
	return nil
}

// Dump writes what PLUGIN --dump-plugin prints, key=value lines which programs
// parse (nbdkit-probing(1)), and then calls .dump_plugin, which prints to C's standard
// output. So w should lead there too, and have no buffer of its own. model is the
// one that the chain would be served with.
func (p *Plugin) Dump(w io.Writer, model backend.ThreadModel) error {
	b := bufio.NewWriter(w)
	line := func(key string, value any) { fmt.Fprintf(b, "%s=%v\n", key, value) }
	has := func(key string, ok bool) {
		if ok {
			line("has_"+key, 1)
		}
	}
	line("path", realPath(p.path))
	line("name", p.name)
	if p.version != "" {
		line("version", p.version)
	}
	line("api_version", p.raw.APIVersion)
	line("struct_size", p.raw.StructSize)
	line("max_thread_model", p.ThreadModel())
	line("thread_model", model)
	preserved := 0
	if p.raw.ErrnoIsPreserved != 0 {
		preserved = 1
	}
	line("errno_is_preserved", preserved)
	if p.magicConfigKey != "" {
		line("magic_config_key", p.magicConfigKey)
	}
	has("longname", p.longName != "")
	has("description", p.description != "")
	for cb, fn := range p.fn {
		cb := backend.Callback(cb)
		if !p.v1 || !hasV1(cb) {
			has(cb.String(), fn != nil)
		}
		if cb == backend.ConfigComplete {
			has("config_help", p.configHelp != "")
		}
	}
	for cb, fn := range p.fn {
		if cb := backend.Callback(cb); p.v1 && hasV1(cb) {
			has("_"+cb.String()+"_v1", fn != nil)
		}
	}
	if err := b.Flush(); err != nil {
		return err
	}
	p.dump()
	return nil
}

// hasV1 tells whether a callback had no flags in version 1 of the API.
func hasV1(cb backend.Callback) bool {
	switch cb {
	case backend.Pread, backend.Pwrite, backend.Flush, backend.Trim, backend.Zero:
		return true
	}
	return false
}
