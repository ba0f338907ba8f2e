package check

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"syscall"

	"nbdhost/protocol"
)

// windowSize is how much of the export the checks write to at a time, in bytes.
const windowSize = 512 << 10

// window calls f with a range that may be written to and what it holds, and puts
// back afterwards what it held. Where not even a plain write reads back it says so
// in the place of f; that is write.data's to report.
func (s *Subject) window(needs protocol.ExportFlags, atEnd bool, f func(c *conn, w span, old []byte) error) error {
	return s.scratch(needs, atEnd, func(c *conn, w span, old []byte) error {
		probe := span{w.off, min(w.n, max(c.unit, 4096))}
		data := noise(probe.n, 7)
		if err := c.write(probe.off, data, 0); err != nil {
			return skipf("nothing can be written: %v", err)
		}
		if err := c.expect(probe, data, "after a write"); err != nil {
			return skipf("what is written does not read back: %v", err)
		}
		if err := c.write(probe.off, old[:probe.n], 0); err != nil {
			return skipf("nothing can be written: %v", err)
		}
		return f(c, w, old)
	})
}

// scratch is window without the probe.
func (s *Subject) scratch(needs protocol.ExportFlags, atEnd bool, f func(c *conn, w span, old []byte) error) error {
	var w span
	var old []byte
	err := s.with(func(c *conn) error {
		if c.has(protocol.FlagReadOnly) {
			return skipf("the export is read-only")
		}
		if !c.has(needs) {
			return skipf("the export has no %v", needs&^c.Flags())
		}
		size := c.usable()
		w = span{0, min(windowSize, size)}
		if w.n == 0 {
			return skipf("the export is empty")
		}
		w.off = (size - w.n) / 2 / (64 << 10) * (64 << 10)
		if atEnd {
			w.n = min(w.n, 64<<10)
			w.off = size - w.n
		}
		data, err := c.readLong(w, w.n)
		if err != nil {
			return skipf("%v", err)
		}
		old = data
		return f(c, w, old)
	})
	if old != nil {
		s.restore(w, old)
	}
	return err
}

// restore writes back what a check has overwritten. Where that fails the check has
// failed before.
func (s *Subject) restore(w span, old []byte) {
	err := s.with(func(c *conn) error {
		err := c.write(w.off, old, 0)
		if err == nil && c.has(protocol.FlagSendFlush) {
			err = c.Flush()
		}
		return err
	})
	if err != nil {
		s.notef("could not write back the %d bytes at %d: %v", w.n, w.off, err)
	}
}

// readLong reads w in pieces of at most most bytes.
func (c *conn) readLong(w span, most uint64) ([]byte, error) {
	var data []byte
	for n := uint64(0); n < w.n; {
		step := min(most, c.maximum(), w.n-n)
		part, err := c.read(w.off+n, step)
		if err != nil {
			return nil, err
		}
		data, n = append(data, part...), n+step
	}
	return data, nil
}

// write writes what may be more than one request can.
func (c *conn) write(off uint64, p []byte, flags protocol.CommandFlags) error {
	for len(p) > 0 {
		n := min(uint64(len(p)), c.maximum())
		if err := c.Pwrite(p[:n], off, flags); err != nil {
			return fmt.Errorf("write of %d bytes at %d: %w", n, off, err)
		}
		p, off = p[n:], off+n
	}
	return nil
}

// noise is n bytes none of which is zero.
func noise(n, seed uint64) []byte {
	random := rand.New(rand.NewPCG(seed, 6))
	p := make([]byte, n)
	for i := range p {
		p[i] = byte(1 + random.Uint32N(255))
	}
	return p
}

// expect reads the window and wants data in it.
func (c *conn) expect(w span, data []byte, when string) error {
	got, err := c.readLong(w, w.n)
	if err != nil {
		return fmt.Errorf("%s: %w", when, err)
	}
	if where := differ(w.off, data, got); where != "" {
		return fmt.Errorf("%s %s", when, where)
	}
	return nil
}

// odd are ranges of a window that are not aligned, as far as the block size lets them.
func (c *conn) odd(w span) []span {
	var list []span
	for _, p := range []span{{1, 1}, {511, 2}, {4095, 4098}, {20001, 70003}, {100_000, 65536}, {w.n - 1, 1}} {
		p.off, p.n = p.off/c.unit*c.unit, (p.n+c.unit-1)/c.unit*c.unit
		if p.off < w.n && p.n <= w.n-p.off {
			list = append(list, p)
		}
	}
	return list
}

func (s *Subject) writeData() error {
	return s.scratch(0, false, func(c *conn, w span, _ []byte) error {
		model := noise(w.n, 1)
		if err := c.write(w.off, model, 0); err != nil {
			return err
		}
		if err := c.expect(w, model, "after a write"); err != nil {
			return err
		}
		for i, p := range c.odd(w) {
			data := noise(p.n, uint64(i+2))
			if err := c.write(w.off+p.off, data, 0); err != nil {
				return err
			}
			copy(model[p.off:], data)
			if err := c.expect(w, model, fmt.Sprintf("after a write of %d bytes at %d", p.n, w.off+p.off)); err != nil {
				return err
			}
		}
		return nil
	})
}

func (s *Subject) writeEnd() error {
	return s.window(0, true, func(c *conn, w span, model []byte) error {
		model = bytes.Clone(model)
		for _, n := range []uint64{4096, 512, 1} {
			n = min((n+c.unit-1)/c.unit*c.unit, w.n)
			data := noise(n, n)
			if err := c.write(w.off+w.n-n, data, 0); err != nil {
				return err
			}
			copy(model[w.n-n:], data)
			if err := c.expect(w, model, fmt.Sprintf("after a write of the last %d bytes", n)); err != nil {
				return err
			}
		}
		return nil
	})
}

func (s *Subject) writeParallel() error {
	return s.window(0, false, func(c *conn, w span, _ []byte) error {
		model := noise(w.n, 8)
		step := max(c.unit, 4096)
		var mu sync.Mutex
		var failed error
		var all sync.WaitGroup
		places := make(chan struct{}, inFlight)
		for off := uint64(0); off < w.n; off += step {
			places <- struct{}{}
			all.Add(1)
			_, err := c.AioPwrite(model[off:min(off+step, w.n)], w.off+off, 0, func(err error) int {
				mu.Lock()
				if failed == nil {
					failed = err
				}
				mu.Unlock()
				<-places
				all.Done()
				return 1
			})
			if err != nil {
				all.Done()
				return err
			}
		}
		all.Wait()
		if failed != nil {
			return fmt.Errorf("write in parallel: %w", failed)
		}
		return c.expect(w, model, "after writes in parallel")
	})
}

// kept ends c, and wants the next connection to read data.
func (s *Subject) kept(c *conn, w span, data []byte, when string) error {
	if err := c.end(); err != nil {
		return err
	}
	return s.with(func(c *conn) error { return c.expect(w, data, when) })
}

func (s *Subject) writeFUA() error {
	return s.window(protocol.FlagSendFUA, false, func(c *conn, w span, _ []byte) error {
		data := noise(w.n, 9)
		if err := c.write(w.off, data, protocol.CmdFlagFUA); err != nil {
			return err
		}
		return s.kept(c, w, data, "on the connection after a write with FUA")
	})
}

func (s *Subject) flushData() error {
	return s.window(protocol.FlagSendFlush, false, func(c *conn, w span, _ []byte) error {
		data := noise(w.n, 10)
		if err := c.write(w.off, data, 0); err != nil {
			return err
		}
		if err := c.Flush(); err != nil {
			return fmt.Errorf("flush: %w", err)
		}
		return s.kept(c, w, data, "on the connection after a flush")
	})
}

func (s *Subject) multiConn() error {
	return s.window(protocol.FlagCanMultiConn|protocol.FlagSendFlush, false, func(a *conn, w span, _ []byte) error {
		b, err := s.dial()
		if err != nil {
			return fmt.Errorf("open a second connection: %w", err)
		}
		defer b.end()
		if _, err := b.readLong(w, w.n); err != nil { // what it may keep
			return err
		}
		data := noise(w.n, 11)
		if err := a.write(w.off, data, 0); err != nil {
			return err
		}
		if err := a.Flush(); err != nil {
			return fmt.Errorf("flush: %w", err)
		}
		return b.expect(w, data, "on another connection, after a write and a flush on the first,")
	})
}

// inner is a part of a window, and what should be in the window if that is zero.
func inner(c *conn, w span, data []byte) (span, []byte) {
	from, to := w.n/4, w.n/4*3
	from, to = (from+c.unit)/c.unit*c.unit, to/c.unit*c.unit
	if c.unit == 1 && w.n > 64 {
		from, to = from+3, to-5
	}
	if to <= from {
		from, to = 0, w.n
	}
	zeroed := bytes.Clone(data)
	clear(zeroed[from:to])
	return span{w.off + from, to - from}, zeroed
}

func (s *Subject) trimNeighbours() error {
	return s.window(protocol.FlagSendTrim, false, func(c *conn, w span, _ []byte) error {
		data := noise(w.n, 12)
		if err := c.write(w.off, data, 0); err != nil {
			return err
		}
		p, _ := inner(c, w, data)
		if err := c.Trim(p.n, p.off, 0); err != nil {
			return fmt.Errorf("trim of %d bytes at %d: %w", p.n, p.off, err)
		}
		got, err := c.readLong(w, w.n)
		if err != nil {
			return fmt.Errorf("after a trim: %w", err)
		}
		// What was trimmed may hold anything.
		copy(got[p.off-w.off:], data[p.off-w.off:p.off-w.off+p.n])
		if where := differ(w.off, data, got); where != "" {
			return fmt.Errorf("after a trim of %d bytes at %d %s", p.n, p.off, where)
		}
		return nil
	})
}

func (s *Subject) zeroData() error {
	return s.window(protocol.FlagSendWriteZeroes, false, func(c *conn, w span, _ []byte) error {
		data := noise(w.n, 13)
		for _, flags := range []protocol.CommandFlags{0, protocol.CmdFlagNoHole} {
			if err := c.write(w.off, data, 0); err != nil {
				return err
			}
			p, zeroed := inner(c, w, data)
			if err := c.Zero(p.n, p.off, flags); err != nil {
				return fmt.Errorf("zero of %d bytes at %d, flags %v: %w", p.n, p.off, flags, err)
			}
			if err := c.expect(w, zeroed, fmt.Sprintf("after a zero of %d bytes at %d, flags %v,", p.n, p.off, flags)); err != nil {
				return err
			}
		}
		return nil
	})
}

func (s *Subject) zeroNoHole() error {
	return s.window(protocol.FlagSendWriteZeroes, false, func(c *conn, w span, _ []byte) error {
		if !c.HasContext(allocation) {
			return skipf("there is no map to see holes in")
		}
		if err := c.write(w.off, noise(w.n, 14), 0); err != nil {
			return err
		}
		if err := c.Zero(w.n, w.off, protocol.CmdFlagNoHole); err != nil {
			return fmt.Errorf("zero: %w", err)
		}
		for off := w.off; off < w.off+w.n; {
			answer, err := c.BlockStatus(w.off+w.n-off, off, 0)
			if err != nil {
				return skipf("there is no map: %v", err)
			}
			for _, d := range answer[allocation] {
				if d.Flags&protocol.StateHole != 0 {
					return fmt.Errorf("after a zero of %d bytes at %d without permission to make a hole there is one of %d bytes at %d", w.n, w.off, d.Length, off)
				}
				off += d.Length
			}
			if len(answer[allocation]) == 0 {
				return skipf("the map has a gap")
			}
		}
		return nil
	})
}

func (s *Subject) zeroFast() error {
	return s.window(protocol.FlagSendFastZero, false, func(c *conn, w span, _ []byte) error {
		data := noise(w.n, 15)
		if err := c.write(w.off, data, 0); err != nil {
			return err
		}
		p, zeroed := inner(c, w, data)
		err := c.Zero(p.n, p.off, protocol.CmdFlagFastZero)
		switch {
		case errors.Is(err, syscall.ENOTSUP):
			return c.expect(w, data, "after a fast zero that failed")
		case err != nil:
			return fmt.Errorf("fast zero of %d bytes at %d: %w: need success or ENOTSUP", p.n, p.off, err)
		}
		return c.expect(w, zeroed, "after a fast zero")
	})
}
