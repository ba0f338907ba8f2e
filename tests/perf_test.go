package tests

import (
	"bytes"
	"io"
	"math"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"

	"nbdhost/backend"
	"nbdhost/loader"
	"nbdhost/protocol"
	engine "nbdhost/server"
)

// What a request costs, in numbers that are the same on every machine. How long
// it takes is for tests/bench.

// A job is rounds of requests, each sent in one write, of which each reply is
// awaited before the next round.
type job struct {
	name  string
	op    protocol.Command
	batch int // requests in a round
	size  int
	// How many receives and sends the server may make in a round: one more than
	// it needs where a batch may come in pieces.
	receives, sends int
}

var jobs = []job{
	{"reads, 64 in flight", protocol.CmdRead, 64, 512, 2, 2},
	{"writes, 64 in flight", protocol.CmdWrite, 64, 512, 2, 2},
	{"status, 64 in flight", protocol.CmdBlockStatus, 64, 512, 2, 2},
	{"reads, one in flight", protocol.CmdRead, 1, 4096, 1, 1},
	{"writes, one in flight", protocol.CmdWrite, 1, 4096, 1, 1},
}

// on makes the job ready for a connection, whose handshake was made with
// structured replies for block status and without for anything else. The function
// that it returns does n rounds, and allocates nothing.
func (j *job) on(c *raw) func(n int) {
	var round []byte
	for i := range j.batch {
		r := protocol.Request{Type: j.op, Cookie: uint64(i), Offset: uint64(i * j.size), Length: uint64(j.size)}
		round = r.AppendTo(round)
		if j.op == protocol.CmdWrite {
			round = append(round, bytes.Repeat([]byte{'x'}, j.size)...)
		}
	}
	reply := protocol.SimpleReplySize
	switch j.op {
	case protocol.CmdRead:
		reply += j.size
	case protocol.CmdBlockStatus:
		reply = protocol.ChunkHeaderSize + 4 + 8
	}
	replies := make([]byte, j.batch*reply)
	return func(n int) {
		for range n {
			c.write(round)
			if _, err := io.ReadFull(c.r, replies); err != nil {
				c.t.Fatalf("read replies: %v", err)
			}
		}
	}
}

func (j *job) connect(s *server) *raw { return s.hello(j.op == protocol.CmdBlockStatus) }

func TestSystemCalls(t *testing.T) {
	onlyNbdhost(t)
	needStrace(t)
	const rounds = 50
	const chance = 5 // of a handshake or a first batch that comes in pieces
	for _, j := range jobs {
		t.Run(j.name, func(t *testing.T) {
			idleIn, idleOut := socketCalls(t, &j, 1)
			for range 2 {
				// A call that lost the connection costs sends: the least is subtracted.
				in, out := socketCalls(t, &j, 1)
				idleIn, idleOut = min(idleIn, in), min(idleOut, out)
			}
			in, out := socketCalls(t, &j, 1+rounds)
			in, out = in-idleIn, out-idleOut
			t.Logf("%d rounds of %d: %d receives, %d sends", rounds, j.batch, in, out)
			for _, x := range []struct {
				what     string
				got, max int
			}{{"receives", in, rounds * j.receives}, {"sends", out, rounds * j.sends}} {
				// Half of the rounds shows that calls are counted; the run that is
				// subtracted may have had its only batch in pieces.
				if x.got < rounds/2 || x.got > x.max+chance {
					t.Errorf("got %d %s in %d rounds of %d requests, want at most %d", x.got, x.what, rounds, j.batch, x.max)
				}
			}
		})
	}
}

// needStrace skips the test where strace, with the given options, does not work.
func needStrace(t *testing.T, options ...string) {
	t.Helper()
	args := append(options, "-D", "-qq", "-o", os.DevNull, "true")
	if out, err := exec.Command("strace", args...).CombinedOutput(); err != nil {
		t.Skipf("strace: %v: %s", err, out)
	}
}

// socketCalls does a job under strace and counts the server's calls that
// received from or sent to a socket. Those that found nothing there do not count:
// how many there are depends on who is faster.
func socketCalls(t *testing.T, j *job, rounds int) (receives, sends int) {
	t.Helper()
	return countCalls(straced(t, j, rounds, "-y -s 0 -e trace=read,readv,recvfrom,recvmsg,write,writev,sendto,sendmsg"))
}

// straced does a job under strace with the given options, and returns what strace wrote of
// the server.
func straced(t *testing.T, j *job, rounds int, options string) []byte {
	t.Helper()
	dir := tempDir(t)
	// -DD: the server keeps its process ID, and its process group to itself.
	script := filepath.Join(dir, "traced")
	writeFile(t, script, "#!/bin/sh\nexec strace -DD -f -qq "+options+" -o "+dir+"/calls '"+nbdhost+"' \"$@\"\n", 0o755)
	// strace holds the FIFO open until all is written.
	if err := syscall.Mkfifo(filepath.Join(dir, "calls"), 0o600); err != nil {
		t.Fatal(err)
	}
	type log struct {
		text []byte
		err  error
	}
	done := make(chan log, 1)
	go func() {
		text, err := os.ReadFile(filepath.Join(dir, "calls"))
		done <- log{text, err}
	}()
	// One thread keeps the calls on the reader, however busy the machine is.
	s := start(t, script, dir, false, "-t", "1", "memory", "1M")
	c := j.connect(s)
	j.on(c)(rounds)
	c.Close()
	s.stop()
	l := <-done
	if l.err != nil {
		t.Fatal(l.err)
	}
	return l.text
}

// TestMonitorSleeps shows that the runtime's monitor finds nothing to do while one client
// has requests carried out without a pause: it sleeps for 10 ms then, and for 20 us at a
// time where it has just taken a processor from the reader. See RATIONALE.md, "Why does a
// busy reader call runtime.Gosched?".
func TestMonitorSleeps(t *testing.T) {
	onlyNbdhost(t)
	needStrace(t, "-f", "--seccomp-bpf")
	nap := regexp.MustCompile(`nanosleep\(\{tv_sec=0, tv_nsec=(\d+)\}`)
	const tries = 3 // others may keep the client from asking, and so the reader from finding something
	for try := 1; ; try++ {
		naps := nap.FindAllSubmatch(straced(t, &jobs[3], 50_000, "--seccomp-bpf -e trace=nanosleep"), -1)
		short, long := 0, 0
		for _, m := range naps[len(naps)/2:] { // the server starts in the first half
			if ns, _ := strconv.Atoi(string(m[1])); ns < 5_000_000 {
				short++
			} else {
				long++
			}
		}
		t.Logf("%d short sleeps and %d long ones", short, long)
		switch {
		case long > short:
			return
		case try == tries:
			t.Fatal("got more short sleeps than long ones, want fewer")
		}
	}
}

// 1234 write(7<UNIX-STREAM:[5->6]>, ""..., 528) = 528, in one line or in two.
var (
	callLine    = regexp.MustCompile(`^(\d+) +(\w+)\(\d+<(?:UNIX|socket)`)
	resumedLine = regexp.MustCompile(`^(\d+) +<\.\.\. (\w+) resumed>`)
)

func countCalls(text []byte) (receives, sends int) {
	unfinished := map[string]bool{} // of a thread: it is in a call on a socket
	for line := range bytes.Lines(text) {
		m := callLine.FindSubmatch(line)
		if m != nil && bytes.Contains(line, []byte("<unfinished ...>")) {
			unfinished[string(m[1])] = true
			continue
		}
		if m == nil {
			if m = resumedLine.FindSubmatch(line); m == nil || !unfinished[string(m[1])] {
				continue
			}
			delete(unfinished, string(m[1]))
		}
		if bytes.Contains(line, []byte(" = -1 ")) {
			continue
		}
		switch string(m[2]) {
		case "read", "readv", "recvfrom", "recvmsg":
			receives++
		default:
			sends++
		}
	}
	return receives, sends
}

func TestCountCalls(t *testing.T) {
	in, out := countCalls([]byte(strings.Join([]string{
		`1 read(7<UNIX-STREAM:[5->6]>, ""..., 99) = 28`,
		`1 read(7<UNIX-STREAM:[5->6]>, 0x1, 99) = -1 EAGAIN (Resource temporarily unavailable)`,
		`1 write(4<anon_inode:[eventfd]>, ""..., 8) = 8`,
		`12 recvfrom(7<socket:[5]>,  <unfinished ...>`,
		`1 write(7<socket:[5]>, ""..., 9) = 9`,
		`1 read(3</etc/passwd>,  <unfinished ...>`,
		`12 <... recvfrom resumed>""..., 9, MSG_DONTWAIT, NULL, NULL) = 9`,
		`1 <... read resumed>""..., 9) = 9`,
		`1 +++ exited with 0 +++`, ""}, "\n")))
	if in != 2 || out != 1 {
		t.Errorf("got %d receives and %d sends, want 2 and 1", in, out)
	}
}

// TestAllocations has the server in this process, with a real plugin, so that
// every allocation on a request's way is seen.
func TestAllocations(t *testing.T) {
	onlyNbdhost(t)
	s := serveHere(t, "memory", "size=1M")
	for _, j := range jobs {
		t.Run(j.name, func(t *testing.T) {
			c := j.connect(&server{t: t, network: "unix", address: s})
			rounds := j.on(c)
			defer c.Close()
			// Something else in this process may allocate now and then.
			least := math.Inf(1)
			for range 5 {
				least = min(least, testing.AllocsPerRun(20, func() { rounds(10) }))
			}
			if least > 0 {
				t.Errorf("got %v allocations in %d requests, want none", least, 10*j.batch)
			}
		})
	}
}

// serveHere serves one of Debian's plugins in this process, and returns the socket.
func serveHere(t *testing.T, plugin string, params ...string) string {
	t.Helper()
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	must(initLoader())
	found, err := loader.Find(loader.PluginKind, plugin)
	must(err)
	p, err := loader.Open(found.Path)
	must(err)
	chain := backend.NewChain(p, nil, backend.Trace{})
	chain.Load()
	t.Cleanup(chain.Unload)
	for _, param := range params {
		k, v, _ := strings.Cut(param, "=")
		must(chain.Config(k, v))
	}
	must(chain.ConfigComplete())
	must(chain.SetThreadModel(backend.Parallel))
	must(chain.GetReady())
	must(chain.AfterFork())
	t.Cleanup(chain.Cleanup)

	// One thread keeps the calls on the reader, however busy the machine is.
	s := engine.New(engine.Options{Chain: chain, Threads: 1})
	l, err := net.Listen("unix", filepath.Join(tempDir(t), "sock"))
	must(err)
	served := make(chan error, 1)
	go func() { served <- s.Serve(l) }()
	t.Cleanup(func() {
		s.Shutdown()
		if err := <-served; err != nil {
			t.Error(err)
		}
		if !s.Wait() {
			t.Error("connections are left at the end")
		}
	})
	return l.Addr().String()
}

var initLoader = sync.OnceValue(func() error { return loader.Init(loader.Host{}) })
