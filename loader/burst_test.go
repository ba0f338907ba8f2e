package loader

import (
	"bytes"
	"errors"
	"fmt"
	"runtime"
	"syscall"
	"testing"

	"nbdhost/backend"
)

// Calls of a burst are made in one crossing, and say, count, fail and stop as others do.
func TestBurst(t *testing.T) {
	for _, tt := range []struct {
		what      string
		options   []string
		crossings int64
	}{
		{"plugin", nil, 1},
		{"plugin of API version 1", []string{"-DAPI=1"}, burstCalls}, // cannot
		{"plugin on the main thread", []string{ruby}, 4},
	} {
		t.Run(tt.what, func(t *testing.T) {
			ch, _ := serve(t, tt.options)
			testBurst(t, ch, tt.crossings)
		})
	}
	t.Run("filters", func(t *testing.T) {
		forward := compile(t, "forward.c")
		testBurst(t, filtered(t, openFilter(t, forward), openFilter(t, forward)), 1)
	})
}

const burstCalls = 8

func testBurst(t *testing.T, ch *backend.Chain, crossings int64) {
	const n, size = burstCalls, 512
	c := connect(t)
	s := prepared(t, ch, c)
	defer func() { s.Finalize(c); s.Close(c) }()
	buf, err := backend.GetBuffer(n * size)
	if err != nil {
		t.Fatal(err)
	}
	defer buf.Release()
	part := func(i int) []byte { return buf.B[i*size : (i+1)*size] }
	b := s.NewBurst(c)
	if b == nil || !b.Writable() {
		t.Fatalf("got %+v", b)
	}
	// alternate adds a write at each even place, and a read of what it wrote behind it.
	alternate := func() {
		for i := range n {
			b.Add(i%2 == 0, part(i), uint64(i/2*size), uint64(100+i))
		}
	}
	fill := func() {
		for i := range n {
			for j := range part(i) {
				part(i)[j] = byte((1 - i%2) * (i + j + 1))
			}
		}
	}
	run := func(want int) error {
		t.Helper()
		done, err := b.Run(c)
		if done != want {
			t.Errorf("%d calls were made, need %d", done, want)
		}
		return err
	}
	fill()
	alternate()
	if err := run(n); err != nil { // filters are direct from here on
		t.Fatal(err)
	}
	for i := 0; i < n; i += 2 {
		if !bytes.Equal(part(i), part(i+1)) {
			t.Errorf("read %d gave %x, need %x", i+1, part(i + 1)[:4], part(i)[:4])
		}
	}

	const rounds = 50
	before := runtime.NumCgoCall()
	for range rounds {
		alternate()
		if err := run(n); err != nil {
			t.Fatal(err)
		}
	}
	if got := (runtime.NumCgoCall() - before) / rounds; got != crossings {
		t.Errorf("%d crossings, need %d", got, crossings)
	}
	for _, m := range ch.Calls() {
		m.Each(func(cb backend.Callback, calls uint64) {
			if want := uint64((rounds + 1) * n / 2); (cb == backend.Pread || cb == backend.Pwrite) && calls != want {
				t.Errorf("%v of %s: counted %d calls, need %d", cb, m.Module, calls, want)
			}
		})
	}
	if allocs := testing.AllocsPerRun(100, func() { alternate(); run(n) }); allocs != 0 && crossings == 1 {
		t.Errorf("%v allocations, need none", allocs)
	}

	logged()
	config := func(key, value string) {
		if err := ch.Config(key, value); err != nil {
			t.Fatal(err)
		}
	}
	config("set", fmt.Sprint(int(syscall.ENOSPC)))
	for at, cb := range []backend.Callback{backend.Pwrite, backend.Pread} {
		config("fail", cb.String())
		alternate()
		err := run(at + 1)
		_, log := logged()
		var alone error
		if cb == backend.Pwrite {
			alone = s.Pwrite(c, part(0), 0, 0)
		} else {
			alone = s.Pread(c, part(0), 0)
		}
		if _, want := logged(); !errors.Is(err, syscall.ENOSPC) || err.Error() != alone.Error() || log != want {
			t.Errorf("got %v, logged %q: need %v, %q", err, log, alone, want)
		}
		config("fail", "")
	}

	fill()
	alternate()
	if n := b.Stop(); n != 1 {
		t.Errorf("%d calls have begun, need 1", n)
	}
	if err := run(1); err != nil {
		t.Error(err)
	}
	if !bytes.Equal(part(1), make([]byte, size)) {
		t.Error("a call was made after the burst was stopped")
	}
	// A call stops it, as nbdkit_disconnect does.
	config("shutdown", "1")
	shutdown = func() { b.Stop() }
	defer func() { shutdown = func() {} }()
	alternate()
	if err := run(2); err != nil {
		t.Error(err)
	}
}

// A filter is given what is below it at the time of each call.
func TestBurstClosesNext(t *testing.T) {
	const isNothing, nothing = 4096, 5632 // see filter.c
	ch := filtered(t, openFilter(t, compile(t, "filter.c", "-pthread")))
	c := connect(t)
	s := prepared(t, ch, c)
	buf := make([]byte, 512)
	b := s.NewBurst(c)
	for _, off := range []uint64{isNothing, nothing, isNothing, isNothing} {
		b.Add(false, buf, off, 1)
	}
	if done, err := b.Run(c); done != 3 || !errors.Is(err, syscall.ENOTCONN) {
		t.Errorf("got %d, %v: need the third to have nothing below", done, err)
	}
	s.Finalize(c)
	s.Close(c)
}
