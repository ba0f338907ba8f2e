// Command vsock is a client for a virtual machine that has nothing else: it connects
// to the NBD URI given, writes some data, and reads it back.
package main

import (
	"bytes"
	"context"
	"fmt"
	"os"

	"nbdhost/client"
	_ "nbdhost/client/nbds"
)

func main() {
	if err := run(os.Args[1]); err != nil {
		fmt.Fprintln(os.Stderr, "vsock:", err)
		os.Exit(1)
	}
}

func run(uri string) error {
	c, err := client.Dial(context.Background(), uri, nil)
	if err != nil {
		return err
	}
	defer c.Close()
	want, got := bytes.Repeat([]byte("v"), 300_000), make([]byte, 300_000)
	if err := c.Pwrite(want, 512, 0); err != nil {
		return err
	}
	if err := c.Pread(got, 512); err != nil {
		return err
	}
	if !bytes.Equal(got, want) {
		return fmt.Errorf("got %q, need what was written", got[:8])
	}
	return c.Disconnect()
}
