package main

import (
	"bytes"
	"log/slog"
	"log/syslog"
	"net"
	"path/filepath"
	"strings"
	"testing"

	"nbdhost/loader"
)

func TestLog(t *testing.T) {
	for _, tt := range []struct {
		options options
		write   func(*slog.Logger, *logHandler)
		want    string
	}{
		{options{}, func(l *slog.Logger, _ *logHandler) { l.Debug("x") }, ""},
		{options{}, func(_ *slog.Logger, h *logHandler) {
			h.fromModule(loader.Message{Level: slog.LevelError, Worker: -1, Text: "bad size"})
		}, "nbdkit: error: bad size\n"},
		{options{verbose: true}, func(l *slog.Logger, _ *logHandler) { l.Debug("x") }, "nbdkit: debug: x\n"},
		{options{name: "disk1"}, func(l *slog.Logger, _ *logHandler) { l.Warn("x") }, "nbdkit[disk1]: warning: x\n"},
		{options{verbose: true}, func(l *slog.Logger, h *logHandler) {
			h.setModule("vddk")
			h.fromModule(loader.Message{Level: slog.LevelDebug, Conn: 1, Worker: -1, Text: "DISKLIB-LINK  : Opened 'x'"})
			h.fromModule(loader.Message{Level: slog.LevelError, Conn: 1, Worker: 3, Text: "read: EIO"})
			h.fromModule(loader.Message{Level: slog.LevelDebug, Worker: -1, Text: "VMware VixDiskLib"})
		}, "nbdkit: vddk[1]: debug: DISKLIB-LINK  : Opened 'x'\nnbdkit: vddk.3: error: read: EIO\nnbdkit: debug: VMware VixDiskLib\n"},
		{options{verbose: true}, func(l *slog.Logger, h *logHandler) {
			h.setModule("memory")
			l = l.With("conn", uint64(2))
			l.Debug("open")
			l.Debug("pread", "worker", 0, "count", 512, "cause", "not now")
			l.With("worker", 1).Debug("flush")
			l.Debug("close")
		}, "nbdkit: memory[2]: debug: open\nnbdkit: memory.0: debug: pread count=512 cause=\"not now\"\n" +
			"nbdkit: memory.1: debug: flush\nnbdkit: memory[2]: debug: close\n"},
	} {
		var b bytes.Buffer
		h := newLog(&tt.options, &b)
		tt.write(slog.New(h), h)
		if b.String() != tt.want {
			t.Errorf("got:\n%swant:\n%s", b.String(), tt.want)
		}
	}
}

// Errors leave standard error to debug messages.
func TestLogSyslog(t *testing.T) {
	path := filepath.Join(t.TempDir(), "log")
	c, err := net.ListenPacket("unixgram", path)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	var b bytes.Buffer
	h := newLog(&options{verbose: true}, &b)
	h.toSyslog(func() (*syslog.Writer, error) {
		return syslog.Dial("unixgram", path, syslog.LOG_DAEMON|syslog.LOG_ERR, h.name)
	})
	h.setModule("memory")
	slog.New(h).With("conn", uint64(7)).Error("it broke")
	slog.New(h).Debug("go on")
	packet := make([]byte, 1000)
	n, _, err := c.ReadFrom(packet)
	if err != nil {
		t.Fatal(err)
	}
	if got := string(packet[:n]); !strings.HasPrefix(got, "<27>") || !strings.HasSuffix(got, "]: memory[7]: it broke\n") {
		t.Errorf("got %q", got)
	}
	if got, want := b.String(), "nbdkit: debug: go on\n"; got != want {
		t.Errorf("standard error has %q, want %q", got, want)
	}
}
