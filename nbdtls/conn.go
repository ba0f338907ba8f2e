package nbdtls

import (
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"net"
)

// A Conn is a connection after a TLS handshake. Deadlines are those of the
// connection below. Close tells the peer, without waiting for it.
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

func peerOf(cert *x509.Certificate) peer {
	return peer{distinguishedName(cert.RawSubject), distinguishedName(cert.RawIssuer)}
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
