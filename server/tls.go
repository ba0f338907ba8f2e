package server

import (
	"errors"
	"fmt"
	"net"

	"golang.org/x/sys/unix"

	"nbdhost/protocol"
)

// A TLSConn is a connection after a TLS handshake. Deadlines are those of the
// connection below, and Close closes that as well.
type TLSConn interface {
	net.Conn
	// TryRead reads what is there without waiting, as much as p takes, and fails
	// with syscall.EAGAIN where nothing is. It is called within
	// syscall.RawConn.Read of the connection below, with the descriptor.
	TryRead(fd uintptr, p []byte) (int, error)
	// Move makes nc the connection below: the same socket, with another
	// descriptor. Nobody reads or writes meanwhile.
	Move(nc net.Conn) error
	// Peer is the distinguished names (RFC 4514) of the client's certificate
	// and of its issuer, or empty.
	Peer() (subject, issuer string)
	// Description is the protocol and the algorithms in use, for a log.
	Description() string
}

// stream is what the client's bytes come from and the server's go to.
func (c *conn) stream() net.Conn {
	if c.secure != nil {
		return c.secure
	}
	return c.sock.nc
}

// close ends the connection; nothing is read or written any more.
func (c *conn) close() {
	if c.secure != nil {
		c.sock.unblock()     // the end is told where that needs no waiting
		_ = c.secure.Close() // an error means it is closed already
	}
	if c.sock.hot() {
		c.s.hot.Add(-1)
	}
	c.sock.close()
}

// plain tells whether an option must be refused because there is no TLS yet.
func (n *negotiation) plain(opt protocol.Option) bool {
	return n.c.s.opts.TLSRequired && n.c.secure == nil && opt != protocol.OptStartTLS && opt != protocol.OptAbort
}

// startTLS is NBD_OPT_STARTTLS. The error of a handshake that failed ends the
// connection.
func (n *negotiation) startTLS(opt protocol.Option) error {
	c := n.c
	switch {
	case c.secure != nil:
		n.refuse(opt, protocol.RepErrInvalid, "TLS has been negotiated already")
		return nil
	case c.s.opts.TLS == nil:
		n.refuse(opt, protocol.RepErrPolicy, "TLS is switched off")
		return nil
	}
	n.accept(opt)
	if err := n.write(n.reply); err != nil {
		return err
	}
	n.reply = n.reply[:0]
	// The client has to wait for the reply. What is in hand may have been put
	// there by somebody between the two, and must never be taken for what the
	// client says under TLS.
	if rest := len(n.in.unread()); rest > 0 {
		return fmt.Errorf("%v: got %d bytes behind it in plain text, need none: somebody may have put them there", opt, rest)
	}
	n.in.release()
	secure, err := c.s.opts.TLS(c.sock.nc)
	if err != nil {
		if !c.s.quitting() {
			c.log.Error(err.Error())
		}
		c.refusal = ReasonTLS
		c.s.tlsFailures.Add(1)
		return err
	}
	n.forget()
	c.secure = secure
	c.refusal = ReasonClient
	n.in.init(c)
	c.peer.TLS = true
	c.peer.TLSDN, c.peer.TLSIssuerDN = secure.Peer()
	c.call.Debugf("%s; client %q, issued by %q", secure.Description(), c.peer.TLSDN, c.peer.TLSIssuerDN)
	return nil
}

var errPlain = errors.New("negotiate TLS first: this server demands it")

// decryptSize is how much is decrypted before it is looked at, unless one request
// needs more: what is more would leave the processor's cache.
const decryptSize = 64 << 10

// decrypt receives what is there under TLS.
func (in *input) decrypt(fd uintptr) (int, error) {
	p := in.window()
	p = p[:min(len(p), max(decryptSize, in.room-(in.end-in.start)))]
	n, err := in.secure.TryRead(fd, p)
	in.c.full = n == len(p)
	return n, err
}

// receiveOnce receives once without waiting; 0 bytes are the end.
func (in *input) receiveOnce(fd uintptr) (int, error) {
	if in.secure == nil {
		return unix.Read(int(fd), in.window())
	}
	return in.decrypt(fd)
}
