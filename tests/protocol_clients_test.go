package tests

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"nbdhost/client"
	"nbdhost/protocol"
)

// extendedReleases are those whose libnbd and qemu know extended headers.
func extendedReleases(t *testing.T) []*release {
	t.Helper()
	onlyNbdhost(t)
	return releases(t)[1:]
}

// wantExtended wants the server's log to say that a client has negotiated extended
// headers.
func wantExtended(t *testing.T, s *server) {
	t.Helper()
	if !strings.Contains(s.stderr(), "replying to NBD_OPT_EXTENDED_HEADERS with NBD_REP_ACK") {
		t.Errorf("nobody negotiated extended headers:\n%.3000s", s.stderr())
	}
}

// TestLibnbdExtended has libnbd zero, trim and map more than 4 GiB at once, choose
// contexts, and show what the server says of an error.
func TestLibnbdExtended(t *testing.T) {
	for _, r := range extendedReleases(t) {
		t.Run(r.name, func(t *testing.T) {
			s := startHost(t, "-v", "memory", "8G")
			got := command(t, r.enter, "/usr/bin/nbdsh", "-c", `
h.add_meta_context("base:allocation")
h.connect_uri("`+s.uri("")+`")
assert h.get_extended_headers_negotiated()
assert h.can_block_status_payload()
h.pwrite(b"x" * 65536, 5 << 30)
h.pwrite(b"y" * 65536, 7 << 30)
h.zero((5 << 30) + 4096, 1)
h.trim(5 << 30, 4096)
assert h.pread(2, (5 << 30) + 4095) == b"\0\0" and h.pread(1, (5 << 30) + 8192) == b"x"
def extents(context, offset, entries, error):
    print(context, offset, sum(n for n, _ in entries), len(entries), entries[0])
h.block_status_64(8 << 30, 0, extents)
h.block_status_filter(1 << 30, 0, ["base:allocation"], extents)
h.set_strict_mode(0)
h.set_debug(True)
h.set_debug_callback(lambda where, text: "server message" in text and print("debug", text))
for offset, count in ((8 << 30) - 100, 512), (8 << 30, 512):
    try:
        h.pread(count, offset)
    except nbd.Error as e:
        print(e.errno, e.string)
h.shutdown()
`)
			s.stop()
			wantExtended(t, s)
			lines := strings.Split(strings.TrimSpace(got), "\n")
			want := []string{
				// Pages of the plugin that were zeroed are gone; the one that
				// was zeroed in part is data.
				"base:allocation 0 8589934592 5 (5368709120, 3)",
				"base:allocation 0 ",
				"debug ", "EINVAL ", "debug ", "EINVAL ",
			}
			for i, w := range want {
				if i >= len(lines) || !strings.HasPrefix(lines[i], w) {
					t.Fatalf("line %d: got\n%s, need %q", i, got, w)
				}
			}
			for _, line := range []string{lines[2], lines[4]} {
				if !strings.Contains(line, "within the export's 8589934592") {
					t.Errorf("got %q, need the server's text", line)
				}
			}
		})
	}
}

// TestLibnbdCopy has nbdinfo and nbdcopy read, map and write a disk with holes.
func TestLibnbdCopy(t *testing.T) {
	for _, r := range extendedReleases(t) {
		t.Run(r.name, func(t *testing.T) {
			dir := tempDir(t)
			image := filepath.Join(dir, "image")
			sparse(t, image, 60<<20)
			s := start(t, nbdhost, dir, false, "-v", "file", image)
			out := filepath.Join(dir, "out")
			command(t, r.enter, "/usr/bin/nbdcopy", s.uri(""), out)
			sameBytes(t, out, image)
			if got := command(t, r.enter, "/usr/bin/nbdinfo", "--map", s.uri("")); !strings.Contains(got, "hole,zero") {
				t.Errorf("nbdinfo --map: got\n%s", got)
			}
			s.stop()
			wantExtended(t, s)
		})
	}
}

// sparse makes a file of size bytes with data at its beginning and before its
// last sixth.
func sparse(t testing.TB, path string, size int64) {
	t.Helper()
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for _, off := range []int64{0, size / 6 * 5} {
		if _, err := f.WriteAt([]byte(strings.Repeat("sparse ", 100000)), off); err != nil {
			t.Fatal(err)
		}
	}
	if err := f.Truncate(size); err != nil {
		t.Fatal(err)
	}
}

// TestQemuExtended has qemu map a disk with holes, and zero and read it.
func TestQemuExtended(t *testing.T) {
	for _, r := range extendedReleases(t) {
		t.Run(r.name, func(t *testing.T) {
			dir := tempDir(t)
			image := filepath.Join(dir, "image")
			sparse(t, image, 6<<30)
			s := start(t, nbdhost, dir, false, "-v", "file", image)
			var runs []struct {
				Start, Length int64
				Zero, Data    bool
			}
			if err := json.Unmarshal([]byte(command(t, r.enter, "/usr/bin/qemu-img", "map", "--output=json", s.uri(""))), &runs); err != nil {
				t.Fatal(err)
			}
			if len(runs) != 4 || runs[1].Length < 4<<30 || !runs[1].Zero || runs[1].Data || !runs[2].Data {
				t.Errorf("qemu-img map: got %+v", runs)
			}
			command(t, r.enter, "/usr/bin/qemu-io", "-f", "raw", "-c", "write -z -u 4096 1G", "-c", "read -P 0 4096 1M", s.uri(""))
			s.stop()
			wantExtended(t, s)
		})
	}
}

// TestQemuErrorText: qemu shows what a plugin says of an export that it does not open.
// Of a request that fails it gets the text, and shows the number only.
func TestQemuErrorText(t *testing.T) {
	onlyNbdhost(t)
	errors := fixture(t, "errors")
	for _, r := range releases(t) {
		t.Run(r.name, func(t *testing.T) {
			t.Parallel()
			s := startHost(t, "eval", "get_size=echo 1M", "pread=exit 1",
				`open=[ "$3" != bad ] || { echo "EPERM nothing is called $3 here" >&2; exit 1; }`)
			if _, err := try(t, r.enter, "/usr/bin/qemu-img", "info", s.uri("bad")); err == nil ||
				!strings.Contains(err.Error(), "server reported: ") || !strings.Contains(err.Error(), "nothing is called bad here") {
				t.Errorf("got %v, want the plugin's text", err)
			}
			s.stop()

			s = startHost(t, errors, "how=set")
			const number = 28 // ENOSPC
			out, err := try(t, "sh", "-c", `exec "$@" 2>&1`, "sh", r.enter, "/usr/bin/qemu-io", "-f", "raw", "-T", "nbd_receive_*",
				"-c", fmt.Sprintf("read %d 512", block(number)), s.uri(""))
			length := fmt.Sprintf("length = %d }", 4+2+len("error 28, as asked"))
			if err == nil || !strings.Contains(out, "read failed: No space left on device") || !strings.Contains(out, length) {
				t.Errorf("got %v and\n%s, want a failure, and a chunk of %s", err, out, length)
			}
			s.stop()
		})
	}
}

// TestLongName: a name of 4096 bytes of UTF-8 reaches the plugin.
func TestLongName(t *testing.T) {
	t.Parallel()
	compare(t, scenario{args: []string{"info", "exportname"}, client: func(t *testing.T, s *server) string {
		return command(t, "/usr/bin/nbdsh", "-c", `
name = 'ä' * 1024 + '€' * 682 + 'xy'
assert len(name.encode()) == 4096
h.set_export_name(name)
h.connect_unix('`+s.address+`')
assert h.pread(4096, 0).decode() == name
print(h.get_size())
`)
	}})
}

// TestClientWithQemu has this project's client use another server that knows
// extended headers.
func TestClientWithQemu(t *testing.T) {
	for _, r := range extendedReleases(t) {
		t.Run(r.name, func(t *testing.T) {
			dir := tempDir(t)
			image, socket, pidfile := filepath.Join(dir, "image"), filepath.Join(dir, "sock"), filepath.Join(dir, "pid")
			sparse(t, image, 6<<30)
			command(t, r.enter, "/usr/bin/qemu-nbd", "--fork", "--persistent", "--format=raw", "--discard=unmap", "--pid-file="+pidfile, "--socket="+socket, image)
			b, err := os.ReadFile(pidfile)
			if err != nil {
				t.Fatal(err)
			}
			pid, err := strconv.Atoi(strings.TrimSpace(string(b)))
			if err != nil || pid <= 1 {
				t.Fatalf("pid file: got %q, %v", b, err)
			}
			defer syscall.Kill(pid, syscall.SIGTERM)
			c, err := client.Dial(context.Background(), "nbd+unix:///?socket="+socket, nil)
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			if !c.Extended() || c.Flags()&protocol.FlagBlockStatusPayload == 0 {
				t.Fatalf("got %v, extended headers: %v", c.Flags(), c.Extended())
			}
			for _, status := range []func() (map[string][]protocol.Descriptor, error){
				func() (map[string][]protocol.Descriptor, error) { return c.BlockStatus(6<<30, 0, 0) },
				func() (map[string][]protocol.Descriptor, error) {
					return c.BlockStatusOf([]string{protocol.ContextBaseAllocation}, 6<<30, 0, 0)
				},
			} {
				runs, err := status()
				if d := runs[protocol.ContextBaseAllocation]; err != nil || len(d) < 2 || d[0].Flags != 0 || d[1].Length < 4<<30 || d[1].Flags != 3 {
					t.Errorf("block status: got %v, %v", runs, err)
				}
			}
			if err := c.Zero(5<<30, 4096, 0); err != nil {
				t.Error(err)
			}
			p := make([]byte, 1<<20)
			if err := c.Pread(p, 0); err != nil || !strings.HasPrefix(string(p), "sparse") || p[4096] != 0 {
				t.Errorf("read: %.10q, %v", p, err)
			}
			if err := c.Pwrite(p, 1<<20, protocol.CmdFlagFUA); err != nil {
				t.Error(err)
			}
			if err := c.Pread(make([]byte, 512), 6<<30); err == nil {
				t.Error("read past the end: got no error")
			}
			if err := c.Disconnect(); err != nil {
				t.Error(err)
			}
		})
	}
}
