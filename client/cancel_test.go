package client

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"testing"
	"time"

	"nbdhost/protocol"
)

// ways are how a Conn can be made of a connection: on a socket, on a blocking one,
// and on something else.
var ways = map[string]func(nc net.Conn, opts Options) (*Conn, error){
	"socket": func(nc net.Conn, opts Options) (*Conn, error) { return New(context.Background(), nc, &opts) },
	"blocking": func(nc net.Conn, opts Options) (*Conn, error) {
		opts.Blocking = true
		return New(context.Background(), nc, &opts)
	},
	"stream": func(nc net.Conn, opts Options) (*Conn, error) {
		return New(context.Background(), struct{ net.Conn }{nc}, &opts)
	},
}

// withEach runs a test each way.
func withEach(t *testing.T, test func(t *testing.T, way func(net.Conn, Options) (*Conn, error))) {
	for name, way := range ways {
		t.Run(name, func(t *testing.T) { test(t, way) })
	}
}

// request takes a request and its data.
func request(t *testing.T, nc net.Conn) (protocol.Request, []byte) {
	t.Helper()
	b := make([]byte, protocol.RequestSize)
	if _, err := io.ReadFull(nc, b); err != nil {
		t.Error(err)
	}
	var r protocol.Request
	if err := r.Decode(b); err != nil {
		t.Error(err)
	}
	data := make([]byte, r.PayloadLength(false))
	if _, err := io.ReadFull(nc, data); err != nil {
		t.Error(err)
	}
	return r, data
}

func answered(r protocol.Request) []byte {
	return (&protocol.SimpleReply{Cookie: r.Cookie}).AppendTo(nil)
}

var errEnough = errors.New("enough")

// cancelled issues and cancels a command once ready is closed, and looks at its
// completion.
func cancelled(t *testing.T, c *Conn, ready <-chan struct{}, issue func(Completion) (uint64, error)) {
	t.Helper()
	var told []error
	cookie, err := issue(func(err error) int { told = append(told, err); return 0 })
	if err != nil {
		t.Fatal(err)
	}
	if ready != nil {
		<-ready
	}
	if !c.AioCancel(cookie, errEnough) || c.AioCancel(cookie, errEnough) {
		t.Error("the first AioCancel must return true, and the second false")
	}
	if len(told) != 1 || told[0] != errEnough {
		t.Errorf("the completion was told %v", told)
	}
	if done, err := c.AioCommandCompleted(cookie); !done || err != errEnough {
		t.Errorf("asked for the result: got %v, %v", done, err)
	}
	if done, err := c.AioCommandCompleted(cookie); done || err == nil {
		t.Errorf("asked again: got %v, %v", done, err)
	}
}

// known wants nothing to be known but, perhaps, the command that completed last.
func (c *Conn) known(t *testing.T) {
	t.Helper()
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.used > 1 || c.pending != 0 || c.owed != 0 || c.due != 0 {
		t.Errorf("%d commands are known, %d pending; %d bytes owed, %d due", c.used, c.pending, c.owed, c.due)
	}
}

// TestCancelRead: a read is given up before and amid its reply. What comes of it
// later is dropped, and touches the caller's buffer no more.
func TestCancelRead(t *testing.T) {
	const size = 4 << 20 // more than all buffers between the two hold
	for _, amid := range []int{0, 4, size / 2} {
		for _, structured := range []bool{false, true} {
			t.Run(fmt.Sprintf("after %d bytes, structured %v", amid, structured), func(t *testing.T) {
				withEach(t, func(t *testing.T, way func(net.Conn, Options) (*Conn, error)) {
					ready, gone := make(chan struct{}), make(chan struct{})
					nc := script(t, func(nc net.Conn) {
						r := welcome(t, nc)
						reply := append(answered(r), bytes.Repeat([]byte("r"), size)...)
						if structured {
							reply = chunk(r.Cookie, done, protocol.ReplyOffsetData, append((&protocol.OffsetData{}).AppendTo(nil), make([]byte, size)...))
						}
						head := len(reply) - size
						nc.Write(reply[:head*min(1, amid)+amid]) // returns when the client has taken most
						close(ready)
						<-gone
						nc.Write(reply[head*min(1, amid)+amid:])
						flush, _ := request(t, nc)
						nc.Write(answered(flush))
					})
					c, err := way(nc, Options{SimpleReplies: !structured})
					if err != nil {
						t.Fatal(err)
					}
					defer c.Close()
					p := make([]byte, size)
					cancelled(t, c, ready, func(done Completion) (uint64, error) {
						return c.AioPreadStructured(p, 0, 0, func(Chunk) error {
							t.Error("the chunk was told of after the end")
							return nil
						}, done)
					})
					for i := range p {
						p[i] = 'x'
					}
					close(gone)
					if err := c.Flush(); err != nil {
						t.Error(err)
					}
					if i := bytes.IndexFunc(p, func(r rune) bool { return r != 'x' }); i >= 0 {
						t.Errorf("byte %d was written to after the end", i)
					}
					c.known(t)
				})
			})
		}
	}
}

// TestCancelWrite: a write that is on its way arrives as it was, and one that has not
// begun is never sent.
func TestCancelWrite(t *testing.T) {
	withEach(t, func(t *testing.T, way func(net.Conn, Options) (*Conn, error)) {
		const size = 4 << 20
		begun, gone := make(chan struct{}), make(chan struct{})
		nc := script(t, func(nc net.Conn) {
			r := welcome(t, nc)
			if r.Length != size {
				t.Errorf("got a request of %d bytes, need %d", r.Length, size)
			}
			close(begun)
			<-gone
			data := make([]byte, size)
			io.ReadFull(nc, data)
			if !bytes.Equal(data, bytes.Repeat([]byte("w"), size)) {
				t.Error("got other data than was to be written")
			}
			nc.Write(answered(r))
			last, _ := request(t, nc)
			if last.Type != protocol.CmdFlush {
				t.Errorf("got %v, need nothing before the flush", last.Type)
			}
			nc.Write(answered(last))
			if rest, _ := io.ReadAll(nc); len(rest) > 0 {
				t.Errorf("got %d bytes behind the flush, need none", len(rest))
			}
		})
		c, err := way(nc, Options{SimpleReplies: true})
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		p := bytes.Repeat([]byte("w"), size)
		cancelled(t, c, begun, func(done Completion) (uint64, error) { return c.AioPwrite(p, 0, 0, done) })
		clear(p)
		cancelled(t, c, nil, func(done Completion) (uint64, error) { return c.AioPwrite(p[:512], 0, 0, done) })
		close(gone)
		if err := c.Flush(); err != nil {
			t.Error(err)
		}
		c.known(t)
	})
}

// TestWith: a context ends the waiting for one command, and the others go on.
func TestWith(t *testing.T) {
	withEach(t, func(t *testing.T, way func(net.Conn, Options) (*Conn, error)) {
		ctx, cancel := context.WithCancelCause(context.Background())
		other := make(chan protocol.Request, 1)
		nc := script(t, func(nc net.Conn) {
			r := welcome(t, nc)
			cancel(errEnough)
			next, _ := request(t, nc)
			other <- next
			nc.Write(answered(next)) // the later one first
			nc.Write(append(answered(r), "abcd"...))
			last, _ := request(t, nc)
			nc.Write(append(answered(last), "efgh"...))
		})
		c, err := way(nc, Options{SimpleReplies: true})
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		p := []byte("xxxx")
		if err := c.With(ctx).Pread(p, 0); err != errEnough || string(p) != "xxxx" {
			t.Errorf("got %q, %v", p, err)
		}
		if err := c.With(ctx).Flush(); err != errEnough {
			t.Errorf("with a context that has ended: got %v", err)
		}
		if err := c.With(t.Context()).Flush(); err != nil || (<-other).Type != protocol.CmdFlush {
			t.Error(err)
		}
		if err := c.Pread(p, 0); err != nil || string(p) != "efgh" {
			t.Errorf("got %q, %v", p, err)
		}
	})
}

// TestCancelAnytime: commands are cancelled while they are being sent and answered (with -race).
func TestCancelAnytime(t *testing.T) {
	nc := script(t, func(nc net.Conn) {
		r := welcome(t, nc)
		for {
			if _, err := io.CopyN(io.Discard, nc, int64(r.PayloadLength(false))); err != nil {
				return
			}
			var reply []byte
			for from := uint64(0); r.Type == protocol.CmdRead && from < r.Length; from += 4096 {
				h := protocol.ChunkHeader{Cookie: r.Cookie, Type: protocol.ReplyOffsetData, Length: protocol.OffsetDataSize + 4096}
				o := protocol.OffsetData{Offset: r.Offset + from}
				reply = append(o.AppendTo(h.AppendTo(reply)), make([]byte, 4096)...)
			}
			h := protocol.ChunkHeader{Cookie: r.Cookie, Type: protocol.ReplyNone, Flags: protocol.ReplyFlagDone}
			if _, err := nc.Write(h.AppendTo(reply)); err != nil {
				return
			}
			b := make([]byte, protocol.RequestSize)
			if _, err := io.ReadFull(nc, b); err != nil || r.Decode(b) != nil {
				return
			}
		}
	})
	c, err := New(t.Context(), nc, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	var callers sync.WaitGroup
	for caller := range 6 {
		callers.Go(func() {
			p := make([]byte, 64<<10)
			for n := range 1500 {
				ctx, cancel := context.WithTimeout(t.Context(), time.Duration(50+n%20*50)*time.Microsecond)
				switch caller % 3 {
				case 0:
					c.With(ctx).Pread(p, 0)
				case 1:
					c.With(ctx).PreadStructured(p, 0, 0, func(Chunk) error { return nil })
				case 2:
					c.With(ctx).Pwrite(p, 0, 0)
				}
				cancel()
			}
		})
	}
	callers.Wait()
	if err := c.Flush(); err != nil {
		t.Error(err)
	}
}

// TestDisconnectEnds: a server that does not close the connection, or does not
// answer, holds Disconnect up no longer than its context.
func TestDisconnectEnds(t *testing.T) {
	for _, busy := range []bool{false, true} {
		t.Run(fmt.Sprintf("busy %v", busy), func(t *testing.T) {
			withEach(t, func(t *testing.T, way func(net.Conn, Options) (*Conn, error)) {
				ctx, cancel := context.WithCancelCause(context.Background())
				ended, conn := make(chan struct{}), make(chan *Conn, 1)
				nc := script(t, func(nc net.Conn) {
					r := welcome(t, nc)
					if busy {
						r, _ = request(t, nc)
					}
					if r.Type != protocol.CmdDisc {
						t.Errorf("got %v", r.Type)
					}
					if !busy {
						<-(<-conn).drained // the server may have read it before the client knows that it is sent
					}
					cancel(errEnough)
					<-ended
				})
				c, err := way(nc, Options{SimpleReplies: true})
				if err != nil {
					t.Fatal(err)
				}
				conn <- c
				told := make(chan error, 1)
				if busy {
					if _, err := c.AioFlush(0, func(err error) int { told <- err; return 1 }); err != nil {
						t.Fatal(err)
					}
				}
				err = c.With(ctx).Disconnect()
				close(ended)
				if !busy && err != nil {
					t.Errorf("nothing was in flight: got %v", err)
				}
				if busy && (!errors.Is(err, errEnough) || !errors.Is(<-told, ErrDisconnected)) {
					t.Errorf("a flush was in flight: got %v", err)
				}
			})
		})
	}
}
