package tests

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"
)

// ask asks the monitor at DIR/http.
func (s *server) ask(path string) (status int, text string) {
	s.t.Helper()
	client := http.Client{Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", filepath.Join(s.dir, "http"))
		},
	}}
	a, err := client.Get("http://x" + path)
	if err != nil {
		s.t.Fatal(err)
	}
	defer a.Body.Close()
	b, err := io.ReadAll(a.Body)
	if err != nil {
		s.t.Fatal(err)
	}
	return a.StatusCode, string(b)
}

// metrics are what Prometheus would see, by name and labels, such as
// nbdhost_bytes_total{command="read",export=""}.
func (s *server) metrics() map[string]float64 {
	s.t.Helper()
	_, text := s.ask("/metrics")
	parser := expfmt.NewTextParser(model.UTF8Validation)
	families, err := parser.TextToMetricFamilies(strings.NewReader(text))
	if err != nil {
		s.t.Fatal(err)
	}
	values := map[string]float64{}
	for name, f := range families {
		for _, m := range f.Metric {
			values[name+labels(m)] = m.GetCounter().GetValue() + m.GetGauge().GetValue() + float64(m.GetHistogram().GetSampleCount())
		}
	}
	return values
}

func labels(m *dto.Metric) string {
	var list []string
	for _, l := range m.Label {
		list = append(list, fmt.Sprintf("%s=%q", l.GetName(), l.GetValue()))
	}
	if list == nil {
		return ""
	}
	return "{" + strings.Join(list, ",") + "}"
}

// waitFor asks until a metric has a value.
func (s *server) waitFor(metric string, v float64) {
	s.t.Helper()
	for deadline := time.Now().Add(patience); s.metrics()[metric] != v; {
		if time.Now().After(deadline) {
			s.t.Fatalf("%s: got %g, need %g", metric, s.metrics()[metric], v)
		}
	}
}

// TestErrorsOfModules: an error counts for the module that it is from, however many filters
// pass it on.
func TestErrorsOfModules(t *testing.T) {
	t.Parallel()
	onlyNbdhost(t)
	for _, tt := range []struct {
		from string
		args []string
	}{
		{"eval", []string{"--filter=delay", "--filter=log", "logfile=DIR/log"}},
		{"eval", []string{"--filter=offset", "--filter=delay"}}, // one calls the other without Go between
		{"eval", []string{"--filter=blocksize", "--filter=retry", "maxdata=64k", "retries=0"}},
		{"error-inject", []string{"--filter=delay", "--filter=error", "--filter=offset", "error-pread=EIO", "error-pread-rate=100%"}},
	} {
		var filters, parameters []string
		for _, arg := range tt.args {
			if strings.HasPrefix(arg, "--") {
				filters = append(filters, arg)
			} else {
				parameters = append(parameters, arg)
			}
		}
		args := append([]string{"--metrics=unix:DIR/http"}, filters...)
		args = append(append(args, "eval", "get_size=echo 1M", "pread=echo EIO it broke >&2; exit 1"), parameters...)
		s := startHost(t, args...)
		try(t, "nbdsh", "-u", s.uri("x"), "-c", "h.pread(512, 0)")
		got := s.metrics()
		for metric, n := range got {
			if strings.HasPrefix(metric, `nbdhost_errors_total{command="read",export="x"`) && (n != 0) != strings.Contains(metric, `module="`+tt.from+`"`) {
				t.Errorf("%q: %s: got %g", tt.args, metric, n)
			}
		}
		if n := got[`nbdhost_operations_total{command="read",export="x"}`]; n != 1 {
			t.Errorf("%q: got %g reads", tt.args, n)
		}
		s.stop()
	}
}

// TestMetrics: what real clients do to real modules is in the metrics, which promtool
// has nothing against.
func TestMetrics(t *testing.T) {
	t.Parallel()
	s := startHost(t, "--metrics=unix:DIR/http", "--filter=error", "--filter=nofilter", "memory", "4M",
		"error-pwrite=EIO", "error-pwrite-rate=100%", "error-pwrite-file=DIR/fail", "error-zero=EPERM", "error-zero-rate=0%")
	data := filepath.Join(s.dir, "data")
	writeFile(t, data, strings.Repeat("0123456789abcdef", 4<<20/16), 0o600)
	command(t, "nbdcopy", data, s.uri(""))
	command(t, "nbdcopy", s.uri("copy"), filepath.Join(s.dir, "out"))
	command(t, "qemu-io", "-f", "raw", "-c", "discard 0 64k", "-c", "write -z 64k 64k", "-c", "flush", s.uri("qemu"))
	writeFile(t, filepath.Join(s.dir, "fail"), "", 0o600)
	if out, err := try(t, "qemu-io", "-f", "raw", "-c", "write 0 4k", s.uri("bad")); err == nil && !strings.Contains(out, "Input/output error") {
		t.Errorf("got %s, need an error", out)
	}
	if _, err := try(t, "nbdinfo", "nbds+unix:///?socket="+s.address); err == nil {
		t.Error("TLS without keys")
	}
	s.waitFor("nbdhost_connections", 0)

	got := s.metrics()
	for name, want := range map[string]float64{
		`nbdhost_bytes_total{command="write",export=""}`:                                                        4 << 20,
		`nbdhost_bytes_total{command="read",export="copy"}`:                                                     4 << 20,
		`nbdhost_bytes_total{command="trim",export="qemu"}`:                                                     64 << 10,
		`nbdhost_bytes_total{command="write_zeroes",export="qemu"}`:                                             64 << 10,
		`nbdhost_errors_total{command="write",export="bad",module="error-inject"}`:                              1,
		`nbdhost_errors_total{command="write",export="bad",module="memory"}`:                                    0,
		`nbdhost_operations_total{command="write",export="bad"}`:                                                1,
		`nbdhost_module_calls_total{callback="trim",layer="0",module="memory"}`:                                 1,
		`nbdhost_module_calls_total{callback="trim",layer="2",module="error-inject"}`:                           1,
		`nbdhost_module_calls_total{callback="pread",layer="1",module="nofilter"}`:                              0,
		`nbdhost_operations_in_flight`:                                                                          0,
		`nbdhost_buffers{state="in_use"}`:                                                                       0,
		`nbdhost_export_connections{export="copy"}`:                                                             0,
		`nbdhost_build_info{goversion="` + goVersion(t) + `",plugin="memory",version="` + hostVersion(t) + `"}`: 1,
	} {
		if v, ok := got[name]; !ok || v != want {
			t.Errorf("%s: got %g, %v, need %g", name, v, ok, want)
		}
	}
	writes := got[`nbdhost_operations_total{command="write",export=""}`]
	if n := got[`nbdhost_operation_duration_seconds{command="write",export=""}`]; n != writes || n == 0 {
		t.Errorf("%g latencies of %g writes", n, writes)
	}
	// Only the filter was called for the write that it made fail.
	calls := `nbdhost_module_calls_total{callback="pwrite",layer="%d",module="%s"}`
	if above, below := got[fmt.Sprintf(calls, 2, "error-inject")], got[fmt.Sprintf(calls, 0, "memory")]; above != below+1 || below < writes {
		t.Errorf("%g calls of the filter, %g of the plugin for %g writes", above, below, writes)
	}

	lint := exec.Command("promtool", "check", "metrics")
	_, text := s.ask("/metrics")
	lint.Stdin = strings.NewReader(text)
	if out, err := lint.CombinedOutput(); err != nil || len(out) > 0 {
		t.Errorf("promtool: %v\n%s", err, out)
	}
	s.stop()
}

func goVersion(t *testing.T) string {
	return strings.TrimSpace(command(t, "/usr/local/go/bin/go", "env", "GOVERSION"))
}

func hostVersion(t *testing.T) string {
	return strings.Fields(command(t, nbdhost, "--version"))[1]
}

// TestHungPlugin: a plugin that does not answer is not ready, but alive; when it
// answers again it is ready. The script hangs in whatever callback is named.
func TestHungPlugin(t *testing.T) {
	t.Parallel()
	for _, hung := range []string{"open", "pread"} {
		t.Run(hung, func(t *testing.T) {
			t.Parallel()
			wait := func(callback string) string {
				return callback + `=if [ -e DIR/hung-` + callback + ` ]; then read x <DIR/fifo; fi; `
			}
			s := startHost(t, "--metrics=unix:DIR/http", "--health-read=100ms", "eval", "get_size=echo 1M",
				wait("open")+"echo handle", wait("pread")+"head -c $3 /dev/zero", "thread_model=echo parallel")
			check := func() string {
				out, err := try(t, nbdhost, "--healthcheck=unix:"+filepath.Join(s.dir, "http"))
				return fmt.Sprint(out, err)
			}
			become := func(texts ...string) {
				t.Helper()
				for deadline := time.Now().Add(patience); ; {
					got := check()
					if slices.ContainsFunc(texts, func(text string) bool { return strings.Contains(got, text) }) {
						return
					}
					if time.Now().After(deadline) {
						t.Fatalf("got %s, need one of %q", got, texts)
					}
				}
			}
			become("ready\n")
			command(t, "mkfifo", filepath.Join(s.dir, "fifo"))
			writeFile(t, filepath.Join(s.dir, "hung-"+hung), "", 0o600)
			// The second is what a later read says.
			become(hung+" has not returned", "has not returned from "+hung)
			if status, text := s.ask("/livez"); status != http.StatusOK {
				t.Errorf("livez: got %d, %s", status, text)
			}
			if s.metrics()[`nbdhost_health_reads_total{result="failed"}`] == 0 {
				t.Error("no failed read in the metrics")
			}
			if err := os.Remove(filepath.Join(s.dir, "hung-"+hung)); err != nil {
				t.Fatal(err)
			}
			f, err := os.OpenFile(filepath.Join(s.dir, "fifo"), os.O_RDWR, 0)
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			fmt.Fprintln(f)
			become("ready\n")
			s.stop()
		})
	}
}

// TestLimits: real clients under limits get the right data, and the limits are seen.
func TestLimits(t *testing.T) {
	t.Parallel()
	for name, tt := range map[string]struct {
		args   []string
		metric string // that counts something
	}{
		"bandwidth": {[]string{"--bandwidth=128M"}, `nbdhost_delayed_operations_total{limit="bandwidth"}`},
		"bytes":     {[]string{"--max-bytes=256K", "--filter=delay", "delay-read=1ms", "delay-write=1ms"}, `nbdhost_delayed_operations_total{limit="bytes"}`},
		"requests":  {[]string{"--max-requests=2", "--filter=delay", "delay-read=1ms", "delay-write=1ms"}, `nbdhost_delayed_operations_total{limit="requests"}`},
		"own bytes": {[]string{"--max-bytes-per-connection=256K", "--filter=delay", "delay-read=1ms", "delay-write=1ms"},
			`nbdhost_delayed_operations_total{limit="bytes_per_connection"}`},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := startHost(t, append([]string{"--metrics=unix:DIR/http", "memory", "16M"}, tt.args...)...)
			in, out := filepath.Join(s.dir, "in"), filepath.Join(s.dir, "out")
			writeFile(t, in, strings.Repeat("some data that is not zero, ", 16<<20/28+1)[:16<<20], 0o600)
			command(t, "nbdcopy", "--connections=2", in, s.uri(""))
			command(t, "nbdcopy", "--connections=2", s.uri(""), out)
			sameBytes(t, out, in)
			if n := s.metrics()[tt.metric]; n == 0 {
				t.Errorf("%s is 0", tt.metric)
			}
			s.stop()
		})
	}
	t.Run("a client that does not read", func(t *testing.T) {
		t.Parallel()
		s := start(t, nbdhost, tempDir(t), true, "--metrics=unix:DIR/http", "--max-bytes=32M", "--send-timeout=500ms", "memory", "32M")
		stuck := s.hello(false)
		stuck.read(1, 0, 32<<20) // more than the kernel holds for it
		s.waitFor(`nbdhost_operations_total{command="read",export=""}`, 1)
		c := s.hello(false)
		c.read(2, 0, 1<<20)
		c.want(2, 0)
		if s.metrics()[`nbdhost_delayed_operations_total{limit="bytes"}`] != 1 {
			t.Error("nothing had to wait for the client that does not read")
		}
		c.disc()
		s.waitFor("nbdhost_connections", 0)
		s.stop()
	})
	t.Run("connections", func(t *testing.T) {
		t.Parallel()
		s := start(t, nbdhost, tempDir(t), true, "--metrics=unix:DIR/http", "--max-connections-per-address=1", "memory", "2M")
		c := s.dial()
		s.waitFor("nbdhost_connections", 1)
		if _, err := try(t, "nbdinfo", s.uri("")); err == nil {
			t.Error("a second client was served")
		}
		if !strings.Contains(s.stderr(), "error: refuse connection from 127.0.0.1: too many connections from 127.0.0.1: at most 1 may be open at a time") {
			t.Errorf("log: %s", s.stderr())
		}
		c.Close()
		s.waitFor("nbdhost_connections", 0)
		command(t, "nbdinfo", s.uri(""))
		if n := s.metrics()[`nbdhost_handshake_failures_total{reason="max_connections_per_address"}`]; n != 1 {
			t.Errorf("%g connections were refused, need 1", n)
		}
		s.stop()
	})
}
