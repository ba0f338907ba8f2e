package server

import (
	"runtime"
	"sync"
	"sync/atomic"
	"time"
)

const (
	// procStep is by how much GOMAXPROCS is raised: each time stops the process for
	// some ten microseconds.
	procStep = 8
	// procCalm is after how long without need of them it is set back.
	procCalm = time.Second
)

// A processors raises GOMAXPROCS while more of them are kept than it is large. A call that
// blocks in C keeps one of them until the scheduler notices, which may take as long as
// the call, and who waits for one meanwhile, as readers do, seems as slow as the calls. So
// does the reader of a hot socket, and clients that connect would wait.
// More of them than needed cost time, since the scheduler looks through all for work.
type processors struct {
	wanted atomic.Int64 // the most that were since the last look
	now    atomic.Int64 // as many as there are, once raised

	mu     sync.Mutex
	before int         // as many as there were, while raised
	timer  *time.Timer // of settle, while raised
}

// blocks takes in that calls take long while threads need not wait for processors, or that
// sockets are hot. Seven processors for eight calls are enough, and as soon as there are
// more than calls those that are free cost time; for two hot sockets there are three.
func (s *Server) blocks() {
	p := &s.processors
	n := min(int64(s.handed.Load()*7/8)+int64(s.hot.Load()*3/2), int64(s.opts.MaxProcs))
	if n > p.wanted.Load() {
		p.wanted.Store(n)
	}
	if n > p.now.Load() {
		p.raise(int(n), s.opts.MaxProcs)
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
