package server

import (
	"bytes"
	"fmt"
	"testing"

	"nbdhost/backend"
	"nbdhost/client"
)

// A lazy backend leaves what is read from the second half of the disk as it is in memory, and says
// that it has been read.
type lazy struct{ *hooked }

const lazyFrom = 1 << 29

func (l lazy) Open(c *backend.Call, readonly bool, export string) (backend.Handle, error) {
	h, err := l.hooked.Open(c, readonly, export)
	return lazyHandle{h}, err
}

type lazyHandle struct{ backend.Handle }

func (h lazyHandle) Pread(c *backend.Call, p []byte, off uint64) error {
	if off >= lazyFrom {
		return nil
	}
	return h.Handle.Pread(c, p, off)
}

// What a module leaves of a client's memory as it is are zeroes, or what was that client's own: never
// what was read or written by another one.
func TestForeignBytes(t *testing.T) {
	const mark = 0xa5 // which no header has
	secret := bytes.Repeat([]byte{mark}, 1<<20)
	for _, size := range []int{1, 512, 4096, maxBurstLength, 64 << 10, 256 << 10, 1 << 20} {
		for _, threads := range []int{1, 16} {
			t.Run(fmt.Sprintf("%d bytes, %d threads", size, threads), func(t *testing.T) {
				h := newHooked()
				_, uri, _ := serveBackend(t, lazy{h}, h, Options{Threads: threads})
				for range 8 {
					owner, other := dial(t, uri, nil), dial(t, uri, nil)
					p := make([]byte, size)
					for range 2 {
						if err := owner.Pwrite(secret[:size], 0, 0); err != nil {
							t.Fatal(err)
						}
						if err := owner.Pread(p, 0); err != nil || !bytes.Equal(p, secret[:size]) {
							t.Fatalf("got %v, or other bytes", err)
						}
						for _, c := range []*client.Conn{other, dial(t, uri, nil)} {
							if err := c.Pread(p, lazyFrom); err != nil || bytes.IndexByte(p, mark) >= 0 {
								t.Fatalf("another client: got %v, or bytes of the first", err)
							}
						}
					}
					for range 8 { // what was for other's replies may be for owner's requests meanwhile
						if err := owner.Pwrite(secret[:size], 0, 0); err != nil {
							t.Fatal(err)
						}
						if err := other.Pread(p, lazyFrom); err != nil || bytes.IndexByte(p, mark) >= 0 {
							t.Fatalf("another client: got %v, or bytes of the first", err)
						}
					}
					owner.Close()
					if err := other.Pread(p, lazyFrom); err != nil || bytes.IndexByte(p, mark) >= 0 {
						t.Fatalf("when the first is gone: got %v, or bytes of the first", err)
					}
				}
			})
		}
	}
}
