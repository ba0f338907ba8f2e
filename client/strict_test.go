package client

import (
	"errors"
	"net"
	"syscall"
	"testing"

	"nbdhost/protocol"
)

const scriptSize = 1 << 20

// TestStrict: what each kind of strictness refuses, and that the others let it go.
func TestStrict(t *testing.T) {
	writable := protocol.FlagHasFlags | protocol.FlagSendFlush | protocol.FlagSendTrim
	for _, tt := range []struct {
		name  string
		by    Strict // the one kind that refuses it
		errno syscall.Errno
		flags protocol.ExportFlags
		issue func(*Conn) (uint64, error)
	}{
		{"write", 0, 0, writable, func(c *Conn) (uint64, error) { return c.AioPwrite(make([]byte, 512), 512, 0, nil) }},
		{"write to read-only", StrictCommands, syscall.EPERM, writable | protocol.FlagReadOnly,
			func(c *Conn) (uint64, error) { return c.AioPwrite(make([]byte, 512), 0, 0, nil) }},
		{"no flush", StrictCommands, syscall.EINVAL, protocol.FlagHasFlags, func(c *Conn) (uint64, error) { return c.AioFlush(0, nil) }},
		{"no FUA", StrictCommands, syscall.EINVAL, writable,
			func(c *Conn) (uint64, error) { return c.AioTrim(512, 0, protocol.CmdFlagFUA, nil) }},
		{"no DF", StrictCommands, syscall.EINVAL, writable,
			func(c *Conn) (uint64, error) { return c.AioPread(make([]byte, 512), 0, protocol.CmdFlagDF, nil) }},
		{"no context", StrictCommands, syscall.ENOTSUP, writable,
			func(c *Conn) (uint64, error) { return c.AioBlockStatus(512, 0, 0, nil, nil) }},
		{"flush with FUA", StrictFlags, syscall.EINVAL, writable | protocol.FlagSendFUA,
			func(c *Conn) (uint64, error) { return c.AioFlush(protocol.CmdFlagFUA, nil) }},
		{"unknown flag", StrictFlags, syscall.EINVAL, writable, func(c *Conn) (uint64, error) { return c.AioTrim(512, 0, 1<<9, nil) }},
		{"read beyond the end", StrictBounds, syscall.EINVAL, writable,
			func(c *Conn) (uint64, error) { return c.AioPread(make([]byte, 512), scriptSize, 0, nil) }},
		{"write beyond the end", StrictBounds, syscall.ENOSPC, writable,
			func(c *Conn) (uint64, error) { return c.AioPwrite(make([]byte, 1024), scriptSize-512, 0, nil) }},
		{"offset that overflows", StrictBounds, syscall.EINVAL, writable,
			func(c *Conn) (uint64, error) { return c.AioTrim(512, 1<<64-512, 0, nil) }},
		{"nothing", StrictZeroSize, syscall.EINVAL, writable, func(c *Conn) (uint64, error) { return c.AioTrim(0, 0, 0, nil) }},
		{"not aligned", StrictAlign, syscall.EINVAL, writable, func(c *Conn) (uint64, error) { return c.AioTrim(512, 1, 0, nil) }},
	} {
		t.Run(tt.name, func(t *testing.T) {
			for _, strict := range []Strict{0, tt.by, StrictAll, StrictAll &^ tt.by} {
				c := &Conn{strict: strict, export: Export{Size: scriptSize, Flags: tt.flags, BlockSize: protocol.BlockSizeInfo{Minimum: 512}},
					slots: make([]*command, 16), awake: true}
				cookie, err := tt.issue(c)
				if strict&tt.by == 0 {
					if cookie != 1 || err != nil || len(c.queue) != 1 {
						t.Errorf("strict %#x: got %d, %v, want it issued", strict, cookie, err)
					}
				} else if cookie != 0 || !errors.Is(err, tt.errno) || len(c.queue) != 0 {
					t.Errorf("strict %#x: got %d, %v, want %v", strict, cookie, err, tt.errno)
				}
			}
		})
	}
}

// TestStrictSendsNothing: what is refused never reaches the server.
func TestStrictSendsNothing(t *testing.T) {
	got := make(chan protocol.Request, 1)
	nc := script(t, func(nc net.Conn) { got <- welcome(t, nc) })
	c, err := New(t.Context(), nc, &Options{Strict: StrictAll})
	if err != nil {
		t.Fatal(err)
	}
	called := false
	if cookie, err := c.AioFlush(protocol.CmdFlagFUA, func(error) int { called = true; return 1 }); cookie != 0 || !errors.Is(err, syscall.EINVAL) {
		t.Errorf("got %d, %v", cookie, err)
	}
	c.Close()
	if r := <-got; r != (protocol.Request{}) || called {
		t.Errorf("got %+v on the wire, completion called: %v", r, called)
	}
}
