package server

import (
	"bytes"
	"encoding/hex"
	"io"
	"net"
	"testing"

	"nbdhost/backend"
	"nbdhost/protocol"
)

// The server speaks first, once, and then answers requests.
func TestOldstyle(t *testing.T) {
	_, _, path := serve(t, &hooked{Mem: backend.NewMem(1 << 20), model: backend.Parallel}, Options{Oldstyle: true})
	c, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	greeting := make([]byte, protocol.OldstyleGreetingSize)
	if _, err := io.ReadFull(c, greeting); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(greeting[16:24], []byte{0, 0, 0, 0, 0, 0x10, 0, 0}) || greeting[27]&1 == 0 {
		t.Errorf("got greeting %x, need a size of 1 MiB and NBD_FLAG_HAS_FLAGS", greeting)
	}
	requests := (&protocol.Request{Type: protocol.CmdRead, Cookie: 7, Offset: 512, Length: 4}).AppendTo(nil)
	requests = (&protocol.Request{Type: protocol.CmdDisc}).AppendTo(requests)
	if _, err := c.Write(requests); err != nil {
		t.Fatal(err)
	}
	got, err := io.ReadAll(c)
	if want := "67446698" + "00000000" + "0000000000000007" + "00000000"; err != nil || hex.EncodeToString(got) != want {
		t.Errorf("got %x, %v; want %s", got, err, want)
	}
}
