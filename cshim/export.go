package cshim

// #include "shim.h"
// // What cgo generates has parameters that it does not use.
// #pragma GCC diagnostic ignored "-Wunused-parameter"
import "C"

import (
	"fmt"
	"os"
	"os/signal"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"unsafe"
)

// Level is the kind of a log line.
type Level int

// Kinds of log lines.
const (
	LevelError Level = C.NBDHOST_LEVEL_ERROR // nbdkit_error
	LevelDebug Level = C.NBDHOST_LEVEL_DEBUG // nbdkit_debug
)

// Host is what modules ask of the server. Its functions are called on any
// thread, a module's own included, while that thread is inside C: they must
// return soon and must not wait for anything that needs a module to return.
// A panic in them is logged and dropped.
type Host struct {
	// Log takes one message.
	Log func(Message)
	// Secret takes each password that a module has read.
	Secret func(text string)
	// Shutdown asks for the server to stop.
	Shutdown func()
	// Disconnect asks for connection conn to end, at once if force is set.
	Disconnect func(conn uint64, force bool)
	// Name of the server as set by the user, "" if it was not.
	Name string
}

// A Message is what a module said with nbdkit_error or nbdkit_debug.
type Message struct {
	Level  Level
	Text   string // without the prefix and the end of line
	Conn   uint64 // the connection's number, 0 outside of connections
	Worker int    // Handshake outside of the workers of a connection
	Export string // its name, "" if there is none

	Module, Callback string // the call that the message came in; "" outside of calls
	Request          bool   // it was for a client's request, which has this
	Cookie           uint64
}

var host atomic.Pointer[Host]

// SetHost sets the callbacks from modules, once, before a module is loaded.
func SetHost(h Host) {
	host.Store(&h)
	if h.Name == "" {
		C.nbdhost_set_name(nil)
	} else {
		C.nbdhost_set_name(NewCStr(h.Name).p)
	}
}

// Init prepares the process for modules: SIGPIPE ends no thread, neither Go's nor
// others, and no handler of the Go runtime interrupts system calls for
// signals that nobody waits for. Call it once, before anything is loaded.
func Init() error {
	// Caught and not ignored: the programs that modules start have it at its default.
	signal.Notify(make(chan os.Signal, 1), syscall.SIGPIPE)
	if err := C.nbdhost_init(); err != 0 {
		return fmt.Errorf("create eventfd: %w", syscall.Errno(err))
	}
	if err := C.nbdhost_crash_init(); err != 0 {
		return fmt.Errorf("prepare for crashes: %w", syscall.Errno(err))
	}
	return nil
}

// IgnoreSIGPIPE has the programs that modules start from now on ignore SIGPIPE, as nbdkit does once it
// is configured. It takes the place of an earlier [SaveSignals].
func IgnoreSIGPIPE() {
	signal.Ignore(syscall.SIGPIPE)
	SaveSignals()
}

// moduleNames are those of modules, for C: a map[string]CStr.
var moduleNames sync.Map

// NameCallback says what the function at fn is, for crash reports and log lines: the
// callback name ("pread") of a module of a kind ("plugin", "filter").
func NameCallback(fn unsafe.Pointer, kind, module, name string) {
	owner, ok := moduleNames.Load(module)
	if !ok {
		owner, _ = moduleNames.LoadOrStore(module, NewCStr(module))
	}
	if C.nbdhost_callback_add(fn, NewCStr(kind).p, owner.(CStr).p, NewCStr(name).p) != 0 {
		panic("cshim: out of memory")
	}
}

// CrashFormat is how a crash is reported.
type CrashFormat int

// Formats of crash reports.
const (
	CrashText CrashFormat = C.NBDHOST_CRASH_TEXT // a line as those of nbdkit_error
	CrashJSON CrashFormat = C.NBDHOST_CRASH_JSON // one object
)

// ReportCrashesTo says where one write(2) goes, of at most 1 KiB, when a module crashes,
// aborts, or exits on behalf of a client: to standard error as text until it is
// called. head precedes it, and begins an object of JSON, to which members are added.
// The descriptor stays the caller's and must not be closed; less than 0 is none.
func ReportCrashesTo(fd int, format CrashFormat, head string) {
	C.nbdhost_crash_report_to(C.int(fd), uint32(format), NewCStr(head).p)
}

// SetVerbose turns nbdkit_debug on. While it is off nothing is formatted.
func SetVerbose(on bool) { C.nbdhost_set_verbose(cbool(on)) }

// SetStdioSafe says whether modules may use standard input and output while they are
// configured. They may unless told otherwise.
func SetStdioSafe(on bool) { C.nbdhost_set_stdio_safe(cbool(on)) }

// SetQuit ends every nbdkit_nanosleep, now and from now on: the server is stopping.
func SetQuit() { C.nbdhost_set_quit() }

// SaveSignals records the disposition of every signal. Call it before .load.
func SaveSignals() { C.nbdhost_signals_save() }

// RestoreSignals undoes what a module did to signals since [SaveSignals]: the
// ones that had a handler (the Go runtime's) and the ones that stop the server get
// their disposition back; other handlers of the module stay and run on the
// alternate stack, without which the Go runtime aborts. Call it after .load,
// .config, .config_complete, .get_ready, .after_fork and a plugin's .open.
func RestoreSignals() { C.nbdhost_signals_restore() }

// SetCommandLine puts args in the place of the arguments that the process was started
// with, where ps(1) finds them; what has no room there is left out. The memory is that
// of the first os.Args: texts in it change.
func SetCommandLine(args []string) {
	joined := strings.Join(args, "\x00")
	text := C.CString(joined)
	defer C.free(unsafe.Pointer(text))
	C.nbdhost_set_command_line(text, C.size_t(len(joined)))
}

// Exit ends the process through exit(3), which runs what modules gave to atexit(3).
func Exit(code int) { C.exit(C.int(code)) }

// recovered keeps a panic from crossing the C frames above.
func recovered(op string) {
	if r := recover(); r != nil {
		fmt.Fprintf(os.Stderr, "nbdhost: error: %s: panic: %v\n", op, r)
	}
}

//export nbdhost_go_log
func nbdhost_go_log(m *C.struct_nbdhost_message) {
	defer recovered("log")
	if h := host.Load(); h != nil && h.Log != nil {
		h.Log(Message{
			Level: Level(m.level), Text: C.GoString(m.text),
			Conn: uint64(m.conn), Worker: int(m.worker), Export: C.GoString(m.export_name),
			Module: C.GoString(m.module), Callback: C.GoString(m.callback),
			Request: bool(m.request), Cookie: uint64(m.cookie),
		})
	}
}

//export nbdhost_go_secret
func nbdhost_go_secret(text *C.char) {
	defer recovered("hide secret")
	if h := host.Load(); h != nil && h.Secret != nil {
		h.Secret(C.GoString(text))
	}
}

//export nbdhost_go_shutdown
func nbdhost_go_shutdown() {
	defer recovered("shut down")
	if h := host.Load(); h != nil && h.Shutdown != nil {
		h.Shutdown()
	}
}

//export nbdhost_go_disconnect
func nbdhost_go_disconnect(conn C.uint64_t, force C.int) {
	defer recovered("disconnect")
	if h := host.Load(); h != nil && h.Disconnect != nil {
		h.Disconnect(uint64(conn), force != 0)
	}
}
