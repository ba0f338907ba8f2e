package tests

import (
	"bytes"
	"encoding/binary"
	"errors"
	"flag"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"nbdhost/protocol"
)

var (
	differentialTime = flag.Duration("differential", 0, "how long TestDifferential and TestFilterChains go on; 0 for a fixed number")
	differentialSeed = flag.Uint64("differential-seed", 1, "what their random conversations and chains begin with")
)

// TestDifferential has the same random conversations, most of them valid and some
// of them damaged, with nbdkit and with the program under test, and compares all
// that comes back. These are left out, since they differ for a reason:
//   - the texts of errors: each server has its own;
//   - NBD_OPT_EXTENDED_HEADERS, which nbdkit does not know;
//   - options of more than 4 KiB of data beyond a name: nbdkit hangs up where this
//     server consumes them and replies NBD_REP_ERR_TOO_BIG, as the specification asks;
//   - the data before the error of a read that ends beyond the export: nbdkit
//     sends none;
//   - a second NBD_OPT_LIST, which nbdkit refuses;
//   - of clients without fixed newstyle, NBD_OPT_ABORT, which nbdkit refuses, and
//     options with data, which it takes for the next option;
//   - contexts that are named before an option turns out to be wrong;
//   - a context that was selected for the export that is opened, where NBD_OPT_INFO
//     has asked about another one in between: nbdkit forgets it;
//   - a context that several queries match, which nbdkit names for each;
//   - an NBD_OPT_SET_META_CONTEXT that turns out to be wrong behind a query that
//     matched: nbdkit refuses it too, but keeps the context;
//   - data behind the last query of NBD_OPT_SET_META_CONTEXT and of
//     NBD_OPT_LIST_META_CONTEXT, which nbdkit ignores;
//   - how runs of block status are cut off, as long as they say the same of each
//     byte that was asked about;
//   - block status of 2^32-64 KiB and more, and zeroes with NBD_CMD_FLAG_FAST_ZERO
//     where the plugin has none: they end nbdkit 1.32 with a failed assertion.
func TestDifferential(t *testing.T) {
	onlyNbdhost(t)
	for _, plugin := range []struct {
		name string
		size uint64
		args []string
	}{
		{"memory", 1 << 20, []string{"memory", "1M"}},
		{"read-only", 1 << 20, []string{"-r", "memory", "1M"}},
		{"file", 1<<20 + 100, []string{"file", "DIR/disk"}},
		{"null", 1<<63 - 1, []string{"null", "9223372036854775807"}},
		{"pattern", 10<<20 + 1, []string{"pattern", "10485761"}},
	} {
		t.Run(plugin.name, func(t *testing.T) {
			t.Parallel()
			var servers [2]*server
			for i, program := range []string{nbdkit, nbdhost} {
				dir := tempDir(t)
				disk := make([]byte, 1<<20+100)
				copy(disk[300<<10:], strings.Repeat("some data ", 5000))
				if err := os.WriteFile(filepath.Join(dir, "disk"), disk, 0o600); err != nil {
					t.Fatal(err)
				}
				command(t, "fallocate", "--dig-holes", filepath.Join(dir, "disk"))
				servers[i] = start(t, program, dir, false, append([]string{"-t", "1"}, plugin.args...)...)
			}
			began := time.Now()
			for seed := *differentialSeed; ; seed++ {
				if *differentialTime == 0 && seed == *differentialSeed+100 || *differentialTime > 0 && time.Since(began) > *differentialTime {
					t.Logf("%d conversations, up to seed %d", seed-*differentialSeed, seed-1)
					break
				}
				said := newSpeaker(seed, plugin.size).conversation()
				if plugin.name == "file" {
					// What is allocated but was never written is data
					// once it has been read, and there is more read here:
					// what a read that ends beyond the export can have.
					for cookie := range said.statuses {
						said.statuses[cookie] = 0
					}
				}
				var heard [2]string
				var raw [2]bytes.Buffer
				for i, s := range servers {
					var err error
					if heard[i], err = hear(s, said, &raw[i]); err != nil {
						t.Fatalf("seed %d: read from %s: %v after\n%s\nthe client said:\n%x", seed, s.program, err, heard[i], said.bytes)
					}
				}
				if heard[0] != heard[1] {
					t.Fatalf("seed %d: unlike nbdkit in this:\n%s\nthe client said:\n%x\nand this server:\n%x",
						seed, difference(heard[0], heard[1]), said.bytes, raw[1].Bytes())
				}
			}
			for _, s := range servers {
				s.stop()
			}
		})
	}
}

// A speaker makes up what a client says.
type speaker struct {
	*rand.Rand
	size   uint64
	cookie uint64
	listed bool
	said
}

func newSpeaker(seed, size uint64) *speaker {
	return &speaker{Rand: rand.New(rand.NewPCG(seed, size)), size: size}
}

// pick chooses one.
func pick[T any](r interface{ IntN(int) int }, of ...T) T { return of[r.IntN(len(of))] }

// said is a conversation, and what its listener must know.
type said struct {
	bytes    []byte
	damaged  bool
	noZeroes bool
	reads    map[uint64]int    // by cookie, how much they read
	statuses map[uint64]uint64 // by cookie, how much block status is asked about
}

func (r *speaker) conversation() said {
	s := &r.said
	s.reads, s.statuses = map[uint64]int{}, map[uint64]uint64{}
	flags := protocol.FlagCFixedNewstyle | protocol.FlagCNoZeroes
	switch r.IntN(20) {
	case 0:
		flags = protocol.FlagCFixedNewstyle
	case 1:
		flags = protocol.FlagCNoZeroes
	case 2:
		flags = 0
	case 3:
		flags = protocol.ClientFlags(r.Uint32())
	}
	s.noZeroes = flags&protocol.FlagCNoZeroes != 0
	messages := conversation{clientFlags(flags)}
	fixed := flags&protocol.FlagCFixedNewstyle != 0
	for range r.IntN(6) {
		if fixed {
			messages = append(messages, r.option())
		} else {
			messages = append(messages, startSR)
		}
	}
	if fixed && r.IntN(3) > 0 {
		messages = append(messages, startSR)
		if r.IntN(4) > 0 {
			messages = append(messages, setMeta)
		}
	}
	switch n := r.IntN(12); {
	case n == 0 && fixed:
		messages = append(messages, option(protocol.OptAbort, nil))
	case n == 1 || !fixed:
		name := r.name()
		if name == "a" { // which contexts are selected for, perhaps before NBD_OPT_INFO for another
			name = "b"
		}
		messages = append(messages, option(protocol.OptExportName, []byte(name)))
	case n == 2: // nothing
	default:
		messages = append(messages, option(protocol.OptGo, infoRequest("", r.infos()...)))
	}
	options := len(messages)
	for range r.IntN(20) {
		messages = append(messages, r.command())
	}
	if r.IntN(2) == 0 {
		messages = append(messages, hangUp)
	}
	if r.IntN(5) == 0 {
		s.damaged = true
		if fixed {
			r.damage(messages[1:])
		} else {
			r.damage(messages[options:])
		}
	}
	s.bytes = messages.bytes()
	if s.damaged && r.IntN(2) == 0 {
		s.bytes = s.bytes[:min(len(s.bytes), len(messages[:options].bytes())+r.IntN(len(s.bytes)))]
	}
	return *s
}

func (r *speaker) name() string {
	return pick(r, "", "", "a", "some/thing", "ü", strings.Repeat("x", 255), strings.Repeat("y", 4096))
}

func (r *speaker) infos() (infos []protocol.Info) {
	for range r.IntN(5) {
		infos = append(infos, protocol.Info(pick(r, 0, 1, 2, 3, 3, 4, 99)))
	}
	slices.Sort(infos)
	return slices.Compact(infos) // a client must not ask twice
}

func (r *speaker) option() []byte {
	queries := func() (q []string) {
		for range r.IntN(4) {
			q = append(q, pick(r, "base:allocation", "base:", "base:x", "qemu:", "x-a:b", "base:allocation:y", "BASE:allocation"))
		}
		return q
	}
	switch r.IntN(12) {
	case 0:
		if r.listed {
			break
		}
		r.listed = true
		return option(protocol.OptList, nil)
	case 1, 2:
		return option(protocol.OptInfo, infoRequest(r.name(), r.infos()...))
	case 3, 4:
		return option(protocol.OptSetMetaContext, metaQuery("a", queries()...))
	case 5:
		return option(protocol.OptListMetaContext, metaQuery(r.name(), queries()...))
	case 6:
		return option(protocol.OptStartTLS, nil)
	case 7:
		return option(protocol.Option(pick[uint32](r, 0, 4, 12, 1000, 1<<31)), make([]byte, r.IntN(100)))
	case 8: // data where there must be none
		return option(pick(r, protocol.OptList, protocol.OptStructuredReply, protocol.OptStartTLS), make([]byte, 1+r.IntN(100)))
	case 9: // too little or too much data
		if r.IntN(2) == 0 {
			b := metaQuery(r.name(), queries()...)
			m := option(pick(r, protocol.OptListMetaContext, protocol.OptSetMetaContext), b[:r.IntN(len(b))])
			if special(m) {
				break
			}
			return m
		}
		b := infoRequest(r.name(), r.infos()...)
		if r.IntN(2) == 0 {
			b = b[:r.IntN(len(b))]
		} else {
			b = append(b, make([]byte, 1+r.IntN(8))...)
		}
		return option(pick(r, protocol.OptInfo, protocol.OptGo), b)
	}
	return startSR
}

func (r *speaker) command() []byte {
	r.cookie++
	q := protocol.Request{Cookie: r.cookie, Type: protocol.Command(r.IntN(9)), Offset: r.Uint64N(r.size)}
	if q.Type == protocol.CmdDisc {
		q.Type = pick(r, protocol.CmdRead, protocol.CmdWrite)
	}
	switch r.IntN(6) {
	case 0:
		q.Offset = r.size - min(r.size, r.Uint64N(70000))
	case 1:
		q.Offset = pick(r, 0, r.size-1, r.size, r.size+1, 1<<63, 1<<64-1)
	}
	q.Length = 1 + r.Uint64N(1<<r.Uint64N(17))
	switch r.IntN(10) {
	case 0:
		q.Length = pick[uint64](r, 0, 1, 512, 65536)
	case 1:
		if q.Type != protocol.CmdWrite {
			q.Length = pick[uint64](r, 64<<20, 64<<20+1, 1<<31, 1<<32-65537)
		}
	}
	if r.size > 1<<40 && q.Type == protocol.CmdRead {
		q.Length = min(q.Length, 1<<20)
	}
	if r.IntN(3) == 0 {
		q.Flags = pick(r, protocol.CmdFlagFUA, protocol.CmdFlagNoHole, protocol.CmdFlagDF, protocol.CmdFlagReqOne, protocol.CmdFlagFUA|protocol.CmdFlagNoHole,
			protocol.CmdFlagPayloadLen, 1<<7, 1<<15)
	}
	if q.Type == protocol.CmdFlush && r.IntN(4) > 0 {
		q.Offset, q.Length = 0, 0
	}
	if q.Type == protocol.CmdRead {
		r.reads[q.Cookie] = int(q.Length)
	}
	if q.Type == protocol.CmdBlockStatus {
		r.statuses[q.Cookie] = q.Length
	}
	b := q.AppendTo(nil)
	if q.Type == protocol.CmdWrite {
		for range q.Length {
			b = append(b, byte(r.cookie))
		}
	}
	return b
}

// damage changes a few bytes of a few messages, drops some and repeats others.
// Lengths of requests stay below 2^25, so that nobody is asked for more than there
// is time for. Lengths and data of options stay as they are, and none is cut off:
// where the data does not come to its end nbdkit replies to some options and not to
// others. Package server has the conversation that is cut off everywhere.
func (r *speaker) damage(messages conversation) {
	for _, i := range r.Perm(len(messages))[:min(len(messages), 1+r.IntN(3))] {
		m := slices.Clone(messages[i])
		switch r.IntN(4) {
		case 0:
			m = nil
		case 1:
			if !special(m) {
				m = append(m, m...)
			}
		default:
			for range 1 + r.IntN(3) {
				m[r.IntN(len(m))] ^= 1 << r.IntN(8)
			}
			if len(m) >= protocol.OptionHeaderSize && string(m[:8]) == "IHAVEOPT" {
				copy(m[12:], messages[i][12:])
				if special(m) {
					m[11] = 0xff
				}
			}
			if len(m) >= protocol.RequestSize && binary.BigEndian.Uint32(m) == 0x25609513 {
				m[24] &= 1
				m[5] &^= byte(protocol.CmdFlagFastZero)
				m[7] &= 7 // a command that is known
				copy(m[8:16], messages[i][8:16])
				var q protocol.Request
				q.Decode(m)
				delete(r.statuses, q.Cookie)
				if q.Type == protocol.CmdBlockStatus {
					r.statuses[q.Cookie] = q.Length
				}
			}
		}
		messages[i] = m
	}
}

// special tells whether a message is an option that nbdkit answers in its own way,
// or only the first time.
func special(m []byte) bool {
	if len(m) < protocol.OptionHeaderSize {
		return false
	}
	switch opt := protocol.Option(binary.BigEndian.Uint32(m[8:])); opt {
	case protocol.OptList, protocol.OptExtendedHeaders:
		return true
	case protocol.OptListMetaContext, protocol.OptSetMetaContext:
		var q protocol.MetaContextRequest
		err := q.Decode(m[protocol.OptionHeaderSize:])
		return errors.Is(err, protocol.ErrLong) ||
			err != nil && opt == protocol.OptSetMetaContext && slices.Contains(q.Queries, protocol.ContextBaseAllocation)
	}
	return false
}

// hear says it all to a server and returns what comes back, in words, and writes the
// bytes of it to heard. It fails where that is not NBD.
func hear(s *server, v said, heard io.Writer) (string, error) {
	// Not s.dial, which remembers each connection until the test ends.
	conn, err := net.Dial(s.network, s.address)
	if err != nil {
		return "", err
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(patience))
	c := newRaw(s.t, conn, io.TeeReader(conn, heard))
	c.reads = v.reads
	sent := make(chan struct{})
	go func() {
		defer close(sent)
		c.Write(v.bytes) // fails where the server hangs up first
		c.Conn.(interface{ CloseWrite() error }).CloseWrite()
	}()
	var out strings.Builder
	if err := c.listen(&out, v); err != nil && !closed(err) {
		return out.String(), err
	}
	<-sent
	return out.String(), nil
}

func (c *raw) listen(out *strings.Builder, v said) error {
	greeting := make([]byte, protocol.GreetingSize)
	if _, err := io.ReadFull(c.r, greeting); err != nil {
		return err
	}
	structured, answers := false, []string(nil)
	for {
		magic, err := c.r.Peek(8)
		if err != nil {
			return err
		}
		if binary.BigEndian.Uint64(magic) != 0x3e889045565a9 {
			break
		}
		var h protocol.OptionReplyHeader
		b := make([]byte, protocol.OptionReplyHeaderSize)
		if _, err := io.ReadFull(c.r, b); err != nil {
			return err
		}
		h.Decode(b)
		data := make([]byte, h.Length)
		if _, err := io.ReadFull(c.r, data); err != nil {
			return err
		}
		if h.Option == protocol.OptStructuredReply && h.Type == protocol.RepAck {
			structured = true
		}
		line := fmt.Sprintf("%v %v %x\n", h.Option, h.Type, data)
		switch {
		case h.Type.IsError(): // what came before it does not count
			answers = nil
			fmt.Fprintf(out, "%v %v\n", h.Option, h.Type)
		case h.Type == protocol.RepAck:
			out.WriteString(strings.Join(slices.Compact(append(answers, line)), ""))
			answers = nil
		default:
			answers = append(answers, line)
		}
	}
	if magic, _ := c.r.Peek(4); len(magic) == 4 {
		if _, ok := protocol.ReplyMagic(magic); !ok {
			// NBD_OPT_EXPORT_NAME was answered.
			b := make([]byte, 10+124)
			if v.noZeroes {
				b = b[:10]
			}
			n, err := io.ReadFull(c.r, b)
			fmt.Fprintf(out, "export %x\n", b[:n])
			if err != nil {
				return err
			}
		}
	}
	if v.damaged && !structured {
		// Nobody knows where the reply to a damaged read ends, nor in which
		// order they come.
		_, err := io.Copy(io.Discard, c.r)
		return err
	}
	if structured {
		c.reads = nil // a simple reply has no data, and damage may have made another command of a read
	}
	var replies []string
	for {
		r, err := c.nextReply()
		if err != nil {
			// Their order is the server's business.
			slices.Sort(replies)
			out.WriteString(strings.Join(replies, ""))
			return err
		}
		if r.errno != 0 {
			r.data = nil
		}
		if asked, ok := v.statuses[r.cookie]; ok {
			r.data = runs(r.data, asked)
		}
		replies = append(replies, fmt.Sprintf("cookie %d: %v %x\n", r.cookie, r.errno, r.data))
	}
}

// runs joins the runs of a block status that say the same, and cuts off what is
// beyond the bytes asked about.
func runs(b []byte, asked uint64) []byte {
	var out []byte
	for ; len(b) >= 8 && asked > 0; b = b[8:] {
		n, flags := min(asked, uint64(binary.BigEndian.Uint32(b))), binary.BigEndian.Uint32(b[4:])
		asked -= n
		if k := len(out) - 12; k >= 0 && binary.BigEndian.Uint32(out[k+8:]) == flags {
			binary.BigEndian.PutUint64(out[k:], binary.BigEndian.Uint64(out[k:])+n)
			continue
		}
		out = binary.BigEndian.AppendUint64(out, n)
		out = binary.BigEndian.AppendUint32(out, flags)
	}
	return out
}
