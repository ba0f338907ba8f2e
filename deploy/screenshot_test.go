package deploy

import (
	"flag"
	"fmt"
	"html"
	"math"
	"net/url"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
)

// Grafana is not in Debian. What stands in its place draws the panels of the dashboard
// where they are there, with the results of their queries, and lets chromium take a
// picture of it: go test -run '^TestDashboard$' -args -screenshot FILE.
var (
	screenshot     = flag.String("screenshot", "", "draw the dashboard to this PNG file")
	screenshotTime = flag.Duration("screenshot-time", 90*time.Second, "watch the server for so long before that")
)

// Of the picture, in pixels.
const (
	pictureWidth = 1600
	cellHeight   = 32 // of Grafana's grid
	gap          = 8
)

// palette is what tells series apart, on a dark ground.
var palette = []string{"#73bf69", "#f2cc0c", "#5794f2", "#ff9830", "#f2495c", "#b877d9", "#8ab8ff", "#fade2a", "#ff7383", "#96d98d"}

// draw writes a picture of the dashboard.
func (d *dashboard) draw(t *testing.T, p *prometheus, path string) {
	t.Helper()
	end := time.Now()
	begin := end.Add(-*screenshotTime + 6*time.Second) // rates need some samples
	height := 0
	var b strings.Builder
	for _, panel := range d.Panels {
		g := panel.GridPos
		x, y := g.X*pictureWidth/24+gap/2, g.Y*cellHeight+48
		w, h := g.W*pictureWidth/24-gap, g.H*cellHeight-gap
		height = max(height, y+h+gap)
		if panel.Type == "row" {
			fmt.Fprintf(&b, `<text x="%d" y="%d" class="row">%s</text>`, x+4, y+18, html.EscapeString(panel.Title))
			continue
		}
		fmt.Fprintf(&b, `<g transform="translate(%d %d)"><rect width="%d" height="%d" class="panel"/><text x="10" y="20" class="title">%s</text>`,
			x, y, w, h, html.EscapeString(panel.Title))
		var lines []line
		for _, target := range panel.Targets {
			var data struct{ Result []series }
			p.get(t, "query_range", url.Values{"query": {variables.Replace(target.Expr)}, "step": {"1"},
				"start": {strconv.FormatInt(begin.Unix(), 10)}, "end": {strconv.FormatInt(end.Unix(), 10)}}, &data)
			for _, s := range data.Result {
				lines = append(lines, newLine(s, target.LegendFormat))
			}
		}
		slices.SortStableFunc(lines, func(a, b line) int { return strings.Compare(a.name, b.name) })
		if panel.Type == "stat" {
			drawStat(&b, panel, lines, w, h, begin, end)
		} else {
			drawSeries(&b, panel, lines, w, h, begin, end)
		}
		b.WriteString("</g>\n")
	}
	page := fmt.Sprintf(`<!DOCTYPE html><meta charset="utf-8"><style>
body { margin: 0; background: #111217 } svg { display: block; font-family: "DejaVu Sans", sans-serif; font-size: 11px }
.panel { fill: #181b1f; stroke: #2c3036; rx: 3 } .title { fill: #d8d9da; font-size: 13px } .row { fill: #d8d9da; font-size: 14px; font-weight: bold }
.grid { stroke: #2c3036 } .tick, .legend { fill: #9fa7b3 } .head { fill: #d8d9da; font-size: 18px }
</style><svg width="%d" height="%d"><text x="8" y="30" class="head">%s</text>%s</svg>`, pictureWidth, height, html.EscapeString(d.Title), b.String())
	file := t.TempDir() + "/dashboard.html"
	if err := os.WriteFile(file, []byte(page), 0o644); err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command("chromium", "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
		"--hide-scrollbars", "--user-data-dir="+t.TempDir(), fmt.Sprintf("--window-size=%d,%d", pictureWidth, height),
		"--screenshot="+path, "file://"+file).CombinedOutput()
	if err != nil {
		t.Fatalf("take the picture: %v\n%s", err, out)
	}
}

// A line is a series with its name in the legend.
type line struct {
	name   string
	points map[int64]float64 // by seconds
}

func newLine(s series, legend string) line {
	l := line{legend, map[int64]float64{}}
	for label, value := range s.Metric {
		l.name = strings.ReplaceAll(l.name, "{{"+label+"}}", value)
	}
	for _, v := range s.Values {
		if at, ok := v[0].(float64); ok && !math.IsNaN(number(v)) {
			l.points[int64(at)] = number(v)
		}
	}
	return l
}

func drawStat(b *strings.Builder, p *panel, lines []line, w, h int, begin, end time.Time) {
	if len(lines) == 0 {
		return
	}
	points := lines[0].points
	last, top := 0.0, 0.0
	for at := begin.Unix(); at <= end.Unix(); at++ {
		if v, ok := points[at]; ok {
			last, top = v, max(top, v)
		}
	}
	var path strings.Builder
	for at := begin.Unix(); at <= end.Unix(); at++ {
		if v, ok := points[at]; ok && top > 0 {
			fmt.Fprintf(&path, "%.1f,%.1f ", float64(at-begin.Unix())/float64(end.Unix()-begin.Unix())*float64(w), float64(h)-v/top*float64(h)/3)
		}
	}
	fmt.Fprintf(b, `<polyline points="%s" fill="none" stroke="#73bf69" opacity=".5"/><text x="%d" y="%d" text-anchor="middle" fill="#73bf69" font-size="30">%s</text>`,
		path.String(), w/2, h/2+2, format(last, p.FieldConfig.Defaults.Unit))
}

func drawSeries(b *strings.Builder, p *panel, lines []line, w, h int, begin, end time.Time) {
	unit := p.FieldConfig.Defaults.Unit
	stacked := p.FieldConfig.Defaults.Custom.Stacking.Mode == "normal"
	const left, right, upper, lower = 70, 12, 34, 46
	base := map[int64]float64{} // what the lines below add up to
	top := 0.0
	for _, l := range lines {
		for at, v := range l.points {
			if stacked {
				base[at] += v
				v = base[at]
			}
			top = max(top, v)
		}
	}
	clear(base)
	step := niceStep(top/4, unit)
	top = max(step, math.Ceil(top/step)*step)
	x := func(at int64) float64 {
		return left + float64(at-begin.Unix())/float64(end.Unix()-begin.Unix())*float64(w-left-right)
	}
	y := func(v float64) float64 { return float64(h-lower) - v/top*float64(h-lower-upper) }
	for v := 0.0; v <= top*1.001; v += step {
		fmt.Fprintf(b, `<line x1="%d" x2="%d" y1="%.1f" y2="%.1f" class="grid"/><text x="%d" y="%.1f" text-anchor="end" class="tick">%s</text>`,
			left, w-right, y(v), y(v), left-8, y(v)+4, format(v, unit))
	}
	for at := begin.Unix()/20*20 + 20; at < end.Unix(); at += 20 {
		fmt.Fprintf(b, `<line x1="%.1f" x2="%.1f" y1="%d" y2="%d" class="grid"/><text x="%.1f" y="%d" text-anchor="middle" class="tick">%s</text>`,
			x(at), x(at), upper, h-lower, x(at), h-lower+15, time.Unix(at, 0).UTC().Format("15:04:05"))
	}
	legend := 12
	for i, l := range lines {
		color := palette[i%len(palette)]
		var up, down []string
		for at := begin.Unix(); at <= end.Unix(); at++ {
			if v, ok := l.points[at]; ok {
				below := base[at]
				if stacked {
					v += below
					base[at] = v
				}
				up = append(up, fmt.Sprintf("%.1f,%.1f", x(at), y(v)))
				down = append(down, fmt.Sprintf("%.1f,%.1f", x(at), y(below)))
			}
		}
		slices.Reverse(down)
		opacity := ".08"
		if stacked {
			opacity = ".3"
		}
		fmt.Fprintf(b, `<polygon points="%s %s" fill="%s" opacity="%s"/><polyline points="%s" fill="none" stroke="%s" stroke-width="1.5"/>`,
			strings.Join(up, " "), strings.Join(down, " "), color, opacity, strings.Join(up, " "), color)
		if legend+17+6*len(l.name) < w-right {
			fmt.Fprintf(b, `<rect x="%d" y="%d" width="12" height="3" fill="%s"/><text x="%d" y="%d" class="legend">%s</text>`,
				legend, h-14, color, legend+17, h-9, html.EscapeString(l.name))
			legend += 32 + 13*len(l.name)/2
		}
	}
}

// niceStep returns the least of 1, 2, 5, 10, ... that is at least v; of bytes, the least
// power of two.
func niceStep(v float64, unit string) float64 {
	switch {
	case v <= 0:
		return 1
	case unit == "bytes":
		return math.Pow(2, math.Ceil(math.Log2(v)))
	}
	power := math.Pow(10, math.Floor(math.Log10(v)))
	for _, f := range []float64{1, 2, 5} {
		if f*power >= v*0.999 {
			return f * power
		}
	}
	return 10 * power
}

// format writes a value as Grafana does.
func format(v float64, unit string) string {
	scale := func(base float64, suffixes ...string) string {
		i := 0
		for ; math.Abs(v) >= base && i < len(suffixes)-1; i++ {
			v /= base
		}
		return strconv.FormatFloat(v, 'g', 3, 64) + suffixes[i]
	}
	switch unit {
	case "s":
		switch {
		case v == 0:
			return "0 s"
		case v < 1e-3:
			return fmt.Sprintf("%.3g µs", v*1e6)
		case v < 1:
			return fmt.Sprintf("%.3g ms", v*1e3)
		}
		return fmt.Sprintf("%.3g s", v)
	case "percentunit":
		return fmt.Sprintf("%.2f %%", v*100)
	case "bytes":
		return scale(1024, " B", " KiB", " MiB", " GiB")
	case "Bps":
		return scale(1000, " B/s", " kB/s", " MB/s", " GB/s")
	case "ops", "cps":
		return scale(1000, "/s", "k/s", "M/s")
	}
	return scale(1000, "", "k", "M")
}
