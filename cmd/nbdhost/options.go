package main

import (
	"errors"
	"fmt"
	"io"
	"net"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/pflag"

	"nbdhost/loader"
)

// Limits of options.
const (
	maxThreads = 8192 // calls in progress; the Go runtime ends a process at 10000 threads
	maxSocket  = 107  // bytes of a path in struct sockaddr_un, without the NUL
)

// options is what the command line asks for.
type options struct {
	args []string // the plugin's name, then its parameters

	// Where to listen. TCP is used if unix is empty.
	unix    string // an absolute path; "-" for a private socket
	port    string // a number or a service; "" for the default
	address string // a name or an address; "" for all
	family  string // "tcp", "tcp4" or "tcp6"

	// What is served, and how.
	readonly      bool
	export        string // only shown in URIs
	threads       int    // 0: the server's default
	handshakeMask uint16
	noSR, noMC    bool
	timeout       time.Duration // of the handshake; 0: none
	drainTimeout  time.Duration

	// The module.
	pluginPath []string
	debug      []loader.DebugFlag

	// The process.
	foreground     bool
	exitWithParent bool
	pidfile        string // an absolute path
	captive        bool   // there is a command to run:
	command        string

	// What is written.
	name     string
	verbose  bool
	log      string
	printURI bool

	// What to do instead of serving.
	help, version, dumpPlugin, longOptions, shortOptions bool
}

// An option is one line of the table below, from which parsing, --help,
// --long-options and --short-options follow.
type option struct {
	group string   // heading in --help; "" hides the option
	names []string // the long ones; help shows the first
	short string   // one letter or ""
	arg   string   // PLACEHOLDER of the value; "" if the option has none
	help  string
	set   func(o *options, value string) error
}

// Headings of --help, in order.
const (
	groupListen  = "Listening"
	groupServe   = "Serving"
	groupProcess = "Process"
	groupOutput  = "Messages"
	groupInfo    = "Information"
)

var groups = []string{groupListen, groupServe, groupProcess, groupOutput, groupInfo}

var optionTable = []option{
	{groupListen, []string{"unix"}, "U", "SOCKET", "listen on the Unix socket SOCKET; - makes a private one",
		func(o *options, v string) (err error) {
			if v == "-" {
				o.unix = v
				return nil
			}
			o.unix, err = absolute(v)
			if err == nil && len(o.unix) > maxSocket {
				return fmt.Errorf("got a path of %d bytes (%s): need at most %d; choose a shorter one", len(o.unix), o.unix, maxSocket)
			}
			return err
		}},
	{groupListen, []string{"port"}, "p", "PORT", "listen on TCP port PORT (default 10809); 0 takes a free one",
		func(o *options, v string) error {
			if _, err := net.LookupPort("tcp", v); err != nil {
				return fmt.Errorf("got %q: need a number from 0 to 65535 or the name of a service", v)
			}
			o.port = v
			return nil
		}},
	{groupListen, []string{"ipaddr", "ip-addr"}, "i", "ADDRESS", "listen on this address or host name only (default: all)",
		func(o *options, v string) error {
			if v == "" {
				return errors.New("got an empty text: need an address or a host name")
			}
			o.address = v
			return nil
		}},
	{groupListen, []string{"ipv4-only"}, "4", "", "use IPv4 only",
		func(o *options, _ string) error { o.family = "tcp4"; return nil }},
	{groupListen, []string{"ipv6-only"}, "6", "", "use IPv6 only",
		func(o *options, _ string) error { o.family = "tcp6"; return nil }},

	{groupServe, []string{"readonly", "read-only"}, "r", "", "refuse writes", flag(func(o *options) *bool { return &o.readonly })},
	{groupServe, []string{"exportname", "export-name", "export"}, "e", "NAME", "the export that URIs name, for --run and --print-uri", text(func(o *options) *string { return &o.export })},
	{groupServe, []string{"threads"}, "t", "N", "requests in progress on each connection (default 16)",
		func(o *options, v string) error {
			n, err := strconv.ParseUint(v, 0, 32)
			if err != nil || n > maxThreads {
				return fmt.Errorf("got %q: need a number from 1 to %d, or 0 for the default", v, maxThreads)
			}
			o.threads = int(n)
			return nil
		}},
	{groupServe, []string{"filter"}, "", "FILTER", "put a filter before the plugin (not supported yet)",
		func(_ *options, v string) error {
			return fmt.Errorf("got %q: filters are not supported yet; leave the option out", v)
		}},
	{groupServe, []string{"plugin-path"}, "", "DIR[:DIR...]", "look for plugins here first",
		func(o *options, v string) error { o.pluginPath = append(o.pluginPath, v); return nil }},
	{groupServe, []string{"no-sr", "no-structured-replies"}, "", "", "do not offer structured replies", flag(func(o *options) *bool { return &o.noSR })},
	{groupServe, []string{"no-mc", "no-meta-contexts"}, "", "", "do not offer meta contexts (block status)", flag(func(o *options) *bool { return &o.noMC })},
	{groupServe, []string{"mask-handshake"}, "", "MASK", "offer only these global handshake flags",
		func(o *options, v string) error {
			n, err := strconv.ParseUint(v, 0, 32)
			if err != nil {
				return fmt.Errorf("got %q: need a number of 32 bits, such as 0x3", v)
			}
			o.handshakeMask = uint16(n) // the field on the wire has 16 bits
			return nil
		}},
	{groupServe, []string{"timeout", "time-out"}, "", "TIME", "longest time for a handshake, such as 10 or 500ms (default: no limit)", delay(func(o *options) *time.Duration { return &o.timeout })},
	{groupServe, []string{"drain-timeout"}, "", "TIME", "longest time for requests to finish at the end (default 10s)", delay(func(o *options) *time.Duration { return &o.drainTimeout })},
	{groupServe, []string{"newstyle", "new-style"}, "n", "", "use the newstyle protocol (the only one there is)", func(*options, string) error { return nil }},

	{groupProcess, []string{"foreground", "no-fork"}, "f", "", "stay in the foreground", flag(func(o *options) *bool { return &o.foreground })},
	{groupProcess, []string{"pidfile", "pid-file"}, "P", "FILE", "write the process ID to FILE once clients can connect",
		func(o *options, v string) (err error) { o.pidfile, err = absolute(v); return err }},
	{groupProcess, []string{"exit-with-parent"}, "", "", "stop when the parent process ends; implies -f",
		func(o *options, _ string) error { o.exitWithParent, o.foreground = true, true; return nil }},
	{groupProcess, []string{"run"}, "", "COMMAND", "serve while COMMAND runs in a shell, with $uri $unixsocket $port\n$exportname set; implies -f, and -U - unless -p is given",
		func(o *options, v string) error { o.captive, o.command, o.foreground = true, v, true; return nil }},

	{groupOutput, []string{"verbose"}, "v", "", "write debug messages to standard error", flag(func(o *options) *bool { return &o.verbose })},
	{groupOutput, []string{"debug"}, "D", "NAME.FLAG=N", "set a debug flag of the plugin, or of the server (NAME nbdkit)",
		func(o *options, v string) error {
			// Programs pass "-D NAME.FLAG=N" as one argument.
			f, err := loader.ParseDebugFlag(strings.TrimSpace(v))
			o.debug = append(o.debug, f)
			return err
		}},
	{groupOutput, []string{"log"}, "", "WHERE", "where errors go: stderr, syslog, null, /path, or default\n(stderr in the foreground, syslog in the background)",
		func(o *options, v string) error {
			if v != logDefault && v != logStderr && v != logSyslog && v != logNull && !filepath.IsAbs(v) {
				return fmt.Errorf("got %q: need stderr, syslog, null, default or an absolute path", v)
			}
			o.log = v
			return nil
		}},
	{groupOutput, []string{"name"}, "", "NAME", "start messages with NAME (default nbdkit)", text(func(o *options) *string { return &o.name })},
	{groupOutput, []string{"print-uri"}, "", "", "write the URI to standard output", flag(func(o *options) *bool { return &o.printURI })},

	{groupInfo, []string{"dump-plugin"}, "", "", "describe the plugin as KEY=VALUE lines and exit", flag(func(o *options) *bool { return &o.dumpPlugin })},
	{groupInfo, []string{"help"}, "", "", "show this text, and the plugin's if one is given, and exit", flag(func(o *options) *bool { return &o.help })},
	{groupInfo, []string{"version"}, "V", "", "show the version, and the plugin's if one is given, and exit", flag(func(o *options) *bool { return &o.version })},
	{groupInfo, []string{"long-options"}, "", "", "list the long options and exit", flag(func(o *options) *bool { return &o.longOptions })},
	{groupInfo, []string{"short-options"}, "", "", "list the short options and exit", flag(func(o *options) *bool { return &o.shortOptions })},

	// nbdkit's other options: known, so that nobody is told that they are a slip.
	{"", []string{"dump-config"}, "", "", "", unsupported},
	{"", []string{"group"}, "g", "GROUP", "", unsupported},
	{"", []string{"keepalive", "keep-alive"}, "", "", "", unsupported},
	{"", []string{"oldstyle", "old-style"}, "o", "", "", unsupported},
	{"", []string{"selinux-label"}, "", "LABEL", "", unsupported},
	{"", []string{"single", "stdin"}, "s", "", "", unsupported},
	{"", []string{"swap"}, "", "", "", unsupported},
	{"", []string{"tls"}, "", "MODE", "", unsupported},
	{"", []string{"tls-certificates"}, "", "DIR", "", unsupported},
	{"", []string{"tls-priority"}, "", "PRIORITY", "", unsupported},
	{"", []string{"tls-psk"}, "", "FILE", "", unsupported},
	{"", []string{"tls-verify-peer"}, "", "", "", unsupported},
	{"", []string{"user"}, "u", "USER", "", unsupported},
	{"", []string{"vsock"}, "", "", "", unsupported},
}

func flag(field func(*options) *bool) func(*options, string) error {
	return func(o *options, _ string) error { *field(o) = true; return nil }
}

func text(field func(*options) *string) func(*options, string) error {
	return func(o *options, v string) error { *field(o) = v; return nil }
}

func delay(field func(*options) *time.Duration) func(*options, string) error {
	return func(o *options, v string) (err error) { *field(o), err = parseDelay(v); return err }
}

func unsupported(*options, string) error {
	return errors.New("nbdkit's option is not supported yet; leave it out")
}

// parseDelay reads a time as nbdkit_parse_delay(3) does: a number of seconds, or
// one with the unit s, ms, us or ns.
func parseDelay(s string) (time.Duration, error) {
	number := strings.TrimRight(s, "abcdefghijklmnopqrstuvwxyzµμ")
	unit, ok := map[string]time.Duration{"": time.Second, "s": time.Second, "ms": time.Millisecond,
		"us": time.Microsecond, "µs": time.Microsecond, "μs": time.Microsecond, "ns": 1}[s[len(number):]]
	n, err := strconv.ParseFloat(number, 64)
	// !(n >= 0) holds for what is not a number, too.
	if d := n * float64(unit); !ok || err != nil || !(n >= 0) || d >= 1<<63 {
		return 0, fmt.Errorf("got %q: need a time such as 5, 2.5s, 100ms, 10us or 1ns", s)
	} else {
		return time.Duration(d), nil
	}
}

func absolute(path string) (string, error) {
	if path == "" {
		return "", errors.New("got an empty text: need a path")
	}
	return filepath.Abs(path)
}

// parse reads a command line as getopt_long does: options and other arguments
// in any order, letters bundled, long names shortened as far as they are unique.
func parse(args []string) (*options, error) {
	o := &options{family: "tcp", handshakeMask: 0xffff, drainTimeout: 10 * time.Second, log: logDefault}
	flags := pflag.NewFlagSet("", pflag.ContinueOnError)
	flags.SetOutput(io.Discard)
	flags.Usage = func() {}
	for i := range optionTable {
		opt := &optionTable[i]
		f := flags.VarPF(&optionValue{opt, o}, opt.names[0], opt.short, "")
		if opt.arg == "" {
			f.NoOptDefVal = noValue
		}
	}
	// After the flags are there: their own names must not be taken for shortened ones.
	flags.SetNormalizeFunc(func(_ *pflag.FlagSet, name string) pflag.NormalizedName {
		return pflag.NormalizedName(fullName(name))
	})
	err := flags.Parse(args)
	if errors.Is(err, pflag.ErrHelp) {
		o.help, err = true, nil
	}
	if err != nil {
		return nil, usageError(err)
	}
	o.args = flags.Args()
	if o.captive && o.port == "" && o.unix == "" {
		o.unix = "-"
	}
	if o.unix != "" && o.port != "" {
		return nil, errors.New("got both --unix and --port: need one of them; leave the other out")
	}
	return o, nil
}

// usageError puts what pflag says of an argument into our words.
func usageError(err error) error {
	var unknown *pflag.NotExistError
	var noArg *pflag.ValueRequiredError
	var invalid *pflag.InvalidValueError
	switch {
	case errors.As(err, &unknown) && unknown.GetSpecifiedShortnames() != "":
		return fmt.Errorf("unknown option -%s; see --help", unknown.GetSpecifiedName())
	case errors.As(err, &unknown):
		name := unknown.GetSpecifiedName()
		if matches := startingWith(name); len(matches) > 1 {
			return fmt.Errorf("option --%s is ambiguous: need one of --%s", name, strings.Join(matches, ", --"))
		}
		if near := nearestOption(name); near != "" {
			return fmt.Errorf("unknown option --%s: did you mean --%s? see --help", name, near)
		}
		return fmt.Errorf("unknown option --%s; see --help", name)
	case errors.As(err, &noArg):
		f := noArg.GetFlag()
		return fmt.Errorf("option --%s needs a value: %s", f.Name, f.Value.Type())
	case errors.As(err, &invalid):
		return fmt.Errorf("option --%s: %w", invalid.GetFlag().Name, errors.Unwrap(err))
	}
	return err
}

// noValue stands for the value of an option that has none; nobody can type it.
const noValue = "\x00"

// optionValue is a pflag.Value that sets a field of options.
type optionValue struct {
	*option
	o *options
}

func (v *optionValue) String() string { return "" }
func (v *optionValue) Type() string   { return v.arg }
func (v *optionValue) Set(s string) error {
	if v.arg == "" && s != noValue {
		return fmt.Errorf("got the value %q: need none", s)
	}
	return v.set(v.o, s)
}

// fullName returns the first name of the option that name is another name of, or
// the beginning of; else name itself.
func fullName(name string) string {
	for _, opt := range optionTable {
		if slices.Contains(opt.names, name) {
			return opt.names[0]
		}
	}
	if matches := startingWith(name); len(matches) == 1 {
		return matches[0]
	}
	return name
}

// startingWith returns the first names of the options that have a name which
// begins with prefix.
func startingWith(prefix string) (matches []string) {
	for _, opt := range optionTable {
		if slices.ContainsFunc(opt.names, func(n string) bool { return strings.HasPrefix(n, prefix) }) {
			matches = append(matches, opt.names[0])
		}
	}
	return matches
}

// nearestOption returns the name that a slip of the keyboard may have meant, or "".
func nearestOption(name string) (nearest string) {
	best := max(1, len(name)/3) + 1
	for _, opt := range optionTable {
		if opt.group == "" {
			continue
		}
		for _, n := range opt.names {
			if d := editDistance(name, n); d < best {
				nearest, best = n, d
			}
		}
	}
	return nearest
}

// editDistance counts the letters to insert, delete or replace to make b of a.
func editDistance(a, b string) int {
	prev := make([]int, len(b)+1)
	for j := range prev {
		prev[j] = j
	}
	for i := range len(a) {
		row := append(make([]int, 0, len(b)+1), i+1)
		for j := range len(b) {
			replace := prev[j]
			if a[i] != b[j] {
				replace++
			}
			row = append(row, min(replace, prev[j+1]+1, row[j]+1))
		}
		prev = row
	}
	return prev[len(b)]
}
