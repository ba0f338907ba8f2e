package tests

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/cpu"

	"nbdhost/client"
	_ "nbdhost/client/nbds"
	"nbdhost/protocol"
	"nbdhost/tests/pki"
)

// aliceKey is alice's in the files of pre-shared keys here.
const aliceKey = "5a1b0c9d8e7f60718293a4b5c6d7e8f95a1b0c9d8e7f60718293a4b5c6d7e8f9"

// tlsFiles makes what servers and clients need, under DIR: server, a server's
// directory; client, one of alice's; psk/keys.psk, alice's key.
func tlsFiles(t *testing.T, dir string) *pki.Authority {
	t.Helper()
	ca := pki.NewAuthority(t, "Authority")
	ca.WriteServer(filepath.Join(dir, "server"), ca.Server())
	ca.WriteClient(filepath.Join(dir, "client"), ca.Client("alice"))
	pki.Write(t, filepath.Join(dir, "psk"), map[string][]byte{"keys.psk": []byte("alice:" + aliceKey + "\n")})
	return ca
}

// tlsURI is for clients that use TLS, with the directory or the file of keys given.
func (s *server) tlsURI(certificates, psk string) string {
	u := "nbds://127.0.0.1:" + s.port() + "/?"
	if psk != "" {
		return strings.Replace(u, "//", "//alice@", 1) + "tls-psk-file=" + psk
	}
	return u + "tls-certificates=" + certificates
}

func (s *server) port() string {
	_, port, err := net.SplitHostPort(s.address)
	if err != nil {
		s.t.Fatal(err)
	}
	return port
}

// nbdsh runs Python with h, a connection of libnbd's to uri.
func nbdsh(t testing.TB, uri, code string) (string, error) {
	return try(t, "/usr/bin/nbdsh", "-c", "h.set_uri_allow_local_file(True)", "-c", "h.connect_uri('"+uri+"')", "-c", code)
}

// tlsClients are real clients that copy a file to the server and back, in their own
// ways. keys is the path of a file of pre-shared keys, or "" for certificates.
var tlsClients = []struct {
	name string
	run  func(t *testing.T, s *server, in, out, keys string) string
}{
	{"nbdcopy", func(t *testing.T, s *server, in, out, keys string) string {
		uri := s.tlsURI(s.dir+"/client", keys)
		command(t, "nbdcopy", "--connections=2", in, uri)
		command(t, "nbdcopy", "--connections=4", "--requests=32", uri, out)
		return command(t, "nbdinfo", uri) + command(t, "nbdinfo", "--map", uri)
	}},
	{"nbdsh", func(t *testing.T, s *server, in, out, keys string) string {
		got, err := nbdsh(t, s.tlsURI(s.dir+"/client", keys), `
data = open("`+in+`", "rb").read()
for i in range(0, len(data), 100000):
    h.pwrite(data[i:i+100000], i)
h.flush()
with open("`+out+`", "wb") as f:
    for i in range(0, len(data), 70001):
        f.write(h.pread(min(70001, len(data) - i), i))
print(h.get_size(), h.get_tls_negotiated(), h.get_structured_replies_negotiated(), h.get_protocol())
h.shutdown()
`)
		if err != nil {
			t.Fatal(err)
		}
		return got
	}},
	{"qemu-img", func(t *testing.T, s *server, in, out, keys string) string {
		object := "tls-creds-x509,id=tls0,endpoint=client,dir=" + s.dir + "/client"
		if keys != "" {
			object = "tls-creds-psk,id=tls0,endpoint=client,username=alice,dir=" + filepath.Dir(keys)
		}
		opts := "driver=raw,file.driver=nbd,file.host=127.0.0.1,file.port=" + s.port() + ",file.tls-creds=tls0"
		command(t, "qemu-img", "convert", "-n", "--object", object, "--target-image-opts", "-f", "raw", in, opts)
		command(t, "qemu-img", "convert", "--object", object, "--image-opts", "-O", "raw", opts, out)
		return command(t, "qemu-img", "compare", "--object", object, "--image-opts", opts, "driver=raw,file.driver=file,file.filename="+in)
	}},
	{"ours", func(t *testing.T, s *server, in, out, keys string) string {
		c, err := client.Dial(context.Background(), s.tlsURI(s.dir+"/client", keys), nil)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		data, err := os.ReadFile(in)
		if err != nil {
			t.Fatal(err)
		}
		if err := c.Pwrite(data, 0, 0); err != nil {
			t.Fatal(err)
		}
		clear(data)
		if err := c.Pread(data, 0); err != nil {
			t.Fatal(err)
		}
		// Requests that follow each other at once take the connection out of the
		// server's poller.
		again := make([]byte, 4096)
		for i := range 256 {
			off := i * len(again)
			if err := c.Pread(again, uint64(off)); err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(again, data[off:off+len(again)]) {
				t.Fatalf("data at %d differs", off)
			}
		}
		if err := c.Disconnect(); err != nil {
			t.Error(err)
		}
		writeFile(t, out, string(data), 0o600)
		return ""
	}},
}

// Real clients see the same under TLS with nbdkit and with the program under test.
func TestTLSClients(t *testing.T) {
	for _, tt := range []struct {
		name, keys string
		args       []string
		ours       bool // nbdkit 1.32 has not got the option
	}{
		{"certificates", "", []string{"--tls-certificates=DIR/server"}, false},
		{"verified", "", []string{"--tls-certificates=DIR/server", "--tls-verify-peer"}, false},
		{"PSK", "/psk/keys.psk", []string{"--tls-psk=DIR/psk/keys.psk"}, false},
		{"priority", "", []string{"--tls-certificates=DIR/server", "--tls-verify-peer", "--tls-priority=NORMAL"}, true},
		{"TLS 1.2", "", []string{"--tls-certificates=DIR/server", "--tls-priority=NORMAL:-VERS-ALL:+VERS-TLS1.2"}, true},
		{"PSK TLS 1.2", "/psk/keys.psk", []string{"--tls-psk=DIR/psk/keys.psk", "--tls-priority=NORMAL:-VERS-ALL:+VERS-TLS1.2"}, true},
	} {
		for _, c := range tlsClients {
			t.Run(tt.name+"/"+c.name, func(t *testing.T) {
				t.Parallel()
				sc := scenario{
					tcp:   true,
					setup: func(t *testing.T, dir string) { tlsFiles(t, dir) },
					args:  append([]string{"--tls=require"}, append(tt.args, "memory", "2M")...),
					client: func(t *testing.T, s *server) string {
						in, out := filepath.Join(s.dir, "in"), filepath.Join(s.dir, "out")
						data := make([]byte, 2<<20)
						rand.Read(data)
						clear(data[:4096]) // nbdinfo looks at what begins the disk
						writeFile(t, in, string(data), 0o600)
						keys := tt.keys
						if keys != "" {
							keys = s.dir + keys
						}
						said := c.run(t, s, in, out, keys)
						sameBytes(t, out, in)
						for _, uri := range []string{s.tlsURI(s.dir+"/client", ""), s.tlsURI("", s.dir+"/psk/keys.psk")} {
							said = strings.ReplaceAll(said, uri, "URI")
						}
						return said
					},
				}
				if tt.ours {
					onlyNbdhost(t)
					sc.run(t, nbdhost)
					return
				}
				compare(t, sc)
			})
		}
	}
}

// Who is let in and who is not, beside nbdkit. Over TCP, where libnbd verifies the
// server.
func TestTLSRefused(t *testing.T) {
	info := func(uri string) func(t *testing.T, s *server) error {
		return func(t *testing.T, s *server) error {
			_, err := try(t, "nbdinfo", "--size", strings.NewReplacer("DIR", s.dir, "PORT", s.port()).Replace(uri))
			return err
		}
	}
	x509URI := func(dir string) func(t *testing.T, s *server) error {
		return info("nbds://127.0.0.1:PORT/?tls-certificates=DIR/" + dir)
	}
	qemu := func(version string) func(t *testing.T, s *server) error {
		return func(t *testing.T, s *server) error {
			_, err := try(t, "qemu-img", "info", "--object",
				"tls-creds-x509,id=tls0,endpoint=client,dir="+s.dir+"/client,priority=NORMAL:-VERS-ALL:"+version,
				"--image-opts", "driver=raw,file.driver=nbd,file.host=127.0.0.1,file.port="+s.port()+",file.tls-creds=tls0")
			return err
		}
	}
	psk := info("nbds://alice@127.0.0.1:PORT/?tls-psk-file=DIR/psk/keys.psk")
	certs := []string{"--tls=require", "--tls-certificates=DIR/server"}
	verify := append([]string{"--tls-verify-peer"}, certs...)
	for _, tt := range []struct {
		name   string
		args   []string
		change func(t *testing.T, dir string, ca *pki.Authority)
		client func(t *testing.T, s *server) error
		want   bool // it is let in
	}{
		{"good", verify, nil, x509URI("client"), true},
		{"plain client, required", certs, nil, info("nbd://127.0.0.1:PORT"), false},
		{"plain client, on", []string{"--tls=on", certs[1]}, nil, info("nbd://127.0.0.1:PORT"), true},
		{"TLS client, on", []string{"--tls=on", certs[1]}, nil, x509URI("client"), true},
		{"TLS client, by default", certs[1:], nil, x509URI("client"), true},
		{"TLS client, off", []string{"--tls=off", certs[1]}, nil, x509URI("client"), false},
		{"other CA of the server", certs, func(t *testing.T, dir string, _ *pki.Authority) {
			pki.NewAuthority(t, "Other").WriteClient(dir+"/client", pki.Cert{})
		}, x509URI("client"), false},
		{"expired server", certs, func(t *testing.T, dir string, ca *pki.Authority) {
			ca.WriteServer(dir+"/server", ca.Server(pki.Expired))
		}, x509URI("client"), false},
		{"wrong host", certs, func(t *testing.T, dir string, ca *pki.Authority) {
			ca.WriteServer(dir+"/server", ca.Server(pki.Elsewhere))
		}, x509URI("client"), false},
		{"no certificate", verify, func(t *testing.T, dir string, ca *pki.Authority) {
			ca.WriteClient(dir+"/nobody", pki.Cert{})
		}, x509URI("nobody"), false},
		{"no certificate needed", certs, func(t *testing.T, dir string, ca *pki.Authority) {
			ca.WriteClient(dir+"/nobody", pki.Cert{})
		}, x509URI("nobody"), true},
		{"expired client", verify, func(t *testing.T, dir string, ca *pki.Authority) {
			ca.WriteClient(dir+"/client", ca.Client("alice", pki.Expired))
		}, x509URI("client"), false},
		{"client of another CA", verify, func(t *testing.T, dir string, ca *pki.Authority) {
			ca.WriteClient(dir+"/client", pki.NewAuthority(t, "Other").Client("alice"))
		}, x509URI("client"), false},
		{"client of a CA with the same name", verify, func(t *testing.T, dir string, ca *pki.Authority) {
			ca.WriteClient(dir+"/client", pki.NewAuthority(t, "Authority").Client("alice"))
		}, x509URI("client"), false},
		{"revoked", verify, func(t *testing.T, dir string, ca *pki.Authority) {
			mallory := ca.Client("mallory")
			ca.WriteClient(dir+"/client", mallory)
			pki.Write(t, dir+"/server", map[string][]byte{"ca-crl.pem": ca.Revoke(mallory)})
		}, x509URI("client"), false},
		{"RSA", verify, func(t *testing.T, dir string, ca *pki.Authority) {
			ca.WriteClient(dir+"/client", ca.Client("alice", pki.RSA))
		}, x509URI("client"), true},
		{"RSA, TLS 1.3", verify, func(t *testing.T, dir string, ca *pki.Authority) {
			ca.WriteClient(dir+"/client", ca.Client("alice", pki.RSA))
		}, qemu("+VERS-TLS1.3"), true},
		{"RSA, TLS 1.2", verify, func(t *testing.T, dir string, ca *pki.Authority) {
			ca.WriteClient(dir+"/client", ca.Client("alice", pki.RSA))
		}, qemu("+VERS-TLS1.2"), true},
		{"RSA of another CA", verify, func(t *testing.T, dir string, ca *pki.Authority) {
			ca.WriteClient(dir+"/client", pki.NewAuthority(t, "Other").Client("alice", pki.RSA))
		}, x509URI("client"), false},
		{"RSA revoked", verify, func(t *testing.T, dir string, ca *pki.Authority) {
			mallory := ca.Client("mallory", pki.RSA)
			ca.WriteClient(dir+"/client", mallory)
			pki.Write(t, dir+"/server", map[string][]byte{"ca-crl.pem": ca.Revoke(mallory)})
		}, x509URI("client"), false},
		{"another revoked", verify, func(t *testing.T, dir string, ca *pki.Authority) {
			pki.Write(t, dir+"/server", map[string][]byte{"ca-crl.pem": ca.Revoke(ca.Client("mallory"))})
		}, x509URI("client"), true},
		{"PSK", []string{"--tls=require", "--tls-psk=DIR/psk/keys.psk"}, nil, psk, true},
		{"wrong PSK", []string{"--tls=require", "--tls-psk=DIR/other.psk"}, func(t *testing.T, dir string, _ *pki.Authority) {
			writeFile(t, dir+"/other.psk", "alice:00112233\n", 0o600)
		}, psk, false},
		{"unknown user", []string{"--tls=require", "--tls-psk=DIR/other.psk"}, func(t *testing.T, dir string, _ *pki.Authority) {
			writeFile(t, dir+"/other.psk", "bob:"+aliceKey+"\n", 0o600)
		}, psk, false},
		{"certificates against PSK", []string{"--tls=require", "--tls-psk=DIR/psk/keys.psk"}, nil, x509URI("client"), false},
		{"PSK against certificates", certs, nil, psk, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			for _, program := range []string{nbdkit, nbdhost} {
				dir := tempDir(t)
				ca := tlsFiles(t, dir)
				if tt.change != nil {
					tt.change(t, dir, ca)
				}
				s := start(t, program, dir, true, append(tt.args, "memory", "1M")...)
				// The second time shows that a refusal does no harm to the server.
				for range 2 {
					if err := tt.client(t, s); (err == nil) != tt.want {
						t.Errorf("%s: got %v, want success %v", filepath.Base(program), err, tt.want)
					}
				}
				s.stop()
			}
		})
	}
}

// The program under test serves with keys that Go does not know and GnuTLS does, as
// nbdkit does.
func TestTLSForeignKeys(t *testing.T) {
	for _, tt := range []struct {
		name string
		key  []string
	}{
		{"RSA-PSS", []string{"-newkey", "rsa-pss", "-pkeyopt", "rsa_keygen_bits:2048"}},
		{"Ed448", []string{"-newkey", "ed448"}},
	} {
		cert := pki.Foreign(t, tt.key...)
		for _, args := range [][]string{nil, {"--tls-verify-peer"}, {"--tls-priority=NORMAL"}} {
			t.Run(fmt.Sprint(tt.name, args), func(t *testing.T) {
				t.Parallel()
				sc := scenario{
					tcp: true,
					setup: func(t *testing.T, dir string) {
						tlsFiles(t, dir)
						pki.Write(t, dir+"/server", map[string][]byte{"server-cert.pem": cert.Cert, "server-key.pem": cert.Key})
						pki.Write(t, dir+"/client", map[string][]byte{"ca-cert.pem": cert.Cert}) // which has signed itself
					},
					args: append([]string{"--tls=require", "--tls-certificates=DIR/server", "memory", "1M"}, args...),
					client: func(t *testing.T, s *server) string {
						return command(t, "nbdinfo", "--size", s.tlsURI(s.dir+"/client", ""))
					},
				}
				if len(args) > 0 && strings.HasPrefix(args[0], "--tls-priority") {
					onlyNbdhost(t) // nbdkit 1.32 has not got the option
					sc.run(t, nbdhost)
					return
				}
				compare(t, sc)
			})
		}
	}
}

// What a server does not start with.
func TestTLSBadFiles(t *testing.T) {
	onlyNbdhost(t)
	for _, tt := range []struct {
		name string
		args []string
		do   func(t *testing.T, dir string, ca *pki.Authority)
		want string
	}{
		{"no directory", []string{"--tls-certificates=DIR/nowhere"}, nil, "nowhere/server-cert.pem: no such file"},
		{"no key", []string{"--tls-certificates=DIR/server"}, func(t *testing.T, dir string, _ *pki.Authority) {
			os.Remove(dir + "/server/server-key.pem")
		}, "server-key.pem: no such file"},
		{"key unreadable", []string{"--tls-certificates=DIR/server"}, func(t *testing.T, dir string, _ *pki.Authority) {
			os.Remove(dir + "/server/server-key.pem")
			os.Mkdir(dir+"/server/server-key.pem", 0o700)
		}, "server-key.pem: is a directory"},
		{"other key", []string{"--tls-certificates=DIR/server"}, func(t *testing.T, dir string, ca *pki.Authority) {
			pki.Write(t, dir+"/server", map[string][]byte{"server-key.pem": ca.Server().Key})
		}, "need a certificate and the key it was made for"},
		{"curve that nobody takes", []string{"--tls-certificates=DIR/server"}, func(t *testing.T, dir string, ca *pki.Authority) {
			c := pki.Foreign(t, "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime192v1")
			pki.Write(t, dir+"/server", map[string][]byte{"server-cert.pem": c.Cert, "server-key.pem": c.Key})
		}, "server-cert.pem: got a certificate for a key on another elliptic curve"},
		{"no authority", []string{"--tls-certificates=DIR/server", "--tls-verify-peer"}, func(t *testing.T, dir string, _ *pki.Authority) {
			os.Remove(dir + "/server/ca-cert.pem")
		}, "clients are to be verified"},
		{"no PSK", []string{"--tls-psk=DIR/nowhere"}, nil, "nowhere: no such file"},
		{"bad PSK", []string{"--tls-psk=DIR/server/server-cert.pem"}, nil, "line 1: need USER:KEY"},
		{"bad priority", []string{"--tls-certificates=DIR/server", "--tls-priority=BAD"}, nil, `set priority "BAD"`},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			dir := tempDir(t)
			ca := tlsFiles(t, dir)
			if tt.do != nil {
				tt.do(t, dir, ca)
			}
			_, err := tryStart(t, nbdhost, dir, false, append(tt.args, "--tls=require", "memory", "1M")...)
			if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("got %v, want an error with %q", err, tt.want)
			}
		})
	}
}

// startTLS negotiates TLS by hand, up to where the handshake begins.
func (c *raw) startTLS() {
	c.t.Helper()
	c.take(protocol.GreetingSize)
	c.write(clientFlags(protocol.FlagCFixedNewstyle | protocol.FlagCNoZeroes))
	c.write(option(protocol.OptStartTLS, nil))
	c.wantOption(protocol.OptStartTLS, protocol.RepAck)
}

// secure does a handshake with crypto/tls, as the client in a directory.
func (s *server) secure(t *testing.T, dir string) (*tls.Conn, error) {
	t.Helper()
	c := s.raw()
	c.startTLS()
	pem, err := os.ReadFile(filepath.Join(dir, "ca-cert.pem"))
	if err != nil {
		t.Fatal(err)
	}
	config := &tls.Config{ServerName: "localhost", RootCAs: x509.NewCertPool()}
	config.RootCAs.AppendCertsFromPEM(pem)
	if pair, err := tls.LoadX509KeyPair(filepath.Join(dir, "client-cert.pem"), filepath.Join(dir, "client-key.pem")); err == nil {
		config.Certificates = []tls.Certificate{pair}
	}
	tc := tls.Client(c.Conn, config)
	if err := tc.Handshake(); err != nil {
		return nil, err
	}
	// With TLS 1.3 the server's verdict on the client comes later.
	if _, err := tc.Write(option(protocol.OptList, nil)); err != nil {
		return nil, err
	}
	b := make([]byte, protocol.OptionReplyHeaderSize)
	_, err = io.ReadFull(tc, b)
	return tc, err
}

// New files are used by new connections; connections that run go on; bad files
// change nothing, and the log says why.
func TestTLSRotation(t *testing.T) {
	onlyNbdhost(t)
	for _, priority := range []string{"", "NORMAL"} {
		t.Run("certificates "+priority, func(t *testing.T) {
			t.Parallel()
			dir := tempDir(t)
			ca := tlsFiles(t, dir)
			alice, bob := ca.Client("alice"), ca.Client("bob")
			ca.WriteClient(dir+"/client", alice)
			ca.WriteClient(dir+"/bob", bob)
			one, two := ca.Server(), ca.Server()
			ca.WriteServer(dir+"/server", one)
			args := []string{"--tls=require", "--tls-certificates=DIR/server", "--tls-verify-peer", "memory", "1M"}
			if priority != "" {
				args = append([]string{"--tls-priority=" + priority}, args...)
			}
			s := start(t, nbdhost, dir, false, args...)
			shows := func(want pki.Cert) {
				t.Helper()
				c, err := s.secure(t, dir+"/bob")
				if err != nil {
					t.Fatal(err)
				}
				if got := c.ConnectionState().PeerCertificates[0].SerialNumber; got.Cmp(want.Serial) != 0 {
					t.Errorf("got certificate %v, want %v", got, want.Serial)
				}
				c.Close()
			}
			shows(one)
			running, err := s.secure(t, dir+"/client")
			if err != nil {
				t.Fatal(err)
			}

			pki.Write(t, dir+"/server", map[string][]byte{"server-cert.pem": []byte("garbage")})
			shows(one)
			shows(one)
			if n := strings.Count(s.stderr(), "going on with those in use"); n != 1 {
				t.Errorf("got %d lines about the bad file, want 1:\n%s", n, s.stderr())
			}
			ca.WriteServer(dir+"/server", two)
			shows(two)

			pki.Write(t, dir+"/server", map[string][]byte{"ca-crl.pem": ca.Revoke(alice)})
			if _, err := s.secure(t, dir+"/client"); err == nil {
				t.Error("a revoked client got in")
			}
			shows(two)
			// alice is still there.
			if _, err := running.Write(option(protocol.OptAbort, nil)); err != nil {
				t.Error(err)
			}
			if b, err := io.ReadAll(running); err != nil || len(b) == 0 {
				t.Errorf("running connection: got %d bytes and %v", len(b), err)
			}
			s.stop()
		})
	}
	t.Run("PSK", func(t *testing.T) {
		t.Parallel()
		dir := tempDir(t)
		tlsFiles(t, dir)
		writeFile(t, dir+"/old.psk", "alice:"+aliceKey+"\n", 0o600)
		writeFile(t, dir+"/new.psk", "alice:0011223344556677\n", 0o600)
		s := start(t, nbdhost, dir, true, "--tls=require", "--tls-psk=DIR/psk/keys.psk", "memory", "1M")
		want := func(file string, ok bool) {
			t.Helper()
			if _, err := try(t, "nbdinfo", "--size", s.tlsURI("", dir+"/"+file)); (err == nil) != ok {
				t.Errorf("%s: got %v, want success %v", file, err, ok)
			}
		}
		want("old.psk", true)
		pki.Write(t, dir+"/psk", map[string][]byte{"keys.psk": []byte("garbage")})
		want("old.psk", true)
		pki.Write(t, dir+"/psk", map[string][]byte{"keys.psk": []byte("alice:0011223344556677\n")})
		want("old.psk", false)
		want("new.psk", true)
		s.stop()
	})
}

// Plugins and the tls-fallback filter know who is there.
func TestTLSPeer(t *testing.T) {
	t.Run("plugin", func(t *testing.T) {
		t.Parallel()
		onlyNbdhost(t) // nbdkit 1.32 has no nbdkit_peer_tls_dn
		for _, tt := range []struct {
			args          []string
			uri           func(s *server) string
			want, library string
		}{
			{[]string{"--tls-certificates=DIR/server"}, func(s *server) string { return "nbd://" + s.address }, "tls=0 dn= issuer=", ""},
			{[]string{"--tls-certificates=DIR/server"}, func(s *server) string { return s.tlsURI(s.dir+"/client", "") }, "tls=1 dn= issuer=", ""},
			{[]string{"--tls-certificates=DIR/server", "--tls-verify-peer"}, func(s *server) string { return s.tlsURI(s.dir+"/client", "") },
				"tls=1 dn=CN=alice,O=Tests issuer=CN=Authority", ""},
			{[]string{"--tls-certificates=DIR/server", "--tls-verify-peer", "--tls-priority=NORMAL"}, func(s *server) string { return s.tlsURI(s.dir+"/client", "") },
				"tls=1 dn=CN=alice,O=Tests issuer=CN=Authority", ""},
			{[]string{"--tls-psk=DIR/psk/keys.psk"}, func(s *server) string { return s.tlsURI("", s.dir+"/psk/keys.psk") }, "tls=1 dn= issuer=", ""},
		} {
			dir := tempDir(t)
			tlsFiles(t, dir)
			s := start(t, nbdhost, dir, true, append(tt.args, fixture(t, "peer"))...)
			got, err := nbdsh(t, tt.uri(s), `print(h.pread(512, 0).split(b"\n")[0].decode())`)
			if err != nil || got != tt.want+"\n" {
				t.Errorf("%q: got %q and %v, want %q", tt.args, got, err, tt.want)
			}
			s.stop()
		}
	})
	t.Run("tls-fallback", func(t *testing.T) {
		t.Parallel()
		compare(t, scenario{
			tcp:   true,
			setup: func(t *testing.T, dir string) { tlsFiles(t, dir) },
			args:  []string{"--tls=on", "--tls-certificates=DIR/server", "--filter=tls-fallback", "data", `data="secret"*1000`, "tlsreadme=Please use TLS."},
			client: func(t *testing.T, s *server) (said string) {
				for _, uri := range []string{"nbd://" + s.address, s.tlsURI(s.dir+"/client", "")} {
					out, err := nbdsh(t, uri, `print(h.get_size(), h.is_read_only(), h.get_export_description(), h.pread(20, 0))`)
					said += fmt.Sprintln(out, err)
				}
				return said
			},
		})
	})
}

// Somebody who does not keep to TLS does no harm, and does not stay.
func TestTLSHostile(t *testing.T) {
	onlyNbdhost(t)
	for _, args := range [][]string{
		{"--tls-certificates=DIR/server"}, {"--tls-certificates=DIR/server", "--tls-priority=NORMAL"}, {"--tls-psk=DIR/psk/keys.psk"},
	} {
		t.Run(args[len(args)-1], func(t *testing.T) {
			t.Parallel()
			dir := tempDir(t)
			tlsFiles(t, dir)
			s := start(t, nbdhost, dir, true, append(args, "--tls=require", "--timeout=500ms", "memory", "1M")...)
			for _, text := range []string{"", "\x16\x03\x01", "garbage instead of a ClientHello", strings.Repeat("\x00", 100000),
				string(option(protocol.OptList, nil)), "\x16\x03\x01\x40\x00" + strings.Repeat("\x01", 0x4000)} {
				c := s.raw()
				c.startTLS()
				c.Write([]byte(text))    // it may be refused before it has all been sent
				io.Copy(io.Discard, c.r) // returns, be it for the time limit

				c = s.raw()
				c.startTLS()
				c.Write([]byte(text))
				c.Close()
			}
			keys := ""
			if strings.Contains(args[0], "psk") {
				keys = dir + "/psk/keys.psk"
			}
			command(t, "nbdinfo", "--size", s.tlsURI(dir+"/client", keys))
			s.stop()
		})
	}
}

// relay listens for clients that know TLS but not NBD: it negotiates
// NBD_OPT_STARTTLS with the server and then passes everything on.
func (s *server) relay(t *testing.T) (address string) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			below, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer below.Close()
				c, err := net.Dial(s.network, s.address)
				if err != nil {
					return
				}
				defer c.Close()
				hello := append(clientFlags(protocol.FlagCFixedNewstyle|protocol.FlagCNoZeroes), option(protocol.OptStartTLS, nil)...)
				if _, err := c.Write(hello); err != nil {
					return
				}
				if _, err := io.ReadFull(c, make([]byte, protocol.GreetingSize+protocol.OptionReplyHeaderSize)); err != nil {
					return
				}
				go io.Copy(c, below)
				io.Copy(below, c)
			}()
		}
	}()
	return l.Addr().String()
}

// talk runs a client with input, and returns all that it prints.
func talk(t *testing.T, input []byte, name string, args ...string) (string, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	cmd := exec.CommandContext(ctx, name, args...)
	r, w := io.Pipe()
	cmd.Stdin = r
	go w.Write(input) // no end of file: the server ends the conversation
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() { <-ctx.Done(); w.Close() }()
	state, err := cmd.Process.Wait()
	w.Close()
	cmd.Wait()
	if err == nil && !state.Success() {
		err = errors.New(state.String())
	}
	return out.String(), err
}

// The general tools of two TLS libraries talk to the server.
func TestTLSTools(t *testing.T) {
	onlyNbdhost(t)
	abort := option(protocol.OptAbort, nil)
	reply := string((&protocol.OptionReplyHeader{Option: protocol.OptAbort, Type: protocol.RepAck}).AppendTo(nil))
	fast := "(CHACHA20-POLY1305)"
	if cpu.X86.HasAES && cpu.X86.HasPCLMULQDQ {
		fast = "(AES-128-GCM)"
	}
	for _, tt := range []struct {
		name  string
		args  []string
		input []byte
		tool  []string // HOST and PORT are the relay's, DIR is as for start
		want  string   // "" for a reply to NBD_OPT_ABORT
	}{
		{"gnutls-cli", []string{"--tls-certificates=DIR/server", "--tls-verify-peer"}, abort,
			[]string{"gnutls-cli", "--logfile=DIR/log", "--x509cafile=DIR/client/ca-cert.pem", "--x509certfile=DIR/client/client-cert.pem", "--x509keyfile=DIR/client/client-key.pem", "-p", "PORT", "127.0.0.1"}, ""},
		{"gnutls-cli TLS 1.2", []string{"--tls-certificates=DIR/server"}, abort,
			[]string{"gnutls-cli", "--logfile=DIR/log", "--x509cafile=DIR/client/ca-cert.pem", "--priority=NORMAL:-VERS-ALL:+VERS-TLS1.2", "-p", "PORT", "127.0.0.1"}, ""},
		{"gnutls-cli TLS 1.1", []string{"--tls-certificates=DIR/server"}, abort,
			[]string{"gnutls-cli", "--x509cafile=DIR/client/ca-cert.pem", "--priority=NORMAL:-VERS-ALL:+VERS-TLS1.1", "-p", "PORT", "127.0.0.1"}, "rotocol version"},
		{"gnutls-cli PSK", []string{"--tls-psk=DIR/psk/keys.psk"}, abort,
			[]string{"gnutls-cli", "--logfile=DIR/log", "--pskusername=alice", "--pskkey=" + aliceKey, "--priority=NORMAL:-KX-ALL:+ECDHE-PSK:+DHE-PSK:+PSK", "-p", "PORT", "127.0.0.1"}, ""},
		// Where the processor has AES it comes before ChaCha20, whatever the client prefers.
		{"gnutls-cli PSK, ChaCha20 first", []string{"--tls-psk=DIR/psk/keys.psk"}, abort,
			[]string{"gnutls-cli", "--pskusername=alice", "--pskkey=" + aliceKey, "--priority=NORMAL:-KX-ALL:+ECDHE-PSK:+DHE-PSK:+PSK", "-p", "PORT", "127.0.0.1"}, fast},
		{"openssl", []string{"--tls-certificates=DIR/server", "--tls-verify-peer"}, abort,
			[]string{"openssl", "s_client", "-quiet", "-verify_return_error", "-CAfile", "DIR/client/ca-cert.pem", "-cert", "DIR/client/client-cert.pem", "-key", "DIR/client/client-key.pem", "-connect", "127.0.0.1:PORT"}, ""},
		{"openssl TLS 1.2", []string{"--tls-certificates=DIR/server"}, abort,
			[]string{"openssl", "s_client", "-quiet", "-tls1_2", "-verify_return_error", "-CAfile", "DIR/client/ca-cert.pem", "-connect", "127.0.0.1:PORT"}, ""},
		{"openssl PSK", []string{"--tls-psk=DIR/psk/keys.psk"}, abort,
			[]string{"openssl", "s_client", "-quiet", "-psk_identity", "alice", "-psk", aliceKey, "-connect", "127.0.0.1:PORT"}, ""},
		{"openssl PSK TLS 1.2", []string{"--tls-psk=DIR/psk/keys.psk"}, abort,
			[]string{"openssl", "s_client", "-quiet", "-tls1_2", "-psk_identity", "alice", "-psk", aliceKey, "-connect", "127.0.0.1:PORT"}, ""},
		// R at the beginning of what openssl reads asks for a renegotiation.
		{"renegotiation", []string{"--tls-certificates=DIR/server"}, []byte("R\n"),
			[]string{"openssl", "s_client", "-tls1_2", "-CAfile", "DIR/client/ca-cert.pem", "-connect", "127.0.0.1:PORT"}, "RENEGOTIATING"},
		{"renegotiation with GnuTLS", []string{"--tls-certificates=DIR/server", "--tls-priority=NORMAL"}, []byte("R\n"),
			[]string{"openssl", "s_client", "-tls1_2", "-CAfile", "DIR/client/ca-cert.pem", "-connect", "127.0.0.1:PORT"}, "RENEGOTIATING"},
		// K asks for new keys, both ways, which TLS 1.3 has instead.
		{"key update", []string{"--tls-certificates=DIR/server"}, []byte("K\n"),
			[]string{"openssl", "s_client", "-CAfile", "DIR/client/ca-cert.pem", "-connect", "127.0.0.1:PORT"}, "KEYUPDATE"},
		{"key update with GnuTLS", []string{"--tls-certificates=DIR/server", "--tls-priority=NORMAL"}, []byte("K\n"),
			[]string{"openssl", "s_client", "-CAfile", "DIR/client/ca-cert.pem", "-connect", "127.0.0.1:PORT"}, "KEYUPDATE"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			dir := tempDir(t)
			tlsFiles(t, dir)
			s := start(t, nbdhost, dir, true, append(tt.args, "--tls=require", "--timeout=3s", "memory", "1M")...)
			_, port, _ := net.SplitHostPort(s.relay(t))
			tool := make([]string, len(tt.tool))
			for i, a := range tt.tool {
				tool[i] = strings.NewReplacer("DIR", dir, "PORT", port).Replace(a)
			}
			out, err := talk(t, tt.input, tool[0], tool[1:]...)
			want := tt.want
			if want == "" {
				want = reply
			}
			if !strings.Contains(out, want) {
				t.Errorf("got %v, want output with %s:\n%s\n%s", err, hex.EncodeToString([]byte(want)), out, hex.Dump([]byte(out)))
			}
			s.stop()
		})
	}
}

// GnuTLS is loaded where it is needed and not before.
func TestTLSWithoutGnuTLS(t *testing.T) {
	onlyNbdhost(t)
	dir := tempDir(t)
	tlsFiles(t, dir)
	writeFile(t, filepath.Join(dir, "libgnutls.so.30"), "no library", 0o700)
	t.Setenv("LD_LIBRARY_PATH", dir)
	for _, args := range [][]string{{"--tls-psk=DIR/psk/keys.psk"}, {"--tls-certificates=DIR/server", "--tls-priority=NORMAL"}} {
		_, err := tryStart(t, nbdhost, dir, false, append(args, "--tls=require", "memory", "1M")...)
		want := "install the package that has libgnutls.so.30"
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: got %v, want an error with %q", args, err, want)
		}
	}
	for _, verify := range []string{"", "--tls-verify-peer"} {
		args := []string{"--tls=require", "--tls-certificates=DIR/server", "memory", "1M"}
		if verify != "" {
			args = append([]string{verify}, args...)
		}
		s := start(t, nbdhost, dir, false, args...)
		c, err := s.secure(t, filepath.Join(dir, "client"))
		if err != nil {
			t.Fatal(err)
		}
		c.Close()
		if got := strings.Contains(s.stderr(), "verifying clients without GnuTLS"); got != (verify != "") {
			t.Errorf("%q: got a warning %v:\n%s", args, got, s.stderr())
		}
		s.stop()
	}
}

// URIs that are printed say what a client needs.
func TestTLSURI(t *testing.T) {
	onlyNbdhost(t)
	for _, tt := range []struct{ mode, credentials, want string }{
		{"require", "--tls-certificates=DIR/server", "nbds://localhost:PORT?tls-certificates=DIR/server 2"},
		{"on", "--tls-certificates=DIR/server", "nbd://localhost:PORT 1"},
		{"off", "--tls-certificates=DIR/server", "nbd://localhost:PORT "},
		{"require", "--tls-psk=DIR/psk/keys.psk", "nbds://localhost:PORT?tls-psk-file=DIR/psk/keys.psk 2"},
	} {
		dir := tempDir(t)
		tlsFiles(t, dir)
		out := command(t, nbdhost, "-p", "0", "--tls="+tt.mode, strings.ReplaceAll(tt.credentials, "DIR", dir), "memory", "1M",
			"--run", `echo "$uri $tls"; echo "$port"; if [ "$tls" != 2 ] || [ -n "$tls_certificates" ]; then nbdinfo --size "$uri"; else echo 1048576; fi`)
		lines := strings.Split(out, "\n")
		want := strings.NewReplacer("DIR", dir, "PORT", lines[1]).Replace(tt.want)
		if lines[0] != want || lines[2] != "1048576" {
			t.Errorf("got %q, want %q and the size", out, want)
		}
	}
}
