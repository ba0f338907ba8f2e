package cshim_test

import (
	"syscall"
	"testing"
	"unsafe"

	"github.com/ebitengine/purego"
)

// A module's mutexes are adaptive, unless it says itself which they are to be.
func TestMutex(t *testing.T) {
	const normal, recursive, adaptive = 0, 1, 3 // glibc's
	fn := open(compile(t, "mutex"))("mutex_try")
	for _, tt := range []struct {
		name          string
		withAttr, typ int
		kind          int32
		tried         syscall.Errno
	}{
		{"no attributes", 0, normal, adaptive, syscall.EBUSY},
		{"normal", 1, normal, normal, syscall.EBUSY},
		{"recursive", 1, recursive, recursive, 0},
	} {
		var kind int32
		r, _, _ := purego.SyscallN(uintptr(fn), uintptr(tt.withAttr), uintptr(tt.typ), uintptr(unsafe.Pointer(&kind)))
		if int32(r) != int32(tt.tried) || kind&0x7f != tt.kind {
			t.Errorf("%s: got %d of kind %d, need %d of kind %d", tt.name, int32(r), kind, tt.tried, tt.kind)
		}
	}
}
