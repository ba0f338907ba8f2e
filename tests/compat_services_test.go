package tests

import (
	"crypto/sha1"
	"crypto/sha256"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// services are the servers that some plugins are clients of.
type services struct {
	http                        string // URL
	sshPort, sshKey, knownHosts string
	libvirt                     string // URI
	torrent                     string // what a file.torrent says
}

func startServices(t *testing.T) *services {
	t.Helper()
	s := &services{}
	s.startWeb(t)
	s.startSSH(t)
	s.startLibvirt(t)
	makeAppliance(t)
	return s
}

// startWeb serves a disk to the curl plugin, a bucket to S3, and to torrent what it
// finds nowhere else.
func (s *services) startWeb(t *testing.T) {
	t.Helper()
	// More than one request of a client in size, and compressible.
	disk := strings.NewReader(strings.Repeat("0123456789abcdef\n", 200_000))
	etag := fmt.Sprintf(`"%x"`, sha256.Sum256([]byte("disk")))
	mux := http.NewServeMux()
	mux.HandleFunc("/disk", func(w http.ResponseWriter, q *http.Request) {
		user, password, _ := q.BasicAuth()
		if cookie, err := q.Cookie("a"); err != nil || cookie.Value != "b" || q.Header.Get("X-Tests") != "one" ||
			user != "tests" || password != "secret" {
			http.Error(w, "not what the plugin was told to send", http.StatusForbidden)
			return
		}
		http.ServeContent(w, q, "", time.Unix(1e9, 0), io.NewSectionReader(disk, 0, disk.Size()))
	})
	// The objects of a bucket are read with ranges, like any file.
	mux.HandleFunc("/bucket/disk", func(w http.ResponseWriter, q *http.Request) {
		w.Header().Set("ETag", etag)
		http.ServeContent(w, q, "", time.Unix(1e9, 0), io.NewSectionReader(disk, 0, disk.Size()))
	})
	web := httptest.NewServer(mux)
	t.Cleanup(web.Close)

	s.http = web.URL

	const piece = 64 << 10
	mux.HandleFunc("/torrent.iso", func(w http.ResponseWriter, q *http.Request) {
		http.ServeContent(w, q, "", time.Unix(1e9, 0), io.NewSectionReader(disk, 0, disk.Size()))
	})
	var pieces strings.Builder
	for at := int64(0); at < disk.Size(); at += piece {
		b, err := io.ReadAll(io.NewSectionReader(disk, at, piece))
		if err != nil {
			t.Fatal(err)
		}
		sum := sha1.Sum(b)
		pieces.Write(sum[:])
	}
	url := web.URL + "/torrent.iso"
	s.torrent = fmt.Sprintf("d4:infod6:lengthi%de4:name8:disk.iso12:piece lengthi%de6:pieces%d:%s7:privatei1ee8:url-list%d:%se",
		disk.Size(), piece, pieces.Len(), pieces.String(), len(url), url)
}

// startSSH starts the middle release's sshd, which all libssh here can talk to.
func (s *services) startSSH(t *testing.T) {
	t.Helper()
	r := releases(t)[1]
	dir := tempDir(t)
	s.sshKey = filepath.Join(dir, "key")
	host := filepath.Join(dir, "host")
	for _, key := range []string{s.sshKey, host} {
		command(t, r.enter, "ssh-keygen", "-q", "-t", "ecdsa", "-m", "PEM", "-N", "", "-f", key)
	}
	_, s.sshPort, _ = net.SplitHostPort(freePort(t))
	public, err := os.ReadFile(host + ".pub")
	if err != nil {
		t.Fatal(err)
	}
	s.knownHosts = filepath.Join(dir, "known_hosts")
	writeFile(t, s.knownHosts, fmt.Sprintf("[127.0.0.1]:%s %s", s.sshPort, public), 0o600)
	config := filepath.Join(dir, "sshd_config")
	writeFile(t, config, "ListenAddress 127.0.0.1:"+s.sshPort+"\nHostKey "+host+"\nAuthorizedKeysFile "+s.sshKey+".pub\n"+
		"StrictModes no\nUsePAM no\nPidFile none\nPermitRootLogin yes\nSubsystem sftp internal-sftp\nMaxStartups 100\nPerSourcePenalties no\n", 0o600)
	if err := os.MkdirAll(filepath.Join(r.tree, "run/sshd"), 0o755); err != nil {
		t.Fatal(err)
	}
	startService(t, exec.Command(r.enter, "/usr/sbin/sshd", "-D", "-e", "-f", config), "listening on")
}

// startLibvirt starts a daemon of a user's own, which knows a machine with a disk.
func (s *services) startLibvirt(t *testing.T) {
	t.Helper()
	// Not in scratch, where root alone may look.
	dir, err := os.MkdirTemp("", "nbdhost-libvirt-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	const nobody = 65534
	config, disk, machine := filepath.Join(dir, "conf"), filepath.Join(dir, "disk"), filepath.Join(dir, "machine")
	writeFile(t, config, fmt.Sprintf("unix_sock_dir = %q\nauth_unix_rw = \"none\"\nauth_unix_ro = \"none\"\n"+
		"log_outputs = \"1:stderr\"\nlog_filters = \"1:rpc.netdaemon 4:*\"\n", dir), 0o644)
	writeFile(t, disk, strings.Repeat("a disk of a machine\n", 1<<20/16), 0o644)
	if err := os.Chown(dir, nobody, nobody); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("/usr/sbin/libvirtd", "-f", config, "-p", filepath.Join(dir, "pid"))
	cmd.Env = append(os.Environ(), "HOME="+dir, "XDG_RUNTIME_DIR="+dir)
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: nobody, Gid: nobody}}
	startService(t, cmd, "virNetDaemonRun")

	s.libvirt = "qemu+unix:///session?socket=" + filepath.Join(dir, "libvirt-sock")
	writeFile(t, machine, "<domain type='qemu'><name>tests</name><memory>1024</memory><os><type arch='x86_64'>hvm</type></os>"+
		"<devices><disk type='file' device='disk'><driver name='qemu' type='raw'/><source file='"+disk+"'/>"+
		"<target dev='vda' bus='virtio'/></disk></devices></domain>", 0o644)
	command(t, "virsh", "-c", s.libvirt, "define", machine)
}

// makeAppliance makes the virtual machine that the guestfs plugin boots, where every
// release finds it.
func makeAppliance(t *testing.T) {
	t.Helper()
	kernelPackages(t)
	dir := filepath.Join(scratch, "appliance")
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	command(t, "./appliance.sh", kernelCache(t), dir)
}

// startService starts a program, and returns when it has said on its standard error
// that it serves.
func startService(t *testing.T, cmd *exec.Cmd, serves string) {
	t.Helper()
	if cmd.SysProcAttr == nil {
		cmd.SysProcAttr = &syscall.SysProcAttr{}
	}
	cmd.SysProcAttr.Setpgid, cmd.SysProcAttr.Pdeathsig = true, syscall.SIGKILL
	stderr, err := cmd.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
	})
	said := make(chan string)
	go func() {
		var all strings.Builder
		buf := make([]byte, 4096)
		for !strings.Contains(all.String(), serves) {
			n, err := stderr.Read(buf)
			all.Write(buf[:n])
			if err != nil {
				break
			}
		}
		said <- all.String()
		io.Copy(io.Discard, stderr)
	}()
	if out := <-said; !strings.Contains(out, serves) {
		t.Fatalf("start %s: %s", cmd.Path, out)
	}
}

// standIns do for the cdi plugin what podman and jq do, which would need a registry:
// the image is a file, and its only layer has the same bytes.
var standIns = map[string]string{
	"podman": `case $1 in
pull) test -f "$2" ;;
save) mkdir "$5"; cp "$6" "$5/0123"; echo '{"layers":[{"digest":"sha256:0123"}]}' >"$5/manifest.json" ;;
esac
`,
	"jq": `sed 's/.*"digest":"\([^"]*\)".*/\1/'
`,
}

// makeStandIns puts them, and the one for Google's library, where every release
// finds them.
func makeStandIns() error {
	bin := filepath.Join(scratch, "bin")
	if err := os.Mkdir(bin, 0o755); err != nil {
		return err
	}
	for name, script := range standIns {
		if err := os.WriteFile(filepath.Join(bin, name), []byte("#!/bin/sh -e\n"+script), 0o755); err != nil {
			return err
		}
	}
	return os.CopyFS(filepath.Join(scratch, "python"), os.DirFS("fixtures/gcs"))
}
