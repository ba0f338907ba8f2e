package tests

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// testDump asks every plugin of every release about itself.
func testDump(t *testing.T) {
	for _, r := range releases(t) {
		t.Run(r.name, func(t *testing.T) {
			t.Parallel()
			entries, err := os.ReadDir(r.plugins())
			if err != nil {
				t.Fatal(err)
			}
			for _, e := range entries {
				name := strings.TrimPrefix(strings.TrimSuffix(strings.TrimSuffix(e.Name(), ".so"), "-plugin"), "nbdkit-")
				t.Run(name, func(t *testing.T) {
					if got, want := about(t, r.nbdhost, name), about(t, r.nbdkit, name); got != want {
						t.Errorf("dump is unlike nbdkit's in this:\n%s", difference(want, got))
					}
					pluginTable.record(t, name, r.name, -1, "dump")
				})
			}
		})
	}
}

// about returns what --dump-plugin prints, but for what the server is. A script's
// lines come before or after the others, as each flushes its own.
func about(t *testing.T, program, plugin string) string {
	t.Helper()
	lines := strings.Split(command(t, program, "--dump-plugin", plugin), "\n")
	lines = slices.DeleteFunc(lines, func(line string) bool {
		return strings.HasPrefix(line, "max_thread_model=") // the server's own limit is in it
	})
	slices.Sort(lines)
	return strings.Join(lines, "\n")
}

// session does what there is to do with a disk, and prints what comes of it.
// Writes start at an offset that leaves the first blocks alone.
const session = `
import hashlib
size = h.get_size()
def attempt(what, f):
    try:
        f()
        print(what)
    except nbd.Error as e:
        print(what, e.errno)
def digest():
    hash = hashlib.sha256()
    for offset in range(0, size, 1 << 20):
        hash.update(h.pread(min(1 << 20, size - offset), offset))
    print(size, hash.hexdigest())
h.set_strict_mode(0)
print(h.is_read_only(), h.is_rotational(), h.can_multi_conn(), h.can_fua(), h.can_flush(), h.can_trim(),
      h.can_zero(), h.can_fast_zero(), h.can_cache(), h.can_df(), h.get_block_size(nbd.SIZE_MINIMUM),
      h.get_block_size(nbd.SIZE_PREFERRED), h.get_block_size(nbd.SIZE_MAXIMUM))
attempt('read', digest)
attempt('read beyond', lambda: h.pread(2, size - 1))
if WRITE:
    at = size // 2 & ~0xffff
    fua = nbd.CMD_FLAG_FUA if h.can_fua() else 0
    attempt('write', lambda: h.pwrite(b'0123456789abcdef' * 4096, at))
    attempt('write fua', lambda: h.pwrite(b'FUA!' * 128, at + 512, fua))
    attempt('write unaligned', lambda: h.pwrite(b'unaligned', at + 1027))
    attempt('zero', lambda: h.zero(4096, at + 8192))
    attempt('zero unaligned', lambda: h.zero(1000, at + 16385))
    attempt('zero no hole', lambda: h.zero(4096, at + 20480, nbd.CMD_FLAG_NO_HOLE))
    # nbdkit ends with a failed assertion where it has not offered this.
    if h.can_fast_zero():
        attempt('zero fast', lambda: h.zero(4096, at + 28672, nbd.CMD_FLAG_FAST_ZERO))
    attempt('trim', lambda: h.trim(4096, at + 32768))
    if CACHE:
        attempt('cache', lambda: h.cache(4096, at))
    attempt('flush', h.flush)
    attempt('read', digest)
    print(hashlib.sha256(h.pread(65536, at)).hexdigest())
attempt('write beyond', lambda: h.pwrite(b'xy', size - 1))
`

// script runs a script of nbdsh, which is connected as h.
func script(t *testing.T, s *server, export, text string) string {
	t.Helper()
	path := filepath.Join(s.dir, "script.py")
	writeFile(t, path, "h.connect_uri('"+s.uri(export)+"')\n"+text, 0o644)
	return command(t, "/usr/bin/nbdsh", "-c", "exec(open('"+path+"').read())")
}

// explore returns everything a client can find out about the disk, after it has
// written to it if write is set.
func explore(t *testing.T, s *server, export string, write bool) string {
	t.Helper()
	python := map[bool]string{true: "True", false: "False"}
	out := filepath.Join(s.dir, "out")
	// .cache of the split plugin never returns before 1.48.
	result := script(t, s, export, "WRITE = "+python[write]+"\nCACHE = "+python[!s.serves("split")]+"\n"+session)
	command(t, "nbdcopy", "--requests=16", s.uri(export), out)
	defer os.Remove(out)
	return result + digest(t, out) + command(t, "nbdinfo", "--map", s.uri(export)) +
		command(t, "nbdinfo", "--json", "--no-content", s.uri(export))
}

// A plugin's row of the table is made of these.
type pluginCase struct {
	plugin string
	scenario
	did string // for the table
}

// fixedDisk makes a disk image without anything in it that is new each time.
const fixedDisk = `command=truncate -s 1M "$disk"; printf hello | dd of="$disk" bs=1 seek=70000 conv=notrunc status=none`

func pluginCases(t *testing.T, services *services) []pluginCase {
	m := testImages(t)
	disk := func(t *testing.T, dir string) {
		for i, name := range []string{"disk", "disk2", "many/a", "many/b"} {
			path := filepath.Join(dir, name)
			if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
				t.Fatal(err)
			}
			writeFile(t, path, strings.Repeat(name+" line\n", 20_000), 0o644)
			if err := os.Truncate(path, int64(1+i)<<20); err != nil {
				t.Fatal(err)
			}
		}
	}
	digests := func(t *testing.T, dir string) string {
		return digest(t, filepath.Join(dir, "disk")) + digest(t, filepath.Join(dir, "disk2"))
	}
	var cases []pluginCase
	add := func(write bool, args ...string) *pluginCase {
		did := "read, map"
		if write {
			did = "read, write, map"
		}
		plugin := args[0]
		if plugin == "-r" {
			plugin = args[1]
		}
		cases = append(cases, pluginCase{plugin, scenario{args: args, setup: disk, after: digests,
			client: func(t *testing.T, s *server) string { return explore(t, s, "", write) }}, did})
		return &cases[len(cases)-1]
	}
	// content compares what a program finds in the disk, where the disk itself
	// has UUIDs in it.
	content := func(c *pluginCase, did string, look func(t *testing.T, s *server, disk string) string) {
		c.did = did
		c.client = func(t *testing.T, s *server) string {
			disk := filepath.Join(s.dir, "copy")
			command(t, "nbdcopy", s.uri(""), disk)
			return look(t, s, disk)
		}
	}

	add(true, "file", "DIR/disk")
	add(true, "file", "DIR/disk", "cache=none", "fadvise=random").did = "with cache=none"
	add(false, "-r", "file", m.sparse).did = "a file with holes"
	directory := add(true, "file", "dir=DIR/many")
	directory.did = "a directory"
	directory.client = func(t *testing.T, s *server) string {
		return explore(t, s, "a", true) + explore(t, s, "b", false) + command(t, "nbdinfo", "--list", s.uri(""))
	}
	add(true, "memory", "2M")
	add(true, "memory", "2M", "allocator=malloc").did = "malloc"
	add(true, "memory", "2M", "allocator=zstd").did = "zstd"
	add(true, "data", "size=2M", "1 2 3 @1048576 ( 0x55 0xAA )*2000 \"text\"")
	add(true, "data", "( @0x8000 <DIR/disk[:4096] )*2", "size=1M").did = "from a file"
	add(false, "pattern", "3M")
	add(true, "null", "1M")
	add(true, "ones", "1M", "byte=0x41")
	add(false, "zero")
	add(true, "full", "1M")
	add(false, "random", "1M", "seed=5")
	add(false, "sparse-random", "16M", "seed=5", "percent=10")
	add(true, "split", "DIR/disk", "DIR/disk2")
	add(true, "partitioning", "DIR/disk", "DIR/disk2")
	add(false, "floppy", m.tree, "label=TESTS")
	add(false, "floppy", m.tree, "size=40M").did = "with size="
	add(false, "iso", m.tree, "prog=xorriso", "params=-quiet -R -V TESTS --set_all_file_dates 2001090901463300")
	content(add(false, "linuxdisk", m.tree, "type=ext4", "size=32M"), "read, file system checked",
		func(t *testing.T, s *server, disk string) string {
			b, err := os.ReadFile(disk)
			if err != nil {
				t.Fatal(err)
			}
			fs := filepath.Join(s.dir, "fs")
			if err := os.WriteFile(fs, b[1<<20:len(b)-1<<20+1<<19], 0o644); err != nil {
				t.Fatal(err)
			}
			file := filepath.Join(s.dir, "three.bin")
			command(t, "debugfs", "-R", "dump three.bin "+file, fs)
			return digest(t, file) + fmt.Sprintln(len(b)) + command(t, "nbdinfo", "--json", "--no-content", s.uri(""))
		})
	add(true, "tmpdisk", "1M", fixedDisk)
	content(add(false, "tmpdisk", "8M", "type=ext4", "label=TESTS"), "ext4", func(t *testing.T, s *server, disk string) string {
		command(t, "e2fsck", "-fn", disk)
		return command(t, "nbdinfo", "--json", "--no-content", s.uri(""))
	})
	ondemand := add(true, "ondemand", "dir=DIR/many", "wait=true", "1M", fixedDisk)
	ondemand.client = func(t *testing.T, s *server) string {
		return explore(t, s, "a", true) + explore(t, s, "new", true) + command(t, "nbdinfo", "--list", s.uri(""))
	}
	info := add(false, "info", "exportname")
	info.client = func(t *testing.T, s *server) string { return explore(t, s, "some-name", false) }
	add(false, "info", "base64exportname").client = func(t *testing.T, s *server) string {
		return explore(t, s, "aGVsbG8gd29ybGQ=", false)
	}
	cases[len(cases)-1].did = "base64"
	address := add(false, "info", "address")
	address.tcp, address.did = true, "address"
	address.client = func(t *testing.T, s *server) string {
		// The client's port is another each time.
		out := command(t, "nbdcopy", s.uri(""), "-")
		return out[:strings.LastIndex(out, ":")]
	}
	add(false, "example1")
	add(true, "example2", "file=DIR/disk")
	add(true, "example3", "size=1M")
	add(true, "example4", "size=1048576")
	curl := add(false, "curl", services.http+"/disk", "header=X-Tests: one", "cookie=a=b", "user=tests", "password=secret")
	curl.did = "read, map, headers, cookie and password sent"
	add(false, "curl", services.http+"/disk", "header-script=echo X-Tests: one", "cookie-script=echo a=b", "user=tests",
		"password=+DIR/password").setup = func(t *testing.T, dir string) {
		disk(t, dir)
		writeFile(t, filepath.Join(dir, "password"), "secret\n", 0o600)
	}
	cases[len(cases)-1].did = "header and cookie scripts, password file"
	add(true, "ssh", "host=127.0.0.1", "port="+services.sshPort, "user=root", "identity="+services.sshKey,
		"known-hosts="+services.knownHosts, "path=DIR/disk")
	backend := start(t, nbdkit, tempDir(t), false, "memory", "2M")
	add(false, "-r", "nbd", "uri="+backend.uri(""))
	// Each of them starts with what the last one left: both servers write the same.
	for _, shared := range []string{"shared=false", "shared=true"} {
		add(true, "nbd", "command="+nbdkit, "arg=memory", "arg=2M", shared).did = "write, its own server, " + shared
	}
	shell := filepath.Join(scratch, "language", "disk.sh")
	add(true, "sh", shell, "file=DIR/disk")
	add(true, "eval", "get_size=echo 1M", "pread=dd if=DIR/disk skip=$4 count=$3 iflag=count_bytes,skip_bytes status=none",
		"pwrite=dd of=DIR/disk conv=notrunc seek=$4 oflag=seek_bytes status=none", "extents=echo 0 512k; echo 512k 512k hole")
	add(false, "cdi", "DIR/disk").did = "read, map, with stand-ins for podman and jq"
	add(true, "gcs", "bucket=DIR/many", "key=object", "size=2M", "object-size=64K").did = "read, write, map, with a stand-in for Google's library"
	add(true, "vram", "2M").did = "read, write, map, with pocl for a graphics card"
	torrent := add(false, "torrent", "DIR/disk.torrent", "listen-interfaces=127.0.0.1:0")
	torrent.setup = func(t *testing.T, dir string) {
		disk(t, dir)
		writeFile(t, filepath.Join(dir, "disk.torrent"), services.torrent, 0o644)
	}
	torrent.client = func(t *testing.T, s *server) string {
		// What has only just arrived reads as zeroes now and then, under nbdkit too; and now and then
		// nothing arrives, for ever.
		for tries := 1; ; tries++ {
			ctx, cancel := context.WithTimeout(t.Context(), patience/6)
			err := exec.CommandContext(ctx, "nbdcopy", s.uri(""), "null:").Run()
			cancel()
			if err == nil {
				break
			}
			if tries == 3 {
				t.Fatalf("nbdcopy: %v, three times", err)
			}
			t.Logf("%s: nbdcopy: %v: starting it again", s.program, err)
			s.kill()
			s = start(t, s.program, s.dir, false, s.args...)
		}
		result := explore(t, s, "", false)
		s.stop()
		return result
	}
	add(false, "libvirt", "connect="+services.libvirt, "domain=tests", "disk=vda")
	// Each connection boots a virtual machine.
	guestfs := add(true, "guestfs", "format=raw", "disk=DIR/disk", "export=/dev/sda")
	guestfs.did = "read, write"
	guestfs.client = func(t *testing.T, s *server) string { return script(t, s, "", "WRITE = CACHE = True\n"+session) }
	add(true, "blkio", "io_uring", "path=DIR/disk")
	add(false, "S3", "endpoint-url="+services.http, "bucket=bucket", "key=disk", "access-key=tests", "secret-key=secret")
	return cases
}

// testPlugins serves, with each release's own plugins, everything that can be
// served without a network.
func testPlugins(t *testing.T) {
	languageFiles(t)
	services := startServices(t)
	cases := pluginCases(t, services)
	for _, r := range releases(t) {
		for i, c := range cases {
			t.Run(fmt.Sprintf("%s/%s-%d", r.name, c.plugin, i), func(t *testing.T) {
				t.Parallel()
				if !r.has(c.plugin) {
					t.Skip("not in this release")
				}
				r.same(t, c.scenario)
				pluginTable.record(t, c.plugin, r.name, i, c.did)
			})
		}
	}
}
