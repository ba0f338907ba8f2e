package loader

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// tree makes files below a new directory, by name and content; each is
// executable unless its content begins with "-".
func tree(t *testing.T, files map[string]string) string {
	t.Helper()
	root := t.TempDir()
	for name, content := range files {
		path := filepath.Join(root, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o777); err != nil {
			t.Fatal(err)
		}
		mode := os.FileMode(0o777)
		if content, ok := strings.CutPrefix(content, "-"); ok {
			mode = 0o666
			_ = content
		}
		if err := os.WriteFile(path, []byte(strings.TrimPrefix(content, "-")), mode); err != nil {
			t.Fatal(err)
		}
	}
	return root
}

func TestFind(t *testing.T) {
	root := tree(t, map[string]string{
		"a/nbdkit-one-plugin.so":       "",
		"b/nbdkit-one-plugin.so":       "",
		"b/nbdkit-two-plugin.so":       "",
		"b/nbdkit-two-plugin":          "#!/usr/bin/nbdkit one\n",
		"c/nbdkit-three-plugin.so":     "",
		"c/nbdkit-script-plugin":       "#!/usr/sbin/nbdkit three \nrest",
		"c/nbdkit-script2-plugin":      "#! /opt/bin/nbdhost one",
		"c/nbdkit-loop-plugin":         "#!/usr/bin/nbdkit loop2\n",
		"c/nbdkit-loop2-plugin":        "#!/usr/bin/nbdkit script\n",
		"c/nbdkit-python-plugin":       "#!/usr/bin/python3\n",
		"c/nbdkit-nothing-plugin":      "#!/usr/bin/nbdkit\n",
		"c/nbdkit-words-plugin":        "#!/usr/bin/nbdkit one two\n",
		"c/nbdkit-empty-plugin":        "",
		"c/nbdkit-notexec-plugin":      "-#!/usr/bin/nbdkit one\n",
		"c/nbdkit-nolanguage-plugin":   "#!/usr/bin/nbdkit cobol\n",
		"c/nbdkit-longline-plugin":     "#!/usr/bin/nbdkit " + strings.Repeat("x", 5000),
		"c/nbdkit-one-filter":          "#!/usr/bin/nbdkit one\n",
		"f/nbdkit-cow-filter.so":       "",
		"f/nbdkit-readahead-filter.so": "",
		"file":                         "",
	})
	in := func(dirs ...string) string {
		for i, d := range dirs {
			dirs[i] = filepath.Join(root, d)
		}
		return strings.Join(dirs, ":")
	}
	t.Setenv("NBDHOST_PLUGIN_PATH", in("c"))
	t.Setenv("NBDHOST_FILTER_PATH", in("f"))
	for _, tt := range []struct {
		kind         Kind
		name         string
		dirs         []string
		path, script string // below root
		says         string // of the error
	}{
		{PluginKind, "one", []string{in("a", "b")}, "a/nbdkit-one-plugin.so", "", ""},
		{PluginKind, "one", []string{in("b"), in("a")}, "b/nbdkit-one-plugin.so", "", ""},
		{PluginKind, "two", []string{in("a"), in("b")}, "b/nbdkit-two-plugin.so", "", ""},
		{PluginKind, "two", []string{in("nowhere", "file", "b")}, "b/nbdkit-two-plugin.so", "", ""},
		{PluginKind, "three", nil, "c/nbdkit-three-plugin.so", "", ""},
		{PluginKind, "script", nil, "c/nbdkit-three-plugin.so", "c/nbdkit-script-plugin", ""},
		{PluginKind, "script2", []string{in("b")}, "b/nbdkit-one-plugin.so", "c/nbdkit-script2-plugin", ""},
		{FilterKind, "cow", nil, "f/nbdkit-cow-filter.so", "", ""},
		{FilterKind, "one", []string{in("c")}, "", "", "not found"},

		{PluginKind, "loop", nil, "", "", "which is a script itself"},
		{PluginKind, "python", nil, "", "", `got the first line "#!/usr/bin/python3"`},
		{PluginKind, "nothing", nil, "", "", `need "#!/usr/sbin/nbdkit LANGUAGE"`},
		{PluginKind, "words", nil, "", "", `got the first line "#!/usr/bin/nbdkit one two"`},
		{PluginKind, "empty", nil, "", "", `got the first line ""`},
		{PluginKind, "notexec", nil, "", "", "is not executable"},
		{PluginKind, "nolanguage", nil, "", "", "find plugin cobol: not found"},
		{PluginKind, "longline", nil, "", "", "not found"},
		{PluginKind, "", nil, "", "", "got an empty name"},
		{PluginKind, "thre", nil, "", "", "did you mean three?"},
		{PluginKind, "Three", nil, "", "", "did you mean three?"},
		{PluginKind, "scrip", nil, "", "", "did you mean script or script2?"},
		{PluginKind, "xyzzyx", []string{in("a")}, "", "", in("a") + ", " + in("c") + ", /usr/lib/"},
		{PluginKind, "xyzzyx", nil, "", "", "give its directory with --plugin-path"},
		{PluginKind, "gcs", nil, "", "", "apt-get install nbdkit-plugin-python"},
		{PluginKind, "vram", nil, "", "", "this release of the package nbdkit does not have it: install a newer one"},
		{FilterKind, "indexed-gzip", nil, "", "", "this release of the package nbdkit does not have it"},
		{PluginKind, "readahead", nil, "", "", "readahead is a filter: put it before a plugin with --filter=readahead"},
		{FilterKind, "three", nil, "", "", "three is a plugin: give it without --filter"},
		{FilterKind, "readhead", nil, "", "", "did you mean readahead?"},
		{FilterKind, "xyzzyx", nil, "", "", "--filter-path"},
	} {
		got, err := Find(tt.kind, tt.name, tt.dirs...)
		var e *Error
		switch {
		case tt.says != "":
			if err == nil || !strings.Contains(err.Error(), tt.says) || !errors.As(err, &e) || strings.Contains(err.Error(), "\n") {
				t.Errorf("%v %q: got %+v, %v\nneed %s", tt.kind, tt.name, got, err, tt.says)
			}
			if strings.HasPrefix(tt.says, "did you") && !errors.Is(err, ErrNotFound) {
				t.Errorf("%v %q: got %v, need ErrNotFound", tt.kind, tt.name, err)
			}
		case err != nil || got.Path != in(tt.path) || got.Script != "" && got.Script != in(tt.script) || (tt.script == "") != (got.Script == ""):
			t.Errorf("%v %q: got %+v, %v", tt.kind, tt.name, got, err)
		}
	}
}

// What has a slash or a dot is a path, and nothing is looked up.
func TestFindPath(t *testing.T) {
	for _, name := range []string{"/x/y.so", "./x", "../x", "d/x", "memory.so", "x.y"} {
		if got, err := Find(PluginKind, name); err != nil || got != (Found{Path: name}) {
			t.Errorf("%q: got %+v, %v", name, got, err)
		}
	}
}

func TestInstalled(t *testing.T) {
	root := tree(t, map[string]string{
		"nbdkit-b-plugin.so": "", "nbdkit-a-plugin": "", "nbdkit-b-plugin": "", "nbdkit-c-filter.so": "",
		"nbdkit-d-filter": "", "other-e-plugin.so": "", "nbdkit-plugin.so": "",
	})
	if got := installed(PluginKind, []string{root, root + "/none"}); !slices.Equal(got, []string{"a", "b"}) {
		t.Errorf("plugins: got %q", got)
	}
	if got := installed(FilterKind, []string{root}); !slices.Equal(got, []string{"c"}) {
		t.Errorf("filters: got %q", got)
	}
}

func TestDistance(t *testing.T) {
	for _, tt := range []struct {
		a, b string
		want int
	}{{"", "", 0}, {"", "abc", 3}, {"abc", "", 3}, {"abc", "abc", 0}, {"abc", "abd", 1}, {"abc", "ac", 1}, {"ac", "abc", 1}, {"kitten", "sitting", 3}, {"abcd", "badc", 3}} {
		if got := distance(tt.a, tt.b); got != tt.want {
			t.Errorf("%q to %q: got %d, need %d", tt.a, tt.b, got, tt.want)
		}
	}
}
