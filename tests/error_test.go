package tests

import (
	"fmt"
	"strings"
	"syscall"
	"testing"

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
