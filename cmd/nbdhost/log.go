package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"log/syslog"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"nbdhost/loader"
)

// Values of --log that are no path.
const (
	logDefault = "default"
	logStderr  = "stderr"
	logSyslog  = "syslog"
	logNull    = "null"
)

// Values of --log-format.
const (
	logText = "text"
	logJSON = "json"
)

// defaultName begins messages. Programs that run nbdkit look for it.
const defaultName = "nbdkit"

// logHandler is a slog.Handler that writes as nbdkit does:
//
//	NAME: LEVEL: TEXT            outside connections
//	NAME: MODULE[N]: LEVEL: TEXT with attribute conn=N, in a handshake
//	NAME: MODULE.W: LEVEL: TEXT  with attributes conn=N worker=W, in a request
//
// Other attributes follow the text, but for those that only say more of where the
// message comes from ([contextKeys]). With --log-format=json a message is an object,
// with all attributes. Every message is one write, so that those of several processes
// and threads do not mix.
type logHandler struct {
	*logOutput
	conn   uint64 // 0: none
	worker int64  // -1: none
	attrs  string // for text
	all    []slog.Attr
}

// contextKeys are attributes that a line of text does not show: nbdkit's has no place
// for them, and where they matter the message has them in it.
var contextKeys = []string{
	"peer", "export", "tls", "command", "callback", "cookie", "offset", "length", "errno", "module", "ms", "unlogged", "seconds",
}

// logOutput is what the handlers derived from one another share.
type logOutput struct {
	name    string // what lines begin with
	tag     string // what the system log knows us as
	verbose bool
	json    bool
	server  string // what --name says
	redact  func(string) string
	stderr  io.Writer
	module  atomic.Pointer[string]          // the plugin's name, once it is known
	sink    atomic.Pointer[func(m message)] // takes errors and warnings, and what JSON has besides

	// Crash reports are not made here: the descriptor that they go to, where they are lines of
	// their own, what precedes one, and the supervisor's, which wants to have them.
	crashFD   int
	crashHead string
	superior  *superior
}

// newLog returns a handler that writes everything to stderr, until logTo is
// called.
func newLog(o *options, stderr io.Writer) *logHandler {
	out := &logOutput{name: defaultName, tag: defaultName, verbose: o.verbose, json: o.logFormat == logJSON,
		server: o.name, redact: o.secrets.redact, stderr: stderr, superior: o.superior}
	if o.name != "" {
		out.name, out.tag = defaultName+"["+o.name+"]", o.name
	}
	out.toStderr()
	return &logHandler{logOutput: out, worker: -1}
}

func (h *logOutput) setModule(name string) {
	h.module.Store(&name)
	h.reportCrashes()
}

// setSink has f take messages, and crash reports go to the descriptor, with head before each.
func (h *logOutput) setSink(f func(message), crashFD int, crashHead string) {
	h.sink.Store(&f)
	h.crashFD, h.crashHead = crashFD, crashHead
	h.reportCrashes()
}

// reportCrashes has crash reports go where errors go, or to the supervisor.
func (h *logOutput) reportCrashes() {
	object := []byte(`{"level":"ERROR"`)
	switch {
	case h.superior != nil:
		loader.ReportCrashesTo(h.superior.Control, true, string(object))
	case h.json:
		if h.server != "" {
			object = fmt.Appendf(object, `,"name":%s`, quoteJSON(h.server))
		}
		if module := h.module.Load(); module != nil {
			object = fmt.Appendf(object, `,"plugin":%s`, quoteJSON(*module))
		}
		loader.ReportCrashesTo(h.crashFD, true, h.crashHead+string(object))
	case h.crashHead != "":
		loader.ReportCrashesTo(h.crashFD, false, h.crashHead)
	default:
		loader.ReportCrashesTo(h.crashFD, false, h.name+": error: ")
	}
}

func quoteJSON(s string) []byte {
	b, _ := json.Marshal(s) // a string never fails
	return b
}

// A message as a line, and as the system log wants it, which has a name and a level
// of its own.
type message struct {
	line  []byte
	text  string
	level slog.Level
}

func (h *logOutput) toStderr() {
	color := isTerminal(h.stderr) && !h.json
	h.setSink(func(m message) {
		if color && m.level >= slog.LevelError { // red
			m.line = append(append([]byte("\033[1;31m"), m.line...), "\033[0m"...)
		}
		h.stderr.Write(m.line) // nobody is left to tell
	}, unix.Stderr, "")
}

func isTerminal(w io.Writer) bool {
	f, ok := w.(*os.File)
	if !ok {
		return false
	}
	_, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS)
	return err == nil
}

// logTo does what --log says; where is a value of that option.
func (h *logOutput) logTo(where string) error {
	switch where {
	case logDefault, logStderr:
		h.toStderr()
	case logNull:
		h.setSink(func(message) {}, -1, "")
	case logSyslog:
		h.toSyslog(func() (*syslog.Writer, error) {
			return syslog.New(syslog.LOG_DAEMON|syslog.LOG_ERR, h.tag)
		})
	default:
		f, err := os.OpenFile(where, os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o666)
		if err != nil {
			return fmt.Errorf("open log: %w", err)
		}
		h.setSink(func(m message) { f.Write(m.line) }, int(f.Fd()), "")
	}
	return nil
}

// toSyslog sends messages where dial connects to. What cannot be sent is lost, as
// it is with syslog(3).
func (h *logOutput) toSyslog(dial func() (*syslog.Writer, error)) {
	var mu sync.Mutex
	var w *syslog.Writer
	head := fmt.Sprintf("<%d>%s[%d]: ", syslog.LOG_DAEMON|syslog.LOG_ERR, h.tag, os.Getpid())
	h.setSink(func(m message) {
		mu.Lock()
		defer mu.Unlock()
		if w == nil {
			if w, _ = dial(); w == nil {
				return
			}
		}
		switch {
		case m.level >= slog.LevelError:
			w.Err(m.text)
		case m.level >= slog.LevelWarn:
			w.Warning(m.text)
		default:
			w.Info(m.text)
		}
	}, systemLog(), head)
}

// systemLog returns a descriptor of the system log's socket, or -1 where nobody listens.
func systemLog() int {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return -1
	}
	if err := unix.Connect(fd, &unix.SockaddrUnix{Name: "/dev/log"}); err != nil {
		unix.Close(fd)
		return -1
	}
	return fd
}

func (h *logHandler) Enabled(_ context.Context, level slog.Level) bool {
	return h.verbose || level >= slog.LevelWarn || h.json && level >= slog.LevelInfo
}

func (h *logHandler) Handle(ctx context.Context, r slog.Record) error {
	here := *h
	here.all = slices.Clip(h.all)
	r.Attrs(func(a slog.Attr) bool { here.add(a); return true })
	m := message{level: r.Level}
	if h.json {
		m.line = here.object(ctx, r)
		m.text = strings.TrimSuffix(string(m.line), "\n")
	} else {
		where := ""
		if module := h.module.Load(); module != nil && here.worker >= 0 {
			where = fmt.Sprintf("%s.%d: ", *module, here.worker)
		} else if module != nil && here.conn > 0 {
			where = fmt.Sprintf("%s[%d]: ", *module, here.conn)
		}
		text := h.redact(r.Message + here.attrs)
		m.line = append(make([]byte, 0, 256), h.name...)
		m.line = append(m.line, ": "+where+levelName(r.Level)+": "+text+"\n"...)
		m.text = where + text
	}
	if r.Level >= slog.LevelWarn || h.json && r.Level >= slog.LevelInfo {
		(*h.sink.Load())(m)
		return nil
	}
	_, err := h.stderr.Write(m.line)
	return err
}

// object returns the line for a message as JSON.
func (h *logHandler) object(ctx context.Context, r slog.Record) []byte {
	when := r.Time
	if when.IsZero() {
		when = time.Now()
	}
	to := slog.NewRecord(when.UTC(), r.Level, h.redact(r.Message), 0)
	if h.server != "" {
		to.AddAttrs(slog.String("name", h.server))
	}
	if module := h.module.Load(); module != nil {
		to.AddAttrs(slog.String("plugin", *module))
	}
	for _, a := range h.all {
		if v := a.Value.Resolve(); v.Kind() == slog.KindString || v.Kind() == slog.KindAny {
			a.Value = slog.StringValue(h.redact(v.String()))
		}
		to.AddAttrs(a)
	}
	var b bytes.Buffer
	_ = slog.NewJSONHandler(&b, &slog.HandlerOptions{Level: slog.LevelDebug}).Handle(ctx, to) // a Buffer takes everything
	return b.Bytes()
}

// report logs an error that ends the program, where a line of another form would not be
// understood.
func (h *logHandler) report(err error) error {
	if err == nil || !h.json || errors.Is(err, errReported) || saidByModule(err) {
		return err
	}
	slog.New(h).Error(err.Error())
	return errReported
}

// fromModule logs what a module said ([loader.Host]).
func (h *logHandler) fromModule(m loader.Message) {
	here := *h
	if m.Log != nil {
		here = *m.Log.Handler().(*logHandler) // which knows the client
	}
	r := slog.NewRecord(time.Now(), m.Level, m.Text, 0)
	if m.Conn > 0 {
		r.AddAttrs(slog.Uint64("conn", m.Conn))
	}
	if m.Worker >= 0 {
		r.AddAttrs(slog.Int("worker", m.Worker))
	}
	if h.json {
		for _, a := range []slog.Attr{slog.String("export", m.Export), slog.String("module", m.Module), slog.String("callback", m.Callback)} {
			if a.Value.String() != "" {
				r.AddAttrs(a)
			}
		}
		if m.Request {
			r.AddAttrs(slog.Uint64("cookie", m.Cookie))
		}
	}
	_ = here.Handle(context.Background(), r) // nobody is left to tell
}

// levelName has nbdkit's words, which has no level between debug and warning.
func levelName(level slog.Level) string {
	switch {
	case level >= slog.LevelError:
		return "error"
	case level >= slog.LevelWarn:
		return "warning"
	}
	return "debug"
}

// add takes an attribute into h, which is a copy of the caller's. Of several with one
// key the last counts.
func (h *logHandler) add(a slog.Attr) {
	v := a.Value.Resolve()
	switch {
	case a.Key == "conn" && v.Kind() == slog.KindUint64:
		h.conn = v.Uint64()
	case a.Key == "worker" && v.Kind() == slog.KindInt64:
		h.worker = v.Int64()
	case h.json || slices.Contains(contextKeys, a.Key):
	default:
		text := v.String()
		if text == "" || strings.ContainsAny(text, " \"\n") {
			text = fmt.Sprintf("%q", text)
		}
		h.attrs += " " + a.Key + "=" + text
	}
	if h.json {
		same := func(b slog.Attr) bool { return b.Key == a.Key }
		if i := slices.IndexFunc(h.all, same); i >= 0 {
			h.all = slices.Delete(slices.Clone(h.all), i, i+1)
		}
		h.all = append(h.all, a)
	}
}

func (h *logHandler) WithAttrs(attrs []slog.Attr) slog.Handler {
	c := *h
	c.all = slices.Clip(h.all)
	for _, a := range attrs {
		c.add(a)
	}
	return &c
}

// WithGroup ignores the group: attributes have no prefixes here.
func (h *logHandler) WithGroup(string) slog.Handler { return h }
