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

// The map of an export, and a copy that leaves out what is zero.
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

	var copied uint64
	for off := uint64(0); off < c.Size(); {
		status, err := c.BlockStatus(c.Size()-off, off, 0)
		if err != nil {
			log.Fatal(err)
		}
		for _, run := range status[protocol.ContextBaseAllocation] {
			fmt.Printf("%7d %7d %v\n", off, run.Length, run.Flags&protocol.StateZero != 0)
			if run.Flags&protocol.StateZero == 0 {
				if err := c.Pread(make([]byte, run.Length), off); err != nil {
					log.Fatal(err)
				}
				copied += run.Length
			}
			off += run.Length
		}
	}
	fmt.Println(copied, "bytes copied")
	// Output:
	//       0  262144 true
	//  262144   65536 false
	//  327680  720896 true
	// 65536 bytes copied
}

// Zeroes, without sending them.
func ExampleConn_Zero() {
	uri, stop := serveMem(1 << 20)
	defer stop()
	c, err := client.Dial(context.Background(), uri, nil)
	if err != nil {
		log.Fatal(err)
	}
	defer c.Close()

	err = c.Zero(c.Size(), 0, protocol.CmdFlagFastZero)
	if errors.Is(err, syscall.ENOTSUP) { // it would be slow
		err = c.Zero(c.Size(), 0, 0)
	}
	fmt.Println(err)
	// Output: <nil>
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
