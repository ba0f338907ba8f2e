package main

import (
	"fmt"
	"slices"
)

const (
	kib = 1 << 10
	mib = 1 << 20

	// exportSize is of every export that is not copied as a whole: more than
	// the processor's cache holds.
	exportSize = 64 * mib
)

// A row is one thing to measure with each server.
type row struct {
	client    string // load, fio, nbdcopy or qemu-img
	plugin    string // memory, file, null, pattern, slow, brief, mixed, delay, serial or perl
	op        string // read, write or status
	size      int    // of a request, in bytes
	depth     int    // requests in flight on each connection
	conns     int
	transport string // unix or tcp, or with TLS tls or tlstcp (certificates), psk or psktcp (a pre-shared key)
	filters   int    // of filterChain
	busy      bool   // all processors have other work
	threads   int    // of nbdhost, and of another nbdkit; 0 is the default
	nofilters int    // layers of the filter that does nothing
	metrics   bool   // nbdhost has --metrics, and is compared with itself without
}

func (r row) name() string {
	n := fmt.Sprintf("%s/%s/%s/d%d/c%d/%s/f%d", r.plugin, r.op, sizeName(r.size), r.depth, r.conns, r.transport, r.filters)
	if r.client != "load" {
		n = r.client + ":" + n
	}
	if r.busy {
		n += "/busy"
	}
	if r.threads > 0 {
		n += fmt.Sprintf("/t%d", r.threads)
	}
	if r.nofilters > 0 {
		n += fmt.Sprintf("/n%d", r.nofilters)
	}
	if r.metrics {
		n = "metrics:" + n
	}
	return n
}

func sizeName(n int) string {
	if n >= mib {
		return fmt.Sprintf("%dm", n/mib)
	}
	return fmt.Sprintf("%dk", n/kib)
}

// others are the servers that nbdhost is compared with.
func (r row) others() []string {
	if r.metrics {
		return []string{"without"}
	}
	servers := []string{"nbdkit"}
	if r.threads > 0 {
		return append(servers, "nbdkit -t")
	}
	if r.secured() {
		return servers
	}
	if r.plugin == "memory" && r.op != "status" && r.filters+r.nofilters == 0 {
		servers = append(servers, "floor")
		if r.client == "load" && r.conns == 1 && !r.busy {
			servers = append(servers, "floor+plugin")
		}
	}
	if r.plugin == "file" && r.op != "status" && r.filters == 0 {
		servers = append(servers, "qemu-nbd")
	}
	return servers
}

// secured tells whether the row is about TLS.
func (r row) secured() bool { return r.transport != "unix" && r.transport != "tcp" }

// base is what the rows vary.
var base = row{client: "load", plugin: "memory", op: "read", size: 4 * kib, depth: 1, conns: 1, transport: "unix"}

var (
	ops   = []string{"read", "write"}
	sizes = []int{4 * kib, 64 * kib, mib}
)

// depths are the numbers of requests in flight that belong to so many connections.
func depths(conns int) []int {
	if conns == 1 {
		return []int{1, 8, 64}
	}
	return []int{1, 16, 64}
}

// standardRows are measured if nothing else is asked for: each thing is varied
// while the others stay as they are.
func standardRows() (rows []row) {
	for _, op := range ops {
		for _, size := range sizes {
			for _, depth := range depths(1) {
				rows = append(rows, row{op: op, size: size, depth: depth})
			}
		}
	}
	for _, op := range ops {
		for _, conns := range []int{4, 16} {
			for _, depth := range depths(conns) {
				rows = append(rows, row{op: op, conns: conns, depth: depth})
			}
		}
	}
	rows = append(rows, row{size: 64 * kib, conns: 16, depth: 16})
	for _, plugin := range []string{"file", "null", "pattern"} {
		for _, op := range ops {
			if plugin == "pattern" && op == "write" {
				continue // takes only what is there already
			}
			rows = append(rows,
				row{plugin: plugin, op: op, depth: 1}, row{plugin: plugin, op: op, depth: 64},
				row{plugin: plugin, op: op, size: 64 * kib, depth: 8}, row{plugin: plugin, op: op, size: mib, depth: 8})
		}
	}
	for _, op := range ops {
		rows = append(rows,
			row{transport: "tcp", op: op, depth: 1}, row{transport: "tcp", op: op, depth: 64},
			row{transport: "tcp", op: op, size: 64 * kib, depth: 8}, row{transport: "tcp", op: op, size: mib, depth: 8})
	}
	for _, filters := range []int{1, 3} {
		rows = append(rows,
			row{filters: filters, depth: 1}, row{filters: filters, depth: 64},
			row{filters: filters, depth: 64, op: "write"}, row{filters: filters, depth: 8, size: 64 * kib})
	}
	for _, depth := range []int{1, 64} {
		rows = append(rows, row{op: "status", size: mib, depth: depth}, row{op: "status", size: mib, depth: depth, plugin: "file"})
	}
	for _, op := range ops {
		for _, depth := range depths(1) {
			rows = append(rows, row{busy: true, op: op, depth: depth})
		}
	}
	for i := range rows {
		rows[i] = rows[i].fill()
	}
	return append(rows, otherRows()...)
}

// otherRows are outside the combinations.
func otherRows() (rows []row) {
	rows = []row{
		{plugin: "slow", depth: 16}, {plugin: "slow", depth: 64}, {plugin: "slow", depth: 64, threads: 64},
		{plugin: "slow", depth: 16, op: "write"}, {plugin: "slow", depth: 1}, {plugin: "slow", depth: 16, busy: true},
		{plugin: "slow", depth: 16, conns: 2}, {plugin: "slow", depth: 16, conns: 4}, {plugin: "slow", depth: 4, conns: 16},
		{plugin: "brief", depth: 1}, {plugin: "brief", depth: 2}, {plugin: "brief", depth: 16}, {plugin: "brief", depth: 64},
		{plugin: "brief", depth: 1, conns: 2}, {plugin: "brief", depth: 16, conns: 4},
		{plugin: "mixed", depth: 64}, {plugin: "mixed", depth: 16, conns: 4}, {plugin: "mixed", depth: 1},
		{plugin: "delay", depth: 16}, {plugin: "delay", depth: 64, threads: 64},
		{plugin: "serial", depth: 1}, {plugin: "serial", depth: 64}, {plugin: "serial", op: "write", depth: 64},
		{plugin: "serial", depth: 1, conns: 4}, {plugin: "serial", depth: 16, conns: 4}, {plugin: "serial", depth: 1, conns: 16},
		{plugin: "perl", depth: 1}, {plugin: "perl", depth: 64}, {plugin: "perl", op: "write", depth: 64}, {plugin: "perl", depth: 16, conns: 4},
		{client: "fio", depth: 1}, {client: "fio", depth: 64}, {client: "fio", op: "write", depth: 64},
		{client: "fio", depth: 8, size: 64 * kib},
		{client: "nbdcopy", size: 256 * kib, depth: 64, conns: 4}, {client: "nbdcopy", op: "write", size: 256 * kib, depth: 64, conns: 4},
		{client: "nbdcopy", size: 4 * kib, depth: 64, conns: 4},
		{client: "nbdcopy", plugin: "file", size: 256 * kib, depth: 64, conns: 4},
		{client: "qemu-img", size: 2 * mib, depth: 8}, {client: "qemu-img", plugin: "file", size: 2 * mib, depth: 8},
		{client: "qemu-img", op: "write", size: 2 * mib, depth: 8},
		{metrics: true, depth: 64}, {metrics: true, op: "write", depth: 64}, {metrics: true, depth: 1},
	}
	for _, transport := range []string{"tls", "tlstcp", "psk", "psktcp"} {
		for _, op := range ops {
			rows = append(rows, row{transport: transport, op: op, depth: 1}, row{transport: transport, op: op, depth: 64},
				row{transport: transport, op: op, size: mib, depth: 8})
		}
	}
	for _, transport := range []string{"tls", "psk"} {
		for _, op := range ops {
			rows = append(rows, row{client: "nbdcopy", transport: transport, op: op, size: 256 * kib, depth: 64, conns: 4})
		}
	}
	for _, n := range []int{1, 3, 8} {
		rows = append(rows, row{nofilters: n, depth: 1}, row{nofilters: n, depth: 64}, row{nofilters: n, depth: 64, op: "write"})
	}
	for i := range rows {
		rows[i] = rows[i].fill()
	}
	return rows
}

// allRows are all combinations, and what is outside them.
func allRows() (rows []row) {
	for _, plugin := range []string{"memory", "file", "null", "pattern"} {
		for _, op := range []string{"read", "write", "status"} {
			if plugin == "pattern" && op == "write" {
				continue
			}
			for _, size := range sizes {
				for _, conns := range []int{1, 4, 16} {
					for _, depth := range []int{1, 8, 16, 64} {
						for _, transport := range []string{"unix", "tcp"} {
							for _, filters := range []int{0, 1, 3} {
								for _, busy := range []bool{false, true} {
									rows = append(rows, row{"load", plugin, op, size, depth, conns, transport, filters, busy, 0, 0, false})
								}
							}
						}
					}
				}
			}
		}
	}
	return append(rows, otherRows()...)
}

// fill sets what is not set as base has it.
func (r row) fill() row {
	def := func(s *string, v string) {
		if *s == "" {
			*s = v
		}
	}
	defInt := func(n *int, v int) {
		if *n == 0 {
			*n = v
		}
	}
	def(&r.client, base.client)
	def(&r.plugin, base.plugin)
	def(&r.op, base.op)
	def(&r.transport, base.transport)
	defInt(&r.size, base.size)
	defInt(&r.depth, base.depth)
	defInt(&r.conns, base.conns)
	return r
}

// A goal bounds the ratios of nbdhost to another server; 0 is no bound.
type goal struct {
	ops float64 // at least
	cpu float64 // at most
	p99 float64 // at most
}

// goal is what nbdhost is to reach beside the other server.
func (r row) goal(other string) goal {
	fast := r.client == "load" && r.plugin == "memory" && r.op != "status" && r.filters+r.nofilters == 0 && !r.busy
	if other == "floor" {
		switch {
		case !fast:
			return goal{}
		case r.conns > 1 && r.size == 4*kib:
			return goal{ops: 0.7}
		case r.size == 4*kib && r.depth == 64:
			return goal{ops: 0.9}
		case r.conns == 1:
			return goal{ops: 1}
		}
		return goal{}
	}
	if other == "without" && r.depth == 64 {
		return goal{ops: 0.98}
	}
	if other != "nbdkit" {
		return goal{}
	}
	switch {
	case r.threads == 64:
		return goal{ops: 3.5}
	case !fast || r.transport != "unix":
		return goal{ops: 1}
	case r.conns == 16 && r.size == 4*kib:
		return goal{ops: map[int]float64{1: 1.3, 16: 3, 64: 3}[r.depth]}
	case r.conns != 1:
		return goal{ops: 1}
	case r.size == 4*kib && r.depth == 64:
		return goal{ops: 3.5, cpu: 0.3}
	case r.size == 4*kib && r.depth == 8:
		return goal{ops: 2, cpu: 0.45}
	case r.size <= 64*kib && r.depth == 1:
		return goal{ops: 1.5, cpu: 0.75, p99: 1}
	case r.size == 64*kib:
		return goal{ops: 1.2, cpu: 0.9}
	case r.size == mib:
		return goal{ops: 1.1, cpu: 0.95}
	}
	return goal{ops: 1}
}

// met tells whether the ratios reach the goal. Ratios are shown with two
// digits, and held against it as shown.
func (g goal) met(ops, cpu, p99 float64) bool {
	const half = 0.005
	return (g.ops == 0 || ops >= g.ops-half) && (g.cpu == 0 || cpu <= g.cpu+half) && (g.p99 == 0 || p99 <= g.p99+half)
}

func (g goal) String() string {
	s := ""
	for _, x := range []struct {
		name, sign string
		v          float64
	}{{"ops", ">=", g.ops}, {"cpu", "<=", g.cpu}, {"p99", "<=", g.p99}} {
		if x.v != 0 {
			s += fmt.Sprintf(" %s%s%g", x.name, x.sign, x.v)
		}
	}
	if s == "" {
		return ""
	}
	return s[1:]
}

// median of the values, which it sorts. 0 if there is none.
func median(v []float64) float64 {
	if len(v) == 0 {
		return 0
	}
	slices.Sort(v)
	if n := len(v); n%2 == 0 {
		return (v[n/2-1] + v[n/2]) / 2
	}
	return v[len(v)/2]
}
