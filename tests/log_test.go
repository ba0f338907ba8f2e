package tests

import (
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"nbdhost/protocol"
)

// records are the objects in a log of JSON, every line of which must be one.
func records(t *testing.T, s *server) (list []map[string]any) {
	t.Helper()
	for line := range strings.Lines(s.stderr()) {
		d := json.NewDecoder(strings.NewReader(line))
		d.UseNumber()
		var r map[string]any
		if err := d.Decode(&r); err != nil {
			t.Errorf("%q: %v", line, err)
			continue
		}
		if when, ok := r["time"].(string); !ok {
			t.Errorf("%q has no time", line)
		} else if _, err := time.Parse(time.RFC3339Nano, when); err != nil {
			t.Error(err)
		}
		delete(r, "time")
		list = append(list, r)
	}
	return list
}

// TestLogJSON: every line is an object, and says what it is about.
func TestLogJSON(t *testing.T) {
	t.Parallel()
	onlyNbdhost(t)
	dir := tempDir(t)
	newJournal(t, dir)
	s := start(t, nbdhost, dir, true, "--log-format=json", "--name=disk1", "--filter=nofilter", fixture(t, "trace"), "journal=DIR/journal", "fail=pread")
	c := s.raw()
	c.take(protocol.GreetingSize)
	c.write(clientFlags(protocol.FlagCFixedNewstyle | protocol.FlagCNoZeroes))
	c.write(option(protocol.OptGo, infoRequest("my export")))
	for h, _ := c.optionReply(); h.Type != protocol.RepAck; h, _ = c.optionReply() {
	}
	const cookie = 1<<63 + 5 // JSON has it whole
	c.read(cookie, 4096, 512)
	if r := c.next(); r.errno == 0 {
		t.Fatal("the read did not fail")
	}
	c.read(6, 1<<40, 512)
	if r := c.next(); r.errno == 0 {
		t.Fatal("the read did not fail")
	}
	peer := c.LocalAddr().String()
	c.disc()
	c.wantEOF()
	s.stop()

	got := records(t, s)
	common := func(m map[string]any) map[string]any {
		maps.Copy(m, map[string]any{"name": "disk1", "plugin": "trace", "conn": json.Number("1"), "peer": peer, "export": "my export"})
		return m
	}
	request := func(m map[string]any) map[string]any {
		maps.Copy(common(m), map[string]any{"worker": json.Number("0"), "cookie": json.Number(fmt.Sprint(uint64(cookie)))})
		return m
	}
	for _, want := range []map[string]any{
		common(map[string]any{"level": "INFO", "msg": "client connected", "tls": false}),
		request(map[string]any{"level": "ERROR", "msg": "pread fails as asked", "module": "trace", "callback": "pread"}),
		request(map[string]any{"level": "INFO", "msg": "request failed: trace: pread: pread fails as asked", "module": "trace",
			"command": "NBD_CMD_READ", "errno": "NBD_ENOSPC", "offset": json.Number("4096"), "length": json.Number("512")}),
	} {
		if !slices.ContainsFunc(got, func(r map[string]any) bool { return maps.Equal(r, want) }) {
			t.Errorf("the log has no %v:\n%s", want, s.stderr())
		}
	}
	for _, r := range got {
		if msg := r["msg"].(string); strings.HasPrefix(msg, "invalid request: ") &&
			(r["errno"] != "NBD_EINVAL" || r["cookie"] != json.Number("6") || r["command"] != "NBD_CMD_READ" || r["peer"] != peer) {
			t.Errorf("got %v, want all about the request", r)
		}
	}

	// So is what ends the program at once.
	for _, args := range [][]string{{"-f", "no-such-plugin"}, {"--supervise", "-f", "no-such-plugin"}, {"-f", "memory"}, {"-f", "file", "/nowhere"}} {
		got := runCLI(t, dir, "", nbdhost, append([]string{"--log-format=json", "-U", "sock"}, args...)...)
		for line := range strings.Lines(got.stderr) {
			if !json.Valid([]byte(line)) {
				t.Errorf("%q: got %q, want JSON", args, line)
			}
		}
		if got.status != 1 || got.stderr == "" {
			t.Errorf("%q: got status %d, %q", args, got.status, got.stderr)
		}
	}
}

// TestSlow: a call that takes longer than --slow-ms is worth a warning, and others are
// not, in either format.
func TestSlow(t *testing.T) {
	t.Parallel()
	onlyNbdhost(t)
	serve := func(args ...string) *server {
		dir := tempDir(t)
		j, g := newJournal(t, dir), newGate(t, dir)
		s := start(t, nbdhost, dir, false, append(args, fixture(t, "crash"), "journal=DIR/journal", "gate=DIR/gate")...)
		c := s.hello(false)
		c.read(1, 0, 512)
		c.want(1, 0)
		c.read(77, whereCrashes/2, 512)
		j.wait("slow", 1)
		time.Sleep(30 * time.Millisecond) // what has to be found out
		g.open(1)
		c.want(77, 0)
		c.read(2, 0, 512)
		c.want(2, 0)
		c.disc()
		c.wantEOF()
		s.stop()
		return s
	}
	s := serve("--slow-ms=25")
	wantLog(t, s, `nbdkit: crash\.\d+: warning: slow request: NBD_CMD_READ took [0-9.]+ ms \(connection 1, cookie 77, offset 32768, length 512\)`)
	s = serve("--slow-ms=25", "--log=DIR/log")
	if text, err := os.ReadFile(filepath.Join(s.dir, "log")); err != nil || !strings.Contains(string(text), "slow request") || s.stderr() != "" {
		t.Errorf("with --log: got %s, %v, and on standard error %s", text, err, s.stderr())
	}
	if s := serve(); s.stderr() != "" {
		t.Errorf("without --slow-ms: got\n%s", s.stderr())
	}
	if s := serve("--slow-ms=2147483647"); s.stderr() != "" {
		t.Errorf("with a limit of a month: got\n%s", s.stderr())
	}
	s = serve("--slow-ms=25", "--log-format=json")
	found := false
	for _, r := range records(t, s) {
		if r["level"] != "WARN" || r["cookie"] != json.Number("77") {
			continue
		}
		ms, _ := r["ms"].(json.Number).Float64()
		found = ms > 25 && r["command"] == "NBD_CMD_READ" && r["offset"] == json.Number("32768") && r["length"] == json.Number("512") && r["module"] == "crash"
	}
	if !found {
		t.Errorf("the log does not say what was slow:\n%s", s.stderr())
	}
	for _, bad := range []string{"", "0", "x", "-1", "99999999999"} {
		if got := runCLI(t, s.dir, "", nbdhost, "--slow-ms="+bad, "memory", "1M"); got.status != 1 || !strings.Contains(got.stderr, "need a number of milliseconds, at least 1") {
			t.Errorf("--slow-ms=%s: got status %d, %q", bad, got.status, got.stderr)
		}
	}
}
