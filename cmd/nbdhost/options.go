package main

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/pflag"

	"nbdhost/loader"
	"nbdhost/monitor"
	"nbdhost/server"
)

// Limits of options.
const (
	maxCalls  = 8192 // in progress on a connection (--threads)
	maxSocket = 107  // bytes of a path in struct sockaddr_un, without the NUL
)

// options is what the command line asks for.
type options struct {
	args []string // the plugin's name, then its parameters

	// Where to listen: on TCP unless something else is asked for.
	unix        string // an absolute path; "-" for a private socket
	port        string // a number or a service; "" for the default
	address     string // a name or an address; "" for all
	family      string // "tcp", "tcp4" or "tcp6"
	vsock       bool
	stdio       bool          // one connection, on standard input and output
	inherited   int           // sockets that are handed over (see inheritSockets)
	keepalive   bool          // of TCP
	sendTimeout time.Duration // of TCP; 0: the kernel's
	label       string        // SELinux's, of sockets; "" for none

	// What is served, and how.
	readonly      bool
	export        string // only shown in URIs
	threads       int    // 0: the server's default
	handshakeMask uint16
	oldstyle      bool
	noSR, noMC    bool
	noEH          bool
	sparseReads   server.SparseReads
	// strictBlockSize refuses requests that break the block sizes.
	strictBlockSize bool
	timeout         time.Duration // of the handshake; 0: none
	drainTimeout    time.Duration

	limits server.Limits

	// What is shown of the server.
	metrics    *monitor.Address // nil: nothing
	healthRead time.Duration    // how long a read may take; 0: there is none

	// The module.
	pluginPath []string
	filterPath []string
	filters    []string // outermost first
	// filterAnyRelease accepts filters of later releases than any known.
	filterAnyRelease bool
	debug            []loader.DebugFlag

	// The process.
	foreground     bool
	exitWithParent bool
	user, group    string // names or numbers to change to; "" for none
	swap           bool   // lock all memory
	pidfile        string // an absolute path
	captive        bool   // there is a command to run:
	command        string

	supervise bool
	superior  *superior // nil: nobody supervises this process
	notify    *notifier // nil: nobody wants to know

	tls tlsOptions

	// What is written.
	name    string
	verbose bool
	log     string
	// logFormat is one of the values of --log-format.
	logFormat string
	slow      time.Duration // 0: no warning
	secrets   *secrets      // what no message may show
	printURI  bool

	// What to do instead of serving.
	help, version, dumpPlugin, dumpConfig bool
	check                                 string   // the format of the report; "" for none
	checkOnly                             []string // names of checks; none for all
	checkWrites                           bool
	longOptions, shortOptions             bool
	list, describe, complete, manual      bool
	completion                            string // a shell; "" for none
	healthcheck                           *monitor.Address
}

// tlsOptions are those of TLS (nbdkit-tls(1)).
type tlsOptions struct {
	mode              string // one of those below
	certificates, psk string // absolute paths; "" for none
	priority          string
	verifyPeer        bool
}

// Values of --tls. Without the option TLS is on where there are keys for it.
const (
	tlsUnset   = ""
	tlsOff     = "off"
	tlsOn      = "on"
	tlsRequire = "require"
)

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
	groupLimits  = "Limits"
	groupTLS     = "TLS"
	groupProcess = "Process"
	groupOutput  = "Messages"
	groupMonitor = "Monitoring"
	groupInfo    = "Information"
)

// sparseReads are the values of --sparse-reads.
var sparseReads = map[string]server.SparseReads{"auto": server.SparseAuto, "always": server.SparseAlways, "never": server.SparseNever}

var groups = []string{groupListen, groupServe, groupLimits, groupTLS, groupProcess, groupOutput, groupMonitor, groupInfo}

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
			if v == "" {
				return errors.New("got an empty text: need a number or the name of a service")
			}
			o.port = v // which of them may be depends on --vsock
			return nil
		}},
	{groupListen, []string{"ipaddr", "ip-addr"}, "i", "ADDRESS", "listen on this address or host name only (default: all)",
		func(o *options, v string) error {
			if v == "" {
				return errors.New("got an empty text: need an address or a host name")
			}
			if host, port, err := net.SplitHostPort(v); err == nil && port != "" {
				return fmt.Errorf("got %q: need an address without a port (--ipaddr=%s --port=%s)", v, host, port)
			}
			if strings.Contains(v, "=") { // what follows -fi, as in -filter=xz
				return fmt.Errorf("got %q: need an address or a host name; long options begin with two dashes", v)
			}
			o.address = v
			return nil
		}},
	{groupListen, []string{"ipv4-only"}, "4", "", "use IPv4 only",
		func(o *options, _ string) error { o.family = "tcp4"; return nil }},
	{groupListen, []string{"ipv6-only"}, "6", "", "use IPv6 only",
		func(o *options, _ string) error { o.family = "tcp6"; return nil }},
	{groupListen, []string{"keepalive", "keep-alive"}, "", "", "find TCP clients that are gone (SO_KEEPALIVE)", flag(func(o *options) *bool { return &o.keepalive })},
	{groupListen, []string{"vsock"}, "", "", "listen for virtual machines (AF_VSOCK), on the port of -p", flag(func(o *options) *bool { return &o.vsock })},
	{groupListen, []string{"single", "stdin"}, "s", "", "serve one client on standard input and output; implies -f",
		func(o *options, _ string) error { o.stdio, o.foreground = true, true; return nil }},
	{groupListen, []string{"selinux-label"}, "", "LABEL", "give sockets this SELinux label", some(func(o *options) *string { return &o.label }, "a label")},

	{groupServe, []string{"readonly", "read-only"}, "r", "", "refuse writes", flag(func(o *options) *bool { return &o.readonly })},
	{groupServe, []string{"exportname", "export-name", "export"}, "e", "NAME", "the export that URIs name, for --run and --print-uri", text(func(o *options) *string { return &o.export })},
	{groupServe, []string{"threads"}, "t", "N", "requests in progress on each connection (default 16)",
		func(o *options, v string) error {
			n, err := strconv.ParseUint(v, 0, 32)
			if err != nil || n > maxCalls {
				return fmt.Errorf("got %q: need a number from 1 to %d, or 0 for the default", v, maxCalls)
			}
			o.threads = int(n)
			return nil
		}},
	{groupServe, []string{"filter"}, "", "FILTER", "put a filter before the plugin; of several, the last is next to it",
		func(o *options, v string) error { o.filters = append(o.filters, v); return nil }},
	{groupServe, []string{"filter-path"}, "", "DIR[:DIR...]", "look for filters here first",
		func(o *options, v string) error { o.filterPath = append(o.filterPath, v); return nil }},
	{groupServe, []string{"filter-any-release"}, "", "", "try filters of nbdkit releases later than any known, at your own risk: they may crash the server or damage data", flag(func(o *options) *bool { return &o.filterAnyRelease })},
	{groupServe, []string{"plugin-path"}, "", "DIR[:DIR...]", "look for plugins here first",
		func(o *options, v string) error { o.pluginPath = append(o.pluginPath, v); return nil }},
	{groupServe, []string{"no-sr", "no-structured-replies"}, "", "", "do not offer structured replies", flag(func(o *options) *bool { return &o.noSR })},
	{groupServe, []string{"no-eh", "no-extended-headers"}, "", "", "do not offer extended headers", flag(func(o *options) *bool { return &o.noEH })},
	{groupServe, []string{"no-mc", "no-meta-contexts"}, "", "", "do not offer meta contexts (block status)", flag(func(o *options) *bool { return &o.noMC })},
	{groupServe, []string{"sparse-reads"}, "", "WHEN", "answer reads with holes: auto (default; where zeroes were read), always (by the extents) or never",
		func(o *options, v string) error {
			when, ok := sparseReads[v]
			if !ok {
				return fmt.Errorf("got %q: need auto, always or never", v)
			}
			o.sparseReads = when
			return nil
		}},
	{groupServe, []string{"strict-block-size"}, "", "", "refuse requests that break the block sizes that a client was told; without it they go to the plugin", flag(func(o *options) *bool { return &o.strictBlockSize })},
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
	{groupServe, []string{"newstyle", "new-style"}, "n", "", "use the newstyle protocol, which is the default",
		func(o *options, _ string) error { o.oldstyle = false; return nil }},
	{groupServe, []string{"oldstyle", "old-style"}, "o", "", "use the oldstyle protocol, for clients of before 2013", flag(func(o *options) *bool { return &o.oldstyle })},

	{groupLimits, []string{"max-connections"}, "", "N", "connections that may be open at a time",
		count(func(o *options) *int { return &o.limits.Connections })},
	{groupLimits, []string{"max-connections-per-address"}, "", "N", "of these, from one address",
		count(func(o *options) *int { return &o.limits.ConnectionsPerAddress })},
	{groupLimits, []string{"max-requests"}, "", "N", "requests in progress on all connections together",
		count(func(o *options) *int { return &o.limits.Requests })},
	{groupLimits, []string{"max-bytes"}, "", "SIZE", "data of requests in progress on all connections together",
		size(func(o *options) *int64 { return &o.limits.Bytes })},
	{groupLimits, []string{"max-bytes-per-connection"}, "", "SIZE", "of these, on each connection (default 256M)",
		func(o *options, v string) error {
			err := size(func(o *options) *int64 { return &o.limits.BytesPerConnection })(o, v)
			if o.limits.BytesPerConnection == 0 {
				o.limits.BytesPerConnection = -1 // to the server, 0 is the default
			}
			return err
		}},
	{groupLimits, []string{"bandwidth"}, "", "RATE", "bits a second, such as 100M, for reads of an export, and as many for writes",
		size(func(o *options) *int64 { return &o.limits.Bandwidth })},
	{groupLimits, []string{"send-timeout"}, "", "TIME", "longest time for which a TCP client may take nothing of what it is sent (default: no limit)", delay(func(o *options) *time.Duration { return &o.sendTimeout })},

	{groupTLS, []string{"tls"}, "", "MODE", "whether clients may use TLS: off, on, or require (they must)",
		func(o *options, v string) (err error) { o.tls.mode, err = parseTLSMode(v); return err }},
	{groupTLS, []string{"tls-certificates"}, "", "DIR", "take certificates and keys from this directory",
		func(o *options, v string) (err error) { o.tls.certificates, err = absolute(v); return err }},
	{groupTLS, []string{"tls-psk"}, "", "FILE", "take the clients' names and keys from FILE (psktool(1))",
		func(o *options, v string) (err error) { o.tls.psk, err = absolute(v); return err }},
	{groupTLS, []string{"tls-priority"}, "", "PRIORITY", "which ciphers may be used (GnuTLS's priority string)", text(func(o *options) *string { return &o.tls.priority })},
	{groupTLS, []string{"tls-verify-peer"}, "", "", "want a certificate of the client", flag(func(o *options) *bool { return &o.tls.verifyPeer })},

	{groupProcess, []string{"foreground", "no-fork"}, "f", "", "stay in the foreground", flag(func(o *options) *bool { return &o.foreground })},
	{groupProcess, []string{"pidfile", "pid-file"}, "P", "FILE", "write the process ID to FILE once clients can connect",
		func(o *options, v string) (err error) { o.pidfile, err = absolute(v); return err }},
	{groupProcess, []string{"exit-with-parent"}, "", "", "stop when the parent process ends; implies -f",
		func(o *options, _ string) error { o.exitWithParent, o.foreground = true, true; return nil }},
	{groupProcess, []string{"run"}, "", "COMMAND", "serve while COMMAND runs in a shell, with $uri $unixsocket $port $exportname set; implies -f, and -U - unless -p or --vsock is given",
		func(o *options, v string) error { o.captive, o.command, o.foreground = true, v, true; return nil }},
	{groupProcess, []string{"user"}, "u", "USER", "go on as USER once the sockets are bound", some(func(o *options) *string { return &o.user }, "the name or number of a user")},
	{groupProcess, []string{"group"}, "g", "GROUP", "go on in GROUP only once the sockets are bound", some(func(o *options) *string { return &o.group }, "the name or number of a group")},
	{groupProcess, []string{"swap"}, "", "", "lock all memory: the export is swap space of this machine", flag(func(o *options) *bool { return &o.swap })},

	{groupProcess, []string{"supervise"}, "", "", "run the server as a child and start it again when a plugin crashes; clients that connect meanwhile wait", flag(func(o *options) *bool { return &o.supervise })},

	{groupOutput, []string{"verbose"}, "v", "", "write debug messages to standard error", flag(func(o *options) *bool { return &o.verbose })},
	{groupOutput, []string{"debug"}, "D", "NAME.FLAG=N", "set a debug flag of the plugin, or of the server (NAME nbdkit)",
		func(o *options, v string) error {
			// Programs pass "-D NAME.FLAG=N" as one argument.
			f, err := loader.ParseDebugFlag(strings.TrimSpace(v))
			o.debug = append(o.debug, f)
			return err
		}},
	{groupOutput, []string{"log"}, "", "WHERE", "where errors and warnings go: stderr, syslog, null, /path, or default (stderr in the foreground, else syslog)",
		func(o *options, v string) error {
			if v != logDefault && v != logStderr && v != logSyslog && v != logNull && !filepath.IsAbs(v) {
				return fmt.Errorf("got %q: need stderr, syslog, null, default or an absolute path", v)
			}
			o.log = v
			return nil
		}},
	{groupOutput, []string{"log-format"}, "", "FORMAT", "how messages look: text (nbdkit's, the default) or json: an object on each line",
		func(o *options, v string) error {
			if v != logText && v != logJSON {
				return fmt.Errorf("got %q: need text or json", v)
			}
			o.logFormat = v
			return nil
		}},
	{groupOutput, []string{"slow-ms"}, "", "N", "warn of each call into the plugin that takes more than N milliseconds, at most ten times a second",
		func(o *options, v string) error {
			n, err := strconv.ParseUint(v, 0, 31)
			if err != nil || n == 0 {
				return fmt.Errorf("got %q: need a number of milliseconds, at least 1", v)
			}
			o.slow = time.Duration(n) * time.Millisecond
			return nil
		}},
	{groupOutput, []string{"name"}, "", "NAME", "start messages with nbdkit[NAME]", text(func(o *options) *string { return &o.name })},
	{groupOutput, []string{"print-uri", "print-url", "show-uri", "show-url"}, "", "", "write the URI to standard output", flag(func(o *options) *bool { return &o.printURI })},

	{groupMonitor, []string{"metrics"}, "", "ADDRESS", "show metrics and health over HTTP at [HOST]:PORT (on this machine only without HOST) or unix:PATH",
		address(func(o *options) **monitor.Address { return &o.metrics })},
	{groupMonitor, []string{"health-read"}, "", "[TIME]", "let /readyz read through the plugin, which may take TIME (5s)", healthRead},
	{groupMonitor, []string{"healthcheck"}, "", "ADDRESS", "ask the server with --metrics=ADDRESS if it is ready; exit with 0 or 1",
		address(func(o *options) **monitor.Address { return &o.healthcheck })},

	{groupInfo, []string{"check"}, "", "[FORMAT]", "check that the plugin keeps its promises, and report as text, tap or json", checkFormat},
	{groupInfo, []string{"check-only"}, "", "NAME,...", "run only these checks, or groups of them",
		func(o *options, v string) error {
			o.checkOnly = append(o.checkOnly, strings.Split(v, ",")...)
			return nil
		}},
	{groupInfo, []string{"check-writes"}, "", "", "let checks write to the export", flag(func(o *options) *bool { return &o.checkWrites })},
	{groupInfo, []string{"dump-plugin"}, "", "", "describe the plugin as KEY=VALUE lines and exit", flag(func(o *options) *bool { return &o.dumpPlugin })},
	{groupInfo, []string{"help"}, "", "", "show this text, and the plugin's if one is given, and exit", flag(func(o *options) *bool { return &o.help })},
	{groupInfo, []string{"version"}, "V", "", "show the version, and the plugin's if one is given, and exit", flag(func(o *options) *bool { return &o.version })},
	{groupInfo, []string{"dump-config"}, "", "", "describe the program as KEY=VALUE lines and exit", atOnce(func(o *options) *bool { return &o.dumpConfig })},
	{groupInfo, []string{"list"}, "", "", "show the plugins and filters that are installed and exit", flag(func(o *options) *bool { return &o.list })},
	{groupInfo, []string{"completion"}, "", "SHELL", "write a script that completes command lines in bash, zsh or fish, and exit",
		func(o *options, v string) error {
			if _, ok := completionScripts[v]; !ok {
				return fmt.Errorf("got %q: need bash, zsh or fish", v)
			}
			o.completion = v
			return errAtOnce
		}},
	{groupInfo, []string{"man"}, "", "", "write the manual page (nbdhost --man | man -l -) and exit", atOnce(func(o *options) *bool { return &o.manual })},
	{groupInfo, []string{"long-options"}, "", "", "list the long options and exit", atOnce(func(o *options) *bool { return &o.longOptions })},
	{groupInfo, []string{"short-options"}, "", "", "list the short options and exit", atOnce(func(o *options) *bool { return &o.shortOptions })},

	// For the program itself, and for what --completion writes.
	{"", []string{"describe"}, "", "", "", flag(func(o *options) *bool { return &o.describe })},
	{"", []string{"complete"}, "", "", "", flag(func(o *options) *bool { return &o.complete })},
}

func flag(field func(*options) *bool) func(*options, string) error {
	return func(o *options, _ string) error { *field(o) = true; return nil }
}

// errAtOnce ends the parsing: what follows on the command line does not matter,
// not even where it is wrong.
var errAtOnce = errors.New("act at once")

func atOnce(field func(*options) *bool) func(*options, string) error {
	return func(o *options, _ string) error { *field(o) = true; return errAtOnce }
}

func text(field func(*options) *string) func(*options, string) error {
	return func(o *options, v string) error { *field(o) = v; return nil }
}

// some is text that is not empty, as that of a variable that is not set: without this option the
// server would have more rights than is meant.
func some(field func(*options) *string, need string) func(*options, string) error {
	return func(o *options, v string) error {
		if *field(o) = v; v == "" {
			return errors.New("got an empty text: need " + need)
		}
		return nil
	}
}

func delay(field func(*options) *time.Duration) func(*options, string) error {
	return func(o *options, v string) (err error) { *field(o), err = parseDelay(v); return err }
}

// parseTLSMode reads a value of --tls, a boolean or a word for require.
func parseTLSMode(s string) (string, error) {
	switch strings.ToLower(s) {
	case "require", "required", "force":
		return tlsRequire, nil
	case "on", "1", "true", "t", "yes", "y":
		return tlsOn, nil
	case "off", "0", "false", "f", "no", "n":
		return tlsOff, nil
	}
	return "", fmt.Errorf("got %q: need off, on or require", s)
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
	if filepath.IsAbs(path) {
		return path, nil
	}
	dir, err := os.Getwd()
	return dir + "/" + path, err // not cleaned: what .. leaves may be a symbolic link
}

// parse reads a command line as getopt_long does: options and other arguments
// in any order, letters bundled, long names shortened as far as they are unique.
// An @FILE before the plugin is replaced by the arguments in that file.
func parse(args []string) (*options, error) {
	o := &options{family: "tcp", handshakeMask: 0xffff, drainTimeout: 10 * time.Second, log: logDefault, logFormat: logText, secrets: &secrets{}}
	flags := pflag.NewFlagSet("", pflag.ContinueOnError)
	flags.SetOutput(io.Discard)
	flags.Usage = func() {}
	for i := range optionTable {
		opt := &optionTable[i]
		f := flags.VarPF(&optionValue{opt, o}, opt.names[0], opt.short, "")
		if opt.arg == "" || strings.HasPrefix(opt.arg, "[") {
			f.NoOptDefVal = noValue
		}
	}
	// After the flags are there: their own names must not be taken for shortened ones.
	flags.SetNormalizeFunc(func(_ *pflag.FlagSet, name string) pflag.NormalizedName {
		return pflag.NormalizedName(fullName(name))
	})
	flags.SetInterspersed(false) // stops at what is no option
	for len(args) > 0 {
		switch err := flags.Parse(args); {
		case errors.Is(err, errAtOnce):
			return o, nil
		case errors.Is(err, pflag.ErrHelp):
			o.help = true
			return o, nil
		case err != nil:
			return nil, usageError(err)
		}
		args = flags.Args()
		switch {
		case flags.ArgsLenAtDash() >= 0: // behind -- there are no options
			o.args, args = append(o.args, args...), nil
		case len(args) > 0 && len(o.args) == 0 && isFile(args[0]):
			lines, err := expandParameters(args[:1])
			if err != nil {
				return nil, err
			}
			if i := slices.IndexFunc(lines, severalWords.MatchString); i >= 0 {
				return nil, fmt.Errorf("%s: got the line %q: need one argument on each line, and = between a long option and its value", args[0][1:], lines[i])
			}
			args = append(lines, args[1:]...)
		case len(args) > 0:
			o.args, args = append(o.args, args[0]), args[1:]
		}
	}
	return o, nil
}

// severalWords matches a line with an option and more that a shell would take for another word.
var severalWords = regexp.MustCompile(`^--?[a-zA-Z0-9-]+[ \t]`)

// searchPath returns where to look for modules first.
func (o *options) searchPath(kind loader.Kind) []string {
	if kind == loader.FilterKind {
		return o.filterPath
	}
	return o.pluginPath
}

// serviceMode says in nbdkit's words how clients reach the server.
func (o *options) serviceMode() string {
	switch {
	case o.inherited > 0:
		return "socket activation"
	case o.stdio:
		return "listen stdin"
	case o.vsock:
		return "vsock"
	case o.unix != "":
		return "unix socket"
	}
	return "TCP/IP"
}

// settle completes the options of a server, and refuses those that contradict
// each other.
func (o *options) settle() error {
	type option struct {
		given bool
		name  string
	}
	unix, port, vsock := option{o.unix != "", "--unix"}, option{o.port != "", "--port"}, option{o.vsock, "--vsock"}
	stdio, run := option{o.stdio, "--single"}, option{o.captive, "--run"}
	inherited := option{o.inherited > 0, "LISTEN_FDS in the environment"}
	for _, pair := range [][2]option{
		{unix, port}, {unix, vsock},
		{stdio, unix}, {stdio, port}, {stdio, vsock}, {stdio, run}, {stdio, {o.dumpPlugin, "--dump-plugin"}},
		{inherited, unix}, {inherited, port}, {inherited, vsock}, {inherited, stdio}, {inherited, run},
		{inherited, {o.address != "", "--ipaddr"}},
		{stdio, {o.supervise, "--supervise"}},
		{{o.oldstyle, "--oldstyle"}, {o.tls.mode == tlsRequire, "--tls=require"}},
	} {
		if pair[0].given && pair[1].given {
			return fmt.Errorf("got both %s and %s: need one of them; leave the other out", pair[0].name, pair[1].name)
		}
	}
	if o.port != "" {
		if _, err := strconv.ParseUint(o.port, 10, 32); o.vsock && err != nil {
			return fmt.Errorf("option --port: got %q: need a number of 32 bits with --vsock", o.port)
		}
		if _, err := net.LookupPort("tcp", o.port); !o.vsock && err != nil {
			return fmt.Errorf("option --port: got %q: need a number from 0 to 65535 or the name of a service", o.port)
		}
	}
	if len(o.checkOnly) > 0 || o.checkWrites {
		return errors.New("got --check-only or --check-writes without --check: these are about checks; add --check, or leave them out")
	}
	if o.healthRead > 0 && o.metrics == nil {
		return errors.New("got --health-read without --metrics: need the address at which /readyz is asked for")
	}
	o.foreground = o.foreground || o.inherited > 0
	if o.captive && o.unix == "" && o.port == "" && !o.vsock {
		o.unix = "-"
	}
	return nil
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
		var all []string
		for _, opt := range optionTable {
			if opt.group != "" {
				all = append(all, opt.names...)
			}
		}
		if near := loader.Nearest(name, all); len(near) > 0 {
			return fmt.Errorf("unknown option --%s: did you mean --%s? see --help", name, near[0])
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

// noValue stands for the value of an option that has none, or whose value was left out;
// nobody can type it.
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
		return fullName(matches[0])
	}
	return name
}

// ownOptions are those that nbdkit does not have. They do not make a beginning
// ambiguous that nbdkit understands.
var ownOptions = []string{
	"bandwidth", "health-read", "healthcheck", "max-bytes", "max-bytes-per-connection", "max-connections",
	"max-connections-per-address", "max-requests", "metrics",
	"check", "check-only", "check-writes", "complete", "completion", "describe", "drain-timeout", "filter-any-release",
	"filter-path", "list", "man", "no-eh", "plugin-path", "log-format", "send-timeout", "slow-ms", "sparse-reads", "strict-block-size",
	"supervise",
}

// startingWith returns the names of options that begin with prefix, one of each: nbdkit's,
// if there are any.
func startingWith(prefix string) []string {
	var theirs, own []string
	for _, opt := range optionTable {
		i := slices.IndexFunc(opt.names, func(n string) bool { return strings.HasPrefix(n, prefix) })
		switch {
		case i < 0:
		case slices.Contains(ownOptions, opt.names[0]):
			own = append(own, opt.names[i])
		default:
			theirs = append(theirs, opt.names[i])
		}
	}
	if len(theirs) > 0 {
		return theirs
	}
	return own
}
