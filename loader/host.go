package loader

import (
	"log/slog"
	"sync"

	"nbdhost/backend"
	"nbdhost/cshim"
)

// Host is what modules ask of the program. The functions are called on any
// thread, while it is inside C: they return soon and never wait for a module.
type Host struct {
	// Log takes what modules say.
	Log func(Message)
	// Secret takes each password that a module has read (nbdkit_read_password(3)).
	Secret func(text string)
	// Redact takes secrets out of the error texts of modules, which go to clients.
	Redact func(text string) string
	// Shutdown asks for the server to stop, as nbdkit_shutdown(3) does. Which server's module it
	// was is not told.
	Shutdown func()
	// Name is what the user called the server, "" if he did not.
	Name string
}

// A Message is one line of text from nbdkit_error (slog.LevelError) or nbdkit_debug
// (slog.LevelDebug).
type Message struct {
	Level  slog.Level
	Text   string
	Conn   uint64       // the number of the connection, 0 for none
	Log    *slog.Logger // the connection's, or nil
	Worker int          // backend.Handshake outside of the workers of a connection
	Export string       // "" for none

	Module, Callback string // "" outside of calls
	Request          bool   // the call was for a request of the client's, which has this
	Cookie           uint64
}

// Init prepares the process for modules. It comes before anything else here, once. It changes
// what some signals do; see the package's documentation.
func Init(h Host) error {
	hostLog, hostRedact = h.Log, h.Redact
	cshim.SetHost(cshim.Host{
		Log: func(m cshim.Message) {
			if h.Log == nil {
				return
			}
			to := Message{Level: slog.LevelDebug, Text: m.Text, Conn: m.Conn, Worker: m.Worker, Export: m.Export,
				Module: m.Module, Callback: m.Callback, Request: m.Request, Cookie: m.Cookie}
			if m.Level == cshim.LevelError {
				to.Level = slog.LevelError
			}
			if c := connByID(m.Conn); c != nil {
				to.Log = c.Logger()
			}
			h.Log(to)
		},
		Secret: func(text string) {
			if h.Secret != nil {
				h.Secret(text)
			}
		},
		Shutdown: func() {
			if h.Shutdown != nil {
				h.Shutdown()
			}
		},
		Disconnect: disconnect,
		Name:       h.Name,
	})
	return cshim.Init()
}

// SetVerbose says whether modules' debug lines are wanted. They are not at first.
func SetVerbose(on bool) { cshim.SetVerbose(on) }

// EndConfiguration comes after .get_ready. Modules may not use standard input and output any more
// ([SetStdioSafe]), and the programs that they start ignore SIGPIPE from here on, as with nbdkit.
func EndConfiguration() {
	SetStdioSafe(false)
	cshim.IgnoreSIGPIPE()
}

// SetStdioSafe says whether modules may use standard input and output while they
// are configured (nbdkit_stdio_safe(3)). They may unless told otherwise.
func SetStdioSafe(on bool) { cshim.SetStdioSafe(on) }

// Quit ends every nbdkit_nanosleep(3), now and from now on. Call it when the last server
// begins to stop: it cannot be undone.
func Quit() { cshim.SetQuit() }

// ReportCrashesTo says to which descriptor one line goes, as an object of JSON or as
// text, when a module crashes, aborts, or exits on behalf of a client. It is text on
// standard error until this is called. head precedes it, and begins the object.
func ReportCrashesTo(fd int, json bool, head string) {
	format := cshim.CrashText
	if json {
		format = cshim.CrashJSON
	}
	cshim.ReportCrashesTo(fd, format, head)
}

// SetCommandLine puts args in the place of what the process was started with, where ps(1) finds them; what
// has no room there is left out.
func SetCommandLine(args []string) { cshim.SetCommandLine(args) }

// Exit ends the process after what modules gave to atexit(3) has run.
func Exit(code int) { cshim.Exit(code) }

// conns holds the connections that modules know, by number: a module may ask for
// one to be ended long after the call in which it saw it.
var conns struct {
	mu   sync.Mutex
	byID map[uint64]*backend.Conn
}

func disconnect(id uint64, force bool) {
	if c := connByID(id); c != nil && c.Disconnect != nil {
		c.Disconnect(force)
	}
}

// connByID returns the connection with that number, nil if modules know none.
func connByID(id uint64) *backend.Conn {
	conns.mu.Lock()
	defer conns.mu.Unlock()
	return conns.byID[id]
}

// shimConn returns the C side of a connection in step with c.Conn, and makes it on
// the connection's first call, which is one of the handshake. It is nil for a call
// on behalf of no connection.
func shimConn(c *backend.Call) *cshim.Conn {
	conn := c.Conn
	if conn == nil || conn.ID == 0 {
		return nil // no client's
	}
	s, ok := conn.Local.(*cshim.Conn)
	if !ok {
		s = cshim.NewConn(conn.ID, conn.FD)
		conns.mu.Lock()
		if conns.byID == nil {
			conns.byID = map[uint64]*backend.Conn{}
		}
		conns.byID[conn.ID] = conn
		conns.mu.Unlock()
		conn.Local = s
		conn.OnMove = s.SetFD
		conn.OnRelease = func() {
			conns.mu.Lock()
			delete(conns.byID, conn.ID)
			conns.mu.Unlock()
			s.Free()
		}
	}
	if conn.TLS && !s.TLS() { // once: later calls may be under way that ask for it
		s.SetTLSDN(conn.TLSDN, conn.TLSIssuerDN)
		s.SetTLS(true)
	}
	return s
}
