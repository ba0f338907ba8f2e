package abi

import (
	"bufio"
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"nbdhost/backend"
)

// includeDirs returns the directories with nbdkit headers: the installed ones,
// those of the other releases' trees that tests/trees.sh has made, and those that
// NBDKIT_INCLUDE_DIRS lists, separated by colons.
func includeDirs(t *testing.T) []string {
	candidates := append([]string{"/usr/include"}, filepath.SplitList(os.Getenv("NBDKIT_INCLUDE_DIRS"))...)
	if cache, err := os.UserCacheDir(); err == nil {
		trees, _ := filepath.Glob(filepath.Join(cache, "nbdkit-trees/*/usr/include")) // the pattern is a good one
		candidates = append(candidates, trees...)
	}
	var dirs []string
	for _, dir := range candidates {
		if _, err := os.Stat(filepath.Join(dir, "nbdkit-plugin.h")); err == nil {
			dirs = append(dirs, dir)
		}
	}
	if len(dirs) == 0 {
		t.Skip("no nbdkit headers: install nbdkit-plugin-dev, or set NBDKIT_INCLUDE_DIRS")
	}
	return dirs
}

// layout compiles testdata/layout.c and returns its lines as fields by name.
func layout(t *testing.T, dir string, flags ...string) map[string][]string {
	t.Helper()
	bin := filepath.Join(t.TempDir(), "layout")
	// Only the header from dir itself, whatever else is there.
	inc := t.TempDir()
	headers, err := filepath.Glob(filepath.Join(dir, "nbdkit-*.h"))
	if err != nil {
		t.Fatal(err)
	}
	for _, h := range headers {
		if err := os.Symlink(h, filepath.Join(inc, filepath.Base(h))); err != nil {
			t.Fatal(err)
		}
	}
	args := append(flags, "-I", inc, "-o", bin, "testdata/layout.c")
	if out, err := exec.Command("gcc", args...).CombinedOutput(); err != nil {
		t.Fatalf("gcc: %v\n%s", err, out)
	}
	out, err := exec.Command(bin).Output()
	if err != nil {
		t.Fatal(err)
	}
	lines := make(map[string][]string)
	for s := bufio.NewScanner(bytes.NewReader(out)); s.Scan(); {
		f := strings.Fields(s.Text())
		lines[f[0]] = f[1:]
	}
	return lines
}

// members gives the name of each C member in API versions 1 and 2 for a Go field.
// Where nothing is said it is the Go name in snake case.
var members = map[string][2]string{
	"StructSize": {"_struct_size", "_struct_size"}, "APIVersion": {"_api_version", "_api_version"},
	"ThreadModel": {"_thread_model", "_thread_model"}, "GetThreadModel": {"thread_model", "thread_model"},
	"LongName": {"longname", "longname"}, "CanFUA": {"can_fua", "can_fua"},
	"PreadV1": {"pread", "_pread_v1"}, "PwriteV1": {"pwrite", "_pwrite_v1"}, "FlushV1": {"flush", "_flush_v1"},
	"TrimV1": {"trim", "_trim_v1"}, "ZeroV1": {"zero", "_zero_v1"},
	"Pread": {"_unused1", "pread"}, "Pwrite": {"_unused2", "pwrite"}, "Flush": {"_unused3", "flush"},
	"Trim": {"_unused4", "trim"}, "Zero": {"_unused5", "zero"},
}

func member(field string, version int) string {
	if m, ok := members[field]; ok {
		return m[version-1]
	}
	var b strings.Builder
	for i, r := range field {
		if i > 0 && r >= 'A' && r <= 'Z' {
			b.WriteByte('_')
		}
		b.WriteString(strings.ToLower(string(r)))
	}
	return b.String()
}

func TestPluginLayout(t *testing.T) {
	for _, dir := range includeDirs(t) {
		for version := 1; version <= 2; version++ {
			t.Run(fmt.Sprintf("%s,v%d", filepath.ToSlash(dir), version), func(t *testing.T) {
				c := layout(t, dir, fmt.Sprintf("-DNBDKIT_API_VERSION=%d", version))
				typ := reflect.TypeFor[Plugin]()
				seen := 0
				for i := range typ.NumField() {
					f := typ.Field(i)
					if f.Name == "_" {
						continue
					}
					seen++
					want := c[member(f.Name, version)]
					got := []string{fmt.Sprint(f.Offset), fmt.Sprint(f.Type.Size())}
					if !reflect.DeepEqual(got, want) {
						t.Errorf("%s: got offset and size %v, need %v", f.Name, got, want)
					}
				}
				// The rest of the lines: the size of the struct and the constants.
				if want := len(c) - 1 - len(constants); seen != want {
					t.Errorf("got %d fields, need %d", seen, want)
				}
				if got, want := fmt.Sprint(typ.Size()), c["sizeof"][0]; got != want {
					t.Errorf("size: got %s, need %s", got, want)
				}
			})
		}
	}
}

// The numbers that backends go by are those of modules.
var constants = map[string]int{
	"THREAD_MODEL_SERIALIZE_CONNECTIONS":  int(backend.SerializeConnections),
	"THREAD_MODEL_SERIALIZE_ALL_REQUESTS": int(backend.SerializeAllRequests),
	"THREAD_MODEL_SERIALIZE_REQUESTS":     int(backend.SerializeRequests),
	"THREAD_MODEL_PARALLEL":               int(backend.Parallel),
	"FLAG_MAY_TRIM":                       int(backend.MayTrim), "FLAG_FUA": int(backend.FUA),
	"FLAG_REQ_ONE": int(backend.ReqOne), "FLAG_FAST_ZERO": int(backend.FastZero),
	"FUA_NONE": backend.None, "FUA_EMULATE": backend.Emulate, "FUA_NATIVE": backend.Native,
	"CACHE_NONE": backend.None, "CACHE_EMULATE": backend.Emulate, "CACHE_NATIVE": backend.Native,
	"EXTENT_HOLE": int(backend.ExtentHole), "EXTENT_ZERO": int(backend.ExtentZero),
}

var filterConstants = map[string]int{
	"ZERO_NONE": backend.None, "ZERO_EMULATE": backend.Emulate, "ZERO_NATIVE": backend.Native,
}

func TestConstants(t *testing.T) {
	for _, dir := range includeDirs(t) {
		for _, c := range []struct {
			flags []string
			want  map[string]int
		}{{[]string{"-DNBDKIT_API_VERSION=2"}, constants}, {[]string{"-DFILTER"}, filterConstants}} {
			lines := layout(t, dir, c.flags...)
			for name, value := range c.want {
				if got := []string{fmt.Sprint(value)}; !reflect.DeepEqual(got, lines[name]) {
					t.Errorf("%s: %s: got %v, need %v", dir, name, got, lines[name])
				}
			}
		}
	}
}
