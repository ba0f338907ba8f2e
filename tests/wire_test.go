package tests

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"io"
	"strings"
	"testing"

	"nbdhost/protocol"
)

// A conversation is all that a client says, in messages. It is sent without
// waiting for an answer; the server answers in order, with one thread.
type conversation [][]byte

func (v conversation) bytes() []byte { return bytes.Join(v, nil) }

func request(typ protocol.Command, flags protocol.CommandFlags, offset uint64, length uint32, payload ...byte) []byte {
	r := protocol.Request{Type: typ, Flags: flags, Cookie: 0x0123456789abcdef, Offset: offset, Length: uint64(length)}
	return append(r.AppendTo(nil), payload...)
}

func concat(parts ...[]byte) []byte { return bytes.Join(parts, nil) }

func be16(v uint16) []byte { return binary.BigEndian.AppendUint16(nil, v) }
func be32(v uint32) []byte { return binary.BigEndian.AppendUint32(nil, v) }

// exchange sends b on a new connection, says that no more comes, and returns what
// the server answered until it closed, decoded. Texts are left out: each server
// has its own.
func exchange(t *testing.T, s *server, b []byte) string {
	t.Helper()
	c := s.raw()
	defer c.Close()
	sent := make(chan struct{})
	go func() {
		defer close(sent)
		// A server may close before it has read everything.
		c.Write(b)
		c.Conn.(interface{ CloseWrite() error }).CloseWrite()
	}()
	answer := decode(t, c)
	<-sent
	return answer
}

func decode(t *testing.T, c *raw) string {
	t.Helper()
	var out strings.Builder
	greeting := make([]byte, protocol.GreetingSize)
	if _, err := io.ReadFull(c.r, greeting); err != nil {
		return fmt.Sprintf("no greeting: %v", err)
	}
	fmt.Fprintf(&out, "greeting %x\n", greeting)
	structured, listed, context := false, false, ""
	for {
		magic, err := c.r.Peek(8)
		if err != nil || binary.BigEndian.Uint64(magic) != 0x3e889045565a9 {
			break
		}
		h, data := c.optionReply()
		switch {
		case h.Type.IsError():
			data, context = nil, ""
		case h.Option == protocol.OptStructuredReply:
			structured = true
		}
		if h.Option == protocol.OptListMetaContext {
			// nbdkit answers before it has read all of the option, and what is wrong
			// with the rest it overlooks. TestListMetaContext looks at these.
			continue
		}
		if h.Type == protocol.RepMetaContext {
			// Likewise: this one counts once it has been acknowledged.
			context = fmt.Sprintf("%x", data)
			continue
		}
		if listed && h.Option == protocol.OptList {
			continue // nbdkit lists but once
		}
		listed = listed || h.Option == protocol.OptList && h.Type == protocol.RepAck
		line := fmt.Sprintf("%v %v %x%s\n", h.Option, h.Type, data, context)
		context = ""
		if h.Type == protocol.RepInfo && strings.HasSuffix(out.String(), line) {
			continue // nbdkit says twice what was asked twice
		}
		out.WriteString(line)
	}
	// Simple replies to reads, which only come without structured ones, and the
	// answer to NBD_OPT_EXPORT_NAME do not tell where they end.
	if b, err := c.r.Peek(14); structured && err == nil {
		if _, ok := protocol.ReplyMagic(b[10:]); ok {
			fmt.Fprintf(&out, "export %x\n", c.take(10))
		}
	}
	for structured {
		if magic, err := c.r.Peek(4); err != nil {
			break
		} else if _, ok := protocol.ReplyMagic(magic); !ok {
			break
		}
		r, err := c.nextReply()
		if err != nil {
			fmt.Fprintf(&out, "reply: %v\n", err)
			break
		}
		if r.errno != 0 {
			r.data = nil // part of what was asked, in front of the error
		}
		fmt.Fprintf(&out, "cookie %x: %v %x\n", r.cookie, r.errno, r.data)
	}
	rest, err := io.ReadAll(c.r)
	if err != nil && !closed(err) {
		t.Fatalf("read from server: %v", err)
	}
	if len(rest) > 0 {
		return fmt.Sprintf("%sthen %x\n", out.String(), rest)
	}
	return withoutLastErrors(out.String())
}

// withoutLastErrors drops the errors before the server closes. It may hang up on
// what is wrong, or answer with an error first and then find that the client has
// gone, or that it has lost step: neither is better.
func withoutLastErrors(answer string) string {
	lines := strings.SplitAfter(answer, "\n")
	for len(lines) > 0 {
		last := lines[len(lines)-1]
		if last != "" && !strings.Contains(last, "NBD_E") && !strings.Contains(last, "NBD_REP_ERR_") {
			break
		}
		lines = lines[:len(lines)-1]
	}
	return strings.Join(lines, "")
}

var (
	modern   = clientFlags(protocol.FlagCFixedNewstyle | protocol.FlagCNoZeroes)
	startSR  = option(protocol.OptStructuredReply, nil)
	setMeta  = option(protocol.OptSetMetaContext, metaQuery("", protocol.ContextBaseAllocation))
	goOn     = option(protocol.OptGo, infoRequest(""))
	hangUp   = request(protocol.CmdDisc, 0, 0, 0)
	readSome = request(protocol.CmdRead, 0, 512, 16)
)

// everything is a conversation with each option and each command.
var everything = conversation{
	modern,
	startSR,
	option(protocol.OptList, nil),
	option(protocol.OptInfo, infoRequest("", protocol.InfoName, protocol.InfoDescription, protocol.InfoBlockSize)),
	option(protocol.OptListMetaContext, metaQuery("", "base:")),
	setMeta,
	goOn,
	readSome,
	request(protocol.CmdWrite, protocol.CmdFlagFUA, 1024, 8, []byte("8 bytes.")...),
	request(protocol.CmdFlush, 0, 0, 0),
	request(protocol.CmdTrim, 0, 4096, 512),
	request(protocol.CmdCache, 0, 0, 512),
	request(protocol.CmdWriteZeroes, protocol.CmdFlagNoHole, 2048, 512),
	request(protocol.CmdBlockStatus, protocol.CmdFlagReqOne, 0, 65536),
	readSome,
	hangUp,
}

// twin are an nbdkit and the program under test that serve the same.
type twin struct {
	t        *testing.T
	journals [2]*journal
	servers  [2]*server
}

func startTwin(t *testing.T) *twin {
	t.Helper()
	w := &twin{t: t}
	for i, program := range []string{nbdkit, nbdhost} {
		dir := tempDir(t)
		w.journals[i] = newJournal(t, dir)
		w.servers[i] = start(t, program, dir, false, "-t", "1", fixture(t, "trace"), "journal=DIR/journal")
	}
	return w
}

// same says b to both servers and wants the same answer.
func (w *twin) same(name string, b []byte) {
	w.t.Helper()
	want, got := exchange(w.t, w.servers[0], b), exchange(w.t, w.servers[1], b)
	if got != want {
		w.t.Errorf("%s: %s is unlike nbdkit in this:\n%s", name, underTest(), difference(want, got))
	}
}

// done wants the servers to answer as before, and to have closed every handle.
func (w *twin) done() {
	w.t.Helper()
	w.same("after all", everything.bytes())
	for i, s := range w.servers {
		s.stop()
		if lines := w.journals[i].all(); i == 1 && underTest() != "nbdkit" {
			if paired(w.t, lines) == 0 {
				w.t.Error("journal: no handle was ever opened")
			}
		}
	}
}

// TestTruncated cuts a conversation off after every byte.
func TestTruncated(t *testing.T) {
	t.Parallel()
	w := startTwin(t)
	b := everything.bytes()
	for n := range len(b) + 1 {
		w.same(fmt.Sprintf("%d of %d bytes", n, len(b)), b[:n])
	}
	w.done()
}

// TestCorrupted changes each byte of a conversation in several ways.
func TestCorrupted(t *testing.T) {
	t.Parallel()
	w := startTwin(t)
	b := everything.bytes()
	// nbdkit overlooks most of what can be wrong with NBD_OPT_SET_META_CONTEXT, and
	// keeps a context that it answered with an error.
	// And it ends with an error where a client that is not of the fixed kind sends
	// an option, which later releases answer.
	lax := len(everything[:5].bytes())
	for i := range b {
		for _, change := range []byte{0x01, 0x80, 0xff} {
			bad := bytes.Clone(b)
			bad[i] ^= change
			if i < len(modern) || i >= lax && i < lax+len(everything[5]) {
				exchange(t, w.servers[1], bad)
				continue
			}
			w.same(fmt.Sprintf("byte %d of %d, 0x%02x made 0x%02x", i, len(b), b[i], bad[i]), bad)
		}
	}
	w.done()
}

// TestOrder leaves out, doubles and swaps messages of a conversation.
func TestOrder(t *testing.T) {
	t.Parallel()
	w := startTwin(t)
	for i := range everything {
		without := concat(everything[:i].bytes(), everything[i+1:].bytes())
		w.same(fmt.Sprintf("without message %d", i), without)
		w.same(fmt.Sprintf("message %d twice", i), concat(everything[:i+1].bytes(), everything[i:].bytes()))
		for k := i + 1; k < len(everything); k++ {
			swapped := append(conversation(nil), everything...)
			swapped[i], swapped[k] = swapped[k], swapped[i]
			w.same(fmt.Sprintf("messages %d and %d swapped", i, k), swapped.bytes())
		}
	}
	w.done()
}

// negotiations are handshakes that are wrong, or rare. Those that end before
// NBD_OPT_GO are followed by one.
var negotiations = map[string][]byte{
	"no client flags":               concat(clientFlags(0), option(protocol.OptExportName, nil)),
	"no zeroes, not fixed":          concat(clientFlags(protocol.FlagCNoZeroes), option(protocol.OptExportName, nil)),
	"fixed, zeroes":                 concat(clientFlags(protocol.FlagCFixedNewstyle), option(protocol.OptExportName, nil), readSome, hangUp),
	"unknown client flag":           concat(clientFlags(1<<2|3), goOn),
	"all client flags":              concat(clientFlags(0xffffffff), goOn),
	"export name":                   concat(modern, option(protocol.OptExportName, []byte("traced")), readSome, hangUp),
	"export name after structured":  concat(modern, startSR, option(protocol.OptExportName, nil), readSome, hangUp),
	"export name too long":          concat(modern, option(protocol.OptExportName, bytes.Repeat([]byte{'n'}, 4097))),
	"export name as long as may be": concat(modern, option(protocol.OptExportName, bytes.Repeat([]byte{'n'}, 4096)), readSome, hangUp),
	"abort":                         concat(modern, option(protocol.OptAbort, nil)),
	"abort with data":               concat(modern, option(protocol.OptAbort, []byte("data")), goOn),
	"abort and more":                concat(modern, option(protocol.OptAbort, nil), goOn),
	"list with data":                concat(modern, option(protocol.OptList, []byte{0}), goOn, hangUp),
	"structured with data":          concat(modern, option(protocol.OptStructuredReply, []byte{0}), goOn, readSome, hangUp),
	"structured twice":              concat(modern, startSR, startSR, goOn, readSome, hangUp),
	"unknown option":                concat(modern, option(99, nil), goOn, hangUp),
	"unknown option with data":      concat(modern, option(99, make([]byte, 5000)), goOn, hangUp),
	"option 0":                      concat(modern, option(0, nil), goOn, hangUp),
	"peek export":                   concat(modern, option(protocol.OptPeekExport, nil), goOn, hangUp),
	"start TLS":                     concat(modern, option(protocol.OptStartTLS, nil), goOn, hangUp),
	"start TLS with data":           concat(modern, option(protocol.OptStartTLS, []byte{0}), goOn, hangUp),
	"go: no data":                   concat(modern, option(protocol.OptGo, nil), goOn, hangUp),
	"go: half a length":             concat(modern, option(protocol.OptGo, []byte{0, 0}), goOn, hangUp),
	"go: no infos":                  concat(modern, option(protocol.OptGo, be32(0)), goOn, hangUp),
	"go: name too short":            concat(modern, option(protocol.OptGo, concat(be32(10), []byte("abc"))), goOn, hangUp),
	"go: name 4 GiB":                concat(modern, option(protocol.OptGo, concat(be32(0xffffffff), be16(0))), goOn, hangUp),
	"go: name just wraps":           concat(modern, option(protocol.OptGo, concat(be32(0xfffffffa), be16(0))), goOn, hangUp),
	"go: name too long":             concat(modern, option(protocol.OptGo, infoRequest(strings.Repeat("n", 4097))), goOn, hangUp),
	"go: name as long as may be":    concat(modern, option(protocol.OptGo, infoRequest(strings.Repeat("n", 4096))), hangUp),
	"go: more infos than data":      concat(modern, option(protocol.OptGo, concat(be32(0), be16(2), be16(0))), goOn, hangUp),
	"go: fewer infos than data":     concat(modern, option(protocol.OptGo, concat(be32(0), be16(0), be16(0))), goOn, hangUp),
	"go: an odd byte":               concat(modern, option(protocol.OptGo, concat(be32(0), be16(0), []byte{0})), goOn, hangUp),
	"go: an unknown info":           concat(modern, option(protocol.OptGo, infoRequest("", 77, protocol.InfoName)), hangUp),
	"go: an info twice":             concat(modern, option(protocol.OptGo, infoRequest("", protocol.InfoName, protocol.InfoName, protocol.InfoExport)), hangUp),
	"info after info":               concat(modern, option(protocol.OptInfo, infoRequest("")), option(protocol.OptInfo, infoRequest("x")), goOn, readSome, hangUp),
	"meta before structured":        concat(modern, setMeta, goOn, hangUp),
	"list meta before structured":   concat(modern, option(protocol.OptListMetaContext, metaQuery("")), goOn, hangUp),
	"meta: no data":                 concat(modern, startSR, option(protocol.OptSetMetaContext, nil), goOn, hangUp),
	"meta: no queries":              concat(modern, startSR, option(protocol.OptSetMetaContext, metaQuery("")), goOn, request(protocol.CmdBlockStatus, 0, 0, 512), hangUp),
	"meta: list all":                concat(modern, startSR, option(protocol.OptListMetaContext, metaQuery("")), goOn, hangUp),
	"meta: list base":               concat(modern, startSR, option(protocol.OptListMetaContext, metaQuery("", "base:")), goOn, hangUp),
	"meta: set base":                concat(modern, startSR, option(protocol.OptSetMetaContext, metaQuery("", "base:")), goOn, hangUp),
	"meta: unknown":                 concat(modern, startSR, option(protocol.OptSetMetaContext, metaQuery("", "qemu:dirty-bitmap:x")), goOn, request(protocol.CmdBlockStatus, 0, 0, 512), hangUp),
	"meta: no namespace":            concat(modern, startSR, option(protocol.OptSetMetaContext, metaQuery("", "allocation")), goOn, hangUp),
	"meta: several":                 concat(modern, startSR, option(protocol.OptSetMetaContext, metaQuery("", "x:y", "base:allocation")), goOn, request(protocol.CmdBlockStatus, 0, 0, 512), hangUp),
	"meta: set, then unset":         concat(modern, startSR, setMeta, option(protocol.OptSetMetaContext, metaQuery("")), goOn, request(protocol.CmdBlockStatus, 0, 0, 512), hangUp),
	"meta: of another export":       concat(modern, startSR, option(protocol.OptSetMetaContext, metaQuery("other", "base:allocation")), goOn, request(protocol.CmdBlockStatus, 0, 0, 512), hangUp),
	"meta: then another by name":    concat(modern, startSR, option(protocol.OptSetMetaContext, metaQuery("other", "base:allocation")), option(protocol.OptExportName, []byte("third")), request(protocol.CmdBlockStatus, 0, 0, 512), hangUp),
	"meta: more queries than data":  concat(modern, startSR, option(protocol.OptSetMetaContext, concat(be32(0), be32(2), be32(0))), goOn, hangUp),
	"meta: query too short":         concat(modern, startSR, option(protocol.OptSetMetaContext, concat(be32(0), be32(1), be32(9), []byte("base:"))), goOn, hangUp),
	"meta: query 4 GiB":             concat(modern, startSR, option(protocol.OptSetMetaContext, concat(be32(0), be32(1), be32(0xffffffff))), goOn, hangUp),
	"meta: 4 Gi queries":            concat(modern, startSR, option(protocol.OptSetMetaContext, concat(be32(0), be32(0xffffffff))), goOn, hangUp),
	"bad option magic":              concat(modern, []byte("IHAVEOPS"), be32(7), be32(0)),
	"option of 4 GiB":               concat(modern, []byte("IHAVEOPT"), be32(99), be32(0xffffffff), make([]byte, 100)),
	"rubbish":                       []byte("GET / HTTP/1.1\r\nHost: example.org\r\n\r\n"),
	"TLS client hello":              concat([]byte{0x16, 3, 1, 0, 200}, make([]byte, 200)),
	"request instead of an option":  concat(modern, readSome, goOn),
	"option instead of a request":   concat(modern, goOn, goOn),
	"32 options":                    concat(modern, bytes.Repeat(option(99, nil), 31), goOn, readSome, hangUp),
	"33 options":                    concat(modern, bytes.Repeat(option(99, nil), 33), goOn, readSome, hangUp),
	"1000 options":                  concat(modern, bytes.Repeat(option(protocol.OptList, nil), 1000), goOn),
}

// TestNegotiation: wrong and rare handshakes.
func TestNegotiation(t *testing.T) {
	t.Parallel()
	w := startTwin(t)
	for name, b := range negotiations {
		w.same(name, b)
	}
	w.done()
}

// TestListMetaContext: what is answered to each query, and that nothing else is.
func TestListMetaContext(t *testing.T) {
	t.Parallel()
	s := startHost(t, "memory", "1M")
	c := s.raw()
	c.take(protocol.GreetingSize)
	c.write(concat(modern, startSR))
	c.wantOption(protocol.OptStructuredReply, protocol.RepAck)
	for _, test := range []struct {
		queries []string
		listed  bool
	}{
		{nil, true}, {[]string{"base:"}, true}, {[]string{"base:allocation"}, true}, {[]string{"x:", "base:"}, true},
		{[]string{"x:"}, false}, {[]string{"base:x"}, false}, {[]string{"base"}, false}, {[]string{""}, false},
	} {
		c.write(option(protocol.OptListMetaContext, metaQuery("", test.queries...)))
		if test.listed {
			if data := c.wantOption(protocol.OptListMetaContext, protocol.RepMetaContext); string(data[4:]) != "base:allocation" {
				t.Errorf("list %q: got %q", test.queries, data)
			}
		}
		c.wantOption(protocol.OptListMetaContext, protocol.RepAck)
	}
	c.Close()
	s.stop()
}

// TestMetaContextLeftOver: nbdkit overlooks bytes after the last query. They mean
// that the two sides do not understand each other.
func TestMetaContextLeftOver(t *testing.T) {
	t.Parallel()
	onlyNbdhost(t)
	s := startHost(t, "memory", "1M")
	c := s.raw()
	c.take(protocol.GreetingSize)
	c.write(concat(modern, startSR))
	c.wantOption(protocol.OptStructuredReply, protocol.RepAck)
	for _, opt := range []protocol.Option{protocol.OptSetMetaContext, protocol.OptListMetaContext} {
		c.write(option(opt, append(metaQuery("", "base:allocation"), 0)))
		c.wantOption(opt, protocol.RepErrInvalid)
	}
	c.Close()
	s.stop()
}

// TestRequests: every command with every flag, at every border of the disk, in
// all of the forms that a handshake can give the connection.
func TestRequests(t *testing.T) {
	t.Parallel()
	w := startTwin(t)
	const size = 1 << 20
	ranges := []struct {
		offset uint64
		length uint32
	}{
		{0, 0}, {0, 1}, {0, 512}, {size - 1, 1}, {size, 0}, {size, 1}, {size - 1, 2}, {size + 1, 0}, {0, size}, {0, size + 1},
		{1 << 63, 1}, {1<<64 - 1, 1}, {1<<64 - 512, 512}, {1<<64 - 1, 0xffffffff}, {1<<63 - 1, 1}, {0, 64 << 20}, {0, 64<<20 + 1}, {0, 0xffffffff}, {1, 0x80000000},
	}
	for form, hello := range map[string][]byte{
		"simple":     concat(modern, goOn),
		"structured": concat(modern, startSR, goOn),
		"contexts":   concat(modern, startSR, setMeta, goOn),
	} {
		for typ := protocol.Command(0); typ < 10; typ++ {
			for flags := range protocol.CommandFlags(128) {
				if flags&(flags-1) != 0 && flags != 127 && flags != 1|1<<1|1<<4 {
					continue // one at a time, and a few together
				}
				for _, r := range ranges {
					if flags != 0 && r.length != 512 {
						continue
					}
					if form == "simple" && typ == protocol.CmdWrite && r.length > 65<<20 {
						continue // some wait for a payload that never ends before they refuse it
					}
					b := concat(hello, request(typ, flags, r.offset, r.length))
					if typ == protocol.CmdWrite {
						b = append(b, make([]byte, min(r.length, 65<<20))...)
					}
					b = concat(b, readSome, hangUp)
					w.same(fmt.Sprintf("%s: %v %v offset=%d length=%d", form, typ, flags, r.offset, r.length), b)
				}
			}
		}
	}
	w.done()
}
