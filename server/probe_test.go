package server

import (
	"context"
	"strings"
	"syscall"
	"testing"
	"time"

	"nbdhost/backend"
)

// A probe reads as a client would, counts as none, and sees what a client would see.
func TestProbe(t *testing.T) {
	for _, model := range []backend.ThreadModel{backend.SerializeConnections, backend.SerializeAllRequests, backend.Parallel} {
		t.Run(model.String(), func(t *testing.T) {
			h := newHooked()
			h.model = model
			var fail error
			reads := 0
			h.before = func(c *backend.Call, cb backend.Callback, off uint64) error {
				if cb == backend.Pread {
					reads++
					return fail
				}
				return nil
			}
			s, _, path := serve(t, h, Options{Limits: Limits{Connections: 1}})
			if err := s.Probe(t.Context(), ""); err != nil || reads != 1 {
				t.Errorf("got %v, %d reads", err, reads)
			}
			fail = &backend.Error{Module: "hooked", Op: "pread", Errno: syscall.EIO, Msg: "no medium"}
			if err := s.Probe(t.Context(), ""); err == nil || !strings.Contains(err.Error(), "no medium") {
				t.Errorf("got %v", err)
			}
			if st := s.Stats(); st.Accepted != 0 || st.Operations() != 0 {
				t.Errorf("got %+v", st)
			}
			fail = nil
			nc := raw(t, path)
			if err := s.Probe(t.Context(), ""); err != nil {
				t.Errorf("with a client: %v", err)
			}
			nc.Close()
			eventually(t, s, func(st Stats) bool { return st.Connections == 0 })
			s.Shutdown()
			if err := s.Probe(t.Context(), ""); err == nil || !strings.Contains(err.Error(), "shutting down") {
				t.Errorf("after the shutdown: got %v", err)
			}
		})
	}
}

// A call that does not return is found, in bounded time, and is not made again until it
// has returned.
func TestProbeHung(t *testing.T) {
	for _, hung := range []backend.Callback{backend.Open, backend.Pread, backend.Close} {
		t.Run(hung.String(), func(t *testing.T) {
			release := make(chan struct{})
			h := newHooked()
			h.before = func(_ *backend.Call, cb backend.Callback, _ uint64) error {
				if cb == hung {
					<-release
				}
				return nil
			}
			s, _, _ := serve(t, h, Options{})
			ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
			defer cancel()
			if err := s.Probe(ctx, ""); err == nil || !strings.Contains(err.Error(), hung.String()+" has not returned in time") {
				t.Errorf("got %v", err)
			}
			if err := s.Probe(t.Context(), ""); err == nil || !strings.Contains(err.Error(), "the last one has not returned from "+hung.String()) {
				t.Errorf("got %v", err)
			}
			close(release)
			for err := s.Probe(t.Context(), ""); err != nil; err = s.Probe(t.Context(), "") {
				if !strings.Contains(err.Error(), "the last one") {
					t.Fatal(err)
				}
			}
		})
	}
}
