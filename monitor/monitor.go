package monitor

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"log/slog"
	"net"
	"net/http"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"golang.org/x/net/netutil"

	"nbdhost/backend"
	"nbdhost/server"
)

const (
	// Clients that are slow, or hold connections open, do not add up.
	maxConnections    = 64
	maxScrapes        = 4
	maxHeader         = 16 << 10 // bytes
	readTimeout       = 5 * time.Second
	writeTimeout      = 10 * time.Second // without what a read through the plugin may take
	probeResultTime   = time.Second      // for how long the result of a read is used again
	shutdownPatience  = 100 * time.Millisecond
	textPlain         = "text/plain; charset=utf-8"
	DefaultHealthRead = 5 * time.Second
)

// Options say what to show.
type Options struct {
	// Chain is the one that the server has. It is needed: its figures are there before
	// the server is.
	Chain   *backend.Chain
	Version string // of the program
	// HealthRead is how long a read through the plugin may take for /readyz; 0 is
	// for no read. Export is what is read.
	HealthRead time.Duration
	Export     string
	// Log receives what goes wrong with scrapes, at debug level, and the error that
	// ends Serve; nil for nothing.
	Log *slog.Logger
}

// A Monitor answers HTTP requests about one server.
type Monitor struct {
	o      Options
	http   *http.Server // nil where the program has one of its own
	srv    atomic.Pointer[server.Server]
	served chan struct{} // closed when http has ended

	reads struct {
		sync.Mutex           // held while a read is made
		when       time.Time // the last one ended
		err        error
		good, bad  atomic.Uint64
	}
}

// New returns a monitor that answers through its Handler. It panics without o.Chain.
func New(o Options) *Monitor {
	if o.Chain == nil {
		panic("monitor: got Options without a Chain: need the one that the server has")
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	return &Monitor{o: o}
}

// Serve is New, and answers the requests that come in on l, which is closed at the end.
func Serve(l net.Listener, o Options) *Monitor {
	m := New(o)
	o = m.o
	m.served = make(chan struct{})
	m.http = &http.Server{
		Handler:           m.Handler(),
		ReadHeaderTimeout: readTimeout,
		ReadTimeout:       readTimeout,
		WriteTimeout:      writeTimeout + o.HealthRead,
		MaxHeaderBytes:    maxHeader,
		ErrorLog:          log.New(debugWriter{o.Log}, "", 0),
	}
	m.http.SetKeepAlivesEnabled(false) // idle connections could keep probes out
	go func() {
		defer close(m.served)
		if err := m.http.Serve(netutil.LimitListener(l, maxConnections)); !errors.Is(err, http.ErrServerClosed) {
			o.Log.Error("serve metrics and health on " + l.Addr().String() + ": " + err.Error())
		}
	}()
	return m
}

// debugWriter logs what package http has to say of bad requests.
type debugWriter struct{ log *slog.Logger }

func (w debugWriter) Write(p []byte) (int, error) {
	w.log.Debug("metrics and health: " + string(p[:max(0, len(p)-1)]))
	return len(p), nil
}

// Attach makes the monitor tell of s, which serves from now on. It panics where another one was
// attached before, whose clients would be counted no more. It does nothing with a nil Monitor.
func (m *Monitor) Attach(s *server.Server) {
	if m != nil && !m.srv.CompareAndSwap(nil, s) && m.srv.Load() != s {
		panic("monitor: got a second server to attach: need a Monitor for each")
	}
}

// Close ends what Serve began, and the listener; after New there is nothing to end. The nil
// Monitor is one that never was.
func (m *Monitor) Close() {
	if m == nil || m.http == nil {
		return
	}
	// Who asks just now is answered; a read that hangs is not waited for.
	ctx, cancel := context.WithTimeout(context.Background(), shutdownPatience)
	defer cancel()
	if m.http.Shutdown(ctx) != nil {
		m.http.Close()
	}
	<-m.served
}

// Handler answers GET and HEAD requests for /metrics, /livez, /readyz and /, which is a list
// of these; for other paths it answers 404, and 405 to other methods. Below another path of
// a mux it needs [http.StripPrefix]. It answers 503 where there are more than four
// scrapes at a time, or one takes 10 seconds. What else clients may take is for the program's
// [http.Server] to bound; if that has a WriteTimeout, it must be longer than Options.HealthRead.
func (m *Monitor) Handler() http.Handler {
	registry := prometheus.NewRegistry()
	registry.MustRegister(
		collector{m},
		collectors.NewGoCollector(),
		collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}),
	)
	mux := http.NewServeMux()
	mux.Handle("/metrics", promhttp.HandlerFor(registry, promhttp.HandlerOpts{
		ErrorLog:            log.New(debugWriter{m.o.Log}, "", 0),
		MaxRequestsInFlight: maxScrapes,
		Timeout:             writeTimeout,
	}))
	mux.HandleFunc("/livez", func(w http.ResponseWriter, r *http.Request) { answer(w, nil) })
	mux.HandleFunc("/readyz", func(w http.ResponseWriter, r *http.Request) { answer(w, m.ready(r.Context())) })
	mux.HandleFunc("/{$}", func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", textPlain)
		io.WriteString(w, index)
	})
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method != http.MethodGet && r.Method != http.MethodHead {
			w.Header().Set("Allow", "GET, HEAD")
			http.Error(w, "got "+r.Method+", need GET or HEAD", http.StatusMethodNotAllowed)
			return
		}
		mux.ServeHTTP(w, r)
	})
}

const index = `nbdhost

/metrics   for Prometheus
/livez     200 as long as the process answers
/readyz    200 while clients are served, 503 before and while the server stops
`

// answer says ok, or why not.
func answer(w http.ResponseWriter, err error) {
	w.Header().Set("Content-Type", textPlain)
	w.Header().Set("Cache-Control", "no-store")
	if err != nil {
		w.WriteHeader(http.StatusServiceUnavailable)
		fmt.Fprintln(w, err)
		return
	}
	fmt.Fprintln(w, "ok")
}

var (
	errStarting = errors.New("not ready: the server is starting")
	errStopping = errors.New("not ready: the server is stopping")
)

// serving returns nil while clients are served.
func (m *Monitor) serving() error {
	s := m.srv.Load()
	if s == nil {
		return errStarting
	}
	select {
	case <-s.Quit():
		return errStopping
	default:
		return nil
	}
}

// ready is serving, and a read through the plugin where one is wanted.
func (m *Monitor) ready(ctx context.Context) error {
	if err := m.serving(); err != nil || m.o.HealthRead == 0 {
		return err
	}
	r := &m.reads
	r.Lock()
	defer r.Unlock()
	if time.Since(r.when) >= probeResultTime {
		// Not with the request's context: the result is for others as well.
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), m.o.HealthRead)
		defer cancel()
		r.err = m.srv.Load().Probe(ctx, m.o.Export)
		r.when = time.Now()
		if r.err == nil {
			r.good.Add(1)
		} else {
			r.bad.Add(1)
		}
	}
	if r.err != nil {
		return fmt.Errorf("not ready: %w", r.err)
	}
	return m.serving() // it may have begun to stop meanwhile
}
