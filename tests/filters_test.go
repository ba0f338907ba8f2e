package tests

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"
)

// filters is where the release has them, seen from outside.
func (r *release) filters() string {
	return filepath.Join(r.tree, "usr/lib/x86_64-linux-gnu/nbdkit/filters")
}

// A filterCase is a job for a filter that shows its effect.
type filterCase struct {
	filter string
	scenario
	did string // for the table
}

// filterJobs collects the jobs.
type filterJobs struct {
	m     *images
	cases []filterCase
}

// makeDisks makes the files that the jobs use in a server's own directory.
func makeDisks(t *testing.T, dir string) {
	for i, name := range []string{"disk", "other"} {
		path := filepath.Join(dir, name)
		writeFile(t, path, strings.Repeat(name+" line\n", 20_000), 0o644)
		if err := os.Truncate(path, int64(1+i)<<20); err != nil {
			t.Fatal(err)
		}
	}
}

// diskDigest is what became of the disk.
func diskDigest(t *testing.T, dir string) string { return digest(t, filepath.Join(dir, "disk")) }

// add adds a job that reads and, if write is set, writes. The arguments are the
// server's without --filter for the filter itself.
func (j *filterJobs) add(write bool, filter string, args ...string) *filterCase {
	did := "read, map"
	if write {
		did = "read, write, map"
	}
	j.cases = append(j.cases, filterCase{filter, scenario{
		name:   strings.Join(args, " "),
		args:   append([]string{"--filter=" + filter}, args...),
		setup:  makeDisks,
		after:  diskDigest,
		client: func(t *testing.T, s *server) string { return explore(t, s, "", write) },
	}, did})
	return &j.cases[len(j.cases)-1]
}

// below adds a job with a log filter between the filter and the plugin. What is
// compared is what the layer below is asked.
func (j *filterJobs) below(write bool, filter string, args ...string) *filterCase {
	c := j.add(write, filter, slices.Concat([]string{"--filter=log"}, args, []string{"logfile=DIR/log"})...)
	c.did = "calls below"
	c.client = func(t *testing.T, s *server) string { return part(t, s, write, "beyond") }
	c.after = func(t *testing.T, dir string) string {
		return diskDigest(t, dir) + filterLog(t, filepath.Join(dir, "log"))
	}
	return c
}

// part returns what the session prints without its lines that have the word.
func part(t *testing.T, s *server, write bool, word string) string {
	lines := strings.Split(session, "\n")
	lines = slices.DeleteFunc(lines, func(l string) bool { return strings.Contains(l, word) })
	python := map[bool]string{true: "True", false: "False"}
	return script(t, s, "", "WRITE = "+python[write]+"\nCACHE = True\n"+strings.Join(lines, "\n"))
}

// with adds a job with a client of its own, and says what it does.
func (j *filterJobs) with(filter, did string, client func(t *testing.T, s *server) string, args ...string) *filterCase {
	c := j.add(false, filter, args...)
	c.did, c.client = did, client
	return c
}

// tls adds a job with a client that uses TLS and one that does not, in which the
// plugin writes down whether TLS is said to be in use.
func (j *filterJobs) tls(filter, did, mode string) {
	c := j.with(filter, did, func(t *testing.T, s *server) string {
		keys := filepath.Join(s.dir, "psk/keys.psk")
		secured := "nbds+unix://alice@/x?socket=" + s.address + "&tls-psk-file=" + keys
		result := ""
		for _, uri := range []string{secured, s.uri("x")} {
			out, err := try(t, "nbdcopy", uri, "-")
			result += fmt.Sprintf("%.600q, failed: %t\n", out, err != nil)
		}
		return result
	}, "--tls="+mode, "--tls-psk=DIR/psk/keys.psk", "sh", "DIR/script")
	c.setup = func(t *testing.T, dir string) {
		tlsFiles(t, dir)
		writeFile(t, filepath.Join(dir, "script"), `#!/bin/sh
case $1 in
open) echo "open of $3, TLS: $4" >>`+dir+`/opened ;;
get_size) echo 512 ;;
pread) dd if=/dev/zero count=$3 iflag=count_bytes status=none ;;
*) exit 2 ;;
esac
`, 0o755)
	}
	c.after = func(t *testing.T, dir string) string {
		text, err := os.ReadFile(filepath.Join(dir, "opened"))
		if err != nil {
			t.Fatal(err)
		}
		return string(text)
	}
}

// In some threads nbdkit 1.48 has a "!" for the time.
var logTime = regexp.MustCompile(`(?m)^(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d+|!) `)

// filterLog is what the log filter has written, without the time of day.
func filterLog(t *testing.T, path string) string {
	t.Helper()
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return logTime.ReplaceAllString(string(text), "")
}

// compress makes FILE.SUFFIX of a copy of the disk with a tool.
func compress(tool, suffix string, args ...string) func(t *testing.T, dir string) {
	return func(t *testing.T, dir string) {
		makeDisks(t, dir)
		command(t, tool, append(args, "-k", filepath.Join(dir, "disk"))...)
		if _, err := os.Stat(filepath.Join(dir, "disk."+suffix)); err != nil {
			t.Fatal(err)
		}
	}
}

func filterCases(t *testing.T) []filterCase {
	j := &filterJobs{m: testImages(t)}
	m := j.m
	python := func(text string) func(t *testing.T, s *server) string {
		return func(t *testing.T, s *server) string { return script(t, s, "", text) }
	}
	// attempt is for scripts that only try calls.
	const attempt = `
h.set_strict_mode(0)
def attempt(what, f):
    try:
        r = f()
        print(what, len(r) if isinstance(r, (bytes, bytearray)) else r)
    except nbd.Error as e:
        print(what, e.errno)
`

	j.below(true, "blocksize", "file", "DIR/disk", "minblock=4096", "maxdata=16384", "maxlen=65536")
	j.add(true, "blocksize", "memory", "2M", "minblock=512", "maxdata=4096")
	j.add(true, "blocksize-policy", "file", "DIR/disk", "blocksize-minimum=4096", "blocksize-preferred=65536",
		"blocksize-maximum=1M", "blocksize-error-policy=error")
	j.add(false, "bzip2", "file", "DIR/disk.bz2").setup = compress("bzip2", "bz2")
	j.add(true, "cache", "file", "DIR/disk")
	j.below(true, "cache", "file", "DIR/disk", "cache=writethrough")
	j.below(true, "cache", "file", "DIR/disk", "cache=unsafe", "cache-on-read=true")
	j.add(false, "cacheextents", "-r", "file", m.sparse)
	j.add(true, "checkwrite", "file", "DIR/disk")
	j.with("checkwrite", "refuses other bytes", python(attempt+`
same = h.pread(8192, 0)
attempt('the same', lambda: h.pwrite(same, 0))
attempt('another', lambda: h.pwrite(bytes(512), 0))
attempt('zeroes', lambda: h.zero(4096, 512 * 1024))
`), "file", "DIR/disk")
	j.add(true, "count", "-v", "file", "DIR/disk")
	j.add(true, "cow", "file", "DIR/disk")
	j.below(true, "cow", "file", "DIR/disk", "cow-on-read=true", "cow-block-size=4096")
	j.add(false, "ddrescue", "file", "DIR/disk", "ddrescue-mapfile=DIR/map").setup = func(t *testing.T, dir string) {
		makeDisks(t, dir)
		writeFile(t, filepath.Join(dir, "map"), "# Mapfile.\n0x00000000     +\n0x00000000  0x00080000  +\n0x00080000  0x00010000  -\n0x00090000  0x00070000  +\n", 0o644)
	}
	j.with("delay", "measured", func(t *testing.T, s *server) string {
		return script(t, s, "", `
import time
for what, f, least in (('read', lambda: h.pread(512, 0), 0.2), ('write', lambda: h.pwrite(bytes(512), 0), 0.1)):
    began = time.monotonic()
    f()
    print(what, time.monotonic() - began >= least)
`)
	}, "memory", "1M", "delay-read=200ms", "delay-write=100ms")
	j.with("error", "errors of each kind", python(attempt+`
attempt('read', lambda: h.pread(512, 0))
attempt('write', lambda: h.pwrite(bytes(512), 0))
attempt('flush', h.flush)
`), "memory", "1M", "error-pread=ENOSPC", "error-pread-rate=100%", "error-pwrite=ESHUTDOWN", "error-pwrite-rate=1")
	j.with("error", "no errors without its file", python(attempt+`
attempt('read', lambda: h.pread(512, 0))
`), "memory", "1M", "error=EPERM", "error-rate=100%", "error-file=DIR/nothing")
	j.add(false, "evil", "file", "DIR/disk", "evil=stuck-bits", "evil-seed=3", "evil-probability=1e-4", "evil-stuck-probability=1")
	j.with("exitlast", "ends the server", func(t *testing.T, s *server) string {
		out := command(t, "nbdinfo", "--size", s.uri(""))
		s.wait() // nobody has told it to stop
		return out
	}, "memory", "1M")
	j.with("exitwhen", "ends the server", func(t *testing.T, s *server) string {
		out := command(t, "nbdinfo", "--size", s.uri(""))
		writeFile(t, filepath.Join(s.dir, "stop"), "", 0o644)
		s.wait()
		return out
	}, "memory", "1M", "exit-when-file-created=DIR/stop", "exit-when-poll=1")
	j.with("exportname", "names refused and listed", func(t *testing.T, s *server) string {
		refused := func(export string) string {
			_, err := try(t, "nbdinfo", s.uri(export))
			return fmt.Sprintln(export, err != nil)
		}
		return command(t, "nbdinfo", "--list", s.uri("")) + command(t, "nbdinfo", s.uri("two")) +
			refused("") + refused("three") + refused("one")
	}, "memory", "1M", "exportname-list=explicit", "exportname=one", "exportname=two", "exportname-strict=true",
		"exportdesc=fixed:of the filter", "default-export=one")
	j.with("exportname", "descriptions by a script", func(t *testing.T, s *server) string {
		return command(t, "nbdinfo", "--list", s.uri("")) + command(t, "nbdinfo", s.uri(""))
	}, "file", "dir="+m.tree, "exportname-list=keep", "exportdesc=script:echo \"$name has a script\"", "default-export=three.bin")
	j.add(false, "ext2", "file", m.ext4, "ext2file=/three.bin")
	j.with("ext2", "export by name", func(t *testing.T, s *server) string {
		return explore(t, s, "small.txt", false) + command(t, "nbdinfo", s.uri("/sub/one.bin"))
	}, "-r", "file", m.ext4, "ext2file=exportname")
	j.add(false, "extentlist", "-r", "file", "DIR/disk", "extentlist=DIR/list").setup = func(t *testing.T, dir string) {
		makeDisks(t, dir)
		writeFile(t, filepath.Join(dir, "list"), "0 64K\n64K 128K hole,zero\n512K 100K zero\n", 0o644)
	}
	for _, mode := range []string{"emulate", "native", "force", "pass", "discard"} {
		j.below(true, "fua", "file", "DIR/disk", "fuamode="+mode)
	}
	j.add(false, "gzip", "file", "DIR/disk.gz").setup = compress("gzip", "gz")
	j.add(false, "indexed-gzip", "file", "DIR/disk.gz", "gzip-index-path=DIR/index").setup = compress("gzip", "gz")
	refused := func(t *testing.T, s *server) string {
		out, err := try(t, "nbdinfo", "--size", s.uri(""))
		return fmt.Sprintln(out, err != nil)
	}
	j.with("ip", "TCP refused", refused, "memory", "1M", "deny=all").tcp = true
	j.with("ip", "TCP allowed", refused, "memory", "1M", "allow=anyipv4", "deny=all").tcp = true
	j.with("ip", "TCP not among those allowed", refused, "memory", "1M", "allow=anyunix", "deny=all").tcp = true
	j.with("ip", "a user allowed", refused, "memory", "1M", "allow=uid:"+fmt.Sprint(os.Getuid()), "deny=all")
	j.with("ip", "a user refused", refused, "memory", "1M", "deny=uid:"+fmt.Sprint(os.Getuid()))
	j.with("limit", "a second client refused", func(t *testing.T, s *server) string {
		return script(t, s, "", `
import time
URI = '`+s.uri("")+`'
def another():
    other = nbd.NBD()
    try:
        other.connect_uri(URI)
        other.shutdown()
        return 'connected'
    except nbd.Error:
        return 'refused'
print(another())
h.shutdown()
`)
	}, "memory", "1M", "limit=1")
	j.with("log", "read, write, map, appending", func(t *testing.T, s *server) string { return explore(t, s, "", true) }, "file", "DIR/disk", "logfile=DIR/log", "logappend=true")
	log := j.with("log", "log file", func(t *testing.T, s *server) string { return part(t, s, true, "beyond") }, "file", "DIR/disk", "logfile=DIR/log")
	log.after = func(t *testing.T, dir string) string { return filterLog(t, filepath.Join(dir, "log")) }
	luks := j.with("luks", "read, write, decrypted", func(t *testing.T, s *server) string { return part(t, s, true, "unaligned") }, "file", "DIR/luks", "passphrase=secret")
	luks.setup = func(t *testing.T, dir string) {
		makeDisks(t, dir)
		copyFile(t, filepath.Join(dir, "luks"), luksImage(t, m))
	}
	j.add(false, "lzip", "file", "DIR/disk.lz").setup = compress("lzip", "lz")
	j.add(true, "map", "file", "DIR/disk", "map=0-65535:131072", "map=131072-196607:0", "map-size=1M")
	for _, mode := range []string{"auto", "emulate", "plugin", "disable", "unsafe"} {
		j.add(true, "multi-conn", "file", "DIR/disk", "multi-conn-mode="+mode)
	}
	j.with("multi-conn", "flushes on all connections", func(t *testing.T, s *server) string {
		return script(t, s, "", `
other = nbd.NBD()
other.connect_uri('`+s.uri("")+`')
h.pwrite(b'x' * 4096, 0)
other.flush()
other.pwrite(b'y' * 4096, 8192)
other.shutdown()
h.flush()
`)
	}, "--filter=log", "file", "DIR/disk", "multi-conn-mode=emulate", "multi-conn-track-dirty=fast", "logfile=DIR/log").after =
		func(t *testing.T, dir string) string {
			// The connections end at the same time.
			lines := strings.Split(filterLog(t, filepath.Join(dir, "log")), "\n")
			return strings.Join(slices.DeleteFunc(lines, func(l string) bool { return strings.Contains(l, "Disconnect") }), "\n")
		}
	for _, mode := range []string{"none", "emulate", "nop"} {
		j.below(true, "nocache", "file", "DIR/disk", "cachemode="+mode)
	}
	j.add(true, "noextents", "file", "DIR/disk")
	j.add(true, "nofilter", "file", "DIR/disk")
	for _, model := range []string{"connections", "all-requests", "requests"} {
		j.add(true, "noparallel", "file", "DIR/disk", "serialize="+model)
	}
	for _, mode := range []string{"none", "emulate", "notrim", "plugin"} {
		for _, fast := range []string{"default", "none", "slow", "ignore"} {
			j.below(true, "nozero", "file", "DIR/disk", "zeromode="+mode, "fastzeromode="+fast)
		}
	}
	j.add(true, "offset", "file", "DIR/disk", "offset=4096", "range=131072")
	j.below(true, "offset", "file", "DIR/disk", "offset=65536")
	j.add(true, "openonce", "file", "DIR/disk")
	// A session that clients share is secured where all of them must be.
	for _, mode := range []string{"on", "require"} {
		j.tls("openonce", "TLS "+mode, mode)
	}
	j.below(true, "openonce", "memory", "2M")
	j.add(false, "partition", "partitioning", m.ext4, m.sparse, "partition=2")
	j.add(true, "partition", "partitioning", "DIR/disk", "DIR/other", "partition-type=gpt", "partition=1")
	j.with("pause", "holds requests back", pauseJob, "memory", "1M", "pause-control=DIR/pause")
	j.with("protect", "writes refused", python(attempt+`
attempt('before', lambda: h.pwrite(b'x' * 512, 0))
attempt('into', lambda: h.pwrite(b'x' * 1024, 65536 - 512))
attempt('the same', lambda: h.pwrite(h.pread(512, 65536), 65536))
attempt('zero', lambda: h.zero(512, 65536 + 512))
attempt('trim', lambda: h.trim(512, 65536 + 512))
attempt('behind', lambda: h.pwrite(b'x' * 512, 131072))
`), "file", "DIR/disk", "protect=65536-131071")
	j.add(false, "qcow2dec", "file", m.qcow2)
	j.with("rate", "measured", func(t *testing.T, s *server) string {
		return script(t, s, "", `
import time
h.pread(1 << 20, 0) # the bucket is full at first
began = time.monotonic()
h.pread(1 << 20, 0)
print(time.monotonic() - began >= 0.5)
`)
	}, "memory", "2M", "rate=10M", "burstiness=0.5")
	j.add(false, "readahead", "-r", "file", m.sparse)
	j.add(true, "readahead", "file", "DIR/disk")
	j.with("readonly", "turns read-only by a file", func(t *testing.T, s *server) string {
		result := script(t, s, "", attempt+"attempt('write', lambda: h.pwrite(bytes(512), 0))\n")
		writeFile(t, filepath.Join(s.dir, "stop"), "", 0o644)
		return result + script(t, s, "", attempt+"attempt('write', lambda: h.pwrite(bytes(512), 0))\n")
	}, "file", "DIR/disk", "readonly-file=DIR/stop")
	j.add(false, "readonly", "file", "DIR/disk")
	failing := func(times int) func(t *testing.T, dir string) {
		return func(t *testing.T, dir string) {
			makeDisks(t, dir)
			writeFile(t, filepath.Join(dir, "script"), fmt.Sprintf(`#!/bin/sh
echo "$@" | sed 's/ [^ ]* / - /' >>%[1]s/calls
case $1 in
open) echo "$3" ;;
get_size) echo 1048576 ;;
can_write) exit 0 ;;
pread|pwrite)
  n=$(cat %[1]s/n 2>/dev/null || echo 0)
  echo $((n + 1)) >%[1]s/n
  if [ $n -lt %[2]d ]; then echo "EIO it fails" >&2; exit 1; fi
  if [ $1 = pread ]; then dd if=/dev/zero count=$3 iflag=count_bytes status=none; else cat >/dev/null; fi ;;
*) exit 2 ;;
esac
`, dir, times), 0o755)
		}
	}
	calls := func(t *testing.T, dir string) string {
		text, err := os.ReadFile(filepath.Join(dir, "calls"))
		if err != nil {
			t.Fatal(err)
		}
		// A signal that comes at once keeps nbdkit from running some more.
		return lastCalls.ReplaceAllString(string(text), "")
	}
	for _, f := range []string{"retry", "retry-request"} {
		for _, times := range []int{1, 5} {
			c := j.with(f, map[int]string{1: "plugin fails once", 5: "plugin fails 5 times"}[times], python(attempt+"attempt('read', lambda: h.pread(512, 0))\nattempt('write', lambda: h.pwrite(bytes(512), 512))\n"),
				"sh", "DIR/script", f+"-delay=1", map[string]string{"retry": "retries=2", "retry-request": "retry-request-retries=2"}[f])
			if f == "retry" {
				c.args = append(c.args, "retry-exponential=no")
			}
			c.name += fmt.Sprintf(" after %d failures", times)
			c.setup, c.after = failing(times), calls
		}
	}
	j.add(true, "rotational", "file", "DIR/disk", "rotational=true")
	j.with("scan", "read, map, while it scans", func(t *testing.T, s *server) string { return explore(t, s, "", false) }, "-r", "file", m.sparse, "scan-forever=true")
	j.add(true, "spinning", "file", "DIR/disk", "min-seek-time=0", "half-seek-time=0", "max-seek-time=0")
	j.with("stats", "statistics", func(t *testing.T, s *server) string { return part(t, s, true, "beyond") }, "file", "DIR/disk", "statsfile=DIR/stats").after =
		func(t *testing.T, dir string) string {
			text, err := os.ReadFile(filepath.Join(dir, "stats"))
			if err != nil {
				t.Fatal(err)
			}
			// How long it took differs; what was done, and how much, does not.
			return regexp.MustCompile(`[0-9.]+ (bits|bytes|[kKMG]i?B|[kKMG]?i?bit|s|ns|µs|us|ms|ops)?/?s|elapsed.*|\d+\.\d+ s`).ReplaceAllString(string(text), "#")
		}
	j.add(false, "swab", "file", "DIR/disk", "swab-bits=8") // writes memory that it has not filled
	for _, bits := range []string{"16", "32", "64"} {
		j.add(true, "swab", "file", "DIR/disk", "swab-bits="+bits)
	}
	j.add(false, "tar", "file", "DIR/tar", "tar-entry=./three.bin").setup = func(t *testing.T, dir string) {
		makeDisks(t, dir)
		command(t, "tar", "--sort=name", "-cf", filepath.Join(dir, "tar"), "-C", m.tree, ".")
	}
	for _, mode := range []string{"on", "require"} {
		j.tls("tls-fallback", "TLS "+mode, mode)
	}
	j.with("time-limit", "ends the connection", python(attempt+`
attempt('read', lambda: h.pread(512, 0))
import time
time.sleep(1.5)
attempt('read', lambda: h.pread(512, 0))
`), "memory", "1M", "time-limit=1")
	for _, args := range [][]string{
		{"truncate=524288"}, {"truncate=2000000"}, {"round-up=65536"}, {"round-down=65536"},
	} {
		j.add(true, "truncate", slices.Concat([]string{"file", "DIR/disk"}, args)...)
	}
	j.below(true, "truncate", "memory", "1000000", "round-up=4096")
	j.add(true, "xor", "file", "DIR/disk", "xor=0x1234", "xorlen=2")
	j.add(false, "xz", "file", "DIR/disk.xz").setup = compress("xz", "xz", "--block-size=65536")
	return j.cases
}

// lastCalls are those of a script when the server stops.
var lastCalls = regexp.MustCompile(`(?m)(^(close|cleanup|unload)\b.*\n)+\z`)

// luksImage is an encrypted disk whose passphrase is "secret".
func luksImage(t *testing.T, m *images) string {
	path := filepath.Join(scratch, "images", "luks")
	formats.Lock()
	defer formats.Unlock()
	if _, err := os.Stat(path); err == nil {
		return path
	}
	raw := filepath.Join(scratch, "images", "luks.raw")
	writeFile(t, raw, strings.Repeat("encrypted\n", 20_000), 0o644)
	if err := os.Truncate(raw, 1<<20); err != nil {
		t.Fatal(err)
	}
	// It measures how fast the processor is, and fails where others use it too.
	var err error
	for range 10 {
		if _, err = try(t, "qemu-img", "convert", "--object", "secret,id=key,data=secret", "-f", "raw", "-O", "luks",
			"-o", "key-secret=key,iter-time=10", raw, path+".new"); err == nil {
			break
		}
	}
	if err == nil {
		err = os.Rename(path+".new", path)
	}
	if err != nil {
		t.Fatal(err)
	}
	return path
}

// pauseJob holds a request back and lets it go on.
func pauseJob(t *testing.T, s *server) string {
	control, err := net.Dial("unix", filepath.Join(s.dir, "pause"))
	if err != nil {
		t.Fatal(err)
	}
	defer control.Close()
	control.SetDeadline(time.Now().Add(patience))
	say := func(command string) string {
		if _, err := control.Write([]byte(command)); err != nil {
			t.Fatal(err)
		}
		answer := make([]byte, 1)
		if _, err := control.Read(answer); err != nil {
			t.Fatal(err)
		}
		return string(answer)
	}
	result := say("p")
	began := make(chan struct{})
	read := make(chan string)
	go func() {
		close(began)
		out, err := try(t, "/usr/bin/nbdsh", "-u", s.uri(""), "-c", "print(len(h.pread(512, 0)))")
		read <- fmt.Sprintln(out, err)
	}()
	<-began
	select {
	case out := <-read:
		t.Errorf("a read went through while the server was paused: %s", out)
		return result
	case <-time.After(300 * time.Millisecond): // only ever too short to find a fault
	}
	result += say("r")
	return result + <-read + say("?")
}

// lacks tells why a release cannot do a job, or "".
func (r *release) lacks(c *filterCase) string {
	if _, err := os.Stat(filepath.Join(r.filters(), "nbdkit-"+c.filter+"-filter.so")); err != nil {
		return "the release does not have the filter"
	}
	if c.filter == "lzip" {
		if _, err := exec.LookPath("lzip"); err != nil {
			return "lzip is not installed"
		}
	}
	return ""
}

// testFilters gives every filter of every release a job, under nbdkit and under the
// program under test, and compares what comes of it.
func testFilters(t *testing.T) {
	cases := filterCases(t)
	for _, r := range releases(t) {
		t.Run(r.name, func(t *testing.T) {
			t.Parallel()
			done := map[string]bool{}
			for i, c := range cases {
				done[c.filter] = true
				name := c.filter
				if len(c.scenario.name) > 0 {
					name += " " + c.scenario.name
				}
				t.Run(name, func(t *testing.T) {
					if why := r.lacks(&c); why != "" {
						t.Skip(why)
					}
					r.same(t, c.scenario)
					filterTable.record(t, c.filter, r.name, i, c.did)
				})
			}
			entries, err := os.ReadDir(r.filters())
			if err != nil {
				t.Fatal(err)
			}
			for _, e := range entries {
				name := strings.TrimSuffix(strings.TrimPrefix(e.Name(), "nbdkit-"), "-filter.so")
				if !done[name] {
					t.Errorf("filter %s has no job", name)
				}
			}
		})
	}
}

// testFilterInformation compares what the options that ask about filters print.
func testFilterInformation(t *testing.T) {
	for _, r := range releases(t) {
		t.Run(r.name, func(t *testing.T) {
			t.Parallel()
			entries, err := os.ReadDir(r.filters())
			if err != nil {
				t.Fatal(err)
			}
			for _, e := range entries {
				name := strings.TrimSuffix(strings.TrimPrefix(e.Name(), "nbdkit-"), "-filter.so")
				t.Run(name, func(t *testing.T) {
					if want, got := helpOf(t, r.nbdkit, name), helpOf(t, r.nbdhost, name); got != want {
						t.Errorf("--help:\n%s", difference(want, got))
					}
					dump := func(program string) string {
						lines := strings.Split(command(t, program, "--filter="+name, "null", "--dump-plugin"), "\n")
						// Not in 1.32.
						return strings.Join(slices.DeleteFunc(lines, func(l string) bool {
							key, _, _ := strings.Cut(l, "=")
							return r.name == "bookworm" && (strings.HasSuffix(key, "_path") || strings.HasSuffix(key, "_name"))
						}), "\n")
					}
					if want, got := dump(r.nbdkit), dump(r.nbdhost); got != want {
						t.Errorf("--dump-plugin:\n%s", difference(want, got))
					}
					filterTable.record(t, name, r.name, -1, "help, dump")
				})
			}
		})
	}
}

// helpOf returns what --help prints about a filter and the plugin.
func helpOf(t *testing.T, program, filter string) string {
	t.Helper()
	out, err := try(t, program, "--filter="+filter, "null", "--help")
	if err != nil {
		return err.Error()
	}
	_, out, _ = strings.Cut(out, "\nfilter: ") // what precedes is about the server
	return out
}
