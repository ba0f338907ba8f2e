package server

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"

	"golang.org/x/sys/unix"

	"nbdhost/backend"
)

// probeSize is how much a probe reads, in bytes, where the module's blocks are no larger.
const probeSize = 4096

// Probe finds out whether the chain answers: in a connection of its own, that no limit
// concerns, it opens the export as for a client, reads the first block and closes it.
// It returns when that is done or ctx has ended. Calls that have not returned by then
// go on, and until they do Probe fails at once. Where the thread model allows one
// connection at a time and somebody has it, there is nothing that could be tried, and
// no error.
func (s *Server) Probe(ctx context.Context, export string) error {
	if !s.probing.CompareAndSwap(false, true) {
		return fmt.Errorf("read through the plugin: the last one has not returned from %v", s.probeStep.Load())
	}
	done := make(chan error, 1)
	c, client, err := s.admitProbe()
	if err != nil {
		s.probing.Store(false)
		return fmt.Errorf("read through the plugin: %w", err)
	}
	go func() {
		err := c.probe(export)
		unix.Close(client)
		s.probing.Store(false)
		done <- err
	}()
	select {
	case err = <-done:
	case <-ctx.Done():
		err = fmt.Errorf("%v has not returned in time", s.probeStep.Load())
		c.disconnect(true) // ends nbdkit_nanosleep, at least
	}
	if err != nil {
		return fmt.Errorf("read through the plugin: %w", err)
	}
	return nil
}

// admitProbe makes a connection that modules cannot tell from a client's on a Unix socket,
// and its other end.
func (s *Server) admitProbe() (c *conn, client int, err error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, -1, os.NewSyscallError("socketpair", err)
	}
	f := os.NewFile(uintptr(fds[0]), "probe")
	defer f.Close()
	nc, err := net.FileConn(f)
	if err == nil {
		if c = s.admit(nc, true); c == nil {
			err = errors.New("the server is shutting down")
		}
	}
	if err != nil {
		unix.Close(fds[1])
		return nil, -1, err
	}
	return c, fds[1], nil
}

// probe makes the calls.
func (c *conn) probe(export string) error {
	defer c.s.pin()()
	defer c.s.forget(c)
	defer c.close()
	step := func(cb backend.Callback) { c.s.probeStep.Store(cb) }
	step(backend.Preconnect)
	if c.lane = c.s.gate.TryConnect(); c.lane == nil {
		return nil
	}
	defer c.lane.Leave()
	defer c.peer.Release()
	c.peer.TLS = c.s.opts.TLSRequired
	if err := c.preconnect(); err != nil {
		return err
	}
	step(backend.Open)
	caps, err := c.openSession(export)
	if err != nil {
		return err
	}
	defer func() {
		step(backend.Close)
		c.closeSession()
	}()
	step(backend.BlockSizes)
	c.lane.Lock()
	defer c.lane.Unlock()
	block, err := c.session.BlockSize(&c.call)
	if err != nil {
		return err
	}
	n := min(max(probeSize, uint64(block.Min)), caps.Size)
	if n == 0 {
		return nil
	}
	buf, err := backend.GetBuffer(int(n))
	if err != nil {
		return err
	}
	defer buf.Release()
	step(backend.Pread)
	return c.session.Pread(&c.call, buf.B[:n], 0)
}
