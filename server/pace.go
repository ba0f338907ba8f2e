package server

import (
	"sync/atomic"
	"time"
)

const (
	// A call that takes longer than slowCall runs on a worker: handing it over
	// costs less than a microsecond, and another core or the device behind the
	// plugin can work on the next one meanwhile. Back below fastCall it runs
	// on the reader again.
	slowCall = 40 * time.Microsecond
	fastCall = 20 * time.Microsecond
	// A new connection begins with unknownCall: a few calls tell.
	unknownCall = 10 * time.Microsecond
	// Where calls are slow one that takes longer than longCall counts nothing if its
	// thread has only waited for a processor. Else it counts in full, up to longestCall.
	longCall    = 100 * time.Microsecond
	longestCall = 10 * time.Millisecond
	// meanCalls is over how many calls the mean goes then: where one in a hundred
	// waits for a device, they all count as slow.
	meanCalls = 512
	// Above mostlyLong calls are long, and one in sampleLong is timed. What begins to be slow is
	// below it.
	mostlyLong = longCall * 9 / 10
	sampleLong = 8
	firstSlow  = longCall * 3 / 4
	// Moving data takes time in proportion to its size, on any goroutine:
	// about a third of a nanosecond a byte.
	bytesPerNanosecond = 3
	// Where strainMost calls lost the connection, and no strainTime of calm lay
	// between one and the next, calls go to workers, however fast most are.
	strainMost = 3
	strainTime = 8 * time.Millisecond
	// Where processors are contended it takes longer from one to the next, and all may
	// have waited for a processor only. There those count whose reader has made
	// trialCalls at most, and calls go to workers for a trial, where it can be told for
	// what they wait: fifty fast calls end it. The time from one trial to the next is
	// doubled each time, from trialFirst to trialMost.
	trialCalls      = 4
	trialStrainTime = 8 * strainTime
	trialCost       = fastCall * 11 / 10
	trialFirst      = 100 * time.Millisecond
	trialMost       = 4 * time.Second
)

// A pace is how long the calls of a connection take beyond what their size explains,
// and so who makes them: the reader, or others as well where slow is set. Updates that are
// lost since two come at the same time do no harm.
type pace struct {
	slow atomic.Bool
	cost atomic.Int64 // ns

	// The watcher's.
	strain int           // calls that lost the connection
	last   time.Duration // when one did
	tried  time.Duration // when a trial began
	pause  time.Duration // from then to the next
}

// inline takes in what n calls on the reader that moved so many bytes took together.
// cost follows the median: that a thread was not given a processor for a while, or
// waited for one that held a plugin's lock meanwhile, makes a few calls very long,
// and the mean with them, and workers would make it worse. Many calls count as several
// samples that are alike.
func (p *pace) inline(d time.Duration, n int, bytes uint64) {
	cost := p.cost.Load()
	call := own(d, bytes) / int64(n)
	for ; n > 0; n -= sampleCalls {
		if call > cost {
			cost += max(cost/2, 100)
		} else {
			cost -= cost / 3
		}
	}
	p.cost.Store(cost)
	switch {
	case cost > int64(slowCall):
		p.slacken(firstSlow)
	case cost < int64(fastCall):
		p.slow.Store(false)
	}
}

// each tells of how many calls where they are slow one is timed: of sampleLong where nearly all are
// known to take long, since to ask for what a thread has waited takes a microsecond; else of one.
func (p *pace) each() int {
	if p.cost.Load() >= int64(mostlyLong) {
		return sampleLong
	}
	return 1
}

// long takes in what one of so many calls took where calls are slow. cost follows the mean: also
// where only some of the calls wait for a device the others need not wait for them. starved
// says that the call has only waited for a processor.
func (p *pace) long(d time.Duration, calls int, bytes uint64, starved bool) {
	taken := min(own(d, bytes), int64(longestCall))
	if starved {
		taken = 0
	}
	cost := p.cost.Load()
	cost += (taken - cost) * int64(calls) / meanCalls
	p.cost.Store(cost)
	if cost < int64(fastCall) {
		p.slow.Store(false)
	}
}

// lost takes in that a call lost the connection, the last of so many that its reader has
// made since it had it.
func (p *pace) lost(at time.Duration, contended bool, calls uint64) {
	calm := strainTime
	if contended {
		calm = trialStrainTime
	}
	if at-p.last > calm {
		p.strain = 0
	}
	p.last = at
	if contended && calls > trialCalls {
		p.strain = 0
		return
	}
	if p.strain++; p.strain < strainMost {
		return
	}
	switch {
	case !contended:
		p.pause = 0
		p.slacken(firstSlow)
	case at-p.tried > p.pause:
		p.tried, p.pause = at, min(max(2*p.pause, trialFirst), trialMost)
		p.slacken(trialCost)
	}
}

// slacken lets others than the reader make calls, as if one took so long.
func (p *pace) slacken(cost time.Duration) {
	if p.slow.CompareAndSwap(false, true) {
		p.cost.Store(int64(cost))
	}
}

// own is what a call that moved so many bytes took beyond moving them, in ns.
func own(d time.Duration, bytes uint64) int64 {
	return max(0, int64(d)-int64(bytes/bytesPerNanosecond))
}
