package backend

import (
	"fmt"
	"strings"
	"sync"
	"syscall"
	"testing"
)

// recorder is a module that has the callbacks a test gives it and writes down
// how each is called.
type recorder struct {
	model ThreadModel
	has   map[Callback]bool
	can   map[Callback]int   // what Can answers; 0 otherwise
	fail  map[Callback]error // what a callback fails with
	size  int64
	block BlockSize
	// extents are added by Extents.
	extents []Extent
	exports []Export
	text    string // default_export's and export_description's answer

	mu    sync.Mutex
	calls []string
}

// always are the callbacks that no module can do without.
var always = []Callback{Open, Close, GetSize, Pread}

func newRecorder(has ...Callback) *recorder {
	r := &recorder{model: Parallel, has: map[Callback]bool{}, can: map[Callback]int{}, fail: map[Callback]error{}, size: 1 << 20}
	for _, cb := range append(has, always...) {
		r.has[cb] = true
	}
	return r
}

// answer adds a can_ callback with its answer.
func (r *recorder) answer(cb Callback, n int) *recorder {
	r.has[cb], r.can[cb] = true, n
	return r
}

// failing makes a callback fail with errno.
func (r *recorder) failing(cb Callback, errno syscall.Errno) *recorder {
	r.has[cb] = true
	r.fail[cb] = &Error{Module: "recorder", Op: cb.String(), Errno: errno}
	return r
}

func (r *recorder) note(cb Callback, format string, args ...any) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.calls = append(r.calls, strings.TrimSpace(cb.String()+" "+fmt.Sprintf(format, args...)))
	if !r.has[cb] {
		panic(cb.String() + " called but the module does not have it")
	}
	return r.fail[cb]
}

// take returns the calls since the last take.
func (r *recorder) take() string {
	r.mu.Lock()
	defer r.mu.Unlock()
	s := strings.Join(r.calls, ", ")
	r.calls = nil
	return s
}

func (r *recorder) Name() string             { return "recorder" }
func (r *recorder) Has(cb Callback) bool     { return r.has[cb] }
func (r *recorder) ThreadModel() ThreadModel { return r.model }
func (r *recorder) Load()                    { _ = r.note(Load, "") }
func (r *recorder) Unload()                  { _ = r.note(Unload, "") }
func (r *recorder) Config(k, v string) error { return r.note(Config, "%s=%s", k, v) }
func (r *recorder) ConfigComplete() error    { return r.note(ConfigComplete, "") }
func (r *recorder) GetThreadModel() (ThreadModel, error) {
	return ThreadModel(r.can[GetThreadModel]), r.note(GetThreadModel, "")
}
func (r *recorder) GetReady() error                   { return r.note(GetReady, "") }
func (r *recorder) AfterFork() error                  { return r.note(AfterFork, "") }
func (r *recorder) Cleanup()                          { _ = r.note(Cleanup, "") }
func (r *recorder) Preconnect(_ *Call, ro bool) error { return r.note(Preconnect, "%v", ro) }
func (r *recorder) ExportDescription(*Call) (string, bool) {
	_ = r.note(ExportDescription, "")
	return r.text, true
}
func (r *recorder) ListExports(_ *Call, ro bool) ([]Export, bool, error) {
	return r.exports, r.can[ListExports] != 0, r.note(ListExports, "%v", ro)
}
func (r *recorder) DefaultExport(_ *Call, ro bool) (string, bool) {
	_ = r.note(DefaultExport, "%v", ro)
	return r.text, r.can[DefaultExport] != 0
}
func (r *recorder) Open(_ *Call, ro bool, export string) (Handle, error) {
	return r, r.note(Open, "%v %q", ro, export)
}
func (r *recorder) Close(*Call)                        { _ = r.note(Close, "") }
func (r *recorder) GetSize(*Call) (int64, error)       { return r.size, r.note(GetSize, "") }
func (r *recorder) BlockSize(*Call) (BlockSize, error) { return r.block, r.note(BlockSizes, "") }
func (r *recorder) Can(_ *Call, cb Callback) (int, error) {
	return r.can[cb], r.note(cb, "")
}
func (r *recorder) Pread(_ *Call, p []byte, off uint64) error {
	return r.note(Pread, "%d@%d", len(p), off)
}
func (r *recorder) Pwrite(_ *Call, p []byte, off uint64, flags Flags) error {
	for _, b := range p {
		if b != 0 {
			return r.note(Pwrite, "%d@%d data %s", len(p), off, names(flags))
		}
	}
	return r.note(Pwrite, "%d@%d zeroes %s", len(p), off, names(flags))
}
func (r *recorder) Flush(*Call) error { return r.note(Flush, "") }
func (r *recorder) Trim(_ *Call, n uint32, off uint64, flags Flags) error {
	return r.note(Trim, "%d@%d %s", n, off, names(flags))
}
func (r *recorder) Zero(_ *Call, n uint32, off uint64, flags Flags) error {
	return r.note(Zero, "%d@%d %s", n, off, names(flags))
}
func (r *recorder) Extents(_ *Call, n uint32, off uint64, flags Flags, x *Extents) error {
	for _, e := range r.extents {
		if err := x.Add(e.Offset, e.Length, e.Type); err != nil {
			return err
		}
	}
	return r.note(GetExtents, "%d@%d %s", n, off, names(flags))
}
func (r *recorder) Cache(_ *Call, n uint32, off uint64) error { return r.note(Cache, "%d@%d", n, off) }

func names(f Flags) string {
	var s string
	for i, n := range []string{"may_trim", "fua", "req_one", "fast"} {
		if f&(1<<i) != 0 {
			s += " " + n
		}
	}
	return strings.TrimSpace(s)
}

func newCall() *Call { return &Call{Conn: &Conn{ID: 1, FD: -1}, Worker: Handshake} }

// open opens a session on r, and forgets the calls that took.
func open(t *testing.T, r *recorder, readonly bool) (*Session, *Call) {
	t.Helper()
	c := newCall()
	s, err := NewChain(r, nil, Trace{}).Open(c, readonly, "x")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Finalize(c); s.Close(c) })
	if err := s.Prepare(c); err != nil {
		t.Fatal(err)
	}
	r.take()
	return s, c
}
