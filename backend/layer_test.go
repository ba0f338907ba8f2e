package backend

import (
	"bytes"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"syscall"
	"testing"
)

// A passer is a filter that has the callbacks a test gives it, notes them in the
// journal that all layers share, and asks the next session.
type passer struct {
	*recorder
	name    string
	journal *journal
	next    *Layer
	open    func(c *Call, s *Session) error // nil: opens next as it was opened
}

type journal struct {
	mu    sync.Mutex
	lines []string
}

func (j *journal) note(format string, args ...any) {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.lines = append(j.lines, strings.TrimSpace(fmt.Sprintf(format, args...)))
}

func (j *journal) take() string {
	j.mu.Lock()
	defer j.mu.Unlock()
	s := strings.Join(j.lines, ", ")
	j.lines = nil
	return s
}

func newPasser(j *journal, name string, has ...Callback) *passer {
	r := newRecorder(has...)
	for _, cb := range always {
		delete(r.has, cb)
	}
	for _, cb := range has {
		r.has[cb] = true
	}
	return &passer{recorder: r, name: name, journal: j}
}

func (p *passer) Name() string        { return p.name }
func (p *passer) SetNext(next *Layer) { p.next = next }
func (p *passer) Config(k, v string) error {
	p.journal.note("%s config", p.name)
	return p.next.Config(k, v)
}

func (p *passer) GetThreadModel() (ThreadModel, error) {
	p.journal.note("%s thread_model next=%v", p.name, p.next.ThreadModel())
	return ThreadModel(p.can[GetThreadModel]), nil
}

func (p *passer) OpenOver(c *Call, s *Session) (FilterHandle, error) {
	open := p.open
	if open == nil {
		open = func(c *Call, s *Session) error {
			_, err := s.OpenNext(c, s.ReadOnly(), s.Export())
			return err
		}
	}
	return &passerHandle{p.recorder, p, s}, open(c, s)
}

type passerHandle struct {
	*recorder
	p *passer
	s *Session
}

func (h *passerHandle) note(cb Callback, format string, args ...any) error {
	h.p.journal.note("%s %v %s", h.p.name, cb, fmt.Sprintf(format, args...))
	return h.fail[cb]
}

func (h *passerHandle) Close(*Call)                  { _ = h.note(Close, "") }
func (h *passerHandle) Prepare(*Call, bool) error    { return h.note(Prepare, "") }
func (h *passerHandle) Finalize(*Call) error         { return h.note(Finalize, "") }
func (h *passerHandle) GetSize(*Call) (int64, error) { return h.size, h.note(GetSize, "") }
func (h *passerHandle) Can(_ *Call, cb Callback) (int, error) {
	return h.can[cb], h.note(cb, "")
}
func (h *passerHandle) Pread(c *Call, p []byte, off uint64) error {
	_ = h.note(Pread, "%d@%d", len(p), off)
	return h.s.next.Load().Pread(c, p, off)
}
func (h *passerHandle) Pwrite(c *Call, p []byte, off uint64, flags Flags) error {
	_ = h.note(Pwrite, "%d@%d %s", len(p), off, names(flags))
	return h.s.next.Load().Pwrite(c, p, off, flags)
}

// base is a plugin that can do everything.
func base(*journal) *recorder {
	r := newRecorder(writable...)
	return r
}

// Sessions are prepared from the plugin outwards, and finalized and closed from the
// outside inwards; one that was not prepared is not finalized.
func TestOrderOfLayers(t *testing.T) {
	for _, tt := range []struct {
		name string
		fail Callback // of the middle layer; callbacks for none
		want string
	}{
		{"all is well", callbacks, "c prepare, b prepare, a prepare, a finalize, b finalize, c finalize, a close, b close, c close"},
		{"prepare fails", Prepare, "c prepare, b prepare, c finalize, a close, b close, c close"},
		{"finalize fails", Finalize, "c prepare, b prepare, a prepare, a finalize, b finalize, a close, b close, c close"},
	} {
		j := &journal{}
		var filters []Filter
		for _, name := range []string{"a", "b", "c"} {
			p := newPasser(j, name, Open, Close, Prepare, Finalize)
			if name == "b" && tt.fail < callbacks {
				p.failing(tt.fail, syscall.EPERM)
			}
			filters = append(filters, p)
		}
		c := newCall()
		s, err := NewChain(base(j), nil, Trace{}, filters...).Open(c, false, "x")
		if err != nil {
			t.Fatal(err)
		}
		perr := s.Prepare(c)
		ferr := s.Finalize(c)
		s.Close(c)
		if got := j.take(); got != tt.want {
			t.Errorf("%s: called %s\nneed %s", tt.name, got, tt.want)
		}
		if (perr != nil) != (tt.fail == Prepare) || (ferr != nil) != (tt.fail == Finalize) {
			t.Errorf("%s: got %v, %v", tt.name, perr, ferr)
		}
	}
}

// A filter without a callback is passed over; the layer below sees the request.
func TestPassOver(t *testing.T) {
	j := &journal{}
	r := base(j)
	s, err := NewChain(r, nil, Trace{}, newPasser(j, "a"), newPasser(j, "b", Pwrite), newPasser(j, "c")).Open(newCall(), false, "x")
	if err != nil {
		t.Fatal(err)
	}
	c := newCall()
	if err := s.Prepare(c); err != nil {
		t.Fatal(err)
	}
	caps, err := s.Caps(c)
	if want := (Caps{Size: 1 << 20, Write: true, Flush: true, Trim: true, Zero: Native, FUA: Emulate, Cache: Native, Extents: true}); err != nil || caps != want {
		t.Errorf("got %+v, %v\nneed %+v", caps, err, want)
	}
	r.take()
	r.extents = []Extent{{0, 1 << 20, ExtentZero}}
	var x Extents
	err = errors.Join(s.Pread(c, make([]byte, 3), 1), s.Pwrite(c, []byte("abc"), 2, FUA), s.Flush(c), s.Trim(c, 4, 3, FUA),
		s.Zero(c, 5, 4, MayTrim), s.Cache(c, 6, 5), s.Extents(c, 7, 6, ReqOne, &x))
	if err != nil {
		t.Error(err)
	}
	want := "pread 3@1, pwrite 3@2 data, flush, flush, trim 4@3, flush, zero 5@4 may_trim, cache 6@5, extents 7@6 req_one"
	if got := r.take(); got != want {
		t.Errorf("called %s\nneed %s", got, want)
	}
	if got, want := j.take(), "b pwrite 3@2 fua"; got != want {
		t.Errorf("called %s, need %s", got, want)
	}
	if list := x.List(); len(list) != 1 || list[0] != (Extent{6, 1<<20 - 6, ExtentZero}) {
		t.Errorf("got extents %v", list)
	}
	s.Finalize(c)
	s.Close(c)
}

// What a filter's can_zero, can_fua and can_cache make of requests.
func TestEmulationInAFilter(t *testing.T) {
	for _, tt := range []struct {
		cb     Callback
		answer int
		do     func(*Session, *Call) error
		filter string
		plugin string
		errno  syscall.Errno
	}{
		{CanZero, Emulate, func(s *Session, c *Call) error { return s.Zero(c, 8, 0, MayTrim|FUA) }, "f pwrite 8@0 fua", "pwrite 8@0 zeroes, flush", 0},
		{CanZero, Emulate, func(s *Session, c *Call) error { return s.Zero(c, 8, 0, FastZero) }, "", "", syscall.EOPNOTSUPP},
		{CanZero, None, func(s *Session, c *Call) error { return s.Zero(c, 8, 0, 0) }, "", "", syscall.EOPNOTSUPP},
		{CanZero, 3, func(s *Session, c *Call) error { return s.Zero(c, 8, 0, 0) }, "", "", syscall.EINVAL},
		{CanCache, Emulate, func(s *Session, c *Call) error { return s.Cache(c, 8, 0) }, "f pread 8@0", "pread 8@0", 0},
		{CanFUA, None, func(s *Session, c *Call) error { return s.Pwrite(c, make([]byte, 8), 0, FUA) }, "", "", syscall.EINVAL},
		{CanFUA, Emulate, func(s *Session, c *Call) error { return s.Pwrite(c, make([]byte, 8), 0, FUA) }, "f pwrite 8@0 fua", "pwrite 8@0 zeroes, flush", 0},
		{CanWrite, 0, func(s *Session, c *Call) error { return s.Pwrite(c, make([]byte, 8), 0, 0) }, "", "", syscall.EROFS},
		{CanExtents, 0, func(s *Session, c *Call) error { return s.Extents(c, 8, 0, 0, new(Extents)) }, "", "", 0},
	} {
		j := &journal{}
		r := base(j)
		f := newPasser(j, "f", Pread, Pwrite)
		f.answer(tt.cb, tt.answer)
		c := newCall()
		s, err := NewChain(r, nil, Trace{}, f).Open(c, false, "x")
		if err != nil {
			t.Fatal(err)
		}
		_, _ = s.Caps(c)
		r.take()
		j.take()
		if err := tt.do(s, c); tt.errno == 0 && err != nil || tt.errno != 0 && !errors.Is(err, tt.errno) {
			t.Errorf("%v=%d: got %v, need %v", tt.cb, tt.answer, err, tt.errno)
		}
		fcalls := strings.TrimPrefix(strings.ReplaceAll(j.take(), "f "+tt.cb.String(), ""), ", ")
		if rcalls := r.take(); fcalls != tt.filter || rcalls != tt.plugin {
			t.Errorf("%v=%d: called %q and %q, need %q and %q", tt.cb, tt.answer, fcalls, rcalls, tt.filter, tt.plugin)
		}
		s.Close(c)
	}
}

// A session that a filter puts below another one by hand ends like any other, and
// a filter with nothing below gets errors.
func TestSetNext(t *testing.T) {
	j := &journal{}
	r := base(j)
	closed := 0
	f := newPasser(j, "f", Open)
	f.open = func(*Call, *Session) error { return nil }
	c := newCall()
	s, err := NewChain(r, nil, Trace{}, f).Open(c, false, "x")
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(s.Prepare(c), s.Pread(c, make([]byte, 1), 0)); !errors.Is(err, syscall.EIO) {
		t.Errorf("without next: got %v", err)
	}
	first, err := f.next.Open(c, true, "first")
	if err != nil {
		t.Fatal(err)
	}
	first.OnClose = func() { closed++ }
	second, err := f.next.Open(c, true, "second")
	if err != nil {
		t.Fatal(err)
	}
	if s.SetNext(first) != nil || s.SetNext(second) != first {
		t.Error("SetNext does not return what was there")
	}
	s.DropNext(first) // is not there
	if _, err := s.OpenNext(c, false, "third"); !errors.Is(err, syscall.EINVAL) {
		t.Errorf("a second next: got %v", err)
	}
	if err := errors.Join(second.Prepare(c), s.Pread(c, make([]byte, 1), 0)); err != nil {
		t.Error(err)
	}
	first.Close(c)
	s.Finalize(c)
	s.Close(c)
	want := `open true "first", open true "second", get_size, pread 1@0, close, close`
	if got := r.take(); got != want || closed != 1 {
		t.Errorf("called %s, OnClose %d times\nneed %s, once", got, closed, want)
	}
}

// The thread model is the strictest of all layers, and each is told that of the next.
func TestThreadModelOfAChain(t *testing.T) {
	j := &journal{}
	a, b := newPasser(j, "a"), newPasser(j, "b")
	a.answer(GetThreadModel, int(Parallel))
	b.answer(GetThreadModel, int(SerializeRequests))
	ch := NewChain(base(j), nil, Trace{}, a, b)
	if err := ch.SetThreadModel(Parallel); err != nil || ch.ThreadModel() != SerializeRequests {
		t.Errorf("got %v, %v", ch.ThreadModel(), err)
	}
	if got, want := j.take(), "b thread_model next=parallel, a thread_model next=serialize_requests"; got != want {
		t.Errorf("called %s\nneed %s", got, want)
	}
}

// Calls by worker, for modules: the same one each time, with the right log.
func TestCallOfWorker(t *testing.T) {
	var of, elsewhere bytes.Buffer
	ch := NewChain(base(&journal{}), slog.New(slog.NewTextHandler(&elsewhere, nil)), Trace{})
	c := newCall()
	c.Log = slog.New(slog.NewTextHandler(&of, nil)).With("conn", 1)
	if err := ch.Preconnect(c, false); err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	for worker := Foreign; worker < 20; worker++ {
		wg.Go(func() {
			call := c.Conn.Call(worker)
			if call.Worker != worker || call.Conn != c.Conn || c.Conn.Call(worker) != call {
				t.Errorf("worker %d: got %+v", worker, call)
			}
		})
	}
	wg.Wait()
	c.Conn.Call(3).Log.Error("three")
	c.Conn.Call(Handshake).Log.Error("handshake")
	c.Conn.Call(Foreign).Log.Error("foreign")
	for _, want := range []string{"msg=three conn=1 worker=3\n", "msg=handshake conn=1\n"} {
		if !strings.Contains(of.String(), want) {
			t.Errorf("got %s need %s", of.String(), want)
		}
	}
	if !strings.Contains(elsewhere.String(), "msg=foreign\n") || strings.Contains(of.String(), "foreign") {
		t.Errorf("got %s", elsewhere.String())
	}
}

func TestCutExtents(t *testing.T) {
	for _, tt := range []struct {
		end  uint64
		want []Extent
	}{
		{100, []Extent{{0, 10, 0}, {10, 10, 1}}}, {20, []Extent{{0, 10, 0}, {10, 10, 1}}},
		{15, []Extent{{0, 10, 0}, {10, 5, 1}}}, {10, []Extent{{0, 10, 0}}}, {3, []Extent{{0, 3, 0}}}, {0, nil},
	} {
		var x Extents
		x.Reset(0, 20)
		_ = x.Add(0, 10, 0)
		_ = x.Add(10, 10, 1)
		x.Cut(tt.end)
		if got := x.List(); fmt.Sprint(got) != fmt.Sprint(tt.want) {
			t.Errorf("cut at %d: got %v, need %v", tt.end, got, tt.want)
		}
	}
}

type handless struct{ *Mem }

func (handless) Open(*Call, bool, string) (Handle, error) { return nil, nil }

// A module that opens nothing and does not say so is not called for it.
func TestNoHandle(t *testing.T) {
	ch := NewChain(handless{NewMem(1)}, nil, Trace{})
	s, err := ch.Open((&Conn{FD: -1}).Call(Handshake), false, "")
	if s != nil || !errors.Is(err, syscall.EIO) || !strings.Contains(err.Error(), "neither a handle nor an error") {
		t.Errorf("got %v and %v", s, err)
	}
}
