package abi

import (
	"bytes"
	"errors"
	"strings"
	"testing"
	"unsafe"
)

// image is a struct nbdkit_plugin of size bytes in memory that is filled with
// guard, so that a copy of too many bytes shows.
const guard = 0xa5

func image(t *testing.T, version int32, size, claimed uint64) []byte {
	t.Helper()
	// 8-byte aligned, with room after it.
	words := make([]uint64, 128)
	mem := unsafe.Slice((*byte)(unsafe.Pointer(&words[0])), len(words)*8)
	for i := range mem {
		mem[i] = guard
	}
	for i := range mem[:size] {
		mem[i] = byte(i%31 + 1)
	}
	*(*uint64)(unsafe.Pointer(&mem[0])) = claimed
	*(*int32)(unsafe.Pointer(&mem[8])) = version
	return mem
}

func raw(p *Plugin) []byte { return unsafe.Slice((*byte)(unsafe.Pointer(p)), unsafe.Sizeof(*p)) }

func TestCopyPlugin(t *testing.T) {
	full := uint64(unsafe.Sizeof(Plugin{}))
	for _, tt := range []struct {
		name    string
		version int32
		size    uint64
		err     error
	}{
		{"exact", 2, full, nil},
		{"exact, version 1", 1, full, nil},
		{"longer", 2, full + 64, nil},
		{"without block_size", 2, full - 8, nil},
		{"ends after zero, version 1", 1, uint64(unsafe.Offsetof(Plugin{}.ErrnoIsPreserved)), nil},
		{"ends within a member", 2, full - 3, nil},
		{"shortest", 1, uint64(minStructSize), nil},
		{"one byte too short", 1, uint64(minStructSize) - 1, ErrStructSize},
		{"empty", 2, 0, ErrStructSize},
		{"longest", 2, maxStructSize, nil},
		{"one byte too long", 2, maxStructSize + 1, ErrStructSize},
		{"all ones", 2, ^uint64(0), ErrStructSize},
		{"version 0", 0, full, ErrAPIVersion},
		{"version 3", 3, full, ErrAPIVersion},
		{"version -1", -1, full, ErrAPIVersion},
	} {
		t.Run(tt.name, func(t *testing.T) {
			mem := image(t, tt.version, min(max(tt.size, 16), 1024), tt.size)
			got, err := CopyPlugin(unsafe.Pointer(&mem[0]))
			if !errors.Is(err, tt.err) {
				t.Fatalf("got error %v, need %v", err, tt.err)
			}
			if err != nil {
				if !bytes.Equal(raw(&got), make([]byte, full)) {
					t.Error("a refused struct was copied")
				}
				return
			}
			n := min(tt.size, full)
			want := append(bytes.Clone(mem[:n]), make([]byte, full-n)...)
			if !bytes.Equal(raw(&got), want) {
				t.Errorf("got % x\nneed % x", raw(&got), want)
			}
		})
	}
	if _, err := CopyPlugin(nil); !errors.Is(err, ErrNoStruct) {
		t.Errorf("NULL: got error %v, need %v", err, ErrNoStruct)
	}
}

func TestCString(t *testing.T) {
	if s := (CString{}); s.String() != "" {
		t.Errorf("NULL: got %q", s)
	}
	for _, want := range []string{"", "x", "memory", strings.Repeat("x", maxString-1)} {
		b := append([]byte(want), 0)
		if s := (CString{&b[0]}); s.String() != want {
			t.Errorf("got %d bytes, need %d", len(s.String()), len(want))
		}
	}
	long := bytes.Repeat([]byte{'x'}, maxString+1)
	if got := len((CString{&long[0]}).String()); got != maxString {
		t.Errorf("without end: got %d bytes, need %d", got, maxString)
	}
}
