package main

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"os/exec"
	"strings"
	"syscall"
)

// A single is a figure that is no row: it has another unit, or another shape.
type single struct {
	name    string
	measure func(b *bench, ctx context.Context, kind string) (figures []float64, err error)
	figures []figureSpec
	alone   bool // nbdhost only
}

// A figureSpec says what one figure of a single is, and the goal: at most max
// of it, or at most maxRatio times nbdkit's. 0 is no bound.
type figureSpec struct {
	name, unit    string
	max, maxRatio float64
}

// A figure is measured for nbdhost and, unless it is alone, nbdkit. Ratio is the
// median of the rounds'.
type figure struct {
	figureSpec
	host, kit, ratio float64
	err              error
	alone            bool
}

var singles = []single{
	{name: "start to first reply, --run", measure: (*bench).firstReply, figures: []figureSpec{
		{name: "start to first reply", unit: "ms", maxRatio: 2},
	}},
	{name: "resident memory", measure: (*bench).resident, figures: []figureSpec{
		{name: "resident memory, idle", unit: "KiB", max: 25 * kib},
		{name: "resident memory, each of 100 more idle connections", unit: "KiB", max: 8},
		{name: "resident memory, each of 16 busy connections", unit: "KiB", maxRatio: 1.5},
	}},
	{name: "10,000 idle connections", measure: (*bench).crowd, alone: true, figures: []figureSpec{
		{name: "connect and read, no other connection, p50", unit: "µs"},
		{name: "connect and read, 10,000 idle connections, p50", unit: "µs", max: -1}, // held against the first
		{name: "resident memory, each of 10,000 idle connections", unit: "KiB", max: 8},
	}},
}

// single measures one in turn for each server.
func (b *bench) single(ctx context.Context, s single) []figure {
	result := make([]figure, len(s.figures))
	host, kit := make([][]float64, len(s.figures)), make([][]float64, len(s.figures))
	for i, spec := range s.figures {
		result[i] = figure{figureSpec: spec, alone: s.alone}
	}
	rounds := b.rounds
	if s.alone {
		rounds = 1
	}
	for range rounds {
		for kind, values := range map[string][][]float64{"nbdhost": host, "nbdkit": kit} {
			if s.alone && kind != "nbdhost" {
				continue
			}
			v, err := s.measure(b, ctx, kind)
			if err != nil {
				for i := range result {
					result[i].err = fmt.Errorf("%s: %w", kind, err)
				}
				b.failed = b.failed || ctx.Err() == nil
				return result
			}
			for i := range v {
				values[i] = append(values[i], v[i])
			}
		}
	}
	for i := range result {
		var ratios []float64
		for k := range kit[i] {
			ratios = append(ratios, host[i][k]/kit[i][k])
		}
		result[i].ratio, result[i].host, result[i].kit = median(ratios), median(host[i]), median(kit[i])
		if result[i].max < 0 { // the usual time: what it is without the crowd, with room for chance
			result[i].max = math.Ceil(2 * result[0].host)
		}
	}
	return result
}

// goal says what the figure is to be.
func (f *figure) goal() string {
	switch {
	case f.maxRatio > 0:
		return fmt.Sprintf("<=%g x nbdkit", f.maxRatio)
	case f.max > 0:
		return fmt.Sprintf("<=%g %s", f.max, f.unit)
	}
	return ""
}

func (f *figure) met() bool {
	return (f.maxRatio == 0 || f.ratio <= f.maxRatio+0.005) && (f.max == 0 || f.host <= f.max)
}

// firstReply is the time from the start of a server to its first answer to a read.
// The command of --run says where the server is, and this program asks: the start of
// a client is no part of it.
func (b *bench) firstReply(ctx context.Context, kind string) ([]float64, error) {
	program := "/usr/bin/nbdkit"
	if kind == "nbdhost" {
		program = b.nbdhost
	}
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	cmd := exec.CommandContext(ctx, program, append([]string{"-U", "-"}, append(b.pluginArgs(base), "--run", `echo "$uri"; cat`)...)...)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	stdin, err := cmd.StdinPipe()
	if err != nil {
		return nil, err
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	began := clock()
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	answered, err := answer(ctx, stdout)
	stdin.Close()
	if err = errors.Join(err, cmd.Wait()); err != nil {
		return nil, fmt.Errorf("run %s: %w: %s", kind, err, lastLine(stderr.String()))
	}
	return []float64{float64(answered-began) / 1e6}, nil
}

// answer is when the server whose URI is read from r has answered a read.
func answer(ctx context.Context, r io.Reader) (int64, error) {
	uri, err := bufio.NewReader(r).ReadString('\n')
	if err != nil {
		return 0, err
	}
	l := load{uri: strings.TrimSpace(uri), op: "read", conns: 1}
	c, err := l.dial(ctx)
	if err != nil {
		return 0, err
	}
	defer c.Close()
	if err := c.With(ctx).Pread(make([]byte, base.size), 0); err != nil {
		return 0, err
	}
	return clock(), nil
}

// idle opens n connections that stay until release is called.
func (b *bench) idle(ctx context.Context, s *server, n int) (release func(), err error) {
	cmd := exec.CommandContext(ctx, b.self, "load", "uri="+s.uri(), "mode=idle", fmt.Sprintf("conns=%d", n))
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	stdin, err := cmd.StdinPipe()
	if err != nil {
		return nil, err
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	release = func() {
		stdin.Close()
		io.Copy(io.Discard, stdout)
		cmd.Wait()
	}
	if _, err := bufio.NewReader(stdout).ReadString('\n'); err != nil {
		release()
		return nil, fmt.Errorf("open %d connections to %s: %s", n, s.kind, lastLine(stderr.String()))
	}
	return release, nil
}

// resident gives the memory of an idle server, of an idle connection and of a
// busy one, in KiB. What is there once for all connections counts for none of the idle
// ones: as many others are there before.
func (b *bench) resident(ctx context.Context, kind string) ([]float64, error) {
	const idle, busy = 100, 16
	r := base
	r.plugin = "null" // which needs no memory of its own
	s, err := b.start(ctx, kind, r)
	if err != nil {
		return nil, err
	}
	defer s.stop()
	start, err := s.memory("VmRSS")
	if err != nil {
		return nil, err
	}
	var with [2]float64 // so many times idle connections
	for i := range with {
		release, err := b.idle(ctx, s, idle)
		if err != nil {
			return nil, err
		}
		defer release()
		if with[i], err = s.memory("VmRSS"); err != nil {
			return nil, err
		}
	}
	if err := s.forgetPeak(); err != nil {
		return nil, err
	}
	r.conns, r.depth = busy, 64
	if _, err := b.load(ctx, s, b.loadArgs(s, r)...); err != nil {
		return nil, err
	}
	peak, err := s.memory("VmHWM")
	if err != nil {
		return nil, err
	}
	return []float64{start / kib, (with[1] - with[0]) / idle / kib, (peak - with[1]) / busy / kib}, nil
}

// crowd gives the time of a connection with one read, in µs, before and while
// 10,000 others are idle, and what each of those takes, in KiB.
func (b *bench) crowd(ctx context.Context, kind string) ([]float64, error) {
	const n = 10000
	s, err := b.start(ctx, kind, base)
	if err != nil {
		return nil, err
	}
	defer s.stop()
	alone, err := b.load(ctx, s, "mode=connect", "count=200")
	if err != nil {
		return nil, err
	}
	start, err := s.memory("VmRSS")
	if err != nil {
		return nil, err
	}
	release, err := b.idle(ctx, s, n)
	if err != nil {
		return nil, err
	}
	defer release()
	crowded, err := b.load(ctx, s, "mode=connect", "count=200")
	if err != nil {
		return nil, err
	}
	memory, err := s.memory("VmRSS")
	if err != nil {
		return nil, err
	}
	return []float64{alone["p50"] / 1e3, crowded["p50"] / 1e3, (memory - start) / n / kib}, nil
}
