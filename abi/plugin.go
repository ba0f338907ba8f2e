package abi

import (
	"errors"
	"fmt"
	"structs"
	"unsafe"
)

// Plugin mirrors struct nbdkit_plugin of nbdkit 1.30 to 1.48, which only ever grew
// at its end. Function pointers are plain addresses, nil where the plugin has
// no such callback; their C types are given beside them, without the handle that
// comes first where there is a connection (from CanWrite on, unless said).
type Plugin struct {
	_ structs.HostLayout

	StructSize  uint64
	APIVersion  int32 // 1 or 2
	ThreadModel int32 // compile-time maximum, NBDKIT_THREAD_MODEL_*

	Name        CString
	LongName    CString
	Version     CString
	Description CString

	Load   unsafe.Pointer // void (void)
	Unload unsafe.Pointer // void (void)

	Config         unsafe.Pointer // int (const char *key, const char *value)
	ConfigComplete unsafe.Pointer // int (void)
	ConfigHelp     CString

	Open  unsafe.Pointer // void *(int readonly), no handle yet
	Close unsafe.Pointer // void (handle)

	GetSize unsafe.Pointer // int64_t (handle), bytes

	CanWrite     unsafe.Pointer // int
	CanFlush     unsafe.Pointer // int
	IsRotational unsafe.Pointer // int
	CanTrim      unsafe.Pointer // int

	// Data callbacks of API version 1, nil in version 2.
	PreadV1  unsafe.Pointer // int (void *buf, uint32_t count, uint64_t offset)
	PwriteV1 unsafe.Pointer // int (const void *buf, uint32_t count, uint64_t offset)
	FlushV1  unsafe.Pointer // int (void)
	TrimV1   unsafe.Pointer // int (uint32_t count, uint64_t offset)
	ZeroV1   unsafe.Pointer // int (uint32_t count, uint64_t offset, int may_trim)

	ErrnoIsPreserved int32 // not 0: errno is the error if nbdkit_set_error was not called
	_                [4]byte

	DumpPlugin unsafe.Pointer // void (void), no handle

	CanZero unsafe.Pointer // int
	CanFUA  unsafe.Pointer // int, NBDKIT_FUA_*

	// Data callbacks of API version 2, nil in version 1.
	Pread  unsafe.Pointer // int (void *buf, uint32_t count, uint64_t offset, uint32_t flags)
	Pwrite unsafe.Pointer // int (const void *buf, uint32_t count, uint64_t offset, uint32_t flags)
	Flush  unsafe.Pointer // int (uint32_t flags)
	Trim   unsafe.Pointer // int (uint32_t count, uint64_t offset, uint32_t flags)
	Zero   unsafe.Pointer // int (uint32_t count, uint64_t offset, uint32_t flags)

	MagicConfigKey CString

	CanMultiConn unsafe.Pointer // int

	CanExtents unsafe.Pointer // int
	Extents    unsafe.Pointer // int (uint32_t count, uint64_t offset, uint32_t flags, struct nbdkit_extents *)
	CanCache   unsafe.Pointer // int, NBDKIT_CACHE_*
	Cache      unsafe.Pointer // int (uint32_t count, uint64_t offset, uint32_t flags)

	GetThreadModel unsafe.Pointer // .thread_model: int (void), no handle

	CanFastZero unsafe.Pointer // int

	Preconnect unsafe.Pointer // int (int readonly), no handle

	GetReady  unsafe.Pointer // int (void), no handle
	AfterFork unsafe.Pointer // int (void), no handle

	ListExports       unsafe.Pointer // int (int readonly, int is_tls, struct nbdkit_exports *), no handle
	DefaultExport     unsafe.Pointer // const char *(int readonly, int is_tls), no handle
	ExportDescription unsafe.Pointer // const char *

	Cleanup unsafe.Pointer // void (void), no handle

	BlockSize unsafe.Pointer // int (uint32_t *minimum, uint32_t *preferred, uint32_t *maximum), bytes
}

// A struct that does not reach beyond its name was never a plugin's, and one
// above 1 MiB is a pointer to something else.
const (
	minStructSize = unsafe.Offsetof(Plugin{}.LongName)
	maxStructSize = 1 << 20
)

// Errors of [CopyPlugin].
var (
	ErrNoStruct   = errors.New("init function returned NULL")
	ErrAPIVersion = errors.New("unknown API version")
	ErrStructSize = errors.New("bad size of struct nbdkit_plugin")
)

// CopyPlugin copies the struct nbdkit_plugin at p, which a plugin's init function
// returned: as many bytes as the plugin has and the server knows; callbacks that
// the plugin is too old to have are nil. p is not kept.
//
// The errors wrap [ErrNoStruct], [ErrAPIVersion] and [ErrStructSize].
func CopyPlugin(p unsafe.Pointer) (Plugin, error) {
	if p == nil {
		return Plugin{}, fmt.Errorf("copy plugin: %w", ErrNoStruct)
	}
	size := *(*uint64)(p)
	version := *(*int32)(unsafe.Add(p, unsafe.Offsetof(Plugin{}.APIVersion)))
	if version != 1 && version != 2 {
		return Plugin{}, fmt.Errorf("copy plugin: %w: got %d, need 1 or 2: rebuild the plugin", ErrAPIVersion, version)
	}
	if size < uint64(minStructSize) || size > maxStructSize {
		return Plugin{}, fmt.Errorf("copy plugin: %w: got %d bytes, need %d to %d: rebuild the plugin", ErrStructSize, size, minStructSize, maxStructSize)
	}
	var pl Plugin
	n := min(size, uint64(unsafe.Sizeof(pl)))
	copy(unsafe.Slice((*byte)(unsafe.Pointer(&pl)), n), unsafe.Slice((*byte)(p), n))
	return pl, nil
}

// maxString bounds [CString.String]: texts in a module's struct are written by
// its author, and none comes near it.
const maxString = 1 << 20

// CString is a pointer to a C string that the module owns.
type CString struct{ p *byte }

// String copies the string, cut at 1 MiB. NULL gives "".
func (s CString) String() string {
	if s.p == nil {
		return ""
	}
	n := 0
	for n < maxString && *(*byte)(unsafe.Add(unsafe.Pointer(s.p), n)) != 0 {
		n++
	}
	return string(unsafe.Slice(s.p, n))
}
