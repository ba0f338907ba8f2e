package deploy

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// units copies the units to a directory, with the program under test in the place of
// the installed one.
func units(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	files, _ := filepath.Glob("systemd/nbdhost@.*")
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		writeFile(t, filepath.Join(dir, filepath.Base(file)), strings.ReplaceAll(string(text), "/usr/bin/nbdhost", nbdhost))
	}
	if len(files) != 2 {
		t.Fatalf("find units: got %q", files)
	}
	return dir
}

// TestUnitsVerify lets systemd read the units, of an instance: it warns about what it
// does not know, too.
func TestUnitsVerify(t *testing.T) {
	dir := units(t)
	for _, kind := range []string{".service", ".socket"} {
		if err := os.Symlink("nbdhost@"+kind, dir+"/nbdhost@disk"+kind); err != nil {
			t.Fatal(err)
		}
	}
	out, err := exec.Command("systemd-analyze", "verify", "--man=no", dir+"/nbdhost@disk.service", dir+"/nbdhost@disk.socket").CombinedOutput()
	if err != nil || len(out) > 0 {
		t.Errorf("systemd-analyze verify: %v\n%s", err, out)
	}
}

// TestUnitsSecurity lets systemd judge how much a server may do that has been broken
// into: 0 is nothing, 10 is all.
func TestUnitsSecurity(t *testing.T) {
	out, err := try(t, "systemd-analyze", "security", "--no-pager", "--offline=true", "--threshold=20", "systemd/nbdhost@.service")
	if err != nil {
		t.Errorf("need an exposure of at most 2.0:\n%s%v", out, err)
	}
}

// TestUnitsStart runs the command of the service as systemd would for a client of the
// socket.
func TestUnitsStart(t *testing.T) {
	dir := units(t)
	text, err := os.ReadFile(dir + "/nbdhost@.service")
	if err != nil {
		t.Fatal(err)
	}
	var command []string
	for line := range strings.SplitSeq(string(text), "\n") {
		if v, ok := strings.CutPrefix(line, "ExecStart="); ok {
			command = strings.Fields(strings.ReplaceAll(v, "%d", dir))
		}
	}
	example, err := os.ReadFile("systemd/example.args")
	if err != nil {
		t.Fatal(err)
	}
	writeFile(t, dir+"/disk.img", strings.Repeat("x", 1<<20))
	writeFile(t, dir+"/args", strings.ReplaceAll(string(example), "/var/lib/nbdhost/example", dir))
	socket := dir + "/sock"
	server := start(t, exec.Command("systemd-socket-activate", append([]string{"-l", socket}, command...)...))
	server.await(t, "the server", func() bool { return serves(socket) })
	if got := run(t, "nbdinfo", "--size", uri(socket)); got != "1048576" {
		t.Errorf("size: got %s, need 1048576", got)
	}
	server.Process.Signal(os.Interrupt)
	if err := server.wait(t); err != nil {
		t.Errorf("stop: %v", err)
	}
}
