package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"nbdhost/backend"
)

// With --supervise there are two processes. The supervisor is the one that was started:
// it holds the listening sockets, the pidfile, the command of --run and the words with
// the service manager, and no module. It runs the program again as the server, which
// has all the rest, and starts another one when a module has ended that.

// superviseVariable is how the server is told what it needs, as JSON of orders.
const superviseVariable = "NBDHOST_SUPERVISED"

// orders are for a server with a supervisor. Descriptors have the same numbers in both.
type orders struct {
	// Control is a socket of messages to the supervisor: words of sd_notify(3),
	// crash reports, which begin with {, and ERROR=TEXT. When the supervisor
	// closes its end, or dies, the server stops.
	Control    int
	Listeners  []int
	Background bool          // give up the standard streams, and before that
	Again      bool          // do not use them: they have been given up already
	Watchdog   time.Duration // of the service manager, see notifier
}

// A superior is the supervisor, as the server knows it.
type superior struct {
	orders
	notifier
	control *os.File // closes Control, which crash reports need, when nobody refers to it any more
}

// findSupervisor returns the supervisor of this process, nil if it has none. It hides
// it from modules and the programs that they run.
func findSupervisor() (*superior, error) {
	v, ok := os.LookupEnv(superviseVariable)
	if !ok {
		return nil, nil
	}
	os.Unsetenv(superviseVariable)
	s := &superior{}
	if err := json.Unmarshal([]byte(v), &s.orders); err != nil {
		return nil, fmt.Errorf("read %s: got %q: %w; unset the variable", superviseVariable, v, err)
	}
	for _, fd := range append(s.Listeners, s.Control) {
		if _, err := unix.FcntlInt(uintptr(fd), unix.F_SETFD, unix.FD_CLOEXEC); err != nil {
			return nil, fmt.Errorf("read %s: descriptor %d: %w; unset the variable", superviseVariable, fd, err)
		}
	}
	f := os.NewFile(uintptr(s.Control), "supervisor")
	conn, err := net.FileConn(f) // a copy
	if err != nil {
		return nil, fmt.Errorf("read %s: descriptor %d: %w; unset the variable", superviseVariable, s.Control, err)
	}
	s.conn, s.control, s.notifier.watchdog = conn, f, s.orders.Watchdog
	return s, nil
}

// obey makes what the supervisor takes care of none of the server's business.
func (s *superior) obey(o *options) {
	o.superior, o.notify = s, &s.notifier
	o.foreground, o.pidfile, o.printURI, o.captive, o.exitWithParent = true, "", false, false, false
}

// errReported is an error that whom it concerns has been told.
var errReported = errors.New("already reported")

// tellError passes on why the server did not begin to serve.
func (s *superior) tellError(err error, hide *secrets) error {
	if s == nil || err == nil || saidByModule(err) {
		return err
	}
	s.insist("ERROR=" + hide.redact(err.Error()))
	return errReported
}

// watch calls stop when the supervisor has gone.
func (s *superior) watch(stop func()) {
	go func() {
		_, _ = s.conn.Read(make([]byte, 1))
		stop()
	}()
}

// A supervisor keeps a server running.
type supervisor struct {
	o       *options
	args    []string
	dir     string // where servers are started
	start   *starter
	log     *slog.Logger
	out     *logHandler
	stdout  io.Writer
	notify  *notifier
	e       *endpoint
	signals chan os.Signal
	// passwords are descriptors that parameters name, see keepPasswords.
	passwords []int

	command  captive
	served   bool  // a server has been ready
	failure  error // what ended the supervisor's own work
	stopping bool  // there will be no other server
}

// supervise runs the program again as a server, until that ends as it should.
func supervise(o *options, args []string, start *starter, stdout io.Writer, out *logHandler) (code int, err error) {
	log := slog.New(out)
	unix.Umask(0o022) // as in serve
	if o.log != logDefault {
		if err := out.logTo(o.log); err != nil {
			return 1, err
		}
	}
	s := &supervisor{o: o, args: args, start: start, log: log, out: out, stdout: stdout, notify: o.notify,
		signals: make(chan os.Signal, 8), command: captive{log: log}}
	signal.Notify(s.signals, stopSignals...)
	signal.Ignore(unix.SIGPIPE) // a log that nobody reads must not end it
	if s.dir, err = os.Getwd(); err != nil {
		s.dir = "/" // it has been removed, and so nothing is in it
	}
	if s.passwords, err = keepPasswords(o.args[1:]); err != nil {
		return 1, err
	}
	// Only for what clients have to know; the server says what is wrong with it.
	if _, err := setUpTLS(&o.tls, slog.New(slog.DiscardHandler)); err != nil {
		return 1, err
	}
	if s.e, err = listen(o, log); err != nil {
		return 1, err
	}
	o.tls.addTo(&s.e.uri)
	switch code, err = s.run(); {
	case !s.served:
		s.e.abandon()
	case err != nil && s.failure == nil: // standard error may have been given up
		log.Error(err.Error())
		err = errReported
	}
	s.e.remove()
	return s.command.finish(code), err
}

// keepPasswords puts files in memory in the place of the descriptors from which modules
// read passwords (nbdkit_read_password(3)), since each server has to read them again.
func keepPasswords(params []string) (fds []int, err error) {
	for _, p := range params {
		key, value, _ := strings.Cut(p, "=")
		if !isKey(key) || !strings.Contains(strings.ToLower(key), "pass") {
			continue
		}
		if value == "-" {
			return nil, fmt.Errorf("got %s with --supervise: a server that is started again cannot ask for it: need %s=+FILE or %s=-DESCRIPTOR", p, key, key)
		}
		if !isDescriptor(value) {
			continue
		}
		fd, err := strconv.Atoi(value[1:])
		if err == nil && fd >= firstInherited {
			err = keepLine(fd)
		}
		if err != nil {
			return nil, fmt.Errorf("read %s: %w: need an open descriptor from %d on", p, cause(err), firstInherited)
		}
		if fd >= firstInherited { // the others are for the module to refuse
			fds = append(fds, fd)
		}
	}
	return fds, nil
}

// maxPassword bounds what is kept of a descriptor, in bytes.
const maxPassword = 64 << 10

// keepLine replaces fd by a file with the first line that comes from it.
func keepLine(fd int) error {
	var line []byte
	for b := make([]byte, 1); len(line) < maxPassword; {
		n, err := unix.Read(fd, b)
		if err == unix.EINTR {
			continue
		} else if err != nil {
			return err
		}
		line = append(line, b[:n]...)
		if n == 0 || b[0] == '\n' {
			break
		}
	}
	kept, err := unix.MemfdCreate("password", unix.MFD_CLOEXEC)
	if err != nil {
		return err
	}
	defer unix.Close(kept)
	if _, err := unix.Pwrite(kept, line, 0); err != nil {
		return err
	}
	return unix.Dup3(kept, fd, 0)
}

// maxFailedStarts is how many servers in a row may end before they are ready.
const maxFailedStarts = 8

func (s *supervisor) run() (int, error) {
	var delay backoff
	failed := 0
	for {
		c, err := s.startServer()
		status, how := 1, ""
		switch {
		case err == nil:
			s.watch(c)
			status, how = c.end()
		case s.served: // there may be no process, memory or descriptor free
			c, how = &serverProcess{}, "server process: "+err.Error()
		default:
			return 1, err
		}
		switch {
		case s.failure != nil:
			return 1, s.failure
		case s.stopping || c.stopping:
			return status, nil
		case c.ready.IsZero():
			failed++
		default:
			failed = 0
		}
		switch {
		case !s.served && c.err != "":
			return status, errors.New(c.err)
		case !s.served && status < 128:
			return status, nil // it has said why itself
		case !s.served:
			return status, errors.New("the " + how + " before it served")
		case failed == maxFailedStarts:
			return max(status, 1), fmt.Errorf("the %s: gave up after %d starts in a row that failed", how, failed)
		}
		d := delay.next(c.ready)
		s.log.Error(fmt.Sprintf("%s: starting it again in %v", how, d))
		s.notify.tell("STATUS=restarting: " + how)
		if !s.pause(d) {
			return 0, nil
		}
	}
}

// pause waits before the next server; false if there is to be none.
func (s *supervisor) pause(d time.Duration) bool {
	alive := s.notify.ticks()
	defer alive.Stop()
	for over := time.After(d); ; {
		select {
		case <-over:
			return true
		case <-alive.C:
			s.notify.tell("WATCHDOG=1")
		case <-s.signals:
			s.stop()
			return false
		case <-s.command.ended:
			s.stop()
			return false
		}
	}
}

// A backoff says how long to wait until a server is started again.
type backoff struct{ delay time.Duration }

const (
	firstDelay = 100 * time.Millisecond
	lastDelay  = 5 * time.Second
	// steady is how long a server must have served for its crash to count as the first.
	steady = time.Minute
)

// next doubles from firstDelay to lastDelay. ready is when the server that has ended
// began to serve, zero if it never did.
func (b *backoff) next(ready time.Time) time.Duration {
	if !ready.IsZero() && time.Since(ready) >= steady {
		b.delay = 0
	}
	b.delay = min(max(2*b.delay, firstDelay), lastDelay)
	return b.delay
}

// A serverProcess is a server as its supervisor knows it.
type serverProcess struct {
	cmd      *exec.Cmd
	control  *net.UnixConn
	messages chan string // closed when nothing comes any more
	exited   chan struct{}

	ready    time.Time // when it began to serve; zero: it has not
	stopping bool      // it stops, and means to
	err      string    // why it could not serve
}

// end returns the status of a server that has exited, and says how it did.
func (c *serverProcess) end() (status int, how string) {
	status, text := exitStatus(c.cmd.ProcessState)
	if text == "" {
		text = fmt.Sprintf("exited with status %d", status)
	}
	how = fmt.Sprintf("server process %d %s", c.cmd.Process.Pid, text)
	if c.err != "" {
		how += ": " + c.err
	}
	return status, how
}

func (s *supervisor) startServer() (_ *serverProcess, err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("start server: %w", err)
		}
	}()
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	defer unix.Close(pair[1])
	f := os.NewFile(uintptr(pair[0]), "control")
	conn, err := net.FileConn(f)
	f.Close()
	if err != nil {
		return nil, err
	}
	to := orders{Control: pair[1], Background: s.start != nil, Again: s.served}
	if s.notify != nil {
		to.Watchdog = s.notify.watchdog
	}
	for _, l := range s.e.listeners {
		raw, err := l.(syscall.Conn).SyscallConn()
		if err == nil {
			err = raw.Control(func(fd uintptr) { to.Listeners = append(to.Listeners, int(fd)) })
		}
		if err != nil {
			return nil, err
		}
	}
	text, err := json.Marshal(to)
	if err != nil {
		return nil, err
	}
	c := &serverProcess{control: conn.(*net.UnixConn), messages: make(chan string, 16), exited: make(chan struct{})}
	dir := s.dir
	if _, err := os.Stat(dir); err != nil {
		s.log.Warn("start server in / instead: " + err.Error())
		dir = "/"
	}
	c.cmd = &exec.Cmd{
		Dir: dir, Env: append(os.Environ(), superviseVariable+"="+string(text)),
		Stdin: os.Stdin, Stdout: os.Stdout, Stderr: os.Stderr,
	}
	for _, fd := range s.passwords {
		if _, err := unix.Seek(fd, 0, io.SeekStart); err != nil {
			return nil, err
		}
	}
	err = startAgain(c.cmd, s.args, s.o.secrets, append(to.Listeners, to.Control)...)
	if err != nil {
		conn.Close()
		return nil, err
	}
	go func() {
		defer close(c.messages)
		buf := make([]byte, 64<<10)
		for {
			n, err := c.control.Read(buf)
			if err != nil {
				return
			}
			c.messages <- string(buf[:n])
		}
	}()
	go func() {
		c.cmd.Wait() // what comes of it is in ProcessState: there are no modules here that could take it
		// What was sent is still read, and then comes the end, also where a
		// process that a module left behind has the other end of the socket.
		c.control.CloseRead()
		close(c.exited)
	}()
	return c, nil
}

// watch returns when the server has exited.
func (s *supervisor) watch(c *serverProcess) {
	defer c.control.Close()
	alive := s.notify.ticks() // as long as the server is not ready to say so
	defer alive.Stop()
	commandEnded := s.command.ended
	for {
		select {
		case m, ok := <-c.messages:
			if !ok {
				<-c.exited
				return
			}
			s.take(c, m)
			if !c.ready.IsZero() {
				alive.Stop()
			}
			if commandEnded == nil && !s.stopping {
				commandEnded = s.command.ended
			}
		case <-alive.C:
			s.notify.tell("WATCHDOG=1")
		case sig := <-s.signals:
			s.stop()
			c.cmd.Process.Signal(sig)
		case <-commandEnded:
			commandEnded = nil
			s.stop()
			c.cmd.Process.Signal(unix.SIGTERM)
		}
	}
}

// stop begins the end: clients are refused, and the server that ends is the last.
func (s *supervisor) stop() {
	if s.stopping {
		return
	}
	s.stopping = true
	s.notify.stopping()
	for _, l := range s.e.listeners {
		l.Close()
	}
}

// take deals with a message of the server's.
func (s *supervisor) take(c *serverProcess, m string) {
	if strings.HasPrefix(m, "{") {
		s.logCrash(m)
		return
	}
	if text, ok := strings.CutPrefix(m, "ERROR="); ok {
		c.err = text
		return
	}
	for word := range strings.SplitSeq(m, "\n") {
		switch {
		case word == "READY=1":
			c.ready = time.Now()
			if err := s.announce(c); err != nil {
				s.failure = err
				s.stop()
				c.cmd.Process.Signal(unix.SIGTERM)
			}
		case word == "STOPPING=1":
			c.stopping = true
			s.stop()
		case word == "WATCHDOG=1" || strings.HasPrefix(word, "STATUS="):
			s.notify.tell(word)
		}
	}
}

// announce tells everybody who waits for it that clients are served.
func (s *supervisor) announce(c *serverProcess) error {
	if s.served {
		s.log.Info(fmt.Sprintf("server process %d serves", c.cmd.Process.Pid))
		return nil
	}
	s.served = true
	if s.o.printURI {
		if err := write(s.stdout, uriText(s.e.uri.String())); err != nil {
			return fmt.Errorf("print URI: %w", err)
		}
	}
	if err := s.command.start(s.o, s.e.uri, func() {}); err != nil {
		return err
	}
	if s.start != nil {
		if err := s.start.detach(); err != nil {
			return err
		}
		if err := giveUp(0, 1); err != nil {
			return err
		}
	}
	return announce(s.o, s.start, s.out)
}

// logCrash logs a crash report, see cshim.ReportCrashesTo.
func (s *supervisor) logCrash(report string) {
	d := json.NewDecoder(strings.NewReader(report))
	d.UseNumber() // cookies have 64 bits
	var attrs map[string]any
	if err := d.Decode(&attrs); err != nil {
		s.log.Error("crash report: " + report)
		return
	}
	var args []any
	for _, key := range []string{"conn", "module", "callback", "cookie", "offset", "length"} {
		if v, ok := attrs[key]; ok {
			if n, ok := v.(json.Number); ok {
				var u uint64
				fmt.Sscan(n.String(), &u)
				v = u
			}
			args = append(args, key, v)
		}
	}
	s.log.Error(fmt.Sprint(attrs["msg"]), args...)
}

// saidByModule tells whether the module has logged the error itself.
func saidByModule(err error) bool {
	failed := (*backend.Error)(nil)
	return errors.As(err, &failed) && failed.Msg != ""
}
