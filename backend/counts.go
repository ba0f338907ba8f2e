package backend

import (
	"slices"
	"sync"
	"sync/atomic"
)

// dataCallbacks is how many callbacks are counted: those from Pread on.
const dataCallbacks = int(callbacks - Pread)

// callTotals counts the calls of a chain's modules. Each connection counts its own,
// by layer and callback, so that connections on several processors do not share a
// line of cache for it; here is what those that are gone have counted.
type callTotals struct {
	mu    sync.Mutex
	conns map[*Conn]struct{}
	past  []uint64
}

// enter makes c one of the connections that count.
func (ch *Chain) enter(c *Conn) {
	c.chain, c.counts = ch, make([]atomic.Uint64, len(ch.layers)*dataCallbacks)
	ch.counts.mu.Lock()
	defer ch.counts.mu.Unlock()
	if ch.counts.conns == nil {
		ch.counts.conns = map[*Conn]struct{}{}
		ch.counts.past = make([]uint64, len(c.counts))
	}
	ch.counts.conns[c] = struct{}{}
}

// leave ends what enter began.
func (ch *Chain) leave(c *Conn) {
	ch.counts.mu.Lock()
	defer ch.counts.mu.Unlock()
	delete(ch.counts.conns, c)
	for i := range c.counts {
		ch.counts.past[i] += c.counts[i].Load()
	}
	c.chain, c.counts = nil, nil
}

// count notes that a data callback of a layer is being called.
func (c *Conn) count(l *Layer, cb Callback) {
	if n := c.counter(l, cb); n != nil {
		n.Add(1)
	}
}

// counter counts the calls of a layer's data callback; nil where they are not counted.
func (c *Conn) counter(l *Layer, cb Callback) *atomic.Uint64 {
	if i := l.index*dataCallbacks + int(cb-Pread); i < len(c.counts) {
		return &c.counts[i]
	}
	return nil
}

// ModuleCalls is how often the data callbacks of one layer were called.
type ModuleCalls struct {
	Module string
	counts [dataCallbacks]uint64
}

// Each calls f for each of the module's data callbacks with how often it was called.
func (m *ModuleCalls) Each(f func(cb Callback, calls uint64)) {
	for i, n := range m.counts {
		f(Pread+Callback(i), n)
	}
}

// Calls tells what was called so far, the plugin first. What a filter has no callback
// for counts for the layer below it only.
func (ch *Chain) Calls() []ModuleCalls {
	ch.counts.mu.Lock()
	sum := slices.Clone(ch.counts.past)
	for c := range ch.counts.conns {
		for i := range c.counts {
			sum[i] += c.counts[i].Load()
		}
	}
	ch.counts.mu.Unlock()
	list := make([]ModuleCalls, len(ch.layers))
	for i, l := range ch.layers {
		list[i].Module = l.Name()
		copy(list[i].counts[:], sum[i*dataCallbacks:])
	}
	return list
}
