package server

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"nbdhost/backend"
	"nbdhost/client"
	"nbdhost/protocol"
)

// sealed stands for TLS: after a line from each side every byte is inverted. What
// real TLS does is tested with real clients.
type sealed struct{ net.Conn }

const secret = "hello, TLS\n"

func sealServer(nc net.Conn) (TLSConn, error) {
	b := make([]byte, len(secret))
	if _, err := io.ReadFull(nc, b); err != nil || string(b) != secret {
		return nil, errors.Join(errors.New("not TLS"), err)
	}
	_, err := io.WriteString(nc, secret)
	return &sealed{nc}, err
}

func sealClient(_ context.Context, nc net.Conn, _ *protocol.URI) (net.Conn, error) {
	if _, err := io.WriteString(nc, secret); err != nil {
		return nil, err
	}
	_, err := io.ReadFull(nc, make([]byte, len(secret)))
	return &sealed{nc}, err
}

func invert(p []byte) []byte {
	q := make([]byte, len(p))
	for i, c := range p {
		q[i] = ^c
	}
	return q
}

func (s *sealed) Read(p []byte) (int, error) {
	n, err := s.Conn.Read(p)
	copy(p, invert(p[:n]))
	return n, err
}

func (s *sealed) TryRead(fd uintptr, p []byte) (int, error) {
	p = p[:min(len(p), 1000)] // a short record
	n, err := unix.Read(int(fd), p)
	if err != nil {
		return 0, err
	}
	if n == 0 {
		return 0, io.EOF
	}
	copy(p, invert(p[:n]))
	return n, nil
}

func (s *sealed) Move(nc net.Conn) error {
	s.Conn = nc
	return nil
}

func (s *sealed) Write(p []byte) (int, error)    { return s.Conn.Write(invert(p)) }
func (s *sealed) Peer() (subject, issuer string) { return "CN=me", "CN=ca" }
func (s *sealed) Description() string            { return "inverted" }

// The engine works under TLS as without, and modules know who is there.
func TestTLS(t *testing.T) {
	h := newHooked()
	_, uri, path := serve(t, h, Options{TLS: sealServer})
	peer := make(chan string, 10)
	h.before = func(c *backend.Call, cb backend.Callback, _ uint64) error {
		if cb == backend.Open {
			peer <- fmt.Sprintf("%v %s by %s", c.Conn.TLS, c.Conn.TLSDN, c.Conn.TLSIssuerDN)
		}
		return nil
	}
	c := dial(t, "nbds+unix:///?socket="+path, &client.Options{TLS: sealClient})
	if got, want := <-peer, "true CN=me by CN=ca"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
	exercise(t, c, 0)
	if err := c.Disconnect(); err != nil {
		t.Error(err)
	}
	dial(t, uri, nil)
	if got, want := <-peer, "false  by "; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
}

// A connection that waits under TLS holds no buffer either.
func TestIdleHoldsNothingTLS(t *testing.T) {
	s, _, path := serve(t, newHooked(), Options{TLS: sealServer, TLSRequired: true})
	for range 5 {
		c := dial(t, "nbds+unix:///?socket="+path, &client.Options{TLS: sealClient})
		if err := c.Pread(make([]byte, 1<<20), 0); err != nil {
			t.Fatal(err)
		}
	}
	holdsNothing(t, s)
}

// stream is a client that has done the greeting and sends what it likes.
type stream struct {
	t *testing.T
	net.Conn
}

func greet(t *testing.T, path string) *stream {
	t.Helper()
	s := &stream{t, connect(t, path)}
	if _, err := io.ReadFull(s, make([]byte, protocol.GreetingSize)); err != nil {
		t.Fatal(err)
	}
	s.send((protocol.FlagCFixedNewstyle | protocol.FlagCNoZeroes).AppendTo(nil))
	return s
}

func (s *stream) send(b []byte) {
	s.t.Helper()
	if _, err := s.Write(b); err != nil {
		s.t.Fatal(err)
	}
}

// reply reads one reply to an option.
func (s *stream) reply() (protocol.OptionReply, []byte) {
	s.t.Helper()
	b := make([]byte, protocol.OptionReplyHeaderSize)
	var h protocol.OptionReplyHeader
	if _, err := io.ReadFull(s, b); err != nil {
		s.t.Fatal(err)
	}
	if err := h.Decode(b); err != nil {
		s.t.Fatal(err)
	}
	data := make([]byte, h.Length)
	if _, err := io.ReadFull(s, data); err != nil {
		s.t.Fatal(err)
	}
	return h.Type, data
}

func (s *stream) want(opt []byte, replies ...protocol.OptionReply) {
	s.t.Helper()
	s.send(opt)
	for _, want := range replies {
		if got, data := s.reply(); got != want {
			s.t.Errorf("option %d: got %v (%q), want %v", opt[11], got, data, want)
		}
	}
}

func (s *stream) startTLS() {
	s.t.Helper()
	s.want(option(protocol.OptStartTLS, nil), protocol.RepAck)
	under, err := sealClient(context.Background(), s.Conn, nil)
	if err != nil {
		s.t.Fatal(err)
	}
	s.Conn = under
}

// rawTLS is raw under TLS.
func rawTLS(t *testing.T, path string) net.Conn {
	t.Helper()
	s := greet(t, path)
	s.startTLS()
	s.send(option(protocol.OptExportName, nil))
	if _, err := io.ReadFull(s, make([]byte, 10)); err != nil {
		t.Fatal(err)
	}
	return s
}

// ended wants the server to close the connection without a word.
func (s *stream) ended() {
	s.t.Helper()
	if b, err := io.ReadAll(s); err != nil && !strings.Contains(err.Error(), "reset") || len(b) > 0 {
		s.t.Errorf("got %d bytes and %v, want the end", len(b), err)
	}
}

var (
	goDefault = option(protocol.OptGo, (&protocol.InfoRequest{}).AppendTo(nil))
	extended  = option(protocol.OptExtendedHeaders, nil)
)

// Before TLS a server that demands it answers nothing else, opens nothing, and
// consumes what the options carry.
func TestTLSRequired(t *testing.T) {
	h := newHooked()
	_, uri, path := serve(t, h, Options{TLS: sealServer, TLSRequired: true})
	const reqd, ack = protocol.RepErrTLSReqd, protocol.RepAck
	s := greet(t, path)
	for _, opt := range [][]byte{
		option(protocol.OptList, nil), option(protocol.OptList, make([]byte, 1000)), structured, extended, setContext, goDefault,
		option(protocol.OptInfo, []byte{1}), option(protocol.OptPeekExport, nil), option(12345, make([]byte, 4096)),
		option(protocol.OptInfo, make([]byte, protocol.MaxOptionLength+1)),
	} {
		s.want(opt, reqd)
	}
	s.want(option(protocol.OptStartTLS, []byte("x")), protocol.RepErrInvalid)
	if n := h.opens.Load(); n != 0 {
		t.Errorf("got %d opens before TLS, want 0", n)
	}
	s.startTLS()
	s.want(option(protocol.OptList, nil), protocol.RepServer, ack)
	s.want(goDefault, protocol.RepInfo, ack)

	s = greet(t, path)
	s.want(option(protocol.OptAbort, nil), ack)
	s.ended()
	s = greet(t, path)
	s.send(option(protocol.OptExportName, nil))
	s.ended()

	_, err := client.Dial(context.Background(), uri, nil)
	var refused *client.OptionError
	if !errors.As(err, &refused) || refused.Reply != reqd {
		t.Errorf("plain client: got %v, want %v", err, reqd)
	}
}

// What was negotiated in plain text does not count under TLS (CVE-2021-3716).
func TestTLSForgets(t *testing.T) {
	_, _, path := serve(t, newHooked(), Options{TLS: sealServer})
	const ack, invalid = protocol.RepAck, protocol.RepErrInvalid
	for name, plain := range map[string][]byte{"structured": structured, "extended": extended} {
		t.Run(name, func(t *testing.T) {
			s := greet(t, path)
			s.want(plain, ack)
			s.want(setContext, protocol.RepMetaContext, ack)
			s.startTLS()
			s.want(option(protocol.OptStartTLS, nil), invalid)
			s.want(setContext, invalid) // needs structured replies
			s.send(goDefault)
			typ, data := s.reply()
			var info protocol.ExportInfo
			if err := info.Decode(data); typ != protocol.RepInfo || err != nil {
				t.Fatal(typ, err)
			}
			if info.Flags&protocol.FlagSendDF != 0 {
				t.Error("structured replies survived")
			}
			s.reply()
			s.send(request(protocol.Request{Type: protocol.CmdRead, Length: 512}))
			readReply(t, s, 512) // a simple one
		})
	}
}

// What lies behind STARTTLS in plain text is not carried out under TLS.
func TestTLSInjection(t *testing.T) {
	h := newHooked()
	_, _, path := serve(t, h, Options{TLS: sealServer, TLSRequired: true})
	for _, behind := range [][]byte{structured, goDefault, []byte("x"), make([]byte, 100_000)} {
		s := greet(t, path)
		s.send(append(option(protocol.OptStartTLS, nil), behind...))
		if typ, _ := s.reply(); typ != protocol.RepAck {
			t.Errorf("got %v", typ)
		}
		s.ended()
	}
	if n := h.opens.Load(); n != 0 {
		t.Errorf("got %d opens, want 0", n)
	}
}

func TestTLSHandshakeFails(t *testing.T) {
	_, _, path := serve(t, newHooked(), Options{TLS: sealServer})
	s := greet(t, path)
	s.want(option(protocol.OptStartTLS, nil), protocol.RepAck)
	s.send([]byte("not a ClientHello at all"))
	s.ended()
}

// The client does not take what lies behind the reply in plain text for the server's
// words under TLS, and without TLS it says nothing.
func TestTLSClient(t *testing.T) {
	l, err := net.Listen("unix", filepath.Join(t.TempDir(), "s"))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	ack := (&protocol.OptionReplyHeader{Option: protocol.OptStartTLS, Type: protocol.RepAck}).AppendTo(nil)
	refusal := (&protocol.OptionReplyHeader{Option: protocol.OptStartTLS, Type: protocol.RepErrPolicy}).AppendTo(nil)
	for _, tt := range []struct {
		flags protocol.HandshakeFlags
		reply []byte
		want  string
	}{
		{protocol.FlagFixedNewstyle, append(ack, ack...), "in plain text"},
		{protocol.FlagFixedNewstyle, refusal, "NBD_REP_ERR_POLICY"},
		{0, nil, "use nbd instead of nbds"},
	} {
		said := make(chan int64)
		go func() {
			nc, err := l.Accept()
			if err != nil {
				t.Error(err)
			}
			greeting := protocol.Greeting{Flags: tt.flags}
			nc.Write(append(greeting.AppendTo(nil), tt.reply...))
			n, _ := io.Copy(io.Discard, nc)
			nc.Close()
			said <- n
		}()
		_, err := client.Dial(context.Background(), "nbds+unix:///?socket="+l.Addr().String(), &client.Options{TLS: sealClient})
		if err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("got %v, want an error with %q", err, tt.want)
		}
		if n := <-said; n > protocol.ClientFlagsSize+protocol.OptionHeaderSize {
			t.Errorf("%s: got %d bytes of the client, want its flags and an option at most", tt.want, n)
		}
	}
	if _, err := client.Dial(context.Background(), "nbds+unix:///?socket="+l.Addr().String(), nil); err == nil {
		t.Error("nbds without Options.TLS: got no error")
	}
}
