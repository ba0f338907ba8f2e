package tests

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"syscall"
	"testing"

	"nbdhost/protocol"
)

// A raw is a connection whose every byte the test decides. It has no logic of
// the client package, so that the two do not share a mistake.
type raw struct {
	t testing.TB
	net.Conn
	r *bufio.Reader
	// reads has the length of each NBD_CMD_READ by its cookie: a simple reply
	// does not say how much data follows.
	reads map[uint64]int
	// partial has by its cookie what came of a reply that goes on.
	partial map[uint64]reply
	// flags and size are the export's, after hello.
	flags protocol.ExportFlags
	size  uint64
}

func (s *server) raw() *raw {
	s.t.Helper()
	c := s.dial()
	return newRaw(s.t, c, c)
}

// newRaw speaks on c and listens to r.
func newRaw(t testing.TB, c net.Conn, r io.Reader) *raw {
	return &raw{t: t, Conn: c, r: bufio.NewReader(r), reads: map[uint64]int{}, partial: map[uint64]reply{}}
}

// hello shakes hands for the default export, with or without structured replies
// and base:allocation.
func (s *server) hello(structured bool) *raw {
	s.t.Helper()
	c := s.raw()
	c.take(protocol.GreetingSize)
	c.write(clientFlags(protocol.FlagCFixedNewstyle | protocol.FlagCNoZeroes))
	if structured {
		c.write(option(protocol.OptStructuredReply, nil))
		c.wantOption(protocol.OptStructuredReply, protocol.RepAck)
		c.write(option(protocol.OptSetMetaContext, metaQuery("", protocol.ContextBaseAllocation)))
		c.wantOption(protocol.OptSetMetaContext, protocol.RepMetaContext)
		c.wantOption(protocol.OptSetMetaContext, protocol.RepAck)
	}
	c.write(option(protocol.OptGo, infoRequest("")))
	for {
		h, data := c.optionReply()
		switch h.Type {
		case protocol.RepInfo:
			if info, _ := protocol.InfoType(data); info == protocol.InfoExport {
				c.size = binary.BigEndian.Uint64(data[2:])
				c.flags = protocol.ExportFlags(binary.BigEndian.Uint16(data[10:]))
			}
		case protocol.RepAck:
			return c
		default:
			c.t.Fatalf("answer to NBD_OPT_GO: got %v %q", h.Type, data)
		}
	}
}

func (c *raw) write(b []byte) {
	c.t.Helper()
	if _, err := c.Write(b); err != nil {
		c.t.Fatalf("write to server: %v", err)
	}
}

// take reads n bytes that must be there.
func (c *raw) take(n int) []byte {
	c.t.Helper()
	b := make([]byte, n)
	if _, err := io.ReadFull(c.r, b); err != nil {
		c.t.Fatalf("read %d bytes from server: %v", n, err)
	}
	return b
}

// wantEOF wants the server to close the connection without another byte.
func (c *raw) wantEOF() {
	c.t.Helper()
	b := make([]byte, 64)
	n, err := c.r.Read(b)
	if n > 0 || !closed(err) {
		c.t.Fatalf("read from server: got %x, %v, want a closed connection", b[:n], err)
	}
}

// closed: a server that closes with bytes of ours unread resets the connection.
func closed(err error) bool {
	return errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EPIPE)
}

func (c *raw) optionReply() (h protocol.OptionReplyHeader, data []byte) {
	c.t.Helper()
	if err := h.Decode(c.take(protocol.OptionReplyHeaderSize)); err != nil {
		c.t.Fatal(err)
	}
	if h.Length > 64<<10 {
		c.t.Fatalf("option reply: got %d bytes", h.Length)
	}
	return h, c.take(int(h.Length))
}

func (c *raw) wantOption(option protocol.Option, want protocol.OptionReply) []byte {
	c.t.Helper()
	h, data := c.optionReply()
	if h.Option != option || h.Type != want {
		c.t.Fatalf("answer to %v: got %v %q, want %v", option, h.Type, data, want)
	}
	return data
}

// send sends a request, and the payload if there is one.
func (c *raw) send(r protocol.Request, payload ...byte) {
	c.t.Helper()
	delete(c.reads, r.Cookie)
	if r.Type == protocol.CmdRead {
		c.reads[r.Cookie] = int(r.Length)
	}
	c.write(append(r.AppendTo(nil), payload...))
}

func (c *raw) read(cookie, offset uint64, length int) {
	c.t.Helper()
	c.send(protocol.Request{Type: protocol.CmdRead, Cookie: cookie, Offset: offset, Length: uint64(length)})
}

func (c *raw) pwrite(cookie, offset uint64, payload ...byte) {
	c.t.Helper()
	c.send(protocol.Request{Type: protocol.CmdWrite, Cookie: cookie, Offset: offset, Length: uint64(len(payload))}, payload...)
}

func (c *raw) disc() {
	c.t.Helper()
	c.send(protocol.Request{Type: protocol.CmdDisc, Cookie: 0xd15c})
}

// A reply is one whole reply, whatever its form.
type reply struct {
	cookie uint64
	errno  protocol.Errno
	msg    string // of a structured error
	data   []byte // of a read
}

func (r reply) String() string {
	return fmt.Sprintf("cookie %d: %v %q, %d bytes", r.cookie, r.errno, r.msg, len(r.data))
}

// next reads until one reply is whole. Chunks of others may come in between
// ("Structured reply chunk message").
func (c *raw) next() (r reply) {
	c.t.Helper()
	r, err := c.nextReply()
	if err != nil {
		c.t.Fatalf("read reply: %v", err)
	}
	return r
}

func (c *raw) nextReply() (r reply, err error) {
	for {
		magic, err := c.r.Peek(4)
		if err != nil {
			return r, err
		}
		kind, ok := protocol.ReplyMagic(magic)
		if !ok || kind == protocol.KindExtendedChunk {
			return r, fmt.Errorf("got magic %x", magic)
		}
		header := make([]byte, kind.HeaderSize())
		if _, err := io.ReadFull(c.r, header); err != nil {
			return r, err
		}
		if kind == protocol.KindSimple {
			var s protocol.SimpleReply
			if err := s.Decode(header); err != nil {
				return r, err
			}
			r.cookie, r.errno = s.Cookie, s.Errno
			if s.Errno == 0 {
				r.data = make([]byte, c.reads[s.Cookie])
				_, err = io.ReadFull(c.r, r.data)
			}
			return r, err
		}
		var h protocol.ChunkHeader
		if err := h.Decode(header); err != nil {
			return r, err
		}
		if h.Length > 65<<20 {
			return r, fmt.Errorf("got a chunk of %d bytes", h.Length)
		}
		data := make([]byte, h.Length)
		if _, err := io.ReadFull(c.r, data); err != nil {
			return r, err
		}
		r = c.partial[h.Cookie]
		r.cookie = h.Cookie
		switch {
		case h.Type.IsError():
			chunk := protocol.ErrorChunk{Type: h.Type}
			if err := chunk.Decode(data); err != nil {
				return r, err
			}
			r.errno, r.msg = chunk.Errno, chunk.Msg
		case h.Type == protocol.ReplyOffsetData:
			r.data = append(r.data, data[8:]...)
		case h.Type == protocol.ReplyOffsetHole:
			r.data = append(r.data, make([]byte, binary.BigEndian.Uint32(data[8:]))...)
		case h.Type == protocol.ReplyBlockStatus:
			r.data = append(r.data, data[4:]...)
		}
		if h.Flags&protocol.ReplyFlagDone != 0 {
			delete(c.partial, h.Cookie)
			return r, nil
		}
		c.partial[h.Cookie] = r
	}
}

// want wants the next reply to be this one.
func (c *raw) want(cookie uint64, errno protocol.Errno) reply {
	c.t.Helper()
	r := c.next()
	if r.cookie != cookie || r.errno != errno {
		c.t.Fatalf("reply: got %v, want cookie %d: %v", r, cookie, errno)
	}
	return r
}

func clientFlags(f protocol.ClientFlags) []byte { return f.AppendTo(nil) }

func option(o protocol.Option, data []byte) []byte {
	h := protocol.OptionHeader{Option: o, Length: uint32(len(data))}
	return append(h.AppendTo(nil), data...)
}

func infoRequest(export string, infos ...protocol.Info) []byte {
	q := protocol.InfoRequest{Export: export, Infos: infos}
	return q.AppendTo(nil)
}

func metaQuery(export string, queries ...string) []byte {
	q := protocol.MetaContextRequest{Export: export, Queries: queries}
	return q.AppendTo(nil)
}
