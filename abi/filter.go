package abi

import (
	"errors"
	"fmt"
	"strconv"
	"strings"
	"unsafe"
)

// FilterAPIVersion is the _api_version of every filter since nbdkit 1.16.
const FilterAPIVersion = 6

// A Release is a stable release of nbdkit: the second number of its version, 32
// for nbdkit 1.32.5. Development releases have odd numbers.
type Release int

// The releases whose filters are known. Their layout has changed at 1.30, 1.36 and,
// in the parameters of .thread_model alone, at 1.44.
const (
	OldestFilter Release = 26
	NewestFilter Release = 48

	sinceBlockSize  Release = 30 // .block_size, in struct nbdkit_next_ops too
	sinceDumpPlugin Release = 36
	sinceExtents64  Release = 44 // the count of nbdkit_extents_aligned has 64 bits
)

func (r Release) String() string { return "1." + strconv.Itoa(int(r)) }

// NextHasBlockSize tells whether struct nbdkit_next_ops has .block_size.
func (r Release) NextHasBlockSize() bool { return r >= sinceBlockSize }

// Extents64 tells whether the count of nbdkit_extents_aligned(3) has 64 bits.
func (r Release) Extents64() bool { return r >= sinceExtents64 }

// Filter is what struct nbdkit_filter holds, whatever its layout. Function pointers
// are plain addresses, nil where the filter has no such callback; their C types
// are given beside them. Where a handle comes first it is preceded by a pointer to
// struct nbdkit_next_ops, except in Close.
type Filter struct {
	Release Release // whose layout it has
	Version string  // of nbdkit, for which it was built

	Name        CString
	LongName    CString
	Description CString

	Load   unsafe.Pointer // void (void)
	Unload unsafe.Pointer // void (void)

	Config         unsafe.Pointer // int (next, backend, const char *key, const char *value)
	ConfigComplete unsafe.Pointer // int (next, backend)
	ConfigHelp     CString

	GetThreadModel unsafe.Pointer // .thread_model: int (int next_thread_model); before 1.44 (void)
	DumpPlugin     unsafe.Pointer // void (void)
	GetReady       unsafe.Pointer // int (int thread_model)
	AfterFork      unsafe.Pointer // int (backend)
	Cleanup        unsafe.Pointer // void (backend)

	Preconnect    unsafe.Pointer // int (next, backend, int readonly)
	ListExports   unsafe.Pointer // int (next, backend, int readonly, int is_tls, struct nbdkit_exports *)
	DefaultExport unsafe.Pointer // const char *(next, backend, int readonly, int is_tls)

	Open  unsafe.Pointer // void *(next, context, int readonly, const char *exportname, int is_tls)
	Close unsafe.Pointer // void (handle)

	Prepare  unsafe.Pointer // int (handle, int readonly)
	Finalize unsafe.Pointer // int (handle)

	GetSize           unsafe.Pointer // int64_t (handle), bytes
	ExportDescription unsafe.Pointer // const char *(handle)
	BlockSize         unsafe.Pointer // int (handle, uint32_t *minimum, uint32_t *preferred, uint32_t *maximum), bytes

	CanWrite     unsafe.Pointer // int (handle), and so on
	CanFlush     unsafe.Pointer
	IsRotational unsafe.Pointer
	CanTrim      unsafe.Pointer
	CanZero      unsafe.Pointer // one of NBDKIT_ZERO_NONE, _EMULATE and _NATIVE
	CanFastZero  unsafe.Pointer
	CanExtents   unsafe.Pointer
	CanFUA       unsafe.Pointer // one of NBDKIT_FUA_NONE, _EMULATE and _NATIVE
	CanMultiConn unsafe.Pointer
	CanCache     unsafe.Pointer // one of NBDKIT_CACHE_NONE, _EMULATE and _NATIVE

	Pread   unsafe.Pointer // int (handle, void *buf, uint32_t count, uint64_t offset, uint32_t flags, int *err)
	Pwrite  unsafe.Pointer // int (handle, const void *buf, uint32_t count, uint64_t offset, uint32_t flags, int *err)
	Flush   unsafe.Pointer // int (handle, uint32_t flags, int *err)
	Trim    unsafe.Pointer // int (handle, uint32_t count, uint64_t offset, uint32_t flags, int *err)
	Zero    unsafe.Pointer // as Trim
	Extents unsafe.Pointer // int (handle, uint32_t count, uint64_t offset, uint32_t flags, struct nbdkit_extents *, int *err)
	Cache   unsafe.Pointer // as Trim
}

// A filterMember is a pointer in struct nbdkit_filter.
type filterMember struct {
	name  string  // in C
	since Release // 0: in all layouts
	in    func(*Filter) *unsafe.Pointer
}

func text(s *CString) *unsafe.Pointer { return (*unsafe.Pointer)(unsafe.Pointer(s)) }

// filterMembers are the members that follow _api_version and _version, in their
// order. They are all pointers, so their offsets follow from it.
var filterMembers = []filterMember{
	{"name", 0, func(f *Filter) *unsafe.Pointer { return text(&f.Name) }},
	{"longname", 0, func(f *Filter) *unsafe.Pointer { return text(&f.LongName) }},
	{"description", 0, func(f *Filter) *unsafe.Pointer { return text(&f.Description) }},
	{"load", 0, func(f *Filter) *unsafe.Pointer { return &f.Load }},
	{"unload", 0, func(f *Filter) *unsafe.Pointer { return &f.Unload }},
	{"config", 0, func(f *Filter) *unsafe.Pointer { return &f.Config }},
	{"config_complete", 0, func(f *Filter) *unsafe.Pointer { return &f.ConfigComplete }},
	{"config_help", 0, func(f *Filter) *unsafe.Pointer { return text(&f.ConfigHelp) }},
	{"thread_model", 0, func(f *Filter) *unsafe.Pointer { return &f.GetThreadModel }},
	{"dump_plugin", sinceDumpPlugin, func(f *Filter) *unsafe.Pointer { return &f.DumpPlugin }},
	{"get_ready", 0, func(f *Filter) *unsafe.Pointer { return &f.GetReady }},
	{"after_fork", 0, func(f *Filter) *unsafe.Pointer { return &f.AfterFork }},
	{"cleanup", 0, func(f *Filter) *unsafe.Pointer { return &f.Cleanup }},
	{"preconnect", 0, func(f *Filter) *unsafe.Pointer { return &f.Preconnect }},
	{"list_exports", 0, func(f *Filter) *unsafe.Pointer { return &f.ListExports }},
	{"default_export", 0, func(f *Filter) *unsafe.Pointer { return &f.DefaultExport }},
	{"open", 0, func(f *Filter) *unsafe.Pointer { return &f.Open }},
	{"close", 0, func(f *Filter) *unsafe.Pointer { return &f.Close }},
	{"prepare", 0, func(f *Filter) *unsafe.Pointer { return &f.Prepare }},
	{"finalize", 0, func(f *Filter) *unsafe.Pointer { return &f.Finalize }},
	{"get_size", 0, func(f *Filter) *unsafe.Pointer { return &f.GetSize }},
	{"export_description", 0, func(f *Filter) *unsafe.Pointer { return &f.ExportDescription }},
	{"block_size", sinceBlockSize, func(f *Filter) *unsafe.Pointer { return &f.BlockSize }},
	{"can_write", 0, func(f *Filter) *unsafe.Pointer { return &f.CanWrite }},
	{"can_flush", 0, func(f *Filter) *unsafe.Pointer { return &f.CanFlush }},
	{"is_rotational", 0, func(f *Filter) *unsafe.Pointer { return &f.IsRotational }},
	{"can_trim", 0, func(f *Filter) *unsafe.Pointer { return &f.CanTrim }},
	{"can_zero", 0, func(f *Filter) *unsafe.Pointer { return &f.CanZero }},
	{"can_fast_zero", 0, func(f *Filter) *unsafe.Pointer { return &f.CanFastZero }},
	{"can_extents", 0, func(f *Filter) *unsafe.Pointer { return &f.CanExtents }},
	{"can_fua", 0, func(f *Filter) *unsafe.Pointer { return &f.CanFUA }},
	{"can_multi_conn", 0, func(f *Filter) *unsafe.Pointer { return &f.CanMultiConn }},
	{"can_cache", 0, func(f *Filter) *unsafe.Pointer { return &f.CanCache }},
	{"pread", 0, func(f *Filter) *unsafe.Pointer { return &f.Pread }},
	{"pwrite", 0, func(f *Filter) *unsafe.Pointer { return &f.Pwrite }},
	{"flush", 0, func(f *Filter) *unsafe.Pointer { return &f.Flush }},
	{"trim", 0, func(f *Filter) *unsafe.Pointer { return &f.Trim }},
	{"zero", 0, func(f *Filter) *unsafe.Pointer { return &f.Zero }},
	{"extents", 0, func(f *Filter) *unsafe.Pointer { return &f.Extents }},
	{"cache", 0, func(f *Filter) *unsafe.Pointer { return &f.Cache }},
}

const (
	pointerSize = unsafe.Sizeof(uintptr(0))
	// _api_version, which is an int, is followed by padding, then by _version.
	filterVersionOffset = pointerSize
	filterMembersOffset = 2 * pointerSize
)

// ErrFilterRelease is a filter built for a release of nbdkit that is not known.
var ErrFilterRelease = errors.New("unknown filter release")

// CopyFilter copies the struct nbdkit_filter at p, which a filter's init function
// returned, as the release says that it was built for. p is not kept.
//
// A filter of a later release than [NewestFilter] is refused unless anyRelease is
// set: then it is read as if it were of that one, which is at the user's own risk.
//
// The errors wrap [ErrNoStruct], [ErrAPIVersion] and [ErrFilterRelease].
func CopyFilter(p unsafe.Pointer, anyRelease bool) (Filter, error) {
	if p == nil {
		return Filter{}, fmt.Errorf("copy filter: %w", ErrNoStruct)
	}
	if version := *(*int32)(p); version != FilterAPIVersion {
		return Filter{}, fmt.Errorf("copy filter: %w: got %d, need %d: use a filter of nbdkit %v to %v",
			ErrAPIVersion, version, FilterAPIVersion, OldestFilter, NewestFilter)
	}
	f := Filter{Version: (*(*CString)(unsafe.Add(p, filterVersionOffset))).String()}
	release, err := ParseRelease(f.Version)
	if err == nil && release > NewestFilter && anyRelease {
		release = NewestFilter
	}
	switch {
	case err != nil:
	case release > NewestFilter:
		err = errors.New("use a newer nbdhost, or try it at your own risk with --filter-any-release")
	case release < OldestFilter:
		err = errors.New("its callbacks have another form: rebuild the filter for a release that works")
	case release%2 != 0:
		err = errors.New("this is a development release: rebuild the filter for a stable one")
	}
	if err != nil {
		return Filter{}, fmt.Errorf("copy filter: %w: built for nbdkit %s, need %v to %v: %w",
			ErrFilterRelease, f.Version, OldestFilter, NewestFilter, err)
	}
	f.Release = release
	at := unsafe.Add(p, filterMembersOffset)
	for _, m := range filterMembers {
		if release >= m.since {
			*m.in(&f) = *(*unsafe.Pointer)(at)
			at = unsafe.Add(at, pointerSize)
		}
	}
	return f, nil
}

// ParseRelease reads a version of nbdkit's such as 1.32.5 or 1.48.1-2.fc43.
func ParseRelease(version string) (Release, error) {
	major, rest, _ := strings.Cut(version, ".")
	minor, _, _ := strings.Cut(rest, ".")
	n, err := strconv.ParseUint(minor, 10, 16)
	if major != "1" || err != nil {
		return 0, fmt.Errorf("got the version %q, which is none of nbdkit's", version)
	}
	return Release(n), nil
}
