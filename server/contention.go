package server

import (
	"bytes"
	"os"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// contentionAge is for how long an answer of a contention stands.
const contentionAge = time.Millisecond

// A contention tells whether threads wait for processors. How long a call took then says
// little about the call. It is about the whole machine: where the process may use some of
// its processors only, it may not see that they are wanted.
type contention struct {
	loadavg *os.File     // proc_loadavg(5); nil where there is none
	most    int          // threads run or wait where the processors are not yet contended
	at      atomic.Int64 // when the answer was found
	answer  atomic.Bool
}

// processContention is the only one; it is made when a call has lost its connection, or
// where calls take long.
var processContention = sync.OnceValue(func() *contention {
	c := &contention{}
	c.loadavg, _ = os.Open("/proc/loadavg")
	online, _ := os.ReadFile("/sys/devices/system/cpu/online")
	c.most = 2 * cpus(strings.TrimSpace(string(online)))
	return c
})

// is tells it for t, which is now.
func (c *contention) is(t time.Duration) bool {
	at := c.at.Load()
	if at != 0 && t-time.Duration(at) < contentionAge || !c.at.CompareAndSwap(at, int64(t)) {
		return c.answer.Load()
	}
	if c.loadavg == nil || c.most == 0 {
		return false
	}
	var b [128]byte
	n, err := unix.Pread(int(c.loadavg.Fd()), b[:], 0)
	c.answer.Store(err == nil && runnable(b[:n]) > c.most)
	return c.answer.Load()
}

// threadWaits is how often this thread has had to wait for something but a processor.
// Where it is more after a call the call has waited, or its goroutine had to change
// threads, which is rare.
func threadWaits() int64 {
	var r unix.Rusage
	_ = unix.Getrusage(unix.RUSAGE_THREAD, &r) // it cannot fail
	return r.Nvcsw
}

// runnable is how many threads run or wait for a processor, 0 where loadavg is not as
// proc_loadavg(5) says.
func runnable(loadavg []byte) int {
	for range 3 { // the averages
		_, loadavg, _ = bytes.Cut(loadavg, []byte(" "))
	}
	running, _, _ := bytes.Cut(loadavg, []byte("/"))
	n, _ := strconv.Atoi(string(running))
	return n
}

// cpus is how many are in a list such as 0-3,8, and 0 where it is not one.
func cpus(list string) (n int) {
	for part := range strings.SplitSeq(list, ",") {
		first, last, isRange := strings.Cut(part, "-")
		if !isRange {
			last = first
		}
		a, err1 := strconv.Atoi(first)
		b, err2 := strconv.Atoi(last)
		if err1 != nil || err2 != nil || b < a {
			return 0
		}
		n += b - a + 1
	}
	return n
}
