package protocol

import (
	"encoding/binary"
	"fmt"
)

// Sizes in bytes of a request's header.
const (
	RequestSize         = 28
	ExtendedRequestSize = 32
)

const (
	requestMagic         = 0x25609513
	extendedRequestMagic = 0x21e41c71
)

// Request is the header of a transmission request ("Request message"). A
// write's payload follows it on the wire.
type Request struct {
	Cookie uint64
	Offset uint64
	// Length is in bytes. The compact header holds no more than 32 bits of it.
	Length uint64
	Flags  CommandFlags
	Type   Command
}

// PayloadLength is how many bytes follow the header on the wire, whether the
// request is good or not: a server that refuses a request must still consume
// them. extended tells which of the two headers the request came with: with the
// extended one NBD_CMD_FLAG_PAYLOAD_LEN decides, without it the command does.
func (r *Request) PayloadLength(extended bool) uint64 {
	payload := extended && r.Flags&CmdFlagPayloadLen != 0
	if spec, ok := Lookup(r.Type); ok && !extended {
		payload = spec.Payload
	}
	if payload {
		return r.Length
	}
	return 0
}

// AppendTo appends the compact header. Length must fit 32 bits.
func (r *Request) AppendTo(b []byte) []byte {
	b = binary.BigEndian.AppendUint32(b, requestMagic)
	b = r.appendFields(b)
	return binary.BigEndian.AppendUint32(b, uint32(r.Length))
}

// AppendExtendedTo appends the extended header.
func (r *Request) AppendExtendedTo(b []byte) []byte {
	b = binary.BigEndian.AppendUint32(b, extendedRequestMagic)
	b = r.appendFields(b)
	return binary.BigEndian.AppendUint64(b, r.Length)
}

func (r *Request) appendFields(b []byte) []byte {
	b = binary.BigEndian.AppendUint16(b, uint16(r.Flags))
	b = binary.BigEndian.AppendUint16(b, uint16(r.Type))
	b = binary.BigEndian.AppendUint64(b, r.Cookie)
	return binary.BigEndian.AppendUint64(b, r.Offset)
}

// Decode reads the compact header from the start of b. It fails with ErrShort
// or ErrMagic, and does not look at what the fields say: Negotiated.Validate
// does. It does not allocate unless it fails.
func (r *Request) Decode(b []byte) error {
	if err := header(b, RequestSize, requestMagic, "request"); err != nil {
		return err
	}
	r.decodeFields(b)
	r.Length = uint64(binary.BigEndian.Uint32(b[24:]))
	return nil
}

// DecodeExtended is Decode for the extended header.
func (r *Request) DecodeExtended(b []byte) error {
	if err := header(b, ExtendedRequestSize, extendedRequestMagic, "extended request"); err != nil {
		return err
	}
	r.decodeFields(b)
	r.Length = binary.BigEndian.Uint64(b[24:])
	return nil
}

func (r *Request) decodeFields(b []byte) {
	r.Flags = CommandFlags(binary.BigEndian.Uint16(b[4:]))
	r.Type = Command(binary.BigEndian.Uint16(b[6:]))
	r.Cookie = binary.BigEndian.Uint64(b[8:])
	r.Offset = binary.BigEndian.Uint64(b[16:])
}

// Negotiated is what a handshake settled, as far as requests depend on it.
type Negotiated struct {
	Size              uint64 // of the export, in bytes
	Flags             ExportFlags
	StructuredReplies bool // also true with extended headers
	ExtendedHeaders   bool
	MetaContexts      bool // at least one context was selected
	// BlockSize is what the client asked for and was told on its way into the
	// transmission phase; zero where it did not ask.
	BlockSize BlockSizeInfo
	// StrictBlockSize refuses requests that break BlockSize.
	StrictBlockSize bool
}

// RequestSize is the size in bytes of a request's header.
func (n *Negotiated) RequestSize() int {
	if n.ExtendedHeaders {
		return ExtendedRequestSize
	}
	return RequestSize
}

// DecodeRequest reads a header of RequestSize bytes from the start of b, as
// Request.Decode does.
func (n *Negotiated) DecodeRequest(r *Request, b []byte) error {
	if n.ExtendedHeaders {
		return r.DecodeExtended(b)
	}
	return r.Decode(b)
}

// AppendChunk appends h in the form that was negotiated.
func (n *Negotiated) AppendChunk(b []byte, h *ChunkHeader) []byte {
	if n.ExtendedHeaders {
		return h.AppendExtendedTo(b)
	}
	return h.AppendTo(b)
}

// ChunkHeaderSize is the size in bytes of what AppendChunk appends.
func (n *Negotiated) ChunkHeaderSize() int {
	if n.ExtendedHeaders {
		return ExtendedChunkHeaderSize
	}
	return ChunkHeaderSize
}

// RequestError says why a request was refused, and what the reply's error is.
type RequestError struct {
	Command Command
	Errno   Errno
	Msg     string
}

func (e *RequestError) Error() string {
	return fmt.Sprintf("validate %v: %s", e.Command, e.Msg)
}

// Validate says whether the server may carry a request out. It returns nil or
// a *RequestError, and does not allocate in the first case. It is pure: the
// caller still has to consume PayloadLength bytes of a request that is refused.
// NBD_CMD_DISC has no reply and is always accepted.
//
// An NBD_CMD_BLOCK_STATUS with a payload is judged twice: first as it came, when
// only its offset says where, and once more with the payload's Length in the place
// of its own and without NBD_CMD_FLAG_PAYLOAD_LEN (BlockStatusRequest.Apply).
func (n *Negotiated) Validate(r *Request) error {
	spec, ok := Lookup(r.Type)
	if !ok {
		return refuse(r, EINVAL, "got command %d, which this server does not know; send one that it advertised", uint16(r.Type))
	}
	if r.Type == CmdDisc {
		return nil
	}
	payload := n.ExtendedHeaders && r.Flags&CmdFlagPayloadLen != 0
	query := r.Type == CmdBlockStatus && n.Flags&FlagBlockStatusPayload != 0
	if payload && !spec.Payload && !query {
		return refuse(r, EINVAL, "got %v with %d bytes, need no payload with this command here", CmdFlagPayloadLen, r.Length)
	}
	if spec.Writes && n.Flags&FlagReadOnly != 0 {
		return refuse(r, EPERM, "the export is read-only")
	}
	if payload && query {
		if r.Length < blockStatusRequestSize+4 || r.Length > MaxBlockStatusRequest {
			return refuse(r, EINVAL, "got a payload of %d bytes, need %d to %d: a length and the numbers of contexts", r.Length, blockStatusRequestSize+4, MaxBlockStatusRequest)
		}
	} else if spec.Range {
		if r.Length == 0 || r.Offset > n.Size || r.Length > n.Size-r.Offset {
			errno := EINVAL
			if r.Type == CmdWrite || r.Type == CmdWriteZeroes {
				errno = ENOSPC
			}
			return refuse(r, errno, "got offset %d and length %d, need at least 1 byte within the export's %d", r.Offset, r.Length, n.Size)
		}
	} else if r.Offset != 0 || r.Length != 0 {
		return refuse(r, EINVAL, "got offset %d and length %d, need 0 and 0", r.Offset, r.Length)
	}
	if err := n.validateFlags(r, spec); err != nil {
		return err
	}
	if (spec.Payload || spec.Data) && r.Length > MaxRequestLength {
		return refuse(r, ENOMEM, "got length %d, need at most %d; split the request", r.Length, MaxRequestLength)
	}
	if err := n.validateBlockSize(r, spec); err != nil {
		return err
	}
	if lacks := spec.Needs &^ n.Flags; lacks != 0 {
		return refuse(r, EINVAL, "the export does not have %v", lacks)
	}
	if r.Type == CmdBlockStatus && !n.MetaContexts {
		return refuse(r, EINVAL, "no meta context was selected; send NBD_OPT_SET_META_CONTEXT first")
	}
	return nil
}

// validateBlockSize holds a client to the block sizes that it asked for. The end
// of the export may be shorter than a block.
func (n *Negotiated) validateBlockSize(r *Request, spec *Spec) error {
	if !n.StrictBlockSize {
		return nil
	}
	size := &n.BlockSize
	query := r.Type == CmdBlockStatus && r.Flags&CmdFlagPayloadLen != 0
	if size.Minimum > 1 && spec.Range && !query {
		block := uint64(size.Minimum)
		if r.Offset%block != 0 || r.Length%block != 0 && r.Offset+r.Length != n.Size {
			return refuse(r, EINVAL, "got offset %d and length %d, need multiples of the minimum block size %d", r.Offset, r.Length, block)
		}
	}
	if size.Maximum > 0 && (spec.Payload || spec.Data) && r.Length > uint64(size.Maximum) {
		return refuse(r, EINVAL, "got length %d, need at most the maximum block size %d; split the request", r.Length, size.Maximum)
	}
	return nil
}

func (n *Negotiated) validateFlags(r *Request, spec *Spec) error {
	allowed := spec.Flags
	if n.Flags&FlagSendFUA == 0 {
		allowed &^= CmdFlagFUA
	}
	if !n.StructuredReplies {
		allowed &^= CmdFlagDF
	}
	if n.Flags&FlagSendFastZero == 0 {
		allowed &^= CmdFlagFastZero
	}
	if !n.ExtendedHeaders || r.Type == CmdBlockStatus && n.Flags&FlagBlockStatusPayload == 0 {
		allowed &^= CmdFlagPayloadLen
	}
	if wrong := r.Flags &^ allowed; wrong != 0 {
		return refuse(r, EINVAL, "got flags %v, need none outside %v", r.Flags, allowed)
	}
	if n.ExtendedHeaders && spec.Payload && r.Flags&CmdFlagPayloadLen == 0 {
		return refuse(r, EINVAL, "got flags %v, need %v with extended headers", r.Flags, CmdFlagPayloadLen)
	}
	return nil
}

func refuse(r *Request, errno Errno, format string, args ...any) error {
	return &RequestError{Command: r.Type, Errno: errno, Msg: fmt.Sprintf(format, args...)}
}
