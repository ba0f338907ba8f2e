package client

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"os"
	"reflect"
	"sync"
	"syscall"
	"testing"

	"nbdhost/protocol"
)

// seqpacket is script over a socket that keeps each write apart.
func seqpacket(t *testing.T, server func(nc net.Conn)) net.Conn {
	t.Helper()
	fds, err := syscall.Socketpair(syscall.AF_UNIX, syscall.SOCK_SEQPACKET|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	var ends [2]net.Conn
	for i, fd := range fds {
		f := os.NewFile(uintptr(fd), "socketpair")
		ends[i], err = net.FileConn(f)
		f.Close()
		if err != nil {
			t.Fatal(err)
		}
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		defer ends[1].Close()
		server(ends[1])
	}()
	t.Cleanup(func() { ends[0].Close(); <-done })
	return ends[0]
}

// greetSimply is the server's part of a handshake with NBD_OPT_EXPORT_NAME, for an
// export of 1 MiB.
func greetSimply(nc net.Conn) {
	nc.Write((&protocol.Greeting{Flags: protocol.FlagFixedNewstyle | protocol.FlagNoZeroes}).AppendTo(nil))
	b := make([]byte, 100)
	nc.Read(b)
	nc.Read(b)
	nc.Write((&protocol.ExportNameReply{Size: 1 << 20, Flags: protocol.FlagHasFlags, NoZeroes: true}).AppendTo(nil))
}

// TestBatch: the requests that completions issue leave in one write, once all the
// replies that have come are dealt with.
func TestBatch(t *testing.T) {
	const n = 64
	for _, blocking := range []bool{false, true} {
		for _, op := range []protocol.Command{protocol.CmdFlush, protocol.CmdWrite} {
			t.Run(fmt.Sprintf("blocking %v, %v", blocking, op), func(t *testing.T) {
				size := 0
				if op == protocol.CmdWrite {
					size = 512
				}
				got := make(chan int, 2)
				begun := make(chan struct{})
				nc := seqpacket(t, func(nc net.Conn) {
					greetSimply(nc)
					b := make([]byte, 1<<20)
					nc.Read(b)
					var first protocol.Request
					if err := first.Decode(b); err != nil {
						t.Error(err)
						return
					}
					<-begun // else who issued it might still be writing, and take some of the next along
					nc.Write(answered(first))
					for range 2 {
						m, _ := nc.Read(b)
						got <- m
						var replies []byte
						for ; m > 0; m -= protocol.RequestSize + size {
							var r protocol.Request
							if err := r.Decode(b[m-protocol.RequestSize-size:]); err != nil {
								t.Error(err)
								return
							}
							replies = append(replies, answered(r)...)
						}
						nc.Write(replies)
					}
				})
				c, err := New(context.Background(), nc, &Options{NoGo: true, SimpleReplies: true, Blocking: blocking})
				if err != nil {
					t.Fatal(err)
				}
				defer c.Close()
				var last sync.WaitGroup
				last.Add(n)
				issue := func(done Completion) {
					var err error
					if op == protocol.CmdWrite {
						_, err = c.AioPwrite(bytes.Repeat([]byte("x"), size), 0, 0, done)
					} else {
						_, err = c.AioFlush(0, done)
					}
					if err != nil {
						t.Error(err)
						last.Done()
					}
				}
				if _, err := c.AioFlush(0, func(error) int {
					for range n {
						issue(func(error) int {
							issue(func(error) int { last.Done(); return 1 })
							return 1
						})
					}
					return 1
				}); err != nil {
					t.Fatal(err)
				}
				close(begun)
				last.Wait()
				for range 2 {
					if m, need := <-got, n*(protocol.RequestSize+size); m != need {
						t.Errorf("got a write of %d bytes, need one of %d", m, need)
					}
				}
			})
		}
	}
}

// TestAllocations: a command allocates nothing, however it is answered.
func TestAllocations(t *testing.T) {
	uri := nbdkit(t, "memory", "64M")
	for name, opts := range map[string]*Options{"simple": {SimpleReplies: true}, "structured": {}, "blocking": {Blocking: true}, "strict": {Strict: StrictAll}} {
		t.Run(name, func(t *testing.T) {
			c := connect(t, uri, opts)
			const n = 256
			var all sync.WaitGroup
			done := func(err error) int {
				if err != nil {
					t.Error(err)
				}
				all.Done()
				return 1
			}
			small, large := make([]byte, 4096), make([]byte, 256<<10)
			for what, issue := range map[string]func() (uint64, error){
				"small reads":  func() (uint64, error) { return c.AioPread(small, 0, 0, done) },
				"large reads":  func() (uint64, error) { return c.AioPread(large, 0, 0, done) },
				"small writes": func() (uint64, error) { return c.AioPwrite(small, 0, 0, done) },
				"large writes": func() (uint64, error) { return c.AioPwrite(large, 0, 0, done) },
				"flushes":      func() (uint64, error) { return c.AioFlush(0, done) },
			} {
				per := testing.AllocsPerRun(5, func() {
					all.Add(n)
					for range n {
						if _, err := issue(); err != nil {
							t.Error(err)
						}
					}
					all.Wait()
				})
				// A buffer or a goroutine now and then is none for each command.
				most := float64(n / 8)
				if what == "large writes" {
					most = n // where the answer comes before the sender knows that all is sent, a goroutine completes it
				}
				if per > most {
					t.Errorf("%s: %g allocations for %d commands", what, per, n)
				}
			}
		})
	}
}

// TestManySlots: commands that stay known do not stand in the way of others.
func TestManySlots(t *testing.T) {
	c := connect(t, nbdkit(t, "null", "1M"), nil)
	var kept []uint64
	for i := range 1000 {
		cookie, err := c.AioCache(512, 0, 0, nil)
		if i%50 == 0 {
			cookie, err = c.AioFlush(0, nil)
			kept = append(kept, cookie)
		} else if err == nil {
			for {
				if done, err := c.AioCommandCompleted(cookie); done || err != nil {
					break
				}
				if err := c.Flush(); err != nil {
					t.Fatal(err)
				}
			}
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	if len(c.slots) > 128 {
		t.Errorf("got %d slots for %d commands", len(c.slots), c.used)
	}
	if err := c.Disconnect(); err != nil {
		t.Fatal(err)
	}
	for _, cookie := range kept {
		if done, err := c.AioCommandCompleted(cookie); !done || err != nil {
			t.Errorf("cookie %d: got %v, %v", cookie, done, err)
		}
	}
}

// TestChunks: what a ChunkFunc is told of each part of a reply.
func TestChunks(t *testing.T) {
	data, holes, none := protocol.ReplyOffsetData, protocol.ReplyOffsetHole, protocol.ReplyNone
	failure := protocol.ErrorChunk{Type: protocol.ReplyErrorOffset, Errno: protocol.EIO, Msg: "here", Offset: 103}
	failed := &Error{Command: protocol.CmdRead, Errno: protocol.EIO, Msg: "here"}
	for _, tt := range []struct {
		name   string
		simple bool
		reply  func(k uint64) []byte
		refuse error
		want   []Chunk
		err    error
	}{
		{"data and hole", false, func(k uint64) []byte {
			return bytes.Join([][]byte{chunk(k, 0, data, offsetData(103, "def")), chunk(k, 0, holes, hole(100, 3)), chunk(k, done, none, nil)}, nil)
		}, nil, []Chunk{{data, 103, []byte("def"), nil}, {holes, 100, []byte("\x00\x00\x00"), nil}}, nil},
		{"error behind data", false, func(k uint64) []byte {
			return append(chunk(k, 0, data, offsetData(100, "abc")), chunk(k, done, failure.Type, failure.AppendTo(nil))...)
		}, nil, []Chunk{{data, 100, []byte("abc"), nil}, {failure.Type, 103, nil, failed}}, failed},
		{"refused", false, func(k uint64) []byte { return chunk(k, done, data, offsetData(100, "abcdef")) },
			errEnough, []Chunk{{data, 100, []byte("abcdef"), nil}}, errEnough},
		{"refused and failed", false, func(k uint64) []byte { return chunk(k, done, failure.Type, failure.AppendTo(nil)) },
			errEnough, []Chunk{{failure.Type, 103, nil, failed}}, failed},
		{"simple", true, func(k uint64) []byte { return append((&protocol.SimpleReply{Cookie: k}).AppendTo(nil), "abcdef"...) },
			nil, []Chunk{{data, 100, []byte("abcdef"), nil}}, nil},
		{"simple error", true, func(k uint64) []byte { return (&protocol.SimpleReply{Cookie: k, Errno: protocol.EIO}).AppendTo(nil) },
			nil, []Chunk{{protocol.ReplyError, 0, nil, &Error{Command: protocol.CmdRead, Errno: protocol.EIO}}}, &Error{Command: protocol.CmdRead, Errno: protocol.EIO}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			nc := script(t, func(nc net.Conn) {
				nc.Write(tt.reply(welcome(t, nc).Cookie))
				io.Copy(io.Discard, nc)
			})
			c, err := New(context.Background(), nc, &Options{SimpleReplies: tt.simple})
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			var got []Chunk
			err = c.PreadStructured(make([]byte, 6), 100, 0, func(chunk Chunk) error {
				chunk.Data = bytes.Clone(chunk.Data)
				got = append(got, chunk)
				return tt.refuse
			})
			if !reflect.DeepEqual(err, tt.err) || !reflect.DeepEqual(got, tt.want) {
				t.Errorf("got %+v, %v\nwant %+v, %v", got, err, tt.want, tt.err)
			}
		})
	}
}
