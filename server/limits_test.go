package server

import (
	"bytes"
	"fmt"
	"io"
	"net"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"nbdhost/backend"
	"nbdhost/client"
	"nbdhost/protocol"
)

// An option with more data than is looked at is consumed and refused; the next one
// is understood. What nobody could mean ends the connection.
func TestLongOption(t *testing.T) {
	const ack, tooBig = protocol.RepAck, protocol.RepErrTooBig
	for _, tt := range []struct {
		name string
		data []byte
		want []protocol.OptionReply
	}{
		{"as long as may be", hello(option(1234, make([]byte, protocol.MaxOptionLength)), structured), []protocol.OptionReply{protocol.RepErrUnsup, ack}},
		{"a byte more", hello(option(1234, make([]byte, protocol.MaxOptionLength+1)), structured), []protocol.OptionReply{tooBig, ack}},
		{"a megabyte", hello(option(protocol.OptGo, make([]byte, 1<<20)), structured), []protocol.OptionReply{tooBig, ack}},
		{"too many queries", hello(option(protocol.OptListMetaContext, make([]byte, 5<<20)), structured), []protocol.OptionReply{tooBig, ack}},
		{"promised only", hello(option(1234, make([]byte, 1<<20))[:1000]), nil},
		{"more than a write", hello((&protocol.OptionHeader{Option: 1234, Length: protocol.MaxRequestLength + 1}).AppendTo(nil)), nil},
		{"export name", hello(option(protocol.OptExportName, make([]byte, 1<<20)), structured), nil},
	} {
		t.Run(tt.name, func(t *testing.T) {
			replies, _ := optionReplies(t, converse(t, tt.data))
			var got []protocol.OptionReply
			for _, r := range replies {
				got = append(got, r.Type)
			}
			if !slices.Equal(got, tt.want) {
				t.Errorf("got %v, need %v", got, tt.want)
			}
		})
	}
}

// A list that is too long to be sent at once.
type lister struct {
	*hooked
	list []backend.Export
}

func (l lister) Has(cb backend.Callback) bool {
	return cb == backend.ListExports || l.hooked.Has(cb)
}

func (l lister) ListExports(*backend.Call, bool) ([]backend.Export, bool, error) {
	return l.list, false, nil
}

// written records the largest write.
type written struct {
	net.Conn
	most atomic.Int64
}

func (w *written) Write(p []byte) (int, error) {
	w.most.Store(max(w.most.Load(), int64(len(p))))
	return w.Conn.Write(p)
}

// Every export is listed, up to MaxExports, and sent in pieces of bounded size.
func TestListPieces(t *testing.T) {
	l := lister{hooked: newHooked()}
	for i := range protocol.MaxExports + 1 {
		l.list = append(l.list, backend.Export{Name: fmt.Sprint(i, strings.Repeat("n", 4000)), Description: strings.Repeat("d", 1000)})
	}
	s := New(Options{Chain: backend.NewChain(l, nil, backend.Trace{})})
	ours, theirs := pair(t)
	defer theirs.Close()
	conn := &written{Conn: ours}
	done := make(chan struct{})
	go func() {
		s.ServeConn(conn)
		close(done)
	}()
	theirs.Write(hello(option(protocol.OptList, nil), option(protocol.OptAbort, nil)))
	got, err := io.ReadAll(theirs)
	if err != nil {
		t.Fatal(err)
	}
	<-done
	replies, data := optionReplies(t, got)
	if n := len(replies); n != protocol.MaxExports+2 {
		t.Fatalf("got %d replies", n)
	}
	for i, r := range replies[:protocol.MaxExports] {
		var e protocol.ServerReply
		if err := e.Decode(data[i]); err != nil || r.Type != protocol.RepServer || e.Name != l.list[i].Name || e.Details != l.list[i].Description {
			t.Fatalf("%d: got %+v, %v", i, r, err)
		}
	}
	if n := conn.most.Load(); n > maxReply+protocol.MaxOptionReplyLength+protocol.OptionReplyHeaderSize {
		t.Errorf("got %d bytes at once", n)
	}
}

// Each transmission flag says what the module can do.
func TestTransmissionFlags(t *testing.T) {
	const all = protocol.FlagHasFlags | protocol.FlagSendFlush | protocol.FlagSendFUA | protocol.FlagSendTrim | protocol.FlagSendWriteZeroes |
		protocol.FlagSendDF | protocol.FlagCanMultiConn | protocol.FlagSendCache | protocol.FlagSendFastZero
	const writes = protocol.FlagSendFUA | protocol.FlagSendTrim | protocol.FlagSendWriteZeroes | protocol.FlagSendFastZero
	is := func(cb backend.Callback, n int) func(backend.Callback) (int, bool) {
		return func(asked backend.Callback) (int, bool) { return n, asked == cb }
	}
	for _, tt := range []struct {
		name string
		o    Options
		can  func(backend.Callback) (int, bool)
		want protocol.ExportFlags
	}{
		{"everything", Options{}, nil, all},
		{"read-only server", Options{ReadOnly: true}, nil, all&^writes | protocol.FlagReadOnly},
		{"can_write", Options{}, is(backend.CanWrite, 0), all&^writes | protocol.FlagReadOnly},
		{"can_flush", Options{}, is(backend.CanFlush, 0), all &^ protocol.FlagSendFlush},
		{"can_fua", Options{}, is(backend.CanFUA, backend.None), all &^ protocol.FlagSendFUA},
		{"can_trim", Options{}, is(backend.CanTrim, 0), all &^ protocol.FlagSendTrim},
		{"can_zero", Options{}, is(backend.CanZero, 0), all}, // zeroes are written
		{"can_fast_zero", Options{}, is(backend.CanFastZero, 0), all &^ protocol.FlagSendFastZero},
		{"can_multi_conn", Options{}, is(backend.CanMultiConn, 0), all &^ protocol.FlagCanMultiConn},
		{"is_rotational", Options{}, is(backend.IsRotational, 1), all | protocol.FlagRotational},
		{"can_cache", Options{}, is(backend.CanCache, backend.None), all &^ protocol.FlagSendCache},
	} {
		t.Run(tt.name, func(t *testing.T) {
			v := newVast(1 << 20)
			v.can = tt.can
			_, path := serveVast(t, v, tt.o)
			if c := handshake(t, path, protocol.OptStructuredReply); c.flags != tt.want {
				t.Errorf("got %v, need %v", c.flags, tt.want)
			}
		})
	}
}

// Options that come while the server stops are refused, but for NBD_OPT_ABORT.
func TestShutdownOptions(t *testing.T) {
	s, _, path := serve(t, newHooked(), Options{})
	nc := connect(t, path)
	nc.Write(hello(structured))
	b := make([]byte, protocol.GreetingSize+protocol.OptionReplyHeaderSize)
	if _, err := io.ReadFull(nc, b); err != nil {
		t.Fatal(err)
	}
	s.Shutdown()
	nc.Write(append(append([]byte{}, goInfos...), option(protocol.OptAbort, nil)...))
	got, _ := io.ReadAll(nc)
	replies, _ := optionReplies(t, append(make([]byte, protocol.GreetingSize), got...))
	if len(replies) != 2 || replies[0].Type != protocol.RepErrShutdown || replies[1].Type != protocol.RepAck {
		t.Errorf("got %+v", replies)
	}
}

// A client that has asked about the export may go on to open it: what it asked for may have
// stopped the server.
func TestShutdownByInfo(t *testing.T) {
	h := newHooked()
	stop := make(chan *Server, 1)
	h.before = func(_ *backend.Call, cb backend.Callback, _ uint64) error {
		if cb == backend.Close {
			select {
			case s := <-stop:
				s.Shutdown()
			default:
			}
		}
		return nil
	}
	s, _, path := serve(t, h, Options{})
	stop <- s
	nc := connect(t, path)
	nc.Write(hello(option(protocol.OptInfo, (&protocol.InfoRequest{}).AppendTo(nil)), goInfos))
	c := &peer{Conn: nc, t: t}
	c.take(protocol.GreetingSize)
	for acks := 0; acks < 2; {
		var r protocol.OptionReplyHeader
		if err := r.Decode(c.take(protocol.OptionReplyHeaderSize)); err != nil || r.Type.IsError() {
			t.Fatalf("got %+v, %v", r, err)
		}
		c.take(int(r.Length))
		if r.Type == protocol.RepAck {
			acks++
		}
	}
	nc.Write(request(protocol.Request{Type: protocol.CmdRead, Cookie: 1, Length: 512}))
	if m := readReply(t, nc, 0); m.Errno != protocol.ESHUTDOWN {
		t.Errorf("got %+v, need %v", m, protocol.ESHUTDOWN)
	}
}

// The handshake of clients without fixed newstyle, with and without zeroes, and
// what a mask does to it.
func TestNonFixed(t *testing.T) {
	name := option(protocol.OptExportName, []byte("x"))
	for _, tt := range []struct {
		name    string
		mask    protocol.HandshakeFlags
		flags   protocol.ClientFlags
		greeted protocol.HandshakeFlags
		want    int // bytes behind the greeting
	}{
		{"neither", 0, 0, 3, 134},
		{"no zeroes", 0, protocol.FlagCNoZeroes, 3, 10},
		{"fixed", 0, protocol.FlagCFixedNewstyle, 3, 134},
		{"both", 0, 3, 3, 10},
		{"zeroes masked", protocol.FlagNoZeroes, protocol.FlagCFixedNewstyle, 1, 134},
		{"zeroes masked, not heeded", protocol.FlagNoZeroes, 3, 1, 0},
		{"fixed masked", protocol.FlagFixedNewstyle, protocol.FlagCNoZeroes, 2, 10},
		{"fixed masked, not heeded", protocol.FlagFixedNewstyle, 3, 2, 0},
		{"all masked", 3, 0, 0, 134},
		{"unknown flag", 0, 4, 3, 0},
	} {
		got := converseWith(t, Options{HandshakeMask: tt.mask}, append(tt.flags.AppendTo(nil), name...))
		var g protocol.Greeting
		if err := g.Decode(got); err != nil || g.Flags != tt.greeted || len(got)-protocol.GreetingSize != tt.want {
			t.Errorf("%s: got %v, %v and %d bytes, need %v and %d", tt.name, g.Flags, err, len(got)-protocol.GreetingSize, tt.greeted, tt.want)
		}
	}
}

// A client without fixed newstyle that sends other options all the same is told
// so, and may still open an export.
func TestNonFixedOptions(t *testing.T) {
	b := append(protocol.ClientFlags(0).AppendTo(nil), structured...)
	b = append(append(b, setContext...), option(protocol.OptStartTLS, nil)...)
	replies, _ := optionReplies(t, converse(t, b))
	var got []protocol.OptionReply
	for _, r := range replies {
		got = append(got, r.Type)
	}
	if !slices.Equal(got, []protocol.OptionReply{protocol.RepErrInvalid, protocol.RepErrInvalid, protocol.RepErrInvalid}) {
		t.Errorf("got %v", got)
	}
}

// Names of up to 4096 bytes reach the module as they are; what the module says of
// one that it does not have goes to the client.
func TestNames(t *testing.T) {
	h := newHooked()
	v := namer{hooked: h, names: make(chan string, 10)}
	_, uri, _ := serveBackend(t, v, h, Options{})
	for _, name := range []string{"x", "ä/ö ü", strings.Repeat("n", 4096), "\xff"} {
		for _, o := range []client.Options{{Export: name}, {Export: name, NoGo: true}} {
			dial(t, uri, &o).Close()
			if got := <-v.names; got != name {
				t.Errorf("got %.20q, need %.20q", got, name)
			}
		}
	}
	_, err := client.Info(t.Context(), uri, &client.Options{Export: "gone"})
	if err == nil || !strings.Contains(err.Error(), "no such disk here") || !strings.Contains(err.Error(), "NBD_REP_ERR_UNKNOWN") {
		t.Errorf("got %v", err)
	}
	_, err = client.Info(t.Context(), uri, &client.Options{Export: strings.Repeat("n", 4097)})
	if err == nil || !strings.Contains(err.Error(), "4097") || !strings.Contains(err.Error(), "NBD_REP_ERR_INVALID") {
		t.Errorf("got %v", err)
	}
}

type namer struct {
	*hooked
	names chan string
}

func (n namer) Open(c *backend.Call, readonly bool, export string) (backend.Handle, error) {
	if export == "gone" {
		return nil, &backend.Error{Module: "mem", Op: "open", Errno: unix.ENOENT, Msg: "no such disk here"}
	}
	n.names <- export
	return n.hooked.Open(c, readonly, export)
}

// The last NBD_OPT_SET_META_CONTEXT counts, also one that fails.
func TestSetMetaContext(t *testing.T) {
	set := func(queries ...string) []byte {
		return option(protocol.OptSetMetaContext, (&protocol.MetaContextRequest{Queries: queries}).AppendTo(nil))
	}
	open := option(protocol.OptGo, (&protocol.InfoRequest{}).AppendTo(nil))
	status := request(protocol.Request{Type: protocol.CmdBlockStatus, Length: 512})
	base := set(protocol.ContextBaseAllocation)
	cutOff := (&protocol.MetaContextRequest{Queries: []string{protocol.ContextBaseAllocation, "other:"}}).AppendTo(nil)
	cutOff = cutOff[:len(cutOff)-1]
	for name, tt := range map[string]struct {
		opts [][]byte
		want bool
	}{
		"once":                      {[][]byte{base}, true},
		"twice":                     {[][]byte{base, base}, true},
		"among unknown ones":        {[][]byte{set("x-y:z", "base:other", protocol.ContextBaseAllocation, "qemu:dirty-bitmap:b")}, true},
		"only unknown ones":         {[][]byte{base, set("x-y:z", "base:other")}, false},
		"nothing":                   {[][]byte{base, set()}, false},
		"wildcard":                  {[][]byte{base, set("base:")}, false},
		"bad data":                  {[][]byte{base, option(protocol.OptSetMetaContext, []byte{1})}, false},
		"cut off after a match":     {[][]byte{option(protocol.OptSetMetaContext, cutOff)}, false},
		"too long":                  {[][]byte{base, option(protocol.OptSetMetaContext, make([]byte, 1<<20))}, false},
		"listing does not count":    {[][]byte{base, option(protocol.OptListMetaContext, (&protocol.MetaContextRequest{}).AppendTo(nil))}, true},
		"only listed":               {[][]byte{option(protocol.OptListMetaContext, (&protocol.MetaContextRequest{}).AppendTo(nil))}, false},
		"info between does no harm": {[][]byte{base, option(protocol.OptInfo, (&protocol.InfoRequest{Export: "other"}).AppendTo(nil))}, true},
	} {
		got := converse(t, hello(append(append([][]byte{structured}, tt.opts...), open, status)...))
		h := protocol.ChunkHeader{Type: protocol.ReplyBlockStatus, Flags: protocol.ReplyFlagDone}
		if has := bytes.Contains(got, h.AppendTo(nil)[:8]); has != tt.want {
			t.Errorf("%s: got status %v, need %v", name, has, tt.want)
		}
	}
}

// Requests of no bytes are refused, and the connection goes on.
func TestZeroLength(t *testing.T) {
	_, path := serveVast(t, newVast(1<<20), Options{})
	c := extendedConn(t, path)
	for cmd, want := range map[protocol.Command]protocol.Errno{
		protocol.CmdRead: protocol.EINVAL, protocol.CmdWrite: protocol.ENOSPC, protocol.CmdTrim: protocol.EINVAL,
		protocol.CmdCache: protocol.EINVAL, protocol.CmdWriteZeroes: protocol.ENOSPC, protocol.CmdBlockStatus: protocol.EINVAL,
	} {
		r := protocol.Request{Type: cmd, Cookie: uint64(cmd)}
		if cmd == protocol.CmdWrite {
			r.Flags = protocol.CmdFlagPayloadLen
		}
		c.send(r)
		h, data := c.chunk()
		e := protocol.ErrorChunk{Type: h.Type}
		if err := e.Decode(data); err != nil || e.Errno != want || h.Cookie != r.Cookie {
			t.Errorf("%v: got %+v, %v", cmd, e, err)
		}
	}
}

// A client that never reads holds at most one reply for each thread, the one that
// is being written and maxQueued bytes behind it, and no more calls are made.
func TestNeverReads(t *testing.T) {
	const threads, size = 4, 1 << 20
	for _, slow := range []bool{false, true} {
		t.Run(fmt.Sprintf("slow=%v", slow), func(t *testing.T) {
			h := newHooked()
			var calls, buffers atomic.Int64
			h.before = func(_ *backend.Call, cb backend.Callback, _ uint64) error {
				if cb == backend.Pread {
					calls.Add(1)
					buffers.Store(max(buffers.Load(), backend.BuffersInUse()))
					if slow {
						runtime.Gosched()
					}
				}
				return nil
			}
			s, _, path := serve(t, h, Options{Threads: threads, DrainTimeout: 200 * time.Millisecond})
			nc := raw(t, path)
			var out []byte
			for i := range uint64(1000) {
				out = append(out, request(protocol.Request{Type: protocol.CmdRead, Cookie: i, Length: size})...)
			}
			go nc.Write(out)
			for calls.Load() == 0 {
				runtime.Gosched()
			}
			// The drain is the time in which a server without bounds would
			// go on, and ends when nothing more happens.
			s.Shutdown()
			if !s.Wait() {
				t.Error("calls did not return")
			}
			if n := calls.Load(); n > 3*threads+4 {
				t.Errorf("%d reads were carried out", n)
			}
			if n := buffers.Load(); n > 3*threads+4 {
				t.Errorf("%d buffers were in use", n)
			}
		})
	}
}

// A client that says nothing, or stops in the middle of its handshake, is gone
// after HandshakeTimeout; one that is through may be idle.
func TestHandshakeTimeout(t *testing.T) {
	s, uri, path := serve(t, newHooked(), Options{HandshakeTimeout: 100 * time.Millisecond})
	idle := dial(t, uri, nil)
	for _, said := range [][]byte{nil, {0, 0}, hello(structured), hello(option(1234, make([]byte, 1<<20))[:500])} {
		nc := connect(t, path)
		nc.Write(said)
		if _, err := io.Copy(io.Discard, nc); err != nil {
			t.Errorf("after %d bytes: %v", len(said), err)
		}
	}
	if err := idle.Flush(); err != nil {
		t.Errorf("the one that was through: %v", err)
	}
	_ = s
}

// Thousands of connections at a time, of which none holds a buffer while it is
// idle, and all of which are served.
func TestManyConnections(t *testing.T) {
	n := 3000
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		t.Fatal(err)
	}
	n = min(n, int(limit.Cur-200)/2)
	s, _, path := serve(t, newHooked(), Options{})
	conns := make([]net.Conn, n)
	for i := range conns {
		conns[i] = raw(t, path)
	}
	holdsNothing(t, s)
	r := request(protocol.Request{Type: protocol.CmdRead, Cookie: 1, Length: 512})
	for _, nc := range conns {
		nc.Write(r)
	}
	for _, nc := range conns {
		if m := readReply(t, nc, 512); m.Errno != 0 {
			t.Fatalf("got %+v", m)
		}
	}
}

// A client on a Unix socket has no address, whatever it has called its own.
func TestUnixPeerName(t *testing.T) {
	s, _, path := serve(t, newHooked(), Options{Limits: Limits{ConnectionsPerAddress: 1}})
	mine := filepath.Join(t.TempDir(), "a")
	for _, name := range []string{mine + ":1", mine + ":2"} {
		nc, err := net.DialUnix("unix", &net.UnixAddr{Name: name, Net: "unix"}, &net.UnixAddr{Name: path, Net: "unix"})
		if err != nil {
			t.Fatal(err)
		}
		defer nc.Close()
		if _, err := io.ReadFull(nc, make([]byte, protocol.GreetingSize)); err != nil {
			t.Fatal(err)
		}
	}
	if st := s.Stats(); st.Accepted != 2 {
		t.Errorf("got %+v, need 2 connections accepted", st)
	}
}

// A client that goes while it waits for its turn to be served does not stay.
func TestTurnGone(t *testing.T) {
	h := newHooked()
	h.model = backend.SerializeConnections
	s, uri, path := serve(t, h, Options{})
	dial(t, uri, nil)
	for range 10 {
		connect(t, path).Close()
	}
	eventually(t, s, func(st Stats) bool { return st.Accepted == 11 && st.Connections == 1 })
}
