package main

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"log/syslog"
	"os"
	"strings"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"
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
// Other attributes follow the text. Every message is one write, so that those of
// several processes and threads do not mix.
type logHandler struct {
	*logOutput
	conn   uint64 // 0: none
	worker int64  // -1: none
	attrs  string
}

// logOutput is what the handlers derived from one another share.
type logOutput struct {
	name    string // what lines begin with
	tag     string // what the system log knows us as
	verbose bool
	stderr  io.Writer
	module  atomic.Pointer[string]          // the plugin's name, once it is known
	errors  atomic.Pointer[func(m message)] // takes errors
}

// newLog returns a handler that writes everything to stderr, until logErrorsTo is
// called.
func newLog(o *options, stderr io.Writer) *logHandler {
	out := &logOutput{name: defaultName, tag: defaultName, verbose: o.verbose, stderr: stderr}
	if o.name != "" {
		out.name, out.tag = defaultName+"["+o.name+"]", o.name
	}
	out.toStderr()
	return &logHandler{logOutput: out, worker: -1}
}

func (h *logOutput) setModule(name string) { h.module.Store(&name) }

func (h *logOutput) setErrors(f func(message)) { h.errors.Store(&f) }

// A message is an error: as a line, and as the system log wants it, which has a
// name and a level of its own.
type message struct {
	line []byte
	text string
}

func (h *logOutput) toStderr() {
	color := isTerminal(h.stderr)
	h.setErrors(func(m message) {
		if color { // red
			m.line = append(append([]byte("\033[1;31m"), m.line...), "\033[0m"...)
		}
		h.stderr.Write(m.line) // nobody is left to tell
	})
}

func isTerminal(w io.Writer) bool {
	f, ok := w.(*os.File)
	if !ok {
		return false
	}
	_, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS)
	return err == nil
}

// logErrorsTo does what --log says; where is a value of that option.
func (h *logOutput) logErrorsTo(where string) error {
	switch where {
	case logDefault, logStderr:
		h.toStderr()
	case logNull:
		h.setErrors(func(message) {})
	case logSyslog:
		h.toSyslog(func() (*syslog.Writer, error) {
			return syslog.New(syslog.LOG_DAEMON|syslog.LOG_ERR, h.tag)
		})
	default:
		f, err := os.OpenFile(where, os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o666)
		if err != nil {
			return fmt.Errorf("open log: %w", err)
		}
		h.setErrors(func(m message) { f.Write(m.line) })
	}
	return nil
}

// toSyslog sends errors where dial connects to. What cannot be sent is lost, as
// it is with syslog(3).
func (h *logOutput) toSyslog(dial func() (*syslog.Writer, error)) {
	var mu sync.Mutex
	var w *syslog.Writer
	h.setErrors(func(m message) {
		mu.Lock()
		defer mu.Unlock()
		if w == nil {
			if w, _ = dial(); w == nil {
				return
			}
		}
		io.WriteString(w, m.text)
	})
}

func (h *logHandler) Enabled(_ context.Context, level slog.Level) bool {
	return h.verbose || level >= slog.LevelWarn
}

func (h *logHandler) Handle(_ context.Context, r slog.Record) error {
	here := *h
	r.Attrs(func(a slog.Attr) bool { here.add(a); return true })
	where := ""
	if module := h.module.Load(); module != nil && here.worker >= 0 {
		where = fmt.Sprintf("%s.%d: ", *module, here.worker)
	} else if module != nil && here.conn > 0 {
		where = fmt.Sprintf("%s[%d]: ", *module, here.conn)
	}
	text := r.Message + here.attrs
	b := append(make([]byte, 0, 256), h.name...)
	b = append(b, ": "+where+levelName(r.Level)+": "+text+"\n"...)
	if r.Level >= slog.LevelError {
		(*h.errors.Load())(message{b, where + text})
		return nil
	}
	_, err := h.stderr.Write(b)
	return err
}

// fromModule logs what a module said ([loader.Host]).
func (h *logHandler) fromModule(level slog.Level, conn uint64, worker int, text string) {
	here := *h
	here.conn, here.worker = conn, int64(worker)
	here.Handle(context.Background(), slog.Record{Level: level, Message: text})
}

func levelName(level slog.Level) string {
	switch {
	case level >= slog.LevelError:
		return "error"
	case level >= slog.LevelWarn:
		return "warning"
	case level >= slog.LevelInfo:
		return "info"
	}
	return "debug"
}

// add takes an attribute into h, which is a copy of the caller's.
func (h *logHandler) add(a slog.Attr) {
	v := a.Value.Resolve()
	switch {
	case a.Key == "conn" && v.Kind() == slog.KindUint64:
		h.conn = v.Uint64()
	case a.Key == "worker" && v.Kind() == slog.KindInt64:
		h.worker = v.Int64()
	default:
		text := v.String()
		if text == "" || strings.ContainsAny(text, " \"\n") {
			text = fmt.Sprintf("%q", text)
		}
		h.attrs += " " + a.Key + "=" + text
	}
}

func (h *logHandler) WithAttrs(attrs []slog.Attr) slog.Handler {
	c := *h
	for _, a := range attrs {
		c.add(a)
	}
	return &c
}

// WithGroup ignores the group: attributes have no prefixes here.
func (h *logHandler) WithGroup(string) slog.Handler { return h }
