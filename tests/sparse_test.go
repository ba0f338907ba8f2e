package tests

import (
	"bytes"
	"path/filepath"
	"testing"

	"nbdhost/client"
	"nbdhost/protocol"
)

// TestSparseReads: without being told to, nbdhost answers long reads of holes with
// holes once it has seen that it pays, from the plugins and the split plugin of each
// release. The latter crashes when it is asked for such extents before nbdkit 1.48
// (with --sparse-reads=always it is seen to), and serves all the same.
func TestSparseReads(t *testing.T) {
	t.Parallel()
	onlyNbdhost(t)
	for _, r := range releases(t) {
		for _, plugin := range []string{"file", "split", "memory"} {
			t.Run(r.name+"/"+plugin, func(t *testing.T) {
				t.Parallel()
				dir := tempDir(t)
				image := filepath.Join(dir, "image")
				sparse(t, image, 24<<20)
				args := []string{plugin, image}
				switch plugin {
				case "split":
					args = append(args, image)
				case "memory":
					args[1] = "48M"
				}
				s := start(t, r.nbdhost, dir, false, args...)
				c, err := client.Dial(t.Context(), s.uri(""), nil)
				if err != nil {
					t.Fatal(err)
				}
				defer c.Close()
				holes := 0
				p, want := make([]byte, 4<<20), map[uint64][]byte{2 << 20: make([]byte, 4<<20)}
				for i := range 200 {
					off := uint64(i%2) * 2 << 20 // data, a hole, data, ...
					clear(p)
					p[9] = 1
					err := c.With(t.Context()).PreadStructured(p, off, 0, func(chunk client.Chunk) error {
						if chunk.Type == protocol.ReplyOffsetHole {
							holes++
						}
						return nil
					})
					if want[off] == nil {
						want[off] = bytes.Clone(p)
					}
					if err != nil || !bytes.Equal(p, want[off]) {
						t.Fatalf("read at %d: got %v, or other data than before", off, err)
					}
				}
				if faulty := plugin == "split" && r.name != "sid"; faulty != (holes == 0) {
					t.Errorf("%d of 100 reads of a hole were answered with one", holes)
				}
				s.stop()
			})
		}
	}
}
