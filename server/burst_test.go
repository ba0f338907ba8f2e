package server

import (
	"bytes"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"nbdhost/backend"
	"nbdhost/client"
	"nbdhost/protocol"
)

const burstSize = 512 // of each request, in bytes

// burstConn is a connection whose calls are short enough for bursts.
func burstConn(t *testing.T, h *hooked, o Options) (*Server, net.Conn, *conn) {
	t.Helper()
	s, _, path := serve(t, h, o)
	nc := rawFor(t, path, o)
	var c *conn
	await(t, "bursts are made", func() bool {
		ask(t, nc, sampleCalls)
		c = only(t, s)
		return c.pace.cost.Load() <= int64(burstTime/32) && !c.pace.slow.Load()
	})
	return s, nc, c
}

// alternating are n requests in one piece: a write, a read of what it wrote, and so on. What
// follows behind them is taken as it is.
func alternating(n int, behind ...byte) (b []byte) {
	for i := range n {
		r := protocol.Request{Type: protocol.CmdWrite, Cookie: uint64(i), Offset: burstOffset(i), Length: burstSize}
		if i%2 == 1 {
			r.Type = protocol.CmdRead
		}
		b = append(b, request(r)...)
		if i%2 == 0 {
			b = append(b, burstData(i)...)
		}
	}
	return append(b, behind...)
}

func burstOffset(i int) uint64 { return 1<<20 + uint64(i/2)*burstSize }

func burstData(i int) []byte { return bytes.Repeat([]byte{byte(i/2 + 1)}, burstSize) }

// burstReply receives the next reply, and what was read.
func burstReply(t *testing.T, nc net.Conn) (r protocol.SimpleReply, data []byte) {
	t.Helper()
	return readData(t, nc, func(cookie uint64) int { return int(cookie%2) * burstSize })
}

// Requests in hand are carried out in their order, each once, and each gets its own reply:
// also behind one that fails, that loses the connection or that ends it, which those behind
// it in the burst must not notice.
func TestBurst(t *testing.T) {
	const n = 12
	for _, tt := range []struct {
		what              string
		fail, hold, leave []int               // what the call for these requests does
		model             backend.ThreadModel // 0 is that of newHooked
		o                 Options
		bursts            []int // how many calls each makes, as far as that is sure
	}{
		{what: "none fails", bursts: []int{n}},
		{what: "the first fails", fail: []int{0}, bursts: []int{1, n - 1}},
		{what: "one in the middle fails", fail: []int{5}, bursts: []int{6, n - 6}},
		{what: "the last fails", fail: []int{n - 1}, bursts: []int{n}},
		{what: "all fail", fail: []int{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11}},
		{what: "calls are serialized", fail: []int{3}, model: backend.SerializeAllRequests, bursts: []int{4, n - 4}},
		{what: "TLS", fail: []int{4}, o: Options{TLS: sealServer}},
		{what: "one thread", fail: []int{6}, o: Options{Threads: 1}, bursts: []int{7, n - 7}},
		{what: "the first loses the connection", hold: []int{0}},
		{what: "a read loses the connection", hold: []int{5}},
		{what: "a write loses the connection and fails", hold: []int{6}, fail: []int{6, 8}},
		{what: "several lose the connection", hold: []int{2, 7}},
		{what: "the last loses the connection", hold: []int{n - 1}},
		{what: "TLS, and one loses the connection", hold: []int{4}, o: Options{TLS: sealServer}},
		{what: "one ends the connection", leave: []int{5}, bursts: []int{6}},
		{what: "slow requests are logged", o: Options{SlowRequest: time.Minute}, bursts: []int{}},
		{what: "requests are limited", o: Options{Limits: Limits{Requests: 1}}, bursts: []int{}},
	} {
		t.Run(tt.what, func(t *testing.T) {
			h := newHooked()
			if tt.model != 0 {
				h.model = tt.model
			}
			var conn atomic.Pointer[conn]
			var mu sync.Mutex // of what follows
			var calls, bursts []int
			entered, release := make(chan int, n), make(chan struct{})
			defer func() { close(release) }()
			h.before = func(call *backend.Call, cb backend.Callback, off uint64) error {
				if off < 1<<20 || cb != backend.Pread && cb != backend.Pwrite {
					return nil
				}
				i := int(off-1<<20) / burstSize * 2
				if cb == backend.Pread {
					i++
				}
				mu.Lock()
				// A burst goes on until a call fails. Where none is held this is the reader's goroutine.
				if len(tt.hold) == 0 && conn.Load().reader.Load().burst.n > 0 {
					if len(bursts) == 0 || slices.Contains(tt.fail, i-1) {
						bursts = append(bursts, 0)
					}
					bursts[len(bursts)-1]++
				}
				calls = append(calls, i)
				mu.Unlock()
				if slices.Contains(tt.hold, i) {
					entered <- i
					<-release
				}
				if slices.Contains(tt.leave, i) {
					call.Conn.Disconnect(false)
				}
				if slices.Contains(tt.fail, i) {
					return &backend.Error{Module: "hooked", Op: cb.String(), Errno: syscall.EIO, Msg: "bad"}
				}
				return nil
			}
			s, nc, c := burstConn(t, h, tt.o)
			conn.Store(c)
			if len(tt.hold) == 0 { // no call is taken for a long one, however busy the machine is
				eventually(t, s, func(Stats) bool { return c.watched.CompareAndSwap(false, true) })
			}
			before := s.Stats()
			if _, err := nc.Write(alternating(n)); err != nil {
				t.Fatal(err)
			}
			for _, i := range tt.hold { // each gets there although those before it wait
				if got := <-entered; got != i {
					t.Errorf("call %d is under way, need %d", got, i)
				}
			}
			var order []int
			var failed uint64
			for k := range n {
				if k == n-len(tt.hold) {
					for range tt.hold {
						release <- struct{}{}
					}
				}
				r, data := burstReply(t, nc)
				i := int(r.Cookie)
				order = append(order, i)
				want := protocol.Errno(0)
				switch {
				case slices.Contains(tt.fail, i):
					want = protocol.EIO
					failed++
				case len(tt.leave) > 0 && i > tt.leave[0]:
					want = protocol.ESHUTDOWN
					failed++
				}
				if r.Errno != want {
					t.Errorf("reply to %d: got %v, need %v", i, r.Errno, want)
				}
				if data != nil && !slices.Contains(tt.fail, i-1) && !slices.Contains(tt.hold, i-1) && !bytes.Equal(data, burstData(i)) {
					t.Errorf("reply to %d: got data %x, need %x", i, data[:1], burstData(i)[:1])
				}
			}
			all := make([]int, n)
			for i := range all {
				all[i] = i
			}
			made := all
			if len(tt.leave) > 0 {
				made = all[:tt.leave[0]+1]
			}
			mu.Lock()
			defer mu.Unlock()
			if !slices.Equal(calls, made) {
				t.Errorf("calls were made for %v, need %v", calls, made)
			}
			if len(tt.hold) == 0 && !slices.Equal(order, all) {
				t.Errorf("replies came in the order %v", order)
			}
			if tt.bursts != nil && !slices.Equal(bursts, tt.bursts) {
				t.Errorf("bursts made %v calls, need %v", bursts, tt.bursts)
			}
			if slices.Sort(order); !slices.Equal(order, all) {
				t.Errorf("replies came to %v", order)
			}
			eventually(t, s, func(st Stats) bool { return st.Operations()-before.Operations() == n })
			if got := s.Stats().Bytes() - before.Bytes(); got != (n-failed)*burstSize {
				t.Errorf("%d bytes were counted, need %d", got, (n-failed)*burstSize)
			}
			if got := callsOf(s, backend.Pread) + callsOf(s, backend.Pwrite); got < uint64(len(made)) {
				t.Errorf("%d calls of the module were counted, need at least %d", got, len(made))
			}
		})
	}
}

// callsOf is how often the chain's innermost module was called.
func callsOf(s *Server, cb backend.Callback) (n uint64) {
	calls := s.opts.Chain.Calls()[0]
	calls.Each(func(x backend.Callback, k uint64) {
		if x == cb {
			n = k
		}
	})
	return n
}

// What cannot be part of a burst ends it, and is carried out after it.
func TestBurstEnds(t *testing.T) {
	flush := protocol.Request{Type: protocol.CmdFlush, Cookie: 100}
	fua := protocol.Request{Type: protocol.CmdWrite, Flags: protocol.CmdFlagFUA, Cookie: 100, Offset: 1 << 20, Length: burstSize}
	long := protocol.Request{Type: protocol.CmdRead, Cookie: 100, Offset: 1 << 20, Length: maxBurstLength + 1}
	beyond := protocol.Request{Type: protocol.CmdRead, Cookie: 100, Offset: 1 << 30, Length: burstSize}
	write := protocol.Request{Type: protocol.CmdWrite, Cookie: 100, Offset: 1 << 20, Length: burstSize}
	for _, tt := range []struct {
		what   string
		behind []byte // the requests
		later  []byte // sent when the replies to those have come
		errno  protocol.Errno
		data   int
		ends   bool // the connection
	}{
		{what: "another command", behind: request(flush)},
		{what: "a flag", behind: append(request(fua), make([]byte, burstSize)...)},
		{what: "a long read", behind: request(long), data: maxBurstLength + 1},
		{what: "a read beyond the end", behind: request(beyond), errno: protocol.EINVAL},
		{what: "a part of a header", behind: request(flush)[:10], later: request(flush)[10:]},
		{what: "a part of a payload", behind: append(request(write), make([]byte, 100)...), later: make([]byte, burstSize-100)},
		{what: "garbage", behind: bytes.Repeat([]byte{0xee}, 28), ends: true},
		{what: "the end of the conversation", behind: request(protocol.Request{Type: protocol.CmdDisc}), ends: true},
	} {
		for _, n := range []int{1, 8} {
			t.Run(fmt.Sprintf("%s behind %d", tt.what, n), func(t *testing.T) {
				h := newHooked()
				var conn atomic.Pointer[conn]
				var calls atomic.Int32 // of those that can be
				h.before = func(call *backend.Call, _ backend.Callback, off uint64) error {
					if off >= 1<<20 && call.Request.Cookie < 100 {
						calls.Add(1)
					}
					if call.Request.Cookie == 100 && tt.what != "a part of a payload" && conn.Load().reader.Load().burst.n > 0 {
						t.Error("it was part of a burst")
					}
					return nil
				}
				_, nc, c := burstConn(t, h, Options{})
				conn.Store(c)
				if _, err := nc.Write(alternating(n, tt.behind...)); err != nil {
					t.Fatal(err)
				}
				for i := range n {
					if r, data := burstReply(t, nc); r.Cookie != uint64(i) || r.Errno != 0 || data != nil && !bytes.Equal(data, burstData(i)) {
						t.Fatalf("request %d: got %+v", i, r)
					}
				}
				if calls.Load() != int32(n) {
					t.Errorf("%d calls were made, need %d", calls.Load(), n)
				}
				if tt.ends {
					if k, err := nc.Read(make([]byte, 1)); err != io.EOF {
						t.Fatalf("got %d bytes, %v: need the end", k, err)
					}
					return
				}
				if _, err := nc.Write(tt.later); err != nil {
					t.Fatal(err)
				}
				if r := readReply(t, nc, tt.data); r.Cookie != 100 || r.Errno != tt.errno {
					t.Fatalf("got %+v", r)
				}
			})
		}
	}
}

// More requests than fit one burst, or one batch of replies, are carried out all the same.
func TestManyBursts(t *testing.T) {
	for _, size := range []int{1, 512, 4096, maxBurstLength} {
		t.Run(fmt.Sprint(size), func(t *testing.T) {
			_, nc, _ := burstConn(t, newHooked(), Options{})
			askTogether(t, nc, 5*backend.MaxBurst+1, size)
		})
	}
}

// What waited for a call that lost the connection is sent before the reply to that call,
// whoever is first.
func TestSenderOrder(t *testing.T) {
	s, _, path := serve(t, newHooked(), Options{})
	nc := raw(t, path)
	ask(t, nc, 1)
	sender := &only(t, s).sender
	reply := func(text string) *batch {
		b := &batch{}
		if err := b.grow(backend.NewConnID(), 0, len(text)); err != nil {
			t.Fatal(err)
		}
		b.end += copy(b.buf.B[b.start:], text)
		return b
	}
	for _, tt := range []struct{ put, send []string }{
		{[]string{"before"}, []string{"after"}},
		{[]string{"one", "two"}, []string{"three", "", "four"}},
		{[]string{"alone"}, []string{""}},
	} {
		want := strings.Join(append(tt.put, tt.send...), "")
		for _, text := range tt.put {
			sender.put(reply(text))
		}
		for _, text := range tt.send {
			b := reply(text)
			sender.send(b)
			b.release()
		}
		got := make([]byte, len(want))
		if _, err := io.ReadFull(nc, got); err != nil || string(got) != want {
			t.Errorf("got %q, %v, need %q", got, err, want)
		}
	}
}

// Random small reads and writes, of which some fail and some take long, against a copy of what
// the disk must hold.
func TestBurstData(t *testing.T) {
	backends := map[string]func(h *hooked) backend.Backend{
		"parallel": func(h *hooked) backend.Backend { return h },
		"pinned": func(h *hooked) backend.Backend {
			h.model = backend.SerializeAllRequests
			return &pinned{hooked: h}
		},
	}
	for replies, o := range map[string]client.Options{"simple": {SimpleReplies: true}, "structured": {CompactHeaders: true}, "extended": {}} {
		for kind, of := range backends {
			t.Run(kind+" "+replies, func(t *testing.T) {
				h := newHooked()
				h.before = func(_ *backend.Call, cb backend.Callback, _ uint64) error {
					if cb != backend.Pread && cb != backend.Pwrite {
						return nil
					}
					switch rand.IntN(200) {
					case 0, 1, 2:
						return &backend.Error{Module: "hooked", Op: cb.String(), Errno: syscall.EIO, Msg: "bad"}
					case 3:
						time.Sleep(3 * time.Millisecond) // a call that loses the connection
					}
					return nil
				}
				_, uri, _ := serveBackend(t, of(h), h, Options{})
				c := dial(t, uri, &o)
				var lanes sync.WaitGroup
				for lane := range 16 {
					lanes.Go(func() { burstLane(t, c, uint64(lane)<<20) })
				}
				lanes.Wait()
			})
		}
	}
}

// burstLane makes requests one after the other, on a part of the disk that is its own.
func burstLane(t *testing.T, c *client.Conn, base uint64) {
	want := make([]byte, 64<<10)
	buf := make([]byte, len(want))
	for i := range 300 {
		n := 1 + rand.IntN(maxBurstLength)
		off := rand.IntN(len(want) - n + 1)
		p := buf[:n]
		var err error
		if i%2 == 0 {
			for j := range p {
				p[j] = byte(i + j)
			}
			if err = c.Pwrite(p, base+uint64(off), 0); err == nil {
				copy(want[off:], p)
			}
		} else if err = c.Pread(p, base+uint64(off)); err == nil && !bytes.Equal(p, want[off:off+n]) {
			t.Errorf("read %d of %d at %d differs", i, n, off)
			return
		}
		if err != nil && errnoOf(err) != protocol.EIO {
			t.Error(err)
			return
		}
	}
}
