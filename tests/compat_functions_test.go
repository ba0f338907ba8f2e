package tests

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
)

// differs has the functions that do not answer as the release's nbdkit does, and
// how: a line is put into the form that both are said to have.
var differs = map[string]struct {
	why  string
	line func(r *release, line string) string // "" if it is not compared
}{
	"nbdkit_parse_size": {"nbdkit before 1.48 takes decimal numbers only", func(r *release, line string) string {
		if r.name != "sid" && strings.Contains(line, "(0x10)") {
			return ""
		}
		return line
	}},
	"nbdkit_debug": {"one line, escaped as nbdkit does since", func(r *release, line string) string {
		if r.name == "bookworm" && strings.Contains(line, "two") {
			return ""
		}
		return line
	}},
	"nbdkit_is_tls": {"nbdkit gives -1 before .open, nbdhost what is asked for", func(r *release, line string) string {
		for _, phase := range []string{" preconnect ", " list_exports ", " default_export "} {
			if strings.Contains(line, phase) {
				return ""
			}
		}
		return line
	}},
	"nbdkit_peer_uid": {notUnix, minusOne},
	"nbdkit_peer_gid": {notUnix, minusOne},
	"nbdkit_timestamp": {"nbdkit's own is \"!\" in most places", func(r *release, line string) string {
		return strings.Replace(line, "= 0 fields, 1 bytes, all 0", "= 7 fields, 26 bytes, all 1", 1)
	}},
}

const notUnix = "nbdkit gives 4294967295, nbdhost the -1 of an error"

func minusOne(_ *release, line string) string {
	return strings.Replace(line, "= 4294967295", "= -1", 1)
}

// testFunctions has a plugin call every function in every phase of its life and on
// threads of its own, and compares what it gets, and what is logged, with nbdkit.
func testFunctions(t *testing.T) {
	plugin := fixture(t, "api")
	for _, r := range releases(t) {
		t.Run(r.name, func(t *testing.T) {
			t.Parallel()
			functionsIn(t, r, plugin)
		})
	}
}

func functionsIn(t *testing.T, r *release, plugin string) {
	type answers map[string][]string // by function
	changed := map[string]bool{}     // differs was of use
	run := func(t *testing.T, program, transport string) answers {
		var transcript string
		args := []string{"-v", plugin, "some=parameter"}
		if transport == "TLS" {
			args = append([]string{"--tls=require", "--tls-certificates=DIR/server", "--tls-verify-peer"}, args...)
		}
		sc := scenario{args: args, tcp: transport != "a Unix socket",
			setup: func(t *testing.T, dir string) { tlsFiles(t, dir) },
			client: func(t *testing.T, s *server) string {
				uri := s.uri
				if transport == "TLS" {
					uri = func(export string) string {
						return strings.Replace(s.tlsURI(s.dir+"/client", ""), "/?", "/"+export+"?", 1)
					}
				}
				command(t, "nbdinfo", "--json", uri("asked"))
				command(t, "nbdinfo", "--json", uri(""))
				command(t, "nbdinfo", "--list", uri(""))
				out, err := nbdsh(t, uri("other"), `
print(len(h.pread(512, 0)))
h.pwrite(b'x' * 512, 0)
for e in (0, 1, 5, 12, 13, 22, 27, 28, 30, 75, 95, 108, 122, 200):
    try:
        h.pread(1, 65536 + e)
    except nbd.Error as error:
        print('nbdkit_set_error client', e, error.errno)
h.shutdown()
`)
				if err != nil {
					t.Fatal(err)
				}
				return out
			},
			after: func(t *testing.T, dir string) string {
				stderr, err := os.ReadFile(filepath.Join(dir, "stderr"))
				if err != nil {
					t.Fatal(err)
				}
				b, err := os.ReadFile(filepath.Join(dir, "transcript"))
				if err != nil {
					t.Fatal(err)
				}
				transcript = string(b) + logged(string(stderr))
				return ""
			}}
		transcript += sc.run(t, program)
		got := answers{}
		for line := range strings.Lines(transcript) {
			name, _, _ := strings.Cut(strings.TrimSpace(line), " ")
			if !strings.HasPrefix(name, "nbdkit_") {
				continue
			}
			if d, ok := differs[name]; ok {
				before := line
				line = d.line(r, line)
				changed[name] = changed[name] || line != before
				if line == "" {
					continue
				}
			}
			got[name] = append(got[name], line)
		}
		// How often a callback is called is not the question here.
		for name, lines := range got {
			slices.Sort(lines)
			got[name] = slices.Compact(lines)
		}
		return got
	}
	explained := map[string]bool{}
	for rank, transport := range []string{"a Unix socket", "TCP", "TLS"} {
		t.Run(transport, func(t *testing.T) {
			clear(changed)
			want, got := run(t, r.nbdkit, transport), run(t, r.nbdhost, transport)
			var names []string
			for name := range got {
				names = append(names, name)
			}
			for name := range want {
				if got[name] == nil {
					t.Errorf("%s: no answer", name)
				}
			}
			slices.Sort(names)
			for _, name := range names {
				t.Run(name, func(t *testing.T) {
					w, g := strings.Join(want[name], ""), strings.Join(got[name], "")
					cell := "same"
					switch {
					case w == "":
						cell = "new"
					case g != w:
						t.Errorf("%s answers unlike nbdkit's in this:\n%s", name, difference(w, g))
					}
					if rank > 0 {
						if w == "" || !strings.HasPrefix(name, "nbdkit_peer_") && name != "nbdkit_is_tls" {
							return // nothing to do with who is there
						}
						cell = "over " + transport
					}
					if d, ok := differs[name]; ok && changed[name] && !explained[name] {
						cell += " (" + d.why + ")"
						explained[name] = true
					}
					functionTable.record(t, "`"+name+"`", r.name, rank, cell)
				})
			}
		})
	}

	// A password of "-" is asked for on the terminal, after red errors, and not shown.
	t.Run("password", func(t *testing.T) {
		const secret = "open sesame"
		ask := func(program string) string {
			dir := tempDir(t)
			shown := terminal(t, "\x1b[0mpassword:", secret+"\n", "env", "TMPDIR="+dir, program, "-U", "-", plugin, "password=-", "--run", "true")
			if strings.Contains(shown, secret) {
				t.Errorf("%s: the terminal shows the password: %q", program, shown)
			}
			b, err := os.ReadFile(filepath.Join(dir, "transcript"))
			if err != nil {
				t.Fatal(err)
			}
			return regexp.MustCompile(`(?m)^.*\(asked for\).*$`).FindString(string(b))
		}
		want, got := ask(r.nbdkit), ask(r.nbdhost)
		if got != want || !strings.HasSuffix(got, "= 0 "+secret) {
			t.Errorf("got %q, nbdkit has %q", got, want)
		}
		functionTable.record(t, "`nbdkit_read_password`", r.name, 1, "asked for on a terminal")
	})

	// What ends a connection or the server: each has a server of its own.
	for _, end := range []struct{ function, script string }{
		{"nbdkit_shutdown", `
print(len(h.pread(1, 8192)))
`},
		{"nbdkit_disconnect", `
h.pread(1, 12288)
try:
    h.pread(1, 0)
except nbd.Error as e:
    print(e.errno)
h.shutdown()
h = nbd.NBD()
h.connect_uri('URI')
try:
    h.pread(1, 16384)
except nbd.Error as e:
    print(h.aio_is_dead() or h.aio_is_closed())
`},
		{"nbdkit_nanosleep, server", `
import os, signal
h.aio_pread(nbd.Buffer(1), 4096)
while not h.aio_in_flight():
    h.poll(0)
open('DIR/begun').read()
os.kill(int(open('DIR/pid').read()), signal.SIGTERM)
while h.aio_in_flight():
    h.poll(-1)
`},
		// The client leaves while the plugin sleeps.
		{"nbdkit_nanosleep", `
h.aio_pread(nbd.Buffer(1), 4096)
while not h.aio_in_flight():
    h.poll(0)
open('DIR/begun').read()
`},
	} {
		t.Run(end.function+" ends", func(t *testing.T) {
			if end.function == "nbdkit_disconnect" && r.name == "bookworm" {
				return // not in 1.32
			}
			r.same(t, scenario{args: []string{plugin},
				setup: func(t *testing.T, dir string) {
					if err := syscall.Mkfifo(filepath.Join(dir, "begun"), 0o600); err != nil {
						t.Fatal(err)
					}
				},
				client: func(t *testing.T, s *server) string {
					out := script(t, s, "", strings.NewReplacer("URI", s.uri(""), "DIR", s.dir).Replace(end.script))
					if end.function == "nbdkit_shutdown" {
						s.wait() // it ends by itself
					}
					return out
				},
				after: func(t *testing.T, dir string) string {
					b, err := os.ReadFile(filepath.Join(dir, "transcript"))
					if err != nil {
						t.Fatal(err)
					}
					return regexp.MustCompile(`(?m)^nbdkit_(nanosleep gone|shutdown).*\n`).FindString(string(b))
				}})
			cell := map[string]string{"nbdkit_nanosleep": "ends with the connection", "nbdkit_nanosleep, server": "and the server",
				"nbdkit_disconnect": "ends the connection", "nbdkit_shutdown": "ends the server"}[end.function]
			function, rest, _ := strings.Cut(end.function, ",")
			functionTable.record(t, "`"+function+"`", r.name, 3+len(rest), cell)
		})
	}
}

// logged returns the plugin's own lines of a log as answers of the functions that
// wrote them. In which of a connection's threads a call is made, and so the name
// that a line begins with, is not the same.
func logged(stderr string) string {
	var b strings.Builder
	for _, m := range regexp.MustCompile(`(?m)^nbdkit: (?:api[^:]*: )?(\w+): (api-(\w+).*)$`).FindAllStringSubmatch(stderr, -1) {
		name := m[3]
		if strings.HasPrefix(name, "hex") {
			name = "debug_" + name
		}
		fmt.Fprintf(&b, "nbdkit_%s logs %s: %s\n", name, m[1], m[2])
	}
	return b.String()
}
