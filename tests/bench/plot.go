package main

import (
	"bytes"
	"fmt"
	"html"
	"math"
	"slices"
	"strconv"
)

// A plot shows a figure of each server as one thing about the rows changes.
type plot struct {
	file, title, xName, yName string
	x                         []string // the steps of the x axis, the same distance apart
	lines                     []plotLine
}

type plotLine struct {
	name string
	y    []float64 // NaN where there is no figure
}

// An axis is what a plot's rows differ in.
type axis struct {
	of  func(row) (at int, name string)
	set func(to *row, from row)
}

// plots makes those for which there are rows.
func (rep *report) plots() (plots []plot) {
	kops := func(s *series, r row) float64 { return s.median(opsOf) / 1e3 }
	mibs := func(s *series, r row) float64 { return s.median(opsOf) * float64(r.size) / mib }
	cpu := func(s *series, r row) float64 { return s.median(cpuOf) / 1e3 }
	depth := axis{func(r row) (int, string) { return r.depth, strconv.Itoa(r.depth) }, func(to *row, r row) { to.depth = r.depth }}
	conns := axis{func(r row) (int, string) { return r.conns, strconv.Itoa(r.conns) }, func(to *row, r row) { to.conns = r.conns }}
	size := axis{func(r row) (int, string) { return r.size, sizeName(r.size) }, func(to *row, r row) { to.size = r.size }}
	filters := axis{func(r row) (int, string) { return r.filters, strconv.Itoa(r.filters) }, func(to *row, r row) { to.filters = r.filters }}
	with := func(change func(*row)) row {
		r := base
		change(&r)
		return r
	}
	for _, p := range []struct {
		plot
		fixed row // what all its rows have, besides what x varies
		x     axis
		y     func(*series, row) float64
	}{
		{plot{file: "depth-read", title: "4 KiB reads, memory, one connection", xName: "in flight", yName: "1000 operations/s"}, base, depth, kops},
		{plot{file: "depth-write", title: "4 KiB writes, memory, one connection", xName: "in flight", yName: "1000 operations/s"}, with(func(r *row) { r.op = "write" }), depth, kops},
		{plot{file: "conns", title: "4 KiB reads, memory, one in flight on each connection", xName: "connections", yName: "1000 operations/s"}, base, conns, kops},
		{plot{file: "conns-deep", title: "4 KiB reads, memory, 64 in flight on each connection", xName: "connections", yName: "1000 operations/s"}, with(func(r *row) { r.depth = 64 }), conns, kops},
		{plot{file: "size", title: "reads, memory, 8 in flight", xName: "size", yName: "MiB/s"}, with(func(r *row) { r.depth = 8 }), size, mibs},
		{plot{file: "filters", title: "4 KiB reads, memory, 64 in flight", xName: "filters", yName: "server CPU µs an operation"}, with(func(r *row) { r.depth = 64 }), filters, cpu},
	} {
		type point struct {
			at   int
			name string
			res  *result
		}
		var points []point
		for _, res := range rep.rows {
			r := res.row
			p.x.set(&r, p.fixed)
			if r == p.fixed {
				at, name := p.x.of(res.row)
				points = append(points, point{at, name, res})
			}
		}
		if len(points) < 2 {
			continue
		}
		slices.SortFunc(points, func(a, b point) int { return a.at - b.at })
		for _, kind := range []string{"nbdhost", "nbdkit", "floor"} {
			line := plotLine{name: kind}
			some := false
			for _, pt := range points {
				y := math.NaN()
				for _, s := range append([]*series{pt.res.host}, pt.res.others...) {
					if s.kind == kind && len(s.samples) > 0 {
						y, some = p.y(s, pt.res.row), true
					}
				}
				line.y = append(line.y, y)
			}
			if some {
				p.lines = append(p.lines, line)
			}
		}
		for _, pt := range points {
			p.plot.x = append(p.plot.x, pt.name)
		}
		plots = append(plots, p.plot)
	}
	return plots
}

var colours = map[string]string{"nbdhost": "#0969da", "nbdkit": "#cf222e", "floor": "#6e7781"}

// svg draws the plot.
func (p *plot) svg() []byte {
	const (
		width, height            = 560, 320
		left, right, top, bottom = 70, 100, 36, 46
	)
	highest := 0.0
	for _, l := range p.lines {
		for _, y := range l.y {
			if y > highest {
				highest = y
			}
		}
	}
	step, n := scale(highest)
	x := func(i int) float64 {
		return left + (width-left-right)*float64(i)/float64(max(1, len(p.x)-1))
	}
	y := func(v float64) float64 { return height - bottom - (height-top-bottom)*v/(step*float64(n)) }

	var w bytes.Buffer
	text := func(x, y float64, anchor, s string) {
		fmt.Fprintf(&w, `<text x="%.0f" y="%.0f" text-anchor="%s">%s</text>`+"\n", x, y, anchor, html.EscapeString(s))
	}
	fmt.Fprintf(&w, `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 %d %d" font-family="sans-serif" font-size="12" fill="#24292f">`+"\n", width, height)
	fmt.Fprintf(&w, `<rect width="%d" height="%d" fill="white"/>`+"\n", width, height)
	text(left, 20, "start", p.title+": "+p.yName)
	text((left+width-right)/2, height-10, "middle", p.xName)
	for i := 0; i <= n; i++ {
		v := step * float64(i)
		fmt.Fprintf(&w, `<line x1="%d" x2="%d" y1="%.1f" y2="%.1f" stroke="#d0d7de"/>`+"\n", left, width-right, y(v), y(v))
		text(left-8, y(v)+4, "end", strconv.FormatFloat(v, 'g', 4, 64))
	}
	for i, name := range p.x {
		text(x(i), height-bottom+18, "middle", name)
	}
	labels := []float64{}
	for _, l := range p.lines {
		colour, path, last := colours[l.name], "", 0
		for i, v := range l.y {
			if math.IsNaN(v) {
				continue
			}
			verb := "L"
			if path == "" {
				verb = "M"
			}
			path += fmt.Sprintf("%s%.1f %.1f", verb, x(i), y(v))
			fmt.Fprintf(&w, `<circle cx="%.1f" cy="%.1f" r="3" fill="%s"/>`+"\n", x(i), y(v), colour)
			last = i
		}
		fmt.Fprintf(&w, `<path d="%s" fill="none" stroke="%s" stroke-width="2"/>`+"\n", path, colour)
		at := y(l.y[last]) + 4
		for slices.ContainsFunc(labels, func(o float64) bool { return math.Abs(o-at) < 13 }) {
			at += 13
		}
		labels = append(labels, at)
		fmt.Fprintf(&w, `<text x="%.0f" y="%.0f" fill="%s">%s</text>`+"\n", x(last)+8, at, colour, l.name)
	}
	w.WriteString("</svg>\n")
	return w.Bytes()
}

// scale divides 0 to the highest value into n steps of 1, 2 or 5 times a power of ten.
func scale(highest float64) (step float64, n int) {
	if highest <= 0 {
		return 1, 1
	}
	step = math.Pow(10, math.Floor(math.Log10(highest/4)))
	for _, f := range []float64{1, 2, 5, 10} {
		if n = int(math.Ceil(highest / (step * f))); n <= 6 {
			return step * f, n
		}
	}
	return step * 10, 1
}
