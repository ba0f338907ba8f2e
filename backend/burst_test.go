package backend

import (
	"errors"
	"strings"
	"syscall"
	"testing"
)

// A burst makes its calls in order until one fails or it is stopped, counts them, and is
// there only where nothing else is to be done for a request.
func TestBurst(t *testing.T) {
	const read, write = "pread 4@0", "pwrite 4@8 zeroes"
	add := func(b *Burst, calls string) {
		for _, call := range calls {
			off := map[rune]uint64{'r': 0, 'w': 8}[call]
			b.Add(call == 'w', make([]byte, 4), off, 1)
		}
	}
	for _, tt := range []struct {
		what, calls string
		r           *recorder
		stop        bool
		done        int
		errno       syscall.Errno
	}{
		{"one", "r", newRecorder(Pwrite), false, 1, 0},
		{"several", "rwwr", newRecorder(Pwrite), false, 4, 0},
		{"as many as there may be", strings.Repeat("rw", MaxBurst/2), newRecorder(Pwrite), false, MaxBurst, 0},
		{"one fails", "rrwrw", newRecorder(Pwrite).failing(Pwrite, syscall.EIO), false, 3, syscall.EIO},
		{"all fail", "rrr", newRecorder().failing(Pread, syscall.EIO), false, 1, syscall.EIO},
		{"stopped before it began", "rww", newRecorder(Pwrite), true, 1, 0},
	} {
		t.Run(tt.what, func(t *testing.T) {
			s, c := open(t, tt.r, false)
			if s.NewBurst(c) != nil {
				t.Fatal("a burst before the session knows its size")
			}
			if _, err := s.Caps(c); err != nil {
				t.Fatal(err)
			}
			b := s.NewBurst(c)
			if b == nil || b.Writable() != tt.r.has[Pwrite] {
				t.Fatalf("got %+v", b)
			}
			tt.r.take()
			for range 2 { // it is used again
				add(b, tt.calls)
				if tt.stop {
					for range 2 {
						if n := b.Stop(); n != 1 {
							t.Errorf("%d calls have begun, need 1", n)
						}
					}
				}
				done, err := b.Run(c)
				if done != tt.done || tt.errno == 0 && err != nil || tt.errno != 0 && !errors.Is(err, tt.errno) {
					t.Errorf("got %d, %v, need %d, %v", done, err, tt.done, tt.errno)
				}
				want := strings.NewReplacer("r", ", "+read, "w", ", "+write).Replace(tt.calls[:tt.done])
				if got := tt.r.take(); got != want[2:] {
					t.Errorf("got %s\nneed %s", got, want[2:])
				}
				b.Stop() // does nothing now
			}
			s.chain.Calls()[0].Each(func(cb Callback, n uint64) {
				name := map[Callback]string{Pread: "r", Pwrite: "w"}[cb]
				if want := 2 * strings.Count(tt.calls[:tt.done], name); name != "" && n != uint64(want) {
					t.Errorf("%v: counted %d calls, need %d", cb, n, want)
				}
			})
		})
	}
}

// Reads and writes go through the session where that does more than call the module.
func TestNoBurst(t *testing.T) {
	s, c := open(t, newRecorder(writable...), true)
	if _, err := s.Caps(c); err != nil {
		t.Fatal(err)
	}
	if b := s.NewBurst(c); b == nil || b.Writable() {
		t.Errorf("read only: got %+v", b)
	}
	s.layer.passes[Pread] = true
	defer func() { s.layer.passes[Pread] = false }()
	if b := s.NewBurst(c); b != nil {
		t.Error("a burst of a filter without .pread")
	}
}
