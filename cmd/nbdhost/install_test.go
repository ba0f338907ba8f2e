package main

import (
	"bytes"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// "make install" puts everything where programs look for it, and "make uninstall" takes
// it away again, but not the nbdkit that is another's.
func TestInstall(t *testing.T) {
	dir := t.TempDir()
	dest := filepath.Join(dir, "dest")
	run := func(target string, args ...string) {
		t.Helper()
		args = append([]string{"-C", "../..", target, "DESTDIR=" + dest, "PREFIX=/usr", "BIN=" + filepath.Join(dir, "nbdhost")}, args...)
		if out, err := exec.Command("make", args...).CombinedOutput(); err != nil {
			t.Fatalf("make %q: %v\n%s", args, err, out)
		}
	}
	installed := func() (list []string) {
		t.Helper()
		err := filepath.WalkDir(dest, func(path string, d fs.DirEntry, err error) error {
			if err == nil && !d.IsDir() {
				list = append(list, strings.TrimPrefix(path, dest))
			}
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
		return list
	}
	texts := map[string]string{
		"/usr/share/bash-completion/completions/nbdhost":    completionScripts["bash"],
		"/usr/share/fish/vendor_completions.d/nbdhost.fish": completionScripts["fish"],
		"/usr/share/man/man1/nbdhost.1":                     manualPage(),
		"/usr/share/zsh/site-functions/_nbdhost":            completionScripts["zsh"],
	}
	want := []string{"/usr/bin/nbdhost"}
	for path := range texts {
		want = append(want, path)
	}
	slices.Sort(want)

	run("install")
	if got := installed(); !slices.Equal(got, want) {
		t.Errorf("got files %q, need %q", got, want)
	}
	for path, text := range texts {
		if got, err := os.ReadFile(dest + path); err != nil || !bytes.Equal(got, []byte(text)) {
			t.Errorf("%s: got %d bytes, %v: need the %d that the program prints", path, len(got), err, len(text))
		}
	}

	// Another's nbdkit stays.
	other := dest + "/usr/bin/nbdkit"
	if err := os.WriteFile(other, nil, 0o755); err != nil {
		t.Fatal(err)
	}
	run("uninstall")
	if got := installed(); !slices.Equal(got, []string{"/usr/bin/nbdkit"}) {
		t.Errorf("after uninstall: got files %q, need the other nbdkit", got)
	}
	run("install", "NBDKIT=yes")
	out, err := exec.Command(other, "--version").Output()
	if err != nil || string(out) != versionText("nbdkit")+"\n" {
		t.Errorf("nbdkit --version: got %q, %v", out, err)
	}
	run("uninstall")
	if got := installed(); len(got) > 0 {
		t.Errorf("after uninstall: got files %q, need none", got)
	}
}
