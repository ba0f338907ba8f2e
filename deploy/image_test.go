package deploy

import (
	"bufio"
	"bytes"
	"crypto/rand"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// image is what make image builds.
const image = "localhost/nbdhost"

// locked is how the image is run in these tests: nothing of it can be written to, it
// has no capabilities, and cannot get any.
var locked = []string{"--read-only", "--read-only-tmpfs=false", "--cap-drop=ALL", "--security-opt=no-new-privileges"}

// container starts a container of the image, with the options of podman and the
// arguments of nbdhost, and returns its name.
func container(t *testing.T, options, args []string) string {
	t.Helper()
	name := fmt.Sprintf("nbdhost-test-%d-%d", os.Getpid(), time.Now().UnixNano())
	t.Cleanup(func() {
		if t.Failed() {
			logs, _ := exec.Command("./containers.sh", "podman", "logs", name).CombinedOutput()
			t.Logf("the container wrote:\n%s", logs)
		}
		containers(t, "podman", "rm", "-f", "-t", "0", name)
	})
	line := append([]string{"podman", "create", "--name", name}, options...)
	containers(t, append(append(line, image), args...)...)
	containers(t, "podman", "start", name)
	return name
}

// inContainer runs a container until it ends, and returns what it writes.
func inContainer(t *testing.T, options []string, args ...string) string {
	t.Helper()
	line := append([]string{"podman", "run", "--rm", "--network=none"}, options...)
	return containers(t, append(append(line, image), args...)...)
}

func inspect(t *testing.T, name, format string) string {
	t.Helper()
	return containers(t, "podman", "inspect", "--format", format, name)
}

func uri(socket string) string { return "nbd+unix:///?socket=" + socket }

// serves tells whether there is a server behind a socket.
func serves(socket string) bool {
	conn, err := net.Dial("unix", socket)
	if err == nil {
		defer conn.Close()
		conn.SetDeadline(time.Now().Add(deadline))
		var magic [8]byte
		_, err = conn.Read(magic[:])
		return err == nil && string(magic[:]) == "NBDMAGIC"
	}
	return false
}

// TestImage serves, reads, writes and stops in a container from which everything has
// been taken that can be.
func TestImage(t *testing.T) {
	dir := tempDir(t)
	socket := dir + "/sock"
	options := append([]string{"--network=none", "-v", dir + ":/run/nbd"}, locked...)
	began := time.Now()
	name := container(t, options, []string{"--unix=/run/nbd/sock", "memory", "64M"})
	await(t, "the server", func() bool { return serves(socket) })
	took := time.Since(began)

	// What it may do.
	pid := inspect(t, name, "{{.State.Pid}}")
	status, err := os.ReadFile("/proc/" + pid + "/status")
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"Uid:\t65534\t65534\t65534\t65534\n", "Gid:\t65534\t65534\t65534\t65534\n",
		"CapEff:\t0000000000000000\n", "CapBnd:\t0000000000000000\n", "NoNewPrivs:\t1\n"} {
		if !bytes.Contains(status, []byte(want)) {
			t.Errorf("/proc/PID/status: got\n%s\nneed %q", status, want)
		}
	}
	if _, err := try(t, "./containers.sh", "podman", "exec", name, "touch", "/tmp/x"); err == nil {
		t.Error("write to the root file system: it worked: need it to be read-only")
	}

	// Write, and read back.
	data := make([]byte, 64<<20)
	rand.Read(data)
	writeFile(t, dir+"/in", string(data))
	run(t, "nbdcopy", dir+"/in", uri(socket))
	run(t, "nbdcopy", uri(socket), dir+"/out")
	if out, err := os.ReadFile(dir + "/out"); err != nil || !bytes.Equal(out, data) {
		t.Errorf("read back: got %d bytes, %v: need the %d that were written", len(out), err, len(data))
	}

	size, _ := strconv.ParseFloat(inspect(t, image, "{{.Size}}"), 64)
	fmt.Printf("image: %.0f MB; ready after %d ms, of which podman and runc take most (below: without them)\n", size/1e6, took.Milliseconds())
	printReady(t)
}

// printReady prints how long the server itself takes.
func printReady(t *testing.T) {
	t.Helper()
	socket := t.TempDir() + "/sock"
	began := time.Now()
	server := start(t, exec.Command(nbdhost, "-f", "-U", socket, "memory", "1G"))
	server.await(t, "the server", func() bool { return serves(socket) })
	fmt.Printf("nbdhost alone: ready after %d ms\n", time.Since(began).Milliseconds())
}

// TestImageStops sends SIGTERM while a request is in progress and a client is idle: the
// request gets its answer, the server ends with status 0, and all that within the grace
// period, after which podman would kill it (status 137).
func TestImageStops(t *testing.T) {
	dir := tempDir(t)
	socket := dir + "/sock"
	options := append([]string{"--network=none", "-v", dir + ":/run/nbd", "--tmpfs=/tmp:exec"}, locked...)
	// The plugin says when a request has arrived, and answers when it is told to.
	name := container(t, options, []string{"--unix=/run/nbd/sock", "eval", "thread_model=echo parallel", "get_size=echo 1M",
		"pread=echo >/run/nbd/arrived; read line </run/nbd/answer; head -c $3 /dev/zero"})
	await(t, "the server", func() bool { return serves(socket) })
	if err := syscall.Mkfifo(dir+"/answer", 0o666); err != nil {
		t.Fatal(err)
	}
	idle := exec.Command("/usr/bin/python3", "-m", "nbd", "-u", uri(socket), "-c", "import sys; print('connected', flush=True); sys.stdin.read()")
	in, err := idle.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	idleOut, err := idle.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := idle.Start(); err != nil {
		t.Fatal(err)
	}
	defer idle.Wait()
	defer idle.Process.Kill()
	if line, err := bufio.NewReader(idleOut).ReadString('\n'); line != "connected\n" {
		t.Fatalf("connect a client: got %q, %v", line, err)
	}
	busy := start(t, exec.Command("/usr/bin/python3", "-m", "nbd", "-u", uri(socket), "-c", "assert h.pread(512, 0) == bytearray(512)"))
	busy.await(t, "the request", func() bool {
		_, err := os.Stat(dir + "/arrived")
		return err == nil
	})
	stopped := make(chan error, 1)
	go func() {
		_, err := try(t, "./containers.sh", "podman", "stop", "-t", "60", name)
		stopped <- err
	}()
	await(t, "the server to refuse clients", func() bool { return !serves(socket) })
	writeFile(t, dir+"/answer", "now\n") // a pipe
	if err := <-stopped; err != nil {
		t.Error(err)
	}
	if err := busy.wait(t); err != nil {
		t.Errorf("read in progress: %v", err)
	}
	if got := inspect(t, name, "{{.State.ExitCode}}"); got != "0" {
		t.Errorf("exit status: got %s, need 0", got)
	}
}

// TestImageHealth runs the image's HEALTHCHECK: while the server serves, and when its
// plugin hangs.
func TestImageHealth(t *testing.T) {
	dir := tempDir(t)
	if err := syscall.Mkfifo(dir+"/answer", 0o666); err != nil {
		t.Fatal(err)
	}
	options := append([]string{"--network=none", "-v", dir + ":/run/nbd", "--tmpfs=/tmp:exec"}, locked...)
	name := container(t, options, []string{"--health-read=1s", "eval", "thread_model=echo parallel", "get_size=echo 1M",
		"pread=if [ -e /run/nbd/hang ]; then read line </run/nbd/answer; fi; head -c $3 /dev/zero"})
	healthy := func() bool {
		_, err := try(t, "./containers.sh", "podman", "healthcheck", "run", name)
		return err == nil
	}
	await(t, "the server to be healthy", healthy)
	writeFile(t, dir+"/hang", "")
	await(t, "the server to be ill", func() bool { return !healthy() })
	if err := os.Remove(dir + "/hang"); err != nil {
		t.Fatal(err)
	}
	writeFile(t, dir+"/answer", "now\n") // a pipe
	await(t, "the server to be healthy again", healthy)
}

// TestImageTCP publishes the port, the arguments being what docker run puts behind IMAGE.
func TestImageTCP(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0") // a port that is free
	if err != nil {
		t.Fatal(err)
	}
	address := l.Addr().String()
	l.Close()
	container(t, append([]string{"-p", address + ":10809"}, locked...), []string{"memory", "1G"})
	await(t, "the server", func() bool {
		out, err := exec.Command("nbdinfo", "--size", "nbd://"+address).Output()
		return err == nil && string(out) == "1073741824\n"
	})
}

// TestImageArguments gives arguments in each of the ways that there are.
func TestImageArguments(t *testing.T) {
	dir := tempDir(t)
	writeFile(t, dir+"/args", "--readonly\nmemory\nsize=1M\n")
	writeFile(t, dir+"/disk", strings.Repeat("x", 512))
	// A plugin of one's own: here Debian's, under another name.
	so, err := os.ReadFile(filepath.Join(pluginDir(t), "nbdkit-null-plugin.so"))
	if err != nil {
		t.Fatal(err)
	}
	writeFile(t, dir+"/nbdkit-mine-plugin.so", string(so))
	for _, test := range []struct {
		name          string
		options, args []string
		want          string
	}{
		{"arguments", nil, []string{"memory", "1M", "--dump-plugin"}, "name=memory"},
		{"environment", []string{"--env", "NBDHOST_ARGS=-r memory '1M'"}, []string{"--dump-plugin"}, "name=memory"},
		{"both", []string{"--env", "NBDHOST_ARGS=memory"}, []string{"1M", "--dump-plugin"}, "name=memory"},
		{"file", []string{"-v", dir + ":/etc/nbdhost:ro"}, []string{"@/etc/nbdhost/args", "--dump-plugin"}, "name=memory"},
		{"file in environment", []string{"-v", dir + ":/etc/nbdhost:ro", "--env", "NBDHOST_ARGS=@/etc/nbdhost/args"}, []string{"--dump-plugin"}, "name=memory"},
		{"plugin of one's own", []string{"-v", dir + ":/plugins:ro"}, []string{"mine", "1M", "--dump-plugin"}, "path=/plugins/nbdkit-mine-plugin.so"},
		{"named nbdkit", []string{"--entrypoint=nbdkit"}, []string{"--version"}, "nbdkit 1.48"},
		{"in nbdkit's place", []string{"--entrypoint=/usr/bin/nbdkit"}, []string{"--dump-config"}, "binary=/usr/local/bin/nbdhost"},
		{"a command", nil, []string{"memory", "1M", "--run", "echo $uri"}, "nbd+unix://"},
	} {
		t.Run(test.name, func(t *testing.T) {
			options := slices.Clone(locked)
			if strings.Contains(test.name, "command") { // the private socket is in /tmp
				options = append(options, "--tmpfs=/tmp")
			}
			if got := inContainer(t, append(options, test.options...), test.args...); !strings.Contains(got, test.want) {
				t.Errorf("got %q, need %q in it", got, test.want)
			}
		})
	}
}

// pluginDir is where the machine's own plugins are.
func pluginDir(t *testing.T) string {
	t.Helper()
	for line := range strings.SplitSeq(run(t, nbdhost, "--dump-config"), "\n") {
		if dir, ok := strings.CutPrefix(line, "plugindir="); ok {
			return dir
		}
	}
	t.Fatal("nbdhost --dump-config: no plugindir")
	return ""
}

// TestImagePlugins reads all of what plugins and filters serve, in a container that has
// nothing to write to, and of those that need one in a container with a /tmp.
func TestImagePlugins(t *testing.T) {
	for _, test := range []struct {
		name    string
		options []string
		servers []string
	}{
		{"read-only", nil, []string{
			"memory 1M", "null 1M", "data 1", "pattern 1M", "random 1M", "sparse-random 1M",
			"-r file /run/nbd/disk", "-r split /run/nbd/disk /run/nbd/disk", "-r nbd socket=/run/nbd/0",
			"-r curl url=http://server/disk unix-socket-path=/run/nbd/web",
			"--filter=readahead --filter=offset memory 1M offset=512", "-r --filter=xz file /run/nbd/disk.xz",
		}},
		{"with /tmp", []string{"--tmpfs=/tmp:exec"}, []string{
			"eval get_size='echo 1M' pread='dd if=/dev/zero count=$3 iflag=count_bytes status=none'",
			"floppy /run/nbd/floppy", "-r partitioning /run/nbd/disk", "-r --filter=cow file /run/nbd/disk", "--filter=cache memory 1M",
		}},
	} {
		t.Run(test.name, func(t *testing.T) {
			dir := tempDir(t)
			writeFile(t, dir+"/disk", strings.Repeat("x", 1<<20))
			run(t, "xz", "-k", dir+"/disk")
			if err := os.Chmod(dir+"/disk", 0o666); err != nil { // partitioning opens it for writing
				t.Fatal(err)
			}
			if err := os.Mkdir(dir+"/floppy", 0o755); err != nil {
				t.Fatal(err)
			}
			web, err := net.Listen("unix", dir+"/web")
			if err != nil {
				t.Fatal(err)
			}
			defer web.Close()
			if err := os.Chmod(dir+"/web", 0o777); err != nil {
				t.Fatal(err)
			}
			go http.Serve(web, http.FileServer(http.Dir(dir)))
			script := ""
			for i, server := range test.servers {
				script += fmt.Sprintf("nbdhost -f -U /run/nbd/%d %s &\n", i, server)
			}
			options := append([]string{"--network=none", "-v", dir + ":/run/nbd", "--entrypoint=sh"}, locked...)
			container(t, append(options, test.options...), []string{"-c", script + "wait"})
			for i, server := range test.servers {
				socket := filepath.Join(dir, strconv.Itoa(i))
				await(t, server, func() bool { return serves(socket) })
				run(t, "nbdcopy", uri(socket), "null:")
			}
		})
	}
}

// TestImageLabels reads what the image says about itself.
func TestImageLabels(t *testing.T) {
	var got []struct {
		Config struct {
			User         string
			Env          []string
			Entrypoint   []string
			Cmd          []string
			ExposedPorts map[string]any
			Labels       map[string]string
		}
	}
	out := containers(t, "podman", "image", "inspect", image)
	if err := json.Unmarshal([]byte(out), &got); err != nil {
		t.Fatal(err)
	}
	c := got[0].Config
	if c.User != "65534:65534" || strings.Join(c.Entrypoint, " ") != "nbdhost --foreground --metrics=127.0.0.1:9809" || len(c.Cmd) > 0 {
		t.Errorf("got user %q, entry point %q, command %q", c.User, c.Entrypoint, c.Cmd)
	}
	if _, ok := c.ExposedPorts["10809/tcp"]; !ok {
		t.Errorf("got ports %v, need 10809/tcp", c.ExposedPorts)
	}
	version := strings.TrimPrefix(run(t, nbdhost, "--version"), "nbdhost ")
	for label, want := range map[string]string{"title": "nbdhost", "licenses": "BSD-3-Clause", "version": version, "description": "NBD server"} {
		if got := c.Labels["org.opencontainers.image."+label]; !strings.HasPrefix(got, want) {
			t.Errorf("label %s: got %q, need %q", label, got, want)
		}
	}
	if got := c.Labels["org.opencontainers.image.revision"]; len(got) != 40 {
		t.Errorf("label revision: got %q, need a commit", got)
	}
}
