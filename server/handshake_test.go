package server

import (
	"bytes"
	"strings"
	"testing"

	"nbdhost/protocol"
)

// optionReplies splits what a server sent after its greeting.
func optionReplies(t *testing.T, b []byte) (replies []protocol.OptionReplyHeader, data [][]byte) {
	t.Helper()
	b = b[protocol.GreetingSize:]
	for len(b) > 0 {
		var h protocol.OptionReplyHeader
		if err := h.Decode(b); err != nil {
			t.Fatal(err)
		}
		b = b[protocol.OptionReplyHeaderSize:]
		replies, data = append(replies, h), append(data, b[:h.Length])
		b = b[h.Length:]
	}
	return replies, data
}

// Each option is answered as the specification says, with the data consumed: the
// option behind it is understood.
func TestOptions(t *testing.T) {
	info := func(name string, infos ...protocol.Info) []byte {
		return (&protocol.InfoRequest{Export: name, Infos: infos}).AppendTo(nil)
	}
	contexts := func(queries ...string) []byte {
		return (&protocol.MetaContextRequest{Queries: queries}).AppendTo(nil)
	}
	const ack, invalid = protocol.RepAck, protocol.RepErrInvalid
	for _, tt := range []struct {
		name string
		opts [][]byte
		want []protocol.OptionReply
	}{
		{"list", [][]byte{option(protocol.OptList, nil)}, []protocol.OptionReply{protocol.RepServer, ack}},
		{"list with data", [][]byte{option(protocol.OptList, []byte("x"))}, []protocol.OptionReply{invalid}},
		{"unknown", [][]byte{option(1234, make([]byte, 1000))}, []protocol.OptionReply{protocol.RepErrUnsup}},
		{"peek export", [][]byte{option(protocol.OptPeekExport, nil)}, []protocol.OptionReply{protocol.RepErrUnsup}},
		{"starttls", [][]byte{option(protocol.OptStartTLS, nil)}, []protocol.OptionReply{protocol.RepErrPolicy}},
		{"structured", [][]byte{structured, structured}, []protocol.OptionReply{ack, ack}},
		{"structured with data", [][]byte{option(protocol.OptStructuredReply, []byte{0})}, []protocol.OptionReply{invalid}},
		{"info", [][]byte{option(protocol.OptInfo, info(""))}, []protocol.OptionReply{protocol.RepInfo, ack}},
		{"info name, twice, and unknown", [][]byte{option(protocol.OptInfo, info("x", protocol.InfoName, protocol.InfoName, 99))},
			[]protocol.OptionReply{protocol.RepInfo, protocol.RepInfo, ack}},
		{"info too short", [][]byte{option(protocol.OptInfo, []byte{0, 0})}, []protocol.OptionReply{invalid}},
		{"info name longer than data", [][]byte{option(protocol.OptInfo, []byte{255, 255, 255, 255, 0, 0})}, []protocol.OptionReply{invalid}},
		{"info with more data", [][]byte{option(protocol.OptInfo, append(info("x"), 1))}, []protocol.OptionReply{invalid}},
		{"info name too long", [][]byte{option(protocol.OptInfo, info(strings.Repeat("x", 4097)))}, []protocol.OptionReply{invalid}},
		{"info name with NUL", [][]byte{option(protocol.OptInfo, info("a\x00b"))}, []protocol.OptionReply{invalid}},
		{"contexts without structured", [][]byte{option(protocol.OptSetMetaContext, contexts("base:allocation"))}, []protocol.OptionReply{invalid}},
		{"list contexts", [][]byte{structured, option(protocol.OptListMetaContext, contexts())}, []protocol.OptionReply{ack, protocol.RepMetaContext, ack}},
		{"list contexts base:", [][]byte{structured, option(protocol.OptListMetaContext, contexts("base:"))}, []protocol.OptionReply{ack, protocol.RepMetaContext, ack}},
		{"set no context", [][]byte{structured, option(protocol.OptSetMetaContext, contexts())}, []protocol.OptionReply{ack, ack}},
		{"set base:", [][]byte{structured, option(protocol.OptSetMetaContext, contexts("base:"))}, []protocol.OptionReply{ack, ack}},
		{"set others", [][]byte{structured, option(protocol.OptSetMetaContext, contexts("qemu:", "", "base:allocation", "base:allocation"))},
			[]protocol.OptionReply{ack, protocol.RepMetaContext, ack}},
		{"set with count too large", [][]byte{structured, option(protocol.OptSetMetaContext, []byte{0, 0, 0, 0, 255, 255, 255, 255})},
			[]protocol.OptionReply{ack, invalid}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			opts := append(tt.opts, option(protocol.OptAbort, nil))
			replies, _ := optionReplies(t, converse(t, hello(bytes.Join(opts, nil))))
			want := append(tt.want, ack)
			if len(replies) != len(want) {
				t.Fatalf("got %v, need %v", replies, want)
			}
			for i := range want {
				if replies[i].Type != want[i] {
					t.Errorf("reply %d: got %v, need %v", i, replies[i].Type, want[i])
				}
			}
		})
	}
}

// What ends a handshake without an answer.
func TestHangUp(t *testing.T) {
	fixed := protocol.FlagCFixedNewstyle
	many := bytes.Repeat(structured, protocol.MaxOptions+1)
	for name, tt := range map[string]struct {
		data    []byte
		replies int
	}{
		"unknown client flags":    {append(protocol.ClientFlags(1<<7).AppendTo(nil), structured...), 0},
		"bad option magic":        {append(fixed.AppendTo(nil), make([]byte, 100)...), 0},
		"option data of 4 GiB":    {append(fixed.AppendTo(nil), (&protocol.OptionHeader{Option: 99, Length: 1<<32 - 1}).AppendTo(nil)...), 0},
		"too many options":        {append(fixed.AppendTo(nil), many...), protocol.MaxOptions},
		"export name too long":    {append(fixed.AppendTo(nil), option(protocol.OptExportName, make([]byte, 4097))...), 0},
		"options behind an abort": {append(fixed.AppendTo(nil), append(option(protocol.OptAbort, nil), structured...)...), 1},
	} {
		t.Run(name, func(t *testing.T) {
			replies, _ := optionReplies(t, converse(t, tt.data))
			if len(replies) != tt.replies {
				t.Errorf("got %d replies, need %d", len(replies), tt.replies)
			}
		})
	}
}

// A context that was selected for another export does not count.
func TestContextOfOtherExport(t *testing.T) {
	set := option(protocol.OptSetMetaContext, (&protocol.MetaContextRequest{Export: "a",
		Queries: []string{protocol.ContextBaseAllocation}}).AppendTo(nil))
	for export, want := range map[string]protocol.ReplyType{"a": protocol.ReplyBlockStatus, "b": protocol.ReplyError} {
		open := option(protocol.OptGo, (&protocol.InfoRequest{Export: export}).AppendTo(nil))
		got := converse(t, hello(structured, set, open, request(protocol.Request{Type: protocol.CmdBlockStatus, Length: 512})))
		var found []protocol.ReplyType
		for _, typ := range []protocol.ReplyType{protocol.ReplyBlockStatus, protocol.ReplyError} {
			h := protocol.ChunkHeader{Type: typ, Flags: protocol.ReplyFlagDone}
			if bytes.Contains(got, h.AppendTo(nil)[:8]) {
				found = append(found, typ)
			}
		}
		if len(found) != 1 || found[0] != want {
			t.Errorf("export %q: got %v, need %v", export, found, want)
		}
	}
}
