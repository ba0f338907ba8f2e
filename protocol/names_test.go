package protocol

import (
	"fmt"
	"testing"
)

func TestNames(t *testing.T) {
	tests := []struct {
		v    fmt.Stringer
		want string
	}{
		{CmdRead, "NBD_CMD_READ"}, {CmdWrite, "NBD_CMD_WRITE"}, {CmdDisc, "NBD_CMD_DISC"}, {CmdFlush, "NBD_CMD_FLUSH"},
		{CmdTrim, "NBD_CMD_TRIM"}, {CmdCache, "NBD_CMD_CACHE"}, {CmdWriteZeroes, "NBD_CMD_WRITE_ZEROES"},
		{CmdBlockStatus, "NBD_CMD_BLOCK_STATUS"}, {Command(9), "NBD_CMD(9)"},
		{CommandFlags(0), "0"}, {CmdFlagFUA, "NBD_CMD_FLAG_FUA"}, {CmdFlagFUA | CmdFlagFastZero | 1<<9, "NBD_CMD_FLAG_FUA|NBD_CMD_FLAG_FAST_ZERO|0x200"},
		{CmdFlagNoHole | CmdFlagDF | CmdFlagReqOne | CmdFlagPayloadLen, "NBD_CMD_FLAG_NO_HOLE|NBD_CMD_FLAG_DF|NBD_CMD_FLAG_REQ_ONE|NBD_CMD_FLAG_PAYLOAD_LEN"},
		{FlagFixedNewstyle | FlagNoZeroes, "NBD_FLAG_FIXED_NEWSTYLE|NBD_FLAG_NO_ZEROES"},
		{FlagCFixedNewstyle | FlagCNoZeroes | 4, "NBD_FLAG_C_FIXED_NEWSTYLE|NBD_FLAG_C_NO_ZEROES|0x4"},
		{FlagHasFlags | FlagReadOnly | FlagSendFlush | FlagSendFUA | FlagRotational | FlagSendTrim, "NBD_FLAG_HAS_FLAGS|NBD_FLAG_READ_ONLY|NBD_FLAG_SEND_FLUSH|NBD_FLAG_SEND_FUA|NBD_FLAG_ROTATIONAL|NBD_FLAG_SEND_TRIM"},
		{FlagSendWriteZeroes | FlagSendDF | FlagCanMultiConn | FlagSendResize, "NBD_FLAG_SEND_WRITE_ZEROES|NBD_FLAG_SEND_DF|NBD_FLAG_CAN_MULTI_CONN|NBD_FLAG_SEND_RESIZE"},
		{FlagSendCache | FlagSendFastZero | FlagBlockStatusPayload, "NBD_FLAG_SEND_CACHE|NBD_FLAG_SEND_FAST_ZERO|NBD_FLAG_BLOCK_STATUS_PAYLOAD"},
		{OptExportName, "NBD_OPT_EXPORT_NAME"}, {OptExtendedHeaders, "NBD_OPT_EXTENDED_HEADERS"}, {Option(99), "NBD_OPT(99)"},
		{RepAck, "NBD_REP_ACK"}, {RepErrExtHeaderReqd, "NBD_REP_ERR_EXT_HEADER_REQD"}, {OptionReply(1<<31 + 99), "NBD_REP(2147483747)"},
		{InfoBlockSize, "NBD_INFO_BLOCK_SIZE"}, {Info(9), "NBD_INFO(9)"},
		{ReplyErrorOffset, "NBD_REPLY_TYPE_ERROR_OFFSET"}, {ReplyType(9), "NBD_REPLY_TYPE(9)"}, {ReplyFlagDone, "NBD_REPLY_FLAG_DONE"},
		{Errno(0), "0"}, {EPERM, "NBD_EPERM"}, {EIO, "NBD_EIO"}, {ENOMEM, "NBD_ENOMEM"}, {EINVAL, "NBD_EINVAL"}, {ENOSPC, "NBD_ENOSPC"},
		{EOVERFLOW, "NBD_EOVERFLOW"}, {ENOTSUP, "NBD_ENOTSUP"}, {ESHUTDOWN, "NBD_ESHUTDOWN"}, {Errno(2), "NBD_ERRNO(2)"},
	}
	for _, test := range tests {
		if got := test.v.String(); got != test.want {
			t.Errorf("%T: got %s, need %s", test.v, got, test.want)
		}
	}
}

// TestNumbers holds constants that no golden message has against the
// specification.
func TestNumbers(t *testing.T) {
	if OptExportName != 1 || OptAbort != 2 || OptList != 3 || OptStartTLS != 5 || OptInfo != 6 || OptStructuredReply != 8 ||
		OptListMetaContext != 9 || OptSetMetaContext != 10 || OptExtendedHeaders != 11 {
		t.Error("an option has another number")
	}
	if RepAck != 1 || RepServer != 2 || RepInfo != 3 || RepMetaContext != 4 || RepErrUnsup != 0x80000001 || RepErrPolicy != 0x80000002 ||
		RepErrInvalid != 0x80000003 || RepErrPlatform != 0x80000004 || RepErrTLSReqd != 0x80000005 || RepErrShutdown != 0x80000007 ||
		RepErrBlockSizeReqd != 0x80000008 || RepErrTooBig != 0x80000009 || RepErrExtHeaderReqd != 0x8000000a {
		t.Error("an option reply has another number")
	}
	if ReplyNone != 0 || ReplyOffsetData != 1 || ReplyOffsetHole != 2 || ReplyBlockStatus != 5 || ReplyError != 0x8001 {
		t.Error("a reply type has another number")
	}
	if RepMetaContext.IsError() || !RepErrUnsup.IsError() || ReplyBlockStatus.IsError() || !ReplyError.IsError() {
		t.Error("IsError is wrong")
	}
}
