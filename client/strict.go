package client

import (
	"fmt"
	"syscall"

	"nbdhost/protocol"
)

// Strict says which commands the client refuses itself instead of sending them. The
// zero value refuses none; StrictAll those that no server has to answer well.
type Strict uint

// What to refuse. The names and the error numbers are libnbd's
// (nbd_set_strict_mode(3)).
const (
	// StrictCommands refuses commands and flags that the export did not advertise.
	StrictCommands Strict = 1 << iota
	// StrictFlags refuses flags that do not belong to the command.
	StrictFlags
	// StrictBounds refuses ranges beyond the end of the export.
	StrictBounds
	// StrictZeroSize refuses commands about no bytes at all.
	StrictZeroSize
	// StrictAlign refuses ranges that are no multiples of the minimum block size.
	StrictAlign
	// StrictPayload refuses reads and writes of more than the maximum block size: a server
	// may end the connection for one.
	StrictPayload

	StrictAll = StrictCommands | StrictFlags | StrictBounds | StrictZeroSize | StrictAlign | StrictPayload
)

// strictFlags are the flags that belong to each command.
var strictFlags = map[protocol.Command]protocol.CommandFlags{
	protocol.CmdRead:        protocol.CmdFlagDF,
	protocol.CmdWrite:       protocol.CmdFlagFUA | protocol.CmdFlagPayloadLen,
	protocol.CmdTrim:        protocol.CmdFlagFUA,
	protocol.CmdWriteZeroes: protocol.CmdFlagFUA | protocol.CmdFlagNoHole | protocol.CmdFlagFastZero,
	protocol.CmdBlockStatus: protocol.CmdFlagReqOne | protocol.CmdFlagPayloadLen, // of BlockStatusOf
}

// flagNeeds are what an export must have advertised for a flag.
var flagNeeds = []struct {
	flag  protocol.CommandFlags
	needs protocol.ExportFlags
}{
	{protocol.CmdFlagFUA, protocol.FlagSendFUA},
	{protocol.CmdFlagDF, protocol.FlagSendDF},
	{protocol.CmdFlagFastZero, protocol.FlagSendFastZero},
}

// refuse says why a command must not be sent. The error wraps a syscall.Errno.
func (s Strict) refuse(c *Conn, cmd *command) error {
	r, e := &cmd.request, &c.export
	fail := func(errno syscall.Errno, format string, args ...any) error {
		return fmt.Errorf("issue %v: %s: %w", r.Type, fmt.Sprintf(format, args...), errno)
	}
	spec, known := protocol.Lookup(r.Type)
	if s == 0 || !known {
		return nil
	}
	if s&StrictFlags != 0 {
		if wrong := r.Flags &^ strictFlags[r.Type]; wrong != 0 {
			return fail(syscall.EINVAL, "got flags %v, need none outside %v", r.Flags, strictFlags[r.Type])
		}
	}
	if s&StrictCommands != 0 {
		needs := spec.Needs
		for _, n := range flagNeeds {
			if r.Flags&n.flag != 0 {
				needs |= n.needs
			}
		}
		switch {
		case spec.Writes && e.Flags&protocol.FlagReadOnly != 0:
			return fail(syscall.EPERM, "the export is read-only")
		case needs&^e.Flags != 0:
			return fail(syscall.EINVAL, "the export does not have %v", needs&^e.Flags)
		case r.Type == protocol.CmdBlockStatus && len(c.contexts) == 0:
			return fail(syscall.ENOTSUP, "no meta context was selected")
		}
	}
	if !spec.Range {
		return nil
	}
	n := cmd.asked
	if s&StrictBounds != 0 && (r.Offset > e.Size || n > e.Size-r.Offset) {
		errno := syscall.EINVAL
		if spec.Payload || r.Type == protocol.CmdWriteZeroes {
			errno = syscall.ENOSPC
		}
		return fail(errno, "got offset %d and length %d, need a range within the export's %d bytes", r.Offset, n, e.Size)
	}
	if s&StrictZeroSize != 0 && n == 0 {
		return fail(syscall.EINVAL, "got length 0, need at least 1 byte")
	}
	if most := uint64(e.BlockSize.Maximum); s&StrictPayload != 0 && (spec.Payload || spec.Data) && most > 0 && n > most {
		return fail(syscall.ERANGE, "got length %d, need at most %d", n, most)
	}
	if unit := uint64(e.BlockSize.Minimum); s&StrictAlign != 0 && unit > 1 && (r.Offset%unit != 0 || n%unit != 0) {
		return fail(syscall.EINVAL, "got offset %d and length %d, need multiples of %d", r.Offset, n, unit)
	}
	return nil
}
