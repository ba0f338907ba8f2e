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
	// procCalm is after how long without calls that block it is set back.
	procCalm = time.Second
)

// A processors raises GOMAXPROCS while more calls block than it is large. A call that
// blocks in C keeps one of them until the scheduler notices, which may take as long as
// the call, and who waits for one meanwhile, as readers do, seems as slow as the calls.
// More of them than needed cost time, since the scheduler looks through all for work.
type processors struct {
	blocking atomic.Bool  // calls have blocked since the last look
	now      atomic.Int64 // as many as there are, once raised

	mu     sync.Mutex
	before int         // as many as there were, while raised
	timer  *time.Timer // of settle, while raised
}

// blocks takes in that calls take long while threads need not wait for processors. Seven
// processors for eight calls are enough, and as soon as there are more than calls those
// that are free cost time.
func (s *Server) blocks() {
	p := &s.processors
	if !p.blocking.Load() {
		p.blocking.Store(true)
	}
	if n := min(int(s.handed.Load()*7/8), s.opts.MaxProcs); n > int(p.now.Load()) {
		p.raise(n, s.opts.MaxProcs)
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
		procs = min((n+procStep-1)/procStep*procStep, most)
		runtime.GOMAXPROCS(procs)
	}
	p.now.Store(int64(procs))
}

// settle sets GOMAXPROCS back when calls do not block any more.
func (p *processors) settle() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.blocking.Swap(false) {
		p.timer.Reset(procCalm)
		return
	}
	runtime.GOMAXPROCS(p.before)
	p.timer = nil
	p.now.Store(0)
}
