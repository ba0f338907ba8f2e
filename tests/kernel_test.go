package tests

import (
	"bytes"
	"compress/gzip"
	"context"
	"debug/elf"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"nbdhost/tests/pki"
)

// kernelScript runs as the first process of a virtual machine whose kernel is
// Debian's. Each line that begins with "ok" is wanted.
const kernelScript = `#!/bin/busybox sh
/bin/busybox --install -s /bin
export PATH=/bin:/sbin:/usr/bin:/usr/sbin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mount -t tmpfs tmp /tmp
for m in $(cat /modules); do insmod $m || echo "insmod $m failed"; done
ip link set lo up
check() { "$@" >/tmp/out 2>&1 && echo "ok $1 $2" || { echo "not ok: $*"; cat /tmp/out; }; }
until_gone() { while grep -q . /sys/block/$1/pid 2>/dev/null; do usleep 10000; done; }
size() { cat /sys/block/$1/size; }

# A Unix socket, a disk that is kept.
nbdhost -f -P /tmp/pid1 -U /tmp/sock memory 64M & server=$!
while [ ! -s /tmp/pid1 ]; do usleep 10000; done
check nbd-client -unix /tmp/sock /dev/nbd0 -b 512
[ "$(size nbd0)" = 131072 ] && echo "ok size"
check mkfs.ext4 -q /dev/nbd0
mkdir /mnt
check mount /dev/nbd0 /mnt
dd if=/dev/urandom of=/mnt/data bs=64k count=200 2>/dev/null
md5sum </mnt/data >/tmp/sum1
check sync
check fstrim /mnt
check umount /mnt
check fsck.ext4 -f -n /dev/nbd0
check nbd-client -d /dev/nbd0
until_gone nbd0
check nbd-client -unix /tmp/sock /dev/nbd0
check mount /dev/nbd0 /mnt
md5sum </mnt/data >/tmp/sum2
cmp /tmp/sum1 /tmp/sum2 && echo "ok same data"
check umount /mnt
check nbd-client -d /dev/nbd0
until_gone nbd0
kill $server; wait $server && echo "ok server ended"

# TCP, two connections, a disconnect while a write is under way.
nbdhost -f -P /tmp/pid2 -i 127.0.0.1 -p 10809 memory 64M & server=$!
while [ ! -s /tmp/pid2 ]; do usleep 10000; done
check nbd-client 127.0.0.1 10809 /dev/nbd1 -C 2
dd if=/dev/urandom of=/tmp/image bs=64k count=100 2>/dev/null
check dd if=/tmp/image of=/dev/nbd1 bs=64k oflag=direct
check sync
echo 3 >/proc/sys/vm/drop_caches
dd if=/dev/nbd1 bs=64k count=100 2>/dev/null | cmp - /tmp/image && echo "ok same image"
dd if=/dev/zero of=/dev/nbd1 bs=64k count=1000 2>/dev/null &
writer=$!
check nbd-client -d /dev/nbd1
wait $writer
until_gone nbd1
check nbd-client 127.0.0.1 10809 /dev/nbd1 -C 2
dd if=/dev/nbd1 bs=512 count=1 >/dev/null 2>&1 && echo "ok again"
check nbd-client -d /dev/nbd1
until_gone nbd1
kill $server; wait $server && echo "ok server ended too"

# A read-only export.
nbdhost -f -r -P /tmp/pid3 -U /tmp/sock3 memory 1M & server=$!
while [ ! -s /tmp/pid3 ]; do usleep 10000; done
check nbd-client -unix /tmp/sock3 /dev/nbd2
[ "$(cat /sys/block/nbd2/ro)" = 1 ] && echo "ok read-only"
check nbd-client -d /dev/nbd2
until_gone nbd2
kill $server; wait $server

# Who the client is: SELinux without a policy has one label for all.
nbdhost -f -r -P /tmp/pid5 -U /tmp/sock5 /lib/peer.so & server=$!
while [ ! -s /tmp/pid5 ]; do usleep 10000; done
check nbd-client -unix /tmp/sock5 /dev/nbd2
sed -n 's/^label=/ok label /p' /dev/nbd2
check nbd-client -d /dev/nbd2
until_gone nbd2
kill $server; wait $server

# vsock, if the server has it, through the loopback of this machine.
if nbdhost -f -P /tmp/pid4 --vsock --port 10810 memory 1M & server=$!; then
  while [ ! -s /tmp/pid4 ] && kill -0 $server 2>/dev/null; do usleep 10000; done
  kill -0 $server && vsock-client nbd+vsock://1:10810 && echo "ok vsock"
  kill $server; wait $server
fi

# TLS over vsock.
nbdhost -f -P /tmp/pid6 --vsock --port 10811 --tls=require --tls-certificates=/tls memory 1M & server=$!
while [ ! -s /tmp/pid6 ] && kill -0 $server 2>/dev/null; do usleep 10000; done
check vsock-client 'nbds+vsock://1:10811/?tls-certificates=/tls'
kill $server; wait $server
echo "the end"
poweroff -f
`

// kernelModules are what the script needs that Debian's kernel has as modules, in
// the order in which they can be loaded.
var kernelModules = []string{
	"crc16", "crc32c_generic", "libcrc32c", "mbcache", "jbd2", "ext4", "nbd", "vsock", "vmw_vsock_virtio_transport_common", "vsock_loopback",
}

// TestKernel lets the client of the Linux kernel use a server, in a virtual machine
// without acceleration: over a Unix socket with a file system on it, over TCP with
// two connections and a disconnect in the middle. Over vsock the client is package client,
// without and with TLS.
func TestKernel(t *testing.T) {
	if testing.Short() {
		t.Skip("short: no virtual machine")
	}
	t.Parallel()
	packages := kernelPackages(t)
	dir := tempDir(t)
	root := filepath.Join(dir, "root")
	program := nbdhost
	if raceEnabled || asanEnabled {
		// The virtual machine is too slow and too small for them.
		program = filepath.Join(dir, "nbdhost")
		command(t, "go", "build", "-o", program, "nbdhost/cmd/nbdhost")
	}
	vmlinuz := makeRoot(t, packages, program, root)
	initrd := filepath.Join(dir, "initrd")
	makeInitrd(t, root, initrd)

	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	defer cancel()
	vm := exec.CommandContext(ctx, "qemu-system-x86_64", "-accel", "tcg", "-cpu", "max", "-m", "768", "-nographic", "-no-reboot",
		"-kernel", vmlinuz, "-initrd", initrd, "-append", "console=ttyS0 panic=-1 quiet security=selinux", "-net", "none")
	out, err := vm.CombinedOutput()
	text := strings.ReplaceAll(string(out), "\r", "")
	if err != nil || !strings.Contains(text, "\nthe end") {
		t.Fatalf("%v\n%s", err, text)
	}
	for _, want := range []string{
		"ok size", "ok mkfs.ext4", "ok mount", "ok sync", "ok fstrim", "ok umount", "ok fsck.ext4", "ok same data", "ok server ended\n",
		"ok same image", "ok again", "ok server ended too", "ok read-only", "ok label kernel", "ok vsock\n", "ok vsock-client nbds+vsock",
	} {
		if !strings.Contains(text, "\n"+want) {
			t.Errorf("the kernel's client: got no %q", want)
		}
	}
	if strings.Contains(text, "not ok") {
		t.Error("the kernel's client: something failed")
	}
	if t.Failed() {
		t.Log(text)
	}
}

// kernelPackages returns a directory with Debian's kernel and programs unpacked. It
// is kept outside the checkout and made where it is missing; where it cannot be
// made the test is skipped.
func kernelPackages(t *testing.T) string {
	t.Helper()
	cache := kernelCache(t)
	out, err := exec.Command("./kernel.sh", cache).CombinedOutput()
	if err != nil {
		t.Skipf("get the kernel's packages: %v\n%s", err, out)
	}
	return filepath.Join(cache, "root")
}

// kernelCache is where kernel.sh keeps what it has fetched.
func kernelCache(t *testing.T) string {
	t.Helper()
	cache, err := os.UserCacheDir()
	if err != nil {
		t.Fatal(err)
	}
	return filepath.Join(cache, "nbdhost-kernel")
}

// makeRoot puts together what the virtual machine sees, and returns the kernel.
func makeRoot(t *testing.T, packages, program, root string) (vmlinuz string) {
	t.Helper()
	kernels, err := filepath.Glob(filepath.Join(packages, "boot/vmlinuz-*"))
	if err != nil || len(kernels) == 0 {
		t.Fatalf("find kernel in %s: %v", packages, err)
	}
	vmlinuz = kernels[len(kernels)-1]
	install := func(from, to string) {
		t.Helper()
		to = filepath.Join(root, to)
		if err := os.MkdirAll(filepath.Dir(to), 0o755); err != nil {
			t.Fatal(err)
		}
		b, err := os.ReadFile(from)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(to, b, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	client := filepath.Join(root, "bin/vsock-client")
	if err := os.MkdirAll(filepath.Dir(client), 0o755); err != nil {
		t.Fatal(err)
	}
	build := exec.Command("go", "build", "-o", client, "nbdhost/tests/vsock")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v: %v\n%s", build, err, out)
	}
	install(filepath.Join(packages, "bin/busybox"), "bin/busybox")
	install(program, "bin/nbdhost")
	install(fixture(t, "peer"), "lib/peer.so")
	memory := "/usr/lib/x86_64-linux-gnu/nbdkit/plugins/nbdkit-memory-plugin.so"
	install(memory, memory)
	programs := map[string]string{
		"usr/sbin/nbd-client": filepath.Join(packages, "usr/sbin/nbd-client"),
		"sbin/mkfs.ext4":      "/usr/sbin/mkfs.ext4",
		"sbin/fsck.ext4":      "/usr/sbin/fsck.ext4",
		"sbin/fstrim":         "/usr/sbin/fstrim",
	}
	if _, err := os.Stat(programs["usr/sbin/nbd-client"]); err != nil {
		programs["usr/sbin/nbd-client"] = filepath.Join(packages, "sbin/nbd-client")
	}
	libraries := map[string]bool{}
	for to, from := range programs {
		install(from, to)
		needs(t, from, packages, libraries)
	}
	needs(t, program, packages, libraries)
	needs(t, memory, packages, libraries)
	for lib := range libraries {
		install(lib, filepath.Join("lib/x86_64-linux-gnu", filepath.Base(lib)))
	}
	install("/lib64/ld-linux-x86-64.so.2", "lib64/ld-linux-x86-64.so.2")

	var list []string
	for _, name := range kernelModules {
		var found string
		filepath.WalkDir(filepath.Join(packages, "lib/modules"), func(path string, _ fs.DirEntry, _ error) error {
			if strings.TrimSuffix(strings.ReplaceAll(filepath.Base(path), "-", "_"), ".ko") == name {
				found = path
			}
			return nil
		})
		if found != "" { // else it is built in
			install(found, "lib/modules/"+filepath.Base(found))
			list = append(list, "/lib/modules/"+filepath.Base(found))
		}
	}
	ca := pki.NewAuthority(t, "Authority")
	ca.WriteServer(filepath.Join(root, "tls"), ca.Server())
	for name, text := range map[string]string{"init": kernelScript, "modules": strings.Join(list, "\n")} {
		if err := os.WriteFile(filepath.Join(root, name), []byte(text), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for _, d := range []string{"proc", "sys", "dev", "tmp", "etc", "var/run", "run"} {
		if err := os.MkdirAll(filepath.Join(root, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	return vmlinuz
}

// needs adds the shared libraries that a file needs, and those need in turn.
func needs(t *testing.T, path, packages string, found map[string]bool) {
	t.Helper()
	f, err := elf.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	libs, err := f.ImportedLibraries()
	if err != nil {
		t.Fatal(err)
	}
	for _, lib := range libs {
		for _, dir := range []string{"/lib/x86_64-linux-gnu", "/usr/lib/x86_64-linux-gnu", packages + "/lib/x86_64-linux-gnu", packages + "/usr/lib/x86_64-linux-gnu"} {
			p := filepath.Join(dir, lib)
			if _, err := os.Stat(p); err == nil {
				if !found[p] {
					found[p] = true
					needs(t, p, packages, found)
				}
				break
			}
		}
	}
}

// makeInitrd packs root for the kernel: a compressed archive of cpio's "newc".
func makeInitrd(t *testing.T, root, to string) {
	t.Helper()
	var b bytes.Buffer
	z, err := gzip.NewWriterLevel(&b, gzip.BestSpeed)
	if err != nil {
		t.Fatal(err)
	}
	pad := func(n int) { z.Write(make([]byte, -n&3)) }
	inode := 0
	entry := func(name string, mode uint32, data []byte) {
		inode++
		h := fmt.Sprintf("070701%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x", inode, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(name)+1, 0)
		z.Write([]byte(h + name + "\x00"))
		pad(len(h) + len(name) + 1)
		z.Write(data)
		pad(len(data))
	}
	err = filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil || path == root {
			return err
		}
		name := strings.TrimPrefix(path, root+"/")
		if d.IsDir() {
			entry(name, 0o040755, nil)
			return nil
		}
		data, err := os.ReadFile(path)
		entry(name, 0o100755, data)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	entry("TRAILER!!!", 0, nil)
	if err := z.Close(); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(to, b.Bytes(), 0o600); err != nil {
		t.Fatal(err)
	}
}
