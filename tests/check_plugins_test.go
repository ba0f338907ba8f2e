package tests

import (
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"nbdhost/check"
)

var updateDocs = flag.Bool("update-docs", false, "write the table of checks into docs/check.md, and what they find into docs/compatibility.md")

// checkedPlugins are Debian's plugins, with parameters that need no network. DIR in
// one stands for a directory of the check's own, with what setup makes in it.
var checkedPlugins = []struct {
	args   []string
	finds  []string // the checks that fail
	may    []string // those that may, as the file system has it
	leave  []string // those that are left out
	remark string
}{
	{args: []string{"curl", "url=file://DIR/image", "protocols=file", "-r"}, remark: "read-only: see there"},
	{args: []string{"data", "1 2 @0x100000 3"}, finds: []string{"zero.no_hole"}, remark: "sparse array: zeroes are always holes"},
	{args: []string{"eval", "get_size=echo 1M", "pread=head -c $3 /dev/zero"}},
	{args: []string{"example1"}},
	{args: []string{"example2", "file=DIR/image"}},
	{args: []string{"example3"}, finds: []string{"write.fua", "flush.data"}, remark: "by design: each connection has a disk of its own, which is gone with it"},
	{args: []string{"file", "DIR/image"}, may: []string{"zero.no_hole"}, remark: "some file systems call allocated but unwritten extents holes"},
	{args: []string{"floppy", "DIR/dir"}},
	{args: []string{"full", "1M"}, finds: []string{"write.data"}, remark: "by design: every write fails with ENOSPC"},
	{args: []string{"info", "mode=exportname"}},
	{args: []string{"iso", "DIR/dir"}},
	{args: []string{"linuxdisk", "DIR/dir"}},
	{args: []string{"memory", "16M"}, finds: []string{"zero.no_hole"}, remark: "sparse array: zeroes are always holes"},
	{args: []string{"null", "1M"}, finds: []string{"write.data"}, remark: "by design: writes are dropped"},
	{args: []string{"ondemand", "dir=DIR/disks", "size=4M"}, may: []string{"zero.no_hole"}},
	{args: []string{"partitioning", "DIR/image"}, may: []string{"zero.no_hole"}},
	{args: []string{"pattern", "16M"}},
	{args: []string{"python", "DIR/disk.py"}},
	{args: []string{"random", "16M"}, finds: []string{"write.data"}, remark: "by design: other data than its own is refused"},
	{args: []string{"sh", "DIR/disk.sh"}},
	{args: []string{"sparse-random", "64M", "seed=1"}, finds: []string{"write.data"}, remark: "by design: other data than its own is refused"},
	{args: []string{"split", "DIR/image"}, leave: []string{"cache.data", "zero.no_hole"}, remark: "two defects, whose checks are left out: see there"},
	{args: []string{"tmpdisk", "16M"}, finds: []string{"read.connections", "write.fua", "flush.data", "disconnect.in_flight"}, remark: "by design: each connection has a disk of its own, which is gone with it"},
	{args: []string{"zero"}},
}

// findings is the section of docs/compatibility.md about checkedPlugins.
func findings() string {
	var b strings.Builder
	b.WriteString("\n## Promises\n\nWhat [nbdhost --check](check.md) finds in the plugins of nbdkit 1.32.5, with `--check-writes`\n" +
		"where there is no `-r`. \"See there\": check.md tells of the plugin's defects.\n\n<!-- findings -->\n")
	b.WriteString(findingsTable() + "<!-- end of findings -->\n")
	return b.String()
}

func findingsTable() string {
	var b strings.Builder
	b.WriteString("| plugin and parameters | checks that fail | |\n|---|---|---|\n")
	for _, p := range checkedPlugins {
		fmt.Fprintf(&b, "| `%s` | %s | %s |\n", strings.Join(p.args, " "), strings.Join(slices.Concat(p.finds, p.may), ", "), p.remark)
	}
	return b.String()
}

// TestCheckPlugins checks what Debian ships. docs/compatibility.md has the findings;
// -update-docs writes them there.
func TestCheckPlugins(t *testing.T) {
	onlyNbdhost(t)
	t.Run("plugins", func(t *testing.T) {
		for _, p := range checkedPlugins {
			t.Run(p.args[0], func(t *testing.T) {
				t.Parallel()
				dir := tempDir(t)
				setUpPlugins(t, dir)
				names := slices.DeleteFunc(check.Names(), func(name string) bool { return slices.Contains(p.leave, name) })
				args := []string{"--check-only=" + strings.Join(names, ",")}
				if !slices.Contains(p.args, "-r") {
					args = append(args, "--check-writes")
				}
				for _, a := range p.args {
					if a != "-r" {
						args = append(args, strings.ReplaceAll(a, "DIR", dir))
					}
				}
				r := checkPlugin(t, args...)
				got := slices.DeleteFunc(r.failed(), func(name string) bool { return slices.Contains(p.may, name) })
				if !slices.Equal(got, p.finds) {
					for _, c := range r.Checks {
						if c.Saw != "" {
							t.Logf("%s: %s", c.Name, c.Saw)
						}
					}
					t.Errorf("got %q, want %q", got, p.finds)
				}
			})
		}
	})
	documented(t, compatibility, "findings", findingsTable())
}

// TestCheckTable: the documentation has the table of checks.
func TestCheckTable(t *testing.T) {
	var b strings.Builder
	b.WriteString("| check | promise |\n|---|---|\n")
	for _, c := range check.Checks {
		promise := c.Promise
		if c.Writes {
			promise += " (with `--check-writes`)"
		}
		fmt.Fprintf(&b, "| %s | %s |\n", c.Name, promise)
	}
	documented(t, "../docs/check.md", "checks", b.String())
}

// documented wants text at its place in a file, or puts it there.
func documented(t *testing.T, file, place, text string) {
	t.Helper()
	doc, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	begin, end := "<!-- "+place+" -->\n", "<!-- end of "+place+" -->\n"
	head, rest, _ := strings.Cut(string(doc), begin)
	got, tail, ok := strings.Cut(rest, end)
	switch {
	case !ok:
		t.Fatalf("%s: has no place for the %s", file, place)
	case *updateDocs:
		if err := os.WriteFile(file, []byte(head+begin+text+end+tail), 0o644); err != nil {
			t.Fatal(err)
		}
	case got != text:
		t.Errorf("%s is not what there is: run this test with -update-docs", file)
	}
}

// setUpPlugins makes what the parameters name.
func setUpPlugins(t *testing.T, dir string) {
	t.Helper()
	copyFile(t, filepath.Join(dir, "image"), testImages(t).sparse)
	for _, name := range []string{"disks", "dir"} {
		if err := os.Mkdir(filepath.Join(dir, name), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	writeFile(t, filepath.Join(dir, "dir", "file"), "a file\n", 0o644)
	writeFile(t, filepath.Join(dir, "disk.sh"), `case "$1" in
get_size) echo 1M ;;
pread) head -c $3 /dev/zero ;;
*) exit 2 ;;
esac
`, 0o755)
	writeFile(t, filepath.Join(dir, "disk.py"), `API_VERSION = 2
disk = bytearray(1024 * 1024)
def open(readonly):
    return 1
def get_size(h):
    return len(disk)
def pread(h, buf, offset, flags):
    buf[:] = disk[offset:offset + len(buf)]
def pwrite(h, buf, offset, flags):
    disk[offset:offset + len(buf)] = buf
def flush(h, flags):
    pass
def zero(h, count, offset, flags):
    disk[offset:offset + count] = bytearray(count)
`, 0o644)
}

// The checks look through filters: what they see is the plugin's and the filters'.
func TestCheckThroughFilters(t *testing.T) {
	t.Parallel()
	onlyNbdhost(t)
	for _, tt := range []struct {
		args    []string
		filters string // in what is said about the start
		failed  string // a check that must fail, "" for none at all
	}{
		{[]string{"--filter=cow", "--filter=blocksize", "memory", "1M"}, "filters cow 1.32.5, blocksize 1.32.5", ""},
		{[]string{"--filter=cache", "memory", "1M"}, "filters cache 1.32.5", ""},
		{[]string{"--filter=error", "memory", "1M", "error-pread-rate=100%"}, "filters error-inject 1.32.5", "read.range"},
		{[]string{"--filter=partition", "memory", "1M", "partition=1"}, "filters partition 1.32.5", "plugin.open"},
	} {
		t.Run(strings.Join(tt.args, " "), func(t *testing.T) {
			t.Parallel()
			r := checkPlugin(t, append([]string{"--check-writes"}, tt.args...)...)
			failed := r.failed()
			if tt.failed == "" && len(failed) > 0 || tt.failed != "" && !slices.Contains(failed, tt.failed) {
				t.Errorf("got failures %q, need %q", failed, tt.failed)
			}
			for _, c := range r.Checks {
				if c.Name == "plugin.start" && !slices.Contains(c.Notes, tt.filters) {
					t.Errorf("got notes %q, need %q", c.Notes, tt.filters)
				}
				if c.Name == tt.failed && !strings.Contains(c.Again, strings.Join(tt.args[:2], " ")) {
					t.Errorf("got %q to see it again, need the filters in it", c.Again)
				}
			}
		})
	}
}
