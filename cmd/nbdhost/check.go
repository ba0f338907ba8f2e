package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"nbdhost/backend"
	"nbdhost/check"
	"nbdhost/loader"
)

// checkVariable is how the process that runs the checks is told the number of the
// pipe into which it writes what they find, and which ones to run.
const checkVariable = "NBDHOST_CHECK"

// checkTime is how long one check may take before the plugin counts as hanging.
const checkTime = 2 * time.Minute

// stopCheck is the check that goes on to the end of the process.
const stopCheck = "plugin.stop"

// A finding is one message from the process that runs the checks.
type finding struct {
	Begin string        `json:"begin,omitempty"` // the name of a check
	End   *check.Result `json:"end,omitempty"`
}

// checkPlugin runs the checks in processes of their own, so that a plugin which
// crashes or hangs fails a check and no more, and reports. The status is 0 where
// all promises hold.
func checkPlugin(o *options, args []string, stdout io.Writer) (int, error) {
	names, err := check.Select(o.checkOnly)
	if err != nil {
		return 1, err
	}
	if _, err := loader.Find(loader.PluginKind, o.args[0], o.pluginPath...); err != nil {
		return 1, err
	}
	report, err := check.NewReporter(o.check, stdout, strings.Join(o.args, " "), len(names), isTerminal(stdout))
	if err != nil {
		return 1, err
	}
	status := 0
	end := func(r check.Result) {
		if r.Status == check.Fail {
			status = 1
			r.Again = o.secrets.redact(checkAgain(args, r.Name))
		}
		report.End(r)
	}
	for len(names) > 0 {
		ended, err := superviseChecks(args, names, o.secrets, report.Begin, end)
		if err != nil {
			return 1, err
		}
		names = names[ended:]
	}
	return status, report.Close()
}

// superviseChecks runs the named checks in one process and returns how many have
// ended, at least one. The last of them has failed where the process ended with it.
func superviseChecks(args, names []string, hide *secrets, begin func(string), end func(check.Result)) (ended int, err error) {
	var pipe [2]int
	if err := unix.Pipe2(pipe[:], unix.O_CLOEXEC); err != nil {
		return 0, fmt.Errorf("start checks: %w", err)
	}
	in := os.NewFile(uintptr(pipe[0]), "findings")
	defer in.Close()
	crash := &crashFilter{w: os.Stderr}
	child := &exec.Cmd{
		Env:   append(os.Environ(), fmt.Sprintf("%s=%d %s", checkVariable, pipe[1], strings.Join(names, ","))),
		Stdin: os.Stdin, Stdout: os.Stderr, Stderr: crash, // what plugins print is not the report
		SysProcAttr: &syscall.SysProcAttr{Pdeathsig: unix.SIGKILL},
		WaitDelay:   time.Second, // for what a plugin has left behind
	}
	err = startAgain(child, args, hide, pipe[1])
	unix.Close(pipe[1])
	if err != nil {
		return 0, fmt.Errorf("start checks: %w", err)
	}

	findings := make(chan finding)
	go func() {
		defer close(findings)
		for d := json.NewDecoder(in); ; {
			var f finding
			if d.Decode(&f) != nil {
				return // the process has ended
			}
			findings <- f
		}
	}()
	hangs := false
	timer := time.AfterFunc(checkTime, func() { hangs = true; child.Process.Kill() })
	var last *check.Result // held back: the process may yet crash at its end
	for f := range findings {
		timer.Reset(checkTime)
		switch {
		case f.End == nil:
			begin(f.Begin)
		case f.End.Name == stopCheck:
			last = f.End
		default:
			end(*f.End)
			ended++
		}
	}
	err = child.Wait()
	timer.Stop()
	if last != nil && (err == nil || last.Status == check.Fail) {
		end(*last)
		ended++
	}
	if ended == len(names) {
		return ended, nil
	}

	c, _ := check.Lookup(names[ended])
	r := check.Result{Name: c.Name, Promise: c.Promise, Status: check.Fail}
	_, r.Saw = exitStatus(child.ProcessState)
	switch {
	case hangs:
		r.Saw = fmt.Sprintf("it has not ended after %v", checkTime)
	case crash.report != "":
		r.Saw = crash.report
	case crash.line != "":
		r.Saw = "the process crashed: " + crash.line
	case r.Saw != "":
		r.Saw = "the process " + r.Saw
	default:
		r.Saw = fmt.Sprintf("the plugin ended the process with %v", child.ProcessState)
	}
	end(r)
	ended++
	if !check.Needed(c.Name) {
		return ended, nil // the others get a new process
	}
	for _, name := range names[ended:] {
		c, _ := check.Lookup(name)
		end(check.Result{Name: c.Name, Promise: c.Promise, Status: check.Skip, Why: r.Name + " has ended the process"})
	}
	return len(names), nil
}

// A crashFilter passes on what a process writes to its standard error, but for the report
// that a module crashed (loader.ReportCrashesTo), and up to that of the Go runtime that
// the program did, of which it keeps the first line.
type crashFilter struct {
	w            io.Writer
	report, line string
}

// crashReport matches a report of the former kind, without the rest of its line.
var crashReport = regexp.MustCompile(`(?m)^nbdkit(?:\[.*\])?: error: ((?:(?:plugin|filter) \S+|a module|a thread outside of calls) (?:crashed with SIG|aborted \(SIG|called _?exit\().*)\n`)

// crashLine matches the first line of one of the latter.
var crashLine = regexp.MustCompile(`(?m)^(SIG[A-Z]+: .*|fatal error: .*|panic: .*|unexpected fault address .*)$`)

func (f *crashFilter) Write(p []byte) (int, error) {
	n := len(p)
	if f.line != "" {
		return n, nil
	}
	if at := crashReport.FindSubmatchIndex(p); at != nil {
		f.report = string(p[at[2]:at[3]])
		p = slices.Concat(p[:at[0]], p[at[1]:])
	}
	if at := crashLine.FindIndex(p); at != nil {
		f.line = string(p[at[0]:at[1]])
		p = p[:at[0]]
	}
	_, err := f.w.Write(p)
	return n, err
}

// checkAgain is a command line that runs one check as args did.
func checkAgain(args []string, name string) string {
	words := []string{args[0], "--check", "--check-only=" + name}
	for i := 1; i < len(args); i++ {
		arg := args[i]
		switch {
		case arg == "--check-only":
			i++
		case arg == "--check" || strings.HasPrefix(arg, "--check=") || strings.HasPrefix(arg, "--check-only="):
		case arg == "" || strings.ContainsFunc(arg, func(r rune) bool { return !isPlain(r) }):
			words = append(words, quote(arg))
		default:
			words = append(words, arg)
		}
	}
	return strings.Join(words, " ")
}

// isPlain tells whether a shell takes a character for itself.
func isPlain(r rune) bool {
	return r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || strings.ContainsRune("-_=+./:,@%", r)
}

// findCheck returns what checkVariable says, if this process is to run checks, and
// hides it from modules and the programs that they run.
func findCheck() (pipe *os.File, names []string, err error) {
	v, ok := os.LookupEnv(checkVariable)
	if !ok {
		return nil, nil, nil
	}
	os.Unsetenv(checkVariable)
	number, list, _ := strings.Cut(v, " ")
	fd, err := strconv.Atoi(number)
	if err == nil {
		_, err = unix.FcntlInt(uintptr(fd), unix.F_SETFD, unix.FD_CLOEXEC)
	}
	if err != nil {
		return nil, nil, fmt.Errorf("read %s: got %q: need a file descriptor; unset the variable", checkVariable, v)
	}
	return os.NewFile(uintptr(fd), "findings"), strings.Split(list, ","), nil
}

// runChecks runs the named checks in this process and writes what they find.
func runChecks(o *options, names []string, pipe io.Writer, out *logHandler) (int, error) {
	setProcs()
	unix.Umask(0o022)
	var stop stopper
	stop.onSignals()
	host := loader.Host{Name: o.name}
	log := slog.New(slog.DiscardHandler)
	if o.verbose {
		host.Log, log = out.fromModule, slog.New(out)
	}
	if err := loader.Init(host); err != nil {
		return 1, err
	}
	loader.SetVerbose(o.verbose)
	found, err := loader.Find(loader.PluginKind, o.args[0], o.pluginPath...)
	if err != nil {
		return 1, err
	}
	args := o.args[1:]
	if found.Script != "" {
		args = append([]string{found.Script}, args...)
	}
	if args, err = expandParameters(args); err != nil {
		return 1, err
	}

	var plugin *loader.Plugin
	var chain *backend.Chain
	var life life
	s := &check.Subject{Path: found.Path, Writes: o.checkWrites}
	if o.verbose {
		s.Log = log
	}
	s.Open = func() (check.Plugin, error) {
		p, err := loader.Open(found.Path)
		if err != nil {
			return nil, err
		}
		plugin = p
		out.setModule(p.Name())
		return p, nil
	}
	s.Start = func() (*backend.Chain, error) {
		filters, err := openFilters(o, log)
		if err != nil {
			return nil, err
		}
		for _, f := range filters {
			s.Filters = append(s.Filters, f.Name()+" "+f.Version())
		}
		chain = newChain(o, plugin, filters, log)
		return chain, life.start(chain, plugin.MagicConfigKey(), args)
	}
	s.Serving = func(serve func()) {
		loader.OnMain(func() {
			serve()
			if s.Stuck() {
				os.Exit(1) // the main thread may be what is stuck
			}
		})
	}
	s.Stop = func() {
		loader.Quit()
		life.stop(chain)
	}
	w := json.NewEncoder(pipe)
	send := func(f finding) { err = errors.Join(err, w.Encode(f)) }
	failed := s.Run(names,
		func(name string) { send(finding{Begin: name}) },
		func(r check.Result) { send(finding{End: &r}) })
	return 0, errors.Join(err, failed)
}

// life is how far a chain has come.
type life struct{ loaded, forked bool }

// start takes a chain from .load to .after_fork.
func (l *life) start(chain *backend.Chain, magic string, args []string) error {
	chain.Load()
	l.loaded = true
	for i, arg := range args {
		key, value, err := parseParameter(arg, magic, i == 0)
		if err != nil {
			return err
		}
		if err := chain.Config(key, value); err != nil {
			return err
		}
	}
	if err := chain.ConfigComplete(); err != nil {
		return err
	}
	if err := chain.SetThreadModel(backend.Parallel); err != nil {
		return err
	}
	if err := chain.GetReady(); err != nil {
		return err
	}
	loader.EndConfiguration()
	l.forked = true
	return chain.AfterFork()
}

func (l *life) stop(chain *backend.Chain) {
	if l.forked {
		chain.Cleanup()
	}
	if l.loaded {
		chain.Unload()
	}
}

// checkFormat takes the value of --check.
func checkFormat(o *options, v string) error {
	if v == noValue {
		v = check.Formats[0]
	}
	if !slices.Contains(check.Formats, v) {
		return fmt.Errorf("got %q: need one of %s", v, strings.Join(check.Formats, ", "))
	}
	o.check = v
	return nil
}
