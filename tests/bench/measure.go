package main

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
)

// A sample is what one measurement of one server gave.
type sample struct {
	ops      float64 // a second
	p50, p99 float64 // latency in nanoseconds; 0 where the client does not tell
	cpu      float64 // the server's processor time for an operation, in nanoseconds
	client   float64 // the client's
	memory   float64 // the server's peak resident memory, in bytes
}

// A series has the samples of one server, one for each round.
type series struct {
	kind    string
	samples []sample
	err     error // why there are no more
}

func (s *series) median(of func(sample) float64) float64 {
	var v []float64
	for _, x := range s.samples {
		v = append(v, of(x))
	}
	return median(v)
}

// ratio is the median of a's figure divided by b's of the same round, 0 if there is none.
func ratio(a, b *series, of func(sample) float64) float64 {
	var v []float64
	for i := range min(len(a.samples), len(b.samples)) {
		if y := of(b.samples[i]); y != 0 {
			v = append(v, of(a.samples[i])/y)
		}
	}
	return median(v)
}

func opsOf(s sample) float64    { return s.ops }
func p50Of(s sample) float64    { return s.p50 }
func p99Of(s sample) float64    { return s.p99 }
func cpuOf(s sample) float64    { return s.cpu }
func clientOf(s sample) float64 { return s.client }
func memoryOf(s sample) float64 { return s.memory }

// result is a measured row.
type result struct {
	row    row
	host   *series
	others []*series
	tls    string // what all servers negotiated, or empty
}

// measure measures a row. What fails is in the series.
func (b *bench) measure(ctx context.Context, r row, number string) *result {
	res := &result{row: r, host: &series{kind: "nbdhost"}}
	all := []*series{res.host}
	for _, kind := range r.others() {
		res.others = append(res.others, &series{kind: kind})
	}
	all = append(all, res.others...)

	servers := make(map[*series]*server)
	stop := func() {
		for _, s := range servers {
			s.stop()
		}
	}
	defer stop()
	start := func(first int) {
		for i := range all {
			s := all[(i+first)%len(all)]
			b.say("%s %s: starting %s", number, r.name(), s.kind)
			server, err := b.prepare(ctx, s.kind, r)
			if err != nil {
				s.err = err
				continue
			}
			servers[s] = server
			if server.tls != res.tls && res.tls != "" {
				s.err = fmt.Errorf("negotiated %s, where nbdhost has %s", server.tls, res.tls)
				continue
			}
			res.tls = server.tls
		}
	}
	start(0)
	if r.busy {
		end, err := b.hogs()
		if err != nil {
			res.host.err = err
			return res
		}
		defer end()
	}
	rounds := b.rounds
	if r.metrics {
		rounds *= metricsRounds
	}
	for round := range rounds {
		if r.metrics && round > 0 {
			// Two processes of the same program differ by several percent, for as long
			// as they live: where their memory lies.
			stop()
			start(round / len(all)) // who starts first has other memory, too
		}
		b.host.round(ctx, func(again bool) {
			for i := range all {
				s := all[(i+round)%len(all)]
				if s.err != nil || ctx.Err() != nil {
					continue
				}
				if again {
					s.samples = s.samples[:len(s.samples)-1]
				}
				b.say("%s %s: round %d/%d, %s", number, r.name(), round+1, rounds, s.kind)
				x, err := b.sample(ctx, servers[s], r)
				if err != nil {
					s.err = err
					continue
				}
				s.samples = append(s.samples, x)
			}
		})
	}
	if b.perf != "" && res.host.err == nil {
		b.say("%s %s: profile", number, r.name())
		if err := b.profile(ctx, servers[res.host], r); err != nil {
			res.host.err = err
		}
	}
	if res.host.err != nil && ctx.Err() == nil {
		b.failed = true
	}
	return res
}

// metricsRounds is how many times more rounds the rows about metrics have: what they look
// for is less than one process differs from the next.
const metricsRounds = 10

// prepare starts a server and fills its export.
func (b *bench) prepare(ctx context.Context, kind string, r row) (*server, error) {
	size := b.size(r)
	if r.plugin == "file" || r.client == "nbdcopy" || r.client == "qemu-img" {
		if err := b.makeData(int64(size)); err != nil {
			return nil, err
		}
	}
	s, err := b.start(ctx, kind, r)
	if err != nil {
		return nil, err
	}
	if r.secured() {
		if s.tls, err = negotiated(ctx, s.uri()); err != nil {
			s.stop()
			return nil, fmt.Errorf("negotiate TLS: %w", err)
		}
	}
	if r.plugin == "memory" && !strings.HasPrefix(kind, "floor") { // which fill their own
		args := []string{"mode=fill", "depth=4", "size=1048576", fmt.Sprintf("span=%d", size)}
		if r.op == "status" { // data and holes by turns
			args = []string{"mode=fill", "depth=4", "size=65536", "stride=2", fmt.Sprintf("span=%d", size)}
		}
		if _, err := b.load(ctx, s, args...); err != nil {
			s.stop()
			return nil, fmt.Errorf("fill memory: %w", err)
		}
	}
	return s, nil
}

// sample measures a server once.
func (b *bench) sample(ctx context.Context, s *server, r row) (x sample, err error) {
	// Where the kernel does not let us, the peak is that since the server's start.
	_ = s.forgetPeak()
	if r.client == "load" {
		x, err = b.sampleLoad(ctx, s, r)
	} else {
		x, err = b.sampleClient(ctx, s, r)
	}
	if err != nil {
		return x, err
	}
	x.memory, err = s.memory("VmHWM")
	return x, err
}

func (b *bench) loadArgs(s *server, r row) []string {
	return []string{"op=" + r.op, fmt.Sprintf("size=%d", r.size), fmt.Sprintf("depth=%d", r.depth),
		fmt.Sprintf("conns=%d", r.conns), fmt.Sprintf("span=%d", exportSize),
		fmt.Sprintf("pid=%d", s.cmd.Process.Pid), fmt.Sprintf("seconds=%g", b.seconds), "warmup=0.1"}
}

func (b *bench) sampleLoad(ctx context.Context, s *server, r row) (x sample, err error) {
	v, err := b.load(ctx, s, b.loadArgs(s, r)...)
	if err != nil {
		return x, err
	}
	if v["ops"] == 0 {
		return x, fmt.Errorf("%s answered nothing in %g s", s.kind, b.seconds)
	}
	return sample{
		ops: v["ops"] / v["wall"] * 1e9,
		p50: v["p50"], p99: v["p99"],
		cpu: v["server"] / v["ops"], client: v["client"] / v["ops"],
	}, nil
}

// hogs gives every processor other work until stop is called.
func (b *bench) hogs() (stop func(), err error) {
	var cmds []*exec.Cmd
	stop = func() {
		for _, c := range cmds {
			c.Process.Kill()
			c.Wait()
		}
	}
	for range runtime.NumCPU() {
		c := exec.Command(b.self, "load", "mode=hog")
		c.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
		if err := c.Start(); err != nil {
			stop()
			return nil, err
		}
		cmds = append(cmds, c)
	}
	return stop, nil
}

// profile writes where the server spends its time under the row's load, and
// which system calls it makes.
func (b *bench) profile(ctx context.Context, s *server, r row) error {
	pid := strconv.Itoa(s.cmd.Process.Pid)
	data, calls := b.path("perf.data"), b.path("calls")
	for _, tool := range [][]string{{"perf", "record", "-q", "-g", "-o", data, "-p", pid}, {"strace", "-f", "-c", "-o", calls, "-p", pid}} {
		record := exec.CommandContext(ctx, tool[0], tool[1:]...)
		if err := record.Start(); err != nil {
			return err
		}
		_, err := b.sample(ctx, s, r)
		record.Process.Signal(syscall.SIGINT)
		record.Wait()
		if err != nil {
			return err
		}
	}
	// The functions with the most time of their own, callers left out.
	functions, err := exec.CommandContext(ctx, "perf", "report", "--stdio", "-g", "none", "--no-children",
		"--percent-limit", "0.5", "-i", data).Output()
	if err != nil {
		return fmt.Errorf("read profile: %w", err)
	}
	summary, err := os.ReadFile(calls)
	if err != nil {
		return fmt.Errorf("read profile: %w", err)
	}
	if err := os.MkdirAll(b.perf, 0o777); err != nil {
		return err
	}
	file := strings.ReplaceAll(r.name(), "/", "-") + ".txt"
	return os.WriteFile(filepath.Join(b.perf, file), slices.Concat(functions, summary), 0o666)
}
