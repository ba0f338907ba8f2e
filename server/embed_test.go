package server

import (
	"io"
	"net"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"nbdhost/backend"
	"nbdhost/client"
)

// A wrapper is a connection that does more than the socket in it, and does not hide the socket.
type wrapper struct {
	*net.TCPConn
	got *atomic.Int64
}

func (w wrapper) Read(p []byte) (int, error) {
	n, err := w.TCPConn.Read(p)
	w.got.Add(int64(n))
	return n, err
}

// A strange listener cannot be the key of a map, asks the server when it is closed, and hands out
// wrappers.
type strange struct {
	net.Listener
	close func()
	got   *atomic.Int64
}

func (l strange) Close() error {
	l.close()
	return l.Listener.Close()
}

func (l strange) Accept() (net.Conn, error) {
	nc, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	return wrapper{nc.(*net.TCPConn), l.got}, nil
}

// All data goes through what the program has put around a socket, and the address is free when the server
// has ended.
func TestStrangeListener(t *testing.T) {
	address := "127.0.0.1:0"
	for range 20 {
		l, err := net.Listen("tcp", address)
		if err != nil {
			t.Fatal(err)
		}
		address = l.Addr().String()
		s := New(Options{Chain: backend.NewChain(backend.NewMem(1<<20), nil, backend.Trace{})})
		var got atomic.Int64
		go s.Serve(strange{l, func() { s.Stats() }, &got})
		c := dial(t, "nbd://"+address, nil)
		before := got.Load()
		const length = 64 << 10
		for range 2 * temperEvery {
			if err := c.Pwrite(make([]byte, length), 0, 0); err != nil {
				t.Fatal(err)
			}
		}
		if n := got.Load() - before; n < 2*temperEvery*length {
			t.Errorf("%d bytes went through the wrapper, need more than %d", n, 2*temperEvery*length)
		}
		c.Close()
		s.Shutdown()
		if !s.Wait() {
			t.Fatal("the server has not ended")
		}
	}
}

type nameless struct{ net.Conn }

func (nameless) RemoteAddr() net.Addr { return nil }

// Where the client has gone already, as far as the kernel goes, a connection has no peer.
func TestNoPeer(t *testing.T) {
	s := New(Options{Chain: backend.NewChain(backend.NewMem(1<<20), nil, backend.Trace{}), Limits: Limits{ConnectionsPerAddress: 1}})
	for range 2 {
		ours, theirs := net.Pipe()
		go s.ServeConn(nameless{theirs})
		c, err := client.New(t.Context(), ours, nil)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
	}
}

type numbered struct {
	*hooked
	ids chan uint64
}

func (n numbered) Open(c *backend.Call, readonly bool, export string) (backend.Handle, error) {
	n.ids <- c.Conn.ID
	return n.hooked.Open(c, readonly, export)
}

// Modules know connections by number, and not which server has them.
func TestConnIDs(t *testing.T) {
	ids := make(chan uint64, 2)
	for range cap(ids) {
		h := newHooked()
		_, uri, _ := serveBackend(t, numbered{h, ids}, h, Options{})
		dial(t, uri, nil)
	}
	if a, b := <-ids, <-ids; a == b {
		t.Errorf("connections of two servers have the number %d", a)
	}
}

// A listener goes on after what has happened to one connection, or will pass.
func TestPassing(t *testing.T) {
	for err, want := range map[error]bool{
		syscall.EMFILE: true, syscall.ENOBUFS: true, syscall.ENOMEM: true, syscall.ECONNABORTED: true,
		syscall.EPROTO: true, syscall.EPERM: true, syscall.EHOSTUNREACH: true,
		syscall.EBADF: false, syscall.EINVAL: false, net.ErrClosed: false, io.EOF: false,
		&net.OpError{Op: "read", Err: syscall.ENETDOWN}: false,
		&net.DNSError{IsTemporary: true}:                true,
	} {
		if _, ok := err.(*net.OpError); !ok {
			err = &net.OpError{Op: "accept", Err: err}
		}
		if got := passing(err); got != want {
			t.Errorf("%v: got %v", err, got)
		}
	}
}

// A stubborn one does not return from Close until it may.
type stubborn struct {
	net.Conn
	until chan struct{}
}

func (s stubborn) Close() error {
	<-s.until
	return s.Conn.Close()
}

// A program's connection that cannot be closed holds up nobody else, and the end only as long as it may.
func TestStubborn(t *testing.T) {
	s := New(Options{Chain: backend.NewChain(backend.NewMem(1<<20), nil, backend.Trace{}), DrainTimeout: time.Millisecond})
	until := make(chan struct{})
	var served sync.WaitGroup
	serve := func() net.Conn {
		ours, theirs := net.Pipe()
		served.Go(func() { s.ServeConn(stubborn{theirs, until}) })
		return ours
	}
	c, err := client.New(t.Context(), serve(), nil)
	if err != nil {
		t.Fatal(err)
	}
	s.Shutdown()
	late := serve()
	if s.Wait() {
		t.Error("the server has ended, with a connection that has not")
	}
	s.Stats() // needs what admit holds
	close(until)
	served.Wait()
	late.Close()
	c.Close()
}
