package server

import (
	"testing"
	"time"
)

func TestLineLimit(t *testing.T) {
	var l lineLimit
	now := time.Now()
	take := func(n int) (taken, lost int) {
		for range n {
			ok, before := l.take(now)
			if ok {
				taken++
			}
			lost += before
		}
		return taken, lost
	}
	if taken, lost := take(25); taken != maxLines || lost != 0 {
		t.Errorf("got %d lines, %d lost, want %d and none", taken, lost, maxLines)
	}
	now = now.Add(time.Second)
	if taken, lost := take(1); taken != 1 || lost != 15 {
		t.Errorf("a second later: got %d lines, %d lost, want 1 and 15", taken, lost)
	}
	now = now.Add(time.Minute)
	if taken, lost := take(1); taken != 1 || lost != 0 {
		t.Errorf("a minute later: got %d lines, %d lost, want 1 and none", taken, lost)
	}
}
