package main

import (
	"testing"
	"time"

	"nbdhost/protocol"
	"nbdhost/server"
)

// stats are of a server that has answered so many reads of 1 MiB.
func stats(connections, inFlight int, reads uint64) server.Stats {
	return server.Stats{Connections: connections, InFlight: inFlight, Exports: []server.ExportStats{
		{Commands: []server.CommandStats{{Command: protocol.CmdRead, Operations: reads, Bytes: reads << 20}}},
	}}
}

func TestPulse(t *testing.T) {
	var p pulse
	now := time.Now()
	for i, step := range []struct {
		after time.Duration
		s     server.Stats
		want  bool
	}{
		{0, stats(0, 0, 0), true},
		{time.Hour, stats(0, 0, 0), true}, // nobody wants anything
		{time.Hour, stats(1, 1, 5), true}, // it makes progress
		{5 * time.Second, stats(1, 1, 5), true},
		{4 * time.Second, stats(1, 3, 5), true},
		{1 * time.Second, stats(1, 3, 5), false}, // ten seconds without an answer
		{time.Hour, stats(1, 3, 5), false},
		{time.Second, stats(1, 2, 6), true},
		{9 * time.Second, stats(1, 2, 6), true},
		{time.Second, stats(0, 0, 6), true}, // the client went away
	} {
		now = now.Add(step.after)
		if got := p.alive(step.s, now, 10*time.Second); got != step.want {
			t.Errorf("step %d: got %v, want %v", i, got, step.want)
		}
	}
}

func TestStatusText(t *testing.T) {
	for _, tt := range []struct {
		from, to server.Stats
		want     string
	}{
		{stats(0, 0, 0), stats(0, 0, 0), "serving 0 clients"},
		{stats(0, 0, 0), stats(1, 0, 0), "serving 1 client, 0 requests/s, 0.0 MiB/s"},
		{stats(1, 0, 10), stats(12, 3, 1010), "serving 12 clients, 500 requests/s, 500.0 MiB/s"},
		{stats(1, 0, 10), stats(0, 0, 11), "serving 0 clients, 0 requests/s, 0.5 MiB/s"},
	} {
		if got := statusText(tt.from, tt.to, 2*time.Second); got != tt.want {
			t.Errorf("got %q, want %q", got, tt.want)
		}
	}
}
