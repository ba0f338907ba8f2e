package server

import (
	"log/slog"
	"testing"
	"time"

	"nbdhost/backend"
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

// A client that waits for each reply is served by the reader, also where calls are slow;
// one that asks for more at a time is not, nor one whose calls take very long.
func TestAlone(t *testing.T) {
	c := &conn{slots: make(chan struct{}, 4), s: &Server{opts: Options{Threads: 4, Chain: &backend.Chain{}}},
		lane: backend.NewGate(backend.Parallel).Connect(nil), log: slog.New(slog.DiscardHandler)}
	c.pace.slow.Store(true)
	c.pace.cost.Store(int64(slowCall))
	r := newReader(c, 0)
	buf, err := backend.GetBuffer(1)
	if err != nil {
		t.Fatal(err)
	}
	defer buf.Release()
	r.in.buf = buf
	request := func(beside int) bool { // with so many bytes of the next in hand
		r.in.start, r.in.end = 0, 512+beside
		return r.delegates(512)
	}
	learn := func() {
		t.Helper()
		for i := range loneRequests - 1 {
			if !request(0) {
				t.Fatalf("request %d: not handed over, want it to be before that much is known", i)
			}
		}
		if request(0) {
			t.Fatal("lone requests: handed over")
		}
	}
	learn()
	if !request(28) {
		t.Error("one more in hand: not handed over")
	}
	learn()
	c.slots <- struct{}{}
	if !request(0) {
		t.Error("a call under way: not handed over")
	}
	<-c.slots
	learn()
	c.pace.cost.Store(int64(longCall))
	if !request(0) {
		t.Error("long calls: not handed over")
	}
	c.pace.slow.Store(false)
	if request(28) {
		t.Error("fast calls: handed over")
	}
}
