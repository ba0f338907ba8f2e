package protocol

// ExportFlags are what the server says of an export ("Transmission flags").
type ExportFlags uint16

// Transmission flags.
const (
	FlagHasFlags           ExportFlags = 1 << 0
	FlagReadOnly           ExportFlags = 1 << 1
	FlagSendFlush          ExportFlags = 1 << 2
	FlagSendFUA            ExportFlags = 1 << 3
	FlagRotational         ExportFlags = 1 << 4
	FlagSendTrim           ExportFlags = 1 << 5
	FlagSendWriteZeroes    ExportFlags = 1 << 6
	FlagSendDF             ExportFlags = 1 << 7
	FlagCanMultiConn       ExportFlags = 1 << 8
	FlagSendResize         ExportFlags = 1 << 9
	FlagSendCache          ExportFlags = 1 << 10
	FlagSendFastZero       ExportFlags = 1 << 11
	FlagBlockStatusPayload ExportFlags = 1 << 12
)

var exportFlagNames = []string{
	"NBD_FLAG_HAS_FLAGS", "NBD_FLAG_READ_ONLY", "NBD_FLAG_SEND_FLUSH",
	"NBD_FLAG_SEND_FUA", "NBD_FLAG_ROTATIONAL", "NBD_FLAG_SEND_TRIM",
	"NBD_FLAG_SEND_WRITE_ZEROES", "NBD_FLAG_SEND_DF", "NBD_FLAG_CAN_MULTI_CONN",
	"NBD_FLAG_SEND_RESIZE", "NBD_FLAG_SEND_CACHE", "NBD_FLAG_SEND_FAST_ZERO",
	"NBD_FLAG_BLOCK_STATUS_PAYLOAD",
}

// String gives the specification's names, joined by "|", or "0".
func (f ExportFlags) String() string { return flagNames(uint64(f), exportFlagNames) }
