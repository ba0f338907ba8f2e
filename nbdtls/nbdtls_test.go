package nbdtls

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"

	"nbdhost/protocol"
	"nbdhost/tests/pki"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const patience = 30 * time.Second

// sockets returns the two ends of a connection.
func sockets(t testing.TB) (server, client net.Conn) {
	t.Helper()
	l, err := net.Listen("unix", filepath.Join(t.TempDir(), "s"))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if client, err = net.Dial("unix", l.Addr().String()); err != nil {
		t.Fatal(err)
	}
	if server, err = l.Accept(); err != nil {
		t.Fatal(err)
	}
	for _, c := range []net.Conn{server, client} {
		c.SetDeadline(time.Now().Add(patience))
		t.Cleanup(func() { c.Close() })
	}
	return server, client
}

// uri has the parameters that are not empty.
func uri(user string, params ...string) *protocol.URI {
	u := &protocol.URI{Transport: protocol.TransportUnix, TLS: true, User: user, Params: url.Values{}}
	for i := 0; i < len(params); i += 2 {
		u.Params.Set(params[i], params[i+1])
	}
	return u
}

// meet makes the two ends do a handshake.
func meet(t testing.TB, s *Server, u *protocol.URI) (server Conn, client net.Conn, serverErr, clientErr error) {
	t.Helper()
	server, client, _, serverErr, clientErr = meetRaw(t, s, u)
	return server, client, serverErr, clientErr
}

// connect is meet where both must succeed.
func connect(t testing.TB, s *Server, u *protocol.URI) (server Conn, client net.Conn) {
	t.Helper()
	server, client, serverErr, clientErr := meet(t, s, u)
	if serverErr != nil || clientErr != nil {
		t.Fatal(serverErr, clientErr)
	}
	return server, client
}

// meetRaw is meet, and returns what is below the client.
func meetRaw(t testing.TB, s *Server, u *protocol.URI) (server Conn, client, b net.Conn, serverErr, clientErr error) {
	t.Helper()
	a, b := sockets(t)
	var wg sync.WaitGroup
	wg.Go(func() {
		if server, serverErr = s.Handshake(a); serverErr != nil {
			a.Close()
		}
	})
	client, clientErr = Client(context.Background(), b, u)
	if clientErr != nil {
		b.Close()
	} else if clientErr = firstByte(&wg, &serverErr, client); clientErr != nil {
		b.Close()
	}
	wg.Wait()
	return server, client, b, serverErr, clientErr
}

// firstByte waits for the server's verdict: in TLS 1.3 a client is done before the
// server has looked at its certificate.
func firstByte(wg *sync.WaitGroup, serverErr *error, client net.Conn) error {
	wg.Wait()
	if *serverErr == nil {
		return nil
	}
	_, err := client.Read(make([]byte, 1))
	return err
}

// A kit is what the tests share: an authority, directories, a file of keys.
type kit struct {
	dir              string
	ca               *pki.Authority
	alice            pki.Cert
	server, client   string // directories
	psk              string
	x509, gnutls     Config
	pskConfig        Config
	clientX, clientP *protocol.URI
}

const keys = "alice:00112233445566778899aabbccddeeff\nbob:ffeeddccbbaa99887766554433221100\n"

func newKit(t testing.TB) *kit {
	t.Helper()
	dir := t.TempDir()
	k := &kit{dir: dir, ca: pki.NewAuthority(t, "Authority"), server: filepath.Join(dir, "server"),
		client: filepath.Join(dir, "client"), psk: filepath.Join(dir, "keys.psk")}
	k.alice = k.ca.Client("alice")
	k.ca.WriteServer(k.server, k.ca.Server())
	k.ca.WriteClient(k.client, k.alice)
	pki.Write(t, dir, map[string][]byte{"keys.psk": []byte(keys)})
	k.x509 = Config{Certificates: k.server}
	k.gnutls = Config{Certificates: k.server, Priority: "NORMAL"}
	k.pskConfig = Config{PSK: k.psk}
	k.clientX = uri("", "tls-certificates", k.client)
	k.clientP = uri("alice", "tls-psk-file", k.psk)
	return k
}

func newServer(t *testing.T, c Config) *Server {
	t.Helper()
	s, err := NewServer(c)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// goOnly stands for a priority string where GnuTLS is not there.
const goOnly = "without GnuTLS"

// library returns the priority string for a configuration, and hides GnuTLS for
// goOnly.
func library(t *testing.T, priority string) string {
	t.Helper()
	if priority != goOnly {
		return priority
	}
	old := lib
	lib = func() (*gnutls, error) { return nil, ErrGnuTLS }
	t.Cleanup(func() { lib = old })
	return ""
}

// configs runs f with each library and kind of credentials.
func (k *kit) configs(t *testing.T, f func(t *testing.T, c Config, u *protocol.URI)) {
	for _, tt := range []struct {
		name   string
		config Config
		uri    *protocol.URI
	}{
		{"crypto/tls", k.x509, k.clientX},
		{"GnuTLS", k.gnutls, k.clientX},
		{"verified", Config{Certificates: k.server, VerifyPeer: true}, k.clientX},
		{"GnuTLS 1.2", Config{Certificates: k.server, Priority: "NORMAL:-VERS-ALL:+VERS-TLS1.2"}, k.clientX},
		{"PSK", k.pskConfig, k.clientP},
		{"PSK 1.2", Config{PSK: k.psk, Priority: "NORMAL:-VERS-ALL:+VERS-TLS1.2"}, k.clientP},
	} {
		t.Run(tt.name, func(t *testing.T) { f(t, tt.config, tt.uri) })
	}
}

// A server that closes says so, in a last record.
func TestCloseIsTold(t *testing.T) {
	k := newKit(t)
	k.configs(t, func(t *testing.T, config Config, u *protocol.URI) {
		server, client, raw, e1, e2 := meetRaw(t, newServer(t, config), u)
		if e1 != nil || e2 != nil {
			t.Fatal(e1, e2)
		}
		defer client.Close()
		server.Close()
		if b, err := io.ReadAll(raw); err != nil || len(b) == 0 {
			t.Errorf("got %x and %v, want a record", b, err)
		}
	})
}

// Data goes both ways at once, in pieces of all sizes.
func TestData(t *testing.T) {
	k := newKit(t)
	k.configs(t, func(t *testing.T, config Config, u *protocol.URI) {
		server, client := connect(t, newServer(t, config), u)
		t.Log(server.Description())
		data := make([]byte, 3<<20+123)
		rand.Read(data)
		var wg sync.WaitGroup
		for _, way := range [][2]net.Conn{{server, client}, {client, server}} {
			wg.Go(func() {
				for rest, n := data, 1; len(rest) > 0; n = n*3 + 1 {
					n = min(n, len(rest))
					if got, err := way[0].Write(rest[:n]); err != nil || got != n {
						t.Error(got, err)
						return
					}
					rest = rest[n:]
				}
			})
			wg.Go(func() {
				got := make([]byte, len(data))
				if _, err := io.ReadFull(way[1], got); err != nil {
					t.Error(err)
				} else if !bytes.Equal(got, data) {
					t.Error("data differs")
				}
			})
		}
		wg.Wait()
		// The end is told.
		client.Close()
		if n, err := server.Read(make([]byte, 1)); err != io.EOF {
			t.Errorf("read after the end: got %d bytes and %v, want EOF", n, err)
		}
		server.Close()
		if _, err := server.Write([]byte("x")); !errors.Is(err, net.ErrClosed) && !errors.Is(err, io.ErrClosedPipe) {
			t.Errorf("write after close: got %v", err)
		}
		server.Close() // once more does no harm
	})
}

// TryRead never waits, and takes all that is there, whole records or not.
func TestTryRead(t *testing.T) {
	k := newKit(t)
	k.configs(t, func(t *testing.T, config Config, u *protocol.URI) {
		server, client := connect(t, newServer(t, config), u)
		defer server.Close()
		defer client.Close()
		raw := socketOf(t, server)
		data := make([]byte, 300_000)
		rand.Read(data)
		go client.Write(data)
		var got []byte
		buf := make([]byte, 100_000)
		waits := 0
		for len(got) < len(data) {
			err := raw.Read(func(fd uintptr) bool {
				n, err := server.TryRead(fd, buf)
				if err == syscall.EAGAIN {
					waits++
					return false
				}
				if err != nil {
					t.Error(err)
				}
				got = append(got, buf[:n]...)
				return true
			})
			if err != nil {
				t.Fatal(err)
			}
		}
		if !bytes.Equal(got, data) {
			t.Error("data differs")
		}
		_ = raw.Control(func(fd uintptr) {
			if n, err := server.TryRead(fd, buf); err != syscall.EAGAIN {
				t.Errorf("TryRead with nothing there: got %d bytes and %v, want EAGAIN", n, err)
			}
		})
		// A wait for data ends with the deadline, and the connection is as good
		// as before.
		server.SetReadDeadline(time.Unix(1, 0))
		err := raw.Read(func(fd uintptr) bool {
			_, err := server.TryRead(fd, buf)
			return err != syscall.EAGAIN
		})
		if !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("wait past the deadline: got %v", err)
		}
		server.SetReadDeadline(time.Now().Add(patience))
		go client.Write([]byte("go on"))
		if n, err := server.Read(buf); string(buf[:n]) != "go on" {
			t.Errorf("got %q and %v after a deadline", buf[:n], err)
		}
	})
}

// TryRead takes many records at once, and tells of the end behind them afterwards.
func TestTryReadManyRecords(t *testing.T) {
	k := newKit(t)
	k.configs(t, func(t *testing.T, config Config, u *protocol.URI) {
		server, client := connect(t, newServer(t, config), u)
		defer server.Close()
		for _, s := range []string{"one ", "two ", "three"} {
			if _, err := client.Write([]byte(s)); err != nil {
				t.Fatal(err)
			}
		}
		belowOf(client.(Conn)).Close() // without a word of TLS's
		buf := make([]byte, 100)
		_ = socketOf(t, server).Control(func(fd uintptr) {
			if n, err := server.TryRead(fd, buf[:6]); string(buf[:n]) != "one tw" || err != nil {
				t.Errorf("got %q and %v", buf[:n], err)
			}
			if n, err := server.TryRead(fd, buf); string(buf[:n]) != "o three" || err != nil {
				t.Errorf("got %q and %v", buf[:n], err)
			}
			if n, err := server.TryRead(fd, buf); n != 0 || err != io.EOF {
				t.Errorf("got %q and %v, want the end", buf[:n], err)
			}
		})
	})
}

// A connection goes on on another descriptor of the same socket, one that blocks:
// TryRead waits there for the first byte and for no other.
func TestMove(t *testing.T) {
	k := newKit(t)
	k.configs(t, func(t *testing.T, config Config, u *protocol.URI) {
		server, client := connect(t, newServer(t, config), u)
		defer client.Close()
		defer server.Close()
		var f *os.File
		_ = socketOf(t, server).Control(func(fd uintptr) {
			dup, err := syscall.Dup(int(fd))
			if err != nil {
				t.Fatal(err)
			}
			f = os.NewFile(uintptr(dup), "")
		})
		nc, err := net.FileConn(f)
		if err != nil {
			t.Fatal(err)
		}
		belowOf(server).Close()
		if err := server.Move(nc); err != nil {
			t.Fatal(err)
		}
		fd := int(f.Fd())
		defer f.Close()
		if err := syscall.SetNonblock(fd, false); err != nil { // nc as well: they are one socket
			t.Fatal(err)
		}
		buf := make([]byte, 100)
		for _, want := range []string{"ping", strings.Repeat("p", len(buf))} {
			if _, err := client.Write([]byte(want)); err != nil {
				t.Fatal(err)
			}
			if n, err := server.TryRead(uintptr(fd), buf); string(buf[:n]) != want || err != nil {
				t.Fatalf("got %q and %v, want %q", buf[:n], err, want)
			}
			if _, err := server.Write([]byte(want)); err != nil {
				t.Fatal(err)
			}
			if n, err := client.Read(buf); string(buf[:n]) != want {
				t.Fatalf("got %q and %v, want %q", buf[:n], err, want)
			}
		}
		timeout := syscall.NsecToTimeval(1e6)
		if err := syscall.SetsockoptTimeval(fd, syscall.SOL_SOCKET, syscall.SO_RCVTIMEO, &timeout); err != nil {
			t.Fatal(err)
		}
		if n, err := server.TryRead(uintptr(fd), buf); err != syscall.EAGAIN {
			t.Errorf("got %q and %v after a while without data", buf[:n], err)
		}
	})
}

func belowOf(c Conn) net.Conn {
	if c, ok := c.(*standardConn); ok {
		return c.link.Conn
	}
	return c.(*session).Conn
}

func socketOf(t *testing.T, c Conn) syscall.RawConn {
	t.Helper()
	raw, err := belowOf(c).(syscall.Conn).SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	return raw
}

// Who may connect and who may not, with both libraries.
func TestPeers(t *testing.T) {
	k := newKit(t)
	other := pki.NewAuthority(t, "Other")
	sameName := pki.NewAuthority(t, "Authority") // another key under the name of ours
	mallory := k.ca.Client("mallory")

	dir := func(name string, a *pki.Authority, c pki.Cert) *protocol.URI {
		d := filepath.Join(k.dir, name)
		a.WriteClient(d, c)
		return uri("", "tls-certificates", d)
	}
	mixed := other.Client("alice") // theirs, but with trust in ours
	clients := map[string]*protocol.URI{
		"alice":      k.clientX,
		"nobody":     dir("nobody", k.ca, pki.Cert{}),
		"expired":    dir("expired", k.ca, k.ca.Client("alice", pki.Expired)),
		"other CA":   dir("other", k.ca, mixed),
		"same name":  dir("same", k.ca, sameName.Client("alice")),
		"revoked":    dir("revoked", k.ca, mallory),
		"no purpose": dir("nopurpose", k.ca, k.ca.Client("alice", func(c *x509.Certificate) { c.ExtKeyUsage = nil })),
		"server":     dir("aserver", k.ca, k.ca.Server()),
		"RSA":        dir("rsa", k.ca, k.ca.Client("alice", pki.RSA)),
		"no trust":   dir("notrust", other, k.alice),
		"wrong host": uri("", "tls-certificates", k.client, "tls-hostname", "elsewhere.example"),
		"credulous":  uri("", "tls-certificates", k.client, "tls-hostname", "elsewhere.example", "tls-verify-peer", "false"),
		"unclear":    uri("", "tls-certificates", k.client, "tls-verify-peer", "maybe"),
	}
	certs := map[string]pki.Cert{
		"good":      k.ca.Server(),
		"expired":   k.ca.Server(pki.Expired),
		"elsewhere": k.ca.Server(pki.Elsewhere),
		"other":     other.Server(),
	}
	for _, tt := range []struct {
		client, server string
		verify         bool
		serverErr      string // part of it; "" for success
		clientErr      string
	}{
		{"alice", "good", false, "", ""},
		{"nobody", "good", false, "", ""},
		{"expired", "good", false, "", ""},
		{"alice", "good", true, "", ""},
		{"nobody", "good", true, "ertificate", "remote error: tls"},
		{"expired", "good", true, "expired", "ertificate"},
		{"other CA", "good", true, "ertificate", "remote error: tls"},
		{"same name", "good", true, "ertificate", "ertificate"},
		{"revoked", "good", true, "revoked", "ertificate"},
		{"no purpose", "good", true, "", ""},
		{"server", "good", true, "ertificate", "ertificate"},
		{"RSA", "good", true, "", ""},
		{"no trust", "good", false, "ertificate", "unknown authority"},
		{"wrong host", "good", false, "ertificate", "not elsewhere.example"},
		{"credulous", "expired", false, "", ""},
		{"unclear", "good", false, "TLS handshake", "need true or false"},
		{"alice", "expired", false, "ertificate", "expired"},
		{"alice", "elsewhere", false, "ertificate", "not localhost"},
		{"alice", "other", false, "ertificate", "unknown authority"},
	} {
		for _, priority := range []string{"", "NORMAL", "NORMAL:-VERS-TLS1.3", goOnly} {
			t.Run(fmt.Sprintf("%s to %s/verify=%v/%s", tt.client, tt.server, tt.verify, priority), func(t *testing.T) {
				priority := library(t, priority)
				d := t.TempDir()
				k.ca.WriteServer(d, certs[tt.server])
				pki.Write(t, d, map[string][]byte{"ca-crl.pem": k.ca.Revoke(mallory)})
				s := newServer(t, Config{Certificates: d, VerifyPeer: tt.verify, Priority: priority})
				server, client, serverErr, clientErr := meet(t, s, clients[tt.client])
				match(t, "server", serverErr, tt.serverErr)
				match(t, "client", clientErr, tt.clientErr)
				if serverErr != nil || clientErr != nil {
					return
				}
				defer client.Close()
				defer server.Close()
				subject, issuer := server.Peer()
				wantSubject, wantIssuer := "", ""
				if tt.verify {
					wantSubject, wantIssuer = "CN=alice,O=Tests", "CN=Authority"
				}
				if subject != wantSubject || issuer != wantIssuer {
					t.Errorf("peer: got %q by %q, want %q by %q", subject, issuer, wantSubject, wantIssuer)
				}
			})
		}
	}
}

// Files that have just changed may change again without a trace; old ones do not.
func TestStamp(t *testing.T) {
	young := filepath.Join(t.TempDir(), "f")
	os.WriteFile(young, nil, 0o600)
	for file, want := range map[string]bool{young: false, "/usr": true} {
		if got := stampOf([]string{file}).same(stampOf([]string{file})); got != want {
			t.Errorf("%s: got %v, want %v", file, got, want)
		}
	}
	if stampOf([]string{"/usr"}).same(stampOf([]string{"/usr", "/nowhere"})) {
		t.Error("another file makes no difference")
	}
}

// A client cannot go on with a session of before, which was made with files that may
// have been replaced.
func TestNoResumption(t *testing.T) {
	k := newKit(t)
	for _, config := range []Config{k.x509, k.gnutls} {
		for _, version := range []uint16{tls.VersionTLS12, tls.VersionTLS13} {
			s := newServer(t, config)
			client := &tls.Config{InsecureSkipVerify: true, MaxVersion: version, ServerName: "localhost",
				ClientSessionCache: tls.NewLRUClientSessionCache(10)}
			for range 2 {
				a, b := sockets(t)
				var wg sync.WaitGroup
				wg.Go(func() {
					c, err := s.Handshake(a)
					if err != nil {
						t.Error(err)
						return
					}
					c.Write([]byte("x")) // behind a ticket, if there is one
					c.Close()
				})
				c := tls.Client(b, client)
				if n, err := c.Read(make([]byte, 1)); n != 1 {
					t.Error(err)
				}
				if c.ConnectionState().DidResume {
					t.Errorf("%+v, %s: a session was resumed", config, tls.VersionName(version))
				}
				wg.Wait()
			}
		}
	}
}

// A list that is overdue goes on counting, and the log says that it is.
func TestOverdueList(t *testing.T) {
	k := newKit(t)
	pki.Write(t, k.server, map[string][]byte{"ca-crl.pem": k.ca.RevokeOverdue(k.alice)})
	bob := filepath.Join(k.dir, "bob")
	k.ca.WriteClient(bob, k.ca.Client("bob"))
	for _, priority := range []string{"", "NORMAL", goOnly} {
		var log bytes.Buffer
		s := newServer(t, Config{Certificates: k.server, Priority: library(t, priority), VerifyPeer: true, Log: slog.New(slog.NewTextHandler(&log, nil))})
		if !strings.Contains(log.String(), "newer list") {
			t.Errorf("priority %q: got log %q, want a warning", priority, log.String())
		}
		_, _, err, _ := meet(t, s, k.clientX)
		match(t, "server", err, "revoked")
		server, client := connect(t, s, uri("", "tls-certificates", bob))
		client.Close()
		server.Close()
	}
}

func BenchmarkHandshake(b *testing.B) {
	k := newKit(b)
	s, err := NewServer(k.x509)
	if err != nil {
		b.Fatal(err)
	}
	for b.Loop() {
		server, client := connect(b, s, k.clientX)
		client.Close()
		server.Close()
	}
}

func BenchmarkStamp(b *testing.B) {
	k := newKit(b)
	for b.Loop() {
		stampOf(identityFiles(k.server))
	}
}

func match(t *testing.T, who string, err error, want string) {
	t.Helper()
	switch {
	case err == nil && want != "":
		t.Errorf("%s: got no error, want one with %q", who, want)
	case err != nil && (want == "" || !strings.Contains(err.Error(), want)):
		t.Errorf("%s: got error %q, want one with %q", who, err, want)
	}
}

func TestPSK(t *testing.T) {
	k := newKit(t)
	pki.Write(t, k.dir, map[string][]byte{
		"wrong.psk": []byte("alice:ffff\n"), "unknown.psk": []byte("carol:00112233445566778899aabbccddeeff\n"),
	})
	file := func(name string) string { return filepath.Join(k.dir, name) }
	s := newServer(t, k.pskConfig)
	var failures []string
	for _, tt := range []struct {
		uri                  *protocol.URI
		serverErr, clientErr string
	}{
		{k.clientP, "", ""},
		{uri("bob", "tls-psk-file", k.psk), "", ""},
		{uri("alice", "tls-psk-file", file("wrong.psk")), " ", "alert"},
		{uri("carol", "tls-psk-file", file("unknown.psk")), " ", "alert"},
		{uri("carol", "tls-psk-file", k.psk), "EOF", `no key of user "carol"`},
	} {
		server, client, serverErr, clientErr := meet(t, s, tt.uri)
		if tt.serverErr != "EOF" {
			match(t, "server", serverErr, tt.serverErr)
		}
		match(t, "client", clientErr, tt.clientErr)
		if tt.clientErr == "alert" {
			failures = append(failures, clientErr.Error())
		}
		if serverErr == nil && clientErr == nil {
			client.Close()
			server.Close()
		}
	}
	if failures[0] != failures[1] {
		t.Errorf("a client can tell a user that is unknown from a wrong key: %q and %q", failures[0], failures[1])
	}
	// A client with certificates gets nowhere.
	if _, _, serverErr, clientErr := meet(t, s, k.clientX); serverErr == nil || clientErr == nil {
		t.Errorf("certificates against keys: got %v and %v, want errors", serverErr, clientErr)
	}
}

// The files are read again when they have changed; bad ones leave the old in use.
func TestRotation(t *testing.T) {
	k := newKit(t)
	var log bytes.Buffer
	logger := slog.New(slog.NewTextHandler(&log, nil))
	p192 := pki.Foreign(t, "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime192v1")
	// serial is of the certificate that a client sees.
	serial := func(t *testing.T, s *Server) string {
		t.Helper()
		server, client := connect(t, s, k.clientX)
		defer server.Close()
		defer client.Close()
		return client.(*standardConn).ConnectionState().PeerCertificates[0].SerialNumber.String()
	}
	for _, priority := range []string{"", "NORMAL", goOnly} {
		t.Run("X.509 "+priority, func(t *testing.T) {
			priority := library(t, priority)
			one, two := k.ca.Server(), k.ca.Server()
			k.ca.WriteServer(k.server, one)
			s := newServer(t, Config{Certificates: k.server, Priority: priority, Log: logger})
			if got := serial(t, s); got != one.Serial.String() {
				t.Errorf("got certificate %s, want the first", got)
			}
			log.Reset()
			for what, files := range map[string]map[string][]byte{
				"garbage":   {"server-cert.pem": []byte("garbage"), "server-key.pem": one.Key},
				"wrong key": {"server-cert.pem": two.Cert, "server-key.pem": one.Key},
				"half":      {"server-cert.pem": two.Cert[:100], "server-key.pem": two.Key},
				"empty key": {"server-cert.pem": two.Cert, "server-key.pem": nil},
				"curve":     {"server-cert.pem": p192.Cert, "server-key.pem": p192.Key},
			} {
				if what == "curve" && priority != "" {
					continue // GnuTLS can use it
				}
				pki.Write(t, k.server, files)
				for range 3 {
					if got := serial(t, s); got != one.Serial.String() {
						t.Errorf("%s: got certificate %s, want the first", what, got)
					}
				}
				if n := strings.Count(log.String(), "going on with those in use"); n != 1 {
					t.Errorf("%s: got %d lines in the log, want 1:\n%s", what, n, log.String())
				}
				log.Reset()
			}
			os.Remove(filepath.Join(k.server, "server-key.pem"))
			if got := serial(t, s); got != one.Serial.String() {
				t.Errorf("no key: got certificate %s, want the first", got)
			}
			k.ca.WriteServer(k.server, two)
			if got := serial(t, s); got != two.Serial.String() {
				t.Errorf("got certificate %s, want the second", got)
			}
		})
		t.Run("CRL "+priority, func(t *testing.T) {
			priority := library(t, priority)
			s := newServer(t, Config{Certificates: k.server, Priority: priority, VerifyPeer: true, Log: logger})
			running, client, e1, e2 := meet(t, s, k.clientX)
			if e1 != nil || e2 != nil {
				t.Fatal(e1, e2)
			}
			defer running.Close()
			defer client.Close()
			pki.Write(t, k.server, map[string][]byte{"ca-crl.pem": k.ca.Revoke(k.alice)})
			_, _, serverErr, clientErr := meet(t, s, k.clientX)
			match(t, "server", serverErr, "revoked")
			match(t, "client", clientErr, "ertificate")
			// Who was there already goes on.
			go client.Write([]byte("still here"))
			buf := make([]byte, 20)
			if n, err := running.Read(buf); string(buf[:n]) != "still here" {
				t.Errorf("running connection: got %q and %v", buf[:n], err)
			}
			os.Remove(filepath.Join(k.server, "ca-crl.pem"))
			serial(t, s)
		})
	}
	t.Run("PSK", func(t *testing.T) {
		s := newServer(t, Config{PSK: k.psk, Log: logger})
		log.Reset()
		old := filepath.Join(k.dir, "old.psk")
		os.WriteFile(old, []byte(keys), 0o600)
		oldAlice := uri("alice", "tls-psk-file", old)
		try := func(want bool) {
			t.Helper()
			server, client, e1, e2 := meet(t, s, oldAlice)
			if (e1 == nil && e2 == nil) != want {
				t.Errorf("got %v and %v, want success %v", e1, e2, want)
			}
			if e1 == nil && e2 == nil {
				client.Close()
				server.Close()
			}
		}
		try(true)
		pki.Write(t, k.dir, map[string][]byte{"keys.psk": []byte("alice:not hexadecimal\n")})
		try(true)
		if !strings.Contains(log.String(), "line 1") || strings.Contains(log.String(), "not hexadecimal") {
			t.Errorf("log: got %q, want the line and no key", log.String())
		}
		pki.Write(t, k.dir, map[string][]byte{"keys.psk": []byte("alice:1234567890\n")})
		try(false)
	})
}

// What a server cannot start with.
func TestNewServer(t *testing.T) {
	k := newKit(t)
	one, two := k.ca.Server(), k.ca.Server()
	other := pki.NewAuthority(t, "Other")
	base := map[string][]byte{"ca-cert.pem": k.ca.PEM, "server-cert.pem": one.Cert, "server-key.pem": one.Key}
	for _, tt := range []struct {
		name   string
		change map[string][]byte // nil removes
		verify bool
		want   string
	}{
		{"good", nil, true, ""},
		{"no certificate", map[string][]byte{"server-cert.pem": nil}, false, "server-cert.pem: no such file"},
		{"no key", map[string][]byte{"server-key.pem": nil}, false, "server-key.pem: no such file"},
		{"wrong key", map[string][]byte{"server-key.pem": two.Key}, false, "need a certificate and the key it was made for"},
		{"garbage", map[string][]byte{"server-cert.pem": []byte("garbage")}, false, "need a certificate"},
		{"no authority", map[string][]byte{"ca-cert.pem": nil}, true, "ca-cert.pem: no such file"},
		{"no authority needed", map[string][]byte{"ca-cert.pem": nil}, false, ""},
		{"garbage authority", map[string][]byte{"ca-cert.pem": []byte("garbage")}, true, "ca-cert.pem"},
		{"garbage list", map[string][]byte{"ca-crl.pem": []byte("garbage")}, true, "ca-crl.pem"},
		{"list of another authority", map[string][]byte{"ca-crl.pem": other.Revoke(one)}, true, "ca-crl.pem: got a list of CN=Other, whose signature is by no certificate in ca-cert.pem"},
		{"additional", map[string][]byte{"server-cert-0.pem": two.Cert, "server-key-0.pem": two.Key}, false, ""},
		{"additional without key", map[string][]byte{"server-cert-0.pem": two.Cert}, false, "server-key-0.pem"},
	} {
		for _, priority := range []string{"", "NORMAL", goOnly} {
			t.Run(tt.name+" "+priority, func(t *testing.T) {
				priority := library(t, priority)
				dir := t.TempDir()
				pki.Write(t, dir, base)
				for name, text := range tt.change {
					if text == nil {
						os.Remove(filepath.Join(dir, name))
					} else {
						pki.Write(t, dir, map[string][]byte{name: text})
					}
				}
				_, err := NewServer(Config{Certificates: dir, VerifyPeer: tt.verify, Priority: priority})
				match(t, "NewServer", err, tt.want)
			})
		}
	}
	for _, tt := range []struct {
		config Config
		want   string
	}{
		{Config{}, "need one of them"},
		{Config{PSK: filepath.Join(k.dir, "nothing")}, "no such file"},
		{Config{PSK: k.dir}, "is a directory"},
		{Config{PSK: k.psk, Priority: "NONSENSE"}, `set priority "NONSENSE`},
		{Config{Certificates: k.server, Priority: "NORMAL:NONSENSE"}, "set priority"},
	} {
		_, err := NewServer(tt.config)
		match(t, "NewServer", err, tt.want)
	}
}

// Which library serves with which files, and what is said where none can.
func TestChoose(t *testing.T) {
	k := newKit(t)
	ecdsa := k.ca.Server()
	pss := pki.Foreign(t, "-newkey", "rsa-pss", "-pkeyopt", "rsa_keygen_bits:2048")
	ed448 := pki.Foreign(t, "-newkey", "ed448")
	p192 := pki.Foreign(t, "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime192v1")
	const goes, gnu = "*nbdtls.standard", "*nbdtls.credentials"
	const curve = "server-cert.pem: got a certificate for a key on another elliptic curve"
	for _, tt := range []struct {
		name     string
		cert     pki.Cert
		verify   bool
		priority string
		want     string // a shaker's type, or part of an error
		log      string
	}{
		{"ECDSA", ecdsa, false, "", goes, ""},
		{"ECDSA", ecdsa, false, goOnly, goes, ""},
		{"ECDSA", ecdsa, false, "NORMAL", gnu, ""},
		{"ECDSA", ecdsa, true, "", gnu, ""},
		{"ECDSA", ecdsa, true, goOnly, goes, "verifying clients without GnuTLS"},
		{"RSA-PSS", pss, false, "", gnu, "using GnuTLS"},
		{"RSA-PSS", pss, true, "", gnu, ""},
		{"RSA-PSS", pss, false, goOnly, "GnuTLS may be able to use them", ""},
		{"RSA-PSS", pss, true, goOnly, "GnuTLS may be able to use them", ""},
		{"Ed448", ed448, false, "", gnu, "using GnuTLS"},
		{"Ed448", ed448, true, "", gnu, ""},
		{"P-192", p192, false, "", curve, ""},
		{"P-192", p192, true, "", curve, ""},
		{"P-192", p192, false, goOnly, curve, ""},
		{"P-192", p192, false, "NORMAL:+GROUP-SECP192R1", gnu, ""},
	} {
		t.Run(fmt.Sprintf("%s/verify=%v/%s", tt.name, tt.verify, tt.priority), func(t *testing.T) {
			dir := t.TempDir()
			k.ca.WriteServer(dir, tt.cert)
			var log bytes.Buffer
			s, err := NewServer(Config{Certificates: dir, VerifyPeer: tt.verify, Priority: library(t, tt.priority),
				Log: slog.New(slog.NewTextHandler(&log, &slog.HandlerOptions{Level: slog.LevelDebug}))})
			if err != nil {
				match(t, "NewServer", err, tt.want)
				return
			}
			for range 2 { // the second time as for the next connection
				if got := fmt.Sprintf("%T", s.current()); got != tt.want {
					t.Errorf("got a %s, want %q", got, tt.want)
				}
			}
			if n := strings.Count(log.String(), "GnuTLS"); (n > 0) != (tt.log != "") || !strings.Contains(log.String(), tt.log) || strings.Count(log.String(), "set up TLS") > 1 {
				t.Errorf("got log %q, want one line with %q", log.String(), tt.log)
			}
		})
	}
}

// A certificate that has expired is told of, and the end of each is known, whatever its
// key.
func TestExpired(t *testing.T) {
	k := newKit(t)
	k.ca.WriteServer(k.server, k.ca.Server(pki.Expired))
	for _, priority := range []string{"", "NORMAL"} {
		var log bytes.Buffer
		newServer(t, Config{Certificates: k.server, Priority: priority, Log: slog.New(slog.NewTextHandler(&log, nil))})
		if !strings.Contains(log.String(), "the certificate expired") {
			t.Errorf("priority %q: got log %q, want a warning", priority, log.String())
		}
	}
	for _, key := range [][]string{{"ed448"}, {"ed25519"}, {"rsa:2048"}, {"ec", "-pkeyopt", "ec_paramgen_curve:prime192v1"}} {
		o, err := pair{cert: pki.Foreign(t, append([]string{"-newkey"}, key...)...).Cert}.outline()
		if err != nil {
			t.Errorf("%q: %v", key, err)
			continue
		}
		left := time.Until(o.Validity.NotAfter)
		if name := distinguishedName(o.Subject.FullBytes); name != "CN=localhost" || left < 47*time.Hour || left > 48*time.Hour {
			t.Errorf("%q: got %q, which ends in %v, want CN=localhost and two days", key, name, left)
		}
	}
}

// Neither library's default takes what is older than TLS 1.2.
func TestOldProtocol(t *testing.T) {
	k := newKit(t)
	for _, verify := range []bool{false, true} {
		s := newServer(t, Config{Certificates: k.server, VerifyPeer: verify})
		a, b := sockets(t)
		var wg sync.WaitGroup
		wg.Go(func() {
			_, err := s.Handshake(a)
			match(t, "server", err, "version")
			a.Close()
		})
		err := tls.Client(b, &tls.Config{InsecureSkipVerify: true, MinVersion: tls.VersionTLS10, MaxVersion: tls.VersionTLS11}).Handshake()
		match(t, "client", err, "version")
		wg.Wait()
	}
}

// Bytes that are no handshake, and a peer that says nothing.
func TestHostile(t *testing.T) {
	k := newKit(t)
	k.configs(t, func(t *testing.T, config Config, u *protocol.URI) {
		s := newServer(t, config)
		huge := append([]byte{22, 3, 1, 0xff, 0xff}, make([]byte, 70000)...)
		for _, text := range []string{"", "\x16", "GET / HTTP/1.0\r\n\r\n", strings.Repeat("\x00", 1000), string(huge),
			"\x16\x03\x01\x00\x05\x01\xff\xff\xff\xff", strings.Repeat("\x15\x03\x03\x00\x02\x01\x00", 50)} {
			a, b := sockets(t)
			go func() {
				b.Write([]byte(text))
				b.(*net.UnixConn).CloseWrite()
				io.Copy(io.Discard, b)
			}()
			if _, err := s.Handshake(a); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
				t.Errorf("%.20q: got %v, want an error at once", text, err)
			}
			a.Close()
		}
		a, _ := sockets(t)
		a.SetDeadline(time.Unix(1, 0))
		if _, err := s.Handshake(a); !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("a silent client: got %v, want the deadline", err)
		}
	})
}

// A client's request for a renegotiation, which TLS 1.2 has, ends the connection.
func TestRenegotiation(t *testing.T) {
	k := newKit(t)
	g, err := lib()
	if err != nil {
		t.Fatal(err)
	}
	s := newServer(t, Config{PSK: k.psk, Priority: "NORMAL:-VERS-ALL:+VERS-TLS1.2"})
	server, client := connect(t, s, k.clientP)
	defer server.Close()
	defer client.Close()
	c := client.(*session)
	_ = c.raw.Control(func(uintptr) { g.handshake(c.handle) }) // sends a ClientHello
	_, err = server.Read(make([]byte, 1))
	match(t, "server", err, "renegotiation")
}

// Close wakes who reads, and nothing is used after it is freed.
func TestCloseWhileBusy(t *testing.T) {
	k := newKit(t)
	k.configs(t, func(t *testing.T, config Config, u *protocol.URI) {
		s := newServer(t, config)
		for range 5 {
			server, client := connect(t, s, u)
			var wg sync.WaitGroup
			started := make(chan struct{}, 2)
			wg.Go(func() {
				started <- struct{}{}
				for {
					if _, err := server.Read(make([]byte, 100)); err != nil {
						return
					}
				}
			})
			wg.Go(func() {
				started <- struct{}{}
				for {
					if _, err := server.Write(make([]byte, 100_000)); err != nil {
						return
					}
				}
			})
			<-started
			<-started
			server.Close()
			wg.Wait()
			client.Close()
		}
	})
	runtime.GC() // the credentials go
}

func TestParsePSK(t *testing.T) {
	for _, tt := range []struct{ text, want string }{
		{keys, ""},
		{"alice:00\r\n\n", ""},
		{"#616c696365:00\n", ""},
		{"#zz:00\n", "line 1"},
		{"alice:00", ""},
		{"", "got no key"},
		{"\n\n", "got no key"},
		{"alice", "line 1"},
		{"alice:00\nbob\n", "line 2"},
		{":00\n", "line 1"},
		{"alice:\n", "line 1"},
		{"alice:0\n", "line 1"},
		{"alice:xy\n", "line 1"},
	} {
		got, err := parsePSK("f", []byte(tt.text))
		match(t, fmt.Sprintf("%q", tt.text), err, tt.want)
		if err == nil && got["alice"] == nil {
			t.Errorf("%q: got no key of alice", tt.text)
		}
	}
}

func FuzzParsePSK(f *testing.F) {
	f.Add([]byte(keys))
	f.Add([]byte("#616c:00\nbob"))
	f.Fuzz(func(t *testing.T, text []byte) {
		got, err := parsePSK("f", text)
		if (err == nil) != (len(got) > 0) {
			t.Errorf("got %d keys and error %v", len(got), err)
		}
		for user, key := range got {
			if user == "" || len(key) == 0 {
				t.Errorf("got key %x of user %q", key, user)
			}
		}
	})
}
