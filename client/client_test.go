package client

import (
	"bytes"
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"nbdhost/protocol"
)

// TestReadWrite does every command on real servers, with each way to negotiate.
func TestReadWrite(t *testing.T) {
	const size = 1 << 20
	image := func(t *testing.T) string {
		path := filepath.Join(t.TempDir(), "image")
		if err := os.WriteFile(path, nil, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Truncate(path, size); err != nil {
			t.Fatal(err)
		}
		return path
	}
	servers := map[string]func(*testing.T) string{
		"memory":   func(t *testing.T) string { return nbdkit(t, "memory", "1M") },
		"file":     func(t *testing.T) string { return nbdkit(t, "file", image(t)) },
		"qemu-nbd": func(t *testing.T) string { return serve(t, "qemu-nbd", "-t", "-f", "raw", "--discard=unmap", image(t)) },
	}
	options := map[string]*Options{
		"default":     nil,
		"simple":      {SimpleReplies: true},
		"no contexts": {MetaContexts: []string{}},
		"export name": {NoGo: true},
		"zeroes":      {NoGo: true, Decline: protocol.FlagNoZeroes},
		"not fixed":   {Decline: protocol.FlagFixedNewstyle},
		"blocking":    {Blocking: true},
	}
	for server, start := range servers {
		for option, opts := range options {
			t.Run(server+"/"+option, func(t *testing.T) {
				c := connect(t, start(t), opts)
				if c.Size() != size || c.Flags()&protocol.FlagHasFlags == 0 {
					t.Errorf("got size %d and flags %v", c.Size(), c.Flags())
				}
				want := make([]byte, 3*4096)
				for i := range want {
					want[i] = byte(rand.Uint32())
				}
				const at = 8192
				do := func(what string, err error) {
					t.Helper()
					if err != nil {
						t.Fatalf("%s: %v", what, err)
					}
				}
				do("write", c.Pwrite(want, at, 0))
				do("flush", c.Flush())
				do("zero", c.Zero(4096, at+4096, protocol.CmdFlagNoHole))
				clear(want[4096:8192])
				got := make([]byte, len(want))
				do("read", c.Pread(got, at))
				if !bytes.Equal(got, want) {
					t.Error("read other bytes than were written")
				}
				do("write with FUA", c.Pwrite([]byte("x"), 1, protocol.CmdFlagFUA))
				if c.Flags()&protocol.FlagSendCache != 0 {
					do("cache", c.Cache(4096, at, 0))
				}
				do("trim", c.Trim(4096, at, 0))
				statuses, err := c.BlockStatus(size, 0, 0)
				if !c.HasContext(protocol.ContextBaseAllocation) {
					var refused *Error
					if !errors.As(err, &refused) || refused.Errno != protocol.EINVAL {
						t.Errorf("block status without a context: got %v, %v", statuses, err)
					}
				} else {
					do("block status", err)
					var sum uint64
					for _, d := range statuses[protocol.ContextBaseAllocation] {
						sum += d.Length
					}
					if len(statuses) != 1 || sum != size {
						t.Errorf("block status: got %v", statuses)
					}
				}
				err = c.Pread(got, size)
				var refused *Error
				if !errors.As(err, &refused) || !errors.Is(err, syscall.EINVAL) || refused.Command != protocol.CmdRead {
					t.Errorf("read past the end: got %v", err)
				}
				do("disconnect", c.Disconnect())
				if err := c.Flush(); !errors.Is(err, ErrDisconnected) {
					t.Errorf("flush after disconnect: got %v", err)
				}
			})
		}
	}
}

func TestInfo(t *testing.T) {
	args := []string{
		"eval", "get_size=echo 65536", "pread=exit 1",
		"list_exports=echo INTERLEAVED; echo a; echo first; echo b; echo second",
		"export_description=echo words", "default_export=echo a",
		"block_size=echo 512 4096 1M", "open=test \"$3\" != gone || { echo ENOENT gone >&2; exit 1; }",
	}
	uri := nbdkit(t, args...)
	ctx := context.Background()
	exports, err := List(ctx, uri, nil)
	if want := []Export{{Name: "a", Description: "first"}, {Name: "b", Description: "second"}}; err != nil || !reflect.DeepEqual(exports, want) {
		t.Errorf("List: got %+v, %v", exports, err)
	}
	want := Export{Name: "a", Description: "words", Size: 65536, BlockSize: protocol.BlockSizeInfo{Minimum: 512, Preferred: 4096, Maximum: 1 << 20}}
	got, err := Info(ctx, uri, nil)
	want.Flags = got.Flags
	if err != nil || got != want || got.Flags&protocol.FlagReadOnly == 0 {
		t.Errorf("Info: got %+v, %v", got, err)
	}
	c := connect(t, uri, nil)
	if c.Name() != "a" || c.Description() != "words" || c.BlockSize() != want.BlockSize || c.Size() != 65536 {
		t.Errorf("got %+v", c.Export())
	}
	for _, opts := range []*Options{{Export: "gone"}, {Export: "gone", NoGo: true}} {
		_, err := Dial(ctx, uri, opts)
		var refused *OptionError
		if err == nil || !opts.NoGo && (!errors.As(err, &refused) || refused.Reply != protocol.RepErrUnknown) {
			t.Errorf("export that is not there: got %v", err)
		}
	}
	if _, err := Info(ctx, uri+"&x=y", &Options{Export: "gone"}); err == nil {
		t.Error("Info of an export that is not there: got no error")
	}
}

// TestErrorMessage: the words of a structured error reach the caller.
func TestErrorMessage(t *testing.T) {
	nc := script(t, func(nc net.Conn) {
		r := welcome(t, nc)
		e := protocol.ErrorChunk{Type: protocol.ReplyError, Errno: protocol.ENOSPC, Msg: "disk full"}
		nc.Write(chunk(r.Cookie, protocol.ReplyFlagDone, e.Type, e.AppendTo(nil)))
	})
	c, err := New(context.Background(), nc, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	err = c.Flush()
	if want := (&Error{protocol.CmdFlush, protocol.ENOSPC, "disk full"}); !reflect.DeepEqual(err, want) || !errors.Is(err, syscall.ENOSPC) {
		t.Errorf("got %v, need %v", err, want)
	}
}

// TestAio has many goroutines with many commands each on one connection.
func TestAio(t *testing.T) {
	uri := nbdkit(t, "memory", "64M")
	withEach(t, func(t *testing.T, way func(net.Conn, Options) (*Conn, error)) { testAio(t, uri, way) })
}

func testAio(t *testing.T, uri string, way func(net.Conn, Options) (*Conn, error)) {
	u, err := protocol.ParseURI(uri)
	if err != nil {
		t.Fatal(err)
	}
	network, address := u.Address()
	nc, err := net.Dial(network, address)
	if err != nil {
		t.Fatal(err)
	}
	c, err := way(nc, Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	const goroutines, commands, length = 8, 200, 3000
	var mu sync.Mutex
	calls := make(map[uint64]int)
	var all sync.WaitGroup
	for g := range goroutines {
		all.Go(func() {
			for i := range commands {
				p := bytes.Repeat([]byte{byte(g), byte(i)}, length/2)
				off := uint64(g*commands+i) * length
				done := make(chan error, 1)
				all.Add(1)
				cookie, err := c.AioPwrite(p, off, 0, func(err error) int {
					defer all.Done()
					got := make([]byte, length)
					// A completion may issue commands.
					all.Add(1)
					_, err2 := c.AioPread(got, off, 0, func(err error) int {
						defer all.Done()
						if err != nil || !bytes.Equal(got, p) {
							t.Errorf("read at %d: %v, or other bytes", off, err)
						}
						return 1
					})
					done <- errors.Join(err, err2)
					return i % 2
				})
				if err != nil {
					t.Error(err)
				}
				if err := <-done; err != nil {
					t.Error(err)
				}
				mu.Lock()
				calls[cookie]++
				mu.Unlock()
			}
		})
	}
	all.Wait()
	if len(calls) != goroutines*commands {
		t.Errorf("got %d cookies, need %d", len(calls), goroutines*commands)
	}
	if err := c.Disconnect(); err != nil {
		t.Error(err)
	}
	retired := 0
	for cookie, n := range calls {
		if cookie < 1 || n != 1 {
			t.Errorf("cookie %d was given out %d times", cookie, n)
		}
		done, err := c.AioCommandCompleted(cookie)
		if done && err != nil || !done && err == nil {
			t.Errorf("cookie %d: got %v, %v", cookie, done, err)
		}
		if !done {
			retired++
			continue
		}
		if done, err := c.AioCommandCompleted(cookie); done || err == nil {
			t.Errorf("cookie %d, told already: got %v, %v", cookie, done, err)
		}
	}
	if retired != goroutines*commands/2 {
		t.Errorf("%d commands were retired by their completions, need %d", retired, goroutines*commands/2)
	}
}

// TestCompleted follows one command through its states.
func TestCompleted(t *testing.T) {
	answer := make(chan struct{})
	nc := script(t, func(nc net.Conn) {
		r := welcome(t, nc)
		<-answer
		nc.Write((&protocol.SimpleReply{Cookie: r.Cookie, Errno: protocol.EIO}).AppendTo(nil))
	})
	c, err := New(context.Background(), nc, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if done, err := c.AioCommandCompleted(1); done || err == nil {
		t.Errorf("before it is issued: got %v, %v", done, err)
	}
	cookie, err := c.AioFlush(0, nil) // no completion
	if err != nil || cookie != 1 {
		t.Fatalf("got cookie %d, %v", cookie, err)
	}
	if done, err := c.AioCommandCompleted(cookie); done || err != nil {
		t.Errorf("in flight: got %v, %v", done, err)
	}
	close(answer)
	// The server ends after its answer, so that everything has completed here.
	<-c.Done()
	done, err := c.AioCommandCompleted(cookie)
	var failed *Error
	if !done || !errors.As(err, &failed) || failed.Errno != protocol.EIO {
		t.Errorf("completed: got %v, %v", done, err)
	}
	if done, err := c.AioCommandCompleted(cookie); done || err == nil {
		t.Errorf("retired: got %v, %v", done, err)
	}
}

// TestLost: whatever is in flight completes once, with an error.
func TestLost(t *testing.T) {
	// Each write is more than a socket holds, so that some are not even sent.
	for _, how := range []string{"closed here", "closed there"} {
		t.Run(how, func(t *testing.T) {
			hang := make(chan struct{})
			nc := script(t, func(nc net.Conn) {
				welcome(t, nc)
				<-hang
			})
			c, err := New(context.Background(), nc, nil)
			if err != nil {
				t.Fatal(err)
			}
			const n = 10
			calls := make(chan error, 2*n)
			for range n {
				if _, err := c.AioPwrite(make([]byte, 1<<20), 0, 0, func(err error) int { calls <- err; return 1 }); err != nil {
					t.Fatal(err)
				}
			}
			if how == "closed here" {
				c.Close()
				close(hang)
			} else {
				close(hang)
				<-c.Done()
				c.Close()
			}
			if len(calls) != n {
				t.Errorf("got %d completions, need %d", len(calls), n)
			}
			for range n {
				if err := <-calls; !errors.Is(err, ErrDisconnected) {
					t.Errorf("got %v", err)
				}
			}
			called := false
			if cookie, err := c.AioFlush(0, func(error) int { called = true; return 1 }); cookie != 0 || !errors.Is(err, ErrDisconnected) {
				t.Errorf("issue afterwards: got %d, %v", cookie, err)
			}
			if called {
				t.Error("the completion of a command that was not issued was called")
			}
			if err := c.Disconnect(); !errors.Is(err, ErrDisconnected) {
				t.Errorf("disconnect afterwards: got %v", err)
			}
		})
	}
}

// TestDial: what is wrong before a server says a word.
func TestDial(t *testing.T) {
	tests := map[string]string{
		"http://localhost/":                "scheme",
		"nbds://localhost/":                "import nbdhost/client/nbds",
		"nbd+vsock://1:4294967294/":        "dial vsock 1:4294967294: ",
		"nbd+unix:///?socket=/nonexistent": "no such file",
	}
	for uri, says := range tests {
		for name, ask := range asks {
			t.Run(name+" "+uri, func(t *testing.T) {
				t.Parallel() // vsock may take two seconds
				if err := ask(t.Context(), uri, nil); err == nil || !strings.Contains(err.Error(), says) {
					t.Errorf("got %v, need it to say %q", err, says)
				}
			})
		}
	}
}

// asks are what takes a URI.
var asks = map[string]func(ctx context.Context, uri string, opts *Options) error{
	"Dial": func(ctx context.Context, uri string, opts *Options) error {
		c, err := Dial(ctx, uri, opts)
		if err == nil {
			c.Close()
		}
		return err
	},
	"List": func(ctx context.Context, uri string, opts *Options) error {
		_, err := List(ctx, uri, opts)
		return err
	},
	"Info": func(ctx context.Context, uri string, opts *Options) error {
		_, err := Info(ctx, uri, opts)
		return err
	},
}

// closed tells whether a connection was closed at this end.
func closed(nc net.Conn) bool {
	_, err := nc.Read(make([]byte, 1))
	return errors.Is(err, net.ErrClosed)
}

// TestOwnDial: Options.Dial gets the URI of what is asked for, its connection is used
// whatever the URI says and closed in the end, and its error comes back.
func TestOwnDial(t *testing.T) {
	u, err := protocol.ParseURI(nbdkit(t, "memory", "1M"))
	if err != nil {
		t.Fatal(err)
	}
	network, address := u.Address()
	for name, ask := range asks {
		var got []string
		var refusal error
		var nc net.Conn
		opts := Options{Dial: func(_ context.Context, to *protocol.URI) (_ net.Conn, err error) {
			got = append(got, to.String())
			if refusal != nil {
				return nil, refusal
			}
			nc, err = net.Dial(network, address)
			return nc, err
		}}
		if err := ask(t.Context(), "nbd://nowhere.invalid/a", &opts); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		if !closed(nc) {
			t.Errorf("%s left the connection open", name)
		}
		opts.Export, refusal = "b", errEnough
		if err := ask(t.Context(), "nbd://nowhere.invalid/a", &opts); !errors.Is(err, errEnough) {
			t.Errorf("%s: got %v, need %v", name, err, errEnough)
		}
		if want := []string{"nbd://nowhere.invalid/a", "nbd://nowhere.invalid/b"}; !slices.Equal(got, want) {
			t.Errorf("%s dialled %q, need %q", name, got, want)
		}
	}
}

// TestErrorsNameURI: an error of the handshake tells of which server, and no password.
// It ends the connection.
func TestErrorsNameURI(t *testing.T) {
	for name, ask := range asks {
		nc := script(t, func(net.Conn) {})
		opts := Options{Dial: func(context.Context, *protocol.URI) (net.Conn, error) { return nc, nil }}
		err := ask(t.Context(), "nbd://alice:secret@example.com/x", &opts)
		if want := "nbd://alice@example.com/x: read greeting: EOF"; err == nil || err.Error() != want || !errors.Is(err, io.EOF) {
			t.Errorf("%s: got %v, need %s", name, err, want)
		}
		if !closed(nc) {
			t.Errorf("%s left the connection open", name)
		}
	}
}

// TestNewTLS: New must not go on in plain text where TLS was asked for.
func TestNewTLS(t *testing.T) {
	said := make(chan int, 1)
	nc := script(t, func(nc net.Conn) {
		nc.Write((&protocol.Greeting{Flags: protocol.FlagFixedNewstyle}).AppendTo(nil))
		n, _ := nc.Read(make([]byte, 1))
		said <- n
	})
	c, err := New(t.Context(), nc, &Options{TLS: func(context.Context, net.Conn, *protocol.URI) (net.Conn, error) {
		return nil, errEnough
	}})
	if err == nil {
		c.Close()
	}
	if err == nil || !strings.Contains(err.Error(), "use Dial") {
		t.Errorf("got %v, need it to say that Dial does TLS", err)
	}
	if n := <-said; n > 0 {
		t.Error("the client said something, need nothing")
	}
}

// noDeadlines is a connection like those of SSH.
type noDeadlines struct{ net.Conn }

func (noDeadlines) SetDeadline(time.Time) error { return errors.ErrUnsupported }

// TestCancelled: a server that says nothing is given up with the context.
func TestCancelled(t *testing.T) {
	for name, wrap := range map[string]func(net.Conn) net.Conn{
		"socket":       func(nc net.Conn) net.Conn { return nc },
		"no deadlines": func(nc net.Conn) net.Conn { return noDeadlines{nc} },
	} {
		t.Run(name, func(t *testing.T) {
			ctx, cancel := context.WithCancelCause(context.Background())
			returned := make(chan struct{})
			nc := script(t, func(nc net.Conn) {
				nc.Write((&protocol.Greeting{Flags: protocol.FlagFixedNewstyle}).AppendTo(nil))
				io.ReadFull(nc, make([]byte, protocol.ClientFlagsSize))
				cancel(errEnough)
				<-returned
			})
			if _, err := New(ctx, wrap(nc), nil); !errors.Is(err, errEnough) {
				t.Errorf("got %v, need %v", err, errEnough)
			}
			close(returned)
		})
	}
}

// TestDialCancelled: the context's cause is told as well where it ends the connecting,
// beside what is known to those who do not ask for it.
func TestDialCancelled(t *testing.T) {
	ctx, cancel := context.WithCancelCause(context.Background())
	cancel(errEnough)
	for name, ask := range asks {
		for _, uri := range []string{"nbd://localhost/", "nbd+unix:///?socket=/nonexistent", "nbd+vsock://1:4294967294/"} {
			err := ask(ctx, uri, nil)
			if !errors.Is(err, errEnough) || !strings.HasPrefix(uri, "nbd+vsock") && !errors.Is(err, context.Canceled) {
				t.Errorf("%s %s: got %v, need %v and %v", name, uri, err, errEnough, context.Canceled)
			}
		}
	}
}

// A late context ends when it is waited for, some time after its deadline.
type late struct {
	context.Context
	end func()
}

func (l late) Deadline() (time.Time, bool) { return time.Unix(1, 0), true }
func (l late) Done() <-chan struct{}       { l.end(); return l.Context.Done() }

// TestDialDeadline: who dials may look at the time itself, and be the first to know.
func TestDialDeadline(t *testing.T) {
	for name, ask := range asks {
		ctx, cancel := context.WithCancelCause(context.Background())
		err := ask(late{ctx, func() { cancel(errEnough) }}, "nbd://localhost/", &Options{
			Dial: func(context.Context, *protocol.URI) (net.Conn, error) { return nil, os.ErrDeadlineExceeded },
		})
		if !errors.Is(err, errEnough) || !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("%s: got %v, need %v and %v", name, err, errEnough, os.ErrDeadlineExceeded)
		}
	}
}

// TestErr: a connection tells why it ended, once it has, unless that was wanted here.
func TestErr(t *testing.T) {
	given, giveUp := context.WithCancelCause(context.Background())
	giveUp(errEnough)
	for name, test := range map[string]struct {
		end  func(*Conn) // nil: the server ends it
		want error
	}{
		"closed":       {func(c *Conn) { c.Close() }, nil},
		"disconnected": {func(c *Conn) { c.Disconnect() }, nil},
		"given up":     {func(c *Conn) { c.With(given).Disconnect() }, errEnough},
		"lost":         {nil, io.EOF},
	} {
		t.Run(name, func(t *testing.T) {
			ended := make(chan struct{})
			nc := script(t, func(nc net.Conn) {
				r := welcome(t, nc)
				if name == "disconnected" {
					nc.Write(answered(r))
					request(t, nc)
					return
				}
				if test.end != nil {
					<-ended
				}
			})
			c, err := New(t.Context(), nc, &Options{SimpleReplies: true})
			if err != nil {
				t.Fatal(err)
			}
			early := make(chan error, 1)
			if _, err := c.AioFlush(0, func(error) int { early <- c.Err(); return 1 }); err != nil {
				t.Fatal(err)
			}
			if test.end != nil {
				test.end(c)
			}
			close(ended)
			<-c.Done()
			if err := <-early; err != nil {
				t.Errorf("while a completion ran: got %v, need nil", err)
			}
			c.Close() // changes nothing
			if err := c.Err(); !errors.Is(err, test.want) || err != nil && !errors.Is(err, ErrDisconnected) {
				t.Errorf("got %v, need %v", err, test.want)
			}
		})
	}
}

func TestTooLong(t *testing.T) {
	c := connect(t, nbdkit(t, "null", "1T"), nil)
	if cookie, err := c.AioTrim(1<<32, 0, 0, nil); err == nil || cookie != 0 {
		t.Errorf("got %d, %v", cookie, err)
	}
	if err := c.Trim(1<<32-512, 0, 0); err != nil {
		t.Error(err)
	}
}
