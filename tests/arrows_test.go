package tests

import (
	"encoding/json"
	"errors"
	"io"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"
)

// arrows are the packages of ours that each may import.
var arrows = map[string][]string{
	"nbdhost/protocol":    nil,
	"nbdhost/backend":     nil,
	"nbdhost/abi":         nil,
	"nbdhost/server":      {"nbdhost/protocol", "nbdhost/backend"},
	"nbdhost/client":      {"nbdhost/protocol"},
	"nbdhost/cshim":       {"nbdhost/abi"},
	"nbdhost/loader":      {"nbdhost/abi", "nbdhost/cshim", "nbdhost/backend"},
	"nbdhost/nbdtls":      {"nbdhost/protocol"},
	"nbdhost/check":       {"nbdhost/protocol", "nbdhost/backend", "nbdhost/server", "nbdhost/client"},
	"nbdhost/monitor":     {"nbdhost/protocol", "nbdhost/backend", "nbdhost/server"},
	"nbdhost/cmd/nbdhost": {"nbdhost/loader", "nbdhost/server", "nbdhost/backend", "nbdhost/protocol", "nbdhost/nbdtls", "nbdhost/check", "nbdhost/monitor"},
	"nbdhost/tests":       nil,
	"nbdhost/client/nbds": {"nbdhost/client", "nbdhost/nbdtls"},
	"nbdhost/tests/bench": {"nbdhost/client", "nbdhost/client/nbds", "nbdhost/nbdtls", "nbdhost/protocol"},
	"nbdhost/tests/vsock": {"nbdhost/client", "nbdhost/client/nbds"},
	"nbdhost/tests/pki":   nil,
}

// only are imports that few packages may have.
var only = map[string][]string{
	"C":                            {"nbdhost/cshim"},
	"unsafe":                       {"nbdhost/abi", "nbdhost/cshim", "nbdhost/loader", "nbdhost/nbdtls"},
	"github.com/ebitengine/purego": {"nbdhost/loader", "nbdhost/nbdtls"},
}

// TestFilesAreListed holds doc.go to the files of this directory.
func TestFilesAreListed(t *testing.T) {
	t.Parallel()
	doc, err := os.ReadFile("doc.go")
	if err != nil {
		t.Fatal(err)
	}
	files, err := os.ReadDir(".")
	if err != nil {
		t.Fatal(err)
	}
	here := map[string]bool{}
	for _, f := range files {
		here[f.Name()] = true
		if name := f.Name(); !f.IsDir() && name != "doc.go" && !strings.Contains(string(doc), name) {
			t.Errorf("doc.go does not say what %s is", name)
		}
	}
	for _, word := range strings.FieldsFunc(string(doc), func(r rune) bool { return strings.ContainsRune(" ,()\t\n", r) }) {
		if strings.HasSuffix(word, "_test.go") && !here[word] {
			t.Errorf("doc.go has %s, which is not there", word)
		}
	}
}

// TestArrows keeps the packages apart.
func TestArrows(t *testing.T) {
	t.Parallel()
	out := goList(t, "list", "-json=ImportPath,Imports", "nbdhost/...")
	seen := 0
	for d := json.NewDecoder(strings.NewReader(out)); ; {
		var p struct {
			ImportPath string
			Imports    []string
		}
		if err := d.Decode(&p); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			t.Fatal(err)
		}
		may, known := arrows[p.ImportPath]
		if !known {
			t.Errorf("%s: a package that the table of arrows does not have", p.ImportPath)
			continue
		}
		seen++
		for _, i := range p.Imports {
			if strings.HasPrefix(i, "nbdhost/") && !slices.Contains(may, i) {
				t.Errorf("%s imports %s: it may only import %q", p.ImportPath, i, may)
			}
			if who, restricted := only[i]; restricted && !slices.Contains(who, p.ImportPath) {
				t.Errorf("%s imports %s: only %q may", p.ImportPath, i, who)
			}
		}
	}
	if seen != len(arrows) {
		t.Errorf("list packages: got %d of the %d in the table of arrows", seen, len(arrows))
	}
}

// TestWithoutCgo builds what must not need C, tests included.
func TestWithoutCgo(t *testing.T) {
	t.Parallel()
	cmd := exec.Command("go", "vet", "nbdhost/protocol", "nbdhost/backend", "nbdhost/server", "nbdhost/client")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Errorf("build without cgo: %v\n%s", err, out)
	}
}

func goList(t *testing.T, args ...string) string {
	t.Helper()
	out, err := exec.Command("go", args...).Output()
	if err != nil {
		var exit *exec.ExitError
		if errors.As(err, &exit) {
			err = errors.New(string(exit.Stderr))
		}
		t.Fatalf("go %s: %v", strings.Join(args, " "), err)
	}
	return string(out)
}
