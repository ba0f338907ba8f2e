package server

import (
	"context"
	"fmt"
	"log/slog"
	"math"
	"sync"
	"time"

	"nbdhost/protocol"
)

// attributes are what log lines about the request under way carry.
func (t *task) attributes() []slog.Attr {
	return append(make([]slog.Attr, 0, 8),
		slog.String("command", t.req.Type.String()), slog.Uint64("cookie", t.req.Cookie),
		slog.Uint64("offset", t.req.Offset), slog.Uint64("length", t.req.Length))
}

// begin takes the time if the request may turn out to be slow.
func (t *task) begin() {
	if t.c.s.opts.SlowRequest > 0 {
		t.began = time.Now()
	}
}

// reportMemory logs that there is none for the request, which fails with t.err.
func (t *task) reportMemory() {
	t.call.Log.LogAttrs(context.Background(), slog.LevelError,
		fmt.Sprintf("memory for %v of %d bytes: %v", t.req.Type, t.req.Length, t.err), t.attributes()...)
}

// report logs that the request has failed with err, if it has, and that it was slow.
func (t *task) report(err error) {
	log := t.call.Log
	if err != nil && log.Enabled(context.Background(), slog.LevelInfo) {
		errno := protocol.ErrnoFor(err, t.req.Flags)
		log.LogAttrs(context.Background(), slog.LevelInfo, "request failed: "+err.Error(),
			append(t.attributes(), slog.String("errno", errno.String()), slog.String("module", moduleOf(err)))...)
	}
	limit := t.c.s.opts.SlowRequest
	if limit <= 0 || t.began.IsZero() {
		return
	}
	d := time.Since(t.began)
	t.began = time.Time{} // the next request may be refused without a call
	if d <= limit {
		return
	}
	ok, lost := t.c.s.slowLines.take(time.Now())
	if !ok {
		return
	}
	ms := math.Round(float64(d)/float64(time.Millisecond/10)) / 10
	text := fmt.Sprintf("slow request: %v took %v ms (connection %d, cookie %d, offset %d, length %d)",
		t.req.Type, ms, t.c.id, t.req.Cookie, t.req.Offset, t.req.Length)
	attrs := append(t.attributes(), slog.Float64("ms", ms), slog.String("module", t.c.s.opts.Chain.Name()))
	if lost > 0 {
		text += fmt.Sprintf("; %d more were not logged", lost)
		attrs = append(attrs, slog.Int("unlogged", lost))
	}
	log.LogAttrs(context.Background(), slog.LevelWarn, text, attrs...)
}

// maxLines is how many lines a second a lineLimit lets through.
const maxLines = 10

// A lineLimit keeps a log from being flooded.
type lineLimit struct {
	mu    sync.Mutex
	since time.Time // when the second under way began
	taken int       // in that second
	lost  int       // since a line was let through
}

// take tells whether there may be a line, and how many were refused before it.
func (l *lineLimit) take(now time.Time) (ok bool, lost int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if now.Sub(l.since) >= time.Second {
		l.since, l.taken = now, 0
	}
	if l.taken == maxLines {
		l.lost++
		return false, 0
	}
	l.taken++
	lost, l.lost = l.lost, 0
	return true, lost
}
