package monitor

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"
	"go.uber.org/goleak"

	"nbdhost/backend"
	"nbdhost/client"
	"nbdhost/server"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// A disk in memory whose reads a test can fail or hold up.
type disk struct {
	*backend.Mem
	read atomic.Pointer[func() error]
}

func (d *disk) Open(c *backend.Call, readonly bool, export string) (backend.Handle, error) {
	h, err := d.Mem.Open(c, readonly, export)
	return diskHandle{h, d}, err
}

type diskHandle struct {
	backend.Handle
	d *disk
}

func (h diskHandle) Pread(c *backend.Call, p []byte, off uint64) error {
	if f := h.d.read.Load(); f != nil {
		if err := (*f)(); err != nil {
			return err
		}
	}
	return h.Handle.Pread(c, p, off)
}

// A bed is a server with a monitor, whose addresses are Unix sockets.
type bed struct {
	*Monitor
	srv  *server.Server
	disk *disk
	uri  string
	at   Address
	http *http.Client
}

func newBed(t *testing.T, o Options) *bed {
	t.Helper()
	dir := t.TempDir()
	b := &bed{disk: &disk{Mem: backend.NewMem(1 << 20)}}
	o.Chain, o.Version = backend.NewChain(b.disk, nil, backend.Trace{}), "1.2.3"
	b.srv = server.New(server.Options{Chain: o.Chain, Limits: server.Limits{Connections: 2}})
	l, err := net.Listen("unix", filepath.Join(dir, "nbd"))
	if err != nil {
		t.Fatal(err)
	}
	b.uri = "nbd+unix:///?socket=" + filepath.Join(dir, "nbd")
	if b.at, err = ParseAddress("unix:" + filepath.Join(dir, "http")); err != nil {
		t.Fatal(err)
	}
	h, err := Listen(b.at)
	if err != nil {
		t.Fatal(err)
	}
	b.Monitor = Serve(h, o)
	b.http = &http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", b.at.address)
	}}}
	served := make(chan error, 1)
	go func() { served <- b.srv.Serve(l) }()
	t.Cleanup(func() {
		b.srv.Shutdown()
		if !b.srv.Wait() || <-served != nil {
			t.Error("the server did not stop as it should")
		}
		b.http.CloseIdleConnections()
		b.Close()
		if _, err := os.Stat(b.at.address); err == nil {
			t.Error("the socket is still there")
		}
	})
	return b
}

// get returns the status and the text of an answer.
func (b *bed) get(t *testing.T, method, path string) (int, string, http.Header) {
	t.Helper()
	r, err := http.NewRequest(method, "http://x"+path, nil)
	if err != nil {
		t.Fatal(err)
	}
	a, err := b.http.Do(r)
	if err != nil {
		t.Fatal(err)
	}
	defer a.Body.Close()
	text, err := io.ReadAll(a.Body)
	if err != nil {
		t.Fatal(err)
	}
	return a.StatusCode, string(text), a.Header
}

// scrape returns the metrics by name.
func (b *bed) scrape(t *testing.T) map[string]*dto.MetricFamily {
	t.Helper()
	status, text, _ := b.get(t, "GET", "/metrics")
	if status != 200 {
		t.Fatalf("got %d: %s", status, text)
	}
	parser := expfmt.NewTextParser(model.UTF8Validation)
	families, err := parser.TextToMetricFamilies(strings.NewReader(text))
	if err != nil {
		t.Fatal(err)
	}
	return families
}

// value adds up the metrics of a name that have all the labels, given as name, value, ...
func value(t *testing.T, families map[string]*dto.MetricFamily, name string, labels ...string) (v float64) {
	t.Helper()
	if families[name] == nil {
		t.Fatalf("%s is not there", name)
	}
	found := false
	for _, m := range families[name].Metric {
		has := map[string]string{}
		for _, l := range m.Label {
			has[l.GetName()] = l.GetValue()
		}
		match := true
		for i := 0; i < len(labels); i += 2 {
			match = match && has[labels[i]] == labels[i+1]
		}
		if match {
			found = true
			v += m.GetCounter().GetValue() + m.GetGauge().GetValue() + float64(m.GetHistogram().GetSampleCount())
		}
	}
	if !found {
		t.Fatalf("%s%q is not there", name, labels)
	}
	return v
}

// What was done is in the metrics, under the names and labels that docs/operations.md
// has, before there is a server as well.
func TestMetrics(t *testing.T) {
	b := newBed(t, Options{HealthRead: time.Minute})
	early := b.scrape(t)
	if v := value(t, early, "nbdhost_ready"); v != 0 {
		t.Errorf("ready before it serves: %g", v)
	}
	b.Attach(b.srv)
	for range 2 {
		if status, text, _ := b.get(t, "GET", "/readyz"); status != 200 {
			t.Fatal(text)
		}
	}

	c, err := client.Dial(t.Context(), strings.Replace(b.uri, "///", "///a%22b%0Ac", 1), nil)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	p := make([]byte, 1000)
	for range 5 {
		if err := c.Pread(p, 0); err != nil {
			t.Fatal(err)
		}
	}
	fail := func() error { return &backend.Error{Module: "mem", Op: "pread", Errno: syscall.EIO, Msg: "bad"} }
	b.disk.read.Store(&fail)
	if err := c.Pread(p, 0); err == nil {
		t.Fatal("no error")
	}
	if err := c.Pwrite(p[:10], 0, 0); err != nil {
		t.Fatal(err)
	}

	got := b.scrape(t)
	// A probe's worker outlives its result a little, and the reader has its buffers until it waits.
	for value(t, got, "nbdhost_worker_threads") != 0 || value(t, got, "nbdhost_buffers", "state", "in_use") != 0 {
		got = b.scrape(t)
	}
	const export = "a\"b\nc"
	for _, want := range []struct {
		v      float64
		name   string
		labels []string
	}{
		{1, "nbdhost_ready", nil},
		{1, "nbdhost_build_info", []string{"version", "1.2.3", "plugin", "mem"}},
		{6, "nbdhost_operations_total", []string{"export", export, "command", "read"}},
		{1, "nbdhost_operations_total", []string{"export", export, "command", "write"}},
		{5000, "nbdhost_bytes_total", []string{"export", export, "command", "read"}},
		{10, "nbdhost_bytes_total", []string{"export", export, "command", "write"}},
		{1, "nbdhost_errors_total", []string{"export", export, "command", "read", "module", "mem"}},
		{0, "nbdhost_errors_total", []string{"export", export, "command", "write", "module", "(server)"}},
		{6, "nbdhost_operation_duration_seconds", []string{"export", export, "command", "read"}},
		{0, "nbdhost_operations_in_flight", nil},
		{1, "nbdhost_connections", nil},
		{1, "nbdhost_connections_total", nil},
		{1, "nbdhost_export_connections", []string{"export", export}},
		{0, "nbdhost_handshake_failures_total", []string{"reason", "tls_required"}},
		{0, "nbdhost_tls_failures_total", nil},
		{0, "nbdhost_delayed_operations_total", []string{"limit", "bandwidth"}},
		{0, "nbdhost_delay_seconds_total", []string{"limit", "bytes"}},
		{7, "nbdhost_module_calls_total", []string{"layer", "0", "module", "mem", "callback", "pread"}}, // with the probe's
		{1, "nbdhost_module_calls_total", []string{"layer", "0", "module", "mem", "callback", "pwrite"}},
		{0, "nbdhost_worker_threads", nil},
		{0, "nbdhost_buffers", []string{"state", "in_use"}},
		{0, "nbdhost_buffer_bytes", []string{"state", "in_use"}},
		{1, "nbdhost_health_reads_total", []string{"result", "ok"}},
		{0, "nbdhost_health_reads_total", []string{"result", "failed"}},
	} {
		if v := value(t, got, want.name, want.labels...); v != want.v {
			t.Errorf("%s%q: got %g, need %g", want.name, want.labels, v, want.v)
		}
	}
	for _, name := range []string{"go_goroutines", "process_open_fds", "process_resident_memory_bytes"} {
		if value(t, got, name) <= 0 {
			t.Errorf("%s is 0", name)
		}
	}
	h := got["nbdhost_operation_duration_seconds"].Metric[0].Histogram
	if n := len(h.Bucket); n != len(server.LatencyBounds)+1 || h.Bucket[n-1].GetCumulativeCount() != h.GetSampleCount() || h.GetSampleSum() <= 0 {
		t.Errorf("got %v", h)
	}
	// Each name is there before it is needed, so that nothing begins with a jump.
	for name := range got {
		if strings.HasPrefix(name, "nbdhost_") && early[name] == nil && !perExport[name] && !ofServer[name] {
			t.Errorf("%s is not there from the beginning", name)
		}
	}
}

// docs/operations.md has each metric and no other, and each word that a label may have.
func TestDocument(t *testing.T) {
	b, err := os.ReadFile("../docs/operations.md")
	if err != nil {
		t.Fatal(err)
	}
	doc := string(b)
	descs := make(chan *prometheus.Desc, 100)
	collector{}.Describe(descs)
	close(descs)
	known := map[string]bool{}
	for d := range descs {
		name := regexp.MustCompile(`fqName: "(\w+)"`).FindStringSubmatch(d.String())[1]
		known[name] = true
		if !strings.Contains(doc, "| `"+name+"` |") {
			t.Errorf("%s is not in docs/operations.md", name)
		}
	}
	for _, m := range regexp.MustCompile("(?m)^\\| `(nbdhost_\\w+)`").FindAllStringSubmatch(doc, -1) {
		if !known[m[1]] {
			t.Errorf("docs/operations.md has %s, which is not there", m[1])
		}
	}
	for r := range len(server.Stats{}.Failures) {
		if word := server.Reason(r).String(); !strings.Contains(doc, "`"+word+"`") {
			t.Errorf("the reason %s is not in docs/operations.md", word)
		}
	}
}

// What needs an export that was opened, and what needs a server.
var (
	perExport = map[string]bool{"nbdhost_operations_total": true, "nbdhost_bytes_total": true, "nbdhost_errors_total": true,
		"nbdhost_operation_duration_seconds": true, "nbdhost_export_connections": true}
	ofServer = map[string]bool{"nbdhost_connections": true, "nbdhost_connections_total": true, "nbdhost_handshake_failures_total": true,
		"nbdhost_tls_failures_total": true, "nbdhost_operations_in_flight": true, "nbdhost_worker_threads": true,
		"nbdhost_delayed_operations_total": true, "nbdhost_delay_seconds_total": true}
)

// The server is ready while it serves, and alive all the time; that is what Check says too.
func TestHealth(t *testing.T) {
	b := newBed(t, Options{})
	state := func(status int, text string) {
		t.Helper()
		if got, _, _ := b.get(t, "GET", "/livez"); got != 200 {
			t.Errorf("livez: got %d", got)
		}
		got, said, _ := b.get(t, "GET", "/readyz")
		if got != status || !strings.Contains(said, text) {
			t.Errorf("readyz: got %d, %s", got, said)
		}
		err := Check(t.Context(), b.at)
		if (err == nil) != (status == 200) || err != nil && !strings.Contains(err.Error(), text) {
			t.Errorf("check: got %v", err)
		}
	}
	state(503, "the server is starting")
	b.Attach(b.srv)
	state(200, "ok")
	c, err := client.Dial(t.Context(), b.uri, nil) // holds up the end
	if err != nil {
		t.Fatal(err)
	}
	b.srv.Shutdown()
	state(503, "the server is stopping")
	if v := value(t, b.scrape(t), "nbdhost_ready"); v != 0 {
		t.Errorf("ready while it stops: %g", v)
	}
	c.Close()
	b.srv.Wait()
	state(503, "the server is stopping")
	if err := Check(t.Context(), Address{"unix", b.at.address + "x"}); err == nil || !strings.Contains(err.Error(), "no such file") {
		t.Errorf("got %v", err)
	}
}

// A plugin that fails or hangs is not ready, and many who ask make one read.
func TestHealthRead(t *testing.T) {
	b := newBed(t, Options{HealthRead: 50 * time.Millisecond})
	b.Attach(b.srv)
	var reads atomic.Int64
	read := func() error { reads.Add(1); return nil }
	b.disk.read.Store(&read)
	var all sync.WaitGroup
	for range 20 {
		all.Go(func() {
			if status, text, _ := b.get(t, "GET", "/readyz"); status != 200 {
				t.Error(text)
			}
		})
	}
	all.Wait()
	// A slow machine may need more than probeResultTime.
	if n := reads.Load(); n == 0 || n > 10 {
		t.Errorf("%d reads for 20 questions", n)
	}
	forget := func() {
		b.reads.Lock()
		b.reads.when = time.Time{}
		b.reads.Unlock()
	}
	fail := func() error { return &backend.Error{Module: "mem", Op: "pread", Errno: syscall.EIO, Msg: "no medium"} }
	b.disk.read.Store(&fail)
	forget()
	if status, text, _ := b.get(t, "GET", "/readyz"); status != 503 || !strings.Contains(text, "no medium") {
		t.Errorf("got %d, %s", status, text)
	}
	release := make(chan struct{})
	hang := func() error { <-release; return nil }
	b.disk.read.Store(&hang)
	forget()
	if status, text, _ := b.get(t, "GET", "/readyz"); status != 503 || !strings.Contains(text, "pread has not returned in time") {
		t.Errorf("got %d, %s", status, text)
	}
	if status, _, _ := b.get(t, "GET", "/livez"); status != 200 {
		t.Errorf("livez: got %d", status)
	}
	forget()
	if status, text, _ := b.get(t, "GET", "/readyz"); status != 503 || !strings.Contains(text, "the last one has not returned") {
		t.Errorf("got %d, %s", status, text)
	}
	if v := value(t, b.scrape(t), "nbdhost_health_reads_total", "result", "failed"); v != 3 {
		t.Errorf("%g reads failed, need 3", v)
	}
	close(release)
}

// The port is for few requests of few kinds.
func TestHTTP(t *testing.T) {
	b := newBed(t, Options{})
	b.Attach(b.srv)
	for _, tt := range []struct {
		method, path string
		status       int
		text         string
	}{
		{"GET", "/", 200, "/readyz"},
		{"HEAD", "/metrics", 200, ""},
		{"GET", "/livez", 200, "ok"},
		{"POST", "/metrics", 405, "need GET or HEAD"},
		{"DELETE", "/livez", 405, "need GET or HEAD"},
		{"GET", "/debug/pprof/", 404, ""},
		{"GET", "/nothing", 404, ""},
	} {
		status, text, header := b.get(t, tt.method, tt.path)
		if status != tt.status || !strings.Contains(text, tt.text) {
			t.Errorf("%s %s: got %d, %q", tt.method, tt.path, status, text)
		}
		if (status == 405) != (header.Get("Allow") != "") {
			t.Errorf("%s %s: got Allow %q", tt.method, tt.path, header.Get("Allow"))
		}
	}
	// A header that does not end.
	nc, err := net.Dial("unix", b.at.address)
	if err != nil {
		t.Fatal(err)
	}
	defer nc.Close()
	go func() {
		io.WriteString(nc, "GET / HTTP/1.1\r\nHost: x\r\n")
		for i := 0; i < 1<<20; i += 1000 {
			if _, err := fmt.Fprintf(nc, "X-%d: %s\r\n", i, strings.Repeat("x", 1000)); err != nil {
				return
			}
		}
	}()
	answer := make([]byte, 12)
	if _, err := io.ReadFull(nc, answer); err != nil || string(answer) != "HTTP/1.1 431" {
		t.Errorf("got %q, %v", answer, err)
	}
	// Those that say nothing do not hold up the end.
	for range 2 * maxConnections {
		nc, err := net.Dial("unix", b.at.address)
		if err != nil {
			t.Fatal(err)
		}
		defer nc.Close()
	}
}

// A monitor without a chain, or for two servers, is refused before it says what is not true.
func TestMisuse(t *testing.T) {
	said := func(f func()) (text any) {
		defer func() { text = recover() }()
		f()
		return nil
	}
	if text := said(func() { New(Options{}) }); !strings.Contains(fmt.Sprint(text), "without a Chain") {
		t.Errorf("no chain: got %v", text)
	}
	chain := backend.NewChain(backend.NewMem(1), nil, backend.Trace{})
	m, first := New(Options{Chain: chain}), server.New(server.Options{Chain: chain})
	m.Attach(first)
	if text := said(func() { m.Attach(server.New(server.Options{Chain: chain})) }); !strings.Contains(fmt.Sprint(text), "a Monitor for each") {
		t.Errorf("a second server: got %v", text)
	}
	if m.srv.Load() != first {
		t.Error("the second server has replaced the first")
	}
	m.Close() // of nothing
	(*Monitor)(nil).Attach(first)
	(*Monitor)(nil).Close()
}

func TestParseAddress(t *testing.T) {
	for s, want := range map[string]string{
		"9809": "127.0.0.1:9809", ":9809": "127.0.0.1:9809", ":0": "127.0.0.1:0", "localhost:1": "localhost:1",
		"0.0.0.0:9809": "0.0.0.0:9809", "[::]:9809": "[::]:9809", "[::1]:80": "[::1]:80",
		"unix:/run/x": "unix:/run/x",
	} {
		if a, err := ParseAddress(s); err != nil || a.String() != want {
			t.Errorf("%q: got %v, %v, need %s", s, a, err, want)
		}
	}
	for _, s := range []string{"", ":", "host", "host:", "host:http", ":65536", ":-1", "::1:80", "unix:", "unix:" + strings.Repeat("x", 200), "1.2.3.4"} {
		if a, err := ParseAddress(s); err == nil {
			t.Errorf("%q: got %v, need an error", s, a)
		}
	}
}
