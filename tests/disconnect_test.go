package tests

import (
	"net"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"nbdhost/protocol"
)

// Offsets that mean something to fixtures/disconnect.c.
const (
	offSoft         = 0x1000
	offForce        = 0x2000
	offShutdown     = 0x3000
	offSlow         = 0x4000
	offForceAndFail = 0x5000
	offSoftThenSlow = 0x6000
)

func startDisconnect(t *testing.T, args ...string) (*server, *journal, *gate) {
	t.Helper()
	if underTest() == "nbdkit" {
		t.Skip("the installed nbdkit has no nbdkit_disconnect")
	}
	dir := tempDir(t)
	j, g := newJournal(t, dir), newGate(t, dir)
	s := start(t, nbdhost, dir, false, append([]string{fixture(t, "disconnect"), "journal=DIR/journal", "gate=DIR/gate"}, args...)...)
	return s, j, g
}

// ended wants the journal to end as a clean stop does.
func ended(t *testing.T, j *journal) {
	t.Helper()
	lines := j.all()
	paired(t, lines)
	if n := len(lines); n < 2 || lines[n-2] != "cleanup" || lines[n-1] != "unload" {
		t.Errorf("journal: got %q, want cleanup and unload at its end", lines)
	}
}

// nextOf wants the journal's next line about handle id, after the last line that
// has the given one, to be want.
func nextOf(t *testing.T, lines []string, after, want string) {
	t.Helper()
	i := len(lines) - 1
	for i >= 0 && lines[i] != after { // the last one: there may be several
		i--
	}
	id := strings.Fields(after)[1]
	for _, line := range lines[i+1:] {
		if f := strings.Fields(line); len(f) > 1 && f[1] == id {
			if line != want {
				t.Errorf("callback after %q: got %q, want %q", after, line, want)
			}
			return
		}
	}
	t.Errorf("callback after %q: got none, want %q", after, want)
}

// TestSoftDisconnect: what is in flight is answered, the command that asked for
// it too; what comes later fails with ESHUTDOWN.
func TestSoftDisconnect(t *testing.T) {
	t.Parallel()
	s, j, g := startDisconnect(t)
	other := s.hello(false)
	c := s.hello(false)

	c.read(1, offSlow, 512)
	j.wait("pread 2", 1)
	c.pwrite(2, offSoft, 'x')
	c.want(2, 0)

	c.read(3, 0, 512)
	c.want(3, protocol.ESHUTDOWN)
	c.pwrite(4, 0, make([]byte, 4096)...)
	c.want(4, protocol.ESHUTDOWN)
	c.send(protocol.Request{Type: protocol.CmdFlush, Cookie: 5})
	c.want(5, protocol.ESHUTDOWN)
	// Even what is wrong in itself: it is not looked at.
	c.read(6, 1<<40, 1)
	if r := c.next(); r.cookie != 6 || r.errno == 0 {
		t.Errorf("read out of range: got %v", r)
	}

	other.read(1, 0, 512)
	other.want(1, 0)

	g.open(1)
	if r := c.want(1, 0); len(r.data) != 512 || r.data[511] != 0x5a {
		t.Errorf("read in flight: got %x", r.data)
	}
	c.disc()
	c.wantEOF()
	j.wait("close 2", 1)

	other.read(2, 0, 512)
	other.want(2, 0)
	again := s.hello(false)
	again.pwrite(1, 0, 'x')
	again.want(1, 0)
	for _, c := range []*raw{again, other} {
		c.disc()
		c.wantEOF()
	}
	s.stop()
	nextOf(t, j.all(), "pread 2 done", "close 2")
	ended(t, j)
}

// TestSoftDisconnectItself: the command that called nbdkit_disconnect(0) is in
// flight itself for as long as it takes.
func TestSoftDisconnectItself(t *testing.T) {
	t.Parallel()
	s, j, g := startDisconnect(t)
	c := s.hello(true)
	c.pwrite(1, offSoftThenSlow, 'x')
	j.wait("disconnected 1", 1)
	c.read(2, 0, 512)
	c.want(2, protocol.ESHUTDOWN)
	g.open(1)
	c.want(1, 0)
	c.disc()
	c.wantEOF()
	j.wait("close 1", 1)
	s.stop()
	nextOf(t, j.all(), "pwrite 1 done", "close 1")
	ended(t, j)
}

// TestSoftDisconnectHangUp: the client need not say NBD_CMD_DISC.
func TestSoftDisconnectHangUp(t *testing.T) {
	t.Parallel()
	s, j, _ := startDisconnect(t)
	c := s.hello(false)
	c.pwrite(1, offSoft, 'x')
	c.want(1, 0)
	c.Close()
	j.wait("close 1", 1)
	s.stop()
	ended(t, j)
}

// TestForcedDisconnect: nothing is answered, neither the command that asked for
// it nor what is in flight, and .close waits for what is in the plugin.
func TestForcedDisconnect(t *testing.T) {
	t.Parallel()
	for name, offset := range map[string]uint64{"succeeds": offForce, "fails": offForceAndFail} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s, j, g := startDisconnect(t)
			other := s.hello(false)
			c := s.hello(true)
			c.read(1, offSlow, 512)
			j.wait("pread 2", 1)
			c.pwrite(2, offset, 'x')
			c.wantEOF() // while the read is in the plugin still

			other.read(1, 0, 512)
			other.want(1, 0)
			again := s.hello(false)
			again.read(1, 0, 512)
			again.want(1, 0)
			if slices.Contains(j.sofar(), "close 2") {
				t.Error("the handle is closed although a call is in flight")
			}

			g.open(1)
			j.wait("close 2", 1)
			other.read(2, 0, 512)
			other.want(2, 0)
			for _, c := range []*raw{again, other} {
				c.disc()
				c.wantEOF()
			}
			s.stop()
			nextOf(t, j.all(), "pread 2 done", "close 2")
			ended(t, j)
		})
	}
}

// TestForcedDisconnectBatch: commands that arrived together with the one that
// disconnects are not answered either, however many came before it.
func TestForcedDisconnectBatch(t *testing.T) {
	t.Parallel()
	s, j, _ := startDisconnect(t, "-t", "1")
	c := s.hello(false)
	var batch []byte
	w := protocol.Request{Type: protocol.CmdWrite, Cookie: 1, Offset: offForce, Length: 1}
	batch = append(w.AppendTo(batch), 'x')
	for cookie := range uint64(100) {
		r := protocol.Request{Type: protocol.CmdRead, Cookie: 2 + cookie, Length: 512}
		batch = r.AppendTo(batch)
	}
	c.write(batch)
	c.wantEOF()
	j.wait("close 1", 1)
	s.stop()
	ended(t, j)
	nextOf(t, j.lines, "pwrite 1 done", "close 1")
}

// TestDisconnectOutside: where there is no connection, nothing happens but a
// debug message.
func TestDisconnectOutside(t *testing.T) {
	t.Parallel()
	s, j, _ := startDisconnect(t, "outside=1", "-v")
	j.wait("disconnected nothing", 1)
	c := s.hello(false)
	c.read(1, 0, 512)
	c.want(1, 0)
	c.disc()
	c.wantEOF()
	s.stop()
	ended(t, j)
	for line := range strings.Lines(s.stderr()) {
		if strings.Contains(line, "disconnect") && strings.Contains(line, "error:") {
			t.Errorf("got %q, want no more than a debug message", line)
		}
	}
	if !strings.Contains(s.stderr(), "debug: disconnect: ignored outside a connection") {
		t.Errorf("standard error: want a debug message that nothing was disconnected, got\n%s", s.stderr())
	}
}

// stopping are the ways to ask a server to stop.
var stopping = map[string]func(t *testing.T, s *server, c *raw){
	"nbdkit_shutdown": func(t *testing.T, s *server, c *raw) {
		c.pwrite(99, offShutdown, 'x')
		c.want(99, 0)
	},
	"SIGTERM": func(t *testing.T, s *server, c *raw) { s.signal(syscall.SIGTERM) },
	"SIGINT":  func(t *testing.T, s *server, c *raw) { s.signal(syscall.SIGINT) },
}

// TestShutdown: what is in flight finishes and is answered, new commands fail
// with ESHUTDOWN, no connection is accepted, the handles are closed, and the
// plugin is cleaned up and unloaded.
func TestShutdown(t *testing.T) {
	t.Parallel()
	for name, stop := range stopping {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s, j, g := startDisconnect(t)
			other := s.hello(true)
			c := s.hello(true)
			c.read(1, offSlow, 512)
			j.wait("pread 2", 1)
			stop(t, s, c)

			// The signal takes its time, so ask until the answer changes.
			for cookie := uint64(100); ; cookie++ {
				c.read(cookie, 0, 512)
				if r := c.next(); r.errno == protocol.ESHUTDOWN {
					break
				} else if r.errno != 0 || r.cookie != cookie {
					t.Fatalf("read during shutdown: got %v", r)
				}
			}
			if conn, err := net.Dial(s.network, s.address); err == nil {
				// One that the kernel took is hung up on.
				conn.SetDeadline(time.Now().Add(patience))
				b := make([]byte, 1)
				if n, err := conn.Read(b); n > 0 || !closed(err) {
					t.Errorf("new connection during shutdown: got %x, %v", b[:n], err)
				}
				conn.Close()
			}

			g.open(1)
			if r := c.want(1, 0); len(r.data) != 512 {
				t.Errorf("read in flight: got %v", r)
			}
			c.disc()
			other.disc()
			s.wait()
			ended(t, j)
			nextOf(t, j.lines, "pread 2 done", "close 2")
			if j.lines[len(j.lines)-2] != "cleanup" {
				t.Errorf("journal: %q", j.lines)
			}
		})
	}
}

// TestShutdownIdle: clients that say nothing do not keep the server, in the
// handshake or after it.
func TestShutdownIdle(t *testing.T) {
	t.Parallel()
	for name, stop := range stopping {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s, j, _ := startDisconnect(t)
			s.hello(false)
			s.hello(true)
			greeted := s.raw()
			greeted.take(protocol.GreetingSize)
			half := s.hello(false)
			half.write(make([]byte, 3)) // part of a header
			stop(t, s, s.hello(false))
			s.wait()
			ended(t, j)
		})
	}
}

// TestShutdownDeaf: nor does a client that does not read its replies.
func TestShutdownDeaf(t *testing.T) {
	t.Parallel()
	s, j, _ := startDisconnect(t)
	c := s.hello(false)
	for cookie := range uint64(64) {
		c.read(cookie, 0, 1<<20)
	}
	j.wait("pread 1 done", 1)
	s.signal(syscall.SIGTERM)
	s.wait()
	ended(t, j)
}

// TestStopWithoutClients: both signals stop an idle server, as they stop nbdkit.
func TestStopWithoutClients(t *testing.T) {
	t.Parallel()
	for _, program := range []string{nbdkit, nbdhost} {
		for _, sig := range []syscall.Signal{syscall.SIGINT, syscall.SIGTERM} {
			s := start(t, program, tempDir(t), false, "memory", "1M")
			s.signal(sig)
			s.wait()
		}
	}
}
