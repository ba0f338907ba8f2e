package cshim_test

import (
	"net"
	"os"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"unsafe"

	"nbdhost/cshim"
)

func TestArguments(t *testing.T) {
	f := calls()
	fn := func(name string) unsafe.Pointer { return f("see_" + name) }
	h := cshim.CallOpen(nil, fn("open"), true).Ptr
	buf := cshim.CallOpen(nil, fn("open"), true).Ptr // any C memory
	_, ctx := connection(t, 1, -1, "")
	const (
		count  = ^uint32(0)
		offset = ^uint64(0) - 5
		flags  = uint32(1) << 31
	)
	data := make([]byte, 16)
	dp := unsafe.Pointer(&data[0])
	dn := uint64(uintptr(dp))
	ret := func(want int64, r cshim.Result) {
		t.Helper()
		if r.Ret != want || r.Errno != 0 || r.Msg != "" {
			t.Errorf("got %+v, need %d", r, want)
		}
	}
	for _, tt := range []struct {
		name string
		call func()
		want []uint64
	}{
		{"void", func() { cshim.CallVoid(ctx, fn("void")) }, []uint64{1}},
		{"int", func() { ret(42, cshim.CallInt(ctx, fn("int"))) }, []uint64{2}},
		{"config", func() {
			ret(0, cshim.CallConfig(ctx, fn("config"), cshim.NewCStr("key"), cshim.NewCStr("va\x00lue")))
		}, []uint64{3, 3, 2}},
		{"preconnect", func() { ret(0, cshim.CallPreconnect(ctx, fn("preconnect"), true)) }, []uint64{4, 1}},
		{"open", func() {
			if r := cshim.CallOpen(ctx, fn("open"), true); r.Ptr != h || r.Errno != 0 {
				t.Errorf("got %+v", r)
			}
		}, []uint64{5, 1}},
		{"close", func() { cshim.CallClose(ctx, fn("close"), h) }, []uint64{6, 1}},
		{"handle", func() { ret(2, cshim.CallHandleInt(ctx, fn("handle"), h)) }, []uint64{7, 1}},
		{"size", func() { ret(1<<63-1, cshim.CallHandleInt64(ctx, fn("size"), h)) }, []uint64{8, 1}},
		{"string", func() {
			if s, ok := cshim.CallHandleString(ctx, fn("string"), h); s != "text" || !ok {
				t.Errorf("got %q, %v", s, ok)
			}
		}, []uint64{9, 1}},
		{"default", func() {
			if s, ok := cshim.CallDefaultExport(ctx, fn("default"), false, true); s != "name" || !ok {
				t.Errorf("got %q, %v", s, ok)
			}
		}, []uint64{10, 0, 1}},
		{"block_size", func() {
			minimum, preferred, maximum, r := cshim.CallBlockSize(ctx, fn("block_size"), h)
			ret(0, r)
			if minimum != 1 || preferred != 4096 || maximum != 1<<32-1 {
				t.Errorf("got %d, %d, %d", minimum, preferred, maximum)
			}
		}, []uint64{11, 1}},
		{"pread", func() {
			ret(0, cshim.CallPread(&cshim.Data{Ctx: ctx, Worker: 3, Fn: fn("pread"), Handle: h, Buf: dp, Count: 16, Offset: offset, Flags: flags}))
			if string(data) != strings.Repeat("r", 16) {
				t.Errorf("got %q", data)
			}
		}, []uint64{12, 1, 16, offset, uint64(flags), dn}},
		{"pwrite", func() {
			ret(0, cshim.CallPwrite(&cshim.Data{Ctx: ctx, Fn: fn("pwrite"), Handle: h, Buf: dp, Count: count, Offset: offset, Flags: flags}))
		},
			[]uint64{13, 1, uint64(count), offset, uint64(flags), dn}},
		{"flush", func() { ret(0, cshim.CallFlush(&cshim.Data{Ctx: ctx, Fn: fn("flush"), Handle: h, Flags: flags})) }, []uint64{14, 1, uint64(flags)}},
		{"range", func() {
			ret(0, cshim.CallRange(&cshim.Data{Ctx: ctx, Fn: fn("range"), Handle: h, Count: count, Offset: offset, Flags: flags}))
		},
			[]uint64{15, 1, uint64(count), offset, uint64(flags)}},
		{"extents", func() {
			var got extents
			r, err := cshim.CallExtents(&cshim.Data{Ctx: ctx, Fn: fn("extents"), Handle: h, Count: 100, Offset: 1000, Flags: flags}, got.add)
			ret(0, r)
			if want := (extents{{1000, 20, 1}, {1020, 1<<32 - 1, 3}}); err != nil || !slices.Equal(got, want) {
				t.Errorf("got %v, %v, need %v", got, err, want)
			}
			// The first error is the last call.
			n := 0
			if _, err := cshim.CallExtents(&cshim.Data{Ctx: ctx, Fn: fn("extents"), Handle: h, Count: 100, Offset: 1000, Flags: flags}, func(uint64, uint64, uint32) error {
				n++
				return syscall.ERANGE
			}); err != syscall.ERANGE || n != 1 {
				t.Errorf("got %v after %d calls, need ERANGE after 1", err, n)
			}
		}, []uint64{16, 1, 100, 1000, uint64(flags)}},
		{"pread_v1", func() {
			ret(0, cshim.CallPreadV1(&cshim.Data{Ctx: ctx, Fn: fn("pread_v1"), Handle: h, Buf: dp, Count: count, Offset: offset}))
		},
			[]uint64{17, 1, uint64(count), offset, 0, dn}},
		{"pwrite_v1", func() {
			ret(0, cshim.CallPwriteV1(&cshim.Data{Ctx: ctx, Fn: fn("pwrite_v1"), Handle: h, Buf: dp, Count: count, Offset: offset}))
		},
			[]uint64{18, 1, uint64(count), offset, 0, dn}},
		{"flush_v1", func() { ret(0, cshim.CallFlushV1(&cshim.Data{Ctx: ctx, Fn: fn("flush_v1"), Handle: h})) }, []uint64{19, 1}},
		{"trim_v1", func() {
			ret(0, cshim.CallTrimV1(&cshim.Data{Ctx: ctx, Fn: fn("trim_v1"), Handle: h, Count: count, Offset: offset}))
		},
			[]uint64{20, 1, uint64(count), offset}},
		{"zero_v1", func() {
			ret(0, cshim.CallZeroV1(&cshim.Data{Ctx: ctx, Fn: fn("zero_v1"), Handle: h, Count: count, Offset: offset, Flags: 1}))
		},
			[]uint64{21, 1, uint64(count), offset, 1}},
		{"list", func() {
			got, r := cshim.CallListExports(ctx, fn("list"), true, true)
			ret(0, r)
			want := []cshim.Export{{Name: "a", Description: "first"}, {Name: "b"}, {Default: true}}
			if !slices.Equal(got, want) {
				t.Errorf("got %v, need %v", got, want)
			}
		}, []uint64{22, 1, 1}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			tt.call()
			if got := seen(f)[:len(tt.want)]; !slices.Equal(got, tt.want) {
				t.Errorf("the callback got %v, need %v", got, tt.want)
			}
		})
	}
	runtime.KeepAlive(buf)
}

func TestErrors(t *testing.T) {
	f := calls()
	rec := record(t, "", true)
	preserved := cshim.NewContext(nil, "", false, true)
	defer preserved.Free()
	const (
		text = "second 2: No space left on device"
		// What is negative, but not -1, is explained.
		unnamed  = "module: callback returned -5: need at least 0, or -1 for a failure"
		named    = "odd: can_write returned -2147483648: need at least 0, or -1 for a failure"
		noString = "intern string: no string given"
	)
	cshim.NameCallback(f("fail_oddly_named"), "plugin", "odd", "can_write")
	for _, tt := range []struct {
		fn  string
		ctx *cshim.Context
		err syscall.Errno
		msg string
	}{
		{"fail_plain", nil, syscall.EIO, ""},
		{"fail_plain", preserved, syscall.EIO, ""},
		{"fail_errno", nil, syscall.EIO, ""},
		{"fail_errno", preserved, syscall.ENOSPC, ""},
		{"fail_plain", preserved, syscall.EIO, ""}, // not the errno of the call before
		{"fail_set", nil, syscall.ESHUTDOWN, ""},
		{"fail_set", preserved, syscall.ESHUTDOWN, ""},
		{"fail_text", nil, syscall.EIO, text},
		{"fail_text", preserved, syscall.ENOSPC, text},
		{"fail_oddly", nil, syscall.EIO, unnamed},
		{"fail_oddly", preserved, syscall.ENOSPC, unnamed},
		{"fail_oddly_named", nil, syscall.EIO, named},
		{"fail_with_null", nil, syscall.EIO, noString},
	} {
		failed(t, cshim.CallHandleInt(tt.ctx, f(tt.fn), nil), tt.err, tt.msg)
	}
	failed(t, cshim.CallOpen(nil, f("open_fails"), false), syscall.EIO, "no")
	if r := cshim.CallHandleInt(nil, f("succeed_after_error"), nil); r != (cshim.Result{}) {
		t.Errorf("got %+v, need success", r)
	}
	rec.expect(t, "error[0].-1: first", "error[0].-1: "+text, "error[0].-1: first", "error[0].-1: "+text,
		"error[0].-1: "+unnamed, "error[0].-1: "+unnamed, "error[0].-1: why", "error[0].-1: "+named,
		"debug[0].-1: ", "error[0].-1: ", "error[0].-1: "+noString,
		"error[0].-1: no", "error[0].-1: not so bad")
}

func TestErrnoIsKept(t *testing.T) {
	for _, verbose := range []bool{false, true} {
		record(t, "", verbose)
		if r := cshim.CallInt(nil, calls()("keep_errno")); r.Ret != int64(syscall.EXDEV) {
			t.Errorf("got errno %d, need %d", r.Ret, syscall.EXDEV)
		}
	}
}

func TestFailedLists(t *testing.T) {
	f := calls()
	record(t, "", false)
	exports, r := cshim.CallListExports(nil, f("no_exports"), false, false)
	failed(t, r, syscall.EIO, "no list")
	var list extents
	r, err := cshim.CallExtents(&cshim.Data{Fn: f("no_extents"), Count: 10}, list.add)
	failed(t, r, syscall.ENOTSUP, "")
	if exports != nil || list != nil || err != nil {
		t.Errorf("got %v, %v, %v", exports, list, err)
	}
	// A range that no list can hold is refused before the callback sees it.
	r, _ = cshim.CallExtents(&cshim.Data{Fn: f("no_extents"), Count: 10, Offset: 1 << 63}, nil)
	if r.Errno != syscall.ERANGE || r.Msg == "" {
		t.Errorf("got %+v, need ERANGE", r)
	}
	if s, ok := cshim.CallHandleString(nil, f("null_string"), nil); ok {
		t.Errorf("got %q", s)
	}
	if s, ok := cshim.CallHandleString(nil, f("long_string"), nil); !ok || len(s) != 4097 {
		t.Errorf("got %d bytes, need 4097", len(s))
	}
}

// A callback's message reaches Go, and Go calls a module again.
func TestNestedCalls(t *testing.T) {
	f := calls()
	rec := record(t, "", true)
	_, one := connection(t, 1, -1, "one")
	_, two := connection(t, 2, -1, "two")
	rec.onLog = func(text string) {
		if text == "nest" {
			failed(t, cshim.CallPreconnect(two, f("fail_plain"), false), syscall.EIO, "")
			failed(t, cshim.CallFlush(&cshim.Data{Ctx: two, Worker: 6, Fn: f("inner")}), syscall.EPERM, "inner two")
		}
	}
	failed(t, cshim.CallFlush(&cshim.Data{Ctx: one, Worker: 5, Fn: f("outer")}), syscall.ENOSPC, "outer one")
	rec.expect(t, "error[1].5: outer one", "error[2].6: inner two", "debug[1].5: nest", "debug[1].5: outer is one")
}

func TestConcurrentCalls(t *testing.T) {
	f := calls()
	record(t, "", false)
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			name := strings.Repeat("x", i)
			conn := cshim.NewConn(uint64(i), -1)
			ctx := cshim.NewContext(conn, name, true, false)
			for range 200 {
				if s, ok := cshim.CallHandleString(ctx, f("show_name"), nil); s != name || !ok {
					t.Errorf("got %q, need %q", s, name)
				}
				if s, ok := cshim.CallHandleString(ctx, f("intern"), nil); s != "interned-7" || !ok {
					t.Errorf("got %q", s)
				}
				failed(t, cshim.CallHandleInt(ctx, f("inner"), nil), syscall.EPERM, "inner "+name)
			}
			ctx.Free()
			conn.Free()
		})
	}
	wg.Wait()
}

func TestThreadOfModule(t *testing.T) {
	rec := record(t, "", true)
	_, ctx := connection(t, 7, -1, "x")
	// Neither the thread's error nor its message is the call's.
	failed(t, cshim.CallHandleInt(ctx, calls()("from_thread"), nil), syscall.EIO, "")
	rec.expect(t, "error[0].-1: from a thread",
		"error[0].-1: get export name: none has been negotiated in this thread", "debug[0].-1: name not set")
}

func TestForkedChild(t *testing.T) {
	rec := record(t, "srv", true)
	_, ctx := connection(t, 7, -1, "x")
	stop := make(chan struct{})
	var wg sync.WaitGroup
	for range 4 { // a runtime at work
		wg.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
					_ = make([]byte, 1<<16)
					runtime.Gosched()
				}
			}
		})
	}
	for range 25 {
		got, _ := cshim.CallHandleString(ctx, calls()("forks"), nil)
		if want := "nbdkit[srv]: error: from a child 1\nnbdkit[srv]: debug: debug\n"; got != want {
			t.Fatalf("got %q, need %q", got, want)
		}
	}
	close(stop)
	wg.Wait()
	rec.expect(t)
}

func TestHost(t *testing.T) {
	f := calls()
	rec := record(t, "name", true)
	conn, ctx := connection(t, 3, -1, "")
	cshim.CallVoid(nil, f("shutdown_server"))
	cshim.CallHandleInt(ctx, f("disconnect"), nil)
	cshim.CallHandleInt(nil, f("disconnect"), nil)
	const ignored = "debug[0].-1: disconnect: ignored outside a connection"
	rec.expect(t, "shutdown", "disconnect 3 false", "disconnect 3 true", ignored, ignored)

	if s, ok := cshim.CallHandleString(ctx, f("server_name"), nil); s != "name" || !ok {
		t.Errorf("name: got %q", s)
	}
	cshim.SetHost(cshim.Host{})
	if s, ok := cshim.CallHandleString(ctx, f("server_name"), nil); ok {
		t.Errorf("name: got %q, need none", s)
	}
	for _, on := range []bool{true, false, true} {
		cshim.SetStdioSafe(on)
		conn.SetTLS(on)
		if r := cshim.CallInt(ctx, f("stdio_safe")); (r.Ret == 1) != on {
			t.Errorf("stdio_safe: got %d, need %v", r.Ret, on)
		}
		if r := cshim.CallHandleInt(ctx, f("show_tls"), nil); (r.Ret == 1) != on {
			t.Errorf("is_tls: got %d, need %v", r.Ret, on)
		}
		shared := cshim.NewContext(nil, "", true, false) // by connections
		shared.SetTLS(on)
		if r := cshim.CallHandleInt(shared, f("show_tls"), nil); (r.Ret == 1) != on || r.Ret < 0 {
			t.Errorf("is_tls in a shared session: got %d, need %v", r.Ret, on)
		}
		shared.Free()
	}
	if s, ok := cshim.CallHandleString(ctx, f("show_name"), nil); s != "" || !ok {
		t.Errorf("export name: got %q, %v", s, ok)
	}
	want := regexp.MustCompile(`^20\d\d-\d\d-\d\d \d\d:\d\d:\d\d\.\d{6}$`)
	if s, _ := cshim.CallHandleString(ctx, f("timestamp"), nil); !want.MatchString(s) {
		t.Errorf("timestamp: got %q", s)
	}
	if r := cshim.CallInt(nil, f("delay_halves")); r.Ret != 0 {
		t.Error("nbdkit_parse_delay: wrong result")
	}
}

func TestPanicStaysInGo(t *testing.T) {
	rec := record(t, "", false)
	rec.onLog = func(string) { panic("in Log, on purpose") }
	failed(t, cshim.CallHandleInt(nil, calls()("fail_text"), nil), syscall.EIO, "second 2: No space left on device")
}

func TestPeer(t *testing.T) {
	f := calls()
	record(t, "", false)
	for _, network := range []string{"unix", "tcp"} {
		t.Run(network, func(t *testing.T) {
			addr := map[string]string{"unix": t.TempDir() + "/sock", "tcp": "127.0.0.1:0"}[network]
			l, err := net.Listen(network, addr)
			if err != nil {
				t.Fatal(err)
			}
			defer l.Close()
			client, err := net.Dial(network, l.Addr().String())
			if err != nil {
				t.Fatal(err)
			}
			defer client.Close()
			server, err := l.Accept()
			if err != nil {
				t.Fatal(err)
			}
			defer server.Close()
			file, err := server.(interface{ File() (*os.File, error) }).File()
			if err != nil {
				t.Fatal(err)
			}
			defer file.Close()
			conn, ctx := connection(t, 1, int(file.Fd()), "")

			family, pid, uid, gid := syscall.AF_UNIX, os.Getpid(), os.Getuid(), os.Getgid()
			if network == "tcp" {
				family, pid, uid, gid = syscall.AF_INET, -1, -1, -1
			}
			for fn, want := range map[string]int{"peer_pid": pid, "peer_uid": uid, "peer_gid": gid} {
				if r := cshim.CallHandleInt64(ctx, f(fn), nil); r.Ret != int64(want) || (want < 0) != (r.Msg != "") {
					t.Errorf("%s: got %+v, need %d", fn, r, want)
				}
			}
			if r := cshim.CallHandleInt(ctx, f("peer_family"), nil); r.Ret != int64(family) {
				t.Errorf("peer name: got family %d, need %d", r.Ret, family)
			}
			for fn, want := range map[string]string{"peer_dn": "CN=me", "peer_issuer": "CN=ca"} {
				conn.SetTLSDN("", "")
				if s, ok := cshim.CallHandleString(ctx, f(fn), nil); s != "" || !ok {
					t.Errorf("%s: got %q, %v", fn, s, ok)
				}
				conn.SetTLSDN("CN=me", "CN=ca")
				if s, ok := cshim.CallHandleString(ctx, f(fn), nil); s != want || !ok {
					t.Errorf("%s: got %q, %v, need %q", fn, s, ok, want)
				}
			}
			// Where there is no label it is an error; both are right, neither may crash.
			if s, ok := cshim.CallHandleString(ctx, f("peer_label"), nil); ok {
				t.Logf("label %q", s)
			}

			if r := cshim.CallHandleInt(ctx, f("sleep_short"), nil); r.Ret != 0 {
				t.Errorf("sleep: got %+v", r)
			}
			if r := cshim.CallHandleInt(ctx, f("sleep_zero"), nil); r.Ret != 0 {
				t.Errorf("sleep: got %+v", r)
			}
			client.Close()
			preserved := cshim.NewContext(conn, "", true, true)
			defer preserved.Free()
			failed(t, cshim.CallHandleInt(preserved, f("sleep_long"), nil), syscall.ESHUTDOWN,
				"sleep: ended early, since the client has gone")
		})
	}
	for _, fn := range []string{"peer_dn", "peer_issuer", "peer_label"} {
		if s, ok := cshim.CallHandleString(nil, f(fn), nil); ok {
			t.Errorf("%s outside a connection: got %q", fn, s)
		}
	}
}

// The expected lines are what nbdkit 1.48.1 prints for the same calls.
func TestHexdump(t *testing.T) {
	rec := record(t, "", true)
	cshim.CallVoid(nil, calls()("hexdumps"))
	var want []string
	for _, line := range []string{
		`p: 00000000: 1e 25 2c 33 3a 41 48 4f  56 5d 64 6b 72 79 80 87  |.%,3:AHOV]dkry..|`,
		`p: 00000010: 8e 95 9c a3 aa b1 b8 bf  c6 cd d4 db e2 e9 f0 f7  |................|`,
		`p: 00000020: fe 05 0c 13 1a 21 28 2f                           |.....!(/        |`,
		`00000000:                1e 25 2c  33 3a 41 48 4f 56 5d 64  |     .%,3:AHOV]d|`,
		`00000010: 6b 72 79 80 87 8e 95 9c  a3                       |kry......       |`,
		`1fffffff0:                1e 25 2c                           |     .%,        |`,
		`xfffffffffffffff0:                          1e 25 2c 33 3a 41 48 4f  |        .%,3:AHO|`,
		`x00000000: 56 5d 64 6b 72 79 80 87                           |V]dkry..        |`,
		`q: -00000000: 1e 25 2c 33 3a 41 48 4f  56 5d 64 6b 72 79 80 87  |.%,3:AHOV]dkry..|`,
		`q: +00000000:          5a                                       |   Z            |`,
		`q: -00000010: 8e 95 9c a3 aa b1 b8 bf  c6 cd d4 db e2 e9 f0 f7  |................|`,
		`q: +00000010:             00 7e                                 |    .~          |`,
		`q: -00000020: fe 05 0c 13 1a 21 28 2f  36 3d 44                 |.....!(/6=D     |`,
		`q: +00000020:                          78                       |        x       |`,
		`-00000000:          1e 25 2c 33 3a  41 48 4f 56 5d 64 6b 72  |   .%,3:AHOV]dkr|`,
		`+00000000:                   5a                              |      Z         |`,
		`-00000010: 79 80 87 8e 95 9c a3 aa  b1 b8 bf c6 cd d4 db e2  |y...............|`,
		`+00000010:                      00  7e                       |       .~       |`,
		` 00000020: e9                                                |.               |`,
		`same 00000000: 1e 25 2c 33 3a 41 48 4f  56 5d 64 6b 72 79 80 87  |.%,3:AHOV]dkry..|`,
		`same 00000010: 8e 95 9c a3                                       |....            |`,
	} {
		want = append(want, "debug[0].-1: "+line)
	}
	rec.expect(t, want...)
}

func TestQuietDebug(t *testing.T) {
	rec := record(t, "", false)
	cshim.CallVoid(nil, calls()("hexdumps"))
	rec.expect(t)
}

// extents collects what a callback adds.
type extents []cshim.Extent

func (x *extents) add(offset, length uint64, typ uint32) error {
	*x = append(*x, cshim.Extent{Offset: offset, Length: length, Type: typ})
	return nil
}

func TestAllocations(t *testing.T) {
	f := calls()
	_, ctx := connection(t, 1, -1, "")
	buf := cshim.CallOpen(nil, f("get_handle"), false).Ptr // 4 bytes of C memory
	pread, pwrite, flush, trim := f("see_pread"), f("see_pwrite"), f("see_flush"), f("see_range")
	see := f("see_extents")
	list := make(extents, 0, 2)
	if n := testing.AllocsPerRun(100, func() {
		cshim.CallPread(&cshim.Data{Ctx: ctx, Fn: pread, Buf: buf, Count: 4})
		cshim.CallPwrite(&cshim.Data{Ctx: ctx, Fn: pwrite, Buf: buf, Count: 4})
		cshim.CallFlush(&cshim.Data{Ctx: ctx, Fn: flush})
		cshim.CallRange(&cshim.Data{Ctx: ctx, Fn: trim, Count: 4})
		list = list[:0]
		cshim.CallExtents(&cshim.Data{Ctx: ctx, Fn: see, Count: 100}, list.add)
	}); n != 0 {
		t.Errorf("got %v allocations, need 0", n)
	}
}

func BenchmarkPread(b *testing.B) {
	f := calls()
	_, ctx := connection(b, 1, -1, "")
	buf := cshim.CallOpen(nil, f("get_handle"), false).Ptr
	pread := f("see_pread")
	b.ReportAllocs()
	for b.Loop() {
		cshim.CallPread(&cshim.Data{Ctx: ctx, Fn: pread, Buf: buf, Count: 4})
	}
}

func BenchmarkExtents(b *testing.B) {
	f := calls()
	_, ctx := connection(b, 1, -1, "")
	see := f("see_extents")
	list := make(extents, 0, 2)
	b.ReportAllocs()
	for b.Loop() {
		list = list[:0]
		cshim.CallExtents(&cshim.Data{Ctx: ctx, Fn: see, Count: 100}, list.add)
	}
}
