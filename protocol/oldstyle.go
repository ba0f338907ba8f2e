package protocol

import "encoding/binary"

const oldstyleMagic = 0x00420281861253

// OldstyleGreetingSize is the size in bytes of the whole oldstyle handshake.
const OldstyleGreetingSize = 152

// OldstyleGreeting is all that an oldstyle server says before the transmission
// phase ("Oldstyle negotiation"). The client says nothing.
type OldstyleGreeting struct {
	Size  uint64
	Flags ExportFlags
}

// AppendTo appends the greeting.
func (g *OldstyleGreeting) AppendTo(b []byte) []byte {
	b = binary.BigEndian.AppendUint64(b, greetingMagic)
	b = binary.BigEndian.AppendUint64(b, oldstyleMagic)
	b = binary.BigEndian.AppendUint64(b, g.Size)
	b = binary.BigEndian.AppendUint32(b, uint32(g.Flags))
	return append(b, make([]byte, 124)...)
}
