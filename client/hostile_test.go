package client

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"math"
	"net"
	"strings"
	"syscall"
	"testing"

	"nbdhost/protocol"
)

// welcome is the server's part of a handshake with structured replies and
// base:allocation as context 1, for an export of 1 MiB. It returns the first
// request; a write's data is not taken.
func welcome(t testing.TB, nc net.Conn) protocol.Request {
	nc.Write((&protocol.Greeting{Flags: protocol.FlagFixedNewstyle | protocol.FlagNoZeroes}).AppendTo(nil))
	io.ReadFull(nc, make([]byte, protocol.ClientFlagsSize))
	for {
		b := make([]byte, protocol.OptionHeaderSize)
		var h protocol.OptionHeader
		if _, err := io.ReadFull(nc, b); err != nil || h.Decode(b) != nil {
			return protocol.Request{}
		}
		io.ReadFull(nc, make([]byte, h.Length))
		switch h.Option {
		case protocol.OptExtendedHeaders:
			nc.Write(optionReply(h.Option, protocol.RepErrUnsup, nil))
			continue
		case protocol.OptSetMetaContext:
			m := protocol.MetaContextReply{ID: 1, Name: protocol.ContextBaseAllocation}
			nc.Write(optionReply(h.Option, protocol.RepMetaContext, m.AppendTo(nil)))
		case protocol.OptGo:
			e := protocol.ExportInfo{Size: 1 << 20, Flags: protocol.FlagHasFlags}
			nc.Write(optionReply(h.Option, protocol.RepInfo, e.AppendTo(nil)))
		}
		nc.Write(optionReply(h.Option, protocol.RepAck, nil))
		if h.Option == protocol.OptGo {
			break
		}
	}
	b := make([]byte, protocol.RequestSize)
	var r protocol.Request
	if _, err := io.ReadFull(nc, b); err == nil {
		if err := r.Decode(b); err != nil {
			t.Error(err)
		}
	}
	return r
}

func optionReply(opt protocol.Option, typ protocol.OptionReply, data []byte) []byte {
	h := protocol.OptionReplyHeader{Option: opt, Type: typ, Length: uint32(len(data))}
	return append(h.AppendTo(nil), data...)
}

func chunk(cookie uint64, flags protocol.ReplyFlags, typ protocol.ReplyType, data []byte) []byte {
	h := protocol.ChunkHeader{Cookie: cookie, Flags: flags, Type: typ, Length: uint64(len(data))}
	return append(h.AppendTo(nil), data...)
}

func offsetData(off uint64, data string) []byte {
	return append((&protocol.OffsetData{Offset: off}).AppendTo(nil), data...)
}

func hole(off uint64, n uint32) []byte {
	return (&protocol.OffsetHole{Offset: off, Length: n}).AppendTo(nil)
}

func status(id uint32, lengths ...uint64) []byte {
	s := protocol.BlockStatus{ContextID: id}
	for _, n := range lengths {
		s.Descriptors = append(s.Descriptors, protocol.Descriptor{Length: n})
	}
	return s.AppendTo(nil)
}

const done = protocol.ReplyFlagDone

// TestRead puts a read of "abcdef" at 100 together from pieces, and refuses
// pieces that do not fit.
func TestRead(t *testing.T) {
	data, holes, none := protocol.ReplyOffsetData, protocol.ReplyOffsetHole, protocol.ReplyNone
	tests := []struct {
		name  string
		flags protocol.CommandFlags
		reply func(k uint64) [][]byte
		want  string // what was read, or
		says  string // what the error says
	}{
		{"whole", 0, func(k uint64) [][]byte { return [][]byte{chunk(k, done, data, offsetData(100, "abcdef"))} }, "abcdef", ""},
		{"out of order", 0, func(k uint64) [][]byte {
			return [][]byte{chunk(k, 0, data, offsetData(103, "def")), chunk(k, 0, data, offsetData(100, "abc")), chunk(k, done, none, nil)}
		}, "abcdef", ""},
		{"with a hole", 0, func(k uint64) [][]byte {
			return [][]byte{chunk(k, 0, data, offsetData(100, "ab")), chunk(k, 0, holes, hole(102, 3)), chunk(k, done, data, offsetData(105, "f"))}
		}, "ab\x00\x00\x00f", ""},
		{"in one piece", protocol.CmdFlagDF, func(k uint64) [][]byte {
			return [][]byte{chunk(k, 0, data, offsetData(100, "abcdef")), chunk(k, done, none, nil)}
		}, "abcdef", ""},
		{"not in one piece", protocol.CmdFlagDF, func(k uint64) [][]byte {
			return [][]byte{chunk(k, 0, data, offsetData(100, "abc")), chunk(k, done, data, offsetData(103, "def"))}
		}, "", "second piece"},
		{"missing end", 0, func(k uint64) [][]byte { return [][]byte{chunk(k, done, data, offsetData(100, "abcde"))} }, "", "5 bytes of a read, need 6"},
		{"missing middle", 0, func(k uint64) [][]byte {
			return [][]byte{chunk(k, 0, data, offsetData(100, "ab")), chunk(k, done, data, offsetData(103, "def"))}
		}, "", "do not join at byte 2"},
		{"overlap that hides a gap", 0, func(k uint64) [][]byte {
			return [][]byte{chunk(k, 0, data, offsetData(100, "abc")), chunk(k, done, data, offsetData(101, "bcd"))}
		}, "", "do not join"},
		{"nothing", 0, func(k uint64) [][]byte { return [][]byte{chunk(k, done, none, nil)} }, "", "0 bytes of a read, need 6"},
		{"too much", 0, func(k uint64) [][]byte { return [][]byte{chunk(k, done, data, offsetData(100, "abcdefg"))} }, "", "got 7 bytes at 100"},
		{"before", 0, func(k uint64) [][]byte { return [][]byte{chunk(k, done, data, offsetData(99, "a"))} }, "", "got 1 bytes at 99"},
		{"behind", 0, func(k uint64) [][]byte { return [][]byte{chunk(k, done, data, offsetData(106, "a"))} }, "", "got 1 bytes at 106"},
		{"far behind", 0, func(k uint64) [][]byte { return [][]byte{chunk(k, done, data, offsetData(1<<64-1, "a"))} }, "", "got 1 bytes at 18446744073709551615"},
		{"twice", 0, func(k uint64) [][]byte {
			return [][]byte{chunk(k, 0, data, offsetData(100, "abcdef")), chunk(k, done, data, offsetData(100, "a"))}
		}, "", "6 had come"},
		{"piece of nothing", 0, func(k uint64) [][]byte { return [][]byte{chunk(k, done, data, offsetData(100, ""))} }, "", "more than 8"},
		{"hole of 4 GiB", 0, func(k uint64) [][]byte { return [][]byte{chunk(k, done, holes, hole(100, 1<<32-1))} }, "", "got 4294967295 bytes"},
		{"hole of nothing", 0, func(k uint64) [][]byte { return [][]byte{chunk(k, done, holes, hole(100, 0))} }, "", "length 0"},
		{"long hole chunk", 0, func(k uint64) [][]byte { return [][]byte{chunk(k, done, holes, make([]byte, 13))} }, "", "at most 12"},
		{"none that is not done", 0, func(k uint64) [][]byte { return [][]byte{chunk(k, 0, none, nil)} }, "", "NBD_REPLY_FLAG_DONE"},
		{"none with data", 0, func(k uint64) [][]byte { return [][]byte{chunk(k, done, none, []byte("a"))} }, "", "need 0 bytes"},
		{"unknown type", 0, func(k uint64) [][]byte { return [][]byte{chunk(k, done, 77, nil)} }, "", "NBD_REPLY_TYPE(77)"},
		{"status", 0, func(k uint64) [][]byte { return [][]byte{chunk(k, done, protocol.ReplyBlockStatus, status(1, 6))} }, "", "in reply to NBD_CMD_READ"},
		{"simple reply", 0, func(k uint64) [][]byte { return [][]byte{(&protocol.SimpleReply{Cookie: k}).AppendTo(nil)} }, "", "need a structured one"},
		{"unknown cookie", 0, func(k uint64) [][]byte { return [][]byte{chunk(k+1, done, none, nil)} }, "", "no command in flight"},
		{"cookie 0", 0, func(k uint64) [][]byte { return [][]byte{chunk(0, done, none, nil)} }, "", "no command in flight"},
		{"huge error", 0, func(k uint64) [][]byte {
			h := protocol.ChunkHeader{Cookie: k, Flags: done, Type: protocol.ReplyError, Length: 1<<32 - 1}
			return [][]byte{h.AppendTo(nil)}
		}, "", "4294967295 bytes"},
		{"error 0", 0, func(k uint64) [][]byte { return [][]byte{chunk(k, done, protocol.ReplyError, make([]byte, 6))} }, "", "error 0"},
		{"unknown error", 0, func(k uint64) [][]byte {
			return [][]byte{chunk(k, done, 1<<15+9, []byte{0, 0, 0, 5, 0, 1, 'x', 1, 2, 3})}
		}, "", "NBD_EIO: x"},
		{"error, then data, then done", 0, func(k uint64) [][]byte {
			e := protocol.ErrorChunk{Type: protocol.ReplyErrorOffset, Errno: protocol.EIO, Msg: "here", Offset: 103}
			return [][]byte{chunk(k, 0, e.Type, e.AppendTo(nil)), chunk(k, 0, data, offsetData(100, "abc")), chunk(k, done, none, nil)}
		}, "", "NBD_EIO: here"},
		{"extended header", 0, func(k uint64) [][]byte {
			return [][]byte{(&protocol.ChunkHeader{Cookie: k, Flags: done}).AppendExtendedTo(nil)}
		}, "", "magic"},
		{"junk", 0, func(k uint64) [][]byte { return [][]byte{[]byte("HTTP/1.1 400 Bad Request\r\n")} }, "", "magic"},
		{"cut short", 0, func(k uint64) [][]byte { return [][]byte{chunk(k, done, data, offsetData(100, "abcdef"))[:30]} }, "", "unexpected EOF"},
		{"closed", 0, func(k uint64) [][]byte { return nil }, "", "EOF"},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			nc := script(t, func(nc net.Conn) {
				r := welcome(t, nc)
				nc.Write(bytes.Join(test.reply(r.Cookie), nil))
			})
			c, err := New(context.Background(), nc, nil)
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			p := make([]byte, 6)
			err = c.wait(func(f Completion) (uint64, error) { return c.AioPread(p, 100, test.flags, f) })
			if test.says != "" {
				if err == nil || !strings.Contains(err.Error(), test.says) {
					t.Errorf("got %v, need it to say %q", err, test.says)
				}
			} else if err != nil || string(p) != test.want {
				t.Errorf("got %q, %v", p, err)
			}
		})
	}
}

// TestSecondReply: a command that was answered is no longer in flight, even if
// it is not retired.
func TestSecondReply(t *testing.T) {
	nc := script(t, func(nc net.Conn) {
		r := welcome(t, nc)
		s := protocol.SimpleReply{Cookie: r.Cookie}
		nc.Write(s.AppendTo(s.AppendTo(nil)))
	})
	c, err := New(context.Background(), nc, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	calls := make(chan error, 2)
	cookie, err := c.AioFlush(0, func(err error) int { calls <- err; return 0 })
	if err != nil {
		t.Fatal(err)
	}
	<-c.Done()
	if err := <-calls; err != nil || len(calls) != 0 {
		t.Errorf("got %v and %d more completions", err, len(calls))
	}
	if completed, err := c.AioCommandCompleted(cookie); !completed || err != nil {
		t.Errorf("got %v, %v", completed, err)
	}
	if _, err := c.AioFlush(0, nil); err == nil || !strings.Contains(err.Error(), "no command in flight") {
		t.Errorf("issue afterwards: got %v", err)
	}
}

func TestBlockStatus(t *testing.T) {
	typ := protocol.ReplyBlockStatus
	tests := []struct {
		name  string
		flags protocol.CommandFlags
		reply func(k uint64) [][]byte
		says  string
	}{
		{"one", 0, func(k uint64) [][]byte { return [][]byte{chunk(k, done, typ, status(1, 512))} }, ""},
		{"less than asked for", 0, func(k uint64) [][]byte { return [][]byte{chunk(k, done, typ, status(1, 1))} }, ""},
		{"last goes on", 0, func(k uint64) [][]byte { return [][]byte{chunk(k, done, typ, status(1, 511, 512))} }, ""},
		{"one too many", 0, func(k uint64) [][]byte { return [][]byte{chunk(k, done, typ, status(1, 512, 1))} }, "past the 512"},
		{"only one", protocol.CmdFlagReqOne, func(k uint64) [][]byte { return [][]byte{chunk(k, done, typ, status(1, 512))} }, ""},
		{"not only one", protocol.CmdFlagReqOne, func(k uint64) [][]byte { return [][]byte{chunk(k, done, typ, status(1, 1, 1))} }, "need one run"},
		{"unknown context", 0, func(k uint64) [][]byte { return [][]byte{chunk(k, done, typ, status(2, 512))} }, "context 2"},
		{"twice", 0, func(k uint64) [][]byte {
			return [][]byte{chunk(k, 0, typ, status(1, 512)), chunk(k, done, typ, status(1, 512))}
		}, "had come already"},
		{"none", 0, func(k uint64) [][]byte { return [][]byte{chunk(k, done, protocol.ReplyNone, nil)} }, "block status of 0 contexts"},
		{"empty", 0, func(k uint64) [][]byte { return [][]byte{chunk(k, done, typ, status(1))} }, "no descriptor"},
		{"too long", 0, func(k uint64) [][]byte {
			h := protocol.ChunkHeader{Cookie: k, Flags: done, Type: typ, Length: 4 + 8*(protocol.MaxExtents+1)}
			return [][]byte{h.AppendTo(nil)}
		}, "at most"},
		{"simple reply", 0, func(k uint64) [][]byte { return [][]byte{(&protocol.SimpleReply{Cookie: k}).AppendTo(nil)} }, "need a structured one"},
		{"simple error", 0, func(k uint64) [][]byte {
			return [][]byte{(&protocol.SimpleReply{Cookie: k, Errno: protocol.EIO}).AppendTo(nil)}
		}, "NBD_EIO"},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			nc := script(t, func(nc net.Conn) {
				r := welcome(t, nc)
				nc.Write(bytes.Join(test.reply(r.Cookie), nil))
			})
			c, err := New(context.Background(), nc, nil)
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			got, err := c.BlockStatus(512, 0, test.flags)
			if test.says == "" && (err != nil || len(got[protocol.ContextBaseAllocation]) == 0) ||
				test.says != "" && (err == nil || !strings.Contains(err.Error(), test.says)) {
				t.Errorf("got %v, %v, need it to say %q", got, err, test.says)
			}
		})
	}
}

// TestEarlyReply: a server may refuse a write before it has read the data, and
// the buffer is still the connection's until all is sent.
func TestEarlyReply(t *testing.T) {
	issued, flushed := make(chan uint64, 1), make(chan struct{})
	nc := script(t, func(nc net.Conn) {
		r := welcome(t, nc)
		cookie := <-issued
		io.ReadFull(nc, make([]byte, protocol.RequestSize)) // of the write; not its payload
		nc.Write((&protocol.SimpleReply{Cookie: cookie, Errno: protocol.EPERM}).AppendTo(nil))
		nc.Write((&protocol.SimpleReply{Cookie: r.Cookie}).AppendTo(nil))
		<-flushed
	})
	c, err := New(context.Background(), nc, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	completed := make(chan error, 1)
	early := make(chan bool, 1)
	if _, err := c.AioFlush(0, func(error) int { early <- len(completed) > 0; return 1 }); err != nil {
		t.Fatal(err)
	}
	// Much more than a socket holds.
	cookie, err := c.AioPwrite(make([]byte, 32<<20), 0, 0, func(err error) int { completed <- err; return 1 })
	if err != nil {
		t.Fatal(err)
	}
	issued <- cookie
	if <-early {
		t.Error("the write completed before its data was sent")
	}
	close(flushed)
	if err := <-completed; !errors.Is(err, syscall.EPERM) {
		t.Errorf("got %v, need the server's error", err)
	}
}

// TestReplyToQueued: a reply to what was not sent yet ends the connection.
func TestReplyToQueued(t *testing.T) {
	issued := make(chan uint64)
	nc := script(t, func(nc net.Conn) {
		welcome(t, nc) // of the write; its payload fills the socket
		nc.Write((&protocol.SimpleReply{Cookie: <-issued}).AppendTo(nil))
		<-issued
	})
	c, err := New(t.Context(), nc, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if _, err := c.AioPwrite(make([]byte, 32<<20), 0, 0, nil); err != nil {
		t.Fatal(err)
	}
	completed := make(chan error, 1)
	cookie, err := c.AioFlush(0, func(err error) int { completed <- err; return 1 })
	if err != nil {
		t.Fatal(err)
	}
	issued <- cookie
	if err := <-completed; !errors.Is(err, ErrDisconnected) {
		t.Errorf("got %v, need %v", err, ErrDisconnected)
	}
	close(issued)
}

// TestHandshakeRefused has servers that break the handshake.
func TestHandshakeRefused(t *testing.T) {
	greeting := (&protocol.Greeting{Flags: protocol.FlagFixedNewstyle}).AppendTo(nil)
	// The client asks for structured replies first.
	opt := protocol.OptStructuredReply
	huge := (&protocol.OptionReplyHeader{Option: opt, Type: protocol.RepErrPolicy, Length: 1 << 31}).AppendTo(nil)
	ack := optionReply(opt, protocol.RepAck, nil)
	tests := []struct {
		name  string
		bytes []byte
		says  string
	}{
		{"nothing", nil, "EOF"},
		{"oldstyle", binary.BigEndian.AppendUint64([]byte("NBDMAGIC"), 0x00420281861253), "EOF"},
		{"oldstyle, whole", append(binary.BigEndian.AppendUint64([]byte("NBDMAGIC"), 0x00420281861253), make([]byte, 20)...), "newstyle"},
		{"not NBD", []byte("SSH-2.0-OpenSSH_9.2p1 Debian\r\n"), "magic"},
		{"closed", greeting, "EOF"},
		{"wrong magic", append(greeting[:18:18], make([]byte, 20)...), "magic"},
		{"another option's reply", append(greeting[:18:18], optionReply(protocol.OptList, protocol.RepAck, nil)...), "NBD_OPT_LIST"},
		{"huge reply", append(greeting[:18:18], huge...), "2147483648"},
		{"wrong reply", append(greeting[:18:18], optionReply(opt, protocol.RepServer, make([]byte, 4))...), "NBD_REP_SERVER"},
		{"bad context", append(append(greeting[:18:18], ack...), optionReply(protocol.OptSetMetaContext, protocol.RepMetaContext, nil)...), "NBD_REP_META_CONTEXT"},
		{"no export info", append(append(append(greeting[:18:18], ack...), optionReply(protocol.OptSetMetaContext, protocol.RepErrUnsup, nil)...),
			optionReply(protocol.OptGo, protocol.RepAck, nil)...), "without NBD_INFO_EXPORT"},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			nc := script(t, func(nc net.Conn) { nc.Write(test.bytes) })
			_, err := New(context.Background(), nc, &Options{CompactHeaders: true})
			if err == nil || !strings.Contains(err.Error(), test.says) {
				t.Errorf("got %v, need it to say %q", err, test.says)
			}
		})
	}
}

// TestListTooLong: a list that does not end is given up, and what came of it is told.
func TestListTooLong(t *testing.T) {
	exports, err := List(t.Context(), "nbd://localhost/", &Options{Dial: func(context.Context, *protocol.URI) (net.Conn, error) {
		return script(t, func(nc net.Conn) {
			b := (&protocol.Greeting{Flags: protocol.FlagFixedNewstyle}).AppendTo(nil)
			for range protocol.MaxExports + 1 {
				b = append(b, optionReply(protocol.OptList, protocol.RepServer, []byte("\x00\x00\x00\x01e"))...)
			}
			nc.Write(b)
		}), nil
	}})
	if err == nil || !strings.Contains(err.Error(), "more than 10000") || len(exports) != protocol.MaxExports {
		t.Errorf("got %d exports, %v, need %d and an error", len(exports), err, protocol.MaxExports)
	}
}

// FuzzServer feeds a client anything that a server might say.
func FuzzServer(f *testing.F) {
	greeting := (&protocol.Greeting{Flags: 3}).AppendTo(nil)
	talk := append(greeting, optionReply(protocol.OptStructuredReply, protocol.RepAck, nil)...)
	talk = append(talk, optionReply(protocol.OptSetMetaContext, protocol.RepMetaContext, (&protocol.MetaContextReply{ID: 1, Name: "base:allocation"}).AppendTo(nil))...)
	talk = append(talk, optionReply(protocol.OptSetMetaContext, protocol.RepAck, nil)...)
	talk = append(talk, optionReply(protocol.OptGo, protocol.RepInfo, (&protocol.ExportInfo{Size: 1 << 20, Flags: 1}).AppendTo(nil))...)
	talk = append(talk, optionReply(protocol.OptGo, protocol.RepAck, nil)...)
	f.Add(greeting)
	f.Add(talk)
	f.Add(append(talk[:len(talk):len(talk)], chunk(1, done, protocol.ReplyOffsetData, offsetData(0, strings.Repeat("a", 64)))...))
	f.Add(append(talk[:len(talk):len(talk)], chunk(2, done, protocol.ReplyBlockStatus, status(1, 64))...))
	f.Add(append(talk[:len(talk):len(talk)], (&protocol.SimpleReply{Cookie: 3, Errno: 5}).AppendTo(nil)...))
	f.Add(append(talk[:len(talk):len(talk)], chunk(4, 0, protocol.ReplyOffsetHole, hole(0, 32))...))
	f.Fuzz(func(t *testing.T, b []byte) { talkTo(t, b, &Options{CompactHeaders: true}) })
}

// talkTo has a client talk to a server that says b, whatever the client says, and
// cancel one of its commands or none. The length of b says
// which, and what the connection is.
func talkTo(t *testing.T, b []byte, opts *Options) {
	nc := script(t, func(nc net.Conn) { nc.Write(b) })
	way := []string{"socket", "blocking", "stream"}[len(b)/8%3]
	if c, err := ways[way](nc, *opts); err == nil {
		calls, issued := make(chan error, 8), 0
		f := func(err error) int { calls <- err; return 1 }
		for i, issue := range []func() (uint64, error){
			func() (uint64, error) { return c.AioPread(make([]byte, 64), 0, 0, f) },
			func() (uint64, error) { return c.AioBlockStatus(64, 0, 0, nil, f) },
			func() (uint64, error) { return c.AioPwrite(make([]byte, 64), 0, 0, f) },
			func() (uint64, error) {
				return c.AioBlockStatusOf([]string{protocol.ContextBaseAllocation}, 64, 0, 0, nil, f)
			},
			func() (uint64, error) {
				return c.AioPreadStructured(make([]byte, 64), 0, 0, func(chunk Chunk) error {
					if end := chunk.Offset + uint64(len(chunk.Data)); end > 64 && chunk.Err == nil {
						t.Errorf("got a chunk up to %d of 64 bytes", end)
					}
					return nil
				}, f)
			},
		} {
			if cookie, err := issue(); err == nil {
				issued++
				if len(b)%8 == i {
					c.AioCancel(cookie, errEnough)
				}
			}
		}
		<-c.Done()
		if len(calls) != issued {
			t.Errorf("got %d completions of %d commands", len(calls), issued)
		}
		c.Close()
	}
}

// greet is the server's part of a handshake with extended headers and
// base:allocation as context 1, for an export of 2^40 bytes, all at once.
func greet() []byte {
	b := (&protocol.Greeting{Flags: 3}).AppendTo(nil)
	b = append(b, optionReply(protocol.OptExtendedHeaders, protocol.RepAck, nil)...)
	b = append(b, optionReply(protocol.OptSetMetaContext, protocol.RepMetaContext, (&protocol.MetaContextReply{ID: 1, Name: "base:allocation"}).AppendTo(nil))...)
	b = append(b, optionReply(protocol.OptSetMetaContext, protocol.RepAck, nil)...)
	e := protocol.ExportInfo{Size: 1 << 40, Flags: protocol.FlagHasFlags | protocol.FlagBlockStatusPayload}
	b = append(b, optionReply(protocol.OptGo, protocol.RepInfo, e.AppendTo(nil))...)
	return append(b, optionReply(protocol.OptGo, protocol.RepAck, nil)...)
}

func extendedChunk(cookie, off uint64, flags protocol.ReplyFlags, typ protocol.ReplyType, data []byte) []byte {
	h := protocol.ChunkHeader{Cookie: cookie, Offset: off, Flags: flags, Type: typ, Length: uint64(len(data))}
	return append(h.AppendExtendedTo(nil), data...)
}

func extendedStatus(id uint32, lengths ...uint64) []byte {
	s := protocol.BlockStatus{ContextID: id}
	for _, n := range lengths {
		s.Descriptors = append(s.Descriptors, protocol.Descriptor{Length: n})
	}
	return s.AppendExtendedTo(nil)
}

// FuzzExtendedServer is FuzzServer with extended headers.
func FuzzExtendedServer(f *testing.F) {
	f.Add(greet())
	f.Add(append(greet(), extendedChunk(1, 0, done, protocol.ReplyOffsetData, offsetData(0, strings.Repeat("a", 64)))...))
	f.Add(append(greet(), extendedChunk(2, 0, done, protocol.ReplyBlockStatusExt, extendedStatus(1, 64))...))
	f.Add(append(greet(), extendedChunk(3, 0, done, protocol.ReplyNone, nil)...))
	f.Add(append(greet(), extendedChunk(1, 0, 0, protocol.ReplyOffsetHole, hole(0, 64))...))
	f.Fuzz(func(t *testing.T, b []byte) { talkTo(t, b, &Options{}) })
}

// TestExtendedReplies has a server answer a block status of 2^33 bytes at 512 with
// extended headers, well and badly.
func TestExtendedReplies(t *testing.T) {
	const off, n = 512, 1 << 33
	typ, ext := protocol.ReplyBlockStatus, protocol.ReplyBlockStatusExt
	tests := []struct {
		name  string
		only  []string
		reply []byte
		says  string
	}{
		{"64-bit", nil, extendedChunk(1, off, done, ext, extendedStatus(1, n)), ""},
		{"32-bit", nil, extendedChunk(1, off, done, typ, status(1, 1<<30)), ""},
		{"of one context", []string{protocol.ContextBaseAllocation}, extendedChunk(1, off, done, ext, extendedStatus(1, n)), ""},
		{"64-bit, no count", nil, extendedChunk(1, off, done, ext, append([]byte{0, 0, 0, 1, 0, 0, 0, 0}, extendedStatus(1, n)[8:]...)), ""},
		{"64-bit, wrong count", nil, extendedChunk(1, off, done, ext, append([]byte{0, 0, 0, 1, 0, 0, 0, 9}, extendedStatus(1, n)[8:]...)), "9 as counted"},
		{"too much", nil, extendedChunk(1, off, done, ext, extendedStatus(1, n, 1)), "past the 8589934592"},
		{"too much, beyond 64 bits", nil, extendedChunk(1, off, done, ext, extendedStatus(1, 5, math.MaxUint64, math.MaxUint64, 1<<60)), "past the 8589934592"},
		{"other offset", nil, extendedChunk(1, off+1, done, ext, extendedStatus(1, n)), "offset 513"},
		{"compact chunk", nil, chunk(1, done, typ, status(1, 512)), "magic number"},
		{"simple reply", nil, (&protocol.SimpleReply{Cookie: 1, Errno: protocol.EIO}).AppendTo(nil), "magic number"},
		{"error", nil, extendedChunk(1, off, done, protocol.ReplyErrorOffset, (&protocol.ErrorChunk{Type: protocol.ReplyErrorOffset, Errno: protocol.EIO, Msg: "alas", Offset: 600}).AppendTo(nil)), "alas"},
		{"too long", nil, (&protocol.ChunkHeader{Cookie: 1, Offset: off, Flags: done, Type: ext, Length: 1 << 60}).AppendExtendedTo(nil), "at most"},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			var got protocol.Request
			nc := script(t, func(nc net.Conn) {
				nc.Write(greet())
				// The handshake's part of the client, up to its request.
				opts := 4 + 3*protocol.OptionHeaderSize
				b := make([]byte, opts+len("base:allocation")+12+4+2+3*2)
				io.ReadFull(nc, b)
				b = make([]byte, protocol.ExtendedRequestSize)
				if _, err := io.ReadFull(nc, b); err != nil {
					t.Error(err)
				}
				if err := got.DecodeExtended(b); err != nil {
					t.Error(err)
				}
				io.ReadFull(nc, make([]byte, got.PayloadLength(true)))
				nc.Write(test.reply)
			})
			c, err := New(context.Background(), nc, nil)
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			var runs map[string][]protocol.Descriptor
			if test.only == nil {
				runs, err = c.BlockStatus(n, off, 0)
			} else {
				runs, err = c.BlockStatusOf(test.only, n, off, 0)
			}
			if test.says == "" && (err != nil || len(runs[protocol.ContextBaseAllocation]) == 0) ||
				test.says != "" && (err == nil || !strings.Contains(err.Error(), test.says)) {
				t.Errorf("got %v, %v, need it to say %q", runs, err, test.says)
			}
			if _, err := c.BlockStatusOf([]string{"x:y"}, 1, 0, 0); err == nil || !strings.Contains(err.Error(), "x:y") {
				t.Errorf("context that was not selected: got %v", err)
			}
		})
	}
}
