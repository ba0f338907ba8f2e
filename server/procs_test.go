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
func uncontended(time.Time) bool { return false }

// While calls take long the runtime's monitor is kept awake, so that many block at a time on
// few processors; after that it is not.
func TestProcessors(t *testing.T) {
	const threads, conns, procs = 8, 4, 2
	t.Cleanup(func() { runtime.GOMAXPROCS(runtime.GOMAXPROCS(procs)) })
	runtime.GOMAXPROCS(procs)
	h := newHooked()
	var under, most atomic.Int64
	h.before = func(_ *backend.Call, cb backend.Callback, _ uint64) error {
		if cb == backend.Pread {
			n := under.Add(1)
			for m := most.Load(); n > m && !most.CompareAndSwap(m, n); m = most.Load() {
			}
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
	eventually(t, s, func(st Stats) bool {
		return s.processors.napping.Load() && most.Load() >= conns*threads*3/4
	})
	if n := runtime.GOMAXPROCS(0); n != procs {
		t.Errorf("%d processors, need the %d there were", n, procs)
	}
	stop.Store(true)
	clients.Wait()
	eventually(t, s, func(Stats) bool { return !s.processors.napping.Load() })
}
