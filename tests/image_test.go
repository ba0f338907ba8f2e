package tests

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"
)

// images are made once and only read.
type images struct {
	tree   string // a directory with files
	ext4   string // a file system with that tree in it
	qcow2  string // the same image in another format
	sparse string // a file with holes, which ends amid a hole
}

const (
	ext4Size   = 24 << 20
	sparseSize = 40<<20 + 512
)

var makeImages = sync.OnceValues(func() (*images, error) {
	dir := filepath.Join(scratch, "images")
	m := &images{
		tree:   filepath.Join(dir, "tree"),
		ext4:   filepath.Join(dir, "ext4"),
		qcow2:  filepath.Join(dir, "qcow2"),
		sparse: filepath.Join(dir, "sparse"),
	}
	if err := makeTree(m.tree); err != nil {
		return nil, err
	}
	return m, makeSparse(m.sparse)
})

func testImages(t testing.TB) *images {
	t.Helper()
	m, err := makeImages()
	if err != nil {
		t.Fatal(err)
	}
	makeFormats(t, m)
	return m
}

var formats sync.Mutex

// makeFormats makes the images that a tool makes, unless they are there.
func makeFormats(t testing.TB, m *images) {
	t.Helper()
	formats.Lock()
	defer formats.Unlock()
	if _, err := os.Stat(m.qcow2); err == nil {
		return
	}
	// The copy has data and holes. What mkfs has allocated and not written is either, by what
	// of it the kernel has read ahead.
	raw := m.ext4 + ".mkfs"
	command(t, "mkfs.ext4", "-q", "-F", "-d", m.tree, raw, fmt.Sprint(ext4Size>>10)+"k")
	command(t, "cp", "--sparse=always", raw, m.ext4)
	if err := os.Remove(raw); err != nil {
		t.Fatal(err)
	}
	command(t, "qemu-img", "convert", "-f", "raw", "-O", "qcow2", m.ext4, m.qcow2)
}

// makeTree makes a few files, none of which is all zeroes, with a fixed time so
// that plugins that make file systems of them make the same one twice.
func makeTree(dir string) error {
	random := rand.New(rand.NewPCG(1, 2))
	for name, size := range map[string]int{
		"empty": 0, "small.txt": 77, "sub/one.bin": 4096, "sub/deep/two.bin": 1<<20 + 1, "three.bin": 3 << 20,
	} {
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			return err
		}
		b := make([]byte, size)
		for i := range b {
			b[i] = byte(random.Uint32())
		}
		if err := os.WriteFile(path, b, 0o644); err != nil {
			return err
		}
	}
	then := time.Unix(1_000_000_000, 0)
	return filepath.Walk(dir, func(path string, _ os.FileInfo, err error) error {
		if err != nil {
			return err
		}
		return os.Chtimes(path, then, then)
	})
}

func makeSparse(path string) error {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	defer f.Close()
	for i, at := range []int64{0, 1 << 20, 17<<20 + 4096, 39 << 20} {
		if _, err := f.WriteAt(bytes.Repeat([]byte{byte(i + 1)}, 200_000), at); err != nil {
			return err
		}
	}
	return f.Truncate(sparseSize)
}
