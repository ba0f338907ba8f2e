package server

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"
)

// Who makes the calls follows what most calls take where the reader makes them, and
// what they take together where others do as well.
func TestPace(t *testing.T) {
	const fast, slow, starved = 2 * time.Microsecond, time.Millisecond, 400 * time.Microsecond
	contended := false
	feed := func(p *pace, n int, each func(i int) time.Duration) {
		for i := range n {
			if !p.slow.Load() {
				p.inline(8*each(i), 8, 8*4096)
			} else if calls, d := p.each(), each(i); i%calls == 0 {
				p.long(d, calls, 4096, contended && d > longCall)
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
		t.Error("a third of the calls where they are slow: not slow")
	}
	feed(&p, 10000, every(100, 3*slow))
	if !p.slow.Load() {
		t.Error("one in a hundred of the calls where they are slow very slow: not slow")
	}
	contended = true
	feed(&p, 10000, every(10, 3*slow))
	if p.slow.Load() {
		t.Error("a tenth of the calls slow while processors are contended: slow")
	}
	contended = false
	feed(&p, 50, all(slow))
	if !p.slow.Load() {
		t.Error("slow calls again: not slow")
	}
	feed(&p, 5000, all(fast))
	if p.slow.Load() {
		t.Error("fast calls again: slow")
	}
	// A mebibyte takes its time without being slow.
	p.inline(300*time.Microsecond, 1, 1<<20)
	if p.slow.Load() || p.cost.Load() > int64(slowCall) {
		t.Errorf("long calls: got a cost of %d ns", p.cost.Load())
	}

	at := now()
	for range 10 { // now and then
		at += 2 * strainTime
		p.lost(at, false, 1000)
	}
	if p.slow.Load() {
		t.Error("seldom lost: slow")
	}
	for range strainMost {
		at += 2 * minTick
		p.lost(at, false, 1000)
	}
	if !p.slow.Load() {
		t.Error("often lost: not slow")
	}

	// Where processors are contended it is tried, and less and less often where it was in
	// vain.
	p, contended = pace{}, true
	for range 100 {
		at += minTick
		p.lost(at, true, trialCalls+1)
	}
	if p.slow.Load() {
		t.Error("calls that were fast before lost the connection while processors are contended: slow")
	}
	trials := 0
	for end := at + 10*time.Second; at < end; at += 2 * strainTime {
		p.lost(at, true, 1)
		if p.slow.Load() {
			trials++
			if feed(&p, 100, all(fast)); p.slow.Load() {
				t.Fatal("100 fast calls: the trial goes on")
			}
		}
	}
	if trials < 5 || trials > 8 { // after 0, 0.1, 0.3, 0.7, 1.5, 3.1, 6.3 seconds
		t.Errorf("got %d trials in 10 seconds, need 7", trials)
	}
	for end := at + 2*trialMost; at < end && !p.slow.Load(); at += 2 * strainTime {
		p.lost(at, true, 1)
	}
	for range 2000 { // which have waited for something else
		p.long(slow, 1, 4096, false)
	}
	if !p.slow.Load() {
		t.Error("slow calls while processors are contended: not slow")
	}
}

// Answers of the kernel about who waits for processors are read right, and stand for a
// while.
func TestContention(t *testing.T) {
	for list, want := range map[string]int{"0": 1, "0-3": 4, "0-1,4,8-11": 7, "": 0, "no": 0, "3-1": 0} {
		if got := cpus(list); got != want {
			t.Errorf("cpus %q: got %d, need %d", list, got, want)
		}
	}
	for text, want := range map[string]int{"0.53 0.60 0.66 9/317 12345\n": 9, "0.53 0.60": 0, "": 0, "a b c d e": 0} {
		if got := runnable([]byte(text)); got != want {
			t.Errorf("runnable %q: got %d, need %d", text, got, want)
		}
	}
	real := processContention()
	if real.loadavg == nil || real.most < 2 {
		t.Fatalf("got %+v from this machine", real)
	}
	name := filepath.Join(t.TempDir(), "loadavg")
	say := func(running int) {
		if err := os.WriteFile(name, fmt.Appendf(nil, "0.53 0.60 0.66 %d/317 12345\n", running), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	say(5)
	f, err := os.Open(name)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	at := now()
	c := &contention{loadavg: f, most: 4}
	if !c.is(at) {
		t.Error("5 of 4: not contended")
	}
	say(4)
	if !c.is(at + contentionAge/2) {
		t.Error("asked again at once")
	}
	if c.is(at + contentionAge) {
		t.Error("4 of 4: contended")
	}
	if (&contention{}).is(at + time.Hour) {
		t.Error("contended where nobody can tell")
	}
}
