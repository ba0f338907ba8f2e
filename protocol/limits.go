package protocol

// Limits of this implementation. A peer that exceeds one gets an error; none
// of them is negotiated.
const (
	// MaxStringLength is the longest string in bytes, as the specification
	// sets it ("Conventions").
	MaxStringLength = 4096

	// MaxRequestLength is the longest payload in bytes of a read or a write.
	MaxRequestLength = 64 << 20

	// MaxOptions is how many options a server haggles over in one handshake.
	MaxOptions = 32

	// MaxOptionLength is the longest data in bytes of one option. It has room
	// for a meta context request of an export name and several queries, each
	// of MaxStringLength, and is small enough to be read whole. Longer data is
	// consumed unread and refused.
	MaxOptionLength = 64 << 10

	// MaxOptionReplyLength is the longest data in bytes of one option reply.
	MaxOptionReplyLength = 4 + 2*MaxStringLength

	// MaxExports is how many exports one NBD_OPT_LIST answers with.
	MaxExports = 10000

	// MaxExtents is how many descriptors a block status chunk may have to be
	// decoded. The server sends fewer (backend.MaxExtents).
	MaxExtents = 1 << 20

	// MaxBlockStatusRequest is the longest payload in bytes of an
	// NBD_CMD_BLOCK_STATUS: 1 Ki context numbers, of which a client of this
	// server can have been told one.
	MaxBlockStatusRequest = blockStatusRequestSize + 4<<10

	// DefaultPort is the TCP port that IANA reserved for NBD.
	DefaultPort = 10809
)
