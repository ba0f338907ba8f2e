package check

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"

	"nbdhost/protocol"
)

// A span is a range of the export.
type span struct{ off, n uint64 }

// spanSize is the length of a span in bytes, and wholeSize the size up to which an
// export is looked at as a whole rather than in samples.
const (
	spanSize  = 128 << 10
	wholeSize = 8 << 20
	samples   = 32
)

// spans are the parts of an export that are looked at: all of a small one, else the
// beginning, the end and places between, which are the same in every run.
func (c *conn) spans() []span {
	size := c.usable()
	step := min(uint64(spanSize), c.maximum())
	var list []span
	add := func(off uint64) {
		if off < size {
			list = append(list, span{off, min(step, size-off)})
		}
	}
	if size <= wholeSize {
		for off := uint64(0); off < size; off += step {
			add(off)
		}
		return list
	}
	random := rand.New(rand.NewPCG(1, 2))
	add(0)
	add(step)
	for range samples {
		add(random.Uint64N(size/step) * step)
	}
	add((size - 1) / step * step)
	slices.SortFunc(list, func(a, b span) int {
		if a.off < b.off {
			return -1
		}
		return 1
	})
	return slices.Compact(list)
}

// readAll reads every span; what fails is nil.
func (c *conn) readAll(spans []span) [][]byte {
	data := make([][]byte, len(spans))
	for i, x := range spans {
		data[i], _ = c.read(x.off, x.n)
	}
	return data
}

// differ says where two readings of the bytes at off differ, or "".
func differ(off uint64, want, got []byte) string {
	if want == nil || got == nil || bytes.Equal(want, got) {
		return "" // a failure to read is another check's
	}
	for i := range want {
		if i >= len(got) || want[i] != got[i] {
			return fmt.Sprintf("byte %d is %#02x, and was %#02x", off+uint64(i), got[i], want[i])
		}
	}
	return ""
}

func (s *Subject) sizeStable() error {
	var first uint64
	for i := range 4 {
		err := s.with(func(c *conn) error {
			if i == 0 {
				first = c.Size()
			} else if c.Size() != first {
				return fmt.Errorf("connection %d sees %d bytes, the first one %d", i+1, c.Size(), first)
			}
			return nil
		})
		if err != nil {
			return err
		}
	}
	return nil
}

func (s *Subject) sizeBlocks() error {
	return s.with(func(c *conn) error {
		if c.BlockSize().Minimum == 0 {
			return skipf("the plugin has no block size")
		}
		if rest := c.Size() % c.unit; rest != 0 {
			return fmt.Errorf("%d bytes with blocks of %d: the last %d cannot be read", c.Size(), c.unit, rest)
		}
		return nil
	})
}

func (s *Subject) flagsStable() error {
	var first protocol.ExportFlags
	for i := range 4 {
		err := s.with(func(c *conn) error {
			if i == 0 {
				first = c.Flags()
			} else if c.Flags() != first {
				return fmt.Errorf("connection %d sees %v, the first one %v", i+1, c.Flags(), first)
			}
			return nil
		})
		if err != nil {
			return err
		}
	}
	return nil
}

func (s *Subject) readRange() error {
	return s.with(func(c *conn) error {
		spans := c.spans()
		var failed []error
		for _, x := range spans {
			if _, err := c.read(x.off, x.n); err != nil {
				failed = append(failed, err)
			}
		}
		s.notef("%s of %d bytes looked at", several(len(spans), "range"), spanSize)
		if len(failed) > 0 {
			return fmt.Errorf("%d of %d reads failed, first %w", len(failed), len(spans), failed[0])
		}
		return nil
	})
}

func (s *Subject) readRepeatable() error {
	return s.with(func(c *conn) error {
		spans := c.spans()
		first := c.readAll(spans)
		for i := range slices.Backward(spans) {
			again, err := c.read(spans[i].off, spans[i].n)
			if where := differ(spans[i].off, first[i], again); where != "" {
				return fmt.Errorf("read twice: %s", where)
			}
			if (err == nil) != (first[i] != nil) {
				return fmt.Errorf("%d bytes at %d can be read one time and not the other: %v", spans[i].n, spans[i].off, err)
			}
		}
		return nil
	})
}

// sharedSpans are those of both connections, should the sizes differ.
func sharedSpans(a, b *conn) []span {
	if a.Size() <= b.Size() {
		return a.spans()
	}
	return b.spans()
}

func (s *Subject) readConnections() error {
	compare := func(spans []span, a, b [][]byte) error {
		for i, x := range spans {
			if where := differ(x.off, a[i], b[i]); where != "" {
				return fmt.Errorf("on the second connection %s on the first", where)
			}
		}
		return nil
	}
	if !s.several() {
		var spans []span
		var first [][]byte
		err := s.with(func(a *conn) error { spans = a.spans(); first = a.readAll(spans); return nil })
		if err != nil {
			return err
		}
		return s.with(func(b *conn) error {
			spans := slices.DeleteFunc(slices.Clone(spans), func(x span) bool { return x.off+x.n > b.Size() })
			return compare(spans, first, b.readAll(spans))
		})
	}
	return s.with(func(a *conn) error {
		b, err := s.dialSocket()
		if err != nil {
			return err
		}
		defer b.end()
		spans := sharedSpans(a, b)
		return compare(spans, a.readAll(spans), b.readAll(spans))
	})
}

func (s *Subject) readAlignment() error {
	return s.with(func(c *conn) error {
		spans := c.spans()
		// The end of the export is read.end's business.
		spans = slices.DeleteFunc(spans, func(x span) bool { return x.n < spanSize || x.off+x.n == c.usable() })
		if len(spans) == 0 {
			return skipf("the export is too small")
		}
		for _, x := range []span{spans[0], spans[len(spans)/2], spans[len(spans)-1]} {
			whole, err := c.read(x.off, x.n)
			if err != nil {
				return skipf("it cannot be read: %v", err)
			}
			for _, p := range []span{{1, 1}, {511, 2}, {3, 4093}, {4095, 4098}, {65535, 3}, {7, x.n - 20}, {x.n - 2, 1}} {
				p.off, p.n = p.off/c.unit*c.unit, (p.n+c.unit-1)/c.unit*c.unit
				if p.off+p.n > x.n {
					continue
				}
				part, err := c.read(x.off+p.off, p.n)
				if err != nil {
					return err
				}
				if where := differ(x.off+p.off, whole[p.off:p.off+p.n], part); where != "" {
					return fmt.Errorf("read of %d bytes at %d: %s in a read of %d bytes at %d", p.n, x.off+p.off, where, x.n, x.off)
				}
			}
		}
		return nil
	})
}

func (s *Subject) readEnd() error {
	return s.with(func(c *conn) error {
		size := c.usable()
		if size == 0 {
			return skipf("the export is empty")
		}
		longest := min(size, 64<<10, c.maximum())
		tail, err := c.read(size-longest, longest)
		if err != nil {
			return err
		}
		for _, n := range []uint64{1, 2, 511, 512, 513, 4096} {
			n = (n + c.unit - 1) / c.unit * c.unit
			if n > longest {
				break
			}
			got, err := c.read(size-n, n)
			if err != nil {
				return err
			}
			if where := differ(size-n, tail[longest-n:], got); where != "" {
				return fmt.Errorf("in the last %d bytes %s in the last %d", n, where, longest)
			}
		}
		return nil
	})
}

func (s *Subject) readLimits() error {
	return s.with(func(c *conn) error {
		b := c.BlockSize()
		for _, n := range []uint64{c.unit, 512, 4096, uint64(b.Preferred), 1 << 20, c.maximum()} {
			n = (min(n, c.usable()) + c.unit - 1) / c.unit * c.unit
			if n == 0 || n > c.maximum() {
				continue
			}
			if _, err := c.read(0, n); err != nil {
				if _, short := c.readLong(span{0, n}, 64<<10); short == nil {
					return fmt.Errorf("%w, although shorter reads can read it", err)
				}
			}
		}
		return nil
	})
}

// inFlight is how many requests a check has on one connection at a time.
const inFlight = 64

func (s *Subject) readParallel() error {
	connections := 4
	if !s.several() {
		connections = 1
	}
	if _, err := s.serve(); err != nil {
		return err
	}
	results := make(chan error, connections)
	for seed := range uint64(connections) {
		go func() {
			results <- s.with(func(c *conn) error {
				spans := c.spans()
				want := c.readAll(spans)
				for i, again := range c.readAll(spans) {
					if differ(0, want[i], again) != "" {
						return skipf("not even one by one the same is read twice")
					}
				}
				return c.readShuffled(spans, want, seed)
			})
		}()
	}
	var first error // the first failure, else a reason to skip
	var skip skipped
	for range connections {
		if err := <-results; err != nil && (first == nil || errors.As(first, &skip)) {
			first = err
		}
	}
	return first
}

// readShuffled reads each span four times, in an order of its own, with many reads
// in flight, and compares with want.
func (c *conn) readShuffled(spans []span, want [][]byte, seed uint64) error {
	random := rand.New(rand.NewPCG(seed, 3))
	places := make(chan struct{}, inFlight)
	var mu sync.Mutex
	var failed error
	var all sync.WaitGroup
	for range 4 {
		for _, i := range random.Perm(len(spans)) {
			x, p := spans[i], make([]byte, spans[i].n)
			places <- struct{}{}
			all.Add(1)
			_, err := c.AioPread(p, x.off, 0, func(err error) int {
				if err != nil {
					p = nil
				}
				if where := differ(x.off, want[i], p); where != "" || err != nil && want[i] != nil {
					mu.Lock()
					failed = fmt.Errorf("read of %d bytes at %d in parallel: %s%s one by one", x.n, x.off, where, errorText(err))
					mu.Unlock()
				}
				<-places
				all.Done()
				return 1
			})
			if err != nil {
				all.Done()
				return err
			}
		}
	}
	all.Wait()
	return failed
}

func errorText(err error) string {
	if err == nil {
		return ""
	}
	return err.Error() + ", but not"
}
