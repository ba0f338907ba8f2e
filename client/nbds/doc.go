// Package nbds has package client connect to nbds URIs with package nbdtls, which
// reads a URI's tls-certificates, tls-psk-file and the others. A program imports it
// for that effect only:
//
//	import _ "nbdhost/client/nbds"
//
// Over a connection from client.Options.Dial that is no socket, certificates do, but
// pre-shared keys fail: GnuTLS needs the descriptor.
//
// It has no functions, and no goroutines. Without it package client comes without
// GnuTLS, and nbds URIs need client.Options.TLS.
package nbds

import (
	"nbdhost/client"
	"nbdhost/nbdtls"
)

func init() { client.RegisterTLS(nbdtls.Client) }
