package monitor

import (
	"runtime"
	"strconv"
	"strings"

	"github.com/prometheus/client_golang/prometheus"

	"nbdhost/backend"
	"nbdhost/protocol"
	"nbdhost/server"
)

// ownErrors is the module of errors that no module made.
const ownErrors = "(server)" // no module has such a name

func desc(name, help string, labels ...string) *prometheus.Desc {
	return prometheus.NewDesc("nbdhost_"+name, help, labels, nil)
}

var (
	buildInfo   = desc("build_info", "What is running; always 1.", "version", "goversion", "plugin")
	readyGauge  = desc("ready", "1 while clients are served, 0 before and while the server stops.")
	operations  = desc("operations_total", "Requests that were answered, also with an error.", "export", "command")
	bytes       = desc("bytes_total", "Bytes that requests without an error were about.", "export", "command")
	failures    = desc("errors_total", "Requests that were answered with an error, by the module that it came from.", "export", "command", "module")
	durations   = desc("operation_duration_seconds", "Time from the receipt of a request until its reply was ready to be sent.", "export", "command")
	inFlight    = desc("operations_in_flight", "Requests that modules are working on.")
	connections = desc("connections", "Connections that are open.")
	accepted    = desc("connections_total", "Connections so far, without those beyond a limit.")
	clients     = desc("export_connections", "Connections that have an export open.", "export")
	handshakes  = desc("handshake_failures_total", "Connections that did not get through the handshake, or were refused.", "reason")
	tlsFailures = desc("tls_failures_total", "Handshakes of TLS that failed.")
	delayed     = desc("delayed_operations_total", "Requests that had to wait for a limit.", "limit")
	delaySum    = desc("delay_seconds_total", "Time that requests have waited for a limit.", "limit")
	calls       = desc("module_calls_total", "Calls of modules for data; layer 0 is the plugin, those above are filters.", "layer", "module", "callback")
	workers     = desc("worker_threads", "Workers that make calls besides the connections themselves.")
	buffers     = desc("buffers", "Buffers for requests and replies: in use, or kept for later use.", "state")
	bufferBytes = desc("buffer_bytes", "Memory of the buffers.", "state")
	healthReads = desc("health_reads_total", "Reads through the plugin for /readyz.", "result")
)

// A collector turns a server's figures into metrics.
type collector struct{ m *Monitor }

func (c collector) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{buildInfo, readyGauge, operations, bytes, failures, durations, inFlight, connections,
		accepted, clients, handshakes, tlsFailures, delayed, delaySum, calls, workers, buffers, bufferBytes, healthReads} {
		ch <- d
	}
}

func (c collector) Collect(ch chan<- prometheus.Metric) {
	gauge := func(d *prometheus.Desc, v float64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, v, labels...)
	}
	counter := func(d *prometheus.Desc, v float64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.CounterValue, v, labels...)
	}
	m := c.m
	gauge(buildInfo, 1, m.o.Version, runtime.Version(), m.o.Chain.Name())
	ready := 1.0
	if m.serving() != nil {
		ready = 0
	}
	gauge(readyGauge, ready)
	b := backend.Buffers()
	gauge(buffers, float64(b.InUse), "in_use")
	gauge(buffers, float64(b.Kept), "kept")
	gauge(bufferBytes, float64(b.InUseBytes), "in_use")
	gauge(bufferBytes, float64(b.KeptBytes), "kept")
	if m.o.HealthRead > 0 {
		counter(healthReads, float64(m.reads.good.Load()), "ok")
		counter(healthReads, float64(m.reads.bad.Load()), "failed")
	}
	layers := m.o.Chain.Calls()
	for i := range layers {
		layers[i].Each(func(cb backend.Callback, n uint64) {
			counter(calls, float64(n), strconv.Itoa(i), layers[i].Module, cb.String())
		})
	}
	srv := m.srv.Load()
	if srv == nil {
		return
	}
	s := srv.Stats()
	gauge(inFlight, float64(s.InFlight))
	gauge(connections, float64(s.Connections))
	counter(accepted, float64(s.Accepted))
	counter(tlsFailures, float64(s.TLSFailures))
	gauge(workers, float64(s.Workers))
	for r, n := range s.Failures {
		counter(handshakes, float64(n), server.Reason(r).String())
	}
	for l, d := range s.Delays {
		counter(delayed, float64(d.Requests), server.Limit(l).String())
		counter(delaySum, d.Seconds, server.Limit(l).String())
	}
	for _, e := range s.Exports {
		gauge(clients, float64(e.Connections), e.Name)
		for _, x := range e.Commands {
			command := commandName(x.Command)
			counter(operations, float64(x.Operations), e.Name, command)
			counter(bytes, float64(x.Bytes), e.Name, command)
			// Also those that have not failed yet, so that the first error is seen
			// as one more.
			if x.Errors == nil {
				x.Errors = map[string]uint64{}
			}
			x.Errors[""] += 0
			for i := range layers {
				x.Errors[layers[i].Module] += 0
			}
			for module, n := range x.Errors {
				if module == "" {
					module = ownErrors
				}
				counter(failures, float64(n), e.Name, command, module)
			}
			buckets := make(map[float64]uint64, len(server.LatencyBounds))
			sum := uint64(0)
			for i, bound := range server.LatencyBounds {
				sum += x.Latency[i]
				buckets[bound.Seconds()] = sum
			}
			sum += x.Latency[len(server.LatencyBounds)]
			ch <- prometheus.MustNewConstHistogram(durations, sum, x.Seconds, buckets, e.Name, command)
		}
	}
}

// commandName is a label such as write_zeroes.
func commandName(c protocol.Command) string {
	if c == server.UnknownCommand {
		return "unknown"
	}
	return strings.ToLower(strings.TrimPrefix(c.String(), "NBD_CMD_"))
}
