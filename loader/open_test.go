package loader

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"nbdhost/backend"
)

func TestOpenRefuses(t *testing.T) {
	bad := func(options ...string) func(*testing.T) string {
		return func(t *testing.T) string { return compile(t, "bad.c", options...) }
	}
	file := func(content string) func(*testing.T) string {
		return func(t *testing.T) string {
			path := filepath.Join(t.TempDir(), "file.so")
			if err := os.WriteFile(path, []byte(content), 0o666); err != nil {
				t.Fatal(err)
			}
			return path
		}
	}
	for _, tt := range []struct {
		name string
		path func(*testing.T) string
		is   error
		says string
	}{
		{"no file", func(t *testing.T) string { return "/does/not/exist.so" }, ErrNotFound, "need a file that exists"},
		{"directory", (*testing.T).TempDir, ErrNotELF, "got a directory"},
		{"device", func(*testing.T) string { return "/dev/null" }, ErrNotELF, "got a device"},
		{"empty file", file(""), ErrNotELF, "is empty"},
		{"text", file("root:x:0:0"), ErrNotELF, `begins with "root"`},
		{"script", file("#!/bin/sh\n"), ErrNotELF, "got a script"},
		{"truncated ELF file", file("\x7fELF\x02\x01\x01"), ErrNotELF, ""},
		{"header only", func(t *testing.T) string {
			whole, err := os.ReadFile(compile(t, "bad.c"))
			if err != nil {
				t.Fatal(err)
			}
			return file(string(whole[:100]))(t)
		}, ErrNotELF, ""},
		{"other machine", func(t *testing.T) string {
			whole, err := os.ReadFile(compile(t, "bad.c"))
			if err != nil {
				t.Fatal(err)
			}
			whole[18], whole[19] = 8, 0 // e_machine: MIPS
			return file(string(whole))(t)
		}, ErrNotELF, "got EM_MIPS"},
		{"object file", func(t *testing.T) string {
			o := filepath.Join(t.TempDir(), "bad.o")
			if out, err := exec.Command("gcc", "-c", "-o", o, "testdata/bad.c").CombinedOutput(); err != nil {
				t.Skipf("gcc: %v\n%s", err, out)
			}
			return o
		}, ErrNotELF, "link it with -shared"},
		{"plain library", bad("-DINIT=other_init"), ErrNotModule, "no function plugin_init"},
		{"filter", bad("-DINIT=filter_init"), ErrNotModule, "use it with --filter"},
		{"plugin_init returns NULL", bad("-DRETURN=NULL"), ErrNotModule, "returned NULL"},
		{"version 3", bad("-DVERSION=3"), ErrVersion, "got 3, need 1 or 2"},
		{"version 0", bad("-DVERSION=0"), ErrVersion, "got 0, need 1 or 2"},
		{"version -1", bad("-DVERSION=-1"), ErrVersion, "got -1, need 1 or 2"},
		{"size 0", bad("-DSIZE=0"), ErrStructSize, "got 0 bytes"},
		{"size 2^63", bad("-DSIZE=1UL<<63"), ErrStructSize, "got 9223372036854775808 bytes"},
		{"struct ends early", bad("-DSIZE=64"), ErrMissingCallback, "no .open"},
		{"no name", bad("-DNAME=NULL"), ErrInvalid, ".name is empty"},
		{"empty name", bad(`-DNAME=""`), ErrInvalid, ".name is empty"},
		{"name with a space", bad(`-DNAME="a b"`), ErrInvalid, `got .name "a b"`},
		{"name with a dash first", bad(`-DNAME="-a"`), ErrInvalid, `got .name "-a"`},
		{"name not ASCII", bad(`-DNAME="é"`), ErrInvalid, `got .name "é"`},
		{"thread model 4", bad("-DMODEL=4"), ErrInvalid, "got thread model 4"},
		{"thread model -1", bad("-DMODEL=-1"), ErrInvalid, "got thread model -1"},
		{"no open", bad("-DOPEN=NULL"), ErrMissingCallback, "bad has no .open"},
		{"no get_size", bad("-DGET_SIZE=NULL"), ErrMissingCallback, "bad has no .get_size"},
		{"no pread", bad("-DPREAD=NULL"), ErrMissingCallback, "bad has no .pread"},
		{"missing nbdkit function", bad("-DNEEDS=nbdkit_from_the_future"), ErrMissingSymbol, "nbdkit_from_the_future: the module was built for a later release"},
		{"missing other function", bad("-DNEEDS=from_nowhere"), ErrMissingSymbol, "from_nowhere: install or link"},
		{"missing library", func(t *testing.T) string {
			lib := compile(t, "bad.c", "-DINIT=other_init", "-Wl,-soname,libnotthere.so.7")
			so := compile(t, "bad.c", "-Wl,--no-as-needed", lib)
			return so
		}, ErrMissingLibrary, "libnotthere.so.7: install the package"},
		{"static TLS", bad("-DTLS=1000000"), ErrStaticTLS, "GLIBC_TUNABLES=glibc.rtld.optional_static_tls="},
	} {
		t.Run(tt.name, func(t *testing.T) {
			path := tt.path(t)
			p, err := Open(path)
			var e *Error
			switch {
			case err == nil:
				t.Fatalf("opened %s", p.Name())
			case !errors.Is(err, tt.is) || !strings.Contains(err.Error(), tt.says):
				t.Errorf("got %v\nneed %v ... %s", err, tt.is, tt.says)
			case !errors.As(err, &e) || e.Path != path || e.Op != "open plugin":
				t.Errorf("got %#v", err)
			case strings.ContainsAny(err.Error(), "\n"):
				t.Errorf("more than one line: %q", err)
			}
			t.Log(err)
		})
	}
}

// A struct may be longer than ours: a later release has added to its end.
func TestOpenLongStruct(t *testing.T) {
	p, err := Open(compile(t, "bad.c", "-DLONG=512"))
	if err != nil || p.Name() != "bad" || p.Has(backend.Close) || p.ThreadModel() != backend.SerializeConnections {
		t.Fatalf("got %v, %v", p, err)
	}
}

func TestAccessors(t *testing.T) {
	path := compile(t, "plugin.c")
	p, err := Open(path)
	if err != nil {
		t.Fatal(err)
	}
	for _, tt := range [][2]string{
		{p.Path(), path}, {p.Name(), "fixture"}, {p.LongName(), "A Fixture"}, {p.Version(), "1.2.3"},
		{p.Description(), "For tests.\n"}, {p.ConfigHelp(), "fail=<CALLBACK>  callback to fail"}, {p.MagicConfigKey(), "fail"},
		{p.Help(), "plugin: fixture (A Fixture)\n(" + path + ")\nFor tests.\nfail=<CALLBACK>  callback to fail\n"},
	} {
		if tt[0] != tt[1] {
			t.Errorf("got %q, need %q", tt[0], tt[1])
		}
	}
	// A plugin that says nothing of itself.
	if p, err = Open(compile(t, "bad.c")); err != nil {
		t.Fatal(err)
	}
	if got := p.LongName() + p.Version() + p.Description() + p.ConfigHelp() + p.MagicConfigKey(); got != "" {
		t.Errorf("got %q", got)
	}
}

func TestDebugFlags(t *testing.T) {
	p, err := Open(compile(t, "plugin.c"))
	if err != nil {
		t.Fatal(err)
	}
	var flags []DebugFlag
	for _, s := range []string{"fixture.one=-0x10", "fixture.two.three=7", "fixture.four=1", "other.one=1", " fixture.one=3"} {
		f, err := ParseDebugFlag(s)
		if err != nil {
			t.Fatal(err)
		}
		flags = append(flags, f)
	}
	got := strings.Join(append(p.ApplyDebugFlags(flags), UnusedDebugFlags(flags)...), "\n")
	want := `-D fixture.four: fixture does not contain a global variable called fixture_debug_four
debug flag -D other.one was not used
debug flag -D  fixture.one was not used`
	if got != want {
		t.Errorf("got:\n%s\nneed:\n%s", got, want)
	}
	SetVerbose(true)
	defer SetVerbose(false)
	logged()
	p.Load()
	if got, _ := logged(); got != "load one=-16 two_three=7" {
		t.Errorf("got %q", got)
	}
}

func TestParseDebugFlag(t *testing.T) {
	for _, s := range []string{"", "a", "a.", ".b", "a.b", "a=1", "=1", "a.=1", ".b=1", "a.b=", "a.b=x", "a.b=1=2", "a.b=1 ", "a.b=1_0", "a.b=2147483648"} {
		if f, err := ParseDebugFlag(s); err == nil || !strings.Contains(err.Error(), "need MODULE.FLAG=N") {
			t.Errorf("%q: got %+v, %v", s, f, err)
		}
	}
	for s, want := range map[string]DebugFlag{
		"a.b=1": {Module: "a", Flag: "b", Value: 1}, "a.b.c=-2147483648": {Module: "a", Flag: "b.c", Value: -1 << 31},
		"a..b=0x1F": {Module: "a", Flag: ".b", Value: 31}, "a.b=010": {Module: "a", Flag: "b", Value: 8},
	} {
		if got, err := ParseDebugFlag(s); err != nil || got != want {
			t.Errorf("%q: got %+v, %v", s, got, err)
		}
	}
}

// One file is one set of variables: a second plugin of it would change the first one's, also where the
// plugin has no .load or no .unload.
func TestOpenTwice(t *testing.T) {
	for _, source := range []string{"plugin.c", "signals.c", "bad.c"} {
		path := compile(t, source)
		first, err := Open(path)
		if err != nil {
			t.Fatal(err)
		}
		ch := backend.NewChain(first, nil, backend.Trace{})
		ch.Load()
		if second, err := Open(path); !errors.Is(err, ErrInUse) {
			t.Errorf("%s, while it is loaded: got %v and %v, need %v", source, second, err, ErrInUse)
		}
		ch.Unload()
		if _, err := Open(path); err != nil {
			t.Errorf("%s, once it is unloaded: %v", source, err)
		}
	}
}
