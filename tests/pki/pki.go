// Package pki makes certificates for tests: an authority, what it issues and
// revokes, and directories as nbdkit and libnbd read them. Nothing of it is fit
// for anything else.
package pki

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"
)

// An Authority issues certificates. It is for one goroutine.
type Authority struct {
	t      testing.TB
	cert   *x509.Certificate
	key    *ecdsa.PrivateKey
	serial int64
	lists  int64

	PEM []byte // its own certificate
}

// A Cert is a certificate and its key.
type Cert struct {
	Cert, Key []byte // PEM
	Serial    *big.Int
}

// NewAuthority makes an authority of that name.
func NewAuthority(t testing.TB, name string) *Authority {
	t.Helper()
	a := &Authority{t: t, key: newKey(t), serial: 1}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: name},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, a.key.Public(), a.key)
	a.check(err)
	a.cert, err = x509.ParseCertificate(der)
	a.check(err)
	a.PEM = block("CERTIFICATE", der)
	return a
}

func (a *Authority) check(err error) {
	a.t.Helper()
	if err != nil {
		a.t.Fatal(err)
	}
}

func newKey(t testing.TB) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func block(kind string, der []byte) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der})
}

// Server issues a certificate for localhost and 127.0.0.1. The functions change the
// template before it is signed.
func (a *Authority) Server(change ...func(*x509.Certificate)) Cert {
	a.t.Helper()
	return a.issue(&x509.Certificate{
		Subject: pkix.Name{CommonName: "localhost"}, DNSNames: []string{"localhost"},
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1), net.IPv6loopback},
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}, change)
}

// Client issues a certificate that says CN=name,O=Tests.
func (a *Authority) Client(name string, change ...func(*x509.Certificate)) Cert {
	a.t.Helper()
	return a.issue(&x509.Certificate{
		Subject:     pkix.Name{CommonName: name, Organization: []string{"Tests"}},
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	}, change)
}

// Expired is a change that makes a certificate end a minute ago.
func Expired(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Minute) }

// Elsewhere is a change that makes a certificate one of another host.
func Elsewhere(c *x509.Certificate) { c.DNSNames, c.IPAddresses = []string{"elsewhere.example"}, nil }

// RSA is a change that makes a certificate one for an RSA key.
func RSA(c *x509.Certificate) { c.PublicKeyAlgorithm = x509.RSA }

// Foreign makes a certificate for localhost that is signed with its own key, by the
// arguments that openssl-req(1) is given: for kinds of keys that Go does not know.
func Foreign(t testing.TB, key ...string) Cert {
	t.Helper()
	dir := t.TempDir()
	cert, private := filepath.Join(dir, "cert.pem"), filepath.Join(dir, "key.pem")
	args := append([]string{"req", "-x509", "-nodes", "-subj", "/CN=localhost", "-days", "2",
		"-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1", "-out", cert, "-keyout", private}, key...)
	if out, err := exec.Command("openssl", args...).CombinedOutput(); err != nil {
		t.Fatalf("openssl %q: %v:\n%s", args, err, out)
	}
	var c Cert
	for path, text := range map[string]*[]byte{cert: &c.Cert, private: &c.Key} {
		var err error
		if *text, err = os.ReadFile(path); err != nil {
			t.Fatal(err)
		}
	}
	return c
}

func (a *Authority) issue(template *x509.Certificate, change []func(*x509.Certificate)) Cert {
	a.t.Helper()
	a.serial++
	template.SerialNumber = big.NewInt(a.serial)
	template.NotBefore, template.NotAfter = time.Now().Add(-time.Hour), time.Now().Add(24*time.Hour)
	template.KeyUsage = x509.KeyUsageDigitalSignature
	for _, f := range change {
		f(template)
	}
	var key crypto.Signer
	if template.PublicKeyAlgorithm == x509.RSA {
		made, err := rsa.GenerateKey(rand.Reader, 2048)
		a.check(err)
		key = made
	} else {
		key = newKey(a.t)
	}
	der, err := x509.CreateCertificate(rand.Reader, template, a.cert, key.Public(), a.key)
	a.check(err)
	private, err := x509.MarshalPKCS8PrivateKey(key)
	a.check(err)
	return Cert{block("CERTIFICATE", der), block("PRIVATE KEY", private), template.SerialNumber}
}

// Revoke makes a list that revokes the certificates and no others, in PEM.
func (a *Authority) Revoke(certs ...Cert) []byte {
	a.t.Helper()
	return a.revoke(time.Now().Add(time.Hour), certs)
}

// RevokeOverdue is Revoke, with a list that should have been replaced a moment ago.
func (a *Authority) RevokeOverdue(certs ...Cert) []byte {
	a.t.Helper()
	return a.revoke(time.Now().Add(-time.Second), certs)
}

func (a *Authority) revoke(next time.Time, certs []Cert) []byte {
	a.t.Helper()
	a.lists++
	template := &x509.RevocationList{Number: big.NewInt(a.lists),
		ThisUpdate: time.Now().Add(-time.Minute), NextUpdate: next}
	for _, c := range certs {
		template.RevokedCertificateEntries = append(template.RevokedCertificateEntries,
			x509.RevocationListEntry{SerialNumber: c.Serial, RevocationTime: time.Now().Add(-time.Minute)})
	}
	der, err := x509.CreateRevocationList(rand.Reader, template, a.cert, a.key)
	a.check(err)
	return block("X509 CRL", der)
}

// Write puts files, by name, into dir, which is made if need be. Each file is
// replaced as a whole.
func Write(t testing.TB, dir string, files map[string][]byte) {
	t.Helper()
	if err := os.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	for name, text := range files {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path+".new", text, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(path+".new", path); err != nil {
			t.Fatal(err)
		}
	}
}

// WriteServer makes a server's directory, which trusts clients of a.
func (a *Authority) WriteServer(dir string, c Cert) {
	a.t.Helper()
	Write(a.t, dir, map[string][]byte{"ca-cert.pem": a.PEM, "server-cert.pem": c.Cert, "server-key.pem": c.Key})
}

// WriteClient makes a client's directory, which trusts servers of a; c may be
// empty.
func (a *Authority) WriteClient(dir string, c Cert) {
	a.t.Helper()
	files := map[string][]byte{"ca-cert.pem": a.PEM}
	if c.Cert != nil {
		files["client-cert.pem"], files["client-key.pem"] = c.Cert, c.Key
	}
	Write(a.t, dir, files)
}
