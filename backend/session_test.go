package backend

import (
	"bytes"
	"errors"
	"fmt"
	"math"
	"strings"
	"sync"
	"syscall"
	"testing"
)

// writable are the callbacks of a module that can do everything, and has no can_
// callback to say so.
var writable = []Callback{Pwrite, Flush, Trim, Zero, GetExtents, Cache}

func TestCaps(t *testing.T) {
	const size = 1 << 20
	for _, tt := range []struct {
		name     string
		r        *recorder
		readonly bool
		want     Caps
		calls    string
	}{
		{"least", newRecorder(), false, Caps{Size: size, FastZero: false}, "get_size"},
		{"pwrite only", newRecorder(Pwrite), false,
			Caps{Size: size, Write: true, Zero: Emulate, FastZero: true}, "get_size"},
		{"all callbacks", newRecorder(writable...), false,
			Caps{Size: size, Write: true, Flush: true, Trim: true, Zero: Native, FUA: Emulate, Cache: Native, Extents: true}, "get_size"},
		{"all callbacks, read only", newRecorder(writable...), true,
			Caps{Size: size, Flush: true, Cache: Native, Extents: true}, "get_size"},
		{"can_write false hides the rest", newRecorder(writable...).answer(CanWrite, 0).answer(CanTrim, 1).answer(CanZero, 1).answer(CanFUA, 2), false,
			Caps{Size: size, Flush: true, Cache: Native, Extents: true}, "get_size, can_write"},
		{"can_zero false means by pwrite, fast because it fails at once", newRecorder(writable...).answer(CanZero, 0), false,
			Caps{Size: size, Write: true, Flush: true, Trim: true, Zero: Emulate, FastZero: true, FUA: Emulate, Cache: Native, Extents: true}, "get_size, can_zero"},
		{"every answer true", newRecorder(writable...).answer(CanWrite, 1).answer(CanZero, 1).answer(CanFastZero, 1).answer(CanTrim, 1).
			answer(CanFUA, Native).answer(CanFlush, 1).answer(IsRotational, 1).answer(CanMultiConn, 1).answer(CanCache, Emulate).answer(CanExtents, 1), false,
			Caps{size, true, true, true, true, Native, true, Native, true, Emulate, true},
			"get_size, can_write, can_zero, can_fast_zero, can_trim, can_fua, can_flush, is_rotational, can_multi_conn, can_cache, can_extents"},
		{"every answer false", newRecorder(writable...).answer(CanWrite, 1).answer(CanZero, 0).answer(CanFastZero, 0).answer(CanTrim, 0).
			answer(CanFUA, None).answer(CanFlush, 0).answer(IsRotational, 0).answer(CanMultiConn, 0).answer(CanCache, None).answer(CanExtents, 0), false,
			Caps{Size: size, Write: true, Zero: Emulate},
			"get_size, can_write, can_zero, can_fast_zero, can_trim, can_fua, can_flush, is_rotational, can_multi_conn, can_cache, can_extents"},
		{"true is any positive number", newRecorder(writable...).answer(CanWrite, 7).answer(CanMultiConn, 2), true,
			Caps{Size: size, Flush: true, MultiConn: true, Cache: Native, Extents: true}, "get_size, can_multi_conn"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s, c := open(t, tt.r, tt.readonly)
			for i := range 2 {
				got, err := s.Caps(c)
				if err != nil || got != tt.want {
					t.Errorf("got %+v, %v\nneed %+v", got, err, tt.want)
				}
				calls := tt.calls
				if i > 0 {
					calls = "" // all is cached
				}
				if got := tt.r.take(); got != calls {
					t.Errorf("time %d: called %s\nneed %s", i, got, calls)
				}
			}
		})
	}
}

func TestMultiConnNotWithOneConnectionAtATime(t *testing.T) {
	r := newRecorder().answer(CanMultiConn, 1)
	r.model = SerializeConnections
	s, c := open(t, r, false)
	if caps, err := s.Caps(c); err != nil || caps.MultiConn {
		t.Errorf("got MultiConn %v, %v", caps.MultiConn, err)
	}
}

// A module that fails or answers nonsense fails the question, each time.
func TestCapsFail(t *testing.T) {
	for _, tt := range []struct {
		name  string
		r     *recorder
		errno syscall.Errno
	}{
		{"get_size fails", newRecorder().failing(GetSize, syscall.ENOMEDIUM), syscall.ENOMEDIUM},
		{"negative size", func() *recorder { r := newRecorder(); r.size = -2; return r }(), syscall.EINVAL},
		{"can_write fails", newRecorder(Pwrite).failing(CanWrite, syscall.EIO), syscall.EIO},
		{"can_zero fails", newRecorder(Pwrite).failing(CanZero, syscall.EIO), syscall.EIO},
		{"can_fua out of range", newRecorder(Pwrite).answer(CanFUA, 3), syscall.EINVAL},
		{"can_cache out of range", newRecorder().answer(CanCache, 3), syscall.EINVAL},
		{"can_extents fails", newRecorder().failing(CanExtents, syscall.EPERM), syscall.EPERM},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s, c := open(t, tt.r, false)
			for range 2 {
				if _, err := s.Caps(c); !errors.Is(err, tt.errno) {
					t.Errorf("got %v, need %v", err, tt.errno)
				}
			}
		})
	}
}

func TestBlockSize(t *testing.T) {
	for _, tt := range []struct {
		b     BlockSize
		valid bool
	}{
		{BlockSize{}, true},
		{BlockSize{1, 512, math.MaxUint32}, true},
		{BlockSize{512, 4096, 32 << 20}, true},
		{BlockSize{65536, 65536, 65536}, true},
		{BlockSize{65536, 32 << 20, math.MaxUint32}, true},
		{BlockSize{0, 4096, math.MaxUint32}, false},
		{BlockSize{3, 4096, math.MaxUint32}, false},
		{BlockSize{131072, 131072, math.MaxUint32}, false},
		{BlockSize{1, 256, math.MaxUint32}, false},
		{BlockSize{1, 64 << 20, math.MaxUint32}, false},
		{BlockSize{1, 1000, math.MaxUint32}, false},
		{BlockSize{4096, 512, math.MaxUint32}, false},
		{BlockSize{512, 4096, 1024}, false},
		{BlockSize{512, 4096, 5000}, false},
	} {
		r := newRecorder(BlockSizes)
		r.block = tt.b
		s, c := open(t, r, false)
		got, err := s.BlockSize(c)
		if (err == nil) != tt.valid || tt.valid && got != tt.b {
			t.Errorf("%+v: got %+v, %v; need valid %v", tt.b, got, err, tt.valid)
		}
		if tt.valid {
			_, _ = s.BlockSize(c)
			if calls := r.take(); calls != "block_size" {
				t.Errorf("%+v: called %s", tt.b, calls)
			}
		}
	}
	s, c := open(t, newRecorder(), false)
	if got, err := s.BlockSize(c); err != nil || got != (BlockSize{}) {
		t.Errorf("without block_size: got %+v, %v", got, err)
	}
}

// What each request becomes, for modules that have more or less of it.
func TestRequests(t *testing.T) {
	pwrite := func(n int, off uint64, f Flags) func(*Session, *Call) error {
		return func(s *Session, c *Call) error { return s.Pwrite(c, bytes.Repeat([]byte{1}, n), off, f) }
	}
	zero := func(n uint32, off uint64, f Flags) func(*Session, *Call) error {
		return func(s *Session, c *Call) error { return s.Zero(c, n, off, f) }
	}
	trim := func(n uint32, off uint64, f Flags) func(*Session, *Call) error {
		return func(s *Session, c *Call) error { return s.Trim(c, n, off, f) }
	}
	cache := func(n uint32, off uint64) func(*Session, *Call) error {
		return func(s *Session, c *Call) error { return s.Cache(c, n, off) }
	}
	pread := func(n int, off uint64) func(*Session, *Call) error {
		return func(s *Session, c *Call) error { return s.Pread(c, make([]byte, n), off) }
	}
	flush := func(s *Session, c *Call) error { return s.Flush(c) }
	full := func() *recorder { return newRecorder(writable...) }

	for _, tt := range []struct {
		name     string
		r        *recorder
		readonly bool
		do       func(*Session, *Call) error
		calls    string
		errno    syscall.Errno
	}{
		{"read", full(), false, pread(10, 20), "pread 10@20", 0},
		{"read to the end", full(), false, pread(512, 1<<20-512), "pread 512@1048064", 0},
		{"read beyond the end", full(), false, pread(512, 1<<20-511), "", syscall.EINVAL},
		{"read at 2^64-1", full(), false, pread(2, math.MaxUint64), "", syscall.EINVAL},
		{"read fails", newRecorder().failing(Pread, syscall.ENXIO), false, pread(1, 0), "pread 1@0", syscall.ENXIO},

		{"write", full(), false, pwrite(10, 20, 0), "pwrite 10@20 data", 0},
		{"write on read only", full(), true, pwrite(10, 20, 0), "", syscall.EROFS},
		{"write where can_write is false", full().answer(CanWrite, 0), false, pwrite(10, 20, 0), "", syscall.EROFS},
		{"write without pwrite", newRecorder().answer(CanWrite, 1), false, pwrite(10, 20, 0), "", syscall.EROFS},
		{"write beyond the end", full(), false, pwrite(10, 1<<20, 0), "", syscall.EINVAL},
		{"FUA by flush", full(), false, pwrite(10, 20, FUA), "pwrite 10@20 data, flush", 0},
		{"FUA passed on", full().answer(CanFUA, Native), false, pwrite(10, 20, FUA), "pwrite 10@20 data fua", 0},
		{"FUA by flush though can_flush is false", full().answer(CanFUA, Emulate).answer(CanFlush, 0), false, pwrite(10, 20, FUA), "pwrite 10@20 data, flush", 0},
		{"no flush after a failure", full().failing(Pwrite, syscall.ENOSPC), false, pwrite(10, 20, FUA), "pwrite 10@20 data", syscall.ENOSPC},
		{"FUA whose flush fails", full().failing(Flush, syscall.EIO), false, pwrite(10, 20, FUA), "pwrite 10@20 data, flush", syscall.EIO},

		{"flush", full(), false, flush, "flush", 0},
		{"flush on read only", full(), true, flush, "flush", 0},
		{"flush without flush", newRecorder(), false, flush, "", syscall.EOPNOTSUPP},
		{"flush where can_flush lies", newRecorder().answer(CanFlush, 1), false, flush, "", syscall.EINVAL},

		{"trim", full(), false, trim(10, 20, 0), "trim 10@20", 0},
		{"trim FUA by flush", full(), false, trim(10, 20, FUA), "trim 10@20, flush", 0},
		{"trim FUA passed on", full().answer(CanFUA, Native), false, trim(10, 20, FUA), "trim 10@20 fua", 0},
		{"trim on read only", full(), true, trim(10, 20, 0), "", syscall.EOPNOTSUPP},
		{"trim without trim", newRecorder(Pwrite), false, trim(10, 20, 0), "", syscall.EOPNOTSUPP},
		{"trim where can_trim lies", newRecorder(Pwrite).answer(CanTrim, 1), false, trim(10, 20, 0), "", syscall.EINVAL},
		{"trim beyond the end", full(), false, trim(math.MaxUint32, 20, 0), "", syscall.EINVAL},

		{"zero", full(), false, zero(10, 20, MayTrim), "zero 10@20 may_trim", 0},
		{"zero fast", full().answer(CanFastZero, 1), false, zero(10, 20, FastZero), "zero 10@20 fast", 0},
		{"zero FUA by flush", full(), false, zero(10, 20, FUA|MayTrim), "zero 10@20 may_trim, flush", 0},
		{"zero FUA passed on", full().answer(CanFUA, Native), false, zero(10, 20, FUA), "zero 10@20 fua", 0},
		{"zero by pwrite", newRecorder(Pwrite), false, zero(10, 20, MayTrim), "pwrite 10@20 zeroes", 0},
		{"zero by pwrite, FUA by flush", newRecorder(Pwrite, Flush), false, zero(10, 20, FUA), "pwrite 10@20 zeroes, flush", 0},
		{"zero by pwrite, FUA passed on", newRecorder(Pwrite, Flush).answer(CanFUA, Native), false, zero(10, 20, FUA), "pwrite 10@20 zeroes fua", 0},
		{"zero by pwrite because can_zero is false", full().answer(CanZero, 0), false, zero(10, 20, 0), "pwrite 10@20 zeroes", 0},
		{"zero not supported after all", full().failing(Zero, syscall.EOPNOTSUPP), false, zero(10, 20, 0), "zero 10@20, pwrite 10@20 zeroes", 0},
		{"fast zero not supported after all", full().failing(Zero, syscall.EOPNOTSUPP), false, zero(10, 20, FastZero), "zero 10@20 fast", syscall.EOPNOTSUPP},
		{"fast zero not by pwrite", newRecorder(Pwrite), false, zero(10, 20, FastZero), "", syscall.EOPNOTSUPP},
		{"zero fails", full().failing(Zero, syscall.EIO), false, zero(10, 20, 0), "zero 10@20", syscall.EIO},
		{"zero on read only", full(), true, zero(10, 20, 0), "", syscall.EOPNOTSUPP},
		{"zero beyond the end", full(), false, zero(10, 1<<20-9, 0), "", syscall.EINVAL},

		{"cache", full(), false, cache(10, 20), "cache 10@20", 0},
		{"cache by pread", newRecorder().answer(CanCache, Emulate), false, cache(10, 20), "pread 10@20", 0},
		{"cache without cache", newRecorder(), false, cache(10, 20), "", syscall.EOPNOTSUPP},
		{"cache native without cache does nothing", newRecorder().answer(CanCache, Native), false, cache(10, 20), "", 0},
		{"cache beyond the end", full(), false, cache(10, 1<<20), "", syscall.EINVAL},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s, c := open(t, tt.r, tt.readonly)
			if _, err := s.Caps(c); err != nil {
				t.Fatal(err)
			}
			tt.r.take()
			err := tt.do(s, c)
			var e *Error
			switch {
			case tt.errno == 0 && err != nil, tt.errno != 0 && (!errors.As(err, &e) || e.Errno != tt.errno):
				t.Errorf("got %v, need %v", err, tt.errno)
			}
			if calls := tt.r.take(); calls != tt.calls {
				t.Errorf("called %q, need %q", calls, tt.calls)
			}
			if n := BuffersInUse(); n != 0 {
				t.Errorf("%d buffers in use", n)
			}
		})
	}
}

// Pieces of what is carried out by others follow each other to the very end.
func TestBounceInPieces(t *testing.T) {
	const size = 5 << 30
	r := newRecorder(Pwrite)
	r.size = size
	s, c := open(t, r, false)
	if err := s.Zero(c, 2*bounceSize+5, 1000, 0); err != nil {
		t.Fatal(err)
	}
	want := fmt.Sprintf("get_size, pwrite %d@1000 zeroes, pwrite %d@%d zeroes, pwrite 5@%d zeroes",
		bounceSize, bounceSize, 1000+bounceSize, 1000+2*bounceSize)
	if got := r.take(); got != want {
		t.Errorf("called %s\nneed %s", got, want)
	}
	r.answer(CanCache, Emulate)
	if err := s.Cache(c, bounceSize+1, 7); err != nil {
		t.Fatal(err)
	}
	want = fmt.Sprintf("can_cache, pread %d@7, pread 1@%d", bounceSize, 7+bounceSize)
	if got := r.take(); got != want {
		t.Errorf("called %s\nneed %s", got, want)
	}
	if err := s.Zero(c, 0, 0, 0); err != nil || r.take() != "" {
		t.Errorf("zero of no bytes: %v", err)
	}
}

func TestSessionExtents(t *testing.T) {
	const size = 1 << 20
	for _, tt := range []struct {
		name  string
		r     *recorder
		add   []Extent
		want  []Extent
		calls string
		errno syscall.Errno
	}{
		{"without extents all is allocated", newRecorder(), nil, []Extent{{100, 50, 0}}, "", 0},
		{"can_extents false", newRecorder(GetExtents).answer(CanExtents, 0), nil, []Extent{{100, 50, 0}}, "", 0},
		{"beyond the request", newRecorder(GetExtents), []Extent{{0, 4096, ExtentHole}, {4096, size, 0}},
			[]Extent{{100, 3996, ExtentHole}, {4096, size - 4096, 0}}, "extents 50@100 req_one", 0},
		{"nothing added", newRecorder(GetExtents), nil, nil, "extents 50@100 req_one", syscall.EINVAL},
		{"only before the start", newRecorder(GetExtents), []Extent{{0, 100, 0}}, nil, "extents 50@100 req_one", syscall.EINVAL},
		{"fails", newRecorder().failing(GetExtents, syscall.EIO), []Extent{{0, 4096, 0}}, nil, "extents 50@100 req_one", syscall.EIO},
		{"can_extents lies", newRecorder().answer(CanExtents, 1), nil, nil, "", syscall.EINVAL},
	} {
		t.Run(tt.name, func(t *testing.T) {
			tt.r.extents = tt.add
			s, c := open(t, tt.r, false)
			if _, err := s.Caps(c); err != nil {
				t.Fatal(err)
			}
			tt.r.take()
			var x Extents
			err := s.Extents(c, 50, 100, ReqOne, &x)
			if tt.errno == 0 && err != nil || tt.errno != 0 && !errors.Is(err, tt.errno) {
				t.Errorf("got %v, need %v", err, tt.errno)
			}
			if err == nil && fmt.Sprint(x.List()) != fmt.Sprint(tt.want) {
				t.Errorf("got %v, need %v", x.List(), tt.want)
			}
			if calls := tt.r.take(); calls != tt.calls {
				t.Errorf("called %q, need %q", calls, tt.calls)
			}
		})
	}
	s, c := open(t, newRecorder(), false)
	if err := s.Extents(c, 1, size, 0, new(Extents)); !errors.Is(err, syscall.EINVAL) {
		t.Errorf("beyond the end: got %v", err)
	}
}

func TestExportDescription(t *testing.T) {
	for _, tt := range []struct {
		text string
		ok   bool
	}{{"a disk", true}, {strings.Repeat("x", MaxString), true}, {strings.Repeat("x", MaxString+1), false}} {
		r := newRecorder(ExportDescription)
		r.text = tt.text
		s, c := open(t, r, false)
		for range 2 {
			if got, ok := s.ExportDescription(c); ok != tt.ok || ok && got != tt.text {
				t.Errorf("%d bytes: got %q, %v", len(tt.text), got, ok)
			}
		}
		if calls := r.take(); calls != "export_description, export_description" { // not cached, as in nbdkit
			t.Errorf("called %s", calls)
		}
	}
	s, c := open(t, newRecorder(), false)
	if got, ok := s.ExportDescription(c); ok || got != "" {
		t.Errorf("without the callback: got %q, %v", got, ok)
	}
}

// Requests that run side by side ask the module for a capability once.
func TestAskedOnceInParallel(t *testing.T) {
	r := newRecorder(writable...)
	s, c := open(t, r, false)
	if _, err := s.Caps(c); err != nil {
		t.Fatal(err)
	}
	r.take()
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			c := newCall()
			for range 100 {
				if err := s.Pwrite(c, []byte{1}, 0, 0); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	if calls := r.take(); strings.Contains(calls, "can_") || strings.Contains(calls, "get_size") {
		t.Error("asked again")
	}
}
