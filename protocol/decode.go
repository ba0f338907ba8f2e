package protocol

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
)

// What is wrong with bytes that do not decode. A Decode wraps one of these.
var (
	// ErrShort: a length in the message promises more than there is.
	ErrShort = errors.New("message too short")
	// ErrLong: bytes are left after the end of the message.
	ErrLong = errors.New("message too long")
	// ErrMagic: the peer does not speak NBD, or the two lost step.
	ErrMagic = errors.New("bad magic number")
	// ErrString: a string exceeds MaxStringLength.
	ErrString = errors.New("string too long")
	// ErrValue: a field has a value that it must not have.
	ErrValue = errors.New("bad value")
)

// header checks the size of a message that starts with a 32-bit magic number.
func header(b []byte, size int, magic uint32, what string) error {
	if err := need(b, size, what); err != nil {
		return err
	}
	if got := binary.BigEndian.Uint32(b); got != magic {
		return fmt.Errorf("decode %s: got %#x, need %#x: %w", what, got, magic, ErrMagic)
	}
	return nil
}

func need(b []byte, size int, what string) error {
	if len(b) < size {
		return fmt.Errorf("decode %s: got %d bytes, need %d: %w", what, len(b), size, ErrShort)
	}
	return nil
}

// reader takes fields off the front of a message and remembers the first
// failure, so that a decoder checks once, at its end.
type reader struct {
	b    []byte
	what string
	err  error
}

func (r *reader) take(n int) []byte {
	if r.err == nil {
		r.err = need(r.b, n, r.what)
	}
	if r.err != nil {
		return nil
	}
	b := r.b[:n]
	r.b = r.b[n:]
	return b
}

func (r *reader) uint16() uint16 {
	if b := r.take(2); b != nil {
		return binary.BigEndian.Uint16(b)
	}
	return 0
}

func (r *reader) uint32() uint32 {
	if b := r.take(4); b != nil {
		return binary.BigEndian.Uint32(b)
	}
	return 0
}

func (r *reader) uint64() uint64 {
	if b := r.take(8); b != nil {
		return binary.BigEndian.Uint64(b)
	}
	return 0
}

// string takes a string of n bytes; n comes from the peer. It does not insist on
// UTF-8: a name in another encoding still names the export that has it.
func (r *reader) string(n uint32) string {
	if r.err == nil && n > MaxStringLength {
		r.err = fmt.Errorf("decode %s: got a string of %d bytes, need at most %d: %w", r.what, n, MaxStringLength, ErrString)
	}
	b := r.take(int(n))
	if i := bytes.IndexByte(b, 0); i >= 0 {
		r.err = fmt.Errorf("decode %s: got a NUL at byte %d of a string, need none: %w", r.what, i, ErrValue)
	}
	return string(b)
}

// rest takes a string that ends with the message.
func (r *reader) rest() string {
	return r.string(uint32(min(len(r.b), MaxStringLength+1)))
}

// done reports the first failure, or what is left over.
func (r *reader) done() error {
	if r.err == nil && len(r.b) > 0 {
		r.err = fmt.Errorf("decode %s: got %d bytes after its end, need 0: %w", r.what, len(r.b), ErrLong)
	}
	return r.err
}

func appendString(b []byte, s string) []byte {
	b = binary.BigEndian.AppendUint32(b, uint32(len(s)))
	return append(b, s...)
}
