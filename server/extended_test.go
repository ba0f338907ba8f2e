package server

import (
	"errors"
	"fmt"
	"math"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"

	"nbdhost/backend"
	"nbdhost/client"
	"nbdhost/protocol"
)

// vast is a disk of any size that holds nothing, and a record of what it is asked.
type vast struct {
	*hooked
	size    int64
	without backend.Callback                           // one that it has not got
	can     func(cb backend.Callback) (n int, ok bool) // nil for the usual answers
	pause   chan struct{}                              // if not nil each call takes from it
	blocks  backend.BlockSize
	mu      sync.Mutex // guards what follows
	fail    func(off uint64) error
	extents func(n uint32, off uint64, x *backend.Extents) error
	asked   []string
}

func (v *vast) Has(cb backend.Callback) bool {
	if v.can != nil {
		if _, ok := v.can(cb); ok {
			return true
		}
	}
	return cb == backend.BlockSizes || v.hooked.Has(cb) && (v.without == 0 || cb != v.without)
}

func (v *vast) Open(c *backend.Call, readonly bool, export string) (backend.Handle, error) {
	h, err := v.hooked.Open(c, readonly, export)
	return vastHandle{h, v}, err
}

type vastHandle struct {
	backend.Handle
	v *vast
}

func (h vastHandle) note(what string, n uint32, off uint64) error {
	h.v.mu.Lock()
	h.v.asked = append(h.v.asked, fmt.Sprintf("%s %#x+%#x", what, off, n))
	fail := h.v.fail
	h.v.mu.Unlock()
	if h.v.pause != nil {
		<-h.v.pause
	}
	if fail != nil {
		return fail(off)
	}
	return nil
}

// says sets what the next answers are.
func (v *vast) says(extents func(n uint32, off uint64, x *backend.Extents) error, fail func(off uint64) error) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.extents, v.fail = extents, fail
}

// took returns what was asked since the last time.
func (v *vast) took() []string {
	v.mu.Lock()
	defer v.mu.Unlock()
	a := v.asked
	v.asked = nil
	return a
}

func (h vastHandle) GetSize(*backend.Call) (int64, error) { return h.v.size, nil }
func (h vastHandle) Can(c *backend.Call, cb backend.Callback) (int, error) {
	if h.v.can != nil {
		if n, ok := h.v.can(cb); ok {
			return n, nil
		}
	}
	return h.Handle.Can(c, cb)
}
func (h vastHandle) BlockSize(*backend.Call) (backend.BlockSize, error) {
	return h.v.blocks, nil
}
func (h vastHandle) Pread(_ *backend.Call, p []byte, off uint64) error {
	for i := range p {
		p[i] = 'd'
	}
	return h.note("pread", uint32(len(p)), off)
}
func (h vastHandle) Pwrite(_ *backend.Call, p []byte, off uint64, _ backend.Flags) error {
	return h.note("pwrite", uint32(len(p)), off)
}
func (h vastHandle) Trim(_ *backend.Call, n uint32, off uint64, _ backend.Flags) error {
	return h.note("trim", n, off)
}
func (h vastHandle) Zero(_ *backend.Call, n uint32, off uint64, _ backend.Flags) error {
	return h.note("zero", n, off)
}
func (h vastHandle) Cache(_ *backend.Call, n uint32, off uint64) error {
	return h.note("cache", n, off)
}
func (h vastHandle) Extents(_ *backend.Call, n uint32, off uint64, _ backend.Flags, x *backend.Extents) error {
	if err := h.note("extents", n, off); err != nil {
		return err
	}
	h.v.mu.Lock()
	extents := h.v.extents
	h.v.mu.Unlock()
	if extents != nil {
		return extents(n, off, x)
	}
	return x.Add(off, uint64(n), backend.ExtentHole|backend.ExtentZero)
}

func newVast(size int64) *vast { return &vast{hooked: newHooked(), size: size} }

// serveVast is serve for a vast disk.
func serveVast(t testing.TB, v *vast, o Options) (uri, path string) {
	t.Helper()
	_, uri, path = serveBackend(t, v, v.hooked, o)
	return uri, path
}

func equal(t *testing.T, what string, got, want []string) {
	t.Helper()
	if !slices.Equal(got, want) {
		t.Errorf("%s: got %q, need %q", what, got, want)
	}
}

// Requests of more than 4 GiB become several calls, each aligned to 64 KiB as the
// first was, and one reply.
func TestSplit(t *testing.T) {
	v := newVast(math.MaxInt64)
	uri, _ := serveVast(t, v, Options{})
	c := dial(t, uri, nil)
	if !c.Extended() {
		t.Fatal("extended headers were not negotiated")
	}
	for _, tt := range []struct {
		n, off uint64
		want   []string // without the callback's name
	}{
		{math.MaxUint32, 7, []string{"0x7+0xffffffff"}},
		{1 << 32, 4096, []string{"0x1000+0xffff0000", "0x100001000-"}},
		{3<<32 + 1, 1 << 40, []string{"0x10000000000+0xffff0000", "0x100ffff0000+0xffff0000", "0x101fffe0000+0xffff0000", "0x102fffd0000+0x30001"}},
		{1, math.MaxInt64 - 1, []string{"0x7ffffffffffffffe+0x1"}},
	} {
		for op, call := range map[string]func() error{
			"trim":  func() error { return c.Trim(tt.n, tt.off, protocol.CmdFlagFUA) },
			"zero":  func() error { return c.Zero(tt.n, tt.off, 0) },
			"cache": func() error { return c.Cache(tt.n, tt.off, 0) },
		} {
			if err := call(); err != nil {
				t.Errorf("%s %d at %d: %v", op, tt.n, tt.off, err)
			}
			var want []string
			for _, w := range tt.want {
				if w == "0x100001000-" {
					w = "0xffff1000+0x10000"
				}
				want = append(want, op+" "+w)
			}
			equal(t, op, v.took(), want)
		}
	}
}

// Where one of the calls fails the client is told how far it went.
func TestSplitFails(t *testing.T) {
	v := newVast(math.MaxInt64)
	v.fail = func(off uint64) error {
		if off > 1<<33 {
			return &backend.Error{Module: "mem", Op: "zero", Errno: syscall.ENOSPC, Msg: "full"}
		}
		return nil
	}
	_, path := serveVast(t, v, Options{})
	c := extendedConn(t, path)
	c.send(protocol.Request{Type: protocol.CmdWriteZeroes, Cookie: 5, Offset: 1 << 32, Length: 1 << 40})
	h, data := c.chunk()
	e := protocol.ErrorChunk{Type: h.Type}
	if err := e.Decode(data); err != nil || h.Type != protocol.ReplyErrorOffset || h.Cookie != 5 || h.Offset != 1<<32 ||
		e.Errno != protocol.ENOSPC || e.Msg != "full" || e.Offset != 1<<32+2*0xffff0000 {
		t.Errorf("got %+v, %+v, %v", h, e, err)
	}
	// The error of the next one says nothing of that.
	c.send(protocol.Request{Type: protocol.CmdFlush, Cookie: 6, Length: 1})
	if h, _ = c.chunk(); h.Type != protocol.ReplyError || h.Cookie != 6 || h.Offset != 0 {
		t.Errorf("got %+v", h)
	}
}

// A huge request stops between two calls when the server does, and lets other
// connections go first where the thread model serialises.
func TestSplitYields(t *testing.T) {
	v := newVast(math.MaxInt64)
	v.model = backend.SerializeAllRequests
	v.pause = make(chan struct{})
	uri, _ := serveVast(t, v, Options{})
	huge, other := dial(t, uri, nil), dial(t, uri, nil)
	done := make(chan error, 1)
	if _, err := huge.AioTrim(1<<62, 0, 0, func(err error) int { done <- err; return 1 }); err != nil {
		t.Fatal(err)
	}
	v.pause <- struct{}{} // it is under way
	read := make(chan error, 1)
	go func() { read <- other.Pread(make([]byte, 512), 0) }()
	for answered := false; !answered; {
		select {
		case v.pause <- struct{}{}:
		case err := <-read:
			answered = true
			if err != nil {
				t.Error(err)
			}
		case err := <-done:
			t.Fatalf("the huge request has ended: %v", err)
		}
	}
	v.server.Shutdown()
	for {
		select {
		case v.pause <- struct{}{}:
			continue
		case err := <-done:
			if errnoOf(err) != protocol.ESHUTDOWN {
				t.Errorf("got %v, need NBD_ESHUTDOWN", err)
			}
		}
		break
	}
}

// An answer about very many extents ends early, and the memory for many is not kept.
func TestManyExtents(t *testing.T) {
	v := newVast(math.MaxInt64)
	v.extents = func(n uint32, off uint64, x *backend.Extents) error {
		for i := range uint64(n) / 512 {
			if err := x.Add(off+i*512, 512, uint32(i%2)*3); err != nil {
				return err
			}
		}
		return nil
	}
	uri, _ := serveVast(t, v, Options{Threads: 1})
	c := dial(t, uri, nil)
	for _, asked := range []uint64{2 * backend.MaxExtents, 2 * keptExtents} { // the last is short enough for the reader to stay
		runs, err := c.BlockStatus(512*asked, 0, 0)
		if n, need := len(runs[protocol.ContextBaseAllocation]), int(min(asked, backend.MaxExtents)); err != nil || n != need {
			t.Errorf("got %d runs, %v, need %d", n, err, need)
		}
	}
	r := only(t, v.server).reader.Load()
	c.Close()
	eventually(t, v.server, func(st Stats) bool { return st.Connections == 0 })
	if n := cap(r.status.Descriptors) + cap(r.extents.List()) + cap(r.aligned); n > 0 {
		t.Errorf("%d extents are kept", n)
	}
}

// To ask again and again about very many extents does not make the module look at them
// over and over.
func TestManyExtentsAgain(t *testing.T) {
	const size = 256 << 20
	v := newVast(size)
	var looked atomic.Int64
	v.extents = func(n uint32, off uint64, x *backend.Extents) error {
		for end := off + uint64(n); off < end; off += 512 {
			looked.Add(1)
			if err := x.Add(off, 512, uint32(off/512%2)*3); err != nil {
				return err
			}
		}
		return nil
	}
	uri, _ := serveVast(t, v, Options{})
	c := dial(t, uri, nil)
	got := 0
	for off := uint64(0); off < size; {
		runs, err := c.BlockStatus(size-off, off, 0)
		if err != nil {
			t.Fatal(err)
		}
		got += len(runs[protocol.ContextBaseAllocation])
		for _, d := range runs[protocol.ContextBaseAllocation] {
			off += d.Length
		}
	}
	if got != size/512 {
		t.Errorf("got %d runs, need %d", got, size/512)
	}
	// All of them at first, and from then on few that there was no room for.
	if n := looked.Load(); n > 3*size/512 {
		t.Errorf("the module looked at %d extents, of %d", n, size/512)
	}
}

// A huge request ends when its client has gone.
func TestHugeGone(t *testing.T) {
	v := newVast(math.MaxInt64)
	v.pause = make(chan struct{})
	_, path := serveVast(t, v, Options{})
	c := extendedConn(t, path)
	c.send(protocol.Request{Type: protocol.CmdTrim, Length: math.MaxInt64})
	v.pause <- struct{}{}
	c.Close()
	eventually(t, v.server, func(st Stats) bool {
		select {
		case v.pause <- struct{}{}:
		default:
		}
		return st.Connections == 0
	})
}

// Block status of more than 4 GiB: one descriptor of 64 bits, from several calls.
func TestStatus64(t *testing.T) {
	v := newVast(math.MaxInt64)
	uri, _ := serveVast(t, v, Options{})
	c := dial(t, uri, nil)
	get := func(n, off uint64, flags protocol.CommandFlags) []protocol.Descriptor {
		t.Helper()
		runs, err := c.BlockStatus(n, off, flags)
		if err != nil {
			t.Fatal(err)
		}
		return runs[protocol.ContextBaseAllocation]
	}
	const hole = protocol.StateHole | protocol.StateZero
	check := func(what string, got []protocol.Descriptor, want ...protocol.Descriptor) {
		t.Helper()
		if !slices.Equal(got, want) {
			t.Errorf("%s: got %v, need %v", what, got, want)
		}
	}
	check("2^33", get(1<<33, 0, 0), protocol.Descriptor{Length: 1 << 33, Flags: hole})
	equal(t, "2^33", v.took(), []string{"extents 0x0+0xffff0000", "extents 0xffff0000+0xffff0000", "extents 0x1fffe0000+0x20000"})
	// CVE-2025-47711 was about this length.
	check("2^32-1", get(math.MaxUint32, 0, 0), protocol.Descriptor{Length: math.MaxUint32, Flags: hole})
	check("only one", get(1<<40, 0, protocol.CmdFlagReqOne), protocol.Descriptor{Length: 0xffff0000, Flags: hole})
	check("the last byte", get(1, math.MaxInt64-1, 0), protocol.Descriptor{Length: 1, Flags: hole})
	// Not more calls than are bearable.
	v.took()
	check("2^62", get(1<<62, 0, 0), protocol.Descriptor{Length: maxStatusCalls * 0xffff0000, Flags: hole})
	if n := len(v.took()); n != maxStatusCalls {
		t.Errorf("got %d calls, need %d", n, maxStatusCalls)
	}
	// A module may know more than it was asked for, or less.
	v.says(func(_ uint32, off uint64, x *backend.Extents) error { return x.Add(0, 1<<63-1, 0) }, nil)
	check("all of it", get(1, 5, 0), protocol.Descriptor{Length: math.MaxInt64 - 5})
	v.says(func(_ uint32, off uint64, x *backend.Extents) error { return x.Add(off, 100, 0) }, nil)
	check("less", get(1<<40, 5, 0), protocol.Descriptor{Length: 100})
	// An error of a later call only ends the answer.
	v.says(nil, func(off uint64) error {
		if off > 0 {
			return &backend.Error{Module: "mem", Op: "extents", Errno: syscall.EIO}
		}
		return nil
	})
	check("error", get(1<<40, 0, 0), protocol.Descriptor{Length: 0xffff0000, Flags: hole})
	if _, err := c.BlockStatus(1<<40, 1, 0); errnoOf(err) != protocol.EIO {
		t.Errorf("error of the first call: got %v", err)
	}
	// With compact headers a run is cut off at a multiple of 64 KiB.
	v.says(func(_ uint32, off uint64, x *backend.Extents) error { return x.Add(0, 1<<63-1, 0) }, nil)
	c = dial(t, uri, &client.Options{CompactHeaders: true})
	check("compact", get(math.MaxUint32, 0, 0), protocol.Descriptor{Length: 0xffff0000}, protocol.Descriptor{Length: 0xffff0000})
}

// NBD_CMD_BLOCK_STATUS with a payload: the contexts in it must be those that were
// selected, each once, and the connection goes on whatever they are.
func TestStatusPayload(t *testing.T) {
	v := newVast(1 << 40)
	_, path := serveVast(t, v, Options{})
	c := extendedConn(t, path)
	if c.flags&protocol.FlagBlockStatusPayload == 0 {
		t.Fatalf("got %v", c.flags)
	}
	query := func(n uint64, ids ...uint32) []byte {
		return (&protocol.BlockStatusRequest{Length: n, ContextIDs: ids}).AppendTo(nil)
	}
	for i, tt := range []struct {
		payload []byte
		want    protocol.Errno
	}{
		{query(1<<33, baseAllocation), 0},
		{query(1 << 33), protocol.EINVAL},
		{query(1<<33, 2), protocol.EINVAL},
		{query(1<<33, baseAllocation, 2), protocol.EINVAL},
		{query(1<<33, baseAllocation, baseAllocation), protocol.EINVAL},
		{query(1<<40+1, baseAllocation), protocol.EINVAL},
		{query(0, baseAllocation), protocol.EINVAL},
		{make([]byte, 1), protocol.EINVAL},
		{make([]byte, 1<<20), protocol.EINVAL},
		{append(query(512, baseAllocation), 0), protocol.EINVAL},
		{query(512, baseAllocation), 0},
	} {
		c.send(protocol.Request{Type: protocol.CmdBlockStatus, Flags: protocol.CmdFlagPayloadLen, Cookie: uint64(i), Length: uint64(len(tt.payload))}, tt.payload...)
		h, data := c.chunk()
		if h.Cookie != uint64(i) || h.Flags != protocol.ReplyFlagDone {
			t.Fatalf("%d: got %+v", i, h)
		}
		if tt.want == 0 {
			var s protocol.BlockStatus
			if err := s.DecodeExtended(data); err != nil || h.Type != protocol.ReplyBlockStatusExt || s.ContextID != baseAllocation {
				t.Errorf("%d: got %+v, %+v, %v", i, h, s, err)
			}
			continue
		}
		e := protocol.ErrorChunk{Type: h.Type}
		if err := e.Decode(data); err != nil || e.Errno != tt.want || e.Msg == "" {
			t.Errorf("%d: got %+v, %+v, %v", i, h, e, err)
		}
	}
}

// A payload that is not wanted is consumed; one that cannot be believed ends the
// connection.
func TestPayloadLength(t *testing.T) {
	v := newVast(1 << 40)
	_, path := serveVast(t, v, Options{})
	for _, tt := range []struct {
		name  string
		r     protocol.Request
		data  int
		reply protocol.Errno // 0: none
		ends  bool
	}{
		{"of a trim", protocol.Request{Type: protocol.CmdTrim, Flags: protocol.CmdFlagPayloadLen, Length: 1000}, 1000, protocol.EINVAL, false},
		{"of an unknown command", protocol.Request{Type: 55, Flags: protocol.CmdFlagPayloadLen, Length: 1 << 20}, 1 << 20, protocol.EINVAL, false},
		{"of an unknown command, no flag", protocol.Request{Type: 55, Length: 1 << 60}, 0, protocol.EINVAL, false},
		{"too long a write", protocol.Request{Type: protocol.CmdWrite, Flags: protocol.CmdFlagPayloadLen, Length: protocol.MaxRequestLength + 1}, protocol.MaxRequestLength + 1, protocol.ENOMEM, false},
		{"write of nothing", protocol.Request{Type: protocol.CmdWrite, Flags: protocol.CmdFlagPayloadLen}, 0, protocol.ENOSPC, false},
		{"write without the flag", protocol.Request{Type: protocol.CmdWrite, Length: 512}, 0, protocol.EINVAL, true},
		{"more than 32 bits", protocol.Request{Type: protocol.CmdWrite, Flags: protocol.CmdFlagPayloadLen, Length: 1 << 32}, 0, 0, true},
		{"compact header", protocol.Request{Type: protocol.CmdRead}, -1, 0, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c := extendedConn(t, path)
			if tt.data < 0 {
				c.Write(append(tt.r.AppendTo(nil), 0, 0, 0, 0))
			} else {
				go c.Write(append(tt.r.AppendExtendedTo(nil), make([]byte, tt.data)...))
			}
			if tt.reply != 0 {
				h, data := c.chunk()
				e := protocol.ErrorChunk{Type: h.Type}
				if err := e.Decode(data); err != nil || e.Errno != tt.reply {
					t.Errorf("got %+v, %+v, %v", h, e, err)
				}
			}
			if tt.ends {
				if n, err := c.Read(make([]byte, 1)); n > 0 || err == nil {
					t.Error("the connection goes on")
				}
				return
			}
			c.send(protocol.Request{Type: protocol.CmdFlush, Cookie: 9})
			if h, _ := c.chunk(); h.Type != protocol.ReplyNone || h.Cookie != 9 || h.Flags != protocol.ReplyFlagDone {
				t.Errorf("next request: got %+v", h)
			}
		})
	}
}

// What follows extended headers in the handshake.
func TestExtendedHandshake(t *testing.T) {
	ext := option(protocol.OptExtendedHeaders, nil)
	const ack = protocol.RepAck
	for _, tt := range []struct {
		name string
		o    Options
		opts [][]byte
		want []protocol.OptionReply
	}{
		{"accepted", Options{}, [][]byte{ext}, []protocol.OptionReply{ack}},
		{"twice", Options{}, [][]byte{ext, ext}, []protocol.OptionReply{ack, protocol.RepErrInvalid}},
		{"with data", Options{}, [][]byte{option(protocol.OptExtendedHeaders, []byte("x")), structured}, []protocol.OptionReply{protocol.RepErrInvalid, ack}},
		{"structured replies before", Options{}, [][]byte{structured, ext}, []protocol.OptionReply{ack, ack}},
		{"structured replies after", Options{}, [][]byte{ext, structured}, []protocol.OptionReply{ack, protocol.RepErrExtHeaderReqd}},
		{"contexts after", Options{}, [][]byte{ext, setContext}, []protocol.OptionReply{ack, protocol.RepMetaContext, ack}},
		{"off", Options{NoExtendedHeaders: true}, [][]byte{ext, structured}, []protocol.OptionReply{protocol.RepErrUnsup, ack}},
		{"off with structured replies", Options{NoStructuredReplies: true}, [][]byte{ext, structured}, []protocol.OptionReply{protocol.RepErrUnsup, protocol.RepErrUnsup}},
		{"export name", Options{}, [][]byte{ext, option(protocol.OptExportName, nil)}, []protocol.OptionReply{ack}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			replies, _ := optionReplies(t, converseWith(t, tt.o, hello(tt.opts...)))
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

// NBD_FLAG_BLOCK_STATUS_PAYLOAD needs extended headers and a context.
func TestStatusPayloadFlag(t *testing.T) {
	ext := option(protocol.OptExtendedHeaders, nil)
	for name, tt := range map[string]struct {
		opts [][]byte
		want bool
	}{
		"extended with context": {[][]byte{ext, setContext}, true},
		"extended alone":        {[][]byte{ext}, false},
		"structured":            {[][]byte{structured, setContext}, false},
	} {
		replies, data := optionReplies(t, converse(t, hello(append(tt.opts, option(protocol.OptInfo, (&protocol.InfoRequest{}).AppendTo(nil)))...)))
		for i, r := range replies {
			var e protocol.ExportInfo
			if r.Type == protocol.RepInfo && e.Decode(data[i]) == nil && (e.Flags&protocol.FlagBlockStatusPayload != 0) != tt.want {
				t.Errorf("%s: got %v", name, e.Flags)
			}
		}
	}
}

// A peer is a connection with extended headers and base:allocation, by hand.
type peer struct {
	net.Conn
	t     testing.TB
	flags protocol.ExportFlags
}

func extendedConn(t testing.TB, path string) *peer {
	return handshake(t, path, protocol.OptExtendedHeaders)
}

// handshake negotiates one way of replies, and base:allocation, by hand.
func handshake(t testing.TB, path string, way protocol.Option, infos ...protocol.Info) *peer {
	t.Helper()
	c := &peer{Conn: connect(t, path), t: t}
	c.take(protocol.GreetingSize)
	open := option(protocol.OptGo, (&protocol.InfoRequest{Infos: infos}).AppendTo(nil))
	c.Write(hello(option(way, nil), setContext, open))
	for {
		var h protocol.OptionReplyHeader
		if err := h.Decode(c.take(protocol.OptionReplyHeaderSize)); err != nil || h.Type.IsError() {
			t.Fatalf("got %+v, %v", h, err)
		}
		data := c.take(int(h.Length))
		var e protocol.ExportInfo
		if h.Type == protocol.RepInfo && e.Decode(data) == nil {
			c.flags = e.Flags
		}
		if h.Option == protocol.OptGo && h.Type == protocol.RepAck {
			return c
		}
	}
}

func (c *peer) take(n int) []byte {
	c.t.Helper()
	b := make([]byte, n)
	for got := 0; got < n; {
		k, err := c.Read(b[got:])
		if err != nil {
			c.t.Fatalf("got %d bytes, need %d: %v", got, n, err)
		}
		got += k
	}
	return b
}

func (c *peer) send(r protocol.Request, payload ...byte) {
	c.t.Helper()
	if _, err := c.Write(append(r.AppendExtendedTo(nil), payload...)); err != nil && !errors.Is(err, syscall.EPIPE) {
		c.t.Fatal(err)
	}
}

// chunk takes one chunk with an extended header.
func (c *peer) chunk() (h protocol.ChunkHeader, data []byte) {
	c.t.Helper()
	if err := h.DecodeExtended(c.take(protocol.ExtendedChunkHeaderSize)); err != nil {
		c.t.Fatal(err)
	}
	return h, c.take(int(h.Length))
}

// compactChunk takes one with a compact header.
func (c *peer) compactChunk() (h protocol.ChunkHeader, data []byte) {
	c.t.Helper()
	if err := h.Decode(c.take(protocol.ChunkHeaderSize)); err != nil {
		c.t.Fatal(err)
	}
	return h, c.take(int(h.Length))
}

// Extents with their bounds moved to blocks: what several share is what all are.
func TestAlign(t *testing.T) {
	const hole, zero = backend.ExtentHole, backend.ExtentZero
	x := func(off, n uint64, typ uint32) backend.Extent {
		return backend.Extent{Offset: off, Length: n, Type: typ}
	}
	for _, tt := range []struct {
		name     string
		in, want []backend.Extent
	}{
		{"aligned already", []backend.Extent{x(0, 512, 0), x(512, 1024, hole)}, []backend.Extent{x(0, 512, 0), x(512, 1024, hole)}},
		{"shared block", []backend.Extent{x(0, 700, hole|zero), x(700, 836, zero)}, []backend.Extent{x(0, 512, hole|zero), x(512, 1024, zero)}},
		{"shared by three", []backend.Extent{x(0, 600, hole|zero), x(600, 100, hole), x(700, 324, hole|zero)}, []backend.Extent{x(0, 512, hole|zero), x(512, 512, hole)}},
		{"small ones", []backend.Extent{x(0, 1, hole), x(1, 1, zero), x(2, 510, hole), x(512, 512, hole)}, []backend.Extent{x(0, 512, 0), x(512, 512, hole)}},
		{"end of the export", []backend.Extent{x(9728, 100, hole), x(9828, 172, zero)}, []backend.Extent{x(9728, 272, 0)}},
		{"end of the export, whole", []backend.Extent{x(9728, 272, hole)}, []backend.Extent{x(9728, 272, hole)}},
		{"end of what is known", []backend.Extent{x(0, 1000, hole)}, []backend.Extent{x(0, 512, hole)}},
		{"nothing is known", []backend.Extent{x(512, 100, hole)}, []backend.Extent{x(512, 512, 0)}},
		{"merged", []backend.Extent{x(0, 500, hole), x(500, 24, 0), x(524, 1012, 0)}, []backend.Extent{x(0, 1536, 0)}},
	} {
		if got := align(nil, tt.in, 512, 10000); !slices.Equal(got, tt.want) {
			t.Errorf("%s: got %v, need %v", tt.name, got, tt.want)
		}
	}
}

// Strict block sizes bind the clients that asked for them, and no others; others
// bind nobody.
func TestBlockSizes(t *testing.T) {
	v := newVast(1<<20 + 100)
	v.blocks = backend.BlockSize{Min: 512, Preferred: 4096, Max: 65536}
	v.extents = func(_ uint32, off uint64, x *backend.Extents) error {
		return errors.Join(x.Add(0, 1000, 0), x.Add(1000, 1<<20, backend.ExtentHole))
	}
	t.Run("lenient", func(t *testing.T) { // is over before the other server counts buffers
		lenient := newVast(1<<20 + 100)
		lenient.blocks = v.blocks
		_, lax := serveVast(t, lenient, Options{})
		c := handshake(t, lax, protocol.OptStructuredReply, protocol.InfoBlockSize)
		c.Write((&protocol.Request{Type: protocol.CmdRead, Offset: 1, Length: 65536 + 512}).AppendTo(nil))
		if h, data := c.compactChunk(); h.Type != protocol.ReplyOffsetData {
			t.Errorf("got %+v %q", h, data)
		}
	})
	_, path := serveVast(t, v, Options{StrictBlockSize: true})
	for _, tt := range []struct {
		infos []protocol.Info
		r     protocol.Request
		want  protocol.Errno
	}{
		{[]protocol.Info{protocol.InfoBlockSize}, protocol.Request{Type: protocol.CmdRead, Offset: 1, Length: 512}, protocol.EINVAL},
		{[]protocol.Info{protocol.InfoBlockSize}, protocol.Request{Type: protocol.CmdRead, Length: 65536 + 512}, protocol.EINVAL},
		{[]protocol.Info{protocol.InfoBlockSize}, protocol.Request{Type: protocol.CmdRead, Offset: 1 << 20, Length: 100}, 0},
		{[]protocol.Info{protocol.InfoName}, protocol.Request{Type: protocol.CmdRead, Offset: 1, Length: 512}, 0},
		{nil, protocol.Request{Type: protocol.CmdRead, Length: 65536 + 512}, 0},
	} {
		c := handshake(t, path, protocol.OptStructuredReply, tt.infos...)
		c.Write(tt.r.AppendTo(nil))
		h, data := c.compactChunk()
		e := protocol.ErrorChunk{Type: h.Type}
		if h.Type.IsError() {
			e.Decode(data)
		}
		if e.Errno != tt.want {
			t.Errorf("%v %+v: got %+v %q, need %v", tt.infos, tt.r, h, data, tt.want)
		}
	}
	c := handshake(t, path, protocol.OptStructuredReply, protocol.InfoBlockSize)
	c.Write((&protocol.Request{Type: protocol.CmdBlockStatus, Length: 4096}).AppendTo(nil))
	_, data := c.compactChunk()
	var got protocol.BlockStatus
	want := []protocol.Descriptor{{Length: 1024}, {Length: 1<<20 + 100 - 1024, Flags: protocol.StateHole}}
	if err := got.Decode(data); err != nil || !slices.Equal(got.Descriptors, want) {
		t.Errorf("block status: got %+v, %v, need %v", got, err, want)
	}
}
