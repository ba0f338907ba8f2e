package tests

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"sync"
	"syscall"
	"testing"
	"unsafe"
	"weak"

	"github.com/ebitengine/purego"

	"nbdhost/client"
	"nbdhost/protocol"
)

// An aio is an asynchronous client on one connection: libnbd itself, or package
// client. It is used by one goroutine.
type aio interface {
	// flush and pwrite return the cookie, or 0 and why nothing was issued. done is
	// told the error's number, 0 for none; nil is no completion function.
	flush(flags uint32, done func(syscall.Errno) int) (uint64, syscall.Errno)
	pwrite(p []byte, off uint64, flags uint32, done func(syscall.Errno) int) (uint64, syscall.Errno)
	// completed asks for a cookie's result.
	completed(cookie uint64) answer
	// settle returns when at most n commands are in flight, or the connection is gone.
	settle(n int)
	// shutdown sends NBD_CMD_DISC and waits for the end.
	shutdown()
	// close ends it, and tells how many completion functions were let go, and
	// whether one was more than once.
	close() (freed int, twice bool)
}

// answer is what asking for a cookie's result says.
type answer string

const (
	unknown   answer = "unknown" // or in flight
	succeeded answer = "succeeded"
	failed    answer = "failed"
)

// The states in which an aio begins.
const (
	unconnected = iota
	negotiating
	connected
)

// dialers open both kinds.
var dialers = map[string]func(t *testing.T, s *server, state int, strict bool) aio{
	"libnbd": dialLibnbd,
	"client": dialClient,
}

// libnbdModes has what else of libnbd.so.0 is called here.
var libnbdModes struct {
	setOptMode    func(h uintptr, enable bool) int32
	setStrictMode func(h uintptr, flags uint32) int32
	getErrno      func() int32
	isDead        func(h uintptr) int32
	isClosed      func(h uintptr) int32
}

var loadLibnbdModes = sync.OnceValue(func() error {
	if err := loadLibnbd(); err != nil {
		return err
	}
	handle, err := purego.Dlopen("libnbd.so.0", purego.RTLD_NOW|purego.RTLD_LOCAL)
	if err != nil {
		return err
	}
	for symbol, f := range map[string]any{
		"nbd_set_opt_mode":    &libnbdModes.setOptMode,
		"nbd_set_strict_mode": &libnbdModes.setStrictMode,
		"nbd_get_errno":       &libnbdModes.getErrno,
		"nbd_aio_is_dead":     &libnbdModes.isDead,
		"nbd_aio_is_closed":   &libnbdModes.isClosed,
	} {
		purego.RegisterLibFunc(f, handle, symbol)
	}
	aioCallback = purego.NewCallback(onAioCompletion)
	aioFree = purego.NewCallback(onAioFree)
	return nil
})

// aioCommands are the completion functions that libnbd has, by number.
var (
	aioCommandsMu        sync.Mutex
	aioCommands          []*libnbdCommand
	aioCallback, aioFree uintptr
)

type libnbdCommand struct {
	done  func(syscall.Errno) int
	frees int
}

func onAioCompletion(id uintptr, errno *int32) int32 {
	aioCommandsMu.Lock()
	c := aioCommands[id]
	aioCommandsMu.Unlock()
	return int32(c.done(syscall.Errno(*errno)))
}

func onAioFree(id uintptr) {
	aioCommandsMu.Lock()
	defer aioCommandsMu.Unlock()
	aioCommands[id].frees++
}

type libnbdAio struct {
	t      *testing.T
	h      uintptr
	issued []*libnbdCommand
	pin    runtime.Pinner
}

func dialLibnbd(t *testing.T, s *server, state int, strict bool) aio {
	t.Helper()
	if err := loadLibnbdModes(); err != nil {
		t.Fatalf("load libnbd: %v (apt-get install libnbd0)", err)
	}
	a := &libnbdAio{t: t, h: libnbd.create()}
	if a.h == 0 {
		t.Fatal(libnbd.getError())
	}
	if !strict {
		libnbdModes.setStrictMode(a.h, 0)
	}
	if state == negotiating {
		libnbdModes.setOptMode(a.h, true)
	}
	if state != unconnected && libnbd.connectURI(a.h, s.uri("")) == -1 {
		t.Fatal(libnbd.getError())
	}
	return a
}

// completion makes libnbd's form of done. nbd_get_errno is by thread, so whoever
// issues a command keeps his.
func (a *libnbdAio) completion(done func(syscall.Errno) int) completion {
	if done == nil {
		return completion{}
	}
	aioCommandsMu.Lock()
	defer aioCommandsMu.Unlock()
	c := &libnbdCommand{done: done}
	aioCommands = append(aioCommands, c)
	a.issued = append(a.issued, c)
	return completion{aioCallback, uintptr(len(aioCommands) - 1), aioFree}
}

func (a *libnbdAio) result(cookie int64) (uint64, syscall.Errno) {
	if cookie == -1 {
		return 0, syscall.Errno(libnbdModes.getErrno())
	}
	return uint64(cookie), 0
}

func (a *libnbdAio) flush(flags uint32, done func(syscall.Errno) int) (uint64, syscall.Errno) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	return a.result(libnbd.aioFlush(a.h, a.completion(done), flags))
}

func (a *libnbdAio) pwrite(p []byte, off uint64, flags uint32, done func(syscall.Errno) int) (uint64, syscall.Errno) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	a.pin.Pin(&p[0])
	return a.result(libnbd.aioPwrite(a.h, unsafe.Pointer(&p[0]), uintptr(len(p)), off, a.completion(done), flags))
}

func (a *libnbdAio) completed(cookie uint64) answer {
	switch libnbd.completed(a.h, cookie) {
	case 1:
		return succeeded
	case -1:
		return failed
	}
	return unknown
}

func (a *libnbdAio) settle(n int) {
	for libnbd.inFlight(a.h) > int32(n) && libnbd.poll(a.h, int32(patience.Milliseconds())) == 1 {
	}
}

func (a *libnbdAio) shutdown() { libnbd.shutdown(a.h, 0) }

func (a *libnbdAio) close() (freed int, twice bool) {
	libnbd.close(a.h)
	a.pin.Unpin()
	aioCommandsMu.Lock()
	defer aioCommandsMu.Unlock()
	for _, c := range a.issued {
		freed += min(c.frees, 1)
		twice = twice || c.frees > 1
	}
	return freed, twice
}

type clientAio struct {
	*client.Conn
	mu       sync.Mutex
	less     *sync.Cond // on mu: inFlight changed
	inFlight int
	// held are what the completion functions hold: it is collected when those are.
	held []weak.Pointer[[64]byte]
}

func dialClient(t *testing.T, s *server, state int, strict bool) aio {
	t.Helper()
	a := &clientAio{}
	a.less = sync.NewCond(&a.mu)
	if state == negotiating {
		return a // there is no Conn before the handshake has ended: nothing to call
	}
	opts := &client.Options{}
	if strict {
		opts.Strict = client.StrictAll
	}
	c, err := client.Dial(t.Context(), s.uri(""), opts)
	if err != nil {
		t.Fatal(err)
	}
	a.Conn = c
	if state == unconnected {
		c.Close() // a Conn that is not connected is one that was
	}
	return a
}

// completion counts, and holds something that can be seen to be let go.
func (a *clientAio) completion(done func(syscall.Errno) int) client.Completion {
	token := new([64]byte)
	a.held = append(a.held, weak.Make(token))
	return func(err error) int {
		defer runtime.KeepAlive(token)
		defer func() {
			a.mu.Lock()
			defer a.mu.Unlock()
			a.inFlight--
			a.less.Broadcast()
		}()
		if done == nil {
			return 0
		}
		return done(errnoOf(err))
	}
}

func errnoOf(err error) syscall.Errno {
	var errno syscall.Errno
	if err != nil && !errors.As(err, &errno) {
		return syscall.EIO
	}
	return errno
}

func (a *clientAio) issue(issue func() (uint64, error)) (uint64, syscall.Errno) {
	a.mu.Lock()
	a.inFlight++
	a.mu.Unlock()
	cookie, err := issue()
	if err != nil {
		a.mu.Lock()
		a.inFlight--
		a.mu.Unlock()
	}
	return cookie, errnoOf(err)
}

func (a *clientAio) flush(flags uint32, done func(syscall.Errno) int) (uint64, syscall.Errno) {
	if a.Conn == nil {
		return 0, syscall.EINVAL
	}
	c := a.completion(done)
	return a.issue(func() (uint64, error) { return a.AioFlush(protocol.CommandFlags(flags), c) })
}

func (a *clientAio) pwrite(p []byte, off uint64, flags uint32, done func(syscall.Errno) int) (uint64, syscall.Errno) {
	c := a.completion(done)
	return a.issue(func() (uint64, error) { return a.AioPwrite(p, off, protocol.CommandFlags(flags), c) })
}

func (a *clientAio) completed(cookie uint64) answer {
	if a.Conn == nil {
		return unknown
	}
	for {
		done, err := a.AioCommandCompleted(cookie)
		switch {
		case done && err != nil:
			return failed
		case done:
			return succeeded
		case err != nil || a.busy():
			return unknown
		}
		runtime.Gosched() // its completion is about to return
	}
}

// busy tells whether a completion has still to come.
func (a *clientAio) busy() bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.inFlight > 0
}

func (a *clientAio) settle(n int) {
	a.mu.Lock()
	defer a.mu.Unlock()
	for a.inFlight > n {
		a.less.Wait()
	}
}

func (a *clientAio) shutdown() { a.Disconnect() }

func (a *clientAio) close() (freed int, twice bool) {
	if a.Conn != nil {
		a.Conn.Close()
	}
	gone := func(h weak.Pointer[[64]byte]) bool { return h.Value() == nil }
	for i := 0; i < 10 && len(a.held) > 0; i++ { // it may find one on a stack that is about to go
		runtime.GC()
		freed += len(a.held)
		a.held = slices.DeleteFunc(a.held, gone)
		freed -= len(a.held)
	}
	return freed, false
}

// A flushOutcome is all that a caller of flush can see.
type flushOutcome struct {
	issued      bool
	refused     syscall.Errno // why not
	early       answer        // the answer before it has completed
	completions int
	told        syscall.Errno // what the completion was told
	first, next answer        // the answers after it has completed
	freed       int
	twice       bool
}

// TestAioFlush: package client keeps the contract of nbd_aio_flush, as libnbd shows
// it in the same places.
func TestAioFlush(t *testing.T) {
	t.Parallel()
	onlyNbdhost(t)
	const fua = uint32(protocol.CmdFlagFUA)
	refused := func(errno syscall.Errno) flushOutcome {
		return flushOutcome{refused: errno, early: unknown, first: unknown, next: unknown, freed: 1}
	}
	fine := flushOutcome{issued: true, early: unknown, completions: 1, first: succeeded, next: unknown, freed: 1}
	retired := flushOutcome{issued: true, early: unknown, completions: 1, first: unknown, next: unknown, freed: 1}
	broken := func(errno syscall.Errno) flushOutcome {
		return flushOutcome{issued: true, early: unknown, completions: 1, told: errno, first: failed, next: unknown, freed: 1}
	}
	for _, tt := range []struct {
		name    string
		plugin  string // "" is one with a gate in flush
		state   int
		relaxed bool // do not refuse what the server may refuse
		flags   uint32
		retire  bool // the completion returns 1
		silent  bool // there is no completion
		amid    func(s *server, a aio, g *gate)
		want    flushOutcome
		// freed is what the client alone cannot show, where there is nothing to free.
		nothing bool
	}{
		{name: "not connected", plugin: "errors", state: unconnected, want: refused(syscall.ENOTCONN)},
		{name: "negotiating", plugin: "errors", state: negotiating, want: refused(syscall.EINVAL), nothing: true},
		{name: "connected", state: connected, want: fine},
		{name: "retired by its completion", state: connected, retire: true, want: retired},
		{name: "no completion", state: connected, silent: true,
			want: flushOutcome{issued: true, early: unknown, first: succeeded, next: unknown}, nothing: true},
		{name: "server without flush", plugin: "block", state: connected, want: refused(syscall.EINVAL)},
		{name: "server without flush, asked", plugin: "block", state: connected, relaxed: true, want: broken(syscall.EINVAL)},
		{name: "flag of another command", plugin: "errors", state: connected, flags: fua, want: refused(syscall.EINVAL)},
		{name: "unknown flag", plugin: "errors", state: connected, flags: 1 << 9, want: refused(syscall.EINVAL)},
		{name: "unknown flag, asked", plugin: "errors", state: connected, relaxed: true, flags: 1 << 9, want: broken(syscall.EINVAL)},
		{name: "error from the server", plugin: "errors", state: connected, want: broken(syscall.ENOSPC)},
		{name: "error, retired", plugin: "errors", state: connected, retire: true,
			want: flushOutcome{issued: true, early: unknown, completions: 1, told: syscall.ENOSPC, first: unknown, next: unknown, freed: 1}},
		{name: "server gone while in flight", state: connected,
			amid: func(s *server, _ aio, _ *gate) { s.kill() }, want: broken(syscall.ENOTCONN)},
		{name: "disconnect while in flight", state: connected,
			amid: func(_ *server, a aio, g *gate) { g.open(1); a.shutdown() }, want: fine},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			for kind, dial := range dialers {
				t.Run(kind, func(t *testing.T) {
					t.Parallel()
					got := flushOnce(t, tt.plugin, func(s *server) aio { return dial(t, s, tt.state, !tt.relaxed) }, tt.flags, tt.retire, tt.silent, tt.amid)
					if tt.nothing {
						got.freed, got.twice = tt.want.freed, false
					}
					if got != tt.want {
						t.Errorf("got  %+v\nwant %+v", got, tt.want)
					}
				})
			}
		})
	}
}

// flushOnce issues one flush, does amid while it is in flight, and looks at it.
func flushOnce(t *testing.T, plugin string, dial func(*server) aio, flags uint32, retire, silent bool, amid func(*server, aio, *gate)) (o flushOutcome) {
	dir := tempDir(t)
	j, g := newJournal(t, dir), newGate(t, dir)
	args := []string{checkFixture(t, "volatile"), "file=DIR/storage", "journal=DIR/journal", "gate=DIR/gate", "slow=1"}
	if plugin != "" {
		args = []string{fixture(t, plugin)}
	}
	s := start(t, nbdhost, dir, false, args...)
	a := dial(s)
	var mu sync.Mutex
	done := func(errno syscall.Errno) int {
		mu.Lock()
		defer mu.Unlock()
		o.completions++
		o.told = errno
		if retire {
			return 1
		}
		return 0
	}
	if silent {
		done = nil
	}
	cookie, errno := a.flush(flags, done)
	o.issued, o.refused = cookie >= 1, errno
	o.early = unknown
	if o.issued {
		if plugin == "" {
			notify := make(chan struct{})
			go func() { j.wait("flush", 1); close(notify) }()
			if l, ok := a.(*libnbdAio); ok { // which sends when it is polled, or at once
				libnbd.poll(l.h, 0)
			}
			<-notify
		}
		if plugin == "" {
			o.early = a.completed(cookie) // it waits at the gate
		}
		switch {
		case amid != nil:
			amid(s, a, g)
		case plugin == "":
			g.open(1)
		}
		a.settle(0)
	}
	o.first, o.next = unknown, unknown
	if o.issued {
		o.first, o.next = a.completed(cookie), a.completed(cookie)
	}
	o.freed, o.twice = a.close()
	mu.Lock()
	defer mu.Unlock()
	return o
}

// A storm is many connections with writes and flushes in flight, up to the moment
// when the server loses its volatile cache.
type storm struct {
	mu       sync.Mutex
	answered []uint64 // blocks, in the order of the answers to their writes
	flushed  int      // how many of answered a flush has made durable
	flushes  int      // that were answered
	durable  []uint64 // blocks that were written with FUA
	enough   chan struct{}
}

const (
	stormConnections = 6
	stormWrites      = 2000 // on each connection, each to a block of its own
	stormFlushes     = 200  // after so many the power goes
	stormInFlight    = 512  // commands on each connection: thousands in all
	stormBlock       = 512
)

// stormData is what is written to the block with this number.
func stormData(number uint64) []byte {
	return bytes.Repeat(binary.BigEndian.AppendUint64(nil, number+1), stormBlock/8)
}

// one runs a connection, the k-th.
func (m *storm) one(a aio, k uint64) {
	for i := range uint64(stormWrites) {
		number := k*stormWrites + i
		flags := uint32(0)
		if i%7 == 3 {
			flags = uint32(protocol.CmdFlagFUA)
		}
		cookie, _ := a.pwrite(stormData(number), number*stormBlock, flags, func(errno syscall.Errno) int {
			m.mu.Lock()
			defer m.mu.Unlock()
			switch {
			case errno != 0:
			case flags != 0:
				m.durable = append(m.durable, number)
			default:
				m.answered = append(m.answered, number)
			}
			return 1
		})
		if cookie == 0 {
			break
		}
		if i%16 == 15 {
			m.mu.Lock()
			covers := len(m.answered)
			m.mu.Unlock()
			a.flush(0, func(errno syscall.Errno) int {
				m.mu.Lock()
				defer m.mu.Unlock()
				if errno == 0 {
					m.flushed = max(m.flushed, covers)
					if m.flushes++; m.flushes == stormFlushes {
						close(m.enough)
					}
				}
				return 1
			})
		}
		a.settle(stormInFlight)
	}
	a.settle(0)
	a.close()
}

// lost runs a storm, and returns how many blocks a flush, and how many a write with
// FUA, had made durable, and which of them are not in the storage afterwards.
func lost(t *testing.T, dial func(*testing.T, *server, int, bool) aio, lose string) (flushed, forced, lostFlushed, lostForced int) {
	dir := tempDir(t)
	s := start(t, nbdhost, dir, false, checkFixture(t, "volatile"), "file=DIR/storage", "lose="+lose)
	m := &storm{enough: make(chan struct{})}
	var all sync.WaitGroup
	for k := range uint64(stormConnections) {
		a := dial(t, s, connected, true)
		all.Go(func() { m.one(a, k) })
	}
	<-m.enough
	s.kill()
	all.Wait()
	storage, err := os.ReadFile(filepath.Join(dir, "storage"))
	if err != nil {
		t.Fatal(err)
	}
	missing := func(numbers []uint64) (n int) {
		for _, number := range numbers {
			if !bytes.Equal(storage[number*stormBlock:][:stormBlock], stormData(number)) {
				n++
			}
		}
		return n
	}
	return m.flushed, len(m.durable), missing(m.answered[:m.flushed]), missing(m.durable)
}

// TestAioDurable: a flush that is answered after a write's answer covers that
// write, whichever connection it came on, and a write with FUA is durable when it
// is answered.
func TestAioDurable(t *testing.T) {
	t.Parallel()
	onlyNbdhost(t)
	for kind, dial := range dialers {
		for _, lose := range []string{"", "flush", "fua"} {
			t.Run(fmt.Sprintf("%s/lose %q", kind, lose), func(t *testing.T) {
				t.Parallel()
				flushed, forced, lostFlushed, lostForced := lost(t, dial, lose)
				t.Logf("%d blocks flushed, %d with FUA; %d and %d lost", flushed, forced, lostFlushed, lostForced)
				if flushed == 0 || forced == 0 {
					t.Fatal("the storm was over before anything was durable")
				}
				// A plugin that forgets must be found out, or nothing is shown here.
				if (lostFlushed > 0) != (lose == "flush") {
					t.Errorf("got %d of %d flushed blocks lost with lose=%q", lostFlushed, flushed, lose)
				}
				if lose == "" && lostForced > 0 || lose == "fua" && lostForced == 0 {
					t.Errorf("got %d of %d blocks lost that were written with FUA, with lose=%q", lostForced, forced, lose)
				}
			})
		}
	}
}
