package tests

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// A commandLine is run by nbdkit and by the program under test under the name
// nbdkit. They have to end with the same status, print the same, and both or
// neither have something to say on standard error.
type commandLine struct {
	args  string // words; 'quoted ones' may have spaces
	stdin string
	// differs says why they do not: the reason, by what differs ("status",
	// "stdout" or "stderr"), in one release of nbdkit at least.
	differs map[string]string
}

// Reasons that several lines have.
const (
	ownHelp       = "the help has a text of its own"
	noSuchRelease = "it is newer than one of the releases"
	portInURI     = "the URI has the port that was taken"
	extended      = "extended headers are offered, too"
)

var commandLines = []commandLine{
	// What there is to know.
	{args: "--version"}, {args: "-V"}, {args: "--exit-with-parent --version"}, {args: "--version -s -U x"},
	{args: "--version -p 1 -U x"}, {args: "null --version"}, {args: "--version null"}, {args: "-V file"},
	{args: "--filter=cow null --version"}, {args: "null --filter cow --filter=cache --version"}, {args: "cow --version"},
	{args: "nosuch --version"}, {args: "--filter=nosuch null --version"}, {args: "--filter=null null --version"},
	{args: "--help", differs: map[string]string{"stdout": ownHelp}},
	{args: "null --help", differs: map[string]string{"stdout": ownHelp}},
	{args: "--filter=cow --help null", differs: map[string]string{"stdout": ownHelp}},
	{args: "nosuch --help"},
	{args: "--help --version", differs: map[string]string{"stdout": ownHelp}},
	{args: "-h", differs: map[string]string{
		"status": "it is taken for --help", "stdout": "it is taken for --help", "stderr": "it is taken for --help"}},
	{args: "--short-options", differs: map[string]string{"stdout": noSuchRelease}},
	{args: "null --dump-plugin"}, {args: "--dump-plugin null"}, {args: "file --dump-plugin"}, {args: "sh --dump-plugin"},
	{args: "memory --dump-plugin size=1M"}, {args: "memory --dump-plugin nosuch=1"}, {args: "--filter=cow null --dump-plugin", differs: map[string]string{"stdout": noSuchRelease}},
	{args: "null --dump-plugin -U -"}, {args: "null --dump-plugin --run true"}, {args: "null --dump-plugin -s"},
	{args: "-v null --dump-plugin"}, {args: "nosuch --dump-plugin"}, {args: "--dump-plugin"},
	{args: "S3 --dump-plugin"}, {args: "/etc/passwd --dump-plugin"}, {args: "./nosuch.so --dump-plugin"},

	// Some act at once: what follows is not looked at.
	{args: "--long-options --nosuch", differs: map[string]string{"stdout": noSuchRelease}},
	{args: "--short-options -Z", differs: map[string]string{"stdout": noSuchRelease}},
	{args: "--short-options --long-options", differs: map[string]string{"stdout": noSuchRelease}},
	{args: "--help --nosuch"}, {args: "--version -t x"}, {args: "-t x --long-options"}, {args: "--nosuch --short-options"},
	{args: "-s -p 1 --short-options", differs: map[string]string{"stdout": noSuchRelease}},

	// What a plugin is.
	{args: ""}, {args: "''"}, {args: "nosuch"}, {args: "./nosuch"}, {args: "/nosuch"}, {args: "null=1"}, {args: "--"}, {args: "-f"},
	{args: "/usr/lib/x86_64-linux-gnu/nbdkit/plugins/nbdkit-null-plugin.so --version"},
	{args: "/usr/lib/x86_64-linux-gnu/nbdkit/filters/nbdkit-cow-filter.so"},

	// Words that are no options.
	{args: "--nosuch"}, {args: "--nosuch null"}, {args: "-Z null"}, {args: "-fZ null"}, {args: "--readonly=1 null"},
	{args: "--port"}, {args: "-p"}, {args: "null -p"}, {args: "--p=0 null"}, {args: "--no null"},
	{args: "--fil=cow null --vers"}, {args: "--fi cow null --version"}, {args: "-U - --ma=0 memory 1M --run 'nbdinfo $uri | head -n 1'"},
	{args: "-U - --th 1 --reado memory 1M --run 'nbdinfo --is readonly $uri'"}, {args: "--deb x null"}, {args: "--dump null"},

	// Values that are none.
	{args: "-p foo null"}, {args: "-p 0x10 -f null"}, {args: "-p -1 null"},
	{args: "-t -1 null"}, {args: "-t x null"}, {args: "-t 100000000000 null"}, {args: "--threads= null"},
	{args: "--mask-handshake=z null"}, {args: "--mask-handshake= null"},
	{args: "--timeout=x null"}, {args: "--timeout=-1 null"},
	{args: "--log=x null"}, {args: "--log= null"}, {args: "--log=/nosuch/x null"},
	{args: "--tls=x null"}, {args: "--tls=2 null"},
	{args: "-D x null"}, {args: "-D x.y null"}, {args: "-D null.x=z null"}, {args: "-D .=1 null"},
	{args: "-U '' null"}, {args: "-P '' null"}, {args: "-i nosuch.invalid -p 0 null"}, {args: "-i 192.0.2.1 -p 0 -f null"},
	{args: "-U nosuch/sock null"},
	{args: "-u nosuchuser -f -U sock null"}, {args: "-g nosuchgroup -f -U sock null"},
	{args: "-U - --selinux-label=x null --run true"},

	// Options that contradict each other.
	{args: "-s -U x null"}, {args: "-s -p 0 null"}, {args: "-s --run true null"}, {args: "-U x -p 0 null"},
	{args: "--vsock -U x null"}, {args: "--vsock -s null"},

	// Parameters.
	{args: "null foo"}, {args: "null size=foo"}, {args: "memory"}, {args: "memory nosuch=1"}, {args: "memory size="},
	{args: "example3 foo bar"}, {args: "example3 size=1M 2M"}, {args: "zero 1M"}, {args: "zero x=1"},
	{args: "null -- --help"}, {args: "-- null --help"}, {args: "null @/nosuch/x"}, {args: "null @./loop"}, {args: "file"},
	{args: "file nosuch.img"}, {args: "file file=nosuch.img"}, {args: "file ''"},
	{args: "null @./params -U - --run 'nbdinfo --size $uri'", differs: map[string]string{"status": noSuchRelease, "stdout": noSuchRelease, "stderr": noSuchRelease}},
	{args: "memory @./params size=1M -U - --run 'nbdinfo --size $uri'", differs: map[string]string{"status": noSuchRelease, "stdout": noSuchRelease, "stderr": noSuchRelease}},
	{args: "memory @params"}, {args: "memory 1M 2M -U - --run 'nbdinfo --size $uri'"},
	{args: "-U - null size=1 --run 'nbdinfo --size $uri'"}, {args: "-U - null 1K --run 'nbdinfo --size $uri'"},
	{args: "-U - sh - --run 'nbdinfo --size $uri'", stdin: "case $1 in get_size) echo 2M;; pread) head -c $3 /dev/zero;; *) exit 2;; esac"},
	{args: "-U - eval get_size='echo 512' pread='exit 1' --run 'nbdinfo --size $uri'"},
	{args: "-U - eval get_size='echo 512' pread='exit 1' get_ready='exit 1' --run 'echo run'"},
	{args: "-f -U sock eval get_size='echo 512' pread='exit 1' after_fork='exit 1'"},

	// The command of --run.
	{args: "-U - null --run 'exit 3'"}, {args: "-U - null --run 'kill -9 $$'"}, {args: "-U - null --run 'kill -TERM $$'"},
	{args: "-U - null --run nosuchcommand"}, {args: "-U - null --run ''"}, {args: "--run true -U - null --run 'echo last'"},
	{args: "-U - null --run 'echo $port,$exportname,$tls,$tls_psk,$tls_certificates'"},
	{args: "-U - -e 'a b' null --run 'echo $exportname; test -S $unixsocket'"},
	{args: "-U sock null --run 'echo $uri $unixsocket'"},
	{args: "-U ./sock null --run 'echo $unixsocket'"},
	{args: "-U - --export=x null --run 'echo $uri'"},
	{args: "-U - null -fv --run true"},
	{args: "-i 127.0.0.1 -p 0 null --run 'test -n $port; echo $?'"}, {args: "-i localhost -4 -p 0 null --run 'test -n $port; echo $?'"},
	{args: "-4 -6 -i ::1 -p 0 null --run 'test -n $port; echo $?'"}, {args: "-i ::1 -p 0 null --run 'test -z $unixsocket; echo $?'"},
	{args: "-p 0 null --run 'echo $uri'", differs: map[string]string{"stdout": portInURI}},
	{args: "-U - null --run 'test -t 0 || cat'", stdin: "standard input"},
	{args: "-U - -P pid null --run 'while ! test -s pid; do :; done; head -c 1 pid >/dev/null; echo ready'"},
	{args: "--exit-with-parent -U - null --run 'echo $uri'"},

	// What clients get.
	{args: "-U - memory 1M --run 'nbdinfo $uri | grep -v export-size'", differs: map[string]string{"stdout": extended}}, {args: "-U - -r memory 1M --run 'nbdinfo --is readonly $uri'"},
	{args: "-U - -o memory 1M --run 'nbdinfo --size $uri; nbdinfo $uri | head -n 1'"}, {args: "-U - -o -n memory 1M --run 'nbdinfo $uri | head -n 1'", differs: map[string]string{"stdout": extended}},
	{args: "-U - --no-sr memory 1M --run 'nbdinfo $uri | head -n 1'"}, {args: "-U - --mask-handshake=0 memory 1M --run 'nbdinfo $uri | head -n 1'"},
	{args: "-U - --mask-handshake 0x1ffff memory 1M --run 'nbdinfo --size $uri'"},
	{args: "-U - -t 1 memory 1M --run 'nbdinfo --size $uri'"}, {args: "-U - -t 0 memory 1M --run 'nbdinfo --size $uri'"},
	{args: "-U - --filter=exitlast memory 1M --run 'nbdinfo $uri >/dev/null'"}, // asks before it opens the export
	{args: "-U - --filter=offset memory 1M offset=512K --run 'nbdinfo --size $uri'"},
	{args: "-U - --filter=offset memory 1M offset=x --run true"},
	{args: "-U - --swap memory 1M --run 'nbdinfo --size $uri'"},
	{args: "-U - -u nobody -g nogroup memory 1M --run 'id -un'"},
	{args: "-U - --no-mc memory 1M --run 'nbdinfo --size $uri'", differs: map[string]string{"status": noSuchRelease, "stdout": noSuchRelease, "stderr": noSuchRelease}},
	{args: "-U - --print-uri memory 1M --run true", differs: map[string]string{"status": noSuchRelease, "stdout": noSuchRelease, "stderr": noSuchRelease}},
	{args: "-U - --keepalive --timeout=10 --name=x memory 1M --run 'nbdinfo --size $uri'", differs: map[string]string{"status": noSuchRelease, "stdout": noSuchRelease, "stderr": noSuchRelease}},
	{args: "-s null", stdin: "\x00\x00\x00\x03"}, {args: "-s null", stdin: ""}, {args: "--stdin -o memory 1M"},
	{args: "-s nosuch"}, {args: "-s null foo"},

	// Flags that nobody takes.
	// Until the server serves, SIGPIPE ends what a plugin has started, as it ends most programs.
	{args: "-U - data ' <(yes)[:4096] ' --run 'nbdcopy $uri - | md5sum'"},
	{args: "-U - '-D vddk.datapath=0' null --run true"}, {args: "-U - -D vddk.datapath=0 null --run true"},
	{args: "-U - -D nbdkit.backend.datapath=0 null --run true"}, {args: "-U - --debug null.nosuch=1 null --run true"},

	// Errors go where they should.
	{args: "--log=null memory"}, {args: "--log=stderr memory"}, {args: "--log=null nosuch"},
}

func TestCommandLines(t *testing.T) {
	onlyNbdhost(t)
	link := asNbdkit(t)
	all := releases(t)
	oldest, latest := all[0], all[len(all)-1]
	for _, line := range commandLines {
		t.Run(strings.ReplaceAll(line.args, "/", "|"), func(t *testing.T) {
			t.Parallel()
			found := map[string]bool{}
			for _, r := range []*release{oldest, latest} {
				want := line.run(t, r, nbdkit)
				got := line.run(t, r, link)
				for what, pair := range map[string][2]string{
					"status": {fmt.Sprint(want.status), fmt.Sprint(got.status)},
					"stdout": {want.stdout, got.stdout},
					"stderr": {fmt.Sprint(want.stderr != ""), fmt.Sprint(got.stderr != "")},
				} {
					if pair[0] == pair[1] {
						continue
					}
					found[what] = true
					if line.differs[what] == "" {
						t.Errorf("%s: %s is unlike nbdkit's:\n%s\nnbdkit's stderr: %s\nours: %s", r.name, what,
							difference(pair[0], pair[1]), want.stderr, got.stderr)
					}
				}
			}
			for what, why := range line.differs {
				if !found[what] {
					t.Errorf("%s does not differ any more (%s): take that out of the table", what, why)
				}
			}
		})
	}
}

// usageOfNbdkit is what nbdkit prints on standard output where it does not know an
// option: its help. nbdhost has one line on standard error instead.
var usageOfNbdkit = regexp.MustCompile(`(?s)^nbdkit \[-4\|.*`)

// run runs the line in a directory of its own. What is different each time is
// given one name.
func (l *commandLine) run(t *testing.T, r *release, program string) outcome {
	t.Helper()
	dir := tempDir(t)
	if err := os.Chmod(dir, 0o777); err != nil {
		t.Fatal(err)
	}
	writeFile(t, filepath.Join(dir, "params"), "# a comment\n\nsize=2M\n", 0o644)
	writeFile(t, filepath.Join(dir, "loop"), "@./loop\n", 0o644)
	writeFile(t, filepath.Join(dir, "keys"), "alice:0011223344556677\n", 0o600)
	// chroot leads to the root of the tree.
	o := runCLI(t, dir, l.stdin, r.enter, slices.Concat([]string{"sh", "-c", `cd "$0" && exec "$@"`, dir, program}, words(l.args))...)
	private := regexp.MustCompile("(" + regexp.QuoteMeta(dir) + `|/tmp)/nbd[^/ "]*/socket`)
	version := regexp.MustCompile(`(?m)^(nbdkit )1\.\d+\.\d+( \(nbdhost .*\))?$`)
	for _, s := range []*string{&o.stdout, &o.stderr} {
		*s = private.ReplaceAllString(*s, "PRIVATE")
		*s = strings.ReplaceAll(*s, dir, "DIR")
		*s = version.ReplaceAllString(*s, "${1}VERSION")
	}
	if o.status == 1 {
		o.stdout = usageOfNbdkit.ReplaceAllString(o.stdout, "")
	}
	return o
}

// words splits a command line as a shell does that knows single quotes only.
func words(line string) (list []string) {
	var word strings.Builder
	in, quoted := false, false
	for _, c := range line {
		switch {
		case c == '\'':
			quoted, in = !quoted, true
		case c == ' ' && !quoted:
			if in {
				list = append(list, word.String())
				word.Reset()
			}
			in = false
		default:
			word.WriteRune(c)
			in = true
		}
	}
	if in {
		list = append(list, word.String())
	}
	return list
}

// With -v nbdkit says what it does. Callers look for such lines, so that each is there,
// perhaps with more behind it.
func TestDebugLines(t *testing.T) {
	onlyNbdhost(t)
	all := releases(t)
	latest, link := all[len(all)-1], asNbdkit(t)
	number := regexp.MustCompile(`:\d+\b|pid = \d+|nbdkit 1\.\d+\.\d+`)
	excepted := map[string]string{
		"nbdkit: debug: forked into background (new N": "only a server in the background is there",
		"nbdkit: memory: debug: ":                      "each connection has a number, also that of -s",
		"nbdkit: debug: NBD URI: nbd://localhost":      "the address and the port are those that are bound",
	}
	found := map[string]bool{}
	for _, line := range []commandLine{
		{args: "-fv -U - memory 1M --run true"},
		{args: "-fv -U - -u nobody -g nogroup --filter=cow --filter=log null logfile=/dev/null --run true"},
		{args: "-v -p 0 -i 127.0.0.1 --tls=off --name=x memory 1M --run true"},
		{args: "-v -s memory 1M"},
		{args: "-v -P pid -U - --filter=offset memory 1M offset=1K --run true"},
		{args: "-fv -U - --tls-psk=keys memory 1M --run true"},
	} {
		lines := func(program string) []string {
			o := line.run(t, latest, program)
			return strings.Split(strings.TrimSpace(number.ReplaceAllString(o.stderr, "N")), "\n")
		}
		got := lines(link)
		for _, want := range lines(nbdkit) {
			if slices.ContainsFunc(got, func(l string) bool { return strings.HasPrefix(l, want) }) {
				continue
			}
			why := ""
			for begin := range excepted {
				if strings.HasPrefix(strings.Replace(want, "nbdkit[x]", "nbdkit", 1), begin) {
					why = begin
				}
			}
			if found[why] = true; why == "" {
				t.Errorf("%s: no line %q in\n%s", line.args, want, strings.Join(got, "\n"))
			}
		}
	}
	for begin, why := range excepted {
		if !found[begin] {
			t.Errorf("%q is there (%s): take it out of the table", begin, why)
		}
	}
}

// ownOptions is the list in cmd/nbdhost/options.go: what is not nbdkit's.
var ownOptions = []string{
	"--bandwidth", "--check", "--check-only", "--check-writes", "--completion", "--drain-timeout", "--filter-any-release", "--filter-path",
	"--health-read", "--healthcheck", "--list", "--log-format", "--man", "--max-bytes", "--max-bytes-per-connection",
	"--max-connections", "--max-connections-per-address", "--max-requests", "--metrics", "--no-eh", "--no-extended-headers",
	"--plugin-path", "--send-timeout", "--slow-ms", "--sparse-reads", "--strict-block-size", "--supervise",
}

// Programs look for options and keys: none may be missing, whatever the release.
func TestKeysOfNbdkit(t *testing.T) {
	onlyNbdhost(t)
	link := asNbdkit(t)
	dir := tempDir(t)
	lines := func(program string, args ...string) []string {
		o := runCLI(t, dir, "", program, args...)
		if o.status != 0 || o.stderr != "" {
			t.Fatalf("%s %s: got status %d: %s", program, args, o.status, o.stderr)
		}
		return strings.Split(strings.TrimSpace(o.stdout), "\n")
	}
	// What is different, and why.
	excepted := map[string]string{
		"binary": "where it is", "bindir": "where it is", "sbindir": "where it is",
		"version": "1.48's", "version_minor": "1.48's",
	}
	for _, r := range releases(t) {
		ours := lines(r.enter, link, "--dump-config")
		for _, l := range lines(r.nbdkit, "--dump-config") {
			key, value, _ := strings.Cut(l, "=")
			i := slices.IndexFunc(ours, func(o string) bool { return strings.HasPrefix(o, key+"=") })
			switch {
			case i < 0:
				t.Errorf("%s: --dump-config has no %s", r.name, key)
			case ours[i] != l && excepted[key] == "":
				t.Errorf("%s: --dump-config: got %s, need %s=%s", r.name, ours[i], key, value)
			}
		}
		options := lines(r.enter, link, "--long-options")
		for _, l := range lines(r.nbdkit, "--long-options") {
			if !slices.Contains(options, l) {
				t.Errorf("%s: --long-options has no %s", r.name, l)
			}
		}
		if r == releases(t)[len(releases(t))-1] {
			theirs := lines(r.nbdkit, "--long-options")
			for _, o := range options {
				if slices.Contains(theirs, o) == slices.Contains(ownOptions, o) {
					t.Errorf("%s: it is both nbdkit's and not, or neither: correct ownOptions here and in cmd/nbdhost", o)
				}
			}
		}
		if r.name == "bookworm" {
			continue // it does not list the short ones
		}
		options = lines(r.enter, link, "--short-options")
		for _, l := range lines(r.nbdkit, "--short-options") {
			if !slices.Contains(options, l) {
				t.Errorf("%s: --short-options has no %s", r.name, l)
			}
		}
	}
}
