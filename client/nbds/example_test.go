package nbds_test

import (
	"context"
	"fmt"
	"log"
	"net"
	"os"
	"path/filepath"

	"nbdhost/backend"
	"nbdhost/client"
	_ "nbdhost/client/nbds" // for nbds URIs
	"nbdhost/nbdtls"
	"nbdhost/protocol"
	"nbdhost/server"
)

// serveTLS serves a disk in memory of size bytes under TLS with pre-shared keys, and
// returns the directory of its socket and of keys.psk, which has alice's, and what ends
// it.
func serveTLS(size uint64) (dir string, stop func()) {
	dir, err := os.MkdirTemp("", "example")
	if err != nil {
		log.Fatal(err)
	}
	socket, keys := filepath.Join(dir, "socket"), filepath.Join(dir, "keys.psk")
	if err := os.WriteFile(keys, []byte("alice:000102030405060708090a0b0c0d0e0f\n"), 0o600); err != nil {
		log.Fatal(err)
	}
	secure, err := nbdtls.NewServer(nbdtls.Config{PSK: keys})
	if err != nil {
		log.Fatal(err)
	}
	l, err := net.Listen("unix", socket)
	if err != nil {
		log.Fatal(err)
	}
	srv := server.New(server.Options{
		Chain:       backend.NewChain(backend.NewMem(size), nil, backend.Trace{}),
		TLS:         func(nc net.Conn) (server.TLSConn, error) { return secure.Handshake(nc) },
		TLSRequired: true,
	})
	go srv.Serve(l)
	return dir, func() {
		srv.Shutdown()
		srv.Wait()
		os.RemoveAll(dir)
	}
}

// With package nbds imported an nbds URI says all that TLS needs:
// nbds+unix://alice@/?socket=PATH&tls-psk-file=PATH for a pre-shared key, and
// nbds://HOST/?tls-certificates=DIRECTORY for certificates.
func Example() {
	dir, stop := serveTLS(1 << 20)
	defer stop()

	uri := "nbds+unix://alice@/?socket=" + dir + "/socket&tls-psk-file=" + dir + "/keys.psk"
	c, err := client.Dial(context.Background(), uri, nil)
	if err != nil {
		log.Fatal(err)
	}
	if err := c.Pwrite([]byte("secret"), 0, protocol.CmdFlagFUA); err != nil {
		log.Fatal(err)
	}
	p := make([]byte, 6)
	if err := c.Pread(p, 0); err != nil {
		log.Fatal(err)
	}
	fmt.Printf("%s\n", p)
	fmt.Println(c.Disconnect())
	// Output:
	// secret
	// <nil>
}

// TLS through a tunnel, of which a socket is the near end: the URI names the server that
// is to prove itself at the other.
func Example_tunnel() {
	dir, stop := serveTLS(512)
	defer stop()

	c, err := client.Dial(context.Background(), "nbds://alice@disks.example/?tls-psk-file="+dir+"/keys.psk", &client.Options{
		Dial: func(ctx context.Context, _ *protocol.URI) (net.Conn, error) {
			var d net.Dialer
			return d.DialContext(ctx, "unix", dir+"/socket")
		},
	})
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(c.Size())
	fmt.Println(c.Disconnect())
	// Output:
	// 512
	// <nil>
}
