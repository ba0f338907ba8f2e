package nbdtls

import (
	"crypto/x509/pkix"
	"encoding/asn1"
	"fmt"
	"math/big"
	"net"
	"time"
)

// A Conn is a connection after a TLS handshake. Deadlines are those of the
// connection below. Close tells the peer, for which it may
// wait some seconds where that does not read.
type Conn interface {
	net.Conn

	// TryRead reads what is there without waiting, as many records as p takes,
	// and fails with syscall.EAGAIN where nothing is: then more must arrive on the
	// connection below first. After anything else it has to be called again
	// before that is waited for. It is for the function that syscall.RawConn.Read of that
	// connection calls, with the descriptor that this gets.
	TryRead(fd uintptr, p []byte) (int, error)

	// Move makes nc the connection below: the same socket, perhaps with another
	// descriptor, and perhaps one on which TryRead waits for the first byte.
	// Nobody reads or writes meanwhile. After an error only Close is left.
	Move(nc net.Conn) error

	// Peer is the distinguished names (RFC 4514) of the peer's certificate and
	// of who issued it; both are empty where it showed none.
	Peer() (subject, issuer string)

	// Description is the protocol and the algorithms in use, for a log.
	Description() string
}

// A peer is who is at the other end.
type peer struct{ subject, issuer string }

func (p peer) Peer() (subject, issuer string) { return p.subject, p.issuer }

func peerOf(der []byte) (peer, error) {
	o, err := outlineOf(der)
	if err != nil {
		return peer{}, fmt.Errorf("read the peer's certificate: %w", err)
	}
	return peer{distinguishedName(o.Subject.FullBytes), distinguishedName(o.Issuer.FullBytes)}, nil
}

// An outline is what a certificate says of itself (RFC 5280, 4.1). crypto/x509 refuses
// certificates with keys of some kinds that GnuTLS knows; this reads them as well.
type outline struct {
	Version      int `asn1:"optional,explicit,default:0,tag:0"`
	SerialNumber *big.Int
	Signature    asn1.RawValue
	Issuer       asn1.RawValue
	Validity     struct{ NotBefore, NotAfter time.Time }
	Subject      asn1.RawValue
	PublicKey    struct {
		Algorithm pkix.AlgorithmIdentifier
		Key       asn1.BitString
	}
	// Extensions are not looked at.
}

// outlineOf reads a certificate in DER. It verifies nothing.
func outlineOf(der []byte) (*outline, error) {
	var cert struct {
		TBS       outline
		Algorithm asn1.RawValue
		Signature asn1.BitString
	}
	if _, err := asn1.Unmarshal(der, &cert); err != nil {
		return nil, err
	}
	return &cert.TBS, nil
}

// distinguishedName writes a name as RFC 4514 does. It goes by the raw name,
// since pkix.Name forgets the order.
func distinguishedName(raw []byte) string {
	var rdn pkix.RDNSequence
	if _, err := asn1.Unmarshal(raw, &rdn); err != nil {
		return ""
	}
	return rdn.String()
}
