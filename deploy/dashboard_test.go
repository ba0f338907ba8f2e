package deploy

import (
	"encoding/json"
	"fmt"
	"math"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"
)

// A dashboard is what there is of Grafana's model in grafana/nbdhost.json.
type dashboard struct {
	Title      string
	Templating struct {
		List []struct {
			Name, Type, Definition string
		}
	}
	Panels []*panel
}

type panel struct {
	ID                       int
	Type, Title, Description string
	GridPos                  struct{ X, Y, W, H int }
	FieldConfig              struct {
		Defaults struct {
			Unit   string
			Custom struct{ Stacking struct{ Mode string } }
		}
	}
	Targets []struct{ Expr, LegendFormat string }
}

func readDashboard(t *testing.T) *dashboard {
	t.Helper()
	text, err := os.ReadFile("grafana/nbdhost.json")
	if err != nil {
		t.Fatal(err)
	}
	var d dashboard
	if err := json.Unmarshal(text, &d); err != nil {
		t.Fatal(err)
	}
	return &d
}

// TestDashboardLayout wants panels that have a place of their own.
func TestDashboardLayout(t *testing.T) {
	taken := map[[2]int]string{}
	ids := map[int]bool{}
	for _, p := range readDashboard(t).Panels {
		if ids[p.ID] || p.Title == "" {
			t.Errorf("panel %d %q: need an ID of its own, and a title", p.ID, p.Title)
		}
		ids[p.ID] = true
		g := p.GridPos
		for x := g.X; x < g.X+g.W; x++ {
			for y := g.Y; y < g.Y+g.H; y++ {
				if other := taken[[2]int{x, y}]; other != "" || x >= 24 {
					t.Fatalf("panel %q is at %v, where %q is, or nothing may be", p.Title, g, other)
				}
				taken[[2]int{x, y}] = p.Title
			}
		}
	}
}

// TestAlerts lets Prometheus check the rules and the configuration, and test the rules.
func TestAlerts(t *testing.T) {
	for _, args := range [][]string{
		{"check", "config", "prometheus/prometheus.yml"}, {"check", "rules", "prometheus/alerts.yml"},
		{"test", "rules", "prometheus/alerts.test.yml"},
	} {
		if _, err := try(t, "promtool", args...); err != nil {
			t.Error(err)
		}
	}
}

// freePort returns the address of a port that nobody uses at the moment.
func freePort(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

// A prometheus is a running Prometheus.
type prometheus struct{ address string }

// startPrometheus scrapes a server twice a second.
func startPrometheus(t *testing.T, server string) *prometheus {
	t.Helper()
	dir := t.TempDir()
	writeFile(t, dir+"/prometheus.yml", fmt.Sprintf(`
global: {scrape_interval: 500ms}
scrape_configs: [{job_name: nbdhost, static_configs: [{targets: [%q]}]}]
`, server))
	p := &prometheus{freePort(t)}
	daemon := start(t, exec.Command("prometheus", "--config.file="+dir+"/prometheus.yml", "--storage.tsdb.path="+dir+"/data",
		"--web.listen-address="+p.address, "--log.level=warn"))
	daemon.await(t, "Prometheus", func() bool {
		r, err := http.Get("http://" + p.address + "/-/ready")
		if err != nil {
			return false
		}
		r.Body.Close()
		return r.StatusCode == http.StatusOK
	})
	return p
}

// A series is one result of a query.
type series struct {
	Metric map[string]string
	Value  [2]any   // of a query at one time: when, and what in decimal
	Values [][2]any // of a query of a range
}

// get asks Prometheus' API, which answers into data.
func (p *prometheus) get(t *testing.T, path string, parameters url.Values, data any) {
	t.Helper()
	r, err := http.Get("http://" + p.address + "/api/v1/" + path + "?" + parameters.Encode())
	if err != nil {
		t.Fatal(err)
	}
	defer r.Body.Close()
	answer := struct {
		Status, Error string
		Data          any
	}{Data: data}
	if err := json.NewDecoder(r.Body).Decode(&answer); err != nil || answer.Status != "success" {
		t.Fatalf("%s %v: %v: %s", path, parameters, err, answer.Error)
	}
}

// variables are what Grafana puts into queries.
var variables = strings.NewReplacer("$__rate_interval", "5s", "$job", ".*", "$instance", ".*", "$export", ".*")

func (p *prometheus) query(t *testing.T, expr string) []series {
	t.Helper()
	var data struct{ Result []series }
	p.get(t, "query", url.Values{"query": {variables.Replace(expr)}}, &data)
	return data.Result
}

// number returns a value of Prometheus', as which NaN stands for none.
func number(v [2]any) float64 {
	s, _ := v[1].(string)
	f, err := strconv.ParseFloat(s, 64)
	if err != nil {
		return math.NaN()
	}
	return f
}

// startLoad starts a server that has something to show in each panel, with clients, and
// returns where its metrics are.
func startLoad(t *testing.T) (metrics string) {
	t.Helper()
	dir := t.TempDir()
	metrics = freePort(t)
	server := start(t, exec.Command(nbdhost, "--foreground", "--unix="+dir+"/sock", "--metrics="+metrics, "--health-read", "--bandwidth=400M",
		"--filter=error", "--filter=readahead", "--filter=noextents", "memory", "256M", "error=EIO", "error-pread-rate=1%"))
	server.await(t, "the server", func() bool { return serves(dir + "/sock") })
	start(t, exec.Command("/usr/bin/python3", "testdata/load.py", "nbd+unix:///disk?socket="+dir+"/sock",
		"nbd+unix:///disk?socket="+dir+"/sock", "nbd+unix:///backup?socket="+dir+"/sock"))
	return metrics
}

var labelValues = regexp.MustCompile(`^label_values\((.*), (\w+)\)$`)

// TestDashboard wants data from each query of the dashboard, asked of a Prometheus that
// watches a server with clients.
func TestDashboard(t *testing.T) {
	d := readDashboard(t)
	metrics := startLoad(t)
	// What /readyz counts.
	ready := func() {
		if r, err := http.Get("http://" + metrics + "/readyz"); err == nil {
			r.Body.Close()
		}
	}
	p := startPrometheus(t, metrics)
	if *screenshot != "" {
		for end := time.Now().Add(*screenshotTime); time.Now().Before(end); time.Sleep(time.Second) {
			ready()
		}
		d.draw(t, p, *screenshot)
	}
	queries := 0
	for _, panel := range d.Panels {
		if panel.Type != "row" && len(panel.Targets) == 0 {
			t.Errorf("panel %q has no query", panel.Title)
		}
		for _, target := range panel.Targets {
			queries++
			await(t, "data for "+panel.Title+": "+target.Expr, func() bool {
				ready()
				result := p.query(t, target.Expr)
				for _, s := range result {
					if math.IsNaN(number(s.Value)) {
						return false
					}
				}
				return len(result) > 0
			})
			for _, m := range regexp.MustCompile(`{{(\w+)}}`).FindAllStringSubmatch(target.LegendFormat, -1) {
				if _, ok := p.query(t, target.Expr)[0].Metric[m[1]]; !ok {
					t.Errorf("panel %q: the legend %q has a label that the series have not", panel.Title, target.LegendFormat)
				}
			}
		}
	}
	if queries < 20 {
		t.Errorf("got %d queries", queries)
	}
	for _, v := range d.Templating.List {
		if v.Type != "query" {
			continue
		}
		m := labelValues.FindStringSubmatch(v.Definition)
		if m == nil {
			t.Errorf("variable %s: got %q", v.Name, v.Definition)
			continue
		}
		var values []string
		p.get(t, "label/"+m[2]+"/values", url.Values{"match[]": {variables.Replace(m[1])}}, &values)
		if len(values) == 0 {
			t.Errorf("variable %s has no values", v.Name)
		}
	}
}
