package nbdtls

import (
	"crypto/tls"
	"crypto/x509"
	"encoding/asn1"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// x509Source is a directory of certificates.
type x509Source struct {
	config Config
	log    *slog.Logger

	refused string // why the library that comes first is not in use, "" if it is
}

func (s *x509Source) files() []string { return identityFiles(s.config.Certificates) }

func (s *x509Source) load() (shaker, error) {
	id, err := readIdentity(s.config.Certificates, s.config.VerifyPeer)
	if err != nil {
		return nil, err
	}
	s.warn(id)
	return s.choose(id)
}

// choose gives the files to the library that serves most clients with them
// (RATIONALE.md, "Why two TLS libraries?"), and to the other one if that cannot use
// them. A priority string is for GnuTLS.
func (s *x509Source) choose(id *identity) (shaker, error) {
	if s.config.Priority != "" {
		return s.gnutls(id)
	}
	for _, p := range id.pairs {
		if err := checkKey(p); err != nil {
			return nil, err
		}
	}
	first, second := s.standard, s.gnutls // Go does not know every kind of key
	if s.config.VerifyPeer {
		// Go's server does not tell clients of TLS 1.3 that it takes
		// certificates that were signed with PKCS #1. GnuTLS's clients then
		// send no certificate for an RSA key at all.
		first, second = second, first
	}
	made, err := first(id)
	if err == nil {
		s.refused = ""
		return made, nil
	}
	made, also := second(id)
	if also == nil {
		s.tellSecond(err)
		return made, nil
	}
	if errors.Is(err, ErrGnuTLS) {
		err, also = also, err
	}
	if errors.Is(also, ErrGnuTLS) {
		err = fmt.Errorf("%w; if the files are right GnuTLS may be able to use them: %w", err, also)
	}
	return nil, err
}

// tellSecond says once why the library that should have been used is not.
func (s *x509Source) tellSecond(err error) {
	if err.Error() == s.refused {
		return
	}
	s.refused = err.Error()
	if s.config.VerifyPeer {
		s.log.Warn("set up TLS: " + s.refused + ": verifying clients without GnuTLS: libnbd and qemu cannot connect by TLS 1.3 with certificates for RSA keys")
	} else {
		s.log.Debug("set up TLS: " + s.refused + ": using GnuTLS, which can use them")
	}
}

// gnutls makes credentials of GnuTLS's.
func (s *x509Source) gnutls(id *identity) (shaker, error) {
	if err := s.checkLists(id); err != nil {
		return nil, err
	}
	return newCertificateCredentials(id, s.config)
}

// checkLists refuses lists that no authority has signed. GnuTLS takes them as they are,
// and they would revoke nothing. What Go cannot read or verify is GnuTLS's to refuse.
func (s *x509Source) checkLists(id *identity) error {
	authorities, err := certificates(id.ca)
	if err != nil || id.crl == nil {
		return nil
	}
	if _, err := revocationLists(id.crl, authorities); errors.Is(err, errForeignList) {
		return fmt.Errorf("read %s: %w", filepath.Join(s.config.Certificates, caCRL), err)
	}
	return nil
}

// Object identifiers of keys and curves (RFC 3279, RFC 5480).
var (
	oidDSA    = asn1.ObjectIdentifier{1, 2, 840, 10040, 4, 1}
	oidECDSA  = asn1.ObjectIdentifier{1, 2, 840, 10045, 2, 1}
	oidCurves = []asn1.ObjectIdentifier{
		{1, 3, 132, 0, 33}, {1, 2, 840, 10045, 3, 1, 7}, {1, 3, 132, 0, 34}, {1, 3, 132, 0, 35}, // P-224 to P-521
	}
)

// checkKey refuses a certificate whose key nobody takes without being asked to. GnuTLS
// would load it, and then refuse every client. What cannot be read here is somebody
// else's to refuse.
func checkKey(p pair) error {
	o, err := p.outline()
	if err != nil {
		return nil
	}
	kind := ""
	switch a := o.PublicKey.Algorithm; {
	case a.Algorithm.Equal(oidDSA):
		kind = "a DSA key"
	case a.Algorithm.Equal(oidECDSA):
		var curve asn1.ObjectIdentifier
		_, err := asn1.Unmarshal(a.Parameters.FullBytes, &curve)
		if err != nil || !slices.ContainsFunc(oidCurves, curve.Equal) {
			kind = "a key on another elliptic curve than P-224, P-256, P-384 and P-521"
		}
	}
	if kind == "" {
		return nil
	}
	return fmt.Errorf("read %s: got a certificate for %s, which clients do not take: need an RSA, ECDSA or EdDSA key, "+
		"or with --tls-priority a priority string of GnuTLS's that clients have as well", p.certPath, kind)
}

// outline reads the first certificate.
func (p pair) outline() (*outline, error) {
	var first *outline
	err := eachPEM(p.cert, "CERTIFICATE", func(der []byte) (err error) {
		if first == nil {
			first, err = outlineOf(der)
		}
		return err
	})
	return first, err
}

// warn tells of files that can be used and will disappoint. What cannot be read here
// is somebody else's to refuse.
func (s *x509Source) warn(id *identity) {
	for _, p := range id.pairs {
		o, err := p.outline()
		if err == nil && time.Now().After(o.Validity.NotAfter) {
			s.log.Warn(fmt.Sprintf("read %s: the certificate expired on %v: clients will refuse it", p.certPath, o.Validity.NotAfter))
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
			return nil, p.unusable(err)
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
		if err != nil {
			return err
		}
		list = append(list, c)
		return nil
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

var errForeignList = errors.New("whose signature is by no certificate in")

// revocationLists reads lists in PEM, each signed by one of the authorities.
func revocationLists(text []byte, authorities []*x509.Certificate) (lists crls, err error) {
	err = eachPEM(text, "X509 CRL", func(der []byte) error {
		l, err := x509.ParseRevocationList(der)
		if err != nil {
			return err
		}
		var unknown error
		for _, a := range authorities {
			if string(a.RawSubject) != string(l.RawIssuer) {
				continue
			}
			// Not CheckSignatureFrom: it wants a key usage that certtool
			// does not give an authority by itself.
			err := a.CheckSignature(l.SignatureAlgorithm, l.RawTBSRevocationList, l.Signature)
			if err == nil {
				lists = append(lists, l)
				return nil
			}
			var insecure x509.InsecureAlgorithmError
			if errors.Is(err, x509.ErrUnsupportedAlgorithm) || errors.As(err, &insecure) {
				unknown = err
			}
		}
		if unknown != nil {
			return fmt.Errorf("verify the list of %v: %w", l.Issuer, unknown)
		}
		return fmt.Errorf("got a list of %v, %w %s", l.Issuer, errForeignList, caCert)
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
		var err error
		if c.peer, err = peerOf(certs[0].Raw); err != nil {
			return nil, err
		}
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
