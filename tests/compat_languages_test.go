package tests

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
)

// A language has a plugin, which serves a disk of 1 MiB.
type language struct {
	name                 string
	plugin               string   // of nbdkit that runs it, "" if it is a plugin itself
	args                 []string // LANGUAGES stands for where languageFiles puts things
	numbers              bool     // an error has a number of its own
	shutdown, disconnect string   // what asks the server for these, "" if nothing does
}

var languages = []language{
	{"C (cc)", "cc", []string{"cc", "LANGUAGES/disk.c"}, true, "", ""},
	{"C++", "", []string{"LANGUAGES/cxx.so"}, true, "", ""},
	{"Go (c-shared)", "", []string{"LANGUAGES/go.so"}, true, "", ""},
	{"Lua", "lua", []string{"lua", "LANGUAGES/disk.lua"}, false, "", ""},
	{"Perl", "perl", []string{"perl", "LANGUAGES/disk.pl"}, true, "", ""},
	{"Python", "python", []string{"python", "LANGUAGES/disk.py"}, true, "nbdkit.shutdown()", "nbdkit.disconnect()"},
	{"Ruby", "ruby", []string{"ruby", "LANGUAGES/disk.rb"}, true, "", ""},
	{"Tcl", "tcl", []string{"tcl", "LANGUAGES/disk.tcl"}, false, "", ""},
	{"shell (eval)", "eval", []string{"eval", "get_size=echo 1048576",
		"can_write=exit 0", "can_zero=exit 0", "can_trim=exit 0",
		"pread=tmpdir=LINK exec LANGUAGES/disk.sh pread \"$2\" $3 $4", "pwrite=tmpdir=LINK exec LANGUAGES/disk.sh pwrite \"$2\" $3 $4",
		"zero=tmpdir=LINK exec LANGUAGES/disk.sh zero \"$2\" $3 $4", "trim=tmpdir=LINK exec LANGUAGES/disk.sh trim \"$2\" $3 $4"}, true, "exit status 4", "exit statuses 6 and 7"},
	{"shell (sh)", "sh", []string{"sh", "LANGUAGES/disk.sh", "file=DIR/file"}, true, "exit status 4", "exit statuses 6 and 7"},
}

// start returns how the language's plugin is started, with its files in dir.
func (l *language) start(dir string) (args []string, setup func(t *testing.T, dir string)) {
	for _, a := range l.args {
		args = append(args, strings.NewReplacer("LANGUAGES", dir, "LINK", "DIR").Replace(a))
	}
	return args, func(t *testing.T, dir string) {
		writeFile(t, filepath.Join(dir, "file"), strings.Repeat("\x00", 1<<20), 0o644)
	}
}

var makeLanguages = sync.OnceValue(func() error {
	dir := filepath.Join(scratch, "language")
	for _, args := range [][]string{
		{"cp", "-r", "fixtures/languages", dir},
		// The other releases' own libstdc++ may be another one.
		{"g++", "-x", "c++", "-Wall", "-fPIC", "-shared", "-static-libstdc++", "-static-libgcc", "-o", dir + "/cxx.so", dir + "/disk.c"},
		{"go", "build", "-buildmode=c-shared", "-o", dir + "/go.so", "./testdata/goplugin"},
	} {
		if out, err := exec.Command(args[0], args[1:]...).CombinedOutput(); err != nil {
			return fmt.Errorf("%s: %w\n%s", strings.Join(args, " "), err, out)
		}
	}
	return nil
})

// languageFiles puts the plugins into scratch, where every release sees them,
// and compiles those that need it.
func languageFiles(t *testing.T) string {
	t.Helper()
	if err := makeLanguages(); err != nil {
		t.Fatal(err)
	}
	return filepath.Join(scratch, "language")
}

// told returns what the plugin has said about its children and itself, each
// line once: how often it is asked is for other tests.
func told(s *server) string {
	var lines []string
	elsewhere, _ := os.ReadFile(filepath.Join(s.dir, "file.child")) // of scripts, whose stderr is for errors
	for line := range strings.Lines(s.stderr() + string(elsewhere)) {
		at := strings.Index(line, "child: ")
		if at < 0 {
			continue
		}
		line = line[at:]
		if !slices.Contains(lines, line) {
			lines = append(lines, line)
		}
	}
	return strings.Join(lines, "")
}

func testLanguages(t *testing.T) {
	dir := languageFiles(t)
	for _, r := range releases(t) {
		for _, l := range languages {
			if l.plugin != "" && !r.has(l.plugin) {
				continue
			}
			args, setup := l.start(dir)
			t.Run(r.name+"/"+l.name, func(t *testing.T) {
				t.Parallel()
				number := 5 // EIO
				if l.numbers {
					number = 28 // ENOSPC
				}
				same, did := r.same, "read, write, map, error, children"
				if l.name == "Ruby" {
					// nbdkit's own crashes in the first connection, which is on another
					// thread than Ruby was started on.
					same = func(t *testing.T, sc scenario) string { return sc.run(t, r.nbdhost) }
					did += " (nbdkit's crashes)"
				}
				if l.name == "Python" {
					did += ", threads"
				}
				out := same(t, scenario{args: args, setup: setup,
					client: func(t *testing.T, s *server) string {
						return script(t, s, "", `
for offset, count in ((524301, 1), (524302, 3)):
    try:
        print(h.pread(count, offset))
    except nbd.Error as e:
        print('error', offset, e.errno)
`) + explore(t, s, "", true) + told(s)
					}})
				if want := fmt.Sprintf("error 524301 %s\n", map[int]string{5: "EIO", 28: "ENOSPC"}[number]); !strings.HasPrefix(out, want) {
					t.Errorf("got %.40q, want %q", out, want)
				}
				if n := strings.Count(out, "child: "); n < 2 {
					t.Errorf("got %d lines about signals, want 2 at least:\n%s", n, out)
				}
				languageTable.record(t, l.name, r.name, 0, did)
			})
		}
		for _, l := range languages {
			if l.shutdown == "" || r.name == "bookworm" && l.name != "Python" {
				continue // not yet
			}
			t.Run(r.name+"/"+l.name+" asks", func(t *testing.T) {
				t.Parallel()
				args, setup := l.start(dir)
				// The server stops by itself.
				r.same(t, scenario{args: args, setup: setup, client: func(t *testing.T, s *server) string {
					script(t, s, "", `
try:
    h.pread(1, 524303)
except nbd.Error:
    pass # the server was faster
`)
					s.wait()
					return ""
				}})
				languageTable.record(t, l.name, r.name, 1, l.shutdown)
				if r.name == "bookworm" {
					return // no nbdkit.disconnect yet
				}
				r.same(t, scenario{args: args, setup: setup, client: func(t *testing.T, s *server) string {
					return script(t, s, "", `
print('soft', len(h.pread(1, 524304)))
try:
    h.pread(1, 0)
except nbd.Error as e:
    print('then', e.errno)
h.shutdown()
h = nbd.NBD()
h.connect_uri('`+s.uri("")+`')
try:
    print('forced', h.pread(1, 524305))
except nbd.Error as e:
    print('forced', h.aio_is_dead() or h.aio_is_closed())
h = nbd.NBD()
h.connect_uri('`+s.uri("")+`')
print('again', len(h.pread(1, 0)))
h.shutdown()
`)
				}})
				languageTable.record(t, l.name, r.name, 2, l.disconnect)
			})
		}
	}
}
