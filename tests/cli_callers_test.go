package tests

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"nbdhost/client"
)

// These tests start the program as its callers start nbdkit, by a link of that
// name and with their command lines.

// A called program runs until stop, or until the test ends and kills it.
type called struct {
	*exec.Cmd
	t      *testing.T
	stderr string // the file that has it
	exited chan struct{}
	err    error
}

// call starts a program and returns when pidfile is there: that is what callers
// wait for. files are its descriptors from 3 on.
func call(t *testing.T, pidfile, program string, files []*os.File, args ...string) *called {
	t.Helper()
	dir := filepath.Dir(pidfile)
	ready, err := newWatch(dir, filepath.Base(pidfile))
	if err != nil {
		t.Fatal(err)
	}
	defer ready.Close()
	c := &called{Cmd: exec.Command(program, args...), t: t, stderr: filepath.Join(dir, "stderr"), exited: make(chan struct{})}
	stderr, err := os.Create(c.stderr)
	if err != nil {
		t.Fatal(err)
	}
	defer stderr.Close()
	c.Stderr, c.ExtraFiles = stderr, files
	c.Env = append(os.Environ(), "LC_ALL=C", "TMPDIR="+dir)
	c.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		c.err = c.Wait()
		close(c.exited)
		ready.Close()
	}()
	t.Cleanup(func() {
		syscall.Kill(-c.Process.Pid, syscall.SIGKILL) // an error: it has ended
		<-c.exited
	})
	if err := ready.wait(); err != nil {
		t.Fatalf("%s %q: no pidfile: %v, %v\n%s", program, args, err, c.err, c.said())
	}
	return c
}

func (c *called) said() string {
	b, _ := os.ReadFile(c.stderr)
	return string(b)
}

// stop ends the program with a signal, and wants it to end well.
func (c *called) stop(s syscall.Signal) {
	c.t.Helper()
	if err := c.Process.Signal(s); err != nil {
		c.t.Fatal(err)
	}
	select {
	case <-c.exited:
	case <-time.After(patience):
		c.t.Fatalf("%v: it is still there", s)
	}
	if c.err != nil {
		c.t.Errorf("%v: %v\n%s", s, c.err, c.said())
	}
}

// KubeVirt's importer reads a disk from a web server, with a password that it
// hands over in a pipe.
func TestCallerImporter(t *testing.T) {
	link := asNbdkit(t)
	dir := tempDir(t)
	disk := bytes.Repeat([]byte("importer"), 64<<10)
	var refused bool
	web := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if user, password, _ := r.BasicAuth(); user != "someone" || password != "s3cret =x" {
			refused = true
			w.Header().Set("WWW-Authenticate", "Basic")
			w.WriteHeader(http.StatusUnauthorized)
			return
		}
		http.ServeContent(w, r, "disk.img", time.Time{}, bytes.NewReader(disk))
	}))
	defer web.Close()
	password, write, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer password.Close()
	fmt.Fprintln(write, "s3cret =x")
	write.Close()

	sock, pidfile := filepath.Join(dir, "nbdkit.sock"), filepath.Join(dir, "nbdkit.pid")
	c := call(t, pidfile, link, []*os.File{password},
		"--foreground", "--readonly", "--exit-with-parent", "-U", sock, "--pidfile", pidfile,
		"--filter=readahead", "--filter=retry", "-r", "curl",
		"header=User-Agent: cdi-golang-importer", "retry-exponential=no", "user=someone", "password=-3", "url="+web.URL+"/disk.img")
	if pid, err := os.ReadFile(pidfile); err != nil || strings.TrimSpace(string(pid)) != strconv.Itoa(c.Process.Pid) {
		t.Errorf("pidfile: got %q, %v, need %d", pid, err, c.Process.Pid)
	}
	copied := filepath.Join(dir, "disk.img")
	command(t, "nbdcopy", "nbd+unix:///?socket="+sock, copied)
	if got, err := os.ReadFile(copied); err != nil || !bytes.Equal(got, disk) {
		t.Errorf("got %d bytes, %v, need %d equal ones", len(got), err, len(disk))
	}
	if refused {
		t.Error("the web server was asked without the password")
	}
	c.stop(syscall.SIGTERM)
}

// For VMware the importer adds options behind the plugin, and looks for the
// beginnings of lines.
func TestCallerImporterVDDK(t *testing.T) {
	link := asNbdkit(t)
	dir := tempDir(t)
	vddk := vddkPath(t, dir)
	t.Setenv("NBDHOST_PLUGIN_PATH", dir)
	if underTest() != "nbdkit" {
		vddk = "vddk"
	}

	o := runCLI(t, dir, "", link, "--dump-plugin", vddk, "libdir=/opt/vmware-vix-disklib-distrib")
	if o.status != 0 || !strings.Contains(o.stdout, "\nname=vddk\n") || !strings.HasSuffix(o.stdout, "\nvddk_library_version=7\n") {
		t.Errorf("--dump-plugin: got status %d\n%s%s", o.status, o.stdout, o.stderr)
	}

	sock, pidfile := filepath.Join(dir, "nbdkit.sock"), filepath.Join(dir, "nbdkit.pid")
	c := call(t, pidfile, link, nil,
		"--foreground", "--readonly", "--exit-with-parent", "-U", sock, "--pidfile", pidfile,
		"--filter=readahead", "--filter=retry", vddk, "libdir=/opt/vmware-vix-disklib-distrib", "file=[ds] vm/disk.vmdk",
		"--verbose", "-D", "nbdkit.backend.datapath=0", "-D", "vddk.datapath=0")
	command(t, "nbdcopy", "nbd+unix:///?socket="+sock, filepath.Join(dir, "copy"))
	c.stop(syscall.SIGTERM)
	log := c.said()
	for _, want := range []string{
		`(?m)^nbdkit: debug: VMware VixDiskLib`,
		`(?m)^nbdkit: vddk\[1\]: debug: DISKLIB-LINK  : Opened `,
	} {
		if !regexp.MustCompile(want).MatchString(log) {
			t.Errorf("no line like %s in\n%s", want, log)
		}
	}
	if strings.Contains(log, "pread count") || strings.Contains(log, "VixDiskLib: Read") {
		t.Errorf("the data path shows up:\n%s", log)
	}
}

// The plugin runs the server again, with all arguments but the password, whatever is hidden and handed
// over.
func TestCallerVDDKRunsAgain(t *testing.T) {
	program := asNbdkit(t)
	dir := tempDir(t)
	args := []string{vddkPath(t, dir), "libdir=" + dir, "server=host", "user=root", "file=[ds] vm/disk.vmdk",
		"password=" + filepath.Base(dir), "cookie=some session"}
	modes := map[string][]string{"foreground": {"-f"}, "background": nil}
	if underTest() != "nbdkit" {
		modes["supervised"] = []string{"-f", "--supervise"}
		modes["supervised in the background"] = []string{"--supervise"}
	}
	for name, mode := range modes {
		t.Run(name, func(t *testing.T) {
			dir := tempDir(t)
			sock, pidfile := filepath.Join(dir, "sock"), filepath.Join(dir, "pid")
			c := call(t, pidfile, program, nil, append(append(mode, "-U", sock, "-P", pidfile), args...)...)
			uri := "nbd+unix:///?socket=" + sock
			if got := command(t, "nbdinfo", "--size", uri); got != "65536\n" {
				t.Errorf("got size %q", got)
			}
			if slices.Contains(mode, "-f") {
				c.stop(syscall.SIGTERM)
				return
			}
			pid := strings.TrimSpace(command(t, "cat", pidfile))
			command(t, "kill", pid)
		})
	}
}

// vddkPath compiles a plugin that is called vddk into dir.
func vddkPath(t *testing.T, dir string) string {
	t.Helper()
	path := filepath.Join(dir, "nbdkit-vddk-plugin.so")
	copyFile(t, path, fixture(t, "vddk"))
	return path
}

// Some give -D and its value as one argument, which then begins with a space. A flag that
// nobody takes is worth a warning, no more.
func TestCallerOneArgument(t *testing.T) {
	link := asNbdkit(t)
	dir := tempDir(t)
	o := runCLI(t, dir, "", link, "-U", "-", "-D vddk.datapath=0", "memory", "1M", "--run", `nbdinfo --size "$uri"`)
	if o.status != 0 || o.stdout != "1048576\n" || !strings.Contains(o.stderr, "nbdkit: warning: debug flag -D ") {
		t.Errorf("got %+v", o)
	}
}

// virt-v2v asks what there is before it starts anything.
func TestCallerVirtV2V(t *testing.T) {
	onlyNbdhost(t)
	link := asNbdkit(t)
	dir := tempDir(t)
	ask := func(args ...string) string {
		t.Helper()
		o := runCLI(t, dir, "", link, args...)
		if o.status != 0 || o.stderr != "" {
			t.Errorf("%q: got status %d: %s", args, o.status, o.stderr)
		}
		return o.stdout
	}
	if got := ask("--version"); !regexp.MustCompile(`^nbdkit 1\.48\.\d+ \(nbdhost \d`).MatchString(got) {
		t.Errorf("--version: got %q", got)
	}
	config := map[string]string{}
	for _, l := range strings.Split(ask("--dump-config"), "\n") {
		key, value, _ := strings.Cut(l, "=")
		config[key] = value
	}
	if v := regexp.MustCompile(`^1\.(\d+)\.\d+$`).FindStringSubmatch(config["version"]); v == nil || v[1] < "44" || config["version_minor"] != v[1] {
		t.Errorf("--dump-config: got version=%s, version_minor=%s, need 1.44 at least", config["version"], config["version_minor"])
	}
	if s := config["selinux"]; s != "yes" && s != "no" {
		t.Errorf("--dump-config: got selinux=%s", s)
	}
	options := strings.Fields(ask("--long-options"))
	for _, o := range []string{"--name", "--threads", "--selinux-label", "--timeout", "--print-uri", "--keepalive"} {
		if !slices.Contains(options, o) {
			t.Errorf("--long-options has no %s", o)
		}
	}
	if got := ask("file", "--version"); !strings.HasPrefix(got, "nbdkit 1.48.") || !strings.Contains(got, "\nfile ") {
		t.Errorf("file --version: got %q", got)
	}
	if got := ask("curl", "--help"); !strings.Contains(got, "\ncookie-script=") {
		t.Errorf("curl --help: got %q", got)
	}
	if got := ask("null", "--filter=cow", "--help"); !strings.Contains(got, "filter: cow ") || !strings.Contains(got, "cow-on-read=") {
		t.Errorf("--filter=cow --help: got %q", got)
	}
	if got := ask("file", "--dump-plugin"); !strings.Contains(got, "\nname=file\n") {
		t.Errorf("--dump-plugin: got %q", got)
	}

	sock, pidfile := filepath.Join(dir, "in0"), filepath.Join(dir, "nbdkit1.pid")
	writeFile(t, filepath.Join(dir, "disk"), strings.Repeat("x", 4096), 0o644)
	c := call(t, pidfile, link, nil, "--exit-with-parent", "--foreground", "--pidfile", pidfile, "--unix", sock,
		"--name", "in0", "--threads", "16", "-D", "nbdkit.backend.datapath=0", "--verbose", "--filter", "cow",
		"file", "file="+filepath.Join(dir, "disk"))
	if got := command(t, "nbdinfo", "--size", "nbd+unix:///?socket="+sock); got != "4096\n" {
		t.Errorf("got size %q", got)
	}
	c.stop(syscall.SIGTERM)
	if !strings.Contains(c.said(), "nbdkit[in0]: debug: ") {
		t.Errorf("no line with the name:\n%s", c.said())
	}
}

// A CSI driver relies on the program's end: the server is ready then, with its
// process ID written, and goes on by itself.
func TestCallerCSI(t *testing.T) {
	onlyNbdhost(t) // nbdkit's starting process may end before the pidfile is there
	link := asNbdkit(t)
	dir := tempDir(t)
	sock, pidfile, log := filepath.Join(dir, "sock"), filepath.Join(dir, "pid"), filepath.Join(dir, "log")
	o := runCLI(t, dir, "", link, "--log="+log, "-U", sock, "-P", pidfile, "memory", "1M")
	if o.status != 0 || o.stdout != "" || o.stderr != "" {
		t.Fatalf("got %+v", o)
	}
	b, err := os.ReadFile(pidfile)
	if err != nil {
		t.Fatal(err)
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(b)))
	if err != nil {
		t.Fatal(err)
	}
	killed := false
	defer func() {
		if !killed {
			syscall.Kill(pid, syscall.SIGKILL)
		}
	}()
	if got := command(t, "nbdinfo", "--size", "nbd+unix:///?socket="+sock); got != "1048576\n" {
		t.Errorf("got size %q", got)
	}
	if st, err := syscall.Getpgid(pid); err != nil || st == syscall.Getpgrp() {
		t.Errorf("the server is in the group of who started it: %d, %v", st, err)
	}
	watch := pidfd(t, pid)
	if err := syscall.Kill(pid, syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if !watch.ended() {
		t.Fatal("it is still there")
	}
	killed = true
	// Where it cannot start the caller is told, at once.
	if o := runCLI(t, dir, "", link, "-U", filepath.Join(dir, "sock2"), "-P", filepath.Join(dir, "pid2"), "memory"); o.status != 1 || o.stderr == "" {
		t.Errorf("without a size: got %+v", o)
	}
	if _, err := os.Stat(filepath.Join(dir, "pid2")); err == nil {
		t.Error("there is a pidfile of a server that never was")
	}
}

// inetd starts a server for each client, with the socket as standard input and output. The
// plugin is told who the client is.
func TestCallerInetd(t *testing.T) {
	for _, program := range []string{nbdkit, asNbdkit(t)} {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		nc, err := net.Dial("tcp", l.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		defer nc.Close()
		theirs, err := l.Accept()
		if err != nil {
			t.Fatal(err)
		}
		socket, err := theirs.(*net.TCPConn).File()
		theirs.Close()
		if err != nil {
			t.Fatal(err)
		}
		cmd := exec.Command(program, "-s", "info", "mode=address")
		var stderr bytes.Buffer
		cmd.Stdin, cmd.Stdout, cmd.Stderr = socket, socket, &stderr
		err = cmd.Start()
		socket.Close()
		if err != nil {
			t.Fatal(err)
		}
		defer cmd.Process.Kill()
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		defer cancel()
		c, err := client.New(ctx, nc, nil)
		if err != nil {
			t.Fatal(err)
		}
		got := make([]byte, c.Size())
		if err := c.Pread(got, 0); err != nil {
			t.Fatal(err)
		}
		if want := nc.LocalAddr().String(); string(got) != want {
			t.Errorf("%s: the client is %q, need %q", program, got, want)
		}
		if err := c.Disconnect(); err != nil {
			t.Error(err)
		}
		if err := cmd.Wait(); err != nil {
			t.Errorf("%s: %v\n%s", program, err, stderr.String())
		}
	}
}

// A service manager hands over two sockets, of both kinds, and has names for them.
func TestCallerServiceManager(t *testing.T) {
	link := asNbdkit(t)
	dir := tempDir(t)
	tcp, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer tcp.Close()
	sock := filepath.Join(dir, "sock")
	unix, err := net.Listen("unix", sock)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close()
	var files []*os.File
	for _, l := range []interface{ File() (*os.File, error) }{tcp.(*net.TCPListener), unix.(*net.UnixListener)} {
		f, err := l.File()
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		files = append(files, f)
	}
	pidfile := filepath.Join(dir, "pid")
	c := call(t, pidfile, "/bin/sh", files, "-c",
		`export LISTEN_PID=$$ LISTEN_FDS=2 LISTEN_FDNAMES=nbd:local; exec "$0" "$@"`, link, "-v", "-P", pidfile,
		"eval", "get_size=echo 1M", "pread=exit 1", "get_ready=env >"+filepath.Join(dir, "env"))
	if env, err := os.ReadFile(filepath.Join(dir, "env")); err != nil || bytes.Contains(env, []byte("LISTEN_")) {
		t.Errorf("what the plugin runs sees the variables: %v\n%s", err, env)
	}
	for _, uri := range []string{"nbd://" + tcp.Addr().String(), "nbd+unix:///?socket=" + sock} {
		if got := command(t, "nbdinfo", "--size", uri); got != "1048576\n" {
			t.Errorf("%s: got size %q", uri, got)
		}
	}
	c.stop(syscall.SIGTERM)
	if _, err := os.Stat(sock); err != nil {
		t.Errorf("the manager's socket is gone: %v", err)
	}
	// It waits for clients without us.
	if nc, err := net.Dial("unix", sock); err != nil {
		t.Error(err)
	} else {
		nc.Close()
	}
}
