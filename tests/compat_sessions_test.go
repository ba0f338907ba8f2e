package tests

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	"nbdhost/client"
)

// testSessions compares, in each release, the callbacks of whole sessions, with
// their arguments and whether they are called on the main thread.
func testSessions(t *testing.T) {
	plugin := fixture(t, "callbacks")
	type session struct {
		name   string
		args   []string
		client func(t *testing.T, s *server, j *journal) string
	}
	requests := `
def attempt(what, f):
    try:
        print(what, f())
    except nbd.Error as e:
        print(what, e.errno)
attempt('read', lambda: len(h.pread(512, 0)))
attempt('write', lambda: h.pwrite(b'x' * 512, 512))
attempt('write fua', lambda: h.pwrite(b'x' * 512, 512, nbd.CMD_FLAG_FUA))
attempt('flush', lambda: h.flush())
attempt('trim', lambda: h.trim(512, 0))
attempt('zero', lambda: h.zero(512, 0))
attempt('zero no hole', lambda: h.zero(512, 0, nbd.CMD_FLAG_NO_HOLE))
attempt('cache', lambda: h.cache(512, 0))
`
	python := func(text string) func(*testing.T, *server, *journal) string {
		return func(t *testing.T, s *server, _ *journal) string { return script(t, s, "", text) }
	}
	// An option at a time, without a connection's end in between.
	options := func(text string) func(*testing.T, *server, *journal) string {
		return func(t *testing.T, s *server, _ *journal) string {
			return command(t, "/usr/bin/nbdsh", "-c", `
h.set_opt_mode(True)
h.add_meta_context('base:allocation')
h.connect_uri('`+s.uri("")+`')
`+text)
		}
	}
	sessions := []session{
		{"connect, requests, leave", nil, python(requests + "h.shutdown()\n")},
		{"read-only server", []string{"-r"}, python(requests + "h.shutdown()\n")},
		{"leave without a word", nil, python(requests)},
		{"list, leave", nil, options(`
print(h.opt_list(lambda name, description: print(name, description)))
h.opt_abort()
`)},
		{"info, go", nil, options(`
h.set_export_name('named')
h.opt_info()
print(h.get_size(), h.is_read_only(), h.get_export_description() if h.get_full_info() else '')
h.opt_go()
print(len(h.pread(1, 0)))
h.shutdown()
`)},
		{"info, leave", nil, options("h.opt_info()\nh.opt_abort()\n")},
		{"export name by default", []string{"-e", "other"}, options("h.opt_go()\nprint(h.get_size())\nh.shutdown()\n")},
		{"several connections", nil, python(`
others = []
for i in range(3):
    n = nbd.NBD()
    n.connect_uri(h.get_uri())
    others.append(n)
    print(len(n.pread(512, 512 * i)))
`)},
		{"two connections in turn", nil, inTurn},
		{"two connections in turn, read-only", []string{"-r"}, inTurn},
	}
	for _, callback := range failing {
		sessions = append(sessions, session{"error in ." + callback, []string{"fail=" + callback}, func(t *testing.T, s *server, _ *journal) string {
			return command(t, "/usr/bin/nbdsh", "-c", `
try:
    h.connect_uri('`+s.uri("")+`')
    print(h.get_size())
except nbd.Error as e:
    print('connect') # which error is told, if any, is no callback's business
if h.aio_is_ready():
`+strings.ReplaceAll(requests+"h.shutdown()\n", "\n", "\n    "))
		}})
	}
	for _, r := range releases(t) {
		for _, se := range sessions {
			t.Run(r.name+"/"+se.name, func(t *testing.T) {
				t.Parallel()
				var j *journal
				r.same(t, scenario{
					setup: func(t *testing.T, dir string) { j = newJournal(t, dir) },
					args:  append([]string{plugin, "journal=DIR/journal"}, se.args...),
					client: func(t *testing.T, s *server) string {
						out := se.client(t, s, j)
						allClosed(j)
						return out
					},
					after: func(t *testing.T, _ string) string {
						lines := j.all()
						if n := len(lines); n < 5 {
							t.Errorf("got %d lines, want a trace: %q", n, lines)
						}
						lines = inOrder(settled(lines))
						return "journal:\n" + strings.Join(lines, "\n")
					},
				})
				sessionTable.record(t, se.name, r.name, 0, "same")
			})
		}
	}
}

// inTurn has two connections open, and a third one in the place of the first. A
// step begins when the one before has come to its end, and each request when the
// last one on the other connection has been answered.
func inTurn(t *testing.T, s *server, j *journal) string {
	var out strings.Builder
	dial := func(export string) *client.Conn {
		c, err := client.Dial(t.Context(), s.uri(export), nil)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		return c
	}
	buf := make([]byte, 512)
	rounds := func(conns ...*client.Conn) {
		for step, do := range []func(c *client.Conn, off uint64) error{
			func(c *client.Conn, off uint64) error { return c.Pwrite(buf, off, 0) },
			func(c *client.Conn, off uint64) error { return c.Pread(buf, off) },
			func(c *client.Conn, off uint64) error { return c.Zero(512, off, 0) },
			func(c *client.Conn, _ uint64) error { return c.Flush() },
		} {
			for i, c := range conns {
				fmt.Fprintln(&out, step, i, do(c, uint64(i)<<16) == nil)
			}
		}
	}
	leave := func(c *client.Conn, closed string) {
		// nbdkit 1.48 does not close a connection before the client does.
		if err := c.Close(); err != nil {
			t.Error(err)
		}
		j.wait(closed, 1)
	}
	first, second := dial("a"), dial("b")
	rounds(first, second)
	leave(first, "close 1")
	third := dial("c")
	rounds(second, third)
	leave(third, "close 3")
	rounds(second)
	leave(second, "close 2")
	return out.String()
}

// allClosed waits until what is open has been closed: nbdkit may end before.
func allClosed(j *journal) {
	j.t.Helper()
	// What was written before this has been read when this has been.
	if _, err := j.fifo.WriteString(marker + "\n"); err != nil {
		j.t.Fatal(err)
	}
	j.wait(marker, 1)
	for _, line := range j.sofar() {
		var id int
		if n, _ := fmt.Sscanf(line, "open %d ", &id); n == 1 {
			j.wait(fmt.Sprintf("close %d", id), 1)
		}
	}
}

const marker = "(marker)"

// inOrder sorts the ends of connections that end together, and drops the marker,
// which may stand between them.
func inOrder(lines []string) []string {
	lines = slices.DeleteFunc(lines, func(line string) bool { return line == marker })
	for begin := 0; begin < len(lines); begin++ {
		end := begin
		for end < len(lines) && strings.HasPrefix(lines[end], "close ") {
			end++
		}
		slices.Sort(lines[begin:end])
		begin = max(begin, end-1)
	}
	return lines
}

// testStructs serves plugins whose struct ends where those of earlier releases did.
func testStructs(t *testing.T) {
	type build struct {
		api    int
		source string
		before []string
	}
	// Of a read that ends beyond the disk nbdhost reads what there is.
	inside := strings.Replace(session, "attempt('read beyond', lambda: h.pread(2, size - 1))\n", "", 1)
	for _, b := range []build{
		// The first release, of 2013, had a struct without .zero.
		{1, "v1.c", []string{"zero", "errno_is_preserved", "dump_plugin", "can_zero", "can_fua"}},
		{2, "trace.c", []string{"magic_config_key", "can_multi_conn", "can_extents", "extents", "can_cache", "cache",
			"thread_model", "can_fast_zero", "preconnect", "get_ready", "after_fork", "list_exports", "default_export",
			"export_description", "cleanup", "block_size"}},
	} {
		for _, before := range b.before {
			row := fmt.Sprintf("API %d, before `.%s`", b.api, before)
			if before == "zero" {
				row += " (2013)"
			}
			t.Run(fmt.Sprintf("API %d/%s", b.api, before), func(t *testing.T) {
				t.Parallel()
				plugin := fixture(t, "sizes", fmt.Sprintf("-DNBDKIT_API_VERSION=%d", b.api),
					"-DBEFORE="+before, fmt.Sprintf(`-DSOURCE="%s"`, b.source))
				var j *journal
				compare(t, scenario{
					setup: func(t *testing.T, dir string) { j = newJournal(t, dir) },
					args:  []string{plugin, "journal=DIR/journal"},
					client: func(t *testing.T, s *server) string {
						return script(t, s, "", "WRITE = True\nCACHE = h.can_cache()\n"+inside+"\nh.shutdown()\n")
					},
					after: func(t *testing.T, _ string) string {
						return "journal:\n" + strings.Join(settled(j.all()), "\n")
					},
				})
				structTable.record(t, row, "result", 0, "same")
			})
		}
	}
}
