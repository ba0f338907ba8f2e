package tests

import (
	"context"
	"net"
	"net/http"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"nbdhost/protocol"
)

// get returns the status of a page that the monitor on a Unix socket shows; 0: it does
// not answer.
func get(socket, page string) int {
	c := http.Client{Timeout: patience, Transport: &http.Transport{DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", socket)
		}}}
	r, err := c.Get("http://nbdhost/" + page)
	if err != nil {
		return 0
	}
	r.Body.Close()
	return r.StatusCode
}

// TestKubernetesStop: what a kubelet does to a container that is to go, step by step. As
// long as the preStop hook runs, clients that have not heard of it yet are served; from
// SIGTERM on the pod is not ready, but alive, until what is in flight is done.
func TestKubernetesStop(t *testing.T) {
	t.Parallel()
	onlyNbdhost(t)
	for _, args := range [][]string{nil, {"--supervise"}} {
		t.Run(strings.Join(args, ""), func(t *testing.T) {
			t.Parallel()
			dir := tempDir(t)
			j, g := newJournal(t, dir), newGate(t, dir)
			monitor := filepath.Join(dir, "monitor")
			s := start(t, nbdhost, dir, true, append(args, "--metrics=unix:"+monitor, "--drain-timeout=30", fixture(t, "crash"),
				"journal=DIR/journal", "gate=DIR/gate")...)
			want := func(page string, status int) {
				t.Helper()
				if got := get(monitor, page); got != status {
					t.Errorf("/%s: got %d, want %d", page, got, status)
				}
			}
			want("readyz", 200)
			busy, idle := s.hello(true), s.hello(true)
			busy.read(1, whereCrashes/2, 512)
			j.wait("slow", 1)

			// preStop: nothing has changed but that nobody new is sent here.
			command(t, nbdhost, "--healthcheck=unix:"+monitor)
			late := s.hello(false)
			late.read(1, 0, 512)
			late.want(1, 0)
			late.disc()

			s.stopsServing(syscall.SIGTERM)
			want("readyz", 503)
			want("livez", 200)
			if _, err := try(t, nbdhost, "--healthcheck=unix:"+monitor); err == nil {
				t.Error("--healthcheck finds the server ready")
			}
			busy.read(2, 0, 512)
			if r := busy.next(); r.cookie != 2 || r.errno != protocol.ESHUTDOWN {
				t.Errorf("a new command: got %v, want %v", r, protocol.ESHUTDOWN)
			}
			idle.disc()
			idle.wantEOF()

			g.open(1)
			if r := busy.next(); r.cookie != 1 || r.errno != 0 || len(r.data) != 512 {
				t.Errorf("what was in flight: got %v, want data", r)
			}
			busy.disc()
			busy.wantEOF()
			s.wait() // with status 0
			if n := count(j.all(), "unload"); n != 1 {
				t.Errorf("got .unload %d times, want once", n)
			}
		})
	}
}

// stopsServing sends a signal and returns when no client is accepted any more.
func (s *server) stopsServing(sig syscall.Signal) {
	s.t.Helper()
	s.signal(sig)
	for {
		c, err := net.Dial(s.network, s.address)
		if err != nil {
			return
		}
		c.Close()
	}
}
