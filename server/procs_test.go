package server

import (
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"nbdhost/backend"
)

// uncontended is for tests that other programs' work must not change.
func uncontended(time.Duration) bool { return false }

// While calls take long the runtime's monitor is kept awake, so that many block at a time on
// few processors; after that it is not.
func TestProcessors(t *testing.T) {
	const threads, conns, procs = 8, 4, 2
	t.Cleanup(func() { runtime.GOMAXPROCS(runtime.GOMAXPROCS(procs)) })
	runtime.GOMAXPROCS(procs)
	h := newHooked()
	var under atomic.Int64
	h.before = func(_ *backend.Call, cb backend.Callback, _ uint64) error {
		if cb == backend.Pread {
			under.Add(1)
			d := unix.NsecToTimespec(int64(time.Millisecond))
			_ = unix.Nanosleep(&d, nil) // as a module blocks, which time.Sleep does not
			under.Add(-1)
		}
		return nil
	}
	s, uri, _ := serve(t, h, Options{Threads: threads, MaxProcs: 60, contended: uncontended})
	var stop atomic.Bool
	var clients sync.WaitGroup
	for range conns {
		c := dial(t, uri, nil)
		for range threads {
			clients.Go(func() {
				for p := make([]byte, 512); !stop.Load(); {
					if err := c.Pread(p, 0); err != nil {
						t.Error(err)
						return
					}
				}
			})
		}
	}
	await(t, "many calls block, and the monitor is kept awake", func() bool {
		return s.processors.napping.Load() && under.Load() >= 4*procs
	})
	if n := runtime.GOMAXPROCS(0); n != procs {
		t.Errorf("%d processors, need the %d there were", n, procs)
	}
	stop.Store(true)
	clients.Wait()
	await(t, "the monitor may sleep", func() bool { return !s.processors.napping.Load() })
}

// For two hot sockets there are three processors, in steps, but no more than may be, and after
// that as many as before.
func TestProcessorsKept(t *testing.T) {
	const before = 4
	t.Cleanup(func() { runtime.GOMAXPROCS(runtime.GOMAXPROCS(before)) })
	runtime.GOMAXPROCS(before)
	for _, tt := range []struct {
		hot        int32
		most, want int
	}{{16, 0, before}, {2, 60, before}, {8, 60, 16}, {16, 60, 24}, {16, 20, 20}} {
		var p processors
		for range 2 {
			p.keep(tt.hot, tt.most)
			if n := runtime.GOMAXPROCS(0); n != tt.want {
				t.Errorf("%d hot sockets, at most %d: got %d processors, need %d", tt.hot, tt.most, n, tt.want)
			}
		}
		await(t, "the processors are set back", func() bool { return runtime.GOMAXPROCS(0) == before })
	}
}
