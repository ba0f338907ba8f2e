package main

import (
	"bytes"
	"context"
	"embed"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"regexp"
	"runtime"
	"syscall"
	"time"

	"github.com/spf13/pflag"
)

//go:embed floor.c slow.c memory.pl
var sources embed.FS

// bench is one run of the program.
type bench struct {
	nbdhost string // the program
	self    string // this one
	dir     string // for sockets, compiled programs and data; removed at the end
	rounds  int
	seconds float64 // of one measurement
	perf    string  // a directory for profiles, or empty
	port    int     // the last TCP port used
	// copySize is that of the exports that clients not of ours copy as a whole,
	// in bytes.
	copySize int

	progress io.Writer
	host     host
	failed   bool // something about nbdhost could not be measured
}

func main() {
	if len(os.Args) > 1 && os.Args[1] == "load" {
		runLoad()
	}
	// What is started with a parent death signal must not outlive the thread
	// that started it.
	runtime.LockOSThread()
	if err := run(os.Args[1:], os.Stdout, os.Stderr); err != nil {
		if !errors.Is(err, pflag.ErrHelp) {
			fmt.Fprintln(os.Stderr, "bench:", err)
			os.Exit(1)
		}
	}
}

func run(args []string, stdout, stderr io.Writer) (err error) {
	flags := pflag.NewFlagSet("bench", pflag.ContinueOnError)
	b := &bench{port: 20000 + os.Getpid()%10000, host: host{read: readTicks, rest: restTime}}
	flags.StringVar(&b.nbdhost, "nbdhost", "bin/nbdhost", "the program to measure")
	flags.IntVar(&b.rounds, "rounds", 5, "how often each server of a row is measured")
	flags.Float64Var(&b.seconds, "seconds", 1, "how long each measurement takes")
	flags.StringVar(&b.perf, "perf", "", "write a profile of nbdhost for each row into this directory (needs perf and strace)")
	flags.DurationVar(&b.host.left, "patience", 10*time.Minute, "how long to spend in all on rounds that are measured again, since the host had taken the processors away")
	copied := flags.Int("copy", 512, "the size of what nbdcopy, qemu-img and fio have before them, in MiB")
	match := flags.String("rows", "", "measure the rows that match this regular expression, of all there are")
	list := flags.Bool("list", false, "print the rows and exit")
	doc := flags.String("doc", "", "write the tables into this file, between its marks, and plots beside it")
	if err := flags.Parse(args); err != nil {
		return err
	}
	selected, err := selection(*match)
	if err != nil {
		return err
	}
	if *list {
		for _, r := range selected.rows {
			fmt.Fprintln(stdout, r.name())
		}
		for _, s := range selected.singles {
			fmt.Fprintln(stdout, s.name)
		}
		return nil
	}
	if b.rounds < 1 || b.seconds <= 0 || *copied < 1 {
		return fmt.Errorf("read options: got %d rounds of %g seconds and %d MiB, need at least one of more than 0, and 1 MiB", b.rounds, b.seconds, *copied)
	}
	b.copySize = *copied * mib
	if *doc != "" { // before the quarter of an hour that it takes
		if _, _, err := around(*doc); err != nil {
			return err
		}
	}

	b.progress = io.Discard
	if info, err := os.Stderr.Stat(); err == nil && info.Mode()&os.ModeCharDevice != 0 {
		b.progress = stderr
	}
	if b.nbdhost, err = filepath.Abs(b.nbdhost); err != nil {
		return err
	}
	if b.self, err = os.Executable(); err != nil {
		return err
	}
	if b.dir, err = os.MkdirTemp("", "nbdhost-bench-"); err != nil {
		return err
	}
	defer os.RemoveAll(b.dir)
	if err := b.compile(); err != nil {
		return err
	}
	if err := errors.Join(writeKeys(b.path("keys.psk")), writeCertificates(b.path("pki"))); err != nil {
		return err
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()

	rep := newReport(b)
	table := newTextTable(stdout, selected.rows)
	for i, r := range selected.rows {
		if ctx.Err() != nil {
			break
		}
		res := b.measure(ctx, r, fmt.Sprintf("%d/%d", i+1, len(selected.rows)))
		b.clear()
		if ctx.Err() != nil {
			break
		}
		rep.rows = append(rep.rows, res)
		table.row(res)
	}
	table.legend(rep.rows, &b.host)
	for i, s := range selected.singles {
		if ctx.Err() != nil {
			break
		}
		b.say("%d/%d %s", i+1, len(selected.singles), s.name)
		figures := b.single(ctx, s)
		b.clear()
		if ctx.Err() != nil {
			break
		}
		rep.singles = append(rep.singles, figures...)
		table.singles(figures, i == 0)
	}
	if ctx.Err() != nil {
		return errors.New("interrupted")
	}
	if *doc != "" {
		if err := rep.write(*doc); err != nil {
			return err
		}
	}
	if b.failed {
		return errors.New("something could not be measured: see FAILED above")
	}
	return nil
}

// say shows what is being done, where somebody looks.
func (b *bench) say(format string, args ...any) {
	fmt.Fprintf(b.progress, "\r\x1b[K%.78s", fmt.Sprintf(format, args...))
}

func (b *bench) clear() { fmt.Fprint(b.progress, "\r\x1b[K") }

func (b *bench) path(name string) string { return filepath.Join(b.dir, name) }

// compile makes floor, slow.so, and serial.so, which is the same but for the thread model; and
// puts memory.pl beside them.
func (b *bench) compile() error {
	for _, c := range []struct {
		source, out string
		options     []string
	}{
		{"floor.c", "floor", []string{"-rdynamic"}}, // the plugin calls it
		{"slow.c", "slow.so", []string{"-fPIC", "-shared"}},
		{"slow.c", "serial.so", []string{"-fPIC", "-shared", "-DTHREAD_MODEL=NBDKIT_THREAD_MODEL_SERIALIZE_ALL_REQUESTS"}},
	} {
		source, err := sources.ReadFile(c.source)
		if err != nil {
			return err
		}
		cmd := exec.Command("gcc", append(c.options, "-O2", "-std=gnu17", "-x", "c", "-", "-o", b.path(c.out))...)
		cmd.Stdin = bytes.NewReader(source)
		if msg, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("compile %s: %w\n%s", c.source, err, msg)
		}
	}
	script, err := sources.ReadFile("memory.pl")
	if err != nil {
		return err
	}
	return os.WriteFile(b.path("memory.pl"), script, 0o666)
}

// selected is what a run measures.
type selected struct {
	rows    []row
	singles []single
}

// selection finds what matches among all there is; an empty expression selects
// the standard set.
func selection(match string) (*selected, error) {
	s := &selected{}
	if match == "" {
		return &selected{standardRows(), singles}, nil
	}
	re, err := regexp.Compile(match)
	if err != nil {
		return nil, fmt.Errorf("read --rows: %w", err)
	}
	for _, r := range allRows() {
		if re.MatchString(r.name()) {
			s.rows = append(s.rows, r)
		}
	}
	for _, x := range singles {
		if re.MatchString(x.name) {
			s.singles = append(s.singles, x)
		}
	}
	if len(s.rows)+len(s.singles) == 0 {
		return nil, fmt.Errorf("select rows: got %q, which matches none; --list shows the standard ones, --list --rows . all", match)
	}
	return s, nil
}
