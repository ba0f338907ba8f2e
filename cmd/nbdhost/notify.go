package main

import (
	"fmt"
	"net"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"

	"nbdhost/server"
)

// A notifier tells a service manager how the server is, in the words of sd_notify(3);
// or the supervisor, which uses the same words. The nil one tells nobody.
type notifier struct {
	mu   sync.Mutex // held while one writes, whose deadline is the connection's
	conn net.Conn
	// watchdog is how long the manager goes without WATCHDOG=1 before it ends the
	// server; 0: it does not care.
	watchdog time.Duration
}

var notifyVariables = []string{"NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"}

// findNotifier returns the service manager that the environment names, or nil. It hides
// it from modules and the programs that they run. start is who started this process in the
// background, or nil. Where systemd's main process for the unit is another one still, which
// has started this server for itself, the manager is that one's, and nothing is hidden. An
// error comes with what there is without what it is about.
func findNotifier(start *starter) (*notifier, error) {
	if main := os.Getenv("SYSTEMD_EXEC_PID"); main != "" && main != strconv.Itoa(os.Getpid()) &&
		(start == nil || main != strconv.Itoa(os.Getppid())) {
		return nil, nil
	}
	path, interval, pid := os.Getenv("NOTIFY_SOCKET"), os.Getenv("WATCHDOG_USEC"), os.Getenv("WATCHDOG_PID")
	for _, v := range notifyVariables {
		os.Unsetenv(v)
	}
	if path == "" {
		return nil, nil
	}
	if path[0] != '/' && path[0] != '@' {
		return nil, fmt.Errorf("read NOTIFY_SOCKET: got %q: need a path, or an abstract name that begins with @", path)
	}
	conn, err := net.DialUnix("unixgram", nil, &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		return nil, fmt.Errorf("connect to NOTIFY_SOCKET %s: %w", path, cause(err))
	}
	n := &notifier{conn: conn}
	if us, err := strconv.ParseUint(interval, 10, 63); interval != "" && (pid == "" || pid == strconv.Itoa(os.Getpid())) {
		if err != nil || us == 0 || us > uint64(1<<63-1)/1000 {
			return n, fmt.Errorf("read WATCHDOG_USEC: got %q: need a number of microseconds", interval)
		}
		n.watchdog = time.Duration(us) * time.Microsecond
	}
	return n, nil
}

// patience is how long a message waits for a manager that does not read, and briefly how long one does
// of which there will be more.
const (
	patience = time.Second
	briefly  = 10 * time.Millisecond
)

// tell sends assignments such as WATCHDOG=1, of which there will be more. A manager that has gone, or does
// not read, is no reason to stop.
func (n *notifier) tell(assignments ...string) {
	if n == nil || !n.mu.TryLock() {
		return
	}
	defer n.mu.Unlock()
	n.send(briefly, assignments)
}

// insist sends assignments that are said once.
func (n *notifier) insist(assignments ...string) {
	if n == nil {
		return
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	n.send(patience, assignments)
}

func (n *notifier) ready() { n.insist("READY=1", "MAINPID="+strconv.Itoa(os.Getpid())) }

func (n *notifier) stopping() { n.insist("STOPPING=1", "STATUS=stopping") }

// send sends one message. mu is held.
func (n *notifier) send(wait time.Duration, assignments []string) {
	n.conn.SetWriteDeadline(time.Now().Add(wait))
	_, _ = n.conn.Write([]byte(strings.Join(assignments, "\n")))
}

// statusInterval is how often STATUS is sent, if it has changed.
const statusInterval = 5 * time.Second

// follow sends STATUS, and WATCHDOG as long as srv makes progress, until done is closed.
func (n *notifier) follow(srv *server.Server, done <-chan struct{}) {
	if n == nil {
		return
	}
	status := time.NewTicker(statusInterval)
	defer status.Stop()
	watchdog := n.ticks()
	defer watchdog.Stop()
	var p pulse
	last, before := srv.Stats(), time.Now()
	text := ""
	for {
		select {
		case <-done:
			return
		case now := <-watchdog.C:
			if p.alive(srv.Stats(), now, n.watchdog) {
				n.tell("WATCHDOG=1")
			}
		case now := <-status.C:
			s := srv.Stats()
			if t := statusText(last, s, now.Sub(before)); t != text {
				n.tell("STATUS=" + t)
				text = t
			}
			last, before = s, now
		}
	}
}

// ticks comes twice in the time that the watchdog waits; never without one.
func (n *notifier) ticks() *time.Ticker {
	if n == nil || n.watchdog == 0 {
		t := time.NewTicker(time.Hour)
		t.Stop()
		return t
	}
	return time.NewTicker(max(n.watchdog/2, time.Millisecond))
}

// A pulse finds out whether a server makes progress.
type pulse struct {
	operations uint64
	since      time.Time
}

// alive is false where requests have been in flight for limit and none was answered.
// That it returns at all means that the server's locks can be had.
func (p *pulse) alive(s server.Stats, now time.Time, limit time.Duration) bool {
	if n := s.Operations(); s.InFlight == 0 || n != p.operations || p.since.IsZero() {
		p.operations, p.since = n, now
	}
	return now.Sub(p.since) < limit
}

// statusText says how many clients there are, and what happened for them between two
// moments.
func statusText(from, to server.Stats, d time.Duration) string {
	clients := "clients"
	if to.Connections == 1 {
		clients = "client"
	}
	text := fmt.Sprintf("serving %d %s", to.Connections, clients)
	if to.Connections == 0 && to.Operations() == from.Operations() || d <= 0 {
		return text
	}
	// One that has gone takes nothing away: what it did stays counted.
	return text + fmt.Sprintf(", %.0f requests/s, %.1f MiB/s",
		float64(to.Operations()-from.Operations())/d.Seconds(), float64(to.Bytes()-from.Bytes())/d.Seconds()/(1<<20))
}
