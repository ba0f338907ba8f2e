package check

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"sort"

	"nbdhost/protocol"
)

// An extent is a run of the map.
type extent struct {
	span
	flags uint64
}

// maxExtents is how many extents of a map are looked at; askSize is how many bytes
// one request asks about.
const (
	maxExtents = 10_000
	askSize    = 1 << 30
)

const allocation = protocol.ContextBaseAllocation

// mapped walks through the map of the export.
func (c *conn) mapped() ([]extent, error) {
	if !c.HasContext(allocation) {
		return nil, skipf("the server offers no %s", allocation)
	}
	var list []extent
	for off, size := uint64(0), c.usable(); off < size && len(list) < maxExtents; {
		n := min(askSize, size-off)
		answer, err := c.BlockStatus(n, off, 0)
		if err != nil {
			return nil, fmt.Errorf("block status of %d bytes at %d: %w", n, off, err)
		}
		if len(answer[allocation]) == 0 {
			return nil, fmt.Errorf("block status of %d bytes at %d: no extent", n, off)
		}
		for _, d := range answer[allocation] {
			if d.Length == 0 || d.Length > c.Size()-off {
				return nil, fmt.Errorf("block status: got an extent of %d bytes at %d, in %d bytes", d.Length, off, c.Size())
			}
			list = append(list, extent{span{off, d.Length}, d.Flags})
			off += d.Length
		}
	}
	return list, nil
}

// withMap calls f where there is a map.
func (s *Subject) withMap(f func(*conn, []extent) error) error {
	return s.with(func(c *conn) error {
		list, err := c.mapped()
		if err != nil {
			return skipf("there is no map: %v", err)
		}
		if len(list) == 0 {
			return skipf("the export is empty")
		}
		return f(c, list)
	})
}

func (s *Subject) extentsMap() error {
	return s.with(func(c *conn) error {
		list, err := c.mapped()
		s.notef("%s", several(len(list), "extent"))
		return err
	})
}

// zeroed looks at the ends and the middle of an extent that is called zero.
func (c *conn) zeroed(e extent) error {
	if e.flags&protocol.StateZero == 0 {
		return nil
	}
	last := e.off + e.n
	piece := min(e.n, 64<<10, c.maximum())
	for _, off := range []uint64{e.off, e.off + e.n/2, last - piece} {
		off = off / c.unit * c.unit
		n := min(piece, last-off) / c.unit * c.unit
		data, err := c.read(off, n)
		if err != nil {
			continue // which is read.range's
		}
		for i, b := range data {
			if b != 0 {
				return fmt.Errorf("the extent of %d bytes at %d is called zero, but byte %d is %#02x", e.n, e.off, off+uint64(i), b)
			}
		}
	}
	return nil
}

func (s *Subject) extentsZero() error {
	return s.withMap(func(c *conn, list []extent) error {
		looked := 0
		for _, e := range list {
			if e.flags&protocol.StateZero == 0 {
				continue
			}
			if looked++; looked > 500 {
				break
			}
			if err := c.zeroed(e); err != nil {
				return err
			}
		}
		s.notef("%s called zero looked at", several(looked, "extent"))
		return nil
	})
}

func (s *Subject) extentsOne() error {
	return s.withMap(func(c *conn, list []extent) error {
		random := rand.New(rand.NewPCG(4, 5))
		end := list[len(list)-1].off + list[len(list)-1].n
		for i := range 64 {
			off := random.Uint64N(end) / c.unit * c.unit
			if i < len(list) && i < 16 {
				off = list[i].off
			}
			k := sort.Search(len(list), func(k int) bool { return list[k].off+list[k].n > off })
			n := min(list[k].off+list[k].n-off, askSize)
			answer, err := c.BlockStatus(n, off, protocol.CmdFlagReqOne)
			if err != nil {
				return fmt.Errorf("block status of one extent at %d: %w", off, err)
			}
			one := answer[allocation]
			if len(one) != 1 {
				return fmt.Errorf("block status of one extent at %d: got %d", off, len(one))
			}
			// The answer may be finer than the map, and differ from it.
			e := extent{span{off, min(one[0].Length, n)}, one[0].Flags}
			if err := c.zeroed(e); err != nil {
				return fmt.Errorf("asked for one extent at %d: %w", off, err)
			}
		}
		return nil
	})
}

func (s *Subject) cacheData() error {
	return s.with(func(c *conn) error {
		if !c.has(protocol.FlagSendCache) {
			return skipf("the plugin has no cache")
		}
		spans := c.spans()
		spans = spans[:min(8, len(spans))]
		before := c.readAll(spans)
		for _, x := range spans {
			if err := c.Cache(x.n, x.off, 0); err != nil {
				return fmt.Errorf("cache of %d bytes at %d: %w", x.n, x.off, err)
			}
		}
		for i, again := range c.readAll(spans) {
			if where := differ(spans[i].off, before[i], again); where != "" {
				return errors.New("after cache " + where)
			}
		}
		return nil
	})
}
