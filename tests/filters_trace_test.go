package tests

import (
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"
)

// layers compiles the test's plugin and filters, which say what is called.
func layers(t *testing.T, filters ...string) (args []string) {
	t.Helper()
	for _, name := range filters {
		args = append(args, "--filter="+layer(t, "filter", name))
	}
	return append(args, layer(t, "base", "p"))
}

func layer(t *testing.T, source, name string) string {
	return fixture(t, source, `-DNAME="`+name+`"`)
}

var (
	tracePrefix = regexp.MustCompile(`^nbdkit: (p(\[\d+\]|\.\d+): )?debug: `)
	traceLine   = regexp.MustCompile(`^[abcp]( is called)?: `)
	traceHandle = regexp.MustCompile(`0x[0-9a-f]+`)
	dataLine    = regexp.MustCompile(`(?m)^[abcp] is called: (pread|pwrite|flush|trim|zero|extents|cache) .*`)
)

// layerTrace returns the debug lines of the layers: what the server is about to call,
// and what is called.
func layerTrace(s *server) string {
	s.stop()
	var lines []string
	for line := range strings.SplitSeq(s.stderr(), "\n") {
		line, isDebug := tracePrefix.ReplaceAllString(line, ""), tracePrefix.MatchString(line)
		// For the answer to NBD_INFO_NAME, nbdkit goes through default_export again.
		if isDebug && traceLine.MatchString(line) && !strings.Contains(line, ": default_export readonly") {
			lines = append(lines, traceHandle.ReplaceAllString(line, "PTR"))
		}
	}
	return strings.Join(lines, "\n")
}

// dataTrace returns what the layers say of their data callbacks by themselves.
func dataTrace(s *server) string {
	s.stop()
	return strings.Join(dataLine.FindAllString(s.stderr(), -1), "\n")
}

// awaitClose returns when each session that was opened has been closed, since a signal that
// comes earlier keeps nbdkit from closing it, or when the server has ended by itself.
func awaitClose(s *server) (ended bool) {
	s.t.Helper()
	for end := time.Now().Add(patience); time.Now().Before(end); time.Sleep(time.Millisecond) {
		select {
		case <-s.exited:
			return true
		default:
		}
		text := s.stderr()
		opened := strings.Count(text, "p: open returned handle 0x")
		if opened == strings.Count(text, "debug: p: close\n") {
			return false
		}
	}
	s.t.Fatalf("wait for all sessions to be closed:\n%s", s.stderr())
	return false
}

// layerSession makes one request of each kind, whatever the export can do.
const layerSession = `
h.set_strict_mode(0)
def attempt(f, *a):
    try:
        r = f(*a)
        print(f.__name__, a[-1:], len(r) if isinstance(r, (bytes, bytearray)) else r)
    except nbd.Error as e:
        print(f.__name__, a[-1:], e.errno)
for question in 'size is_read_only is_rotational can_multi_conn can_fua can_flush can_trim can_zero can_fast_zero can_cache can_df'.split():
    attempt(getattr(h, 'get_size' if question == 'size' else question))
for _ in range(3): # what a server knows from the first it need not ask again
    attempt(h.pread, 512, 0)
    attempt(h.pwrite, b'y' * 512, 512)
for fua in (0, nbd.CMD_FLAG_FUA)[:1 + h.can_fua()]:
    attempt(h.pwrite, b'x' * 512, 4096, fua)
    attempt(h.trim, 4096, 0, fua)
    for flags in (0, nbd.CMD_FLAG_NO_HOLE, nbd.CMD_FLAG_FAST_ZERO)[:2 + h.can_fast_zero()]:
        attempt(h.zero, 8192, 4096, flags | fua)
attempt(h.flush)
attempt(h.cache, 512, 0)
def extent(context, offset, extents, error):
    print(offset, extents)
    return 0
for flags in (0, nbd.CMD_FLAG_REQ_ONE):
    try:
        h.block_status(299008, 69632, extent, flags)
    except nbd.Error as e:
        print('block_status', e.errno)
h.shutdown()
`

// compareTraces runs both servers over layers with these specifications (see
// fixtures/filter.h), and wants the same calls in the same order, and the same answers.
func compareTraces(t *testing.T, spec map[string]string, args ...string) {
	t.Helper()
	for _, name := range []string{"a", "b", "c", "p"} {
		t.Setenv("LAYER_"+name, spec[name])
	}
	run := func(program string, trace func(*server) string, options ...string) (result string, aborted bool) {
		s, err := tryStart(t, program, tempDir(t), false, append(options, args...)...)
		if err != nil {
			return "does not start", false
		}
		list, _ := try(t, "nbdinfo", "--list", "--json", s.uri(""))
		path := filepath.Join(s.dir, "script.py")
		writeFile(t, path, "h.add_meta_context('base:allocation')\nh.connect_uri('"+s.uri("")+"')\n"+layerSession, 0o644)
		out, err := try(t, "/usr/bin/nbdsh", "-c", "exec(open('"+path+"').read())")
		result = s.anonymous(list+out) + fmt.Sprintln("client failed:", err != nil)
		if awaitClose(s) {
			return "", true
		}
		return result + trace(s), false
	}
	compare := func(trace func(*server) string, options ...string) {
		t.Helper()
		want, aborted := run(nbdkit, trace, options...)
		if aborted {
			t.Skip("nbdkit aborts: these layers break its rules")
		}
		if got, _ := run(nbdhost, trace, options...); got != want {
			t.Errorf("%s is unlike nbdkit in this:\n%s", underTest(), difference(want, got))
		}
	}
	compare(layerTrace, "-v")
	// Where nobody wants debug lines filters have a shorter way to what is below them.
	t.Setenv("LAYER_QUIET", "1")
	compare(dataTrace)
}

// TestLayers holds the calls that each layer sees against nbdkit's.
func TestLayers(t *testing.T) {
	everything := "ask"
	for _, tt := range []struct {
		name string
		spec map[string]string
		args []string
	}{
		{"three filters with every callback", map[string]string{}, nil},
		{"filters that ask", map[string]string{"a": everything, "b": everything, "c": everything}, nil},
		{"read-only", map[string]string{"b": everything}, []string{"-r"}},
		{"next is read-only", map[string]string{"a": "can_write=1 -pwrite -zero -trim", "b": "readonly=1 ask"}, nil},
		{"filters without callbacks for data", map[string]string{
			"a": "-pread -pwrite -flush -trim -zero -extents -cache", "b": "-get_size -can_write -can_flush -can_trim -can_zero -can_fast_zero -can_extents -can_fua -can_multi_conn -can_cache -block_size -is_rotational"}, nil},
		{"filters without a life", map[string]string{
			"a": "-load -unload -config -config_complete -thread_model -get_ready -after_fork -cleanup", "c": "-preconnect -list_exports -default_export -open -close -prepare -finalize"}, nil},
		{"the plugin has only what it needs", map[string]string{"p": "-load -unload -config_complete -thread_model -get_ready -after_fork -cleanup -preconnect -list_exports -default_export -close -export_description -block_size -can_write -can_flush -is_rotational -can_trim -can_zero -can_fast_zero -can_extents -can_fua -can_multi_conn -can_cache -flush -trim -zero -extents -cache"}, nil},
		{"zero is emulated by a filter", map[string]string{"b": "can_zero=1"}, nil},
		{"zero is emulated by the plugin", map[string]string{"p": "can_zero=0"}, nil},
		{"zero falls back", map[string]string{"p": "zero! errno=95"}, nil},
		{"no zero", map[string]string{"a": "can_zero=0"}, nil},
		{"cache is emulated by a filter", map[string]string{"a": "can_cache=1"}, nil},
		{"cache is emulated by the plugin", map[string]string{"p": "can_cache=1"}, nil},
		{"FUA is emulated by the plugin", map[string]string{"p": "can_fua=1"}, nil},
		{"no FUA", map[string]string{"c": "can_fua=0"}, nil},
		{"extents are hidden", map[string]string{"b": "can_extents=0"}, nil},
		{"extents are read in full", map[string]string{"b": "full", "p": "step=4096"}, nil},
		{"extents are aligned", map[string]string{"a": "align=131072", "p": "step=100000"}, nil},
		{"extents are aligned to what they are", map[string]string{"a": "align=512"}, nil},
		{"next is opened by hand", map[string]string{"a": "manual", "c": "manual ask"}, nil},
		{"a filter gives the default export", map[string]string{"a": "default", "p": "default"}, nil},
		{"no default export", map[string]string{"p": "default_export!"}, nil},
		{"a smaller disk", map[string]string{"b": "get_size=400000"}, nil},
		{"the strictest thread model", map[string]string{"a": "thread_model=2", "b": "thread_model=1", "p": "thread_model=3"}, nil},
		{"one connection at a time", map[string]string{"c": "thread_model=0"}, nil},
		{"block sizes", map[string]string{"b": "minimum=512 preferred=65536"}, nil},
		{"open fails late", map[string]string{"a": "open!"}, nil},
		{"open fails early", map[string]string{"b": "open_early!"}, nil},
		{"open of the plugin fails", map[string]string{"p": "open!"}, nil},
		{"prepare fails", map[string]string{"b": "prepare!", "a": "-finalize"}, nil},
		{"finalize fails", map[string]string{"b": "finalize!"}, nil},
		{"preconnect fails", map[string]string{"b": "preconnect!"}, nil},
		{"preconnect stops", map[string]string{"b": "preconnect0"}, nil},
		{"list_exports fails", map[string]string{"b": "list_exports!"}, nil},
		{"get_size fails", map[string]string{"b": "get_size!"}, nil},
		{"can_write fails", map[string]string{"p": "can_write!"}, nil},
		{"requests of a filter fail", map[string]string{"b": "pread! pwrite! flush! trim! zero! extents! cache! errno=28"}, nil},
		{"requests of the plugin fail", map[string]string{"p": "pread! pwrite! flush! trim! zero! extents! cache! errno=28"}, nil},
		{"config fails", map[string]string{"b": "config!"}, nil},
		{"config_complete fails", map[string]string{"b": "config_complete!"}, nil},
		{"get_ready fails", map[string]string{"b": "get_ready!"}, nil},
		{"thread_model fails", map[string]string{"b": "thread_model!"}, nil},
	} {
		t.Run(tt.name, func(t *testing.T) {
			compareTraces(t, tt.spec, slices.Concat(tt.args, layers(t, "a", "b", "c"), []string{"b=of b", "key=value"})...)
		})
	}
}

// callbackNames are what a specification can take away.
var callbackNames = strings.Fields(`load unload config config_complete thread_model get_ready after_fork cleanup
	preconnect list_exports default_export open prepare finalize get_size export_description block_size
	can_write can_flush is_rotational can_trim can_zero can_fast_zero can_extents can_fua can_multi_conn can_cache
	pread pwrite flush trim zero extents cache`)

// TestRandomLayers is TestLayers with chains that chance makes.
func TestRandomLayers(t *testing.T) {
	seeds := 12
	if testing.Short() {
		seeds = 4
	}
	for seed := range seeds {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			r := rand.New(rand.NewPCG(uint64(seed), 5))
			chance := func(p float64) bool { return r.Float64() < p }
			spec := map[string]string{}
			for _, name := range []string{"a", "b", "p"} {
				var words []string
				missing := []float64{0, 0.2, 0.5}[r.IntN(3)]
				for _, cb := range callbackNames {
					needed := name == "p" && slices.Contains([]string{"open", "get_size", "pread", "config"}, cb)
					if !needed && chance(missing) {
						words = append(words, "-"+cb)
					}
				}
				for _, cb := range []string{"can_write", "can_flush", "can_trim", "can_extents", "is_rotational", "can_multi_conn"} {
					if chance(0.1) {
						words = append(words, fmt.Sprintf("%s=%d", cb, r.IntN(2)))
					}
				}
				for _, cb := range []string{"can_zero", "can_fua", "can_cache"} {
					if chance(0.2) {
						words = append(words, fmt.Sprintf("%s=%d", cb, r.IntN(3)))
					}
				}
				if name != "p" {
					for _, word := range []string{"ask", "manual", "full", "align=65536", "get_size=400000", "thread_model=1"} {
						if chance(0.15) {
							words = append(words, word)
						}
					}
				}
				spec[name] = strings.Join(words, " ")
			}
			t.Log(spec)
			compareTraces(t, spec, append(layers(t, "a", "b"), "key=value")...)
		})
	}
}

// TestMixedReleases serves through a chain of filters from three releases, which
// nbdkit refuses, and with each of them over the plugins of the newest.
func TestMixedReleases(t *testing.T) {
	t.Parallel()
	onlyNbdhost(t)
	all := releases(t)
	host := newest(t)
	dir := tempDir(t)
	var chain []string
	for _, r := range all {
		for _, name := range []string{"offset", "cow", "truncate", "nofilter", "log"} {
			file := "nbdkit-" + name + "-filter.so"
			copyFile(t, filepath.Join(dir, r.name+"-"+file), filepath.Join(r.filters(), file))
		}
		chain = append(chain, r.name)
	}
	file := func(release, name string) string {
		return "--filter=" + filepath.Join(dir, release+"-nbdkit-"+name+"-filter.so")
	}
	m := testImages(t)
	for _, order := range [][]string{{chain[0], chain[1], chain[2]}, {chain[2], chain[0], chain[1]}, {chain[1], chain[2], chain[0]}} {
		args := []string{file(order[0], "cow"), file(order[1], "truncate"), file(order[2], "offset"),
			"-r=false", "file", m.ext4, "offset=1048576", "round-up=65536"}
		args = slices.DeleteFunc(args, func(a string) bool { return a == "-r=false" })
		t.Run(strings.Join(order, " over "), func(t *testing.T) {
			before := digest(t, m.ext4)
			got := (&scenario{args: args, client: func(t *testing.T, s *server) string { return explore(t, s, "", true) }}).run(t, host.nbdhost)
			same := []string{"--filter=cow", "--filter=truncate", "--filter=offset", "file", m.ext4, "offset=1048576", "round-up=65536"}
			want := (&scenario{args: same, client: func(t *testing.T, s *server) string { return explore(t, s, "", true) }}).run(t, host.nbdkit)
			if got != want {
				t.Errorf("three releases are unlike one in this:\n%s", difference(want, got))
			}
			if after := digest(t, m.ext4); after != before {
				t.Error("the cow filter has changed the disk below")
			}
			if out, err := try(t, host.nbdkit, append(slices.Clone(args), "--dump-plugin")...); err == nil {
				t.Errorf("nbdkit takes them, too: this is no test:\n%s", out)
			}
		})
	}
}

// TestRefusedFilters names what is wrong with a filter, and what to do.
func TestRefusedFilters(t *testing.T) {
	t.Parallel()
	onlyNbdhost(t)
	original, err := os.ReadFile("/usr/lib/x86_64-linux-gnu/nbdkit/filters/nbdkit-nofilter-filter.so")
	if err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		name, version string
		args          []string
		want          string // "" for success
	}{
		{"newer", "1.98.5", nil, "unknown filter release: built for nbdkit 1.98.5, need 1.26 to 1.48: use a newer nbdhost, or try it at your own risk with --filter-any-release"},
		{"newer, at one's own risk", "1.98.5", []string{"--filter-any-release"}, ""},
		{"older", "1.24.5", []string{"--filter-any-release"}, "built for nbdkit 1.24.5, need 1.26 to 1.48: its callbacks have another form"},
		{"development", "1.33.5", nil, "this is a development release: rebuild the filter for a stable one"},
		{"no release", "what ?", nil, "none of nbdkit's"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			path := filepath.Join(tempDir(t), "filter.so")
			changed := strings.ReplaceAll(string(original), "1.32.5\x00", tt.version[:6]+"\x00")
			writeFile(t, path, changed, 0o644)
			out, err := try(t, nbdhost, append(tt.args, "--filter="+path, "null", "--dump-plugin")...)
			switch {
			case tt.want == "" && err != nil:
				t.Errorf("got %v", err)
			case tt.want != "" && (err == nil || !strings.Contains(err.Error(), tt.want)):
				t.Errorf("got %v, %s\nneed %s", err, out, tt.want)
			}
		})
	}
	for name, want := range map[string]string{
		"/usr/lib/x86_64-linux-gnu/nbdkit/plugins/nbdkit-null-plugin.so": "not a filter: this is a plugin: leave --filter out",
		"nofiltre":  "did you mean nofilter?",
		"/dev/null": "not a shared library",
		"./no/such": "not found",
	} {
		if out, err := try(t, nbdhost, "--filter="+name, "null", "--dump-plugin"); err == nil || !strings.Contains(err.Error(), want) ||
			strings.Count(strings.TrimSpace(err.Error()), "\n") > 0 {
			t.Errorf("%s: got %v, %s\nneed one line with %s", name, err, out, want)
		}
	}
}

// TestExtentsBeyond: a filter that asks for the extents of less than the client did, in blocks, lets
// through what the plugin says beyond that, as nbdkit does: each that is left out is another call.
func TestExtentsBeyond(t *testing.T) {
	t.Parallel()
	var results []string
	for _, program := range []string{nbdkit, nbdhost} {
		dir := tempDir(t)
		calls := filepath.Join(dir, "calls")
		s := start(t, program, dir, false, "--filter=blocksize", "eval", "minblock=4k", "maxlen=64k",
			"get_size=echo 1M", "pread=exit 1", "extents=echo $3 $4 >>"+calls+
				"; for i in 0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15; do echo $((i*65536)) 65536 $((i%2*3)); done")
		out, err := try(t, "nbdinfo", "--map", s.uri(""))
		if err != nil {
			t.Fatal(out)
		}
		s.stop()
		made, err := os.ReadFile(calls)
		if err != nil {
			t.Fatal(err)
		}
		results = append(results, out+string(made))
	}
	if results[0] != results[1] {
		t.Errorf("%s is unlike nbdkit in this:\n%s", underTest(), difference(results[0], results[1]))
	}
}
