package protocol

import (
	"encoding/binary"
	"fmt"
)

const (
	simpleReplyMagic   = 0x67446698
	chunkMagic         = 0x668e33ef
	extendedChunkMagic = 0x6e8a278c
)

// Sizes in bytes of what starts a reply.
const (
	SimpleReplySize         = 16
	ChunkHeaderSize         = 20
	ExtendedChunkHeaderSize = 32
	OffsetDataSize          = 8 // the data follows
	OffsetHoleSize          = 12
)

// ReplyType is the type of a structured reply's chunk ("Structured reply
// types"). Bit 15 marks an error.
type ReplyType uint16

// Types of chunks.
const (
	ReplyNone           ReplyType = 0
	ReplyOffsetData     ReplyType = 1
	ReplyOffsetHole     ReplyType = 2
	ReplyBlockStatus    ReplyType = 5
	ReplyBlockStatusExt ReplyType = 6
	ReplyError          ReplyType = 1<<15 + 1
	ReplyErrorOffset    ReplyType = 1<<15 + 2
)

var replyTypeNames = map[ReplyType]string{
	ReplyNone:           "NBD_REPLY_TYPE_NONE",
	ReplyOffsetData:     "NBD_REPLY_TYPE_OFFSET_DATA",
	ReplyOffsetHole:     "NBD_REPLY_TYPE_OFFSET_HOLE",
	ReplyBlockStatus:    "NBD_REPLY_TYPE_BLOCK_STATUS",
	ReplyBlockStatusExt: "NBD_REPLY_TYPE_BLOCK_STATUS_EXT",
	ReplyError:          "NBD_REPLY_TYPE_ERROR",
	ReplyErrorOffset:    "NBD_REPLY_TYPE_ERROR_OFFSET",
}

// String gives the specification's name, such as NBD_REPLY_TYPE_NONE.
func (t ReplyType) String() string { return valueName(t, replyTypeNames, "NBD_REPLY_TYPE") }

// IsError tells whether a chunk of this type carries an error. A client treats
// one that it does not know like NBD_REPLY_TYPE_ERROR.
func (t ReplyType) IsError() bool { return t&(1<<15) != 0 }

// ReplyFlags modify a chunk ("Structured reply flags").
type ReplyFlags uint16

// ReplyFlagDone marks the last chunk of a reply.
const ReplyFlagDone ReplyFlags = 1 << 0

// String gives the specification's names, joined by "|", or "0".
func (f ReplyFlags) String() string {
	return flagNames(uint64(f), []string{"NBD_REPLY_FLAG_DONE"})
}

// ReplyMagic tells by its first four bytes how a message of the server's goes
// on: with a simple reply, a chunk or an extended chunk. ok is false for
// anything else, and for less than four bytes.
func ReplyMagic(b []byte) (kind ReplyKind, ok bool) {
	if len(b) < 4 {
		return 0, false
	}
	switch binary.BigEndian.Uint32(b) {
	case simpleReplyMagic:
		return KindSimple, true
	case chunkMagic:
		return KindChunk, true
	case extendedChunkMagic:
		return KindExtendedChunk, true
	}
	return 0, false
}

// ReplyKind is one of the server's messages of the transmission phase.
type ReplyKind int

// Kinds of replies.
const (
	KindSimple        ReplyKind = iota // SimpleReply
	KindChunk                          // ChunkHeader.Decode
	KindExtendedChunk                  // ChunkHeader.DecodeExtended
)

// HeaderSize is the length in bytes of what starts a message of this kind.
func (k ReplyKind) HeaderSize() int {
	switch k {
	case KindChunk:
		return ChunkHeaderSize
	case KindExtendedChunk:
		return ExtendedChunkHeaderSize
	}
	return SimpleReplySize
}

// SimpleReply answers a request ("Simple reply message"). The data of a read
// that succeeded follows it.
type SimpleReply struct {
	Errno  Errno
	Cookie uint64
}

// AppendTo appends the reply.
func (s *SimpleReply) AppendTo(b []byte) []byte {
	b = binary.BigEndian.AppendUint32(b, simpleReplyMagic)
	b = binary.BigEndian.AppendUint32(b, uint32(s.Errno))
	return binary.BigEndian.AppendUint64(b, s.Cookie)
}

// Decode reads a reply from the start of b. It fails with ErrShort or ErrMagic.
func (s *SimpleReply) Decode(b []byte) error {
	if err := header(b, SimpleReplySize, simpleReplyMagic, "simple reply"); err != nil {
		return err
	}
	s.Errno = Errno(binary.BigEndian.Uint32(b[4:]))
	s.Cookie = binary.BigEndian.Uint64(b[8:])
	return nil
}

// ChunkHeader starts a chunk of a structured reply ("Structured reply chunk
// message"), compact or extended.
type ChunkHeader struct {
	Cookie uint64
	// Offset is the request's. Only the extended header has it.
	Offset uint64
	// Length is that of the data that follows, in bytes. The compact header
	// holds no more than 32 bits of it.
	Length uint64
	Flags  ReplyFlags
	Type   ReplyType
}

// AppendTo appends the compact header. Length must fit 32 bits.
func (h *ChunkHeader) AppendTo(b []byte) []byte {
	b = binary.BigEndian.AppendUint32(b, chunkMagic)
	b = h.appendFields(b)
	return binary.BigEndian.AppendUint32(b, uint32(h.Length))
}

// AppendExtendedTo appends the extended header.
func (h *ChunkHeader) AppendExtendedTo(b []byte) []byte {
	b = binary.BigEndian.AppendUint32(b, extendedChunkMagic)
	b = h.appendFields(b)
	b = binary.BigEndian.AppendUint64(b, h.Offset)
	return binary.BigEndian.AppendUint64(b, h.Length)
}

func (h *ChunkHeader) appendFields(b []byte) []byte {
	b = binary.BigEndian.AppendUint16(b, uint16(h.Flags))
	b = binary.BigEndian.AppendUint16(b, uint16(h.Type))
	return binary.BigEndian.AppendUint64(b, h.Cookie)
}

// Decode reads a compact header from the start of b. It fails with ErrShort or
// ErrMagic. Length is whatever the server says: hold it against what the
// request can be answered with before reading.
func (h *ChunkHeader) Decode(b []byte) error {
	if err := header(b, ChunkHeaderSize, chunkMagic, "reply chunk"); err != nil {
		return err
	}
	h.decodeFields(b)
	h.Offset = 0
	h.Length = uint64(binary.BigEndian.Uint32(b[16:]))
	return nil
}

// DecodeExtended is Decode for the extended header.
func (h *ChunkHeader) DecodeExtended(b []byte) error {
	if err := header(b, ExtendedChunkHeaderSize, extendedChunkMagic, "extended reply chunk"); err != nil {
		return err
	}
	h.decodeFields(b)
	h.Offset = binary.BigEndian.Uint64(b[16:])
	h.Length = binary.BigEndian.Uint64(b[24:])
	return nil
}

func (h *ChunkHeader) decodeFields(b []byte) {
	h.Flags = ReplyFlags(binary.BigEndian.Uint16(b[4:]))
	h.Type = ReplyType(binary.BigEndian.Uint16(b[6:]))
	h.Cookie = binary.BigEndian.Uint64(b[8:])
}

// OffsetData starts the data of a chunk NBD_REPLY_TYPE_OFFSET_DATA. What was
// read follows it, the chunk's length less OffsetDataSize.
type OffsetData struct {
	Offset uint64 // in the export
}

// AppendTo appends the offset.
func (o *OffsetData) AppendTo(b []byte) []byte { return binary.BigEndian.AppendUint64(b, o.Offset) }

// Decode reads the offset from the start of b. It fails with ErrShort.
func (o *OffsetData) Decode(b []byte) error {
	if err := need(b, OffsetDataSize, "offset of data"); err != nil {
		return err
	}
	o.Offset = binary.BigEndian.Uint64(b)
	return nil
}

// OffsetHole is the data of a chunk NBD_REPLY_TYPE_OFFSET_HOLE: a part of what
// was read that is all zeroes.
type OffsetHole struct {
	Offset uint64 // in the export
	Length uint32 // in bytes, at least 1
}

// AppendTo appends the hole.
func (o *OffsetHole) AppendTo(b []byte) []byte {
	b = binary.BigEndian.AppendUint64(b, o.Offset)
	return binary.BigEndian.AppendUint32(b, o.Length)
}

// Decode reads the hole, which is all of b. It fails with ErrShort, ErrLong or
// ErrValue.
func (o *OffsetHole) Decode(b []byte) error {
	r := reader{b: b, what: "hole"}
	o.Offset = r.uint64()
	o.Length = r.uint32()
	if err := r.done(); err != nil {
		return err
	}
	if o.Length == 0 {
		return fmt.Errorf("decode hole: got length 0, need at least 1: %w", ErrValue)
	}
	return nil
}

// ErrorChunk is the data of a chunk NBD_REPLY_TYPE_ERROR or
// NBD_REPLY_TYPE_ERROR_OFFSET.
type ErrorChunk struct {
	// Type is one of the two. It is in the chunk's header, so set it before
	// Decode, too.
	Type   ReplyType
	Errno  Errno // never 0
	Msg    string
	Offset uint64 // where in the export it failed, in NBD_REPLY_TYPE_ERROR_OFFSET only
}

// WireSize is the data's length in bytes.
func (e *ErrorChunk) WireSize() int {
	n := 6 + min(len(e.Msg), MaxStringLength)
	if e.Type == ReplyErrorOffset {
		n += 8
	}
	return n
}

// AppendTo appends the data, with no more than MaxStringLength bytes of Msg.
func (e *ErrorChunk) AppendTo(b []byte) []byte {
	msg := e.Msg[:min(len(e.Msg), MaxStringLength)]
	b = binary.BigEndian.AppendUint32(b, uint32(e.Errno))
	b = binary.BigEndian.AppendUint16(b, uint16(len(msg)))
	b = append(b, msg...)
	if e.Type == ReplyErrorOffset {
		b = binary.BigEndian.AppendUint64(b, e.Offset)
	}
	return b
}

// Decode reads the data, which is all of b. It fails with ErrShort, ErrLong,
// ErrString or ErrValue. After the text of an error whose Type is neither of
// the two anything may follow.
func (e *ErrorChunk) Decode(b []byte) error {
	r := reader{b: b, what: "error chunk"}
	e.Errno = Errno(r.uint32())
	e.Msg = r.string(uint32(r.uint16()))
	e.Offset = 0
	switch e.Type {
	case ReplyError:
	case ReplyErrorOffset:
		e.Offset = r.uint64()
	default:
		r.b = nil
	}
	if err := r.done(); err != nil {
		return err
	}
	if e.Errno == 0 {
		return fmt.Errorf("decode error chunk: got error 0, need one that is not: %w", ErrValue)
	}
	return nil
}
