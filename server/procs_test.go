package server

import (
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"nbdhost/backend"
)

// uncontended is for tests that other programs' work must not change.
func uncontended(time.Time) bool { return false }

// While calls block there are processors for seven in eight of them, in steps, but no more
// than may be, and after that as many as before.
func TestProcessors(t *testing.T) {
	const threads, before = 8, 4
	t.Cleanup(func() { runtime.GOMAXPROCS(runtime.GOMAXPROCS(before)) })
	runtime.GOMAXPROCS(before)
	for _, tt := range []struct{ most, conns, want int }{
		{0, 2, before}, {60, 2, 16}, {60, 4, 32}, {20, 4, 20},
	} {
		h := newHooked()
		h.before = func(_ *backend.Call, cb backend.Callback, _ uint64) error {
			if cb == backend.Pread {
				time.Sleep(2 * longCall)
			}
			return nil
		}
		s, uri, _ := serve(t, h, Options{Threads: threads, MaxProcs: tt.most, contended: uncontended})
		var stop atomic.Bool
		var clients sync.WaitGroup
		var reads atomic.Int64
		for range tt.conns {
			c := dial(t, uri, nil)
			for range threads {
				clients.Go(func() {
					for p := make([]byte, 512); !stop.Load(); reads.Add(1) {
						if err := c.Pread(p, 0); err != nil {
							t.Error(err)
							return
						}
					}
				})
			}
		}
		eventually(t, s, func(st Stats) bool {
			return st.Workers == tt.conns*threads && runtime.GOMAXPROCS(0) == tt.want
		})
		for enough := reads.Load() + 1000; reads.Load() < enough; runtime.Gosched() {
			if n := runtime.GOMAXPROCS(0); n != tt.want {
				t.Fatalf("%d processors, need %d", n, tt.want)
			}
		}
		stop.Store(true)
		clients.Wait()
		eventually(t, s, func(Stats) bool { return runtime.GOMAXPROCS(0) == before })
	}
}
