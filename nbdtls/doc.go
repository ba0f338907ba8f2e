// Package nbdtls secures NBD connections with TLS: X.509 certificates by
// crypto/tls, or by the system's GnuTLS, as pre-shared keys and priority strings are.
// There is no cryptography in it.
//
// # Which library
//
// crypto/tls knows neither pre-shared keys nor GnuTLS's priority strings, nor RSA-PSS
// and Ed448 keys, and as a server that verifies clients it gets no certificate from
// GnuTLS's clients with RSA keys by TLS 1.3. In these cases libgnutls.so.30 is loaded,
// then and not before. It has to be there, except that clients are verified by
// crypto/tls then, and a line in the log says who cannot connect. Both give a [Conn].
//
// # Life cycle
//
// [NewServer] reads the files that a [Config] names. [Server.Handshake] secures one
// connection, and reads the files again first if they have changed since: new
// connections use the new ones, and running ones go on. Files that cannot be used
// leave the old ones in use, and a line in the log says why. [Client] is the other
// side.
//
// # Goroutines
//
// A Server is for any number of goroutines at a time, a Conn for one that reads and
// one that writes. GnuTLS works on the connection's own descriptor. As long as that does
// not block a goroutine that has to wait is parked by Go's poller and holds no thread;
// Conn.Move may give it one that blocks.
// GnuTLS calls back into Go once in a handshake, for a user's key.
//
// # Memory
//
// A session of GnuTLS's is freed by Conn.Close, credentials once no session uses
// them any more. Keys are in Go's memory as long as they are in use.
package nbdtls
