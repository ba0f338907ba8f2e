package server

import (
	"io"
	"net"
	"os"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"nbdhost/backend"
	"nbdhost/protocol"
)

// pair returns both ends of a connected socket.
func pair(t testing.TB) (net.Conn, *net.UnixConn) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	var ends [2]net.Conn
	for i, fd := range fds {
		f := os.NewFile(uintptr(fd), "socket")
		if ends[i], err = net.FileConn(f); err != nil {
			t.Fatal(err)
		}
		f.Close()
	}
	return ends[0], ends[1].(*net.UnixConn)
}

// converse sends data to a server as a client that then closes its side, and
// returns all that the server sent until it hung up.
func converse(t testing.TB, data []byte) []byte {
	return converseWith(t, Options{}, data)
}

func converseWith(t testing.TB, o Options, data []byte) []byte {
	h := &hooked{Mem: backend.NewMem(1 << 20), model: backend.Parallel}
	o.Chain = backend.NewChain(h, nil, backend.Trace{})
	s := New(o)
	ours, theirs := pair(t)
	done := make(chan struct{})
	go func() {
		s.ServeConn(ours)
		close(done)
	}()
	theirs.SetDeadline(time.Now().Add(20 * time.Second))
	go func() {
		theirs.Write(data) // fails where the server hangs up first
		theirs.CloseWrite()
	}()
	got, err := io.ReadAll(theirs)
	if os.IsTimeout(err) {
		t.Fatal("the server neither answers nor hangs up")
	}
	theirs.Close()
	<-done
	if o, c := h.opens.Load(), h.closes.Load(); o != c {
		t.Errorf("%d opens, %d closes", o, c)
	}
	return got
}

// hello is a client's way to the end of a handshake.
func hello(opts ...[]byte) []byte {
	b := (protocol.FlagCFixedNewstyle | protocol.FlagCNoZeroes).AppendTo(nil)
	for _, o := range opts {
		b = append(b, o...)
	}
	return b
}

func option(o protocol.Option, data []byte) []byte {
	h := protocol.OptionHeader{Option: o, Length: uint32(len(data))}
	return append(h.AppendTo(nil), data...)
}

var (
	goInfos = option(protocol.OptGo, (&protocol.InfoRequest{Infos: []protocol.Info{
		protocol.InfoName, protocol.InfoDescription, protocol.InfoBlockSize}}).AppendTo(nil))
	setContext = option(protocol.OptSetMetaContext,
		(&protocol.MetaContextRequest{Queries: []string{protocol.ContextBaseAllocation}}).AppendTo(nil))
	structured = option(protocol.OptStructuredReply, nil)
	everything = append(append([]byte{}, structured...), append(setContext, goInfos...)...)
)

func commands() (b []byte) {
	for i, r := range []protocol.Request{
		{Type: protocol.CmdWrite, Length: 512, Flags: protocol.CmdFlagFUA},
		{Type: protocol.CmdRead, Length: 1024, Flags: protocol.CmdFlagDF},
		{Type: protocol.CmdFlush},
		{Type: protocol.CmdTrim, Length: 70000, Offset: 1},
		{Type: protocol.CmdWriteZeroes, Length: 100, Flags: protocol.CmdFlagFastZero | protocol.CmdFlagNoHole},
		{Type: protocol.CmdCache, Length: 100},
		{Type: protocol.CmdBlockStatus, Length: 1 << 20, Flags: protocol.CmdFlagReqOne},
		{Type: protocol.CmdRead, Length: 1, Offset: 1<<20 - 1},
		{Type: protocol.CmdRead, Length: 2, Offset: 1<<20 - 1},
		{Type: 77, Length: 3},
		{Type: protocol.CmdDisc},
	} {
		r.Cookie = uint64(i)
		b = r.AppendTo(b)
		if r.Type == protocol.CmdWrite {
			b = append(b, make([]byte, r.Length)...)
		}
	}
	return b
}

// Whatever a client sends, the server answers or hangs up, closes what it opened
// and keeps no buffer.
func FuzzConnection(f *testing.F) {
	f.Add(hello(everything, commands()))
	f.Add(hello(option(protocol.OptExportName, []byte("name")), commands()))
	f.Add(hello(option(protocol.OptList, nil), option(protocol.OptStartTLS, nil), option(99, []byte("x")), option(protocol.OptAbort, nil)))
	f.Add(append(extendedHello[:len(extendedHello):len(extendedHello)], extendedCommands()...))
	f.Add(hello(option(1234, make([]byte, protocol.MaxOptionLength+1)), option(protocol.OptExtendedHeaders, nil), structured))
	f.Add(hello(option(protocol.OptInfo, (&protocol.InfoRequest{Export: "x"}).AppendTo(nil)), structured,
		option(protocol.OptListMetaContext, (&protocol.MetaContextRequest{}).AppendTo(nil))))
	f.Fuzz(func(t *testing.T, data []byte) {
		before := backend.BuffersInUse()
		converse(t, data)
		if n := backend.BuffersInUse(); n != before {
			t.Errorf("%d buffers in use, %d before", n, before)
		}
	})
}

// The same from the transmission phase on, which a fuzzer would take long to
// find the way to.
func FuzzTransmission(f *testing.F) {
	f.Add(commands())
	f.Fuzz(func(t *testing.T, data []byte) {
		before := backend.BuffersInUse()
		converse(t, hello(everything, data))
		if n := backend.BuffersInUse(); n != before {
			t.Errorf("%d buffers in use, %d before", n, before)
		}
	})
}

// extendedCommands are commands with extended headers, of more than 4 GiB too.
func extendedCommands() (b []byte) {
	for i, r := range []protocol.Request{
		{Type: protocol.CmdWrite, Length: 512, Flags: protocol.CmdFlagPayloadLen},
		{Type: protocol.CmdRead, Length: 512 << 10},
		{Type: protocol.CmdRead, Length: 2 << 20, Offset: 1},
		{Type: protocol.CmdBlockStatus, Length: 12, Flags: protocol.CmdFlagPayloadLen},
		{Type: protocol.CmdTrim, Length: 1 << 40},
		{Type: protocol.CmdBlockStatus, Length: 1 << 20},
		{Type: protocol.CmdFlush},
		{Type: protocol.CmdCache, Length: 9, Flags: protocol.CmdFlagPayloadLen},
		{Type: protocol.CmdDisc},
	} {
		r.Cookie = uint64(i)
		b = r.AppendExtendedTo(b)
		if r.Type == protocol.CmdBlockStatus && r.Flags != 0 {
			b = (&protocol.BlockStatusRequest{Length: 1 << 20, ContextIDs: []uint32{baseAllocation}}).AppendTo(b)
		} else {
			b = append(b, make([]byte, r.PayloadLength(true))...)
		}
	}
	return b
}

var extendedHello = hello(option(protocol.OptExtendedHeaders, nil), setContext, goInfos)

// FuzzTransmission with extended headers, and all that is answered with holes.
func FuzzExtendedTransmission(f *testing.F) {
	f.Add(extendedCommands())
	f.Fuzz(func(t *testing.T, data []byte) {
		before := backend.BuffersInUse()
		converseWith(t, Options{SparseReads: SparseAlways}, append(extendedHello[:len(extendedHello):len(extendedHello)], data...))
		if n := backend.BuffersInUse(); n != before {
			t.Errorf("%d buffers in use, %d before", n, before)
		}
	})
}

// A conversation cut off at every byte.
func TestTruncation(t *testing.T) {
	for _, all := range [][]byte{hello(everything, commands()), append(extendedHello, extendedCommands()...)} {
		for n := range all {
			converse(t, all[:n])
		}
	}
	if n := backend.BuffersInUse(); n != 0 {
		t.Errorf("%d buffers in use", n)
	}
}
