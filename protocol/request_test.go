package protocol

import (
	"errors"
	"math"
	"strings"
	"testing"
)

// What nbdkit answers to each compact request is compared in package client.
func TestValidate(t *testing.T) {
	const all = FlagHasFlags | FlagSendFlush | FlagSendFUA | FlagSendTrim | FlagSendWriteZeroes | FlagSendDF | FlagSendCache | FlagSendFastZero
	plain := Negotiated{Size: 1 << 40, Flags: all, StructuredReplies: true, MetaContexts: true}
	simple := Negotiated{Size: 1 << 40, Flags: all}
	ext := plain
	ext.ExtendedHeaders = true
	readOnly := plain
	readOnly.Flags |= FlagReadOnly
	query := ext
	query.Flags |= FlagBlockStatusPayload
	blocks := ext
	blocks.Size = 4096 + 100
	blocks.StrictBlockSize = true
	blocks.BlockSize = BlockSizeInfo{Minimum: 512, Preferred: 4096, Maximum: 2048}
	bare := Negotiated{Size: 1 << 40, Flags: FlagHasFlags, StructuredReplies: true}
	tests := []struct {
		name string
		n    Negotiated
		r    Request
		want Errno
		says string // in the error's text
	}{
		{"read", plain, Request{Type: CmdRead, Length: 1}, 0, ""},
		{"read to the end", plain, Request{Type: CmdRead, Offset: 1<<40 - 1, Length: 1}, 0, ""},
		{"read past the end", plain, Request{Type: CmdRead, Offset: 1<<40 - 1, Length: 2}, EINVAL, "offset 1099511627775 and length 2"},
		{"read at the end", plain, Request{Type: CmdRead, Offset: 1 << 40, Length: 1}, EINVAL, "within the export's 1099511627776"},
		{"offset beyond all", plain, Request{Type: CmdRead, Offset: math.MaxUint64, Length: 2}, EINVAL, ""},
		{"read nothing", plain, Request{Type: CmdRead}, EINVAL, "length 0"},
		{"write past the end", plain, Request{Type: CmdWrite, Offset: 1 << 40, Length: 1}, ENOSPC, ""},
		{"zero past the end", plain, Request{Type: CmdWriteZeroes, Offset: 1 << 40, Length: 1}, ENOSPC, ""},
		{"trim past the end", plain, Request{Type: CmdTrim, Offset: 1 << 40, Length: 1}, EINVAL, ""},
		{"longest read", plain, Request{Type: CmdRead, Length: MaxRequestLength}, 0, ""},
		{"too long a read", plain, Request{Type: CmdRead, Length: MaxRequestLength + 1}, ENOMEM, "67108865, need at most 67108864"},
		{"too long a write", plain, Request{Type: CmdWrite, Length: MaxRequestLength + 1}, ENOMEM, ""},
		{"long zero", plain, Request{Type: CmdWriteZeroes, Length: math.MaxUint32}, 0, ""},
		{"read-only before all else", readOnly, Request{Type: CmdWrite, Flags: 1 << 15, Length: 0}, EPERM, "read-only"},
		{"flush", plain, Request{Type: CmdFlush}, 0, ""},
		{"flush of a range", plain, Request{Type: CmdFlush, Length: 1}, EINVAL, "need 0 and 0"},
		{"flush that is not there", bare, Request{Type: CmdFlush}, EINVAL, "NBD_FLAG_SEND_FLUSH"},
		{"trim that is not there", bare, Request{Type: CmdTrim, Length: 1}, EINVAL, "NBD_FLAG_SEND_TRIM"},
		{"status without a context", bare, Request{Type: CmdBlockStatus, Length: 1}, EINVAL, "meta context"},
		{"FUA that is not there", bare, Request{Type: CmdWrite, Flags: CmdFlagFUA, Length: 1}, EINVAL, "got flags NBD_CMD_FLAG_FUA"},
		{"FUA on a read", plain, Request{Type: CmdRead, Flags: CmdFlagFUA, Length: 1}, 0, ""},
		{"DF", plain, Request{Type: CmdRead, Flags: CmdFlagDF, Length: 1}, 0, ""},
		{"DF with simple replies", simple, Request{Type: CmdRead, Flags: CmdFlagDF, Length: 1}, EINVAL, "NBD_CMD_FLAG_DF"},
		{"NO_HOLE on a write", plain, Request{Type: CmdWrite, Flags: CmdFlagNoHole, Length: 1}, EINVAL, "NBD_CMD_FLAG_NO_HOLE"},
		{"fast zero", plain, Request{Type: CmdWriteZeroes, Flags: CmdFlagFastZero, Length: 1}, 0, ""},
		{"fast zero that is not there", Negotiated{Size: 1, Flags: FlagHasFlags | FlagSendWriteZeroes}, Request{Type: CmdWriteZeroes, Flags: CmdFlagFastZero, Length: 1}, EINVAL, "NBD_CMD_FLAG_FAST_ZERO"},
		{"unknown command", plain, Request{Type: 8}, EINVAL, "command 8"},
		{"disconnect, whatever it says", plain, Request{Type: CmdDisc, Flags: 1, Offset: 1, Length: 1}, 0, ""},
		{"payload flag with compact headers", plain, Request{Type: CmdWrite, Flags: CmdFlagPayloadLen, Length: 1}, EINVAL, ""},
		{"payload flag", ext, Request{Type: CmdWrite, Flags: CmdFlagPayloadLen, Length: 1}, 0, ""},
		{"no payload flag with extended headers", ext, Request{Type: CmdWrite, Length: 1}, EINVAL, "need NBD_CMD_FLAG_PAYLOAD_LEN"},
		{"payload flag on a read", ext, Request{Type: CmdRead, Flags: CmdFlagPayloadLen, Length: 1}, EINVAL, ""},
		{"payload flag on a status", ext, Request{Type: CmdBlockStatus, Flags: CmdFlagPayloadLen, Length: 8}, EINVAL, ""},
		{"payload of a trim on a read-only export", readOnly, Request{Type: CmdTrim, Flags: CmdFlagPayloadLen, Length: 1}, EPERM, ""},
		{"payload flag on zeroes past the end", ext, Request{Type: CmdWriteZeroes, Flags: CmdFlagPayloadLen, Length: 1 << 50}, EINVAL, "need no payload"},
		{"status of a context", query, Request{Type: CmdBlockStatus, Flags: CmdFlagPayloadLen, Length: 12}, 0, ""},
		{"status of no context", query, Request{Type: CmdBlockStatus, Flags: CmdFlagPayloadLen, Length: 8}, EINVAL, "need 12 to"},
		{"status of too many contexts", query, Request{Type: CmdBlockStatus, Flags: CmdFlagPayloadLen, Length: MaxBlockStatusRequest + 1}, EINVAL, ""},
		{"status of all contexts", query, Request{Type: CmdBlockStatus, Length: 1 << 40}, 0, ""},
		{"a block", blocks, Request{Type: CmdRead, Offset: 512, Length: 512}, 0, ""},
		{"part of a block", blocks, Request{Type: CmdRead, Offset: 512, Length: 100}, EINVAL, "multiples of the minimum block size 512"},
		{"off a block", blocks, Request{Type: CmdTrim, Offset: 100, Length: 512}, EINVAL, "minimum block size"},
		{"write off a block", blocks, Request{Type: CmdWrite, Flags: CmdFlagPayloadLen, Offset: 1, Length: 512}, EINVAL, "minimum block size"},
		{"the end that is no block", blocks, Request{Type: CmdRead, Offset: 4096, Length: 100}, 0, ""},
		{"more than the largest block", blocks, Request{Type: CmdRead, Length: 2560}, EINVAL, "maximum block size 2048"},
		{"zero of more than the largest block", blocks, Request{Type: CmdWriteZeroes, Length: 4096}, 0, ""},
		{"64-bit sum that wraps", ext, Request{Type: CmdTrim, Offset: 1, Length: math.MaxUint64}, EINVAL, ""},
		{"64-bit trim", ext, Request{Type: CmdTrim, Length: 1 << 40}, 0, ""},
	}
	for _, test := range tests {
		err := test.n.Validate(&test.r)
		if got := ErrnoOf(err); got != test.want {
			t.Errorf("%s: got %v (%v), need %v", test.name, got, err, test.want)
		}
		if err == nil {
			continue
		}
		var refused *RequestError
		if !errors.As(err, &refused) || refused.Command != test.r.Type || !strings.Contains(err.Error(), test.says) {
			t.Errorf("%s: got %q, need it to say %q", test.name, err, test.says)
		}
	}
}

func TestPayloadLength(t *testing.T) {
	tests := []struct {
		r                 Request
		compact, extended uint64
	}{
		{Request{Type: CmdRead, Length: 5}, 0, 0},
		{Request{Type: CmdWrite, Length: 5}, 5, 0},
		{Request{Type: CmdWrite, Flags: CmdFlagPayloadLen, Length: 5}, 5, 5},
		{Request{Type: CmdRead, Flags: CmdFlagPayloadLen, Length: 5}, 0, 5},
		{Request{Type: 99, Flags: CmdFlagPayloadLen, Length: 5}, 0, 5},
		{Request{Type: 99, Length: 5}, 0, 0},
	}
	for _, test := range tests {
		if got := test.r.PayloadLength(false); got != test.compact {
			t.Errorf("%+v, compact: got %d, need %d", test.r, got, test.compact)
		}
		if got := test.r.PayloadLength(true); got != test.extended {
			t.Errorf("%+v, extended: got %d, need %d", test.r, got, test.extended)
		}
	}
}

func TestLookup(t *testing.T) {
	for c := CmdRead; c <= CmdBlockStatus; c++ {
		if spec, ok := Lookup(c); !ok || spec.Name == "" {
			t.Errorf("command %d: got %+v, %v", uint16(c), spec, ok)
		}
	}
	if _, ok := Lookup(CmdBlockStatus + 1); ok {
		t.Error("found a command that is not there")
	}
}
