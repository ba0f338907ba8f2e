package tests

import (
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"nbdhost/protocol"
)

// settled sorts the questions that a server asks while it negotiates: their
// order is its own business, how often it asks is not.
func settled(lines []string) []string {
	var out, asked []string
	flush := func() {
		slices.Sort(asked)
		out, asked = append(out, asked...), nil
	}
	for _, line := range lines {
		name, _, _ := strings.Cut(line, " ")
		switch {
		case strings.HasPrefix(name, "can_"), name == "get_size", name == "is_rotational", name == "block_size", name == "export_description":
			asked = append(asked, line)
		default:
			flush()
			out = append(out, line)
		}
	}
	flush()
	return out
}

// traced runs a client on fixtures/trace.c under both servers and compares the
// callbacks, with their arguments. The client leaves one connection behind it.
func traced(t *testing.T, args []string, client func(t *testing.T, s *server) string) {
	t.Helper()
	var j *journal
	compare(t, scenario{
		setup: func(t *testing.T, dir string) { j = newJournal(t, dir) },
		args:  append([]string{fixture(t, "trace"), "journal=DIR/journal"}, args...),
		client: func(t *testing.T, s *server) string {
			result := client(t, s)
			j.wait("close 1", 1)
			return result
		},
		after: func(t *testing.T, _ string) string {
			lines := j.all()
			paired(t, lines)
			return "journal:\n" + strings.Join(settled(lines), "\n")
		},
	})
}

// TestCallbacks: which callbacks a client's requests cause, with what arguments.
func TestCallbacks(t *testing.T) {
	t.Parallel()
	requests := func(t *testing.T, s *server) string {
		var all strings.Builder
		c := s.hello(true)
		cookie := uint64(0)
		for _, flags := range []protocol.CommandFlags{0, protocol.CmdFlagFUA, protocol.CmdFlagNoHole, protocol.CmdFlagDF, protocol.CmdFlagReqOne,
			protocol.CmdFlagFastZero, protocol.CmdFlagFUA | protocol.CmdFlagNoHole | protocol.CmdFlagFastZero} {
			for typ := protocol.CmdRead; typ <= protocol.CmdBlockStatus; typ++ {
				if typ == protocol.CmdDisc {
					continue
				}
				cookie++
				r := protocol.Request{Type: typ, Flags: flags, Cookie: cookie, Offset: 0xfff0, Length: 0x20010}
				var payload []byte
				switch typ {
				case protocol.CmdWrite:
					payload = make([]byte, r.Length)
				case protocol.CmdFlush:
					r.Offset, r.Length = 0, 0
				}
				c.send(r, payload...)
				got := c.next()
				fmt.Fprintf(&all, "%v %v: %v %x\n", typ, flags, got.errno, got.data)
			}
		}
		c.disc()
		c.wantEOF()
		return fmt.Sprint(c.flags, c.size, "\n") + all.String()
	}
	for name, args := range map[string][]string{
		"all":      nil,
		"readonly": {"-r"},
		"threads":  {"-t", "1"},
		"export":   {"-e", "other"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			traced(t, args, requests)
		})
	}
}

// failing are the callbacks that fixtures/trace.c can let fail.
var failing = []string{
	"preconnect", "list_exports", "default_export", "open", "get_size", "export_description", "block_size",
	"can_write", "can_flush", "is_rotational", "can_trim", "can_zero", "can_fast_zero", "can_extents", "can_fua",
	"can_cache", "can_multi_conn", "pread", "pwrite", "flush", "trim", "zero", "cache", "extents",
}

// TestFailingCallbacks: whatever callback fails, the client is told what nbdkit
// tells it, open and close stay paired, and the server goes on.
func TestFailingCallbacks(t *testing.T) {
	t.Parallel()
	for _, callback := range failing {
		t.Run(callback, func(t *testing.T) {
			t.Parallel()
			var results [2]string
			for i, program := range []string{nbdkit, nbdhost} {
				dir := tempDir(t)
				j := newJournal(t, dir)
				s := start(t, program, dir, false, fixture(t, "trace"), "journal=DIR/journal", "fail="+callback)
				var b strings.Builder
				for range 2 {
					for _, args := range [][]string{
						{"nbdinfo", "--json", s.uri("")},
						{"nbdinfo", "--list", s.uri("")},
						{"nbdinfo", "--map", s.uri("")},
						{"/usr/bin/nbdsh", "-u", s.uri(""), "-c", `
for call in (lambda: h.pread(512, 0), lambda: h.pwrite(b'x' * 512, 0), lambda: h.flush(), lambda: h.trim(512, 0), lambda: h.zero(512, 0), lambda: h.cache(512, 0)):
    try:
        print(call())
    except nbd.Error as e:
        print(e.errno)
`},
					} {
						out, err := try(t, args[0], args[1:]...)
						fmt.Fprintf(&b, "%s%v\n", out, err == nil)
					}
				}
				results[i] = s.anonymous(b.String())
				s.stop()
				if lines := j.all(); program == nbdhost && underTest() != "nbdkit" {
					paired(t, lines)
				}
			}
			if results[0] != results[1] {
				t.Errorf("%s is unlike nbdkit in this:\n%s", underTest(), difference(results[0], results[1]))
			}
		})
	}
}

// TestFailingStart: a callback that fails before there is a client ends the
// program with status 1, and leaves nothing behind.
func TestFailingStart(t *testing.T) {
	t.Parallel()
	for _, callback := range []string{"config_complete", "thread_model", "get_ready", "after_fork"} {
		t.Run(callback, func(t *testing.T) {
			t.Parallel()
			if callback == "after_fork" {
				onlyNbdhost(t) // nbdkit has written its pidfile by then
			}
			dir := tempDir(t)
			j := newJournal(t, dir)
			_, err := tryStart(t, nbdhost, dir, false, fixture(t, "trace"), "journal=DIR/journal", "fail="+callback)
			if err == nil || !strings.Contains(err.Error(), "exit status 1") || !strings.Contains(err.Error(), callback+" fails as asked") {
				t.Errorf("start: got %v, want exit status 1 and the plugin's own message", err)
			}
			if lines := j.all(); !slices.Contains(lines, callback) {
				t.Errorf("journal: got %q, want %s", lines, callback)
			}
		})
	}
}

// TestV1 serves a plugin of API version 1.
func TestV1(t *testing.T) {
	t.Parallel()
	var j *journal
	compare(t, scenario{
		setup: func(t *testing.T, dir string) { j = newJournal(t, dir) },
		args:  []string{fixture(t, "v1"), "journal=DIR/journal"},
		client: func(t *testing.T, s *server) string {
			out := command(t, "/usr/bin/nbdsh", "-u", s.uri(""), "-c", `
import hashlib
print(h.can_fua(), h.can_zero(), h.can_trim(), h.can_flush(), h.can_fast_zero(), h.can_multi_conn(), h.can_cache(), h.get_size())
h.pwrite(b'12345678' * 20000, 100)
h.pwrite(b'fua' * 100, 300000, nbd.CMD_FLAG_FUA)
h.zero(5000, 1000)
h.zero(5000, 1000, nbd.CMD_FLAG_NO_HOLE)
h.zero(5000, 600000)
h.zero(5000, 600000, nbd.CMD_FLAG_FUA)
h.trim(512, 1024)
h.trim(512, 1024, nbd.CMD_FLAG_FUA)
h.flush()
print(hashlib.sha256(h.pread(1048576, 0)).hexdigest())
`)
			j.wait("close", 1)
			return out
		},
		after: func(t *testing.T, _ string) string { return "journal:\n" + strings.Join(j.all(), "\n") },
	})
}

// TestOpenFiles: what a plugin forks may open as many files as it may under nbdkit.
func TestOpenFiles(t *testing.T) {
	t.Parallel()
	for _, program := range []string{nbdkit, nbdhost} {
		t.Run(filepath.Base(program), func(t *testing.T) {
			t.Parallel()
			dir := tempDir(t)
			writeFile(t, filepath.Join(dir, "limited"), "#!/bin/sh\nulimit -Sn 300\nexec "+program+` "$@"`, 0o755)
			s := start(t, filepath.Join(dir, "limited"), dir, false, "eval", "get_size=ulimit -Sn", "pread=exit 1")
			if got := command(t, "nbdinfo", "--size", s.uri("")); got != "300\n" {
				t.Errorf("got a limit of %q, need 300", got)
			}
			s.stop()
		})
	}
}

// TestThreadModels: calls of a plugin never overlap where its thread model says
// that they must not, and do where it says that they may.
func TestThreadModels(t *testing.T) {
	t.Parallel()
	for model, test := range map[string]struct {
		handles bool // several are open at once
		all     bool // calls on two handles overlap
		one     bool // calls on one handle overlap
	}{
		"SERIALIZE_CONNECTIONS":  {},
		"SERIALIZE_ALL_REQUESTS": {handles: true},
		"SERIALIZE_REQUESTS":     {handles: true, all: true},
		"PARALLEL":               {handles: true, all: true, one: true},
	} {
		t.Run(model, func(t *testing.T) {
			t.Parallel()
			dir := tempDir(t)
			j, g := newJournal(t, dir), newGate(t, dir)
			s := start(t, nbdhost, dir, false, fixture(t, "models", "-DTHREAD_MODEL=NBDKIT_THREAD_MODEL_"+model),
				"journal=DIR/journal", "gate=DIR/gate")

			if !test.handles {
				// The second client waits for the first to leave.
				c := s.hello(false)
				second := s.dial()
				c.read(1, 0, 512)
				c.want(1, 0)
				if count(j.sofar(), "open 2") > 0 {
					t.Error("a second handle was opened")
				}
				c.disc()
				c.wantEOF()
				second.Close()
			} else {
				a, b := s.hello(false), s.hello(false)
				const slow = 0x8001
				a.read(1, slow, 512)
				j.wait("slow 1", 1)
				if test.one {
					a.read(2, slow, 512)
					j.wait("slow 1", 2)
					a.read(3, 0, 512)
					a.want(3, 0)
					g.open(1)
					a.next()
				}
				if test.all {
					b.read(1, slow, 512)
					j.wait("slow 2", 1)
					g.open(1)
				}
				g.open(1)
				if r := a.next(); r.errno != 0 {
					t.Errorf("slow read: got %v", r)
				}
				if test.all {
					b.want(1, 0)
				}
				a.disc()
				b.disc()
				a.wantEOF()
				b.wantEOF()
			}

			// Many of each, at once.
			command(t, "nbdcopy", "--connections=1", "--requests=32", "--request-size=4096", s.uri(""), "null:")
			done := make(chan error)
			for range 3 {
				go func() {
					_, err := try(t, "nbdcopy", "--requests=32", "--request-size=4096", s.uri(""), "null:")
					done <- err
				}()
			}
			for range 3 {
				if err := <-done; err != nil {
					t.Error(err)
				}
			}
			s.stop()

			lines := j.all()
			if underTest() != "nbdkit" { // which does not close what is open when it is stopped
				paired(t, lines)
			}
			var handles, calls int
			if _, err := fmt.Sscanf(lines[len(lines)-1], "most handles %d, most calls %d", &handles, &calls); err != nil {
				t.Fatalf("journal: %v in %q", err, lines)
			}
			if !test.handles && handles > 1 {
				t.Errorf("got %d handles at once", handles)
			}
			if test.all != (calls > 1) {
				t.Errorf("got %d calls at once in all", calls)
			}
			for _, line := range lines {
				var id, most int
				if n, _ := fmt.Sscanf(line, "close %d, most calls %d", &id, &most); n == 2 && !test.one && most > 1 {
					t.Errorf("handle %d: got %d calls at once", id, most)
				}
			}
		})
	}
}
