package client_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log"
	"net"
	"os"
	"path/filepath"
	"sync"
	"syscall"

	"nbdhost/backend"
	"nbdhost/client"
	"nbdhost/protocol"
	"nbdhost/server"
)

// serveMem serves a disk in memory of size bytes on a Unix socket, and returns its
// URI and what ends it.
func serveMem(size uint64) (uri string, stop func()) {
	dir, err := os.MkdirTemp("", "example")
	if err != nil {
		log.Fatal(err)
	}
	socket := filepath.Join(dir, "socket")
	l, err := net.Listen("unix", socket)
	if err != nil {
		log.Fatal(err)
	}
	srv := server.New(server.Options{Chain: backend.NewChain(backend.NewMem(size), nil, backend.Trace{})})
	go srv.Serve(l)
	u := protocol.URI{Transport: protocol.TransportUnix, Socket: socket}
	return u.String(), func() {
		srv.Shutdown()
		srv.Wait()
		os.RemoveAll(dir)
	}
}

// Write, make it durable, and read it back.
func Example() {
	uri, stop := serveMem(1 << 20)
	defer stop()

	c, err := client.Dial(context.Background(), uri, nil)
	if err != nil {
		log.Fatal(err)
	}
	defer c.Close()
	fmt.Println(c.Size(), "bytes, FUA:", c.Flags()&protocol.FlagSendFUA != 0)

	if err := c.Pwrite([]byte("hello, world"), 4096, 0); err != nil {
		log.Fatal(err)
	}
	if err := c.Flush(); err != nil {
		log.Fatal(err)
	}
	p := make([]byte, 5)
	if err := c.Pread(p, 4096); err != nil {
		log.Fatal(err)
	}
	fmt.Printf("%s\n", p)
	fmt.Println(c.Disconnect())
	// Output:
	// 1048576 bytes, FUA: true
	// hello
	// <nil>
}

// A server that listens nowhere is talked to over any connection.
func ExampleNew() {
	srv := server.New(server.Options{Chain: backend.NewChain(backend.NewMem(512), nil, backend.Trace{})})
	here, there := net.Pipe()
	go srv.ServeConn(there)

	c, err := client.New(context.Background(), here, nil)
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(c.Size())
	c.Disconnect()
	srv.Shutdown()
	srv.Wait()
	// Output: 512
}

// What a server has, without opening any of it.
func ExampleList() {
	uri, stop := serveMem(1 << 20)
	defer stop()

	exports, err := client.List(context.Background(), uri, nil)
	if err != nil {
		log.Fatal(err)
	}
	for _, e := range exports {
		export, err := client.Info(context.Background(), uri, &client.Options{Export: e.Name})
		if err != nil {
			log.Fatal(err)
		}
		fmt.Printf("%q: %d bytes\n", export.Name, export.Size)
	}
	// Output: "": 1048576 bytes
}

// Many writes in flight at once; each completion retires its command.
func ExampleConn_AioPwrite() {
	uri, stop := serveMem(1 << 20)
	defer stop()
	c, err := client.Dial(context.Background(), uri, nil)
	if err != nil {
		log.Fatal(err)
	}
	defer c.Close()

	const block = 4096
	inFlight := make(chan struct{}, 64) // so many at a time
	var all sync.WaitGroup
	var mu sync.Mutex
	var failures []error
	for off := uint64(0); off < c.Size(); off += block {
		inFlight <- struct{}{}
		all.Add(1)
		p := bytes.Repeat([]byte{byte(off / block)}, block)
		_, err := c.AioPwrite(p, off, 0, func(err error) int {
			defer all.Done()
			if err != nil {
				mu.Lock()
				failures = append(failures, err)
				mu.Unlock()
			}
			<-inFlight
			return 1
		})
		if err != nil { // nothing was issued: the completion is never called
			log.Fatal(err)
		}
	}
	all.Wait()
	fmt.Println(len(failures), "failures")

	p := make([]byte, 1)
	if err := c.Pread(p, 200*block); err != nil {
		log.Fatal(err)
	}
	fmt.Println(p)
	// Output:
	// 0 failures
	// [200]
}

// A flush covers the writes that were answered before it was issued, so it is
// issued by the completion of the last of them.
func ExampleConn_AioFlush() {
	uri, stop := serveMem(1 << 20)
	defer stop()
	c, err := client.Dial(context.Background(), uri, nil)
	if err != nil {
		log.Fatal(err)
	}
	defer c.Close()

	durable := make(chan error, 1)
	_, err = c.AioPwrite(make([]byte, 512), 0, 0, func(err error) int {
		if err == nil {
			_, err = c.AioFlush(0, func(err error) int {
				durable <- err
				return 1
			})
		}
		if err != nil {
			durable <- err
		}
		return 1
	})
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(<-durable)
	// Output: <nil>
}

// Commands whose completion does not retire them are asked for by their cookie.
func ExampleConn_AioCommandCompleted() {
	uri, stop := serveMem(1 << 20)
	defer stop()
	c, err := client.Dial(context.Background(), uri, nil)
	if err != nil {
		log.Fatal(err)
	}

	cookie, err := c.AioTrim(65536, 0, 0, nil)
	if err != nil {
		log.Fatal(err)
	}
	if err := c.Disconnect(); err != nil { // which waits for what is in flight
		log.Fatal(err)
	}
	done, err := c.AioCommandCompleted(cookie)
	fmt.Println(cookie, done, err)
	done, err = c.AioCommandCompleted(cookie)
	fmt.Println(done, err != nil) // each result is told once
	// Output:
	// 1 true <nil>
	// false true
}

// The map of an export: where it has data, and where it is zero. It is asked for in
// pieces, since a server without extended headers takes less than 4 GiB.
func ExampleConn_BlockStatus() {
	uri, stop := serveMem(1 << 20)
	defer stop()
	c, err := client.Dial(context.Background(), uri, nil)
	if err != nil {
		log.Fatal(err)
	}
	defer c.Close()
	if err := c.Pwrite([]byte("data"), 256<<10, 0); err != nil {
		log.Fatal(err)
	}

	const piece = 1 << 30
	for off := uint64(0); off < c.Size(); {
		status, err := c.BlockStatus(min(piece, c.Size()-off), off, 0)
		if err != nil {
			log.Fatal(err)
		}
		for _, run := range status[protocol.ContextBaseAllocation] {
			fmt.Printf("%7d %7d %v\n", off, run.Length, run.Flags&protocol.StateZero != 0)
			off += run.Length
		}
	}
	// Output:
	//       0  262144 true
	//  262144   65536 false
	//  327680  720896 true
}

// A disk is copied by several connections at a time, where the server says that this
// is safe; what is zero is not read.
func Example_copy() {
	from, stopFrom := serveMem(4 << 20)
	defer stopFrom()
	to, stopTo := serveMem(4 << 20)
	defer stopTo()
	write(from, "somewhere", 3<<20)

	const piece = 1 << 20
	ctx, cancel := context.WithCancelCause(context.Background())
	defer cancel(nil)
	pieces := make(chan uint64)
	var all sync.WaitGroup
	for range 4 {
		all.Go(func() {
			if err := copyPieces(ctx, from, to, pieces, piece); err != nil {
				cancel(err) // the others end as well
			}
		})
	}
	for off := uint64(0); off < 4<<20; off += piece {
		select {
		case pieces <- off:
		case <-ctx.Done():
		}
	}
	close(pieces)
	all.Wait()
	fmt.Println(context.Cause(ctx), read(to, 3<<20))
	// Output: <nil> somewhere
}

// copyPieces copies the pieces that it is told of, each of size bytes at most, on two
// connections of its own.
func copyPieces(ctx context.Context, from, to string, pieces <-chan uint64, size uint64) error {
	source, err := client.Dial(ctx, from, nil)
	if err != nil {
		return err
	}
	defer source.Close()
	target, err := client.Dial(ctx, to, nil)
	if err != nil {
		return err
	}
	defer target.Close()
	buf := make([]byte, size)
	for off := range pieces {
		for end := min(off+size, source.Size()); off < end; {
			status, err := source.With(ctx).BlockStatus(end-off, off, 0)
			if err != nil {
				return err
			}
			for _, run := range status[protocol.ContextBaseAllocation] {
				n := min(run.Length, end-off)
				if run.Flags&protocol.StateZero != 0 {
					err = target.With(ctx).Zero(n, off, 0)
				} else if err = source.With(ctx).Pread(buf[:n], off); err == nil {
					err = target.With(ctx).Pwrite(buf[:n], off, 0)
				}
				if err != nil {
					return err
				}
				off += n
			}
		}
	}
	if err := target.With(ctx).Flush(); err != nil {
		return err
	}
	return errors.Join(source.With(ctx).Disconnect(), target.With(ctx).Disconnect())
}

// write and read are for examples about something else.
func write(uri, text string, off uint64) {
	c, err := client.Dial(context.Background(), uri, nil)
	if err != nil {
		log.Fatal(err)
	}
	defer c.Close()
	if err := c.Pwrite([]byte(text), off, 0); err != nil {
		log.Fatal(err)
	}
}

func read(uri string, off uint64) string {
	c, err := client.Dial(context.Background(), uri, nil)
	if err != nil {
		log.Fatal(err)
	}
	defer c.Close()
	p := make([]byte, 9)
	if err := c.Pread(p, off); err != nil {
		log.Fatal(err)
	}
	return string(p)
}

// A command is given up with its context, and the connection goes on.
func ExampleConn_With() {
	uri, stop := serveMem(1 << 20)
	defer stop()
	c, err := client.Dial(context.Background(), uri, nil)
	if err != nil {
		log.Fatal(err)
	}
	defer c.Close()

	ctx, cancel := context.WithCancelCause(context.Background())
	cancel(errors.New("the user has left")) // most often by a timeout
	p := make([]byte, 512)
	fmt.Println(c.With(ctx).Pread(p, 0))
	fmt.Println(c.Pread(p, 0))
	// Output:
	// the user has left
	// <nil>
}

// Of two copies of a disk the first that answers is enough: the other read is
// cancelled, and its buffer can be used again at once.
func ExampleConn_AioCancel() {
	uri, stop := serveMem(1 << 20)
	defer stop()

	type answer struct {
		copy int
		err  error
	}
	answers := make(chan answer, 2)
	var conns [2]*client.Conn
	var cookies [2]uint64
	for i := range conns {
		c, err := client.Dial(context.Background(), uri, nil)
		if err != nil {
			log.Fatal(err)
		}
		defer c.Close()
		cookie, err := c.AioPread(make([]byte, 512), 0, 0, func(err error) int {
			answers <- answer{i, err}
			return 1
		})
		if err != nil {
			log.Fatal(err)
		}
		conns[i], cookies[i] = c, cookie
	}
	first := <-answers
	other := 1 - first.copy
	// False if that one is there as well by now. Its completion is called either way.
	conns[other].AioCancel(cookies[other], errors.New("not needed"))
	<-answers
	fmt.Println(first.err)
	// Output: <nil>
}

// A server that sends a read in parts tells which of them are holes.
func ExampleConn_AioPreadStructured() {
	uri, stop := serveMem(1 << 20)
	defer stop()
	c, err := client.Dial(context.Background(), uri, nil)
	if err != nil {
		log.Fatal(err)
	}
	defer c.Close()

	done := make(chan error)
	p := make([]byte, 4096)
	_, err = c.AioPreadStructured(p, 0, 0, func(chunk client.Chunk) error {
		fmt.Println(chunk.Type, chunk.Offset, len(chunk.Data), chunk.Err)
		return nil
	}, func(err error) int {
		done <- err
		return 1
	})
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(<-done)
	// Output:
	// NBD_REPLY_TYPE_OFFSET_DATA 0 4096 <nil>
	// <nil>
}

// Zeroes, without sending them; in pieces, since a server without extended headers
// takes less than 4 GiB.
func ExampleConn_Zero() {
	uri, stop := serveMem(1 << 20)
	defer stop()
	c, err := client.Dial(context.Background(), uri, nil)
	if err != nil {
		log.Fatal(err)
	}
	defer c.Close()

	const piece = 1 << 30
	for off := uint64(0); off < c.Size(); off += piece {
		n := min(piece, c.Size()-off)
		err := c.Zero(n, off, protocol.CmdFlagFastZero)
		if errors.Is(err, syscall.ENOTSUP) { // it would be slow
			err = c.Zero(n, off, 0)
		}
		if err != nil {
			log.Fatal(err)
		}
		fmt.Println(n, "zeroes at", off)
	}
	// Output: 1048576 zeroes at 0
}

// What the server says of a command that fails.
func ExampleError() {
	uri, stop := serveMem(1 << 20)
	defer stop()
	c, err := client.Dial(context.Background(), uri, nil)
	if err != nil {
		log.Fatal(err)
	}
	defer c.Close()

	err = c.Pwrite([]byte("x"), c.Size(), 0)
	var failed *client.Error
	if errors.As(err, &failed) {
		fmt.Println(failed.Command, failed.Errno)
	}
	fmt.Println(errors.Is(err, syscall.ENOSPC))
	// Output:
	// NBD_CMD_WRITE NBD_ENOSPC
	// true
}

// Mistakes are told at once, and cost no round trip.
func ExampleStrict() {
	uri, stop := serveMem(1 << 20)
	defer stop()
	c, err := client.Dial(context.Background(), uri, &client.Options{Strict: client.StrictAll})
	if err != nil {
		log.Fatal(err)
	}
	defer c.Close()

	cookie, err := c.AioTrim(512, c.Size(), 0, nil)
	fmt.Println(cookie, errors.Is(err, syscall.EINVAL))
	// Output: 0 true
}
