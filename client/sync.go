package client

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"time"

	"nbdhost/protocol"
)

// Calls are the commands that wait for their reply. They must not be called from a
// completion. Conn has them all, to wait as long as the server needs; Conn.With
// gives them with a context that ends the waiting.
type Calls struct {
	c   *Conn
	ctx context.Context
}

// With gives the commands that wait for their reply no longer than ctx. One that is
// given up fails with the context's cause, as if by AioCancel: its buffer is the
// caller's again, and the connection goes on.
func (c *Conn) With(ctx context.Context) Calls { return Calls{c, ctx} }

// waiters are for use again.
var waiters = sync.Pool{New: func() any {
	w := &waiter{done: make(chan error, 1)}
	w.completion = func(err error) int { w.done <- err; return 1 }
	return w
}}

// waiter waits for one completion.
type waiter struct {
	done       chan error
	completion Completion
}

// wait issues a command and waits for its completion.
func (s Calls) wait(issue func(Completion) (uint64, error)) error {
	if err := s.ctx.Err(); err != nil {
		return context.Cause(s.ctx)
	}
	w := waiters.Get().(*waiter)
	defer waiters.Put(w)
	cookie, err := issue(w.completion)
	if err != nil {
		return err
	}
	select {
	case err := <-w.done:
		return err
	case <-s.ctx.Done():
		s.c.AioCancel(cookie, context.Cause(s.ctx))
		return <-w.done
	}
}

// patience is how long Disconnect waits for a server that has nothing left to do but
// to close the connection.
const patience = 5 * time.Second

// Disconnect sends NBD_CMD_DISC after what is queued, and waits until the server has
// answered what is in flight and closed the connection; a server that does not close
// it is not waited for long. It returns an error if the connection ended in another
// way, or the context's cause. No command can be issued any more, and nothing is in
// flight.
func (s Calls) Disconnect() error {
	c := s.c
	c.mu.Lock()
	if c.err == nil && !c.leaving {
		c.leaving = true
		c.enqueue(&command{request: protocol.Request{Type: protocol.CmdDisc}, sent: true, queued: true})
		c.kick()
	} else {
		c.mu.Unlock()
	}
	select {
	case <-c.ended:
	case <-c.drained:
	case <-s.ctx.Done():
	}
	select {
	case <-c.drained: // the context's end loses nothing any more, were it first or not
		timer := time.NewTimer(patience)
		defer timer.Stop()
		select {
		case <-c.ended:
		case <-s.ctx.Done():
		case <-timer.C:
		}
		c.fail(errGone)
	case <-c.ended:
	default:
		c.fail(fmt.Errorf("%w: disconnect: %w", ErrDisconnected, context.Cause(s.ctx)))
	}
	<-c.ended
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.err == errGone {
		return nil
	}
	return c.err
}

// Pread reads len(p) bytes at off into p, with one command: a server refuses one of
// more bytes than it takes, or closes the connection. BlockSize().Maximum bytes are safe,
// and 32 MiB where that is 0, which means unknown.
func (s Calls) Pread(p []byte, off uint64) error {
	return s.wait(func(done Completion) (uint64, error) { return s.c.AioPread(p, off, 0, done) })
}

// PreadStructured is Pread that tells chunk, in the order in which they come, what
// each part of the reply has brought.
func (s Calls) PreadStructured(p []byte, off uint64, flags protocol.CommandFlags, chunk ChunkFunc) error {
	return s.wait(func(done Completion) (uint64, error) { return s.c.AioPreadStructured(p, off, flags, chunk, done) })
}

// Pwrite writes p at off, with one command. For the length see Pread.
func (s Calls) Pwrite(p []byte, off uint64, flags protocol.CommandFlags) error {
	return s.wait(func(done Completion) (uint64, error) { return s.c.AioPwrite(p, off, flags, done) })
}

// Flush makes what was written durable.
func (s Calls) Flush() error {
	return s.wait(func(done Completion) (uint64, error) { return s.c.AioFlush(0, done) })
}

// Trim discards count bytes at off. 4 GiB and more fail unless Conn.Extended.
func (s Calls) Trim(count, off uint64, flags protocol.CommandFlags) error {
	return s.wait(func(done Completion) (uint64, error) { return s.c.AioTrim(count, off, flags, done) })
}

// Zero writes count zeroes at off. 4 GiB and more fail unless Conn.Extended.
func (s Calls) Zero(count, off uint64, flags protocol.CommandFlags) error {
	return s.wait(func(done Completion) (uint64, error) { return s.c.AioZero(count, off, flags, done) })
}

// Cache prefetches count bytes at off into the server's cache. 4 GiB and more fail
// unless Conn.Extended.
func (s Calls) Cache(count, off uint64, flags protocol.CommandFlags) error {
	return s.wait(func(done Completion) (uint64, error) { return s.c.AioCache(count, off, flags, done) })
}

// BlockStatus gives, for each selected meta context, consecutive runs from off
// on. They may end before off+count, and the last may reach beyond it. A count of 4 GiB
// and more fails unless Conn.Extended.
func (s Calls) BlockStatus(count, off uint64, flags protocol.CommandFlags) (map[string][]protocol.Descriptor, error) {
	return s.collect(func(extents ExtentFunc, done Completion) (uint64, error) {
		return s.c.AioBlockStatus(count, off, flags, extents, done)
	})
}

// BlockStatusOf is BlockStatus for some of the selected meta contexts only.
func (s Calls) BlockStatusOf(contexts []string, count, off uint64, flags protocol.CommandFlags) (map[string][]protocol.Descriptor, error) {
	return s.collect(func(extents ExtentFunc, done Completion) (uint64, error) {
		return s.c.AioBlockStatusOf(contexts, count, off, flags, extents, done)
	})
}

// collect waits for a block status and keeps what it says.
func (s Calls) collect(issue func(ExtentFunc, Completion) (uint64, error)) (map[string][]protocol.Descriptor, error) {
	statuses := make(map[string][]protocol.Descriptor)
	err := s.wait(func(done Completion) (uint64, error) {
		return issue(func(context string, _ uint64, runs []protocol.Descriptor) {
			statuses[context] = slices.Clone(runs)
		}, done)
	})
	if err != nil {
		return nil, err
	}
	return statuses, nil
}
