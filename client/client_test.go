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
	"strings"
	"sync"
	"syscall"
	"testing"

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
		for name, f := range map[string]func() error{
			"Dial": func() error { _, err := Dial(context.Background(), uri, nil); return err },
			"List": func() error { _, err := List(context.Background(), uri, nil); return err },
		} {
			if err := f(); err == nil || !strings.Contains(err.Error(), says) {
				t.Errorf("%s %s: got %v, need it to say %q", name, uri, err, says)
			}
		}
	}
}

// TestCancelled: a server that says nothing is given up with the context.
func TestCancelled(t *testing.T) {
	ctx, cancel := context.WithCancelCause(context.Background())
	cause := errors.New("enough")
	nc := script(t, func(nc net.Conn) {
		nc.Write((&protocol.Greeting{Flags: protocol.FlagFixedNewstyle}).AppendTo(nil))
		io.ReadFull(nc, make([]byte, protocol.ClientFlagsSize))
		cancel(cause)
	})
	if _, err := New(ctx, nc, nil); !errors.Is(err, cause) {
		t.Errorf("got %v, need %v", err, cause)
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
