package tests

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"nbdhost/client"
	"nbdhost/protocol"
)

// TestSparseReads: without being told to, nbdhost answers long reads that bring zeroes with
// holes, from the plugins of each release. It does not ask for extents: the split plugin crashes
// when it is asked before nbdkit 1.48 (with --sparse-reads=always it is seen to).
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
				of := 100
				if plugin == "memory" {
					of = 200 // there is no data
				}
				if holes != of {
					t.Errorf("%d of %d reads of a hole were answered with one", holes, of)
				}
				s.stop()
			})
		}
	}
}

// TestFalseExtents: extents that are not right, as nbdkit's filters and plugins have them, or a
// crash where they are asked for, do no harm to reads.
func TestFalseExtents(t *testing.T) {
	t.Parallel()
	onlyNbdhost(t)
	const size, long = 64 << 20, 1 << 20
	bad := "# map\n0x0 +\n0x0 0x100000 +\n0x100000 0x100000 -\n0x200000 0x3e00000 +\n"
	for _, tt := range []struct {
		name string
		args []string
		lost uint64 // what cannot be read, if it is not 0
	}{
		{"cache", []string{"--filter=cache", "file", "@image"}, 0},
		{"cache, unsafe", []string{"--filter=cache", "file", "@image", "cache=unsafe"}, 0},
		{"ddrescue", []string{"-r", "--filter=ddrescue", "file", "@image", "ddrescue-mapfile=@map"}, 1 << 20},
		{"memory, zstd", []string{"memory", "64M", "allocator=zstd"}, 0},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			dir := tempDir(t)
			image := filepath.Join(dir, "image")
			writeFile(t, image, "", 0o644)
			if err := os.Truncate(image, size); err != nil {
				t.Fatal(err)
			}
			writeFile(t, filepath.Join(dir, "map"), bad, 0o644)
			var args []string
			for _, arg := range tt.args {
				args = append(args, strings.ReplaceAll(arg, "@", dir+"/"))
			}
			s := start(t, nbdhost, dir, false, args...)
			defer s.stop()
			c, err := client.Dial(t.Context(), s.uri(""), nil)
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			p := make([]byte, long)
			for off := uint64(0); off < size; off += long {
				if off == tt.lost && off > 0 {
					continue
				}
				if err := c.Pread(p, off); err != nil || bytes.ContainsFunc(p, func(r rune) bool { return r != 0 }) {
					t.Fatalf("read at %d: got %v, or data", off, err)
				}
			}
			if tt.lost > 0 {
				if err := c.Pread(p, tt.lost); err == nil {
					t.Error("what cannot be read was read")
				}
				return
			}
			want := bytes.Repeat([]byte("data"), long/4)
			if err := c.Pwrite(want, 0, 0); err != nil {
				t.Fatal(err)
			}
			if err := c.Pread(p, 0); err != nil || !bytes.Equal(p, want) {
				t.Errorf("read what was written: got %v, or other data", err)
			}
		})
	}
}
