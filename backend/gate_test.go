package backend

import (
	"sync"
	"testing"
)

// What each thread model lets run at the same time: never more, and that many
// indeed, since the first calls stay inside until all of them are there.
func TestGate(t *testing.T) {
	for _, tt := range []struct {
		model              ThreadModel
		all, ofOne, opened int32 // calls at a time, of one connection, connections
	}{
		{SerializeConnections, 1, 1, 1},
		{SerializeAllRequests, 1, 1, 3},
		{SerializeRequests, 3, 1, 3},
		{Parallel, 12, 4, 3},
	} {
		t.Run(tt.model.String(), func(t *testing.T) {
			g := NewGate(tt.model)
			all, opened := newPeak(tt.all), newPeak(tt.opened)
			var conns sync.WaitGroup
			for range 3 {
				conns.Go(func() {
					l := g.Connect(nil)
					defer l.Leave()
					if l.Parallel() != (tt.model == Parallel) {
						t.Errorf("got Parallel %v", l.Parallel())
					}
					opened.enter()
					defer opened.leave()
					ofOne := newPeak(tt.ofOne)
					var calls sync.WaitGroup
					for range 4 {
						calls.Go(func() {
							for range 100 {
								l.Lock()
								ofOne.enter()
								all.enter()
								all.leave()
								ofOne.leave()
								l.Unlock()
							}
						})
					}
					calls.Wait()
					if ofOne.max > tt.ofOne {
						t.Errorf("got %d calls at a time of one connection, need %d", ofOne.max, tt.ofOne)
					}
				})
			}
			conns.Wait()
			if all.max > tt.all || opened.max > tt.opened {
				t.Errorf("got %d calls and %d connections at a time, need %d and %d", all.max, opened.max, tt.all, tt.opened)
			}
		})
	}
}

// peak counts how many are inside, and remembers the most.
type peak struct {
	mu       sync.Mutex
	now, max int32
	need     int32
	reached  chan struct{} // closed once need have been inside together
}

func newPeak(need int32) *peak { return &peak{need: need, reached: make(chan struct{})} }

func (p *peak) enter() {
	p.mu.Lock()
	p.now++
	if p.max < p.need && p.now == p.need {
		close(p.reached)
	}
	p.max = max(p.max, p.now)
	p.mu.Unlock()
	<-p.reached
}

func (p *peak) leave() {
	p.mu.Lock()
	p.now--
	p.mu.Unlock()
}

func TestGateQuit(t *testing.T) {
	g := NewGate(SerializeConnections)
	first := g.Connect(nil)
	quit := make(chan struct{})
	close(quit)
	if l := g.Connect(quit); l != nil {
		t.Error("a second connection came in")
	}
	first.Leave()
	if l := g.Connect(nil); l == nil {
		t.Error("no connection came in after the first had left")
	}
}
