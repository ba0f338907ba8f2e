package tests

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

const nbdkit = "/usr/bin/nbdkit"

var (
	// nbdhost is the program under test.
	nbdhost string
	// scratch is removed when the tests are over.
	scratch string
)

// tools are what the tests run, and the Debian package that has it.
var tools = map[string]string{
	nbdkit:                         "nbdkit",
	"/usr/include/nbdkit-plugin.h": "nbdkit-plugin-dev",
	"nbdcopy":                      "libnbd-bin",
	"nbdinfo":                      "libnbd-bin",
	"/usr/bin/nbdsh":               "python3-libnbd",
	"qemu-img":                     "qemu-utils",
	"qemu-io":                      "qemu-utils",
	"fio":                          "fio",
	"gcc":                          "gcc",
	"promtool":                     "prometheus",
	"/usr/sbin/mkfs.ext4":          "e2fsprogs",
	"/usr/sbin/debugfs":            "e2fsprogs",
	"/usr/sbin/mkfs.vfat":          "dosfstools",
	"xorriso":                      "xorriso",
	"gnutls-cli":                   "gnutls-bin",
	"openssl":                      "openssl",
	"strace":                       "strace",
	"qemu-system-x86_64":           "qemu-system-x86",
}

func TestMain(m *testing.M) {
	status, err := setUp(m)
	if err != nil {
		fmt.Fprintln(os.Stderr, "tests:", err)
		status = 1
	}
	os.Exit(status)
}

func setUp(m *testing.M) (status int, err error) {
	if missing := missingTools(); len(missing) > 0 {
		return 0, fmt.Errorf("find tools: missing %s", strings.Join(missing, ", "))
	}
	if scratch, err = os.MkdirTemp("", "nbdhost-tests-"); err != nil {
		return 0, err
	}
	defer os.RemoveAll(scratch)

	if nbdhost = os.Getenv("NBDHOST_UNDER_TEST"); nbdhost == "" {
		nbdhost = filepath.Join(scratch, "nbdhost")
		args := []string{"build", "-o", nbdhost}
		if raceEnabled {
			args = append(args, "-race")
		}
		if asanEnabled {
			args = append(args, "-asan")
		}
		out, err := exec.Command("go", append(args, "nbdhost/cmd/nbdhost")...).CombinedOutput()
		if err != nil {
			return 0, fmt.Errorf("build nbdhost: %w\n%s", err, out)
		}
	}
	return m.Run(), nil
}

func missingTools() (missing []string) {
	for tool, pkg := range tools {
		var err error
		if strings.HasSuffix(tool, ".h") {
			_, err = os.Stat(tool)
		} else {
			_, err = exec.LookPath(tool)
		}
		if err != nil {
			missing = append(missing, fmt.Sprintf("%s (apt-get install %s)", tool, pkg))
		}
	}
	return missing
}

// underTest is "nbdkit" when the tests run on nbdkit itself.
func underTest() string { return filepath.Base(nbdhost) }

// onlyNbdhost skips a test of what nbdhost promises and the installed nbdkit
// does not have, when the tests run on nbdkit itself.
func onlyNbdhost(t *testing.T) {
	t.Helper()
	if underTest() == "nbdkit" {
		t.Skip("the program under test is nbdkit")
	}
}
