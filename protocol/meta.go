package protocol

import (
	"encoding/binary"
	"fmt"
	"slices"
)

// ContextBaseAllocation is the meta context that every server has that has one
// ("Metadata querying").
const ContextBaseAllocation = "base:allocation"

// Flags of a descriptor in base:allocation.
const (
	StateHole = 1 << 0 // nothing is allocated there
	StateZero = 1 << 1 // reads as zeroes
)

// MetaContextRequest is the data of NBD_OPT_LIST_META_CONTEXT and
// NBD_OPT_SET_META_CONTEXT.
type MetaContextRequest struct {
	Export  string
	Queries []string // "namespace:leaf", or "namespace:" in a list request
}

// AppendTo appends the data.
func (q *MetaContextRequest) AppendTo(b []byte) []byte {
	b = appendString(b, q.Export)
	b = binary.BigEndian.AppendUint32(b, uint32(len(q.Queries)))
	for _, s := range q.Queries {
		b = appendString(b, s)
	}
	return b
}

// Decode reads the data, which is all of b. It fails with ErrShort, ErrLong,
// ErrString or ErrValue.
func (q *MetaContextRequest) Decode(b []byte) error {
	r := reader{b: b, what: "meta context request"}
	q.Export = r.string(r.uint32())
	q.Queries = nil
	count := r.uint32()
	// Each query takes bytes, so that a count that is too high ends with them.
	for ; count > 0 && r.err == nil; count-- {
		q.Queries = append(q.Queries, r.string(r.uint32()))
	}
	return r.done()
}

// MetaContextReply is the data of NBD_REP_META_CONTEXT, one context.
type MetaContextReply struct {
	ID   uint32 // what block status replies call it; no meaning in a list
	Name string
}

// AppendTo appends the data.
func (m *MetaContextReply) AppendTo(b []byte) []byte {
	return append(binary.BigEndian.AppendUint32(b, m.ID), m.Name...)
}

// Decode reads the data, which is all of b. It fails with ErrShort, ErrString
// or ErrValue.
func (m *MetaContextReply) Decode(b []byte) error {
	r := reader{b: b, what: "NBD_REP_META_CONTEXT"}
	m.ID = r.uint32()
	m.Name = r.rest()
	return r.done()
}

// blockStatusRequestSize is the size in bytes of a BlockStatusRequest without
// contexts.
const blockStatusRequestSize = 8

// BlockStatusRequest is the payload of an NBD_CMD_BLOCK_STATUS that comes with
// NBD_CMD_FLAG_PAYLOAD_LEN: how much of the export is asked about, and which of
// the selected contexts are.
type BlockStatusRequest struct {
	Length     uint64   // in bytes
	ContextIDs []uint32 // what NBD_OPT_SET_META_CONTEXT told; at least one, each once
}

// WireSize is the payload's length in bytes.
func (q *BlockStatusRequest) WireSize() int { return blockStatusRequestSize + 4*len(q.ContextIDs) }

// AppendTo appends the payload.
func (q *BlockStatusRequest) AppendTo(b []byte) []byte {
	b = binary.BigEndian.AppendUint64(b, q.Length)
	for _, id := range q.ContextIDs {
		b = binary.BigEndian.AppendUint32(b, id)
	}
	return b
}

// Decode reads the payload, which is all of b. It fails with ErrShort, ErrLong or
// ErrValue. ContextIDs is reused if it has room.
func (q *BlockStatusRequest) Decode(b []byte) error {
	const what = "block status request"
	if err := need(b, blockStatusRequestSize+4, what); err != nil {
		return err
	}
	if len(b) > MaxBlockStatusRequest || len(b)%4 != 0 {
		return fmt.Errorf("decode %s: got %d bytes, need at most %d and a multiple of 4: %w", what, len(b), MaxBlockStatusRequest, ErrLong)
	}
	q.Length = binary.BigEndian.Uint64(b)
	q.ContextIDs = q.ContextIDs[:0]
	for b = b[blockStatusRequestSize:]; len(b) > 0; b = b[4:] {
		id := binary.BigEndian.Uint32(b)
		if slices.Contains(q.ContextIDs, id) {
			return fmt.Errorf("decode %s: got context %d twice, need each once: %w", what, id, ErrValue)
		}
		q.ContextIDs = append(q.ContextIDs, id)
	}
	return nil
}

// Apply turns r, which the payload came with, into the request that it stands for.
func (q *BlockStatusRequest) Apply(r *Request) {
	r.Length = q.Length
	r.Flags &^= CmdFlagPayloadLen
}

// Descriptor is one run of an NBD_CMD_BLOCK_STATUS answer.
type Descriptor struct {
	Length uint64 // in bytes, at least 1; 32 bits in NBD_REPLY_TYPE_BLOCK_STATUS
	Flags  uint64 // what they mean is up to the context; likewise
}

// BlockStatus is the data of a chunk NBD_REPLY_TYPE_BLOCK_STATUS or
// NBD_REPLY_TYPE_BLOCK_STATUS_EXT: what one context says of consecutive runs,
// from the request's offset on.
type BlockStatus struct {
	ContextID   uint32
	Descriptors []Descriptor // at least one, at most MaxExtents
}

// WireSize is the data's length in bytes.
func (s *BlockStatus) WireSize() int { return 4 + 8*len(s.Descriptors) }

// ExtendedWireSize is the data's length in bytes in the 64-bit chunk.
func (s *BlockStatus) ExtendedWireSize() int { return 8 + 16*len(s.Descriptors) }

// AppendTo appends the 32-bit form. Lengths and flags must fit.
func (s *BlockStatus) AppendTo(b []byte) []byte {
	b = binary.BigEndian.AppendUint32(b, s.ContextID)
	for i := range s.Descriptors {
		b = binary.BigEndian.AppendUint32(b, uint32(s.Descriptors[i].Length))
		b = binary.BigEndian.AppendUint32(b, uint32(s.Descriptors[i].Flags))
	}
	return b
}

// AppendExtendedTo appends the 64-bit form.
func (s *BlockStatus) AppendExtendedTo(b []byte) []byte {
	b = binary.BigEndian.AppendUint32(b, s.ContextID)
	b = binary.BigEndian.AppendUint32(b, uint32(len(s.Descriptors)))
	for i := range s.Descriptors {
		b = binary.BigEndian.AppendUint64(b, s.Descriptors[i].Length)
		b = binary.BigEndian.AppendUint64(b, s.Descriptors[i].Flags)
	}
	return b
}

// Decode reads the 32-bit form, which is all of b. It fails with ErrShort,
// ErrLong or ErrValue. Descriptors is reused if it has room.
func (s *BlockStatus) Decode(b []byte) error {
	if err := need(b, 4, "block status"); err != nil {
		return err
	}
	s.ContextID = binary.BigEndian.Uint32(b)
	return s.decodeDescriptors(b[4:], 8)
}

// DecodeExtended reads the 64-bit form, as Decode does.
func (s *BlockStatus) DecodeExtended(b []byte) error {
	if err := need(b, 8, "extended block status"); err != nil {
		return err
	}
	s.ContextID = binary.BigEndian.Uint32(b)
	// A count of 0 leaves it to the message's length.
	if count, got := binary.BigEndian.Uint32(b[4:]), (len(b)-8)/16; count != 0 && uint64(count) != uint64(got) {
		return fmt.Errorf("decode extended block status: got %d descriptors, need %d as counted: %w", got, count, ErrValue)
	}
	return s.decodeDescriptors(b[8:], 16)
}

// decodeDescriptors reads descriptors of size bytes each.
func (s *BlockStatus) decodeDescriptors(b []byte, size int) error {
	count := len(b) / size
	if count == 0 {
		return fmt.Errorf("decode block status: got no descriptor, need 1: %w", ErrShort)
	}
	if len(b)%size != 0 || count > MaxExtents {
		return fmt.Errorf("decode block status: got %d bytes, need a multiple of %d and at most %d descriptors: %w", len(b), size, MaxExtents, ErrLong)
	}
	if cap(s.Descriptors) < count {
		s.Descriptors = make([]Descriptor, count)
	}
	s.Descriptors = s.Descriptors[:count]
	for i := range s.Descriptors {
		d := &s.Descriptors[i]
		if e := b[i*size:]; size == 16 {
			*d = Descriptor{binary.BigEndian.Uint64(e), binary.BigEndian.Uint64(e[8:])}
		} else {
			*d = Descriptor{uint64(binary.BigEndian.Uint32(e)), uint64(binary.BigEndian.Uint32(e[4:]))}
		}
		if d.Length == 0 {
			return fmt.Errorf("decode block status: got length 0 in descriptor %d, need at least 1: %w", i, ErrValue)
		}
	}
	return nil
}
