package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"nbdhost/protocol"
)

const (
	pluginDir = "/usr/lib/x86_64-linux-gnu/nbdkit/plugins/"
	filterDir = "/usr/lib/x86_64-linux-gnu/nbdkit/filters/"
	// patience ends what hangs.
	patience = 60 * time.Second
)

// filterChain is what a row with filters has before the plugin, each with its
// parameters: filters that take part in every read and write and change nothing.
var filterChain = [][]string{{"offset", "offset=0"}, {"delay"}, {"error"}}

// A server is a running server of any kind.
type server struct {
	kind   string // see doc.go
	socket string // its path, or empty
	port   int    // on 127.0.0.1, or 0
	keys   string // the file of pre-shared keys for TLS, or empty
	certs  string // the directory of certificates for TLS, or empty
	tls    string // what the load generator negotiates with it, or empty
	cmd    *exec.Cmd
	stderr bytes.Buffer
	exited chan struct{} // closed when it has exited
}

// plugin is the file of a plugin of Debian's. Both programs are given the path,
// so that they load the same file.
func plugin(name string) string { return pluginDir + "nbdkit-" + name + "-plugin.so" }

// start starts the server that the row wants and returns when it takes connections.
func (b *bench) start(ctx context.Context, kind string, r row) (*server, error) {
	s := &server{kind: kind, exited: make(chan struct{})}
	if strings.HasSuffix(r.transport, "tcp") {
		b.port++
		s.port = b.port
	} else {
		s.socket = b.path(kind + ".sock")
		os.Remove(s.socket)
	}
	switch {
	case strings.HasPrefix(r.transport, "psk"):
		s.keys = b.path("keys.psk")
	case r.secured():
		s.certs = b.path("pki")
	}
	program, args := b.arguments(s, r)
	s.cmd = exec.Command(program, args...)
	s.cmd.Stderr = &s.stderr
	s.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := s.cmd.Start(); err != nil {
		return nil, err
	}
	go func() {
		s.cmd.Wait()
		close(s.exited)
	}()
	network, address := s.address()
	deadline := time.Now().Add(patience)
	for {
		if c, err := net.Dial(network, address); err == nil {
			c.Close()
			return s, nil
		}
		select {
		case <-s.exited:
			return nil, fmt.Errorf("start %s: %v: %s", kind, s.cmd.ProcessState, lastLine(s.stderr.String()))
		case <-ctx.Done():
			s.stop()
			return nil, ctx.Err()
		case <-time.After(time.Millisecond):
		}
		if time.Now().After(deadline) {
			s.stop()
			return nil, fmt.Errorf("start %s: it takes no connections", kind)
		}
	}
}

func (b *bench) arguments(s *server, r row) (program string, args []string) {
	switch s.kind {
	case "floor", "floor+plugin":
		single := 0
		if r.client == "load" && r.conns == 1 {
			single = 1
		}
		where := "socket=" + s.socket
		if s.socket == "" {
			where = fmt.Sprintf("port=%d", s.port)
		}
		args = []string{where, fmt.Sprintf("size=%d", b.size(r)), fmt.Sprintf("single=%d", single)}
		if s.kind == "floor+plugin" {
			args = append(args, "plugin="+pluginDir+"nbdkit-memory-plugin.so")
		}
		return b.path("floor"), args
	case "qemu-nbd":
		args = []string{"-f", "raw", "-t", "-e", "64", "-x", ""}
		if s.socket != "" {
			args = append(args, "-k", s.socket)
		} else {
			args = append(args, "-b", "127.0.0.1", "-p", strconv.Itoa(s.port))
		}
		return "qemu-nbd", append(args, b.path("data"))
	}
	program = "/usr/bin/nbdkit"
	if s.kind == "nbdhost" || s.kind == "without" {
		program = b.nbdhost
	}
	args = []string{"-f"}
	if s.socket != "" {
		args = append(args, "-U", s.socket)
	} else {
		args = append(args, "-i", "127.0.0.1", "-p", strconv.Itoa(s.port))
	}
	switch {
	case s.keys != "":
		args = append(args, "--tls=require", "--tls-psk="+s.keys)
	case s.certs != "":
		args = append(args, "--tls=require", "--tls-certificates="+s.certs)
	}
	if r.metrics && s.kind == "nbdhost" {
		args = append(args, "--metrics=unix:"+b.path("metrics.sock"))
	}
	if r.threads > 0 && s.kind != "nbdkit" {
		args = append(args, "-t", strconv.Itoa(r.threads))
	}
	return program, append(args, b.pluginArgs(r)...)
}

// size is that of the row's export, in bytes.
func (b *bench) size(r row) int {
	if r.client != "load" {
		return b.copySize
	}
	return exportSize
}

// pluginArgs are the filters, the plugin and their parameters.
func (b *bench) pluginArgs(r row) (args []string) {
	var params []string
	for _, f := range filterChain[:r.filters] {
		args = append(args, "--filter="+filterDir+"nbdkit-"+f[0]+"-filter.so")
		params = append(params, f[1:]...)
	}
	for range r.nofilters {
		args = append(args, "--filter="+filterDir+"nbdkit-nofilter-filter.so")
	}
	size := strconv.Itoa(b.size(r))
	switch r.plugin {
	case "file":
		args = append(args, plugin("file"), "file="+b.path("data"))
	case "slow":
		args = append(args, b.path("slow.so"))
	case "brief":
		args = append(args, b.path("slow.so"), "us=100")
	case "mixed":
		args = append(args, b.path("slow.so"), "every=20", "us=5000")
	case "serial":
		args = append(args, b.path("serial.so"), "us=0")
	case "perl":
		args = append(args, plugin("perl"), "script="+b.path("memory.pl"))
	case "delay":
		args = append(args, "--filter="+filterDir+"nbdkit-delay-filter.so", plugin("memory"), "size="+size, "delay-read=1ms", "delay-write=1ms")
	default:
		args = append(args, plugin(r.plugin), "size="+size)
	}
	return append(args, params...)
}

func (s *server) address() (network, address string) {
	if s.socket != "" {
		return "unix", s.socket
	}
	return "tcp", net.JoinHostPort("127.0.0.1", strconv.Itoa(s.port))
}

// uri is for clients.
func (s *server) uri() string {
	u := protocol.URI{Transport: protocol.TransportTCP, Host: "127.0.0.1", Port: uint32(s.port), TLS: s.keys+s.certs != "", Params: url.Values{}}
	if s.socket != "" {
		u.Transport, u.Socket = protocol.TransportUnix, s.socket
	}
	if s.keys != "" {
		u.User = "bench"
		u.Params.Set("tls-psk-file", s.keys)
	}
	if s.certs != "" {
		u.Params.Set("tls-certificates", s.certs)
	}
	return u.String()
}

// stop ends the server and waits for it.
func (s *server) stop() {
	s.cmd.Process.Signal(syscall.SIGTERM)
	select {
	case <-s.exited:
	case <-time.After(patience):
		s.cmd.Process.Kill()
		<-s.exited
	}
}

// cpu is the processor time that the server has used so far.
func (s *server) cpu() (time.Duration, error) {
	t, err := processClock(s.cmd.Process.Pid)
	if err != nil {
		return 0, fmt.Errorf("read clock of %s: %w", s.kind, err)
	}
	return time.Duration(t), nil
}

// memory is a figure of /proc/PID/status in bytes: VmRSS, or VmHWM, its peak.
func (s *server) memory(key string) (float64, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", s.cmd.Process.Pid))
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(b)) {
		if f := strings.Fields(line); len(f) == 3 && f[0] == key+":" {
			n, err := strconv.ParseFloat(f[1], 64)
			return n * kib, err
		}
	}
	return 0, fmt.Errorf("read memory of %s: no %s", s.kind, key)
}

// forgetPeak makes the peak start again from what the server has now.
func (s *server) forgetPeak() error {
	return os.WriteFile(fmt.Sprintf("/proc/%d/clear_refs", s.cmd.Process.Pid), []byte("5"), 0)
}

// load runs the load generator and returns what it printed.
func (b *bench) load(ctx context.Context, s *server, args ...string) (map[string]float64, error) {
	ctx, cancel := context.WithTimeout(ctx, patience+time.Duration(b.seconds*float64(time.Second)))
	defer cancel()
	cmd := exec.CommandContext(ctx, b.self, append([]string{"load", "uri=" + s.uri()}, args...)...)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		select {
		case <-s.exited:
			err = fmt.Errorf("%s ended: %v: %s", s.kind, s.cmd.ProcessState, lastLine(s.stderr.String()))
		default:
		}
		return nil, errors.Join(err, errors.New(lastLine(stderr.String())))
	}
	return parse(string(out))
}

// parse reads KEY=VALUE lines.
func parse(out string) (map[string]float64, error) {
	values := map[string]float64{}
	for line := range strings.Lines(out) {
		key, value, _ := strings.Cut(strings.TrimSpace(line), "=")
		v, err := strconv.ParseFloat(value, 64)
		if err != nil {
			return nil, fmt.Errorf("read what load printed: %w", err)
		}
		values[key] = v
	}
	return values, nil
}

// makeData makes the file that the file plugin and qemu-nbd serve.
func (b *bench) makeData(size int64) error {
	path := filepath.Join(b.dir, "data")
	if info, err := os.Stat(path); err == nil && info.Size() == size {
		return nil
	}
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	defer f.Close()
	block := bytes.Repeat([]byte("x"), mib)
	for range size / mib {
		if _, err := f.Write(block); err != nil {
			return err
		}
	}
	return f.Close()
}

func lastLine(s string) string {
	lines := strings.Split(strings.TrimSpace(s), "\n")
	return lines[len(lines)-1]
}
