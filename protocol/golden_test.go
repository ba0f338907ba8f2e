package protocol

import (
	"bytes"
	"encoding/hex"
	"errors"
	"reflect"
	"strings"
	"testing"
)

// message is what every message of the package can do.
type message interface {
	AppendTo([]byte) []byte
	Decode([]byte) error
}

// extended gives a message its extended form.
type extended struct {
	m interface {
		AppendExtendedTo([]byte) []byte
		DecodeExtended([]byte) error
	}
}

func (e extended) AppendTo(b []byte) []byte { return e.m.AppendExtendedTo(b) }
func (e extended) Decode(b []byte) error    { return e.m.DecodeExtended(b) }

// golden holds each message, an empty one to decode into, and its bytes, which
// were written down from the specification.
var golden = []struct {
	name  string
	full  message
	empty message
	bytes string // hexadecimal, spaces between fields
	fixed bool   // decodes from the start of a slice; else it is all of it
}{
	{"greeting", &Greeting{Flags: FlagFixedNewstyle | FlagNoZeroes}, &Greeting{}, "4e42444d41474943 49484156454f5054 0003", true},
	{"client flags", ptr(FlagCFixedNewstyle | FlagCNoZeroes), ptr(ClientFlags(0)), "00000003", true},
	{"option", &OptionHeader{Option: OptGo, Length: 6}, &OptionHeader{}, "49484156454f5054 00000007 00000006", true},
	{"option reply", &OptionReplyHeader{Option: OptGo, Type: RepErrUnknown, Length: 9}, &OptionReplyHeader{}, "0003e889045565a9 00000007 80000006 00000009", true},
	{"export name reply", &ExportNameReply{Size: 1 << 20, Flags: FlagHasFlags | FlagReadOnly, NoZeroes: true}, &ExportNameReply{NoZeroes: true}, "0000000000100000 0003", true},
	{"export name reply with zeroes", &ExportNameReply{Size: 1 << 20, Flags: FlagHasFlags | FlagReadOnly}, &ExportNameReply{}, "0000000000100000 0003" + strings.Repeat("00", 124), true},
	{"info request", &InfoRequest{Export: "disk", Infos: []Info{InfoName, InfoBlockSize}}, &InfoRequest{}, "00000004 6469736b 0002 0001 0003", false},
	{"info request, default export", &InfoRequest{Infos: []Info{}}, &InfoRequest{}, "00000000 0000", false},
	{"server", &ServerReply{Name: "disk", Details: "a b"}, &ServerReply{}, "00000004 6469736b 612062", false},
	{"server without details", &ServerReply{Name: "disk"}, &ServerReply{}, "00000004 6469736b", false},
	{"info export", &ExportInfo{Size: 0x0102030405060708, Flags: FlagHasFlags | FlagSendTrim}, &ExportInfo{}, "0000 0102030405060708 0021", false},
	{"info name", &TextInfo{Type: InfoName, Text: "x"}, &TextInfo{}, "0001 78", false},
	{"info description", &TextInfo{Type: InfoDescription, Text: "xy"}, &TextInfo{}, "0002 7879", false},
	{"info block size", &BlockSizeInfo{Minimum: 1, Preferred: 4096, Maximum: 64 << 20}, &BlockSizeInfo{}, "0003 00000001 00001000 04000000", false},
	{"meta context request", &MetaContextRequest{Export: "d", Queries: []string{"base:allocation", "x:"}}, &MetaContextRequest{}, "00000001 64 00000002 0000000f 626173653a616c6c6f636174696f6e 00000002 783a", false},
	{"meta context request, all", &MetaContextRequest{}, &MetaContextRequest{}, "00000000 00000000", false},
	{"meta context", &MetaContextReply{ID: 1, Name: "base:allocation"}, &MetaContextReply{}, "00000001 626173653a616c6c6f636174696f6e", false},
	{"request", &Request{Type: CmdWriteZeroes, Flags: CmdFlagFUA | CmdFlagNoHole, Cookie: 0x1122334455667788, Offset: 0x99aabbccddeeff00, Length: 0xfffffffe}, &Request{}, "25609513 0003 0006 1122334455667788 99aabbccddeeff00 fffffffe", true},
	{"extended request", extended{&Request{Type: CmdWrite, Flags: CmdFlagPayloadLen, Cookie: 1, Offset: 2, Length: 1 << 40}}, extended{&Request{}}, "21e41c71 0020 0001 0000000000000001 0000000000000002 0000010000000000", true},
	{"block status request", &BlockStatusRequest{Length: 1 << 40, ContextIDs: []uint32{1, 9}}, &BlockStatusRequest{}, "0000010000000000 00000001 00000009", false},
	{"simple reply", &SimpleReply{Errno: ENOSPC, Cookie: 0x1122334455667788}, &SimpleReply{}, "67446698 0000001c 1122334455667788", true},
	{"chunk", &ChunkHeader{Flags: ReplyFlagDone, Type: ReplyErrorOffset, Cookie: 7, Length: 14}, &ChunkHeader{}, "668e33ef 0001 8002 0000000000000007 0000000e", true},
	{"extended chunk", extended{&ChunkHeader{Flags: ReplyFlagDone, Type: ReplyBlockStatusExt, Cookie: 7, Offset: 512, Length: 24}}, extended{&ChunkHeader{}}, "6e8a278c 0001 0006 0000000000000007 0000000000000200 0000000000000018", true},
	{"offset data", &OffsetData{Offset: 1 << 33}, &OffsetData{}, "0000000200000000", true},
	{"offset hole", &OffsetHole{Offset: 1 << 33, Length: 512}, &OffsetHole{}, "0000000200000000 00000200", false},
	{"error", &ErrorChunk{Type: ReplyError, Errno: EIO, Msg: "bad"}, &ErrorChunk{Type: ReplyError}, "00000005 0003 626164", false},
	{"error at offset", &ErrorChunk{Type: ReplyErrorOffset, Errno: EOVERFLOW, Offset: 9}, &ErrorChunk{Type: ReplyErrorOffset}, "0000004b 0000 0000000000000009", false},
	{"block status", &BlockStatus{ContextID: 1, Descriptors: []Descriptor{{65536, StateHole | StateZero}, {1, 0}}}, &BlockStatus{}, "00000001 00010000 00000003 00000001 00000000", false},
	{"extended block status", extended{&BlockStatus{ContextID: 1, Descriptors: []Descriptor{{1 << 32, 1 << 63}}}}, extended{&BlockStatus{}}, "00000001 00000001 0000000100000000 8000000000000000", false},
}

func ptr[T any](v T) *T { return &v }

func unhex(t testing.TB, s string) []byte {
	b, err := hex.DecodeString(strings.ReplaceAll(s, " ", ""))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func TestGolden(t *testing.T) {
	for _, g := range golden {
		t.Run(g.name, func(t *testing.T) {
			want := unhex(t, g.bytes)
			if got := g.full.AppendTo(nil); !bytes.Equal(got, want) {
				t.Errorf("AppendTo: got %x, need %x", got, want)
			}
			if got := g.full.AppendTo([]byte("before")); !bytes.Equal(got, append([]byte("before"), want...)) {
				t.Errorf("AppendTo a slice that is not empty: got %x", got)
			}
			if err := g.empty.Decode(want); err != nil {
				t.Fatalf("Decode: %v", err)
			}
			if !reflect.DeepEqual(g.empty, g.full) {
				t.Errorf("Decode: got %+v, need %+v", g.empty, g.full)
			}
		})
	}
}

// TestTruncated cuts each message at every byte. Some stay valid, since their
// last string ends with the message; those must decode to what they say.
func TestTruncated(t *testing.T) {
	mayEnd := map[string]int{"server": 8, "info name": 2, "info description": 2, "meta context": 4, "block status": 12, "block status request": 12}
	for _, g := range golden {
		t.Run(g.name, func(t *testing.T) {
			whole := unhex(t, g.bytes)
			for n := range whole {
				// A copy of its own, so that a read past the end is a fault.
				err := g.empty.Decode(append(make([]byte, 0, n), whole[:n]...))
				if least, ok := mayEnd[g.name]; ok && n >= least && err == nil {
					if got := g.empty.AppendTo(nil); !bytes.Equal(got, whole[:n]) {
						t.Errorf("%d of %d bytes: encodes as %x again", n, len(whole), got)
					}
					continue
				}
				if !errors.Is(err, ErrShort) && !errors.Is(err, ErrLong) && !errors.Is(err, ErrValue) {
					t.Errorf("%d of %d bytes: got error %v", n, len(whole), err)
				}
			}
		})
	}
}

// TestTrailing adds a byte to what must be the whole of a slice.
func TestTrailing(t *testing.T) {
	takesRest := map[string]bool{"server": true, "server without details": true, "info name": true, "info description": true, "meta context": true}
	for _, g := range golden {
		t.Run(g.name, func(t *testing.T) {
			err := g.empty.Decode(append(unhex(t, g.bytes), 'z'))
			if ok := g.fixed || takesRest[g.name]; ok != (err == nil) {
				t.Errorf("got error %v", err)
			}
		})
	}
}

func TestMagic(t *testing.T) {
	magics := map[string][]int{
		"greeting": {0, 7, 8, 15}, "option": {0, 7}, "option reply": {0, 7}, "request": {0, 3},
		"extended request": {0, 3}, "simple reply": {0, 3}, "chunk": {0, 3}, "extended chunk": {0, 3},
	}
	seen := 0
	for _, g := range golden {
		for _, i := range magics[g.name] {
			seen++
			b := unhex(t, g.bytes)
			b[i] ^= 1
			if err := g.empty.Decode(b); !errors.Is(err, ErrMagic) {
				t.Errorf("%s with byte %d changed: got error %v, need ErrMagic", g.name, i, err)
			}
		}
	}
	if seen != 18 {
		t.Errorf("looked at %d bytes, need 18", seen)
	}
}

// TestRefused has bytes that each break one rule.
func TestRefused(t *testing.T) {
	long := strings.Repeat("61", MaxStringLength+1)
	tests := []struct {
		name  string
		m     message
		bytes string
		want  error
	}{
		{"name too long", &InfoRequest{}, "00001001" + long + "0000", ErrString},
		{"name longer than the data", &InfoRequest{}, "00000005 6469736b", ErrShort},
		{"name of 4 GiB", &InfoRequest{}, "ffffffff 6469736b", ErrString},
		{"name with NUL", &InfoRequest{}, "00000003 610062 0000", ErrValue},
		{"more infos than data", &InfoRequest{}, "00000000 ffff 0001", ErrShort},
		{"fewer infos than data", &InfoRequest{}, "00000000 0001 0001 0002", ErrLong},
		{"server's name longer than the data", &ServerReply{}, "00000002 61", ErrShort},
		{"details too long", &ServerReply{}, "00000000" + long, ErrString},
		{"export info of another type", &ExportInfo{}, "0003 0102030405060708 0021", ErrValue},
		{"text of another type", &TextInfo{}, "0000 61", ErrValue},
		{"text too long", &TextInfo{}, "0001" + long, ErrString},
		{"block size of another type", &BlockSizeInfo{}, "0000 00000001 00001000 04000000", ErrValue},
		{"4 Gi queries", &MetaContextRequest{}, "00000000 ffffffff", ErrShort},
		{"one query too many", &MetaContextRequest{}, "00000000 00000002 00000000", ErrShort},
		{"query longer than the data", &MetaContextRequest{}, "00000000 00000001 00000009 61", ErrShort},
		{"context's name too long", &MetaContextReply{}, "00000001" + long, ErrString},
		{"hole of nothing", &OffsetHole{}, "0000000000000000 00000000", ErrValue},
		{"error 0", &ErrorChunk{Type: ReplyError}, "00000000 0000", ErrValue},
		{"text longer than the chunk", &ErrorChunk{Type: ReplyError}, "00000005 0004 616263", ErrShort},
		{"text that overlaps the offset", &ErrorChunk{Type: ReplyErrorOffset}, "00000005 0001 6162636465666768", ErrShort},
		{"context twice", &BlockStatusRequest{}, "0000000000000001 00000001 00000002 00000001", ErrValue},
		{"half a context", &BlockStatusRequest{}, "0000000000000001 00000001 0000", ErrLong},
		{"no context", &BlockStatusRequest{}, "0000000000000001", ErrShort},
		{"no descriptor", &BlockStatus{}, "00000001", ErrShort},
		{"half a descriptor", &BlockStatus{}, "00000001 00000001 00000000 00000001", ErrLong},
		{"run of nothing", &BlockStatus{}, "00000001 00000000 00000000", ErrValue},
		{"wrong count", extended{&BlockStatus{}}, "00000001 00000002 0000000100000000 8000000000000000", ErrValue},
		{"count that overflows", extended{&BlockStatus{}}, "00000001 10000001 0000000100000000 8000000000000000", ErrValue},
	}
	for _, test := range tests {
		if err := test.m.Decode(unhex(t, test.bytes)); !errors.Is(err, test.want) {
			t.Errorf("%s: got error %v, need %v", test.name, err, test.want)
		}
	}
	var many BlockStatus
	if err := many.Decode(bytes.Repeat([]byte{0, 0, 0, 1}, 1+2*(MaxExtents+1))); !errors.Is(err, ErrLong) {
		t.Errorf("%d descriptors: got error %v, need %v", MaxExtents+1, err, ErrLong)
	}
}

// TestUnknownError: a client must cope with types of errors it does not know.
func TestUnknownError(t *testing.T) {
	e := ErrorChunk{Type: 1<<15 + 99}
	if err := e.Decode(unhex(t, "00000005 0001 61 ffffff")); err != nil || e.Errno != EIO || e.Msg != "a" {
		t.Errorf("got %+v, %v", e, err)
	}
}

func TestErrorChunkWireSize(t *testing.T) {
	for _, typ := range []ReplyType{ReplyError, ReplyErrorOffset} {
		for _, n := range []int{0, 1, MaxStringLength, MaxStringLength + 1} {
			e := ErrorChunk{Type: typ, Errno: EIO, Msg: strings.Repeat("a", n)}
			b := e.AppendTo(nil)
			if len(b) != e.WireSize() {
				t.Errorf("%v with %d bytes of text: got %d bytes, WireSize %d", typ, n, len(b), e.WireSize())
			}
			if err := (&ErrorChunk{Type: typ}).Decode(b); err != nil {
				t.Error(err)
			}
		}
	}
}

func TestBlockStatusWireSize(t *testing.T) {
	s := BlockStatus{Descriptors: make([]Descriptor, 3)}
	if got := len(s.AppendTo(nil)); got != s.WireSize() {
		t.Errorf("got %d bytes, WireSize %d", got, s.WireSize())
	}
	if got := len(s.AppendExtendedTo(nil)); got != s.ExtendedWireSize() {
		t.Errorf("got %d bytes, ExtendedWireSize %d", got, s.ExtendedWireSize())
	}
}

func TestReplyMagic(t *testing.T) {
	for _, g := range golden {
		kind, ok := ReplyMagic(unhex(t, g.bytes))
		want, is := map[string]ReplyKind{"simple reply": KindSimple, "chunk": KindChunk, "extended chunk": KindExtendedChunk}[g.name]
		if kind != want || ok != is {
			t.Errorf("%s: got %v, %v", g.name, kind, ok)
		}
		if is && kind.HeaderSize() != len(unhex(t, g.bytes)) {
			t.Errorf("%s: got HeaderSize %d", g.name, kind.HeaderSize())
		}
	}
}

// TestAllocations holds the messages of the data path to none at all.
func TestAllocations(t *testing.T) {
	b := make([]byte, 0, 256)
	n := Negotiated{Size: 1 << 30, Flags: FlagHasFlags, StructuredReplies: true}
	request := (&Request{Type: CmdRead, Length: 4096, Cookie: 1}).AppendTo(nil)
	extendedRequest := (&Request{Type: CmdRead, Length: 4096, Cookie: 1}).AppendExtendedTo(nil)
	tests := map[string]func(){
		"request": func() {
			var r Request
			if r.Decode(request) != nil || n.Validate(&r) != nil || r.PayloadLength(false) != 0 {
				t.Fatal("refused")
			}
		},
		"extended request": func() {
			var r Request
			if r.DecodeExtended(extendedRequest) != nil || n.Validate(&r) != nil {
				t.Fatal("refused")
			}
		},
		"replies": func() {
			s := SimpleReply{Cookie: 1}
			h := ChunkHeader{Cookie: 1, Type: ReplyOffsetData, Flags: ReplyFlagDone, Length: 4104}
			d := OffsetData{Offset: 1}
			b = s.AppendTo(b[:0])
			b = h.AppendTo(b)
			b = h.AppendExtendedTo(b)
			b = d.AppendTo(b)
			if s.Decode(b) != nil || h.Decode(b[16:]) != nil || h.DecodeExtended(b[36:]) != nil || d.Decode(b[68:]) != nil {
				t.Fatal("refused")
			}
		},
	}
	for name, f := range tests {
		if got := testing.AllocsPerRun(100, f); got != 0 {
			t.Errorf("%s: got %v allocations, need 0", name, got)
		}
	}
}
