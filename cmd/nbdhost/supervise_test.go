package main

import (
	"testing"
	"time"
)

func TestBackoff(t *testing.T) {
	now := time.Now()
	var b backoff
	for i, step := range []struct {
		ready time.Time
		want  time.Duration
	}{
		{time.Time{}, 100 * time.Millisecond}, // it never served
		{now, 200 * time.Millisecond},         // it crashed at once
		{now, 400 * time.Millisecond},
		{now, 800 * time.Millisecond},
		{now, 1600 * time.Millisecond},
		{now, 3200 * time.Millisecond},
		{now, 5 * time.Second},
		{now, 5 * time.Second},
		{now.Add(-steady), 100 * time.Millisecond}, // it ran well
		{time.Time{}, 200 * time.Millisecond},
	} {
		if got := b.next(step.ready); got != step.want {
			t.Errorf("step %d: got %v, want %v", i, got, step.want)
		}
	}
}
