package main

import (
	"context"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"
)

const (
	// mostStolen is how much of the processors' time the host may take away in a round.
	mostStolen = 0.02
	// restTime is how long a machine rests whose processors its host has taken away: some
	// give them back to one that has not used them for a while.
	restTime = 5 * time.Second
)

// A host is that of a virtual machine, which may give its processors to other machines. What is
// measured meanwhile says nothing: a round in which it took more than mostStolen is measured
// again, as long as there is time left for that.
type host struct {
	read                  func() ticks
	rest                  time.Duration // before a round is measured again
	left                  time.Duration // for that
	rounds, again, stolen int           // measured at last, thrown away, and kept all the same
}

// round measures a round, which takes f, until the host has left the processors alone. f is
// told whether what it measured before is to be forgotten.
func (h *host) round(ctx context.Context, f func(again bool)) {
	h.rounds++
	for again := false; ; again = true {
		began, before := time.Now(), h.read()
		f(again)
		if h.read().stolenSince(before) <= mostStolen || ctx.Err() != nil {
			return
		}
		if h.left -= time.Since(began) + h.rest; h.left < 0 {
			h.stolen++
			return
		}
		h.again++
		select {
		case <-ctx.Done():
		case <-time.After(h.rest):
		}
	}
}

func (h *host) String() string {
	return fmt.Sprintf("The host took more than %.0f %% of the processors away in %d of %d rounds, and in %d that were measured again.",
		100*mostStolen, h.stolen, h.rounds, h.again)
}

// ticks are times of all processors since the machine was started.
type ticks struct{ all, stolen float64 }

// readTicks returns none where the system does not tell.
func readTicks() ticks {
	b, err := os.ReadFile("/proc/stat")
	if err != nil {
		return ticks{}
	}
	first, _, _ := strings.Cut(string(b), "\n")
	return parseTicks(first)
}

// parseTicks reads the line "cpu" of proc_stat(5).
func parseTicks(line string) (t ticks) {
	const steal, guest = 8, 9
	for i, f := range strings.Fields(line) {
		v, err := strconv.ParseFloat(f, 64)
		if err != nil || i >= guest { // the name; and what user and nice have already
			continue
		}
		t.all += v
		if i == steal {
			t.stolen = v
		}
	}
	return t
}

// stolenSince is the share of the time since before that the host took, from 0 to 1.
func (t ticks) stolenSince(before ticks) float64 {
	if t.all <= before.all {
		return 0
	}
	return (t.stolen - before.stolen) / (t.all - before.all)
}
