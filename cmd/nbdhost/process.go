package main

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"nbdhost/protocol"
)

// stopSignals end the server in an orderly way.
var stopSignals = []os.Signal{unix.SIGINT, unix.SIGTERM, unix.SIGQUIT, unix.SIGHUP}

// parentPID is who started us, as early as it can be known.
var parentPID = os.Getppid()

// exitWithParent makes the end of the parent process one of ours: SIGTERM comes.
func exitWithParent() error {
	if err := unix.Prctl(unix.PR_SET_PDEATHSIG, uintptr(unix.SIGTERM), 0, 0, 0); err != nil {
		return fmt.Errorf("watch parent process: %w", err)
	}
	// It may have ended before the kernel knew that we care.
	if os.Getppid() != parentPID {
		return errors.New("watch parent process: it has ended already")
	}
	return nil
}

// readyVariable is how the process in the background is told the number of the
// pipe into which it writes one byte when it is ready.
const readyVariable = "NBDHOST_READY_FD"

// argumentsVariable is how this program is told the number of a file with its command
// line, where ps(1) must not show all of that.
const argumentsVariable = "NBDHOST_ARGUMENTS_FD"

// startAgain starts this program again as cmd, which has its environment, with args,
// of which nobody sees the secrets, and with descriptors that have the same numbers
// there: those from 3 on may belong to the user, who names them in parameters. No other
// process may be started meanwhile.
func startAgain(cmd *exec.Cmd, args []string, hide *secrets, fds ...int) error {
	cmd.Path, cmd.Args = "/proc/self/exe", args
	if hide == nil || !hide.bare {
		cmd.Args = hide.redactAll(args)
	}
	if _, err := os.Stat(cmd.Path); err != nil { // no proc(5) here
		if cmd.Path, err = exec.LookPath(args[0]); err != nil {
			return fmt.Errorf("find this program: %w: need /proc, or to be started by a path", err)
		}
	}
	if !slices.Equal(cmd.Args, args) {
		fd, err := unix.MemfdCreate("arguments", unix.MFD_CLOEXEC)
		if err != nil {
			return fmt.Errorf("pass on arguments: %w", err)
		}
		defer unix.Close(fd)
		if _, err := unix.Pwrite(fd, []byte(strings.Join(args, "\x00")), 0); err != nil {
			return fmt.Errorf("pass on arguments: %w", err)
		}
		cmd.Env = append(cmd.Env, argumentsVariable+"="+strconv.Itoa(fd))
		fds = append(fds, fd)
	}
	defer keepBack(fds)
	if err := passOn(fds); err != nil {
		return err
	}
	return cmd.Start()
}

// passOn leaves descriptors open in programs that are executed.
func passOn(fds []int) error {
	for _, fd := range fds {
		if _, err := unix.FcntlInt(uintptr(fd), unix.F_SETFD, 0); err != nil {
			return fmt.Errorf("pass on descriptor %d: %w", fd, err)
		}
	}
	return nil
}

// keepBack undoes passOn.
func keepBack(fds []int) {
	for _, fd := range fds {
		unix.CloseOnExec(fd)
	}
}

// nameProcess gives the process the name of the program as it was called, which it has unless
// startAgain ran it: pgrep(1) and killall(1) go by it.
func nameProcess(program string) {
	// Without proc(5) it has the name.
	_ = os.WriteFile("/proc/self/comm", []byte(filepath.Base(program)), 0)
}

// fullArguments returns the command line that startAgain was given, where args shows
// less of it.
func fullArguments(args []string) ([]string, error) {
	v, ok := os.LookupEnv(argumentsVariable)
	if !ok {
		return args, nil
	}
	os.Unsetenv(argumentsVariable)
	fd, err := strconv.Atoi(v)
	if err != nil {
		return nil, fmt.Errorf("read %s: got %q: need a file descriptor; unset the variable", argumentsVariable, v)
	}
	f := os.NewFile(uintptr(fd), "arguments")
	defer f.Close()
	text, err := io.ReadAll(f)
	if err != nil {
		return nil, fmt.Errorf("read %s: descriptor %d: %w; unset the variable", argumentsVariable, fd, cause(err))
	}
	return strings.Split(string(text), "\x00"), nil
}

// background runs this program again, in the background, and returns the exit
// status for this process: 0 once the other one is ready, else that one's. Both
// have the same standard input, output and error until then.
func background(args []string, hide *secrets) (int, error) {
	var pipe [2]int
	if err := unix.Pipe2(pipe[:], unix.O_CLOEXEC); err != nil {
		return 1, fmt.Errorf("go to the background: %w", err)
	}
	ready := os.NewFile(uintptr(pipe[0]), "ready")
	defer ready.Close()
	child := &exec.Cmd{
		Env:   append(os.Environ(), readyVariable+"="+strconv.Itoa(pipe[1])),
		Stdin: os.Stdin, Stdout: os.Stdout, Stderr: os.Stderr,
	}
	stop := make(chan os.Signal, 1)
	signal.Notify(stop, stopSignals...)
	if err := startAgain(child, args, hide, pipe[1]); err != nil {
		return 1, fmt.Errorf("go to the background: %w", err)
	}
	unix.Close(pipe[1])

	isReady := make(chan bool, 1)
	go func() {
		n, _ := ready.Read(make([]byte, 1))
		isReady <- n == 1
	}()
	ended := make(chan error, 1)
	go func() { ended <- child.Wait() }()
	for {
		select {
		case ok := <-isReady:
			if ok {
				return 0, nil
			}
			isReady = nil // the child is about to end
		case <-ended:
			select {
			case ok := <-isReady: // both may have happened by now
				if ok {
					return 0, nil
				}
			default:
			}
			status, text := exitStatus(child.ProcessState)
			if text != "" {
				return status, errors.New("the server in the background " + text)
			}
			return status, nil
		case s := <-stop:
			child.Process.Signal(s)
		}
	}
}

// exitStatus returns the status to end with as the process did, the way a shell
// has it, and a few words if a signal ended it.
func exitStatus(p *os.ProcessState) (status int, text string) {
	w, ok := p.Sys().(syscall.WaitStatus)
	if !ok {
		return 1, "ended in a way that is not known"
	}
	if w.Signaled() {
		return 128 + int(w.Signal()), fmt.Sprintf("was ended by signal %d (%v)", int(w.Signal()), w.Signal())
	}
	return w.ExitStatus(), ""
}

// starter is who waits in [background] for this process to be ready; nil if
// nobody does.
type starter struct{ pipe *os.File }

// findStarter returns the starter of this process. It hides the way to it from
// modules and the programs that they run.
func findStarter() (*starter, error) {
	v, ok := os.LookupEnv(readyVariable)
	if !ok {
		return nil, nil
	}
	os.Unsetenv(readyVariable)
	fd, err := strconv.Atoi(v)
	if err == nil {
		_, err = unix.FcntlInt(uintptr(fd), unix.F_SETFD, unix.FD_CLOEXEC)
	}
	if err != nil {
		return nil, fmt.Errorf("read %s: got %q: need a file descriptor; unset the variable", readyVariable, v)
	}
	return &starter{os.NewFile(uintptr(fd), "ready")}, nil
}

// detach leaves the starter's directory, but not its session and process group, as nbdkit: who
// ends those means the server too.
func (s *starter) detach() error {
	if err := os.Chdir("/"); err != nil {
		return fmt.Errorf("leave directory: %w", err)
	}
	return nil
}

// ready lets the starter end.
func (s *starter) ready() error {
	defer s.pipe.Close()
	if _, err := s.pipe.Write([]byte{'\n'}); err != nil {
		return fmt.Errorf("tell the starting process: %w", cause(err))
	}
	return nil
}

// giveUpStderr gives up standard error, unless the options send something to it.
func giveUpStderr(o *options) error {
	if o.verbose || o.log == logStderr {
		return nil
	}
	return giveUp(2, 2)
}

// giveUp puts /dev/null in the place of the descriptors first to last.
func giveUp(first, last int) error {
	null, err := unix.Open(os.DevNull, unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("open %s: %w", os.DevNull, err)
	}
	defer unix.Close(null)
	for fd := first; fd <= last; fd++ {
		if err := unix.Dup3(null, fd, 0); err != nil {
			return fmt.Errorf("give up standard streams: %w", err)
		}
	}
	return nil
}

// pidfileAdvice is for a pidfile in a place that is not the server's. The file means
// that clients can connect, so that it is written after --user has taken effect.
const pidfileAdvice = "need a file or a directory that the server may write to, as the user that --user names"

// writePidfile writes the process ID. Who sees the file sees all of it, unless it
// is something else than a file.
func writePidfile(path string) error {
	content := []byte(strconv.Itoa(os.Getpid()) + "\n")
	// One that exists keeps its owner, mode and inode: somebody may have made it for the user that
	// we are by now, or have mounted it here.
	mode := os.O_WRONLY
	if st, err := os.Lstat(path); err == nil && st.Mode()&fs.ModeSymlink != 0 {
		mode |= os.O_CREATE // what it points to
	}
	f, err := os.OpenFile(path, mode, 0o644)
	if err == nil {
		if _, err = f.Write(content); err == nil {
			// Not before: who reads it meanwhile must find something. A pipe has no length.
			_ = f.Truncate(int64(len(content)))
		}
		if e := f.Close(); err == nil {
			err = e
		}
		if err != nil {
			return fmt.Errorf("write pidfile %s: %w", path, cause(err))
		}
		return nil
	}
	if errors.Is(err, fs.ErrNotExist) {
		f, err = os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+".*")
	}
	if errors.Is(err, fs.ErrPermission) {
		return fmt.Errorf("write pidfile %s: %w: %s", path, cause(err), pidfileAdvice)
	} else if err != nil {
		return fmt.Errorf("write pidfile %s: %w", path, cause(err))
	}
	_, err = f.Write(content)
	if e := f.Chmod(0o644); err == nil {
		err = e
	}
	if e := f.Close(); err == nil {
		err = e
	}
	if err == nil {
		err = os.Rename(f.Name(), path)
	}
	if err != nil {
		os.Remove(f.Name())
		return fmt.Errorf("write pidfile %s: %w", path, cause(err))
	}
	return nil
}

// runCommand starts the command of --run in a shell that knows where the server
// is (nbdkit-captive(1)). The variables are the shell's own, not exported.
func runCommand(command string, uri protocol.URI, tls *tlsOptions) (*exec.Cmd, error) {
	port := ""
	if uri.Transport != protocol.TransportUnix {
		port = strconv.Itoa(int(uri.Port))
	}
	var b strings.Builder
	for _, v := range append(tls.variables(),
		[2]string{"uri", uri.String()}, [2]string{"nbd", uri.String()}, [2]string{"port", port},
		[2]string{"unixsocket", uri.Socket}, [2]string{"exportname", uri.Export},
	) {
		b.WriteString(v[0] + "=" + quote(v[1]) + "\n")
	}
	cmd := exec.Command("/bin/sh", "-c", b.String()+command)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("run command: %w", err)
	}
	return cmd, nil
}

// quote makes a text one word of a shell's command line.
func quote(s string) string { return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'" }
