package deploy

import (
	"fmt"
	"os"
	"strconv"
	"strings"
	"testing"
)

// debian is a clean tree of Debian 12.
const debian = "docker.io/library/debian:bookworm-slim"

// TestDeb builds the package, installs it where nothing but Debian's essential packages
// is, uses it, and removes it.
func TestDeb(t *testing.T) {
	dir := t.TempDir()
	deb := run(t, "./deb.sh", dir)
	if again := run(t, "./deb.sh", t.TempDir()); run(t, "cat", deb) != run(t, "cat", again) {
		t.Error("built twice, the packages differ")
	}
	version := strings.TrimPrefix(run(t, nbdhost, "--version"), "nbdhost ")
	script := `set -e
files() { find / -xdev -path /var/lib/dpkg -prune -o -path /var/log -prune -o -path /var/cache -prune -o -print | sort; }
say() { echo "== $1"; }
touch /tmp/before /tmp/after; files >/tmp/before
# The tree is without documentation.
dpkg --path-include='/usr/share/doc/*' --path-include='/usr/share/man/*' -i /deb/*.deb >/dev/null
say version; nbdhost --version
say list; dpkg -L nbdhost
say verify; dpkg -V nbdhost
say libraries; ldd /usr/bin/nbdhost | grep 'not found' || true
say man; zcat /usr/share/man/man1/nbdhost.1.gz | sed -n 1p
say copyright; grep -c '^The program contains' /usr/share/doc/nbdhost/copyright
say bash; bash -n /usr/share/bash-completion/completions/nbdhost && echo fine
dpkg -P nbdhost >/dev/null
say left; files >/tmp/after; diff /tmp/before /tmp/after || true
say status; dpkg -s nbdhost 2>&1 | grep -c 'is not installed' || true
`
	out := containers(t, "podman", "run", "--rm", "--network=none", "-v", dir+":/deb:ro", debian, "sh", "-c", script)
	parts := map[string]string{}
	for part := range strings.SplitSeq(out, "== ") {
		title, text, _ := strings.Cut(part, "\n")
		parts[title] = strings.TrimSpace(text)
	}
	for title, want := range map[string]string{
		"version": "nbdhost " + version, "verify": "", "libraries": "", "bash": "fine", "left": "", "status": "1",
	} {
		if got, ok := parts[title]; !ok || got != want {
			t.Errorf("%s: got %q, need %q", title, got, want)
		}
	}
	for _, path := range []string{
		"/etc/nbdhost", "/usr/bin/nbdhost", "/usr/lib/systemd/system/nbdhost@.service", "/usr/lib/systemd/system/nbdhost@.socket",
		"/usr/share/bash-completion/completions/nbdhost", "/usr/share/doc/nbdhost/changelog.gz", "/usr/share/doc/nbdhost/copyright",
		"/usr/share/doc/nbdhost/examples/example.args", "/usr/share/fish/vendor_completions.d/nbdhost.fish",
		"/usr/share/man/man1/nbdhost.1.gz", "/usr/share/zsh/vendor-completions/_nbdhost",
	} {
		if !strings.Contains(parts["list"]+"\n", path+"\n") {
			t.Errorf("%s is not in the package:\n%s", path, parts["list"])
		}
	}
	if want := `.TH NBDHOST 1 `; !strings.HasPrefix(parts["man"], want) {
		t.Errorf("man: got %q, need %q", parts["man"], want)
	}
	// One licence for each module that is linked in, and Go's.
	modules := 1 + strings.Count(run(t, "go", "version", "-m", nbdhost), "\n\tdep\t")
	if got := parts["copyright"]; got != strconv.Itoa(modules) {
		t.Errorf("copyright: got %s licences, need %d", got, modules)
	}
}

// TestDebSystemd installs the package where systemd runs, in a container, and starts
// servers with its units: as the user and with the rights that these say.
func TestDebSystemd(t *testing.T) {
	const image = "localhost/nbdhost-systemd"
	containers(t, "buildah", "bud", "--isolation", "chroot", "--format", "docker", "--pull-never", "--layers", "--quiet",
		"--tag", image, "systemd")
	dir := t.TempDir()
	run(t, "./deb.sh", dir)
	name := fmt.Sprintf("nbdhost-test-%d-systemd", os.Getpid())
	t.Cleanup(func() { containers(t, "podman", "rm", "-f", "-t", "0", name) })
	containers(t, "podman", "run", "-d", "--name", name, "--systemd=always", "--network=none",
		"--cap-add=SYS_ADMIN", "--security-opt=seccomp=unconfined", "-v", dir+":/deb:ro", image)
	in := func(script string) string {
		t.Helper()
		return containers(t, "podman", "exec", name, "sh", "-ec", script)
	}
	t.Cleanup(func() {
		if t.Failed() {
			t.Log(in("journalctl --no-pager --lines=60"))
		}
	})
	const links = "find /etc/systemd -name 'nbdhost@*'"
	property := func(unit, name string) string {
		t.Helper()
		return in("systemctl show --property=" + name + " --value nbdhost@" + unit)
	}
	await(t, "systemd", func() bool {
		_, err := try(t, "./containers.sh", "podman", "exec", name, "systemctl", "is-system-running", "--wait")
		return err == nil
	})
	// Services get their credentials by mounts that must be seen in their namespaces.
	in("mount --make-rshared / && dpkg -i /deb/*.deb >/dev/null")

	// One server that the first client of a socket starts, and one that makes its own.
	in(`umask 077
printf '%s\n' --exportname=disk memory 64M >/etc/nbdhost/disk.args
printf '%s\n' --unix=/run/nbdhost/own/sock ondemand dir=/var/lib/nbdhost/own size=1G 'command=truncate -s $size "$disk"' >/etc/nbdhost/own.args
systemctl --quiet enable --now nbdhost@disk.socket
systemctl --quiet start nbdhost@own`)
	if got := property("disk.service", "ActiveState"); got != "inactive" {
		t.Errorf("before the first client: got the service %s, need inactive", got)
	}
	sockets := map[string]string{"disk": "/run/nbdhost/disk.sock", "own": "/run/nbdhost/own/sock"}
	sizes := map[string]string{"disk": "67108864", "own": "1073741824"}
	for unit, socket := range sockets {
		if got := in("nbdinfo --size '" + uri(socket) + "'"); got != sizes[unit] {
			t.Errorf("%s: got size %s, need %s", unit, got, sizes[unit])
		}
		if got := property(unit+".service", "ActiveState"); got != "active" {
			t.Errorf("%s: got state %s, need active", unit, got)
		}
		status := in("cat /proc/" + property(unit+".service", "MainPID") + "/status")
		for _, want := range []string{"CapBnd:\t0000000000000000\n", "NoNewPrivs:\t1\n", "Seccomp:\t2\n"} {
			if !strings.Contains(status, want) {
				t.Errorf("%s: got\n%s\nneed %q", unit, status, want)
			}
		}
		if strings.Contains(status, "Uid:\t0\t") {
			t.Errorf("%s: the server runs as root", unit)
		}
	}
	in("nbdcopy /usr/bin/nbdinfo '" + uri(sockets["own"]) + "' && test -s /var/lib/private/nbdhost/own/default")

	// A server that crashes is started again; the socket stays.
	before := property("disk.service", "MainPID")
	in("kill -SEGV " + before)
	await(t, "the restart", func() bool {
		pid := property("disk.service", "MainPID")
		return pid != "0" && pid != before && property("disk.service", "ActiveState") == "active"
	})
	if got := in("nbdinfo --size '" + uri(sockets["disk"]) + "'"); got != sizes["disk"] {
		t.Errorf("after the restart: got size %s, need %s", got, sizes["disk"])
	}

	await(t, "the server's word about its status", func() bool { return property("own.service", "StatusText") != "" })
	in("systemctl --quiet disable --now nbdhost@disk.socket nbdhost@disk.service")
	for unit, want := range map[string]string{"disk.socket": "inactive", "disk.service": "inactive", "own.service": "active"} {
		if got := property(unit, "ActiveState"); got != want {
			t.Errorf("%s: got state %s, need %s", unit, got, want)
		}
	}
	if got := property("disk.service", "Result"); got != "success" {
		t.Errorf("stop: got result %s, need success", got)
	}
	in("systemctl --quiet enable nbdhost@own.service nbdhost@disk.socket && test -n \"$(" + links + ")\"")
	in("dpkg -r nbdhost 2>/dev/null >/dev/null")
	if got := property("own.service", "ActiveState"); got != "inactive" {
		t.Errorf("after the package has been removed: got state %s, need inactive", got)
	}
	if got := in("ls -A /run/nbdhost 2>/dev/null || true"); got != "" {
		t.Errorf("after the package has been removed: got %s in /run/nbdhost", got)
	}
	in("dpkg -P nbdhost 2>/dev/null >/dev/null")
	if got := in(links); got != "" {
		t.Errorf("after the package has been purged: got %s", got)
	}
}
