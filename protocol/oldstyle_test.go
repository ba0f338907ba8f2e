package protocol

import (
	"encoding/hex"
	"strings"
	"testing"
)

func TestOldstyleGreeting(t *testing.T) {
	g := OldstyleGreeting{Size: 1 << 20, Flags: FlagHasFlags | FlagSendFlush}
	want := hex.EncodeToString([]byte("NBDMAGIC")) + "0000420281861253" + "0000000000100000" + "00000005" + strings.Repeat("00", 124)
	got := g.AppendTo(nil)
	if s := hex.EncodeToString(got); s != want || len(got) != OldstyleGreetingSize {
		t.Errorf("got %d bytes %s, want %s", len(got), s, want)
	}
}
