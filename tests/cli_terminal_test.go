package tests

import (
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// A process that is waited for without being a child.
type waiter struct{ fd int }

func pidfd(t *testing.T, pid int) waiter {
	t.Helper()
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	return waiter{fd}
}

func (w waiter) ended() bool {
	for {
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(w.fd), Events: unix.POLLIN}}, int(patience.Milliseconds()))
		if err != unix.EINTR {
			return n == 1
		}
	}
}

// terminal runs a program on a terminal of its own and returns what that shows.
// Once it shows prompt, what is typed is answer.
func terminal(t *testing.T, prompt, answer, program string, args ...string) string {
	t.Helper()
	master, err := os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY|unix.O_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer master.Close()
	master.SetDeadline(time.Now().Add(patience))
	raw, err := master.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	var n int
	if e := raw.Control(func(fd uintptr) {
		if err = unix.IoctlSetPointerInt(int(fd), unix.TIOCSPTLCK, 0); err == nil {
			n, err = unix.IoctlGetInt(int(fd), unix.TIOCGPTN)
		}
	}); e != nil || err != nil {
		t.Fatal(e, err)
	}
	slave, err := os.OpenFile(fmt.Sprintf("/dev/pts/%d", n), os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(program, args...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = slave, slave, slave
	cmd.Env = append(os.Environ(), "LC_ALL=C", "TERM=xterm")
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	slave.Close()
	defer cmd.Wait()
	defer cmd.Process.Kill()
	var shown strings.Builder
	buf := make([]byte, 4096)
	for {
		n, err := master.Read(buf)
		shown.Write(buf[:n])
		if prompt != "" && strings.Contains(shown.String(), prompt) {
			prompt = ""
			io.WriteString(master, answer)
		}
		if err != nil { // EIO: nobody has the terminal open any more
			break
		}
	}
	return shown.String()
}

// Errors are red on a terminal, and nothing else is.
func TestColours(t *testing.T) {
	for _, args := range [][]string{
		{"example3", "bogus=1"},
		{"-U", "-", "-D", "nosuch.flag=1", "null", "--run", "true"},
		{"-fv", "example3", "bogus=1"},
	} {
		want, got := terminal(t, "", "", nbdkit, args...), terminal(t, "", "", nbdhost, args...)
		if args[0] == "-fv" { // there is more that is different in debug messages
			errors := regexp.MustCompile(`(?s)\033\[1.*?\033\[0m`)
			want, got = errors.FindString(want), errors.FindString(got)
		}
		if got != want {
			t.Errorf("%q: got %q, need %q", args, got, want)
		}
	}
}

// A password of "-" is asked for on the terminal, and not shown there.
func TestPassword(t *testing.T) {
	const secret = "open sesame"
	web := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if _, password, _ := r.BasicAuth(); password != secret {
			w.Header().Set("WWW-Authenticate", "Basic")
			w.WriteHeader(http.StatusUnauthorized)
			return
		}
		http.ServeContent(w, r, "x", time.Time{}, strings.NewReader(strings.Repeat("x", 12345)))
	}))
	defer web.Close()
	for _, program := range []string{nbdkit, nbdhost} {
		shown := terminal(t, "assword:", secret+"\n", program, "-U", "-", "-r", "curl", "user=u", "password=-", "url="+web.URL,
			"--run", `nbdinfo --size "$uri"`)
		if !strings.Contains(shown, "\n12345\r\n") || strings.Contains(shown, secret) {
			t.Errorf("%s: the terminal shows %q", program, shown)
		}
	}
}

// The system log gets errors, in nbdkit's words; standard error does not.
func TestSyslog(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs the superuser, for a /dev/log")
	}
	received := func(program string, args ...string) string {
		dir := tempDir(t)
		l, err := net.ListenPacket("unixgram", filepath.Join(dir, "socket"))
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		// A /dev with a log, which only the program sees.
		const script = `set -e; d=$0
mkdir $d/dev; mount -t tmpfs none $d/dev
for f in null zero random urandom; do touch $d/dev/$f; mount --bind /dev/$f $d/dev/$f; done
touch $d/dev/log; mount --bind $d/socket $d/dev/log
mount --rbind $d/dev /dev; exec "$@"`
		o := runCLI(t, dir, "", "unshare", append([]string{"--mount", "sh", "-c", script, dir, program}, args...)...)
		if o.stderr != "" {
			t.Errorf("%s %q: standard error has %s", program, args, o.stderr)
		}
		l.SetReadDeadline(time.Now().Add(patience))
		b := make([]byte, 4096)
		n, _, err := l.ReadFrom(b)
		if err != nil {
			t.Fatalf("%s %q: nothing was logged: %v", program, args, err)
		}
		text := string(b[:n])
		text = regexp.MustCompile(`^(<\d+>)(?:... .. ..:..:.. )?(\w+)\[\d+\]: `).ReplaceAllString(text, "$1$2: ")
		return strings.TrimRight(regexp.MustCompile(`/tmp/\w+/`).ReplaceAllString(text, "TMP/"), "\n")
	}
	read := []string{"eval", "get_size=echo 512", "pread=echo EIO it broke >&2; exit 1",
		"--run", `PATH=/usr/bin:/bin nbdsh -u "$uri" -c 'h.pread(1, 0)' 2>/dev/null; true`}
	for _, args := range [][]string{
		{"--log=syslog", "-f", "example3", "bogus=1"},
		append([]string{"--log=syslog", "-U", "-"}, read...),
	} {
		t.Setenv("PATH", "/usr/sbin:/usr/bin:/sbin:/bin") // nbdsh's python
		if want, got := received(nbdkit, args...), received(nbdhost, args...); got != want {
			t.Errorf("%q: got %q, need %q", args, got, want)
		}
	}
	onlyNbdhost(t)
	if got, want := received(nbdhost, "--log=syslog", "--name=disk1", "-f", "example3", "bogus=1"), "<27>disk1: unknown parameter 'bogus'"; got != want {
		t.Errorf("with a name: got %q, need %q", got, want)
	}
	if asanEnabled {
		return // it has crashes for itself
	}
	crash := `nbdsh -u "$uri" -c 'h.pread(512, ` + fmt.Sprint(whereCrashes) + `)' 2>/dev/null; true`
	got := received(nbdhost, "--log=syslog", "-U", "-", fixture(t, "crash"), "do=segv", "--run", crash)
	if !strings.HasPrefix(got, "<27>nbdkit: plugin crash crashed with SIGSEGV in .pread (") {
		t.Errorf("got %q", got)
	}
}

// Signals end the server as they end nbdkit: in order, with status 0.
func TestCLISignals(t *testing.T) {
	for _, program := range []string{nbdkit, asNbdkit(t)} {
		for _, sig := range []syscall.Signal{syscall.SIGINT, syscall.SIGTERM, syscall.SIGQUIT, syscall.SIGHUP} {
			dir := tempDir(t)
			c := call(t, filepath.Join(dir, "pid"), program, nil,
				"-fv", "-U", filepath.Join(dir, "sock"), "-P", filepath.Join(dir, "pid"), "memory", "1M")
			if err := c.Process.Signal(syscall.SIGPIPE); err != nil { // ignored
				t.Fatal(err)
			}
			c.stop(sig)
			if !strings.Contains(c.said(), "memory: unload plugin") {
				t.Errorf("%s, %v: the plugin was not unloaded:\n%s", program, sig, c.said())
			}
		}
	}
}

// On a terminal --check shows how far it is, in a line that each result replaces;
// elsewhere it does not.
func TestCheckProgress(t *testing.T) {
	t.Parallel()
	onlyNbdhost(t)
	args := []string{"--check", "--check-only=file,size,read", "memory", "1M"}
	plain := runCLI(t, tempDir(t), "", nbdhost, args...)
	if plain.status != 0 || strings.ContainsAny(plain.stdout, "\r\033") {
		t.Fatalf("not on a terminal: got status %d and\n%s%s", plain.status, plain.stdout, plain.stderr)
	}
	shown := strings.ReplaceAll(terminal(t, "", "", nbdhost, args...), "\r\n", "\n")
	const erase = "\r\033[K"
	bar := regexp.MustCompile(`^\[(#*)(\.*)\] (\d+)/(\d+) ([a-z._]+)$`)
	var begun []string
	left := ""
	for i, part := range strings.Split(shown, erase) {
		m := bar.FindStringSubmatch(part)
		if m == nil {
			left += part
			continue
		}
		done, _ := strconv.Atoi(m[3])
		total, _ := strconv.Atoi(m[4])
		if done != len(begun) || total == 0 || len(m[1]) != 24*done/total || len(m[1])+len(m[2]) != 24 {
			t.Errorf("part %d: got %q after %d checks", i, part, len(begun))
		}
		begun = append(begun, m[5])
	}
	// What remains when all bars are erased is the report.
	if left != plain.stdout {
		t.Errorf("got %q, need %q", left, plain.stdout)
	}
	for i, line := range strings.Split(strings.TrimSpace(plain.stdout), "\n") {
		if name := strings.TrimRight(strings.Fields(line)[1], ":"); i < len(begun) && name != begun[i] {
			t.Errorf("the bar says %s, and the report %q", begun[i], line)
		}
	}
	if len(begun) < 8 {
		t.Errorf("got bars for %q only", begun)
	}
}
