package tests

import (
	"fmt"
	"math"
	"os"
	"slices"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"nbdhost/protocol"
)

// block is the offset at which fixtures/errors.c fails with this number.
func block(number int) uint64 { return uint64(number) * 512 }

// everyError sends requests of each kind that fail with each error number, and
// returns what the wire says of each.
func everyError(structured bool) func(*testing.T, *server) string {
	return func(t *testing.T, s *server) string {
		c := s.hello(structured)
		var all strings.Builder
		cookie := uint64(0)
		ask := func(r protocol.Request, payload ...byte) {
			cookie++
			r.Cookie = cookie
			c.send(r, payload...)
			got := c.next()
			if got.cookie != cookie {
				t.Fatalf("reply: got %v, want cookie %d", got, cookie)
			}
			fmt.Fprintf(&all, "%v %v at %d: %v\n", r.Type, r.Flags, r.Offset/512, got.errno)
		}
		for number := range 134 {
			at := block(number)
			ask(protocol.Request{Type: protocol.CmdRead, Offset: at, Length: 512})
			ask(protocol.Request{Type: protocol.CmdWrite, Offset: at, Length: 1}, 'x')
			ask(protocol.Request{Type: protocol.CmdTrim, Offset: at, Length: 512})
			ask(protocol.Request{Type: protocol.CmdCache, Offset: at, Length: 512})
			// nbdkit aborts where the write that stands in for it fails so, too.
			if number != int(syscall.EOPNOTSUPP) {
				ask(protocol.Request{Type: protocol.CmdWriteZeroes, Offset: at, Length: 512})
			}
			ask(protocol.Request{Type: protocol.CmdWriteZeroes, Offset: at, Length: 512, Flags: protocol.CmdFlagFastZero})
			if structured {
				ask(protocol.Request{Type: protocol.CmdBlockStatus, Offset: at, Length: 512})
				ask(protocol.Request{Type: protocol.CmdRead, Offset: at, Length: 512, Flags: protocol.CmdFlagDF})
			}
		}
		ask(protocol.Request{Type: protocol.CmdFlush})
		c.disc()
		c.wantEOF()
		return all.String()
	}
}

// TestErrorNumbers: the plugin's error number reaches the client as nbdkit lets
// it, however the plugin says it.
func TestErrorNumbers(t *testing.T) {
	t.Parallel()
	for _, how := range []string{"set", "errno", "both", "none"} {
		for _, preserved := range []string{"-DPRESERVED=0", "-DPRESERVED=1"} {
			for _, structured := range []bool{false, true} {
				t.Run(fmt.Sprint(how, preserved, structured), func(t *testing.T) {
					t.Parallel()
					compare(t, scenario{
						args:   []string{fixture(t, "errors", preserved), "how=" + how},
						client: everyError(structured),
					})
				})
			}
		}
	}
}

// TestNoMemory: a request for which there is no memory fails, and those after it are served.
func TestNoMemory(t *testing.T) {
	t.Parallel()
	if raceEnabled || asanEnabled {
		t.Skip("the server's own memory is limited, and the detector needs it")
	}
	const size = protocol.MaxRequestLength
	payload := make([]byte, size)
	compare(t, scenario{
		args: []string{"-t", "1", "null", "128M"}, // nbdkit ends where it has no memory for its threads
		client: func(t *testing.T, s *server) string {
			c := s.hello(false)
			c.pwrite(1, 0, payload[:4096]...)
			c.want(1, 0)
			s.limitMemory(size / 2)
			var all strings.Builder
			ask := func(cookie uint64) {
				got := c.next()
				fmt.Fprintf(&all, "%d: got %v for %d\n", cookie, got.errno, got.cookie)
			}
			c.pwrite(2, 0, payload...)
			ask(2)
			c.read(3, 0, size)
			ask(3)
			c.pwrite(4, 0, payload[:4096]...)
			ask(4)
			c.disc()
			c.wantEOF()
			if told := strings.Count(strings.ToLower(s.stderr()), "cannot allocate memory"); told != 2 {
				t.Errorf("%s spoke %d times of a lack of memory, need 2:\n%s", s.program, told, s.stderr())
			}
			return all.String()
		},
	})
}

// limitMemory makes n bytes the most that the server can have besides those it has.
func (s *server) limitMemory(n uint64) {
	s.t.Helper()
	var pages uint64
	statm, err := os.ReadFile(fmt.Sprintf("/proc/%d/statm", s.pid))
	if err == nil {
		_, err = fmt.Sscan(string(statm), &pages)
	}
	if err != nil {
		s.t.Fatal(err)
	}
	most := pages*uint64(os.Getpagesize()) + n
	if err := unix.Prlimit(s.pid, unix.RLIMIT_AS, &unix.Rlimit{Cur: most, Max: most}, nil); err != nil {
		s.t.Fatal(err)
	}
}

// TestErrorText: a structured error carries the call's last nbdkit_error, and
// that of no other call.
func TestErrorText(t *testing.T) {
	t.Parallel()
	onlyNbdhost(t)
	s := startHost(t, fixture(t, "errors"))
	c := s.hello(true)
	for cookie := range uint64(3) {
		number := 28 + int(cookie)
		for _, r := range []protocol.Request{
			{Type: protocol.CmdRead, Length: 512},
			{Type: protocol.CmdTrim, Length: 512},
			{Type: protocol.CmdBlockStatus, Length: 512},
		} {
			r.Cookie, r.Offset = cookie, block(number)
			c.send(r)
			if got, want := c.next().msg, fmt.Sprintf("error %d, as asked", number); got != want {
				t.Errorf("%v: got %q, want %q", r.Type, got, want)
			}
			r.Offset = 0
			c.send(r)
			if got := c.next(); got.errno != 0 {
				t.Errorf("%v after an error: got %v", r.Type, got)
			}
		}
	}
	// Refused by the server itself: a text too, and not an old one.
	c.read(9, c.size, 1)
	if got := c.want(9, protocol.EINVAL).msg; got == "" || strings.Contains(got, "as asked") {
		t.Errorf("read out of range: got text %q", got)
	}
	c.disc()
	c.wantEOF()
	s.stop()
}

// TestNegativeReturns: what is negative, but not -1, is no success, whatever nbdkit makes
// of it, and somebody is told why. The plugin says nothing.
func TestNegativeReturns(t *testing.T) {
	t.Parallel()
	onlyNbdhost(t)
	said := func(t *testing.T, log, callback string, value int64) {
		t.Helper()
		line := fmt.Sprintf("error: trace: %s returned %d: need at least 0, or -1 for a failure\n", callback, value)
		if !strings.Contains(log, line) {
			t.Errorf("got\n%s\nwant %s", log, line)
		}
	}
	for _, callback := range []string{"config_complete", "thread_model", "get_ready", "after_fork"} {
		t.Run(callback, func(t *testing.T) {
			t.Parallel()
			_, err := tryStart(t, nbdhost, tempDir(t), false, fixture(t, "trace"), "fail="+callback, "returns=-5")
			if err == nil {
				t.Fatal("it serves")
			}
			said(t, err.Error(), callback, -5)
		})
	}
	for _, callback := range failing {
		if slices.Contains([]string{"open", "default_export", "export_description"}, callback) {
			continue // they return pointers
		}
		for _, value := range []int64{-2, math.MinInt32} {
			t.Run(fmt.Sprint(callback, value), func(t *testing.T) {
				t.Parallel()
				s := startHost(t, fixture(t, "trace"), "fail="+callback, fmt.Sprint("returns=", value))
				nbdinfo, err := try(t, "nbdinfo", "--list", s.uri(""))
				if callback == "list_exports" && err == nil {
					t.Errorf("the list of exports: got %s", nbdinfo)
				}
				out, err := try(t, "/usr/bin/nbdsh", "-c", "h.add_meta_context('base:allocation')", "-u", s.uri(""), "-c", `
for call in (lambda: h.pread(512, 0), lambda: h.pwrite(b'x' * 512, 0), lambda: h.flush(), lambda: h.trim(512, 0),
             lambda: h.zero(512, 0), lambda: h.cache(512, 0), lambda: h.block_status(512, 0, lambda *args: 0)):
    try:
        call()
    except nbd.Error as e:
        print(e.errno)
`)
				switch callback {
				case "pread", "pwrite", "flush", "trim", "zero", "cache", "extents":
					if err != nil || out != "EIO\n" {
						t.Errorf("got %q, %v, want one EIO", out, err)
					}
				case "list_exports":
				default:
					if err == nil {
						t.Error("the client is served")
					}
				}
				said(t, s.stderr(), callback, value)
				s.stop()
			})
		}
	}
}

// TestNegativeSize: no client is served a disk of negative size, and the log has it.
func TestNegativeSize(t *testing.T) {
	t.Parallel()
	for _, value := range []int64{-5, math.MinInt64} {
		t.Run(fmt.Sprint(value), func(t *testing.T) {
			t.Parallel()
			compare(t, scenario{
				args: []string{fixture(t, "trace"), "fail=get_size", fmt.Sprint("returns=", value)},
				client: func(t *testing.T, s *server) string {
					out, err := try(t, "nbdinfo", "--size", s.uri(""))
					return fmt.Sprint(out, err != nil, strings.Count(s.stderr(), fmt.Sprint(value)))
				},
			})
		})
	}
}

// TestExtentTypes: bits of an extent's type that clients do not know stay here.
func TestExtentTypes(t *testing.T) {
	t.Parallel()
	for _, more := range []string{"4", "7", "0xfffffffc", "0xffffffff"} {
		t.Run(more, func(t *testing.T) {
			t.Parallel()
			compare(t, scenario{
				args:   []string{fixture(t, "trace"), "type=" + more},
				client: func(t *testing.T, s *server) string { return command(t, "nbdinfo", "--map", s.uri("")) },
			})
		})
	}
}
