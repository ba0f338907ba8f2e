package server_test

import (
	"context"
	"fmt"
	"log"
	"net"
	"os"
	"path/filepath"

	"nbdhost/backend"
	"nbdhost/client"
	"nbdhost/server"
)

// A pattern is a disk whose contents are computed: each block of 512 bytes begins with its number.
// What it does not say itself is Mem's.
type pattern struct{ *backend.Mem }

func (pattern) Name() string { return "pattern" }

// What a module does not have is never called: there is no Pwrite here, and clients are told so.
func (pattern) Has(cb backend.Callback) bool {
	return cb == backend.Open || cb == backend.Close || cb == backend.GetSize || cb == backend.Pread
}

func (p pattern) Open(c *backend.Call, readonly bool, export string) (backend.Handle, error) {
	h, err := p.Mem.Open(c, readonly, export)
	return patternHandle{h}, err
}

type patternHandle struct{ backend.Handle }

func (patternHandle) Pread(c *backend.Call, p []byte, off uint64) error {
	for i := range p {
		p[i] = 0
		if at := off + uint64(i); at%512 == 0 {
			p[i] = byte(at / 512)
		}
	}
	return nil
}

// A program serves a disk of its own.
func Example() {
	dir, err := os.MkdirTemp("", "")
	if err != nil {
		log.Fatal(err)
	}
	defer os.RemoveAll(dir)
	socket := filepath.Join(dir, "nbd.sock")
	l, err := net.Listen("unix", socket)
	if err != nil {
		log.Fatal(err)
	}
	chain := backend.NewChain(pattern{backend.NewMem(1 << 20)}, nil, backend.Trace{})
	s := server.New(server.Options{Chain: chain})
	go s.Serve(l)

	c, err := client.Dial(context.Background(), "nbd+unix:///?socket="+socket, nil)
	if err != nil {
		log.Fatal(err)
	}
	block := make([]byte, 512)
	if err := c.Pread(block, 7*512); err != nil {
		log.Fatal(err)
	}
	fmt.Println(block[:4])
	fmt.Println(c.Pwrite(block, 0, 0))
	c.Close()

	s.Shutdown() // no connection is accepted any more
	if !s.Wait() {
		log.Fatal("a call has not come back") // chain must not be touched
	}
	chain.Cleanup()
	chain.Unload()
	// Output:
	// [7 0 0 0]
	// NBD_CMD_WRITE: server replied NBD_EPERM: the export is read-only
}
