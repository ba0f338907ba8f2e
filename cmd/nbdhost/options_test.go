package main

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

func TestParse(t *testing.T) {
	for _, tt := range []struct {
		args []string
		want func(*options) bool
	}{
		{[]string{"memory"}, func(o *options) bool {
			return o.handshakeMask == 0xffff && o.drainTimeout == 10*time.Second && !o.foreground && o.family == "tcp" && o.unix == ""
		}},
		{[]string{"-frv", "memory", "1M"}, func(o *options) bool { return o.foreground && o.readonly && o.verbose && len(o.args) == 2 }},
		{[]string{"memory", "-f", "size=1M", "--verbose"}, func(o *options) bool {
			return o.foreground && o.verbose && slices.Equal(o.args, []string{"memory", "size=1M"})
		}},
		{[]string{"x", "--", "-f"}, func(o *options) bool { return !o.foreground && slices.Equal(o.args, []string{"x", "-f"}) }},
		{[]string{"-U", "-", "x"}, func(o *options) bool { return o.unix == "-" }},
		{[]string{"-U/s", "x"}, func(o *options) bool { return o.unix == "/s" }},
		{[]string{"-fU/s", "x"}, func(o *options) bool { return o.unix == "/s" && o.foreground }},
		{[]string{"--no-fork", "--ip-addr=::1", "--read-only"}, func(o *options) bool { return o.foreground && o.address == "::1" && o.readonly }},
		{[]string{"--fil=cow", "--sin"}, func(o *options) bool { return slices.Equal(o.filters, []string{"cow"}) && o.stdio }},
		{[]string{"--ma=1"}, func(o *options) bool { return o.handshakeMask == 1 }},
		{[]string{"--man"}, func(o *options) bool { return o.manual }},
		{[]string{"--drain=1"}, func(o *options) bool { return o.drainTimeout == time.Second }},
		{[]string{"--thr", "4"}, func(o *options) bool { return o.threads == 4 }},
		{[]string{"--threads=0x10"}, func(o *options) bool { return o.threads == 16 }},
		{[]string{"-4", "-6"}, func(o *options) bool { return o.family == "tcp6" }},
		{[]string{"-e", "a", "--export=b"}, func(o *options) bool { return o.export == "b" }},
		{[]string{"-D vddk.datapath=0", "-D", "a.b.c=0x10"}, func(o *options) bool {
			return len(o.debug) == 2 && o.debug[0].Module == "vddk" && o.debug[1].Flag == "b.c" && o.debug[1].Value == 16
		}},
		{[]string{"--run", "true"}, func(o *options) bool { return o.captive && o.foreground && o.unix == "-" }},
		{[]string{"--run", "", "-p", "0"}, func(o *options) bool { return o.captive && o.unix == "" && o.port == "0" }},
		{[]string{"--exit-with-parent"}, func(o *options) bool { return o.exitWithParent && o.foreground }},
		{[]string{"--mask-handshake", "0x1"}, func(o *options) bool { return o.handshakeMask == 1 }},
		{[]string{"--timeout=1.5ms"}, func(o *options) bool { return o.timeout == 1500*time.Microsecond }},
		{[]string{"-h"}, func(o *options) bool { return o.help }},
		{[]string{"--vsock", "-p", "4294967295"}, func(o *options) bool { return o.vsock && o.port == "4294967295" }},
		{[]string{"--tls=no", "--tls-psk", "/k", "--tls-verify-peer"}, func(o *options) bool { return o.tls == tlsOptions{mode: tlsOff, psk: "/k", verifyPeer: true} }},
		{[]string{"--vsock", "--run", "true"}, func(o *options) bool { return o.vsock && o.unix == "" }},
		{[]string{"-s"}, func(o *options) bool { return o.stdio && o.foreground }},
		{[]string{"-o", "-n"}, func(o *options) bool { return !o.oldstyle }},
		{[]string{"-u", "nobody", "-gnogroup", "--swap"}, func(o *options) bool { return o.user == "nobody" && o.group == "nogroup" && o.swap }},
		{[]string{"-n", "-p", "nbd"}, func(o *options) bool { return o.port == "nbd" }},
	} {
		o, err := parse(tt.args)
		if err == nil {
			err = o.settle()
		}
		if err != nil {
			t.Errorf("parse(%q): %v", tt.args, err)
		} else if !tt.want(o) {
			t.Errorf("parse(%q) = %+v", tt.args, *o)
		}
	}
}

func TestParseErrors(t *testing.T) {
	for _, tt := range []struct {
		args []string
		want string
	}{
		{[]string{"--nosuchthing"}, "unknown option --nosuchthing; see --help"},
		{[]string{"--redonly"}, "did you mean --readonly?"},
		{[]string{"--pid"}, "option --pidfile needs a value: FILE"}, // unique, though two of its names begin so
		{[]string{"--p"}, "ambiguous: need one of --port, --pidfile, --print-uri"},
		{[]string{"-fX"}, "unknown option -X"},
		{[]string{"-p"}, "option --port needs a value: PORT"},
		{[]string{"--port"}, "option --port needs a value: PORT"},
		{[]string{"-p", "65536"}, `option --port: got "65536"`},
		{[]string{"-p", "-1"}, `option --port: got "-1"`},
		{[]string{"-i", ""}, "need an address"},
		{[]string{"-U", ""}, "need a path"},
		{[]string{"-U", "/" + strings.Repeat("x", 107)}, "got a path of 108 bytes"},
		{[]string{"-t", "-1"}, "need a number from 1 to 8192"},
		{[]string{"-t", "8193"}, "need a number from 1 to 8192"},
		{[]string{"--tls=maybe"}, "need off, on or require"},
		{[]string{"-p", ""}, "need a number or the name of a service"},
		{[]string{"--vsock", "-p", "nbd"}, "need a number of 32 bits with --vsock"},
		{[]string{"-U", "-", "--vsock"}, "got both --unix and --vsock"},
		{[]string{"-s", "--run", "true"}, "got both --single and --run"},
		{[]string{"--tls-psk="}, "need a path"},
		{[]string{"-o", "--tls=required"}, "got both --oldstyle and --tls=require"},
		{[]string{"--completion=csh"}, "need bash, zsh or fish"},
		{[]string{"--readonly=no"}, `got the value "no": need none`},
		{[]string{"--mask-handshake="}, "need a number of 32 bits"},
		{[]string{"--timeout=5x"}, "need a time"},
		{[]string{"--drain-timeout=-1"}, "need a time"},
		{[]string{"--log=file"}, "need stderr, syslog, null, default or an absolute path"},
		{[]string{"-D", "foo"}, "need MODULE.FLAG=N"},
		{[]string{"-U", "/s", "-p", "1"}, "got both --unix and --port"},
	} {
		o, err := parse(tt.args)
		if err == nil {
			err = o.settle()
		}
		if err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("parse(%q): got %v, want %q", tt.args, err, tt.want)
		}
	}
}

// Every option can be found in --help, by all that it says there.
func TestOptionTable(t *testing.T) {
	help := usage()
	for line := range strings.SplitSeq(help, "\n") {
		if len(line) > 99 {
			t.Errorf("line too long: %q", line)
		}
	}
	seen := map[string]bool{}
	for _, opt := range optionTable {
		if opt.group != "" && (opt.help == "" || !slices.Contains(groups, opt.group)) {
			t.Errorf("--%s: no help, or the group %q is none", opt.names[0], opt.group)
		}
		for _, n := range append([]string{opt.short}, opt.names...) {
			if seen[n] && n != "" {
				t.Errorf("option %q is there twice", n)
			}
			seen[n] = true
		}
	}
}

func TestParseDelay(t *testing.T) {
	for s, want := range map[string]time.Duration{
		"0": 0, "1": time.Second, "1.2": 1200 * time.Millisecond, "1.2s": 1200 * time.Millisecond, "120ms": 120 * time.Millisecond,
		"1.2us": 1200, "120μs": 120 * time.Microsecond, "120µs": 120 * time.Microsecond, "1ns": 1, "1e1": 10 * time.Second,
	} {
		if got, err := parseDelay(s); err != nil || got != want {
			t.Errorf("parseDelay(%q) = %v, %v; want %v", s, got, err, want)
		}
	}
	for _, s := range []string{"", "s", "-1", "1m", "1h", "1 s", "1s1", "nan", "inf", "1e300", "ms1"} {
		if got, err := parseDelay(s); err == nil {
			t.Errorf("parseDelay(%q) = %v, want an error", s, got)
		}
	}
}

func TestParseParameter(t *testing.T) {
	for _, tt := range []struct {
		arg, magic string
		first      bool
		key, value string
		ok         bool
	}{
		{"size=1M", "", false, "size", "1M", true},
		{"size=", "", false, "size", "", true},
		{"a.b_c-9=x=y", "", false, "a.b_c-9", "x=y", true},
		{"=x", "file", false, "file", "=x", true},
		{"9a=x", "file", false, "file", "9a=x", true},
		{"_a=x", "file", false, "file", "_a=x", true},
		{"a b=x", "file", false, "file", "a b=x", true},
		{"é=x", "file", false, "file", "é=x", true},
		{"x@y=z", "file", false, "file", "x@y=z", true},
		{"disk.img", "file", false, "file", "disk.img", true},
		{"", "file", true, "file", "", true},
		{"s.sh", "", true, "script", "s.sh", true},
		{"s.sh", "", false, "", "", false},
	} {
		key, value, err := parseParameter(tt.arg, tt.magic, tt.first)
		if key != tt.key || value != tt.value || (err == nil) != tt.ok {
			t.Errorf("parseParameter(%q, %q, %v) = %q, %q, %v", tt.arg, tt.magic, tt.first, key, value, err)
		}
	}
}

func TestExpandParameters(t *testing.T) {
	dir := t.TempDir()
	for name, text := range map[string]string{
		"a": "# comment\n\nsize=1M\n@./sub/b\n @x\nlast", "sub/b": "x=1\n@./c\n", "sub/c": "y=2 \n", "loop": "@./loop\n",
	} {
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o777); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o666); err != nil {
			t.Fatal(err)
		}
	}
	got, err := expandParameters([]string{"first", "@" + dir + "/a", "@user", "z=3"})
	want := []string{"first", "size=1M", "x=1", "y=2 ", " @x", "last", "@user", "z=3"}
	if err != nil || !slices.Equal(got, want) {
		t.Errorf("got %q, %v; want %q", got, err, want)
	}
	for _, bad := range []string{"/loop", "/missing", "/sub"} {
		if got, err := expandParameters([]string{"@" + dir + bad}); err == nil {
			t.Errorf("@%s: got %q, want an error", bad, got)
		}
	}
}
