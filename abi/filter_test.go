package abi

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"strings"
	"testing"
	"unsafe"
)

// headerRelease returns the release that headers belong to.
func headerRelease(t *testing.T, dir string) Release {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(dir, "nbdkit-version.h"))
	if err != nil {
		t.Fatal(err)
	}
	m := regexp.MustCompile(`NBDKIT_VERSION_STRING\s+"([^"]*)"`).FindSubmatch(text)
	if m == nil {
		t.Fatalf("%s: no version", dir)
	}
	r, err := ParseRelease(string(m[1]))
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func TestFilterLayout(t *testing.T) {
	for _, dir := range includeDirs(t) {
		release := headerRelease(t, dir)
		t.Run(release.String(), func(t *testing.T) {
			flags := []string{"-DFILTER"}
			if release >= sinceDumpPlugin {
				flags = append(flags, "-DDUMP_PLUGIN")
			}
			c := layout(t, dir, flags...)
			offset := filterMembersOffset
			check := func(name string, offset, size uintptr) {
				want := c[name]
				if got := []string{fmt.Sprint(offset), fmt.Sprint(size)}; !reflect.DeepEqual(got, want) {
					t.Errorf("%s: got offset and size %v, need %v", name, got, want)
				}
			}
			check("_api_version", 0, 4)
			check("_version", filterVersionOffset, pointerSize)
			for _, m := range filterMembers {
				if release >= m.since {
					check(m.name, offset, pointerSize)
					offset += pointerSize
				}
			}
			check("sizeof", offset, 0)
		})
	}
}

// filterImage is a struct nbdkit_filter whose i-th pointer is to words[i], followed
// by a word that must not be read.
type filterImage struct {
	words [60]unsafe.Pointer
	text  []byte
	marks [60]byte
}

func newFilterImage(api int32, version string) *filterImage {
	i := &filterImage{text: append([]byte(version), 0)}
	*(*int32)(unsafe.Pointer(&i.words[0])) = api
	i.words[1] = unsafe.Pointer(&i.text[0])
	for n := 2; n < len(i.words); n++ {
		i.words[n] = unsafe.Pointer(&i.marks[n])
	}
	return i
}

func (i *filterImage) index(p unsafe.Pointer) int {
	return int(uintptr(p) - uintptr(unsafe.Pointer(&i.marks[0]))) // 0 for no mark: wraps far away
}

// Each layout family puts the callbacks where its release had them.
func TestCopyFilter(t *testing.T) {
	for _, tt := range []struct {
		version                              string
		release                              Release
		dumpPlugin, getReady, blockSize, can int
	}{
		{"1.26.0", 26, 0, 11, 0, 23},
		{"1.28.4", 28, 0, 11, 0, 23},
		{"1.30.1", 30, 0, 11, 23, 24},
		{"1.32.5", 32, 0, 11, 23, 24},
		{"1.34.9", 34, 0, 11, 23, 24},
		{"1.36.3-1.el9", 36, 11, 12, 24, 25},
		{"1.42.3", 42, 11, 12, 24, 25},
		{"1.44.0", 44, 11, 12, 24, 25},
		{"1.48.1", 48, 11, 12, 24, 25},
	} {
		i := newFilterImage(FilterAPIVersion, tt.version)
		f, err := CopyFilter(unsafe.Pointer(&i.words), false)
		if err != nil || f.Release != tt.release || f.Version != tt.version {
			t.Errorf("%s: got release %v of %s, %v", tt.version, f.Release, f.Version, err)
			continue
		}
		for _, m := range []struct {
			name string
			p    unsafe.Pointer
			want int
		}{
			{"name", unsafe.Pointer(f.Name.p), 2}, {"load", f.Load, 5}, {"dump_plugin", f.DumpPlugin, tt.dumpPlugin},
			{"get_ready", f.GetReady, tt.getReady}, {"block_size", f.BlockSize, tt.blockSize},
			{"can_write", f.CanWrite, tt.can}, {"cache", f.Cache, tt.can + 16},
		} {
			if m.want == 0 && m.p != nil || m.want != 0 && i.index(m.p) != m.want {
				t.Errorf("%s: %s: got word %d, need %d", tt.version, m.name, i.index(m.p), m.want)
			}
		}
		if tt.release.NextHasBlockSize() != (tt.blockSize != 0) || tt.release.Extents64() != (tt.release >= 44) {
			t.Errorf("%v: got %v, %v", tt.release, tt.release.NextHasBlockSize(), tt.release.Extents64())
		}
	}
}

func TestCopyFilterRefuses(t *testing.T) {
	for _, tt := range []struct {
		api        int32
		version    string
		anyRelease bool
		want       error // nil: accepted
		text       string
	}{
		{6, "1.50.0", false, ErrFilterRelease, "built for nbdkit 1.50.0, need 1.26 to 1.48: use a newer nbdhost, or try"},
		{6, "1.50.0", true, nil, ""},
		{6, "1.24.1", true, ErrFilterRelease, "its callbacks have another form"},
		{6, "1.35.9", false, ErrFilterRelease, "development release"},
		{6, "1.35.9", true, ErrFilterRelease, "development release"},
		{6, "2.0.0", true, ErrFilterRelease, "none of nbdkit's"},
		{6, "1", false, ErrFilterRelease, "none of nbdkit's"},
		{6, "", false, ErrFilterRelease, "none of nbdkit's"},
		{6, "1.-2.3", false, ErrFilterRelease, "none of nbdkit's"},
		{5, "1.14.0", false, ErrAPIVersion, "got 5, need 6"},
		{7, "1.60.0", true, ErrAPIVersion, "got 7, need 6"},
	} {
		i := newFilterImage(tt.api, tt.version)
		f, err := CopyFilter(unsafe.Pointer(&i.words), tt.anyRelease)
		if !errors.Is(err, tt.want) || err != nil && !strings.Contains(err.Error(), tt.text) {
			t.Errorf("%d %s: got %v, need %v (%s)", tt.api, tt.version, err, tt.want, tt.text)
		}
		if err == nil && f.Release != NewestFilter {
			t.Errorf("%s: got release %v", tt.version, f.Release)
		}
	}
	if _, err := CopyFilter(nil, false); !errors.Is(err, ErrNoStruct) {
		t.Errorf("NULL: got %v", err)
	}
}
