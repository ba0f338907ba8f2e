package protocol

import (
	"bytes"
	"reflect"
	"testing"
)

// fuzz decodes anything into a fresh message. What decodes must encode to the
// same bytes again, up to bytes past a fixed message's end and such that
// canonical says are not kept.
func fuzz[T message](f *testing.F, fresh func() T, canonical bool) {
	for _, g := range golden {
		if reflect.TypeOf(g.full) == reflect.TypeOf(fresh()) {
			f.Add(unhex(f, g.bytes))
		}
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		m := fresh()
		if m.Decode(b) != nil {
			return
		}
		out := m.AppendTo(nil)
		if canonical && !bytes.HasPrefix(b, out) {
			t.Fatalf("%x decodes to %+v, which encodes to %x", b, m, out)
		}
		again := fresh()
		if err := again.Decode(out); err != nil || !reflect.DeepEqual(m, again) {
			t.Fatalf("%+v encodes to %x, which decodes to %+v, %v", m, out, again, err)
		}
	})
}

func FuzzGreeting(f *testing.F)    { fuzz(f, func() *Greeting { return &Greeting{} }, true) }
func FuzzClientFlags(f *testing.F) { fuzz(f, func() *ClientFlags { return new(ClientFlags) }, true) }
func FuzzOptionHeader(f *testing.F) {
	fuzz(f, func() *OptionHeader { return &OptionHeader{} }, true)
}
func FuzzOptionReplyHeader(f *testing.F) {
	fuzz(f, func() *OptionReplyHeader { return &OptionReplyHeader{} }, true)
}
func FuzzExportNameReply(f *testing.F) {
	fuzz(f, func() *ExportNameReply { return &ExportNameReply{} }, false) // reserved bytes
}
func FuzzInfoRequest(f *testing.F) { fuzz(f, func() *InfoRequest { return &InfoRequest{} }, true) }
func FuzzServerReply(f *testing.F) { fuzz(f, func() *ServerReply { return &ServerReply{} }, true) }
func FuzzExportInfo(f *testing.F)  { fuzz(f, func() *ExportInfo { return &ExportInfo{} }, true) }
func FuzzTextInfo(f *testing.F)    { fuzz(f, func() *TextInfo { return &TextInfo{} }, true) }
func FuzzBlockSizeInfo(f *testing.F) {
	fuzz(f, func() *BlockSizeInfo { return &BlockSizeInfo{} }, true)
}
func FuzzMetaContextRequest(f *testing.F) {
	fuzz(f, func() *MetaContextRequest { return &MetaContextRequest{} }, true)
}
func FuzzMetaContextReply(f *testing.F) {
	fuzz(f, func() *MetaContextReply { return &MetaContextReply{} }, true)
}
func FuzzRequest(f *testing.F) { fuzz(f, func() *Request { return &Request{} }, true) }
func FuzzExtendedRequest(f *testing.F) {
	fuzz(f, func() extended { return extended{&Request{}} }, true)
}
func FuzzSimpleReply(f *testing.F) { fuzz(f, func() *SimpleReply { return &SimpleReply{} }, true) }
func FuzzChunkHeader(f *testing.F) { fuzz(f, func() *ChunkHeader { return &ChunkHeader{} }, true) }
func FuzzExtendedChunkHeader(f *testing.F) {
	fuzz(f, func() extended { return extended{&ChunkHeader{}} }, true)
}
func FuzzOffsetData(f *testing.F) { fuzz(f, func() *OffsetData { return &OffsetData{} }, true) }
func FuzzOffsetHole(f *testing.F) { fuzz(f, func() *OffsetHole { return &OffsetHole{} }, true) }
func FuzzErrorChunk(f *testing.F) {
	fuzz(f, func() *ErrorChunk { return &ErrorChunk{Type: ReplyError} }, true)
}
func FuzzErrorOffsetChunk(f *testing.F) {
	fuzz(f, func() *ErrorChunk { return &ErrorChunk{Type: ReplyErrorOffset} }, true)
}
func FuzzBlockStatus(f *testing.F) { fuzz(f, func() *BlockStatus { return &BlockStatus{} }, true) }
func FuzzExtendedBlockStatus(f *testing.F) {
	fuzz(f, func() extended { return extended{&BlockStatus{}} }, false) // a count of 0
}

func FuzzBlockStatusRequest(f *testing.F) {
	fuzz(f, func() *BlockStatusRequest { return &BlockStatusRequest{} }, true)
}

// FuzzValidate: what is accepted lies within the export.
func FuzzValidate(f *testing.F) {
	f.Add((&Request{Type: CmdRead, Length: 512}).AppendExtendedTo(nil), uint64(1<<20), uint16(1), true)
	f.Add((&Request{Type: CmdTrim, Offset: 1<<64 - 1, Length: 2}).AppendExtendedTo(nil), uint64(1<<20), uint16(0xffff&^FlagReadOnly), false)
	f.Fuzz(func(t *testing.T, b []byte, size uint64, flags uint16, bits bool) {
		var r Request
		if r.DecodeExtended(b) != nil {
			return
		}
		n := Negotiated{Size: size, Flags: ExportFlags(flags), StructuredReplies: bits, ExtendedHeaders: bits, MetaContexts: bits}
		err := n.Validate(&r)
		if err == nil && r.Type == CmdBlockStatus && r.PayloadLength(bits) > 0 {
			if r.Length > MaxBlockStatusRequest {
				t.Fatalf("%+v was accepted", r)
			}
			(&BlockStatusRequest{Length: r.Offset ^ r.Length}).Apply(&r)
			err = n.Validate(&r)
		}
		if err == nil && r.Type != CmdDisc && (r.Offset > size || r.Length > size-r.Offset) {
			t.Fatalf("%+v was accepted by %+v", r, n)
		}
		if err != nil && ErrnoOf(err) == 0 {
			t.Fatalf("%v has no number", err)
		}
	})
}
