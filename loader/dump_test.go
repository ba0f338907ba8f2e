package loader

import (
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// Every installed plugin answers --dump-plugin as it does in nbdkit.
func TestDumpInstalled(t *testing.T) {
	nbdkit, err := exec.LookPath("nbdkit")
	if err != nil {
		t.Skip("needs nbdkit to compare with")
	}
	var names []string
	for _, dir := range searchPath(PluginKind, nil) {
		files, _ := filepath.Glob(filepath.Join(dir, "nbdkit-*-plugin*"))
		for _, f := range files {
			name := strings.TrimPrefix(strings.TrimSuffix(filepath.Base(f), ".so"), "nbdkit-")
			names = append(names, strings.TrimSuffix(name, "-plugin"))
		}
	}
	if len(names) == 0 {
		t.Skip("needs nbdkit's plugins")
	}
	for _, name := range names {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			compareDump(t, nbdkit, name)
		})
	}
}

func TestDumpFixtures(t *testing.T) {
	nbdkit, err := exec.LookPath("nbdkit")
	if err != nil {
		t.Skip("needs nbdkit to compare with")
	}
	for _, options := range [][]string{
		nil,
		{"-DAPI=1"},
		{"-DAPI=1", "-DBEFORE=dump_plugin"},
		{"-DPRESERVED=7", "-DTHREAD_MODEL=1"},
		{"-DBEFORE=can_multi_conn"},
	} {
		t.Run(strings.Join(options, " "), func(t *testing.T) {
			t.Parallel()
			compareDump(t, nbdkit, compile(t, "plugin.c", options...))
		})
	}
}

func compareDump(t *testing.T, nbdkit, name string) {
	want, err := exec.Command(nbdkit, name, "--dump-plugin").Output()
	if err != nil {
		t.Skipf("nbdkit itself fails: %v", err)
	}
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), dumpEnv+"="+name)
	cmd.Stderr = t.Output()
	got, err := cmd.Output()
	if err != nil {
		t.Fatal(err)
	}
	g, w := string(got), string(want)
	if found, _ := Find(PluginKind, name); found.Script != "" {
		// What a script prints has passed the buffer of another language, so
		// nbdkit itself gives it another place in a pipe than on a terminal.
		g, w = sorted(g), sorted(w)
	}
	if g != w {
		t.Errorf("got:\n%s\nneed:\n%s", g, w)
	}
}

func sorted(s string) string {
	l := strings.Split(s, "\n")
	slices.Sort(l)
	return strings.Join(l, "\n")
}
