package protocol

import (
	"encoding/binary"
	"fmt"
)

// Option is what a client asks in the handshake ("Option types").
type Option uint32

// Options.
const (
	OptExportName      Option = 1
	OptAbort           Option = 2
	OptList            Option = 3
	OptPeekExport      Option = 4 // withdrawn
	OptStartTLS        Option = 5
	OptInfo            Option = 6
	OptGo              Option = 7
	OptStructuredReply Option = 8
	OptListMetaContext Option = 9
	OptSetMetaContext  Option = 10
	OptExtendedHeaders Option = 11
)

var optionNames = map[Option]string{
	OptExportName:      "NBD_OPT_EXPORT_NAME",
	OptAbort:           "NBD_OPT_ABORT",
	OptList:            "NBD_OPT_LIST",
	OptPeekExport:      "NBD_OPT_PEEK_EXPORT",
	OptStartTLS:        "NBD_OPT_STARTTLS",
	OptInfo:            "NBD_OPT_INFO",
	OptGo:              "NBD_OPT_GO",
	OptStructuredReply: "NBD_OPT_STRUCTURED_REPLY",
	OptListMetaContext: "NBD_OPT_LIST_META_CONTEXT",
	OptSetMetaContext:  "NBD_OPT_SET_META_CONTEXT",
	OptExtendedHeaders: "NBD_OPT_EXTENDED_HEADERS",
}

// String gives the specification's name, such as NBD_OPT_GO.
func (o Option) String() string { return valueName(o, optionNames, "NBD_OPT") }

// OptionReply is the type of an answer to an option ("Option reply types").
type OptionReply uint32

// Option replies.
const (
	RepAck         OptionReply = 1
	RepServer      OptionReply = 2
	RepInfo        OptionReply = 3
	RepMetaContext OptionReply = 4

	RepErrUnsup         OptionReply = 1<<31 + 1
	RepErrPolicy        OptionReply = 1<<31 + 2
	RepErrInvalid       OptionReply = 1<<31 + 3
	RepErrPlatform      OptionReply = 1<<31 + 4
	RepErrTLSReqd       OptionReply = 1<<31 + 5
	RepErrUnknown       OptionReply = 1<<31 + 6
	RepErrShutdown      OptionReply = 1<<31 + 7
	RepErrBlockSizeReqd OptionReply = 1<<31 + 8
	RepErrTooBig        OptionReply = 1<<31 + 9
	RepErrExtHeaderReqd OptionReply = 1<<31 + 10
)

var optionReplyNames = map[OptionReply]string{
	RepAck:              "NBD_REP_ACK",
	RepServer:           "NBD_REP_SERVER",
	RepInfo:             "NBD_REP_INFO",
	RepMetaContext:      "NBD_REP_META_CONTEXT",
	RepErrUnsup:         "NBD_REP_ERR_UNSUP",
	RepErrPolicy:        "NBD_REP_ERR_POLICY",
	RepErrInvalid:       "NBD_REP_ERR_INVALID",
	RepErrPlatform:      "NBD_REP_ERR_PLATFORM",
	RepErrTLSReqd:       "NBD_REP_ERR_TLS_REQD",
	RepErrUnknown:       "NBD_REP_ERR_UNKNOWN",
	RepErrShutdown:      "NBD_REP_ERR_SHUTDOWN",
	RepErrBlockSizeReqd: "NBD_REP_ERR_BLOCK_SIZE_REQD",
	RepErrTooBig:        "NBD_REP_ERR_TOO_BIG",
	RepErrExtHeaderReqd: "NBD_REP_ERR_EXT_HEADER_REQD",
}

// String gives the specification's name, such as NBD_REP_ACK.
func (t OptionReply) String() string { return valueName(t, optionReplyNames, "NBD_REP") }

// IsError tells an error, whose data is a text for people, from an answer.
func (t OptionReply) IsError() bool { return t&(1<<31) != 0 }

// Info is a kind of information about an export ("NBD_REP_INFO").
type Info uint16

// Kinds of information.
const (
	InfoExport      Info = 0
	InfoName        Info = 1
	InfoDescription Info = 2
	InfoBlockSize   Info = 3
)

var infoNames = map[Info]string{
	InfoExport:      "NBD_INFO_EXPORT",
	InfoName:        "NBD_INFO_NAME",
	InfoDescription: "NBD_INFO_DESCRIPTION",
	InfoBlockSize:   "NBD_INFO_BLOCK_SIZE",
}

// String gives the specification's name, such as NBD_INFO_EXPORT.
func (i Info) String() string { return valueName(i, infoNames, "NBD_INFO") }

// InfoRequest is the data of NBD_OPT_INFO and NBD_OPT_GO.
type InfoRequest struct {
	Export string // empty asks for the default export
	Infos  []Info // wanted besides InfoExport, which is always sent
}

// AppendTo appends the data. At most 65535 Infos fit.
func (q *InfoRequest) AppendTo(b []byte) []byte {
	b = appendString(b, q.Export)
	b = binary.BigEndian.AppendUint16(b, uint16(len(q.Infos)))
	for _, i := range q.Infos {
		b = binary.BigEndian.AppendUint16(b, uint16(i))
	}
	return b
}

// Decode reads the data, which is all of b. It fails with ErrShort, ErrLong,
// ErrString or ErrValue.
func (q *InfoRequest) Decode(b []byte) error {
	r := reader{b: b, what: "information request"}
	q.Export = r.string(r.uint32())
	data := r.take(2 * int(r.uint16()))
	if err := r.done(); err != nil {
		return err
	}
	q.Infos = make([]Info, len(data)/2)
	for i := range q.Infos {
		q.Infos[i] = Info(binary.BigEndian.Uint16(data[2*i:]))
	}
	return nil
}

// ServerReply is the data of NBD_REP_SERVER, one export of a list.
type ServerReply struct {
	Name    string
	Details string // a description for people, may be empty
}

// AppendTo appends the data.
func (s *ServerReply) AppendTo(b []byte) []byte {
	return append(appendString(b, s.Name), s.Details...)
}

// Decode reads the data, which is all of b. It fails with ErrShort, ErrString
// or ErrValue.
func (s *ServerReply) Decode(b []byte) error {
	r := reader{b: b, what: "NBD_REP_SERVER"}
	s.Name = r.string(r.uint32())
	s.Details = r.rest()
	return r.done()
}

// InfoType tells which kind of information the data of an NBD_REP_INFO holds,
// and so which type decodes it: ExportInfo, TextInfo or BlockSizeInfo. A client
// ignores kinds that it does not know. It fails with ErrShort.
func InfoType(b []byte) (Info, error) {
	if err := need(b, 2, "NBD_REP_INFO"); err != nil {
		return 0, err
	}
	return Info(binary.BigEndian.Uint16(b)), nil
}

// infoReader starts on the data of an NBD_REP_INFO of a kind.
func infoReader(b []byte, want Info) reader {
	r := reader{b: b, what: "NBD_REP_INFO"}
	if got := Info(r.uint16()); r.err == nil && got != want {
		r.err = fmt.Errorf("decode NBD_REP_INFO: got %v, need %v: %w", got, want, ErrValue)
	}
	return r
}

// ExportInfo is the data of an NBD_REP_INFO with NBD_INFO_EXPORT.
type ExportInfo struct {
	Size  uint64 // in bytes
	Flags ExportFlags
}

// AppendTo appends the data.
func (e *ExportInfo) AppendTo(b []byte) []byte {
	b = binary.BigEndian.AppendUint16(b, uint16(InfoExport))
	b = binary.BigEndian.AppendUint64(b, e.Size)
	return binary.BigEndian.AppendUint16(b, uint16(e.Flags))
}

// Decode reads the data, which is all of b. It fails with ErrShort, ErrLong or
// ErrValue.
func (e *ExportInfo) Decode(b []byte) error {
	r := infoReader(b, InfoExport)
	e.Size = r.uint64()
	e.Flags = ExportFlags(r.uint16())
	return r.done()
}

// TextInfo is the data of an NBD_REP_INFO with NBD_INFO_NAME or
// NBD_INFO_DESCRIPTION.
type TextInfo struct {
	Type Info // one of the two
	Text string
}

// AppendTo appends the data.
func (t *TextInfo) AppendTo(b []byte) []byte {
	return append(binary.BigEndian.AppendUint16(b, uint16(t.Type)), t.Text...)
}

// Decode reads the data, which is all of b. It fails with ErrShort, ErrString
// or ErrValue.
func (t *TextInfo) Decode(b []byte) error {
	r := reader{b: b, what: "NBD_REP_INFO"}
	t.Type = Info(r.uint16())
	if r.err == nil && t.Type != InfoName && t.Type != InfoDescription {
		return fmt.Errorf("decode NBD_REP_INFO: got %v, need %v or %v: %w", t.Type, InfoName, InfoDescription, ErrValue)
	}
	t.Text = r.rest()
	return r.done()
}

// BlockSizeInfo is the data of an NBD_REP_INFO with NBD_INFO_BLOCK_SIZE
// ("Block size constraints"). All are in bytes.
type BlockSizeInfo struct {
	Minimum   uint32 // requests are aligned to this, a power of 2
	Preferred uint32 // a power of 2, at least Minimum
	Maximum   uint32 // of a read's or a write's payload
}

// AppendTo appends the data.
func (s *BlockSizeInfo) AppendTo(b []byte) []byte {
	b = binary.BigEndian.AppendUint16(b, uint16(InfoBlockSize))
	b = binary.BigEndian.AppendUint32(b, s.Minimum)
	b = binary.BigEndian.AppendUint32(b, s.Preferred)
	return binary.BigEndian.AppendUint32(b, s.Maximum)
}

// Decode reads the data, which is all of b. It fails with ErrShort, ErrLong or
// ErrValue, and leaves it to the client whether the sizes make sense.
func (s *BlockSizeInfo) Decode(b []byte) error {
	r := infoReader(b, InfoBlockSize)
	s.Minimum = r.uint32()
	s.Preferred = r.uint32()
	s.Maximum = r.uint32()
	return r.done()
}
