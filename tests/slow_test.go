package tests

import (
	"testing"

	"nbdhost/protocol"
)

// Reads from here on wait at the gate of fixtures/block.c.
const slowFrom = 32 << 20

func startBlock(t *testing.T, args ...string) (*server, *journal, *gate) {
	t.Helper()
	dir := tempDir(t)
	j, g := newJournal(t, dir), newGate(t, dir)
	return start(t, nbdhost, dir, false, append([]string{fixture(t, "block"), "journal=DIR/journal", "gate=DIR/gate"}, args...)...), j, g
}

func readRequest(cookie, offset uint64, length int) []byte {
	r := protocol.Request{Type: protocol.CmdRead, Cookie: cookie, Offset: offset, Length: uint64(length)}
	return r.AppendTo(nil)
}

// TestSlowRequest: a request that takes long holds up no other of a parallel
// plugin, wherever it stands among many that arrive at once.
func TestSlowRequest(t *testing.T) {
	t.Parallel()
	const many = 200
	for name, test := range map[string]struct {
		slow       []int // where in the batch
		structured bool
	}{
		"alone":         {slow: []int{0}},
		"first":         {slow: []int{0}, structured: true},
		"in the middle": {slow: []int{many / 2}},
		"last":          {slow: []int{many - 1}},
		"several":       {slow: []int{0, 1, 50, 51, 52, 100, many - 1}},
		"most threads":  {slow: []int{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14}},
		"every 20th":    {slow: []int{19, 39, 59, 79, 99, 119, 139, 159, 179, 199}, structured: true},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s, j, g := startBlock(t)
			c := s.hello(test.structured)
			n := many
			if name == "alone" {
				n = 1
			}
			slow := map[uint64]bool{}
			for _, i := range test.slow {
				slow[uint64(i)] = true
			}
			var batch []byte
			for cookie := range uint64(n) {
				offset := cookie * 512
				if slow[cookie] {
					offset += slowFrom
				}
				c.reads[cookie] = 512
				batch = append(batch, readRequest(cookie, offset, 512)...)
			}
			c.write(batch)
			for range n - len(slow) {
				if r := c.next(); slow[r.cookie] || r.errno != 0 || len(r.data) != 512 {
					t.Fatalf("reply beside a slow request: got %v", r)
				}
			}
			j.wait("slow 1", len(slow))

			// More that come later, one by one and of every size.
			for i, length := range []int{1, 4096, 64 << 10, 1 << 20, 16 << 20} {
				cookie := uint64(1000 + i)
				c.read(cookie, 0, length)
				if r := c.want(cookie, 0); len(r.data) != length {
					t.Errorf("read of %d: got %v", length, r)
				}
				c.pwrite(cookie, 0, make([]byte, length)...)
				c.want(cookie, 0)
			}
			other := s.hello(false)
			other.read(1, 0, 512)
			other.want(1, 0)
			other.disc()

			g.open(len(slow))
			for range slow {
				if r := c.next(); !slow[r.cookie] || r.errno != 0 || len(r.data) != 512 || r.data[0] != 0x5a {
					t.Fatalf("reply to a slow request: got %v", r)
				}
			}
			c.disc()
			c.wantEOF()
			s.stop()
		})
	}
}

// TestManySlowRequests: more slow requests than threads all get their turn.
func TestManySlowRequests(t *testing.T) {
	t.Parallel()
	for _, threads := range []string{"1", "4", "16"} {
		t.Run("threads "+threads, func(t *testing.T) {
			t.Parallel()
			s, _, g := startBlock(t, "-t", threads)
			c := s.hello(false)
			const n = 50
			for cookie := range uint64(n) {
				c.read(cookie, slowFrom, 512)
			}
			seen := map[uint64]bool{}
			for range n {
				g.open(1)
				r := c.next()
				if seen[r.cookie] || r.errno != 0 {
					t.Fatalf("reply: got %v", r)
				}
				seen[r.cookie] = true
			}
			c.disc()
			c.wantEOF()
			s.stop()
		})
	}
}

// TestHangUpInFlight: a client that goes away leaves its calls to finish, and
// .close waits for them.
func TestHangUpInFlight(t *testing.T) {
	t.Parallel()
	s, j, g := startBlock(t)
	c := s.hello(false)
	for cookie := range uint64(5) {
		c.read(cookie, slowFrom, 512)
	}
	j.wait("slow 1", 5)
	c.Close()
	other := s.hello(false)
	other.read(1, 0, 512)
	other.want(1, 0)
	g.open(5)
	j.wait("close 1", 1)
	other.disc()
	other.wantEOF()
	j.wait("close 2", 1)
	s.stop()
	lines := j.all()
	if lines[len(lines)-1] != "close 2" || count(lines, "released 1") != 5 {
		t.Errorf("journal: got %q", lines)
	}
	for i, line := range lines {
		if line == "close 1" && count(lines[:i], "released 1") != 5 {
			t.Errorf("closed before its calls returned: %q", lines)
		}
	}
}
