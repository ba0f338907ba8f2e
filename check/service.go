package check

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"nbdhost/backend"
	"nbdhost/client"
	"nbdhost/protocol"
	"nbdhost/server"
)

// A service is the server in this process, and where it listens.
type service struct {
	*server.Server
	dir, path string // of the Unix socket
	serving   chan error
}

// serve starts the server, once.
func (s *Subject) serve() (*service, error) {
	if s.service != nil {
		return s.service, nil
	}
	dir, err := os.MkdirTemp("", "nbdhost-check")
	if err != nil {
		return nil, fmt.Errorf("serve plugin: %w", err)
	}
	v := &service{dir: dir, path: filepath.Join(dir, "socket"), serving: make(chan error, 1)}
	l, err := net.Listen("unix", v.path)
	if err != nil {
		os.RemoveAll(dir)
		return nil, fmt.Errorf("serve plugin: %w", err)
	}
	v.Server = server.New(server.Options{
		Chain: s.chain, ReadOnly: !s.Writes, Log: s.Log, DrainTimeout: 10 * time.Second,
		SparseReads: server.SparseNever, // what is read is the plugin's, not made from its extents
	})
	go func() { v.serving <- v.Serve(l) }()
	s.service = v
	return v, nil
}

// end stops the server. It fails where a call does not return.
func (v *service) end() error {
	defer os.RemoveAll(v.dir)
	v.Shutdown()
	<-v.serving // what it has to say of the socket is no news of the plugin
	if !v.Wait() {
		return errors.New("a call into the plugin has not returned after its connection was cut")
	}
	return nil
}

func (s *Subject) stop() error {
	if !s.started {
		return skipf("the plugin was not started")
	}
	if s.stuck != nil {
		return s.stuck
	}
	s.Stop()
	return nil
}

// patience is how long a handshake may take before it counts as hanging.
const patience = 30 * time.Second

// A conn is a client's connection, with what the checks do to it.
type conn struct {
	*client.Conn
	unit   uint64        // reads and writes are multiples of it
	served chan struct{} // closed when the server is through with it; nil if nobody can tell
}

// dial connects over a socket pair. The caller closes what it gets.
func (s *Subject) dial() (*conn, error) {
	v, err := s.serve()
	if err != nil {
		return nil, err
	}
	here, there, err := socketPair()
	if err != nil {
		return nil, err
	}
	served := make(chan struct{})
	go func() {
		defer close(served)
		v.ServeConn(there)
	}()
	c, err := s.negotiate(here)
	if err != nil {
		<-served
		return nil, err
	}
	c.served = served
	return c, nil
}

// end ends a connection in order, and returns when the plugin has closed its handle,
// so that the next one does not meet it.
func (c *conn) end() error {
	err := c.Disconnect()
	c.Close()
	if c.served != nil {
		<-c.served
	}
	if err != nil {
		return fmt.Errorf("disconnect: %w", err)
	}
	return nil
}

// dialSocket connects over the Unix socket.
func (s *Subject) dialSocket() (*conn, error) {
	v, err := s.serve()
	if err != nil {
		return nil, err
	}
	nc, err := net.Dial("unix", v.path)
	if err != nil {
		return nil, err
	}
	return s.negotiate(nc)
}

func (s *Subject) negotiate(nc net.Conn) (*conn, error) {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	c, err := client.New(ctx, nc, nil)
	if err != nil {
		return nil, fmt.Errorf("connect: %w", err)
	}
	return &conn{Conn: c, unit: max(1, uint64(c.BlockSize().Minimum))}, nil
}

func socketPair() (here, there net.Conn, err error) {
	fds, err := syscall.Socketpair(syscall.AF_UNIX, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, fmt.Errorf("make socket pair: %w", err)
	}
	var ends [2]net.Conn
	for i, fd := range fds {
		f := os.NewFile(uintptr(fd), "socket pair")
		end, e := net.FileConn(f)
		f.Close()
		ends[i], err = end, errors.Join(err, e)
	}
	return ends[0], ends[1], err
}

// with calls f with a connection, and ends it.
func (s *Subject) with(f func(*conn) error) error {
	c, err := s.dial()
	if err != nil {
		return err
	}
	err = f(c)
	if e := c.end(); err == nil {
		err = e
	}
	return err
}

// several tells whether the plugin serves several connections at a time. One that
// serializes connections does not, and others may refuse a second client.
func (s *Subject) several() bool {
	if s.chain.ThreadModel() == backend.SerializeConnections {
		return false
	}
	return s.with(func(*conn) error {
		return s.with(func(*conn) error { return nil })
	}) == nil
}

// usable is the size without what the minimum block size makes unreachable.
func (c *conn) usable() uint64 { return c.Size() / c.unit * c.unit }

// has tells whether the export has all the flags.
func (c *conn) has(flags protocol.ExportFlags) bool { return c.Flags()&flags == flags }

// maximum is the longest read or write, in bytes.
func (c *conn) maximum() uint64 {
	if m := uint64(c.BlockSize().Maximum); m > 0 {
		return min(m, protocol.MaxRequestLength) / c.unit * c.unit
	}
	return protocol.MaxRequestLength / 2 // NBD specification: what any server takes
}

func (c *conn) read(off, n uint64) ([]byte, error) {
	p := make([]byte, n)
	if err := c.Pread(p, off); err != nil {
		return nil, fmt.Errorf("read of %d bytes at %d: %w", n, off, err)
	}
	return p, nil
}
