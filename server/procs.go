package server

import (
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// procStep is by how much GOMAXPROCS is raised: each time stops the process for
	// some ten microseconds.
	procStep = 8
	// procCalm is after how long without need of them it is set back.
	procCalm = time.Second
	// napTime is more than two of the longest times between two looks of the runtime's
	// monitor.
	napTime = 25 * time.Millisecond
)

// A processors sees to it that goroutines find a processor of Go's scheduler while threads
// block in C and in system calls. Such a thread keeps its own until the runtime's monitor takes
// it away, which it does when it sees the same call twice.
//
// Readers of hot sockets block again and again, and are faster while the monitor sleeps: for
// them there are more processors. More than needed cost time, since the scheduler looks through
// all of them for work.
//
// Where more calls take long than there are processors the monitor had better be awake. It
// looks every 20 µs as long as that brings something, and every 10 ms where it has not
// for a while. Then calls of a millisecond come and go between two looks, it sees none twice, and
// there are as many calls at a time as processors, for as long as clients go on.
type processors struct {
	wanted atomic.Int64 // the most that were since the last look
	now    atomic.Int64 // as many as there are, once raised

	mu     sync.Mutex
	before int         // as many as there were, while raised
	timer  *time.Timer // of settle, while raised

	napping atomic.Bool // a nap is under way
}

// callsBlock takes in that calls take long, of which so many have been handed to workers. If
// those are more than there are processors the monitor is kept awake.
func (p *processors) callsBlock(handed int64) {
	if !p.napping.Load() && handed > int64(runtime.GOMAXPROCS(0)) && p.napping.CompareAndSwap(false, true) {
		go p.nap()
	}
}

// nap blocks for so long that the monitor sees it twice, whatever the calls do. Each is a
// goroutine of its own, which begins on the processor of who started it: one that napped again
// and again would come back to the same, and a thread that had that before would take it back
// each time, as threads do.
func (p *processors) nap() {
	t := unix.NsecToTimespec(int64(napTime))
	_ = unix.Nanosleep(&t, nil) // not time.Sleep, which keeps no processor
	p.napping.Store(false)
}

// keep takes in that sockets are hot: for two of them there are three processors.
func (p *processors) keep(hot int32, most int) {
	n := min(int64(hot*3/2), int64(most))
	if n > p.wanted.Load() {
		p.wanted.Store(n)
	}
	if n > p.now.Load() {
		p.raise(int(n), most)
	}
}

func (p *processors) raise(n, most int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	procs := runtime.GOMAXPROCS(0)
	if n > procs {
		if p.timer == nil {
			p.before = procs
			p.timer = time.AfterFunc(procCalm, p.settle)
		}
		procs = min(steps(n), most)
		runtime.GOMAXPROCS(procs)
	}
	p.now.Store(int64(procs))
}

// steps rounds n up.
func steps(n int) int { return (n + procStep - 1) / procStep * procStep }

// settle sets GOMAXPROCS to what has been wanted since the last look.
func (p *processors) settle() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if n := steps(int(p.wanted.Swap(0))); n > p.before {
		if n < runtime.GOMAXPROCS(0) {
			runtime.GOMAXPROCS(n)
			p.now.Store(int64(n))
		}
		p.timer.Reset(procCalm)
		return
	}
	runtime.GOMAXPROCS(p.before)
	p.timer = nil
	p.now.Store(0)
}
