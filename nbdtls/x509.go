package nbdtls

import (
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// x509Source is a directory of certificates.
type x509Source struct {
	config Config
	log    *slog.Logger
}

func (s *x509Source) files() []string { return identityFiles(s.config.Certificates) }

func (s *x509Source) load() (shaker, error) {
	id, err := readIdentity(s.config.Certificates, s.config.VerifyPeer)
	if err != nil {
		return nil, err
	}
	s.warn(id)
	if s.config.Priority != "" {
		return newCertificateCredentials(id, s.config)
	}
	return s.standard(id)
}

// warn tells of files that can be used and will disappoint. What cannot be read here
// is somebody else's to refuse.
func (s *x509Source) warn(id *identity) {
	for _, p := range id.pairs {
		certs, _ := certificates(p.cert)
		if len(certs) > 0 && time.Now().After(certs[0].NotAfter) {
			s.log.Warn(fmt.Sprintf("read %s: the certificate expired on %v: clients will refuse it", p.certPath, certs[0].NotAfter))
		}
	}
	_ = eachPEM(id.crl, "X509 CRL", func(der []byte) error {
		l, err := x509.ParseRevocationList(der)
		if err == nil && !l.NextUpdate.IsZero() && time.Now().After(l.NextUpdate) {
			s.log.Warn(fmt.Sprintf("read %s: there should be a newer list since %v: using this one",
				filepath.Join(s.config.Certificates, caCRL), l.NextUpdate))
		}
		return err
	})
}

// standard makes a configuration of crypto/tls.
func (s *x509Source) standard(id *identity) (shaker, error) {
	config := &tls.Config{
		MinVersion: tls.VersionTLS12,
		// A resumed session would go by files that are not in use any more.
		SessionTicketsDisabled: true,
		// Requests are answered in batches: small records only cost time.
		DynamicRecordSizingDisabled: true,
		KeyLogWriter:                keyLog(),
	}
	for _, p := range id.pairs {
		cert, err := tls.X509KeyPair(p.cert, p.key)
		if err != nil {
			return nil, fmt.Errorf("read %s and %s: %w: need a certificate and the key it was made for, both in PEM", p.certPath, p.keyPath, err)
		}
		config.Certificates = append(config.Certificates, cert)
	}
	if s.config.VerifyPeer {
		if err := s.verifyClients(config, id); err != nil {
			return nil, err
		}
	}
	return (*standard)(config), nil
}

func (s *x509Source) verifyClients(config *tls.Config, id *identity) error {
	authorities, err := certificates(id.ca)
	if err != nil {
		return fmt.Errorf("read %s: %w", filepath.Join(s.config.Certificates, caCert), err)
	}
	config.ClientAuth = tls.RequireAndVerifyClientCert
	config.ClientCAs = x509.NewCertPool()
	for _, a := range authorities {
		config.ClientCAs.AddCert(a)
	}
	if id.crl == nil {
		return nil
	}
	path := filepath.Join(s.config.Certificates, caCRL)
	lists, err := revocationLists(id.crl, authorities)
	if err != nil {
		return fmt.Errorf("read %s: %w", path, err)
	}
	config.VerifyConnection = lists.check
	return nil
}

// certificates reads all certificates of a text in PEM, at least one.
func certificates(text []byte) (list []*x509.Certificate, err error) {
	err = eachPEM(text, "CERTIFICATE", func(der []byte) error {
		c, err := x509.ParseCertificate(der)
		list = append(list, c)
		return err
	})
	return list, err
}

func eachPEM(text []byte, kind string, each func(der []byte) error) error {
	n := 0
	for {
		var block *pem.Block
		if block, text = pem.Decode(text); block == nil {
			break
		}
		if block.Type != kind {
			continue
		}
		n++
		if err := each(block.Bytes); err != nil {
			return err
		}
	}
	if n == 0 {
		return fmt.Errorf("got no %s block: need one, in PEM", kind)
	}
	return nil
}

// crls are certificate revocation lists whose signatures have been verified.
type crls []*x509.RevocationList

// revocationLists reads lists in PEM, each signed by one of the authorities.
func revocationLists(text []byte, authorities []*x509.Certificate) (lists crls, err error) {
	err = eachPEM(text, "X509 CRL", func(der []byte) error {
		l, err := x509.ParseRevocationList(der)
		if err != nil {
			return err
		}
		for _, a := range authorities {
			// Not CheckSignatureFrom: it wants a key usage that certtool
			// does not give an authority by itself.
			if string(a.RawSubject) == string(l.RawIssuer) &&
				a.CheckSignature(l.SignatureAlgorithm, l.RawTBSRevocationList, l.Signature) == nil {
				lists = append(lists, l)
				return nil
			}
		}
		return fmt.Errorf("got a list of %v, whose signature is by no certificate in %s", l.Issuer, caCert)
	})
	return lists, err
}

// check refuses a client that every chain of trust needs a revoked certificate for.
func (lists crls) check(state tls.ConnectionState) error {
	for _, chain := range state.VerifiedChains {
		if !lists.revoke(chain) {
			return nil
		}
	}
	leaf := state.PeerCertificates[0]
	return fmt.Errorf("client's certificate %v (serial %x): revoked", leaf.Subject, leaf.SerialNumber)
}

func (lists crls) revoke(chain []*x509.Certificate) bool {
	for _, c := range chain {
		for _, l := range lists {
			if string(l.RawIssuer) != string(c.RawIssuer) {
				continue
			}
			for _, r := range l.RevokedCertificateEntries {
				if r.SerialNumber.Cmp(c.SerialNumber) == 0 {
					return true
				}
			}
		}
	}
	return false
}

// keyLog is the file that $SSLKEYLOGFILE names, for people who debug (GnuTLS and
// others know it as well), or nil.
var keyLog = sync.OnceValue(func() io.Writer {
	path := os.Getenv("SSLKEYLOGFILE")
	if path == "" {
		return nil
	}
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		return nil // as the other libraries do
	}
	return f
})

// standard does handshakes with crypto/tls.
type standard tls.Config

func (s *standard) handshake(nc net.Conn) (Conn, error) {
	l := &link{Conn: nc}
	return finishStandard(tls.Server(l, (*tls.Config)(s)), l)
}

func finishStandard(t *tls.Conn, l *link) (Conn, error) {
	if err := t.Handshake(); err != nil {
		return nil, explain(err)
	}
	c := &standardConn{Conn: t, link: l}
	if certs := t.ConnectionState().PeerCertificates; len(certs) > 0 {
		c.peer = peerOf(certs[0])
	}
	return c, nil
}

// explain says what to do about errors that people meet often.
func explain(err error) error {
	var header tls.RecordHeaderError
	if errors.As(err, &header) {
		return fmt.Errorf("%w: the peer does not speak TLS", err)
	}
	return err
}

// standardConn is a Conn of crypto/tls.
type standardConn struct {
	*tls.Conn
	link *link
	peer
}

func (c *standardConn) Description() string {
	s := c.ConnectionState()
	return tls.VersionName(s.Version) + " " + tls.CipherSuiteName(s.CipherSuite)
}

func (c *standardConn) TryRead(fd uintptr, p []byte) (n int, err error) {
	c.link.descriptor, c.link.trying, c.link.more = int(fd), true, false
	defer func() { c.link.trying = false }()
	for n < len(p) {
		got, err := c.Conn.Read(p[n:])
		n += got
		c.link.more = n > 0
		switch {
		case err == nil:
			continue
		case n > 0:
			return n, nil // the error comes again
		case errors.Is(err, wouldBlock{}):
			return 0, unix.EAGAIN
		}
		return 0, err
	}
	return n, nil
}

func (c *standardConn) Move(nc net.Conn) error {
	c.link.move(nc)
	return nil
}

// Write sends all records that p takes with as few calls of the system as the
// link's buffer allows.
func (c *standardConn) Write(p []byte) (int, error) {
	if len(p) <= maxRecord {
		return c.Conn.Write(p)
	}
	c.link.cork()
	n, err := c.Conn.Write(p)
	if e := c.link.uncork(); err == nil {
		err = e
	}
	return n, err
}
