package server

import (
	"bytes"
	"io"
	"math"
	"slices"
	"syscall"
	"testing"

	"nbdhost/backend"
	"nbdhost/protocol"
)

// What once broke other servers, one test each, named after it. Those that need a
// filter or TLS are in package tests.

// The plugin was opened before the handshake was done: only NBD_OPT_INFO,
// NBD_OPT_GO and NBD_OPT_EXPORT_NAME may open it.
func TestCVE201914850(t *testing.T) {
	h := newHooked()
	_, _, path := serve(t, h, Options{})
	for _, said := range [][]byte{nil, hello(), hello(structured), hello(structured, setContext),
		hello(option(protocol.OptList, nil)), hello(option(protocol.OptStartTLS, nil)), hello(option(protocol.OptAbort, nil)),
		hello(option(protocol.OptGo, []byte{0}))} {
		nc := connect(t, path)
		nc.Write(said)
		nc.Close()
	}
	// All of those came before this one, whose connection is the last one.
	nc := raw(t, path)
	nc.Close()
	for h.closes.Load() == 0 {
	}
	if n := h.opens.Load(); n != 1 {
		t.Errorf("got %d opens, need 1", n)
	}
}

// Options in any order, also those that follow one that ended in an error, are
// answered and nothing is left open. (An assertion failed in nbdkit.)
func TestCVE201914851(t *testing.T) {
	options := [][]byte{structured, setContext, option(protocol.OptExtendedHeaders, nil), option(protocol.OptList, nil),
		option(protocol.OptInfo, (&protocol.InfoRequest{}).AppendTo(nil)), option(protocol.OptStartTLS, nil), option(99, nil),
		option(protocol.OptListMetaContext, (&protocol.MetaContextRequest{}).AppendTo(nil)), option(protocol.OptGo, []byte{0})}
	for i := range options {
		for j := range options {
			for k := range options {
				got := converse(t, hello(options[i], options[j], options[k], option(protocol.OptAbort, nil)))
				replies, _ := optionReplies(t, got)
				if last := replies[len(replies)-1]; last.Option != protocol.OptAbort || last.Type != protocol.RepAck {
					t.Fatalf("options %d, %d, %d: the last reply is %+v", i, j, k, last)
				}
			}
		}
	}
}

// NBD_OPT_STRUCTURED_REPLY in plain text survived NBD_OPT_STARTTLS.
func TestCVE20213716(t *testing.T) {
	export := ""
	n := negotiation{structured: true, extended: true, contextFor: &export}
	n.forget()
	if n.structured || n.extended || n.contextFor != nil {
		t.Errorf("got %+v", n)
	}
}

// A block status of 2^32-1 bytes over an extent that is as long or longer was one
// byte too long, and an assertion failed.
func TestCVE202547711(t *testing.T) {
	v := newVast(1 << 40)
	_, path := serveVast(t, v, Options{})
	for _, length := range []uint64{1<<32 - 1, 1 << 32, 1<<32 + 1, 1 << 40} {
		v.says(func(_ uint32, off uint64, x *backend.Extents) error { return x.Add(off, length, 0) }, nil)
		c := handshake(t, path, protocol.OptStructuredReply)
		c.Write(request(protocol.Request{Type: protocol.CmdBlockStatus, Length: math.MaxUint32}))
		h, data := c.compactChunk()
		var s protocol.BlockStatus
		if err := s.Decode(data); err != nil || h.Type != protocol.ReplyBlockStatus {
			t.Fatalf("extent of %d: got %+v, %v", length, h, err)
		}
		for _, d := range s.Descriptors {
			if d.Length%(64<<10) != 0 && length != 1<<32-1 && length != 1<<32+1 {
				t.Errorf("extent of %d: got %v", length, s.Descriptors)
			}
		}
	}
}

// Rounding a large unaligned block status in 32 bits overflowed.
func TestCVE202547712(t *testing.T) {
	v := newVast(1 << 40)
	v.blocks = backend.BlockSize{Min: 65536, Preferred: 65536, Max: math.MaxUint32}
	v.extents = func(_ uint32, off uint64, x *backend.Extents) error { return x.Add(0, 1<<32+1, 0) }
	_, path := serveVast(t, v, Options{})
	c := handshake(t, path, protocol.OptExtendedHeaders, protocol.InfoBlockSize)
	c.send(protocol.Request{Type: protocol.CmdBlockStatus, Length: math.MaxUint32 &^ 65535})
	_, data := c.chunk()
	var s protocol.BlockStatus
	if err := s.DecodeExtended(data); err != nil || !slices.Equal(s.Descriptors, []protocol.Descriptor{{Length: 1 << 32}}) {
		t.Errorf("got %+v, %v", s, err)
	}
}

// nbdkit 1.34: the data of an option that is refused must be consumed.
func TestNbdkit134OptionData(t *testing.T) {
	for _, opt := range []protocol.Option{protocol.OptStartTLS, protocol.OptList, protocol.OptStructuredReply, protocol.OptPeekExport, 1234} {
		replies, _ := optionReplies(t, converse(t, hello(option(opt, bytes.Repeat([]byte("x"), 3000)), structured)))
		if len(replies) != 2 || !replies[0].Type.IsError() || replies[1].Type != protocol.RepAck {
			t.Errorf("%v: got %+v", opt, replies)
		}
	}
}

// nbdkit 1.34: after an early hang-up a reply went to another client, who had got
// the descriptor. Clients leave while their reads are under way, others come.
func TestNbdkit134Descriptor(t *testing.T) {
	_, _, path := serve(t, newHooked(), Options{})
	for i := range uint64(200) {
		leaver := raw(t, path)
		var out []byte
		for k := range uint64(50) {
			out = append(out, request(protocol.Request{Type: protocol.CmdRead, Cookie: 1<<32 + k, Length: 65536})...)
		}
		leaver.Write(out)
		leaver.Close()
		nc := raw(t, path)
		nc.Write(request(protocol.Request{Type: protocol.CmdRead, Cookie: i, Length: 512}))
		if m := readReply(t, nc, 512); m.Cookie != i || m.Errno != 0 {
			t.Fatalf("got %+v, need the answer to %d", m, i)
		}
		nc.Close()
	}
}

// nbdkit 1.44.1: where zeroes were written one by one only the first 64 MiB were.
func TestNbdkit144Zero(t *testing.T) {
	v := newVast(1 << 40)
	v.without = backend.Zero
	uri, _ := serveVast(t, v, Options{})
	if err := dial(t, uri, nil).Zero(200<<20, 5, 0); err != nil {
		t.Fatal(err)
	}
	equal(t, "calls", v.took(), []string{"pwrite 0x5+0x4000000", "pwrite 0x4000005+0x4000000", "pwrite 0x8000005+0x4000000", "pwrite 0xc000005+0x800000"})
}

// nbdkit 1.42: a client that the address filter had refused was told the exports.
func TestNbdkit142Refused(t *testing.T) {
	h := newHooked()
	b := refuser{h}
	s := New(Options{Chain: backend.NewChain(b, nil, backend.Trace{})})
	ours, theirs := pair(t)
	defer theirs.Close()
	go func() {
		theirs.Write(hello(option(protocol.OptList, nil)))
		theirs.CloseWrite()
	}()
	s.ServeConn(ours)
	got, _ := io.ReadAll(theirs)
	if _, _, listed := bytes.Cut(got, []byte("secret")); listed || len(got) > protocol.GreetingSize {
		t.Errorf("got %q", got)
	}
}

type refuser struct{ *hooked }

func (refuser) Has(cb backend.Callback) bool {
	return cb == backend.Preconnect || cb == backend.ListExports
}
func (refuser) Preconnect(*backend.Call, bool) error {
	return &backend.Error{Module: "mem", Op: "preconnect", Errno: syscall.EPERM}
}
func (refuser) ListExports(*backend.Call, bool) ([]backend.Export, bool, error) {
	return []backend.Export{{Name: "secret"}}, false, nil
}

// qemu CVE-2017-15119: 4 GiB of option data were read.
func TestCVE201715119(t *testing.T) {
	data := hello((&protocol.OptionHeader{Option: protocol.OptSetMetaContext, Length: math.MaxUint32}).AppendTo(nil), make([]byte, 1<<20))
	if replies, _ := optionReplies(t, converse(t, data)); len(replies) != 0 {
		t.Errorf("got %+v", replies)
	}
}

// qemu CVE-2017-7539, CVE-2017-9524 and CVE-2017-10664: a client that is gone
// early, at any point, ended the server; so did one that does not take its reply.
func TestCVE20177539(t *testing.T) {
	_, uri, path := serve(t, newHooked(), Options{})
	said := hello(structured, goInfos, commands())
	for n := 0; n < len(said); n += 7 {
		nc := connect(t, path)
		nc.Write(said[:n])
		nc.Close()
	}
	if err := dial(t, uri, nil).Flush(); err != nil {
		t.Errorf("the next client: %v", err)
	}
}

// nbd-server CVE-2013-7441: a close during negotiation ended the parent.
func TestCVE20137441(t *testing.T) {
	_, uri, path := serve(t, newHooked(), Options{})
	for range 100 {
		connect(t, path).Close()
	}
	if err := dial(t, uri, nil).Flush(); err != nil {
		t.Errorf("the next client: %v", err)
	}
}
