package tests

import (
	"encoding/binary"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// readers are clients that change nothing. Each returns what it learnt.
var readers = []struct {
	name string
	run  func(t *testing.T, s *server) string
}{
	{"nbdinfo", func(t *testing.T, s *server) string {
		return command(t, "nbdinfo", s.uri("")) +
			command(t, "nbdinfo", "--json", s.uri("")) +
			command(t, "nbdinfo", "--size", s.uri("")) +
			command(t, "nbdinfo", "--list", s.uri(""))
	}},
	{"nbdinfo --map", func(t *testing.T, s *server) string {
		return command(t, "nbdinfo", "--map", s.uri("")) +
			command(t, "nbdinfo", "--map", "--totals", s.uri("")) +
			command(t, "nbdinfo", "--map", "--json", s.uri(""))
	}},
	{"nbdcopy", func(t *testing.T, s *server) string {
		out := filepath.Join(s.dir, "out")
		command(t, "nbdcopy", s.uri(""), out)
		return digest(t, out)
	}},
	{"nbdcopy many", func(t *testing.T, s *server) string {
		out := filepath.Join(s.dir, "out")
		command(t, "nbdcopy", "--requests=64", "--connections=4", "--request-size=32768", s.uri(""), out)
		return digest(t, out)
	}},
	{"qemu-img info", func(t *testing.T, s *server) string {
		return command(t, "qemu-img", "info", "--output=json", "-f", "raw", s.uri("")) +
			command(t, "qemu-img", "map", "--output=json", "-f", "raw", s.uri(""))
	}},
	{"qemu-img convert", func(t *testing.T, s *server) string {
		qcow2, raw := filepath.Join(s.dir, "out.qcow2"), filepath.Join(s.dir, "out")
		command(t, "qemu-img", "convert", "-f", "raw", "-O", "qcow2", s.uri(""), qcow2)
		command(t, "qemu-img", "convert", "-f", "qcow2", "-O", "raw", qcow2, raw)
		return digest(t, raw) + command(t, "qemu-img", "compare", "-f", "raw", "-F", "qcow2", s.uri(""), qcow2)
	}},
	{"nbdsh", func(t *testing.T, s *server) string {
		return command(t, "/usr/bin/nbdsh", "-u", s.uri(""), "-c", `
import hashlib
# .cache of 1.32's split plugin never returns.
cacheable = `+map[bool]string{true: "True", false: "False"}[!s.serves("split")]+`
size = h.get_size()
print(size, h.is_read_only(), h.can_multi_conn(), h.can_fua(), h.can_df(), h.can_zero(), h.can_fast_zero(), h.can_trim(), h.can_cache(), h.get_protocol())
for offset, count in ((0, 1), (1, 511), (511, 2), (size - 1, 1), (size // 2, 65536), (12345, 54321)):
    count = min(count, size - offset)
    print(offset, count, hashlib.sha256(h.pread(count, offset)).hexdigest())
if h.can_df():
    chunks = []
    h.pread_structured(min(size, 131072), 0, lambda buf, offset, status, error: chunks.append((hashlib.sha256(buf).hexdigest(), offset, status)), nbd.CMD_FLAG_DF)
    print(chunks)
if h.can_cache() and cacheable:
    h.cache(512, 0)
# Strict mode off: the server must answer this.
h.set_strict_mode(0)
for call in (lambda: h.pread(1, size), lambda: h.pread(2, size - 1), lambda: h.pread(1, 2**63 - 2),
             lambda: h.pwrite(b'x', size), lambda: h.trim(1, size), lambda: h.zero(2, size - 1),
             lambda: h.cache(1, size), lambda: h.flush(0x8)):
    try:
        print(call())
    except nbd.Error as e:
        print(e.errno)
`)
	}},
}

// sources are plugins, and what makes them serve something worth reading.
func sources(m *images) []scenario {
	return []scenario{
		{name: "file", args: []string{"file", m.ext4}},
		{name: "file with holes", args: []string{"-r", "file", m.sparse}},
		{name: "file in a directory", args: []string{"file", "dir=" + filepath.Dir(m.ext4), "-e", "ext4"},
			client: func(t *testing.T, s *server) string {
				out := filepath.Join(s.dir, "out")
				command(t, "nbdcopy", s.uri("sparse"), out)
				return digest(t, out) + command(t, "nbdinfo", "--list", s.uri("")) + command(t, "nbdinfo", s.uri("ext4"))
			}},
		{name: "memory", args: []string{"memory", "9M"}},
		{name: "data", args: []string{"data", "( 0x55 0xAA )*2000 @1048576 \"hello\" @+3000 ( @^4096 $x )*7 @4194304 1", "x=( 1 2 3 )*99"}},
		{name: "pattern", args: []string{"pattern", "9M"}},
		{name: "null", args: []string{"null", "1M"}},
		{name: "partitioning", args: []string{"partitioning", m.ext4, m.sparse}},
		{name: "split", args: []string{"split", m.ext4, m.sparse, m.tree + "/three.bin"}},
		{name: "floppy", args: []string{"floppy", m.tree, "label=TESTS"}},
		// What the script says of its extents is not what the file has. A client that
		// trusts it reads other bytes than one that does not, but the same from both.
		{name: "sh", args: []string{"sh", "DIR/script"}, setup: func(t *testing.T, dir string) {
			writeFile(t, filepath.Join(dir, "script"), fmt.Sprintf(`#!/bin/sh
disk=%s
case $1 in
get_size) stat -L -c %%s $disk ;;
pread) dd if=$disk skip=$4 count=$3 iflag=count_bytes,skip_bytes status=none ;;
thread_model) echo parallel ;;
can_extents|can_multi_conn) exit 0 ;;
extents) echo 0 1M ; echo 1M 38M hole,zero ; echo 39M %d ;;
*) exit 2 ;;
esac
`, m.sparse, sparseSize-39<<20), 0o755)
		}},
		{name: "eval", args: []string{"eval",
			"get_size=stat -L -c %s " + m.ext4,
			"pread=dd if=" + m.ext4 + " skip=$4 count=$3 iflag=count_bytes,skip_bytes status=none"}},
	}
}

func TestReaders(t *testing.T) {
	t.Parallel()
	m := testImages(t)
	for _, source := range sources(m) {
		t.Run(source.name, func(t *testing.T) {
			t.Parallel()
			if source.client == nil {
				source.client = func(t *testing.T, s *server) string {
					var all strings.Builder
					for _, r := range readers {
						if slow := source.name == "sh" || source.name == "eval"; slow && r.name == "nbdcopy many" {
							continue // a process each 32 KiB
						}
						fmt.Fprintf(&all, "== %s ==\n%s", r.name, r.run(t, s))
					}
					return all.String()
				}
			}
			compare(t, source)
		})
	}
}

func TestReadersOverTCP(t *testing.T) {
	t.Parallel()
	m := testImages(t)
	for _, r := range readers {
		t.Run(r.name, func(t *testing.T) {
			t.Parallel()
			compare(t, scenario{tcp: true, args: []string{"file", m.sparse}, client: r.run})
		})
	}
}

// TestWholeImage copies images through the program under test and holds the
// copies against the originals.
func TestWholeImage(t *testing.T) {
	t.Parallel()
	m := testImages(t)
	for _, tcp := range []bool{false, true} {
		t.Run(map[bool]string{false: "unix", true: "tcp"}[tcp], func(t *testing.T) {
			t.Parallel()
			dir := tempDir(t)
			disk, out := filepath.Join(dir, "disk"), filepath.Join(dir, "out")
			writeFile(t, disk, "", 0o644)
			if err := os.Truncate(disk, ext4Size); err != nil {
				t.Fatal(err)
			}
			s := start(t, nbdhost, dir, tcp, "file", disk)
			command(t, "nbdcopy", "--flush", m.ext4, s.uri(""))
			sameBytes(t, disk, m.ext4)
			command(t, "nbdcopy", s.uri(""), out)
			sameBytes(t, out, m.ext4)

			// The file system is one still, and its files are the files.
			command(t, "e2fsck", "-fn", disk)
			command(t, "debugfs", "-R", "dump sub/deep/two.bin "+out, disk)
			sameBytes(t, out, filepath.Join(m.tree, "sub/deep/two.bin"))

			command(t, "nbdcopy", "--destination-is-zero", "--allocated", "/dev/null", s.uri(""))
			command(t, "qemu-img", "convert", "-n", "-f", "qcow2", "-O", "raw", m.qcow2, s.uri(""))
			sameBytes(t, disk, m.ext4)
			command(t, "qemu-img", "compare", "-f", "qcow2", "-F", "raw", m.qcow2, s.uri(""))
			s.stop()
		})
	}
}

// TestServedQcow2 serves a qcow2's raw bytes, which qemu reads as a qcow2.
func TestServedQcow2(t *testing.T) {
	t.Parallel()
	m := testImages(t)
	compare(t, scenario{
		args: []string{"-r", "file", m.qcow2},
		client: func(t *testing.T, s *server) string {
			out := filepath.Join(s.dir, "out")
			command(t, "qemu-img", "convert", "-f", "qcow2", "-O", "raw", s.uri(""), out)
			sameBytes(t, out, m.ext4)
			return command(t, "qemu-img", "check", "-f", "qcow2", "--output=json", s.uri("")) +
				command(t, "qemu-img", "compare", "-f", "qcow2", "-F", "raw", s.uri(""), m.ext4)
		},
	})
}

// disks are plugins that can be written. The files that they write are DIR/disk
// and DIR/disk2.
var disks = []scenario{
	{name: "file", args: []string{"file", "DIR/disk"}},
	{name: "file without cache", args: []string{"file", "DIR/disk", "cache=none"}},
	{name: "memory", args: []string{"memory", "32M"}},
	{name: "memory malloc", args: []string{"memory", "32M", "allocator=malloc"}},
	{name: "data", args: []string{"data", "size=32M", "1 2 3 @17825792 4 5 6"}},
	{name: "split", args: []string{"split", "DIR/disk", "DIR/disk2"}},
	{name: "partitioning", args: []string{"partitioning", "DIR/disk", "DIR/disk2"}},
	{name: "one thread", args: []string{"-t", "1", "file", "DIR/disk"}},
	{name: "tcp", tcp: true, args: []string{"file", "DIR/disk"}},
}

func diskFiles(t *testing.T, dir string) {
	t.Helper()
	for _, name := range []string{"disk", "disk2"} {
		path := filepath.Join(dir, name)
		writeFile(t, path, "", 0o644)
		if err := os.Truncate(path, 32<<20); err != nil {
			t.Fatal(err)
		}
	}
}

func diskDigests(t *testing.T, dir string) string {
	t.Helper()
	return digest(t, filepath.Join(dir, "disk")) + digest(t, filepath.Join(dir, "disk2"))
}

// TestWriters writes in every way that there is, and compares what clients read
// back, how they see the allocation, and the files.
func TestWriters(t *testing.T) {
	t.Parallel()
	m := testImages(t)
	for _, disk := range disks {
		t.Run(disk.name, func(t *testing.T) {
			t.Parallel()
			disk.setup, disk.after = diskFiles, diskDigests
			disk.client = func(t *testing.T, s *server) string {
				// The partition table of the partitioning plugin must stay.
				at := "2M"
				qemu := func(commands ...string) string {
					args := []string{"-f", "raw", "-t", "none", "-d", "unmap"}
					for _, c := range commands {
						args = append(args, "-c", c)
					}
					out := command(t, "qemu-io", append(args, s.uri(""))...)
					return withoutRates(out)
				}
				result := qemu("write -P 0xa1 "+at+" 8M", "write -P 0xa2 3M 64k", "write -z 4M 1M", "write -z -u 6M 1M",
					"discard 8M 1M", "write -f -P 0xa3 9M 512", "flush", "read -P 0xa2 3M 64k", "read -P 0 4M 1M",
					"read -P 0 6M 1M", "read -P 0xa3 9M 512", "read -P 0xa1 2M 1M")
				result += command(t, "/usr/bin/nbdsh", "-u", s.uri(""), "-c", `
import hashlib
m = 1024 * 1024
h.pwrite(b'unaligned' * 1000, 11 * m + 3)
h.pwrite(b'fua' * 1000, 12 * m, nbd.CMD_FLAG_FUA if h.can_fua() else 0)
h.zero(4321, 11 * m + 77)
h.zero(100000, 12 * m + 7, nbd.CMD_FLAG_NO_HOLE)
h.zero(2 * m, 2 * m, nbd.CMD_FLAG_FUA if h.can_fua() else 0)
if h.can_fast_zero():
    try:
        h.zero(m, 5 * m, nbd.CMD_FLAG_FAST_ZERO)
        print('fast zero')
    except nbd.Error as e:
        print('fast zero', e.errno)
if h.can_trim():
    h.trim(m, 9 * m)
if h.can_flush():
    h.flush()
for offset in range(0, h.get_size(), m):
    n = min(m, h.get_size() - offset)
    print(offset, hashlib.sha256(h.pread(n, offset)).hexdigest())
`)
				result += command(t, "nbdinfo", "--map", s.uri(""))
				if disk.name != "partitioning" {
					command(t, "nbdcopy", "--requests=64", m.ext4, s.uri(""))
				}
				out := filepath.Join(s.dir, "out")
				command(t, "nbdcopy", s.uri(""), out)
				defer os.Remove(out)
				return result + digest(t, out)
			}
			compare(t, disk)
		})
	}
}

// withoutRates drops qemu-io's lines on how long it took.
func withoutRates(out string) string {
	var kept []string
	for line := range strings.Lines(out) {
		if !strings.Contains(line, "ops/sec") && !strings.Contains(line, "ops;") {
			kept = append(kept, line)
		}
	}
	return strings.Join(kept, "")
}

// TestFio has fio write, read back and check blocks at random, many at a time.
func TestFio(t *testing.T) {
	t.Parallel()
	for _, disk := range disks[:4] {
		for _, tcp := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s tcp=%t", disk.name, tcp), func(t *testing.T) {
				t.Parallel()
				dir := tempDir(t)
				diskFiles(t, dir)
				s := start(t, nbdhost, dir, tcp, disk.args...)
				command(t, "fio", "--name=verify", "--ioengine=nbd", "--uri="+s.uri(""), "--rw=randwrite",
					"--bsrange=512-256k", "--bs_unaligned", "--size=16M", "--iodepth=32", "--verify=crc32c", "--do_verify=1", "--verify_fatal=1", "--verify_state_save=0",
					"--randseed=7", "--output="+filepath.Join(dir, "fio"))
				s.stop()
			})
		}
	}
}

// TestNBDPlugin puts a server before another.
func TestNBDPlugin(t *testing.T) {
	t.Parallel()
	m := testImages(t)
	behind := start(t, nbdkit, tempDir(t), false, "-r", "file", m.sparse)
	for _, shared := range []string{"shared=false", "shared=true"} {
		t.Run(shared, func(t *testing.T) {
			t.Parallel()
			compare(t, scenario{
				args: []string{"nbd", "uri=" + behind.uri(""), shared},
				client: func(t *testing.T, s *server) string {
					var all strings.Builder
					for _, r := range readers {
						fmt.Fprintf(&all, "== %s ==\n%s", r.name, r.run(t, s))
					}
					return all.String()
				},
			})
		})
	}
}

// TestISO: xorriso puts the time into what it makes, so what is compared is
// what is in it.
func TestISO(t *testing.T) {
	t.Parallel()
	m := testImages(t)
	compare(t, scenario{
		args: []string{"iso", m.tree, "params=-quiet -R -V TESTS"},
		client: func(t *testing.T, s *server) string {
			iso, out := filepath.Join(s.dir, "iso"), filepath.Join(s.dir, "out")
			command(t, "nbdcopy", s.uri(""), iso)
			command(t, "xorriso", "-osirrox", "on", "-indev", iso, "-extract", "/", out)
			command(t, "diff", "-r", m.tree, out)
			return command(t, "nbdinfo", "--json", "--no-content", s.uri(""))
		},
	})
}

// TestLinuxDisk: mkfs gives each file system a new UUID, so again what is
// compared is what is in it.
func TestLinuxDisk(t *testing.T) {
	t.Parallel()
	m := testImages(t)
	compare(t, scenario{
		args: []string{"linuxdisk", m.tree, "type=ext4", "size=32M"},
		client: func(t *testing.T, s *server) string {
			disk, file := filepath.Join(s.dir, "disk"), filepath.Join(s.dir, "file")
			command(t, "nbdcopy", s.uri(""), disk)
			b, err := os.ReadFile(disk)
			if err != nil {
				t.Fatal(err)
			}
			// The first entry of the GPT, at LBA 2.
			entry := b[1024:1152]
			first, last := binary.LittleEndian.Uint64(entry[32:]), binary.LittleEndian.Uint64(entry[40:])
			if string(b[512:520]) != "EFI PART" || last <= first || (last+1)*512 > uint64(len(b)) {
				t.Fatalf("read GPT: got signature %q, partition %d-%d, disk of %d bytes", b[512:520], first, last, len(b))
			}
			if err := os.WriteFile(disk, b[first*512:(last+1)*512], 0o644); err != nil {
				t.Fatal(err)
			}
			command(t, "e2fsck", "-fn", disk)
			command(t, "debugfs", "-R", "dump three.bin "+file, disk)
			sameBytes(t, file, filepath.Join(m.tree, "three.bin"))
			return fmt.Sprintln(len(b), first, last) + command(t, "nbdinfo", "--json", "--no-content", s.uri(""))
		},
	})
}

// TestExports: what a client is told with each export name.
func TestExports(t *testing.T) {
	t.Parallel()
	for _, args := range [][]string{
		{"info", "exportname"},
		{"info", "mode=exportname", "-e", "ignored"},
		{"-e", "one", "null", "1M"},
		{"eval", "list_exports=echo NAMES+DESCRIPTIONS; echo a; echo about a; echo b; echo about b", "default_export=echo b",
			"open=echo $3", "get_size=echo ${#2}M", "pread=head -c $3 /dev/zero", "export_description=echo about $2"},
	} {
		t.Run(strings.Join(args[:2], " "), func(t *testing.T) {
			t.Parallel()
			compare(t, scenario{args: args, client: func(t *testing.T, s *server) string {
				var all strings.Builder
				for _, export := range []string{"", "a", "b", "one", "another"} {
					out, err := try(t, "nbdinfo", "--json", s.uri(export))
					fmt.Fprintf(&all, "%s\n%s%v\n", export, out, err == nil)
					out, err = try(t, "nbdinfo", "--list", s.uri(export))
					fmt.Fprintf(&all, "%s%v\n", out, err == nil)
					out, err = try(t, "nbdcopy", s.uri(export), "-")
					fmt.Fprintf(&all, "%q %v\n", strings.TrimRight(out, "\x00"), err == nil)
				}
				return all.String()
			}})
		})
	}
}

// TestManyConnections reads and writes through several connections at once.
func TestManyConnections(t *testing.T) {
	t.Parallel()
	m := testImages(t)
	dir := tempDir(t)
	s := start(t, nbdhost, dir, true, "memory", "32M")
	command(t, "nbdcopy", "--connections=8", "--requests=16", "--request-size=4096", m.ext4, s.uri(""))
	out := filepath.Join(dir, "out")
	command(t, "nbdcopy", "--connections=8", "--requests=16", "--request-size=8192", s.uri(""), out)
	if err := os.Truncate(out, ext4Size); err != nil {
		t.Fatal(err)
	}
	sameBytes(t, out, m.ext4)
	s.stop()
}
