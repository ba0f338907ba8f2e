package server

import (
	"testing"
	"time"
)

// Who makes the calls follows what most calls take where the reader makes them, and
// what they take together where workers do.
func TestPace(t *testing.T) {
	const fast, slow, starved = 2 * time.Microsecond, time.Millisecond, 400 * time.Microsecond
	feed := func(p *pace, n int, each func(i int) time.Duration) {
		for i := range n {
			if p.slow.Load() {
				p.delegated(each(i), 4096)
			} else {
				p.inline(8*each(i), 8, 8*4096)
			}
		}
	}
	all := func(d time.Duration) func(int) time.Duration { return func(int) time.Duration { return d } }
	every := func(n int, d time.Duration) func(int) time.Duration {
		return func(i int) time.Duration {
			if i%n == 0 {
				return d
			}
			return fast
		}
	}

	var p pace
	feed(&p, 1000, all(fast))
	if p.slow.Load() {
		t.Error("fast calls: slow")
	}
	feed(&p, 1000, every(3, starved))
	if p.slow.Load() {
		t.Error("a third of the calls had no processor: slow")
	}
	feed(&p, 20, all(slow))
	if !p.slow.Load() {
		t.Error("slow calls: not slow")
	}
	feed(&p, 1000, every(3, slow))
	if !p.slow.Load() {
		t.Error("a third of the calls on workers slow: not slow")
	}
	feed(&p, 100, all(fast))
	if p.slow.Load() {
		t.Error("fast calls again: slow")
	}
	// A mebibyte takes its time without being slow.
	p.inline(300*time.Microsecond, 1, 1<<20)
	if p.slow.Load() || p.cost.Load() > int64(slowCall) {
		t.Errorf("long calls: got a cost of %d ns", p.cost.Load())
	}

	now := time.Now()
	for range 10 { // now and then
		now = now.Add(2 * strainTime)
		p.lost(now)
	}
	if p.slow.Load() {
		t.Error("seldom lost: slow")
	}
	for range strainMost {
		now = now.Add(2 * minTick)
		p.lost(now)
	}
	if !p.slow.Load() {
		t.Error("often lost: not slow")
	}
}
