package tests

import (
	"runtime"
	"sync"
	"syscall"
	"testing"
	"unsafe"

	"github.com/ebitengine/purego"
)

// completion is libnbd's nbd_completion_callback, which is passed by value.
type completion struct {
	callback uintptr
	userData uintptr
	free     uintptr
}

// libnbd has the functions of libnbd.so.0 that these tests call.
var libnbd struct {
	create      func() uintptr
	close       func(h uintptr)
	connectURI  func(h uintptr, uri string) int32
	shutdown    func(h uintptr, flags uint32) int32
	poll        func(h uintptr, timeout int32) int32
	getError    func() string
	aioPwrite   func(h uintptr, buf unsafe.Pointer, count uintptr, offset uint64, c completion, flags uint32) int64
	aioPread    func(h uintptr, buf unsafe.Pointer, count uintptr, offset uint64, c completion, flags uint32) int64
	aioFlush    func(h uintptr, c completion, flags uint32) int64
	completed   func(h uintptr, cookie uint64) int32
	inFlight    func(h uintptr) int32
	peekCommand func(h uintptr) int64
}

var loadLibnbd = sync.OnceValue(func() error {
	const name = "libnbd.so.0"
	handle, err := purego.Dlopen(name, purego.RTLD_NOW|purego.RTLD_LOCAL)
	if err != nil {
		return err
	}
	for symbol, f := range map[string]any{
		"nbd_create":                     &libnbd.create,
		"nbd_close":                      &libnbd.close,
		"nbd_connect_uri":                &libnbd.connectURI,
		"nbd_shutdown":                   &libnbd.shutdown,
		"nbd_poll":                       &libnbd.poll,
		"nbd_get_error":                  &libnbd.getError,
		"nbd_aio_pwrite":                 &libnbd.aioPwrite,
		"nbd_aio_pread":                  &libnbd.aioPread,
		"nbd_aio_flush":                  &libnbd.aioFlush,
		"nbd_aio_command_completed":      &libnbd.completed,
		"nbd_aio_in_flight":              &libnbd.inFlight,
		"nbd_aio_peek_command_completed": &libnbd.peekCommand,
	} {
		purego.RegisterLibFunc(f, handle, symbol)
	}
	callbackFn = purego.NewCallback(onCompletion)
	freeFn = purego.NewCallback(onFree)
	return nil
})

// An issued is what libnbd called back for one command.
type issued struct {
	completions, frees int
	errno              int32
	retire             bool // what the callback answers
}

var (
	callbackFn, freeFn uintptr
	// commands are known to libnbd by their number: it holds no Go pointer.
	commands   = map[uintptr]*issued{}
	commandsMu sync.Mutex
)

func onCompletion(userData uintptr, errno *int32) int32 {
	commandsMu.Lock()
	defer commandsMu.Unlock()
	c := commands[userData]
	c.completions++
	c.errno = *errno
	if c.retire {
		return 1
	}
	return 0
}

func onFree(userData uintptr) {
	commandsMu.Lock()
	defer commandsMu.Unlock()
	commands[userData].frees++
}

func newCommand(retire bool) (*issued, completion) {
	commandsMu.Lock()
	defer commandsMu.Unlock()
	id := uintptr(len(commands) + 1)
	commands[id] = &issued{retire: retire}
	return commands[id], completion{callbackFn, id, freeFn}
}

// want holds what libnbd has called back so far against what it should have.
func (c *issued) want(t *testing.T, cookie int64, want issued) {
	t.Helper()
	commandsMu.Lock()
	defer commandsMu.Unlock()
	want.retire = c.retire
	if *c != want {
		t.Errorf("command %d: got %+v, want %+v", cookie, *c, want)
	}
}

// connect returns a handle that is connected to the server. nbd_get_error is by
// thread, so the test keeps its own.
func connect(t *testing.T, s *server) uintptr {
	t.Helper()
	runtime.LockOSThread()
	t.Cleanup(runtime.UnlockOSThread)
	if err := loadLibnbd(); err != nil {
		t.Fatalf("load libnbd: %v (apt-get install libnbd0)", err)
	}
	h := libnbd.create()
	if h == 0 {
		t.Fatal(libnbd.getError())
	}
	if s != nil && libnbd.connectURI(h, s.uri("")) == -1 {
		t.Fatal(libnbd.getError())
	}
	return h
}

func pollUntilIdle(t *testing.T, h uintptr) {
	t.Helper()
	for libnbd.inFlight(h) > 0 {
		if libnbd.poll(h, int32(patience.Milliseconds())) != 1 {
			t.Fatal("poll: ", libnbd.getError())
		}
	}
}

// TestLibnbdFlush has writes in flight and flushes among them.
func TestLibnbdFlush(t *testing.T) {
	t.Parallel()
	for _, retire := range []bool{false, true} {
		t.Run(map[bool]string{false: "asked for", true: "retired"}[retire], func(t *testing.T) {
			t.Parallel()
			s := startHost(t, "memory", "64M")
			h := connect(t, s)
			const n, size = 512, 32 << 10
			// libnbd keeps the buffer until the command completes.
			var pin runtime.Pinner
			defer pin.Unpin()
			buf := make([]byte, n*size)
			pin.Pin(&buf[0])
			for i := range buf {
				buf[i] = byte(i>>15) ^ byte(i)
			}

			all := map[int64]*issued{}
			issue := func(cookie int64, c *issued) {
				t.Helper()
				if cookie < 1 {
					t.Fatalf("issue command: got cookie %d: %s", cookie, libnbd.getError())
				}
				if all[cookie] != nil {
					t.Fatalf("issue command: got cookie %d twice", cookie)
				}
				all[cookie] = c
			}
			for i := range n {
				c, completion := newCommand(retire)
				issue(libnbd.aioPwrite(h, unsafe.Pointer(&buf[i*size]), size, uint64(i)*size, completion, 0), c)
				if i%16 == 7 {
					c, completion := newCommand(retire)
					issue(libnbd.aioFlush(h, completion, 0), c)
				}
			}
			pollUntilIdle(t, h)

			// Those that the callback did not retire are there until they are asked for.
			if next := libnbd.peekCommand(h); retire != (next < 1) {
				t.Errorf("peek completed command: got %d", next)
			}
			for cookie := range all {
				want := int32(1)
				if retire {
					want = 0
				}
				for _, want := range []int32{want, 0} {
					if got := libnbd.completed(h, uint64(cookie)); got != want {
						t.Fatalf("command %d completed: got %d, want %d", cookie, got, want)
					}
				}
			}
			for cookie, c := range all {
				c.want(t, cookie, issued{completions: 1, frees: 1})
			}

			back := make([]byte, len(buf))
			pin.Pin(&back[0])
			c, completion := newCommand(true)
			issue(libnbd.aioPread(h, unsafe.Pointer(&back[0]), uintptr(len(back)), 0, completion, 0), c)
			pollUntilIdle(t, h)
			if string(back) != string(buf) {
				t.Error("read back: the bytes are not those that were written")
			}
			if libnbd.shutdown(h, 0) == -1 {
				t.Error(libnbd.getError())
			}
			libnbd.close(h)
			s.stop()
		})
	}
}

// TestLibnbdError: the server's error reaches the completion.
func TestLibnbdError(t *testing.T) {
	t.Parallel()
	s := startHost(t, fixture(t, "errors"))
	h := connect(t, s)
	c, completion := newCommand(false)
	cookie := libnbd.aioFlush(h, completion, 0)
	if cookie < 1 {
		t.Fatal(libnbd.getError())
	}
	if got := libnbd.completed(h, uint64(cookie)); got != 0 {
		t.Errorf("command in flight: got completed %d, want 0", got)
	}
	pollUntilIdle(t, h)
	if got := libnbd.completed(h, uint64(cookie)); got != -1 {
		t.Errorf("failed command: got completed %d, want -1", got)
	}
	c.want(t, cookie, issued{completions: 1, frees: 1, errno: int32(syscall.ENOSPC)})
	libnbd.shutdown(h, 0)
	libnbd.close(h)
	s.stop()
}

// TestLibnbdUnconnected: a handle without a server issues nothing, and frees.
func TestLibnbdUnconnected(t *testing.T) {
	t.Parallel()
	h := connect(t, nil)
	c, completion := newCommand(false)
	if cookie := libnbd.aioFlush(h, completion, 0); cookie != -1 {
		t.Errorf("flush without a server: got cookie %d, want -1", cookie)
	}
	libnbd.close(h)
	c.want(t, 0, issued{frees: 1})
}

// TestLibnbdServerGone: commands in flight when the server goes away fail, once
// each.
func TestLibnbdServerGone(t *testing.T) {
	t.Parallel()
	s, j, _ := startBlock(t)
	h := connect(t, s)
	var pin runtime.Pinner
	defer pin.Unpin()
	buf := make([]byte, 512)
	pin.Pin(&buf[0])
	c, completion := newCommand(false)
	if cookie := libnbd.aioPread(h, unsafe.Pointer(&buf[0]), 512, slowFrom, completion, 0); cookie < 1 {
		t.Fatal(libnbd.getError())
	}
	j.wait("slow 1", 1)
	s.kill()
	for libnbd.inFlight(h) > 0 && libnbd.poll(h, int32(patience.Milliseconds())) == 1 {
	}
	libnbd.close(h)
	c.want(t, 0, issued{completions: 1, frees: 1, errno: int32(syscall.ENOTCONN)})
}
