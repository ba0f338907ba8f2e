package tests

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"hash/crc32"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"nbdhost/client"
	"nbdhost/protocol"
)

// What chainOf puts together. Filters that take chances are not among them; nor is cache-max-size:
// with readahead above it nbdkit's cache filter brings other data each time, under either server.
var (
	chainPlugins = [][]string{
		{"memory", "SIZE"},
		{"memory", "SIZE", "allocator=malloc"},
		{"file", "DIR/disk"},
		{"file", "DIR/disk"},
		{"pattern", "SIZE"},
	}
	chainFilters = [][]string{
		{"blocksize", "minblock=512"},
		{"blocksize", "minblock=4096", "maxdata=64K", "maxlen=1M"},
		{"blocksize-policy", "blocksize-minimum=512", "blocksize-preferred=4096", "blocksize-maximum=1M", "blocksize-error-policy=error"},
		{"cache"},
		{"cache", "cache=unsafe"},
		{"cache", "cache=writethrough"},
		{"cache", "cache-on-read=true", "cache-min-block-size=4K"},
		{"cache", "cache-min-block-size=16K"},
		{"cacheextents"},
		{"cow"},
		{"cow", "cow-on-read=true", "cow-block-size=4K"},
		{"delay", "delay-read=1ms"},
		{"error", "error-extents=EIO", "error-extents-rate=100%"},
		{"error", "error-zero=EOPNOTSUPP", "error-zero-rate=100%"},
		{"fua", "fuamode=emulate"},
		{"fua", "fuamode=force"},
		{"multi-conn", "multi-conn-mode=emulate"},
		{"nocache", "cachemode=emulate"},
		{"noextents"},
		{"noparallel", "serialize=all-requests"},
		{"nozero"},
		{"nozero", "zeromode=emulate"},
		{"nozero", "zeromode=notrim"},
		{"offset", "offset=64K", "range=3M"},
		{"protect", "protect=1M-1200000"},
		{"readahead"},
		{"retry", "retries=1", "retry-delay=0", "retry-exponential=no"},
		{"retry-request", "retry-request-retries=1", "retry-request-delay=0"},
		{"swab", "swab-bits=16"},
		{"truncate", "truncate=5000000"},
		{"truncate", "round-up=1M"},
	}
)

// chainOf returns the command line of a random chain.
func chainOf(r *rand.Rand) []string {
	size := pick(r, "4M", "6M", "4194816", "3000001")
	plugin := pick(r, chainPlugins...)
	var filters, parameters []string
	seen := map[string]bool{}
	for range 1 + r.IntN(4) {
		f := pick(r, chainFilters...)
		if !seen[f[0]] {
			seen[f[0]] = true
			filters, parameters = append(filters, "--filter="+f[0]), append(parameters, f[1:]...)
		}
	}
	for _, arg := range plugin {
		filters = append(filters, strings.ReplaceAll(arg, "SIZE", size))
	}
	return append(filters, parameters...)
}

// A visit is a client of the same random requests as others with the same seed, and notes what
// comes of them.
type visit struct {
	*rand.Rand
	*client.Conn
	notes strings.Builder
	data  [2][]byte // what is written: zeroes, and what are none
	p     []byte
	lost  error // the connection was
	file  bool  // is served
}

const longest = 3 << 20 // of a visit's requests, in bytes

func (v *visit) note(what string, off, n uint64, err error, result any) {
	errno := protocol.Errno(0)
	if e := (*client.Error)(nil); errors.As(err, &e) {
		errno = e.Errno
	} else if err != nil {
		result, v.lost = err, err
	}
	fmt.Fprintf(&v.notes, "%s %d+%d: %v %v\n", what, off, n, errno, result)
}

// area chooses what a request is about: often some whole blocks, often what was asked for before.
func (v *visit) area() (off, n uint64) {
	size := v.Size()
	n = 1 + v.Uint64N(1<<v.IntN(22))
	off = v.Uint64N(size)
	switch unit := pick(v.Rand, 1, 512, 4096, 64<<10, 1<<20, 1<<20); {
	case unit > 1 && size > uint64(unit):
		off -= off % uint64(unit)
		n += (uint64(unit) - n%uint64(unit)) % uint64(unit)
	}
	return off, min(n, size-off, longest)
}

// request makes one.
func (v *visit) request() {
	off, n := v.area()
	flags := protocol.CommandFlags(0)
	maybe := func(offered protocol.ExportFlags, flag protocol.CommandFlags) {
		if v.Flags()&offered != 0 && v.IntN(4) == 0 {
			flags |= flag
		}
	}
	can := func(flag protocol.ExportFlags) bool { return v.Flags()&flag != 0 }
	switch kind := v.IntN(12); {
	case kind < 4:
		p := v.p[:n]
		for i := range p { // what is not read must not look as if it had been
			p[i] = 0xee
		}
		err := v.Pread(p, off)
		if err != nil { // how much of it there is before an error is up to the server
			p = nil
		}
		v.note("read", off, n, err, crc32.ChecksumIEEE(p))
	case kind < 7 && !can(protocol.FlagReadOnly):
		maybe(protocol.FlagSendFUA, protocol.CmdFlagFUA)
		p := v.data[v.IntN(2)][v.IntN(100):][:n]
		v.note("write", off, n, v.Pwrite(p, off, flags), flags)
	case kind == 7 && can(protocol.FlagSendTrim):
		// Without FUA, which nbdkit's cache filter hands to layers that have none: nbdkit ends
		// itself for that.
		v.note("trim", off, n, v.Trim(n, off, 0), "")
	case kind == 8 && can(protocol.FlagSendWriteZeroes):
		maybe(protocol.FlagSendFUA, protocol.CmdFlagFUA)
		maybe(protocol.FlagHasFlags, protocol.CmdFlagNoHole)
		v.note("zero", off, n, v.Zero(n, off, flags), flags)
	case kind == 9 && can(protocol.FlagSendFlush):
		v.note("flush", 0, 0, v.Flush(), "")
	case kind == 10 && can(protocol.FlagSendCache):
		v.note("cache", off, n, v.Cache(n, off, 0), "")
	case kind == 11 && v.HasContext(protocol.ContextBaseAllocation) && !v.file: // whose holes depend on when the kernel writes
		// How long a run is said to be is up to the server, and to how it rounds.
		runs, err := v.BlockStatus(n, off, 0)
		flags := uint64(0)
		if err == nil {
			flags = runs[protocol.ContextBaseAllocation][0].Flags
		}
		v.note("status", off, n, err, flags)
	}
}

// TestFilterChains has the same random requests, of up to 3 MiB and with structured replies, made
// of nbdkit and of the program under test, with random chains of filters, many of which hold data
// back. What they answer is compared, and the file that they leave.
func TestFilterChains(t *testing.T) {
	t.Parallel()
	onlyNbdhost(t)
	for _, r := range releases(t) {
		t.Run(r.name, func(t *testing.T) {
			t.Parallel()
			began := time.Now()
			served := 0
			for seed := *differentialSeed; ; seed++ {
				if *differentialTime == 0 && seed == *differentialSeed+40 || *differentialTime > 0 && time.Since(began) > *differentialTime {
					t.Logf("%d chains, up to seed %d", served, seed-1)
					break
				}
				random := rand.New(rand.NewPCG(seed, 0))
				args := chainOf(random)
				ok := t.Run(fmt.Sprintf("%d %s", seed, strings.Join(args, " ")), func(t *testing.T) {
					var did [2]string
					for i, program := range []string{r.nbdkit, r.nbdhost} {
						did[i] = visited(t, program, args, seed)
					}
					if did[0] == crashed && did[1] != crashed {
						return
					}
					if did[0] != did[1] {
						t.Errorf("unlike nbdkit in this:\n%s", difference(did[0], did[1]))
					}
					if did[0] != refused {
						served++
					}
				})
				if !ok {
					break
				}
			}
			if served == 0 {
				t.Error("no chain was served")
			}
		})
	}
}

// What became of a server without a visit that could be compared. nbdkit crashes with some chains.
const (
	refused = "refused to start"
	crashed = "crashed"
)

// visited returns what became of a visit and the file of the plugin.
func visited(t *testing.T, program string, args []string, seed uint64) string {
	dir := tempDir(t)
	disk := filepath.Join(dir, "disk")
	writeFile(t, disk, "", 0o644)
	if err := os.Truncate(disk, 4<<20+512); err != nil {
		t.Fatal(err)
	}
	s, err := tryStart(t, program, dir, false, append([]string{"-t", "1"}, args...)...)
	if err != nil {
		return refused
	}
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	c, err := client.Dial(ctx, s.uri(""), &client.Options{CompactHeaders: true}) // nbdkit has no others
	if err != nil {
		s.stop()
		return "no client is served"
	}
	v := visit{Rand: rand.New(rand.NewPCG(seed, 1)), Conn: c, p: make([]byte, longest), file: s.serves("file")}
	v.data[0] = make([]byte, longest+100)
	v.data[1] = bytes.Repeat([]byte("what is written, "), longest/17+7)
	fmt.Fprintln(&v.notes, c.Size(), c.Flags(), c.BlockSize())
	for range 100 {
		v.request()
	}
	c.Close()
	if v.lost == nil || strings.HasSuffix(program, "nbdhost") {
		s.stop()
	}
	if v.lost != nil || s.status != nil {
		return crashed
	}
	return v.notes.String() + digest(t, disk)
}
