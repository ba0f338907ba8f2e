package protocol

import (
	"encoding/binary"
	"fmt"
)

const (
	greetingMagic    = 0x4e42444d41474943 // "NBDMAGIC"
	optionMagic      = 0x49484156454f5054 // "IHAVEOPT"
	optionReplyMagic = 0x0003e889045565a9
)

// Sizes in bytes of the handshake's fixed messages.
const (
	GreetingSize          = 18
	ClientFlagsSize       = 4
	OptionHeaderSize      = 16
	OptionReplyHeaderSize = 20
)

// HandshakeFlags are what the server's greeting offers ("Handshake flags").
type HandshakeFlags uint16

// Handshake flags.
const (
	FlagFixedNewstyle HandshakeFlags = 1 << 0
	FlagNoZeroes      HandshakeFlags = 1 << 1
)

// String gives the specification's names, joined by "|", or "0".
func (f HandshakeFlags) String() string {
	return flagNames(uint64(f), []string{"NBD_FLAG_FIXED_NEWSTYLE", "NBD_FLAG_NO_ZEROES"})
}

// ClientFlags are the client's answer to the greeting ("Client flags"). A
// server must close the connection if it does not know one of them.
type ClientFlags uint32

// Client flags.
const (
	FlagCFixedNewstyle ClientFlags = 1 << 0
	FlagCNoZeroes      ClientFlags = 1 << 1
)

// String gives the specification's names, joined by "|", or "0".
func (f ClientFlags) String() string {
	return flagNames(uint64(f), []string{"NBD_FLAG_C_FIXED_NEWSTYLE", "NBD_FLAG_C_NO_ZEROES"})
}

// AppendTo appends the flags as the client sends them.
func (f ClientFlags) AppendTo(b []byte) []byte { return binary.BigEndian.AppendUint32(b, uint32(f)) }

// Decode reads the flags from the start of b. It fails with ErrShort.
func (f *ClientFlags) Decode(b []byte) error {
	if err := need(b, ClientFlagsSize, "client flags"); err != nil {
		return err
	}
	*f = ClientFlags(binary.BigEndian.Uint32(b))
	return nil
}

// Greeting is what the server sends first ("Newstyle negotiation").
type Greeting struct {
	Flags HandshakeFlags
}

// AppendTo appends the greeting.
func (g *Greeting) AppendTo(b []byte) []byte {
	b = binary.BigEndian.AppendUint64(b, greetingMagic)
	b = binary.BigEndian.AppendUint64(b, optionMagic)
	return binary.BigEndian.AppendUint16(b, uint16(g.Flags))
}

// Decode reads a greeting from the start of b. It fails with ErrShort, or with
// ErrMagic if the server is none or an oldstyle one.
func (g *Greeting) Decode(b []byte) error {
	if err := need(b, GreetingSize, "greeting"); err != nil {
		return err
	}
	if got := binary.BigEndian.Uint64(b); got != greetingMagic {
		return fmt.Errorf("decode greeting: got %#x, need %#x: %w", got, uint64(greetingMagic), ErrMagic)
	}
	if got := binary.BigEndian.Uint64(b[8:]); got != optionMagic {
		return fmt.Errorf("decode greeting: got %#x, need %#x, a newstyle server: %w", got, uint64(optionMagic), ErrMagic)
	}
	g.Flags = HandshakeFlags(binary.BigEndian.Uint16(b[16:]))
	return nil
}

// OptionHeader is what a client sends before an option's data.
type OptionHeader struct {
	Option Option
	Length uint32 // of the data that follows, in bytes
}

// AppendTo appends the header.
func (h *OptionHeader) AppendTo(b []byte) []byte {
	b = binary.BigEndian.AppendUint64(b, optionMagic)
	b = binary.BigEndian.AppendUint32(b, uint32(h.Option))
	return binary.BigEndian.AppendUint32(b, h.Length)
}

// Decode reads a header from the start of b. It fails with ErrShort or
// ErrMagic. Length is whatever the client says: hold it against
// MaxOptionLength before reading.
func (h *OptionHeader) Decode(b []byte) error {
	if err := need(b, OptionHeaderSize, "option"); err != nil {
		return err
	}
	if got := binary.BigEndian.Uint64(b); got != optionMagic {
		return fmt.Errorf("decode option: got %#x, need %#x: %w", got, uint64(optionMagic), ErrMagic)
	}
	h.Option = Option(binary.BigEndian.Uint32(b[8:]))
	h.Length = binary.BigEndian.Uint32(b[12:])
	return nil
}

// OptionReplyHeader is what a server sends before an option reply's data
// ("Fixed newstyle negotiation").
type OptionReplyHeader struct {
	Option Option // the one that is answered
	Type   OptionReply
	Length uint32 // of the data that follows, in bytes
}

// AppendTo appends the header.
func (h *OptionReplyHeader) AppendTo(b []byte) []byte {
	b = binary.BigEndian.AppendUint64(b, optionReplyMagic)
	b = binary.BigEndian.AppendUint32(b, uint32(h.Option))
	b = binary.BigEndian.AppendUint32(b, uint32(h.Type))
	return binary.BigEndian.AppendUint32(b, h.Length)
}

// Decode reads a header from the start of b. It fails with ErrShort or
// ErrMagic. Length is whatever the server says: hold it against
// MaxOptionReplyLength before reading.
func (h *OptionReplyHeader) Decode(b []byte) error {
	if err := need(b, OptionReplyHeaderSize, "option reply"); err != nil {
		return err
	}
	if got := binary.BigEndian.Uint64(b); got != optionReplyMagic {
		return fmt.Errorf("decode option reply: got %#x, need %#x: %w", got, uint64(optionReplyMagic), ErrMagic)
	}
	h.Option = Option(binary.BigEndian.Uint32(b[8:]))
	h.Type = OptionReply(binary.BigEndian.Uint32(b[12:]))
	h.Length = binary.BigEndian.Uint32(b[16:])
	return nil
}

// ExportNameReply answers NBD_OPT_EXPORT_NAME and ends the handshake; it has
// no option reply header.
type ExportNameReply struct {
	Size  uint64 // of the export, in bytes
	Flags ExportFlags
	// NoZeroes leaves out the 124 reserved bytes. It is not on the wire: both
	// sides know from the client flags, so set it before Decode, too.
	NoZeroes bool
}

// WireSize is the reply's length in bytes, 10 or 134.
func (e *ExportNameReply) WireSize() int {
	if e.NoZeroes {
		return 10
	}
	return 134
}

// AppendTo appends the reply.
func (e *ExportNameReply) AppendTo(b []byte) []byte {
	b = binary.BigEndian.AppendUint64(b, e.Size)
	b = binary.BigEndian.AppendUint16(b, uint16(e.Flags))
	if !e.NoZeroes {
		b = append(b, make([]byte, 124)...)
	}
	return b
}

// Decode reads a reply of WireSize bytes from the start of b. It fails with
// ErrShort. What the reserved bytes hold does not matter.
func (e *ExportNameReply) Decode(b []byte) error {
	if err := need(b, e.WireSize(), "NBD_OPT_EXPORT_NAME reply"); err != nil {
		return err
	}
	e.Size = binary.BigEndian.Uint64(b)
	e.Flags = ExportFlags(binary.BigEndian.Uint16(b[8:]))
	return nil
}
