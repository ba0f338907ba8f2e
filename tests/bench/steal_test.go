package main

import (
	"context"
	"testing"
	"time"
)

func TestTicks(t *testing.T) {
	before := parseTicks("cpu  100 1 50 800 10 0 5 34 7 0")
	if before != (ticks{all: 1000, stolen: 34}) {
		t.Errorf("got %+v", before)
	}
	if got := parseTicks("cpu  150 1 50 830 10 0 5 54 7 0").stolenSince(before); got != 0.2 {
		t.Errorf("got %g stolen, need 20 of 100", got)
	}
	if got := before.stolenSince(before); got != 0 {
		t.Errorf("got %g stolen in no time", got)
	}
	if now := readTicks(); now.all == 0 {
		t.Error("got no ticks of this system")
	}
}

// A round in which the host took processors away is measured again, as long as there is time.
func TestRound(t *testing.T) {
	for _, tt := range []struct {
		left   time.Duration
		stolen []float64 // of 100 ticks, each time
		want   host
	}{
		{time.Hour, []float64{0}, host{rounds: 1}},
		{time.Hour, []float64{2}, host{rounds: 1}},
		{time.Hour, []float64{3, 50, 1}, host{rounds: 1, again: 2}},
		{0, []float64{50}, host{rounds: 1, stolen: 1}},
	} {
		var now ticks
		h := host{left: tt.left, read: func() ticks { return now }}
		n := 0
		h.round(context.Background(), func(again bool) {
			if again != (n > 0) {
				t.Errorf("%v: time %d is again: %v", tt.stolen, n, again)
			}
			now.all += 100
			now.stolen += tt.stolen[n]
			n++
		})
		if n != len(tt.stolen) || h.rounds != tt.want.rounds || h.again != tt.want.again || h.stolen != tt.want.stolen {
			t.Errorf("%v: measured %d times, got %v", tt.stolen, n, &h)
		}
	}
}
