package client

import (
	"errors"
	"fmt"
	"math"
	"syscall"
	"testing"

	"nbdhost/protocol"
)

// roundTrip issues any request whatsoever and gives the error of its reply.
func (c *Conn) roundTrip(r protocol.Request, data []byte) (protocol.Errno, error) {
	err := c.wait(func(done Completion) (uint64, error) {
		return c.issue(command{request: r, data: data, completion: done})
	})
	var refused *Error
	if errors.As(err, &refused) {
		return refused.Errno, nil
	}
	return 0, err
}

// TestValidateAgreesWithNbdkit sends what protocol.Negotiated.Validate accepts
// and refuses to nbdkit, and compares the errors that come back.
func TestValidateAgreesWithNbdkit(t *testing.T) {
	const size = 1 << 20
	// All that can zero can do so fast: without that, nbdkit ends with a failed
	// assertion when it gets NBD_CMD_FLAG_FAST_ZERO.
	servers := []struct {
		name string
		args []string
	}{
		{"memory", []string{"memory", "1M"}},
		{"read-only", []string{"-r", "memory", "1M"}},
		{"only read, write and zero", []string{"eval", "get_size=echo 1M", "pread=head -c $3 /dev/zero", "pwrite=cat >/dev/null", "can_write=exit 0", "zero=exit 0", "can_zero=exit 0", "can_fast_zero=exit 0"}},
		{"no FUA", []string{"eval", "get_size=echo 1M", "pread=head -c $3 /dev/zero", "pwrite=cat >/dev/null", "can_write=exit 0", "flush=exit 0", "can_flush=exit 0", "can_fua=echo none", "zero=exit 0", "can_zero=exit 0", "can_fast_zero=exit 0", "trim=exit 0", "can_trim=exit 0"}},
	}
	clients := []struct {
		name string
		opts Options
	}{
		{"simple", Options{SimpleReplies: true}},
		{"structured", Options{MetaContexts: []string{}}},
		{"contexts", Options{}},
	}
	ranges := []struct{ offset, length uint64 }{
		{0, 0}, {0, 512}, {1, 1}, {size, 0}, {size, 1}, {size - 512, 512}, {size - 512, 513},
		{0, size}, {0, size + 1}, {1 << 63, 1}, {math.MaxUint64, 1}, {math.MaxUint64 - 511, 513},
	}
	flags := []protocol.CommandFlags{0, 1, 2, 4, 8, 16, 32, 64, 1 << 15, 3, 1 | 16, 2 | 16}
	for _, server := range servers {
		t.Run(server.name, func(t *testing.T) {
			uri := nbdkit(t, server.args...)
			for _, client := range clients {
				c := connect(t, uri, &client.opts)
				n := protocol.Negotiated{Size: c.Size(), Flags: c.Flags(), StructuredReplies: c.Structured(), MetaContexts: len(c.contexts) > 0}
				if n.Size != size {
					t.Fatalf("got size %d, need %d", n.Size, size)
				}
				for cmd := protocol.CmdRead; cmd <= protocol.CmdBlockStatus+2; cmd++ {
					if cmd == protocol.CmdDisc {
						continue
					}
					for _, f := range flags {
						for _, rg := range ranges {
							r := protocol.Request{Type: cmd, Flags: f, Offset: rg.offset, Length: rg.length}
							compare(t, c, &n, r, client.name)
						}
					}
				}
			}
		})
	}
}

// TestValidateLongAgreesWithNbdkit is the same around MaxRequestLength.
func TestValidateLongAgreesWithNbdkit(t *testing.T) {
	c := connect(t, nbdkit(t, "null", "1T"), nil)
	n := protocol.Negotiated{Size: c.Size(), Flags: c.Flags(), StructuredReplies: true, MetaContexts: true}
	for cmd := protocol.CmdRead; cmd <= protocol.CmdBlockStatus; cmd++ {
		if cmd == protocol.CmdDisc {
			continue
		}
		lengths := []uint64{protocol.MaxRequestLength, protocol.MaxRequestLength + 1}
		if cmd != protocol.CmdRead && cmd != protocol.CmdWrite {
			// Not 1<<32-1: nbdkit ends with a failed assertion on that status.
			lengths = append(lengths, 1<<31)
		}
		for _, length := range lengths {
			compare(t, c, &n, protocol.Request{Type: cmd, Length: length}, "long")
		}
	}
}

func compare(t *testing.T, c *Conn, n *protocol.Negotiated, r protocol.Request, what string) {
	t.Helper()
	var data []byte
	if r.Type == protocol.CmdRead || r.Type == protocol.CmdWrite {
		data = make([]byte, r.Length)
	}
	got, err := c.roundTrip(r, data)
	if err != nil {
		t.Fatalf("%s: %+v: %v", what, r, err)
	}
	refusal := n.Validate(&r)
	if want := protocol.ErrnoOf(refusal); got != want {
		t.Errorf("%s: type %v flags %v offset %d length %d with %v: nbdkit says %v, Validate %v (%v)", what, r.Type, r.Flags, r.Offset, r.Length, n.Flags, got, want, refusal)
	}
}

// TestErrnoAgreesWithNbdkit has a plugin fail with each of Linux's error numbers.
func TestErrnoAgreesWithNbdkit(t *testing.T) {
	c := connect(t, nbdkit(t, fixture(t, "errors.c")), nil)
	requests := []struct {
		cmd   protocol.Command
		flags protocol.CommandFlags
	}{
		{protocol.CmdRead, 0},
		{protocol.CmdRead, protocol.CmdFlagDF},
		{protocol.CmdWrite, 0},
		{protocol.CmdWrite, protocol.CmdFlagFUA},
		{protocol.CmdTrim, 0},
		{protocol.CmdCache, 0},
		{protocol.CmdWriteZeroes, 0},
		{protocol.CmdWriteZeroes, protocol.CmdFlagFastZero},
	}
	for _, q := range requests {
		t.Run(fmt.Sprint(q.cmd, " ", q.flags), func(t *testing.T) {
			for errno := syscall.Errno(1); errno <= 133; errno++ {
				if errno == syscall.ENOTSUP && q.cmd == protocol.CmdWriteZeroes && q.flags == 0 {
					continue // nbdkit ends with a failed assertion
				}
				r := protocol.Request{Type: q.cmd, Flags: q.flags, Offset: uint64(errno) * 512, Length: 512}
				got, err := c.roundTrip(r, make([]byte, 512))
				if err != nil {
					t.Fatal(err)
				}
				if want := protocol.ErrnoFor(fmt.Errorf("read: %w", errno), q.flags); got != want {
					t.Errorf("%v (%d): nbdkit says %v, ErrnoFor %v", errno, errno, got, want)
				}
			}
		})
	}
}
