package main

import (
	"fmt"
	"strings"
)

// manualPage returns nbdhost(1) in the language of man(7). The options are those
// of the table; what there is to say beyond --help is in manualOptions.
func manualPage() string {
	var b strings.Builder
	fmt.Fprintf(&b, ".TH NBDHOST 1 %s \"nbdhost %s\" \"User Commands\"\n", manualDate, version)
	section := func(title string) { fmt.Fprintf(&b, ".SH %s\n", title) }
	text := func(s string) {
		for i, paragraph := range strings.Split(strings.TrimSpace(s), "\n\n") {
			if i > 0 {
				b.WriteString(".PP\n")
			}
			b.WriteString(roff(paragraph) + "\n")
		}
	}
	code := func(s string) { fmt.Fprintf(&b, ".PP\n.nf\n.RS 4\n%s\n.RE\n.fi\n", roff(s)) }

	section("NAME")
	b.WriteString("nbdhost \\- NBD server that runs nbdkit plugins\n")
	section("SYNOPSIS")
	for i, s := range []string{
		"[OPTIONS] [@FILE] PLUGIN [[KEY=]VALUE | @FILE]...",
		"PLUGIN --help | --version | --dump-plugin",
		"--list | --dump-config | --completion=SHELL | --man",
	} {
		if i > 0 {
			b.WriteString(".br\n")
		}
		b.WriteString(".B nbdhost\n" + roff(s) + "\n")
	}
	section("DESCRIPTION")
	text(summary + "\n\n" + aboutArguments + "\n\n" + manualDescription)
	section("OPTIONS")
	for _, group := range groups {
		fmt.Fprintf(&b, ".SS %s\n", group)
		for _, opt := range optionTable {
			if opt.group == group {
				b.WriteString(roffOption(&opt))
			}
		}
	}
	for _, s := range manualSections {
		section(s.title)
		text(s.text)
	}
	section("EXIT STATUS")
	text(strings.ToUpper(exitStatus0[:1]) + exitStatus0[1:])
	section("EXAMPLES")
	for i, e := range examples {
		if i > 0 {
			b.WriteString(".PP\n")
		}
		b.WriteString(roff(strings.ToUpper(e.what[:1])+e.what[1:]) + "\n")
		code(e.command)
	}
	section("SEE ALSO")
	b.WriteString(".BR nbdkit (1),\n.BR nbdkit\\-plugin (3),\n.BR nbdkit\\-tls (1),\n.BR nbdkit\\-service (1),\n.BR nbdkit\\-captive (1),\n.BR nbdkit\\-probing (1),\n.BR nbdinfo (1),\n.BR nbdcopy (1),\n.BR nbd\\-client (8),\n.BR qemu\\-img (1)\n")
	return b.String()
}

// roffOption returns the entry of an option, with all its names.
func roffOption(opt *option) string {
	var names []string
	if opt.short != "" {
		name := `\fB\-` + opt.short + `\fR`
		if opt.arg != "" {
			name += ` \fI` + roff(opt.arg) + `\fR`
		}
		names = append(names, name)
	}
	for _, n := range opt.names {
		name := `\fB` + roff("--"+n) + `\fR`
		if opt.arg != "" {
			name += strings.Replace(roff(opt.value()), "=", `=\fI`, 1) + `\fR`
		}
		names = append(names, name)
	}
	entry := ".TP\n" + strings.Join(names, ", ") + "\n" + roff(strings.ToUpper(opt.help[:1])+opt.help[1:]) + ".\n"
	if more := manualOptions[opt.names[0]]; more != "" {
		entry += roff(more) + "\n"
	}
	return entry
}

// roff returns text in which nothing means anything to troff.
func roff(text string) string {
	text = strings.NewReplacer(`\`, `\e`, "-", `\-`, "'", `\(aq`, "`", "\\`", "~", `\(ti`, "^", `\(ha`).Replace(text)
	lines := strings.Split(text, "\n")
	for i, line := range lines {
		if strings.HasPrefix(line, ".") {
			lines[i] = `\&` + line
		}
	}
	return strings.Join(lines, "\n")
}

// manualDate is when the texts below were written.
const manualDate = "2026-11-23"

const manualDescription = `Plugins are the shared libraries that distributions ship for nbdkit(1), unmodified.
A script may also be run itself, where its first line is "#!/usr/bin/nbdhost LANGUAGE" and
LANGUAGE is a plugin, such as python or sh.

All options of nbdkit 1.48 are there, with all their names. Under the name nbdkit, by a
symbolic link for example, the program says that it is that release of nbdkit.

Unless one of -f, -s, --run and --exit-with-parent is given, or sockets are handed over,
the server goes to the background: the command ends with status 0 when clients can
connect and the process ID is written, and with an error otherwise.`

// manualOptions is what the manual page says about an option beyond its help, by
// the option's first name.
var manualOptions = map[string]string{
	"unix":                        "The socket file is not removed at the end, but for a private one. One that no process has any more is replaced.",
	"port":                        "The URI of --print-uri and of --run has the port that was taken.",
	"ipaddr":                      "Of a name with several addresses all are listened on.",
	"keepalive":                   "When clients are given up is the kernel's setting; see tcp(7).",
	"vsock":                       "The default port is 10809; 0 takes a free one. See vsock(7).",
	"single":                      "Programs like inetd(8) start a server this way. It ends with the connection.",
	"selinux-label":               "See setsockcreatecon(3).",
	"readonly":                    "Plugins that cannot write need not be told.",
	"exportname":                  "What the server offers does not depend on it.",
	"threads":                     "Only plugins with the thread model parallel use more than one.",
	"max-connections":             "The others are told, and their connections closed. Where nothing is said there is no limit, but for a plugin that was compiled to serialize all requests (max_thread_model), of which each connection takes a thread: 1000.",
	"max-connections-per-address": "Clients on Unix sockets have no address.",
	"max-requests":                "The others wait.",
	"max-bytes":                   "What is read and written counts until the reply has been sent. Other requests wait.",
	"max-bytes-per-connection":    "A single request is let through however long it is; 0 is no limit.",
	"bandwidth":                   "As with the rate filter, zeroing and trimming do not count.",
	"send-timeout":                "Then it is disconnected, and what its requests held is free again. Clients on other transports than TCP are not held to it. See TCP_USER_TIMEOUT in tcp(7).",
	"metrics":                     "/metrics is for Prometheus, /livez answers as long as the process does, /readyz while clients are served.\nWho can reach the address can read all of it: give a HOST, such as 0.0.0.0, only where that is wanted.",
	"health-read":                 "The read has a connection of its own, which opens the export of --exportname.",
	"healthcheck":                 "For the health checks of containers.",
	"mask-handshake":              "Bit 0 is fixed newstyle, bit 1 is no zeroes. For tests of clients.",
	"filter":                      "Requests go through the filters in the order in which they are given.",
	"filter-any-release":          "The filters of nbdkit 1.26 to 1.48 need no option.",
	"no-sr":                       "For tests of clients.",
	"no-eh":                       "For tests of clients.",
	"no-mc":                       "For tests of clients.",
	"sparse-reads":                "Clients with structured replies are told where long reads are zero, instead of being sent zeroes. With auto that is where a read has brought zeroes only. With always the plugin is asked for its extents before each, and what is zero by them is not read: they must be right. Nbdkit never asks because of a read; the extents that its cache, ddrescue and error filters let through are not right, and its split plugin (up to release 1.46) and memory with allocator=zstd crash when they are asked.",
	"strict-block-size":           "The specification lets a server refuse them. Nbdkit leaves it to the plugin, or to nbdkit-blocksize-policy-filter(1).",
	"timeout":                     "A client that takes longer is disconnected.",
	"drain-timeout":               "Clients whose requests take longer are disconnected. Idle clients do not hold up the end.",
	"pidfile":                     "An existing file is written over, and keeps its owner and mode. It is not removed at the end. Since it is written last, the user of --user must be able to.",
	"run":                         "The command runs as the user who started the server, with --user too. $nbd is the same as $uri.",
	"user":                        "A number will do as well. Without --group the groups are those of the user.",
	"group":                       "A number will do as well.",
	"swap":                        "Otherwise the machine might wait for the server, and the server for its memory. Who is not the superuser needs to have no limit of locked memory; see ulimit(1).",
	"debug":                       "The server's own flags are backend.controlpath and backend.datapath, which show calls into modules (default 1), and environ, which shows the environment (default 0). A flag that nobody takes is worth a warning.",
	"log":                         "Debug messages always go to standard error.",
	"name":                        "Modules may ask for it.",
	"supervise":                   "The parent keeps the sockets, and the log says which module crashed, in which call, for which request. Restarts wait for 100 ms to 5 s; a plugin that cannot be configured is not started again.",
	"log-format":                  "An object has the connection, the client, the export, the command and its cookie, the module and the error as attributes.",
	"slow-ms":                     "The time includes waiting for other requests where the thread model wants that.",
	"dump-plugin":                 "See nbdkit-probing(1). Parameters may be given, and are handed to the plugin.",
	"dump-config":                 "The keys are those of nbdkit-probing(1), with nbdhost_version and nbdkit_version.",
	"list":                        "Each is loaded in a process of its own: one that cannot be used does no harm.",
	"completion":                  "Each script says where it belongs. Plugins, filters and their parameters are completed, too.",
	"print-uri":                   "That is the first line. The others say how to use it in a shell.",
	"exit-with-parent":            "If the parent has ended already, the server does not start.",
}

var manualSections = []struct{ title, text string }{
	{"PARAMETERS", `A parameter is KEY=VALUE. KEY begins with a letter; letters, digits and the signs . _ -
follow. Anything else is a VALUE for the key that the plugin prefers, its magic key. A
plugin without one takes the first such parameter as script=VALUE.

In a @FILE each line is one parameter. Empty lines and those that begin with # are
ignored. A @FILE in a file is looked up in the directory of that file.

A @FILE before PLUGIN may have anything in it that a command line may, one argument on
each line (--port=10809), also the plugin. A secret in it is in no list of processes, and
in no environment.

Where a plugin wants a password, the value may be the password itself; - asks for it on
the terminal; +FILE reads the first line of a file; and -FD that of a descriptor from 3 on.`},
	{"TLS", `Without --tls clients may use TLS if there are keys, and need not. Keys are pre-shared ones
(--tls-psk=FILE; psktool(1) makes such files), or the files server-cert.pem and server-key.pem
in the directory of --tls-certificates, by default /etc/pki/nbdkit for the superuser, and
~/.pki/nbdkit and ~/.config/pki/nbdkit for others. With --tls-verify-peer clients need a
certificate of an authority in ca-cert.pem that is not revoked by ca-crl.pem, if that is
there. More pairs may be in server-cert-0.pem and server-key-0.pem, and so on. The files are
looked at in each handshake: new ones count at once. nbdkit-tls(1) shows how to make them.`},
	{"SOCKET ACTIVATION", `Where LISTEN_PID and LISTEN_FDS are in the environment, as systemd(1) and libnbd have it,
the server takes over the sockets from descriptor 3 on, and stays in the foreground.
The options -i, -p, -s, -U, --run and --vsock are errors then.`},
	{"SIGNALS", `SIGINT, SIGTERM, SIGQUIT and SIGHUP end the server: no new client and no new request is
accepted, requests in progress are finished, and the plugin is closed and unloaded. SIGPIPE is
ignored.`},
	{"SERVICE MANAGERS", `Where NOTIFY_SOCKET is in the environment, the server speaks sd_notify(3): READY=1,
STOPPING=1, STATUS= with clients and rates, and WATCHDOG=1 where WATCHDOG_USEC asks for it and
requests make progress.`},
	{"SECRETS", `Passwords, tokens, cookies and keys are hidden in messages, and in what ps(1) shows of the
server. Until it has read its command line ps(1) shows all of that.`},
	{"ENVIRONMENT", `NBDHOST_ARGS has arguments that come before those of the command line, so that options
on the command line win. Words are split and quoted as in a shell, but nothing is
substituted. Programs that the server runs do not see it.

NBDHOST_PLUGIN_PATH and NBDHOST_FILTER_PATH are directories, with colons between them, where
plugins and filters are looked for: after --plugin-path, and before the directories of the
distribution. GOMAXPROCS bounds the processors that are used.`},
	{"DIFFERENCES FROM NBDKIT", `The port of --port=0 is in the URI. The command of --run gets the server's SIGTERM.
With --log=stderr a server in the background keeps standard error. Flush, FUA, trim, zero and cache
requests of an oldstyle client are carried out. --user without --group gives up the groups of the
superuser. Mistakes in values are found before the plugin is loaded. Idle clients do not hold
up the end, and --drain-timeout bounds it. Names and options that nearly fit are suggested.
A dead socket in the place of --unix is replaced. A command of --run that SIGTERM ends ends the
server with status 143. Where a plugin cannot be started .unload is called nevertheless, so that
what .load has made is taken away. The server does not fork, so that the log filter has no line for it.`},
}
