package client

import (
	"slices"

	"nbdhost/protocol"
)

// wait issues a command and waits for its completion. It must not be called
// from one.
func wait(issue func(Completion) (uint64, error)) error {
	done := make(chan error, 1)
	if _, err := issue(func(err error) int { done <- err; return 1 }); err != nil {
		return err
	}
	return <-done
}

// Pread reads len(p) bytes at off into p.
func (c *Conn) Pread(p []byte, off uint64) error {
	return wait(func(done Completion) (uint64, error) { return c.AioPread(p, off, 0, done) })
}

// Pwrite writes p at off.
func (c *Conn) Pwrite(p []byte, off uint64, flags protocol.CommandFlags) error {
	return wait(func(done Completion) (uint64, error) { return c.AioPwrite(p, off, flags, done) })
}

// Flush makes what was written durable.
func (c *Conn) Flush() error {
	return wait(func(done Completion) (uint64, error) { return c.AioFlush(0, done) })
}

// Trim discards count bytes at off.
func (c *Conn) Trim(count, off uint64, flags protocol.CommandFlags) error {
	return wait(func(done Completion) (uint64, error) { return c.AioTrim(count, off, flags, done) })
}

// Zero writes count zeroes at off.
func (c *Conn) Zero(count, off uint64, flags protocol.CommandFlags) error {
	return wait(func(done Completion) (uint64, error) { return c.AioZero(count, off, flags, done) })
}

// Cache prefetches count bytes at off into the server's cache.
func (c *Conn) Cache(count, off uint64, flags protocol.CommandFlags) error {
	return wait(func(done Completion) (uint64, error) { return c.AioCache(count, off, flags, done) })
}

// BlockStatus gives, for each selected meta context, consecutive runs from off
// on. They may end before off+count, and the last may reach beyond it.
func (c *Conn) BlockStatus(count, off uint64, flags protocol.CommandFlags) (map[string][]protocol.Descriptor, error) {
	return collect(func(extents ExtentFunc, done Completion) (uint64, error) {
		return c.AioBlockStatus(count, off, flags, extents, done)
	})
}

// BlockStatusOf is BlockStatus for some of the selected meta contexts only.
func (c *Conn) BlockStatusOf(contexts []string, count, off uint64, flags protocol.CommandFlags) (map[string][]protocol.Descriptor, error) {
	return collect(func(extents ExtentFunc, done Completion) (uint64, error) {
		return c.AioBlockStatusOf(contexts, count, off, flags, extents, done)
	})
}

// collect waits for a block status and keeps what it says.
func collect(issue func(ExtentFunc, Completion) (uint64, error)) (map[string][]protocol.Descriptor, error) {
	statuses := make(map[string][]protocol.Descriptor)
	err := wait(func(done Completion) (uint64, error) {
		return issue(func(context string, _ uint64, runs []protocol.Descriptor) {
			statuses[context] = slices.Clone(runs)
		}, done)
	})
	if err != nil {
		return nil, err
	}
	return statuses, nil
}
