package main

import (
	"fmt"
	"strings"
)

// What --help and the manual page have in common, besides the options.

const summary = "Nbdhost serves what an nbdkit plugin provides to clients of the NBD protocol."

const aboutArguments = `PLUGIN is a short name, such as file, or the path of a .so file. Parameters are
the plugin's; a VALUE without a KEY belongs to the key that the plugin prefers.
@FILE (with a / in it) reads parameters from a file, one on each line; before
PLUGIN it reads options, too. Options and parameters may be mixed. What is in
the environment variable NBDHOST_ARGS comes before them.`

var examples = []struct{ command, what string }{
	{"nbdhost file disk.img", "serve a file on port 10809"},
	{"nbdhost -f -v -U /tmp/sock memory 1G", "a RAM disk, with debug messages"},
	{`nbdhost -r file disk.img --run 'nbdcopy "$uri" copy.img'`, "serve while a command runs"},
	{"nbdhost --exit-with-parent -U - --print-uri memory 1G", "for a program that starts it"},
	{"nbdhost @/etc/nbdhost/disk.args", "arguments from a file"},
	{"NBDHOST_ARGS='-r file disk.img' nbdhost", "arguments from the environment"},
	{"nbdhost file --help", "what parameters does a plugin have?"},
	{"nbdhost --supervise --log-format=json file disk.img", "outlives crashes of the plugin"},
	{"nbdhost --list", "what plugins are there?"},
}

const exitStatus0 = "0 after an orderly end, 1 after an error; --run: COMMAND's."

// usage returns the text of --help.
func usage() string {
	const column, width = 29, 80 // where descriptions begin, and lines end
	var b strings.Builder
	fmt.Fprintf(&b, `Usage: nbdhost [OPTIONS] [@FILE] PLUGIN [[KEY=]VALUE | @FILE]...
       nbdhost PLUGIN --help | --version | --dump-plugin
       nbdhost --list | --dump-config | --completion=SHELL | --man

%s

%s
`, summary, aboutArguments)
	for _, group := range groups {
		fmt.Fprintf(&b, "\n%s:\n", group)
		for _, opt := range optionTable {
			if opt.group != group {
				continue
			}
			left := "      "
			if opt.short != "" {
				left = "  -" + opt.short + ", "
			}
			left += "--" + opt.names[0]
			left += opt.value()
			if len(left) > column-2 {
				fmt.Fprintf(&b, "%s\n", left)
				left = ""
			}
			for _, line := range wrap(opt.help, width-column) {
				fmt.Fprintf(&b, "%-*s%s\n", column, left, line)
				left = ""
			}
		}
	}
	b.WriteString("\nExamples:\n")
	for _, e := range examples {
		const column = 43
		left := "  " + e.command
		if len(left) > column-2 {
			b.WriteString(left + "\n")
			left = ""
		}
		fmt.Fprintf(&b, "%-*s%s\n", column, left, e.what)
	}
	fmt.Fprintf(&b, "\nExit status: %s\nThe manual page has more: nbdhost --man | man -l -\n", exitStatus0)
	return b.String()
}

// value is how help shows the option's value, and that it may be left out; "" if it has none.
func (o *option) value() string {
	if o.arg == "" {
		return ""
	}
	return strings.Replace("="+o.arg, "=[", "[=", 1)
}

// wrap breaks a text into lines of at most n bytes, if its words allow that.
func wrap(text string, n int) (lines []string) {
	line := ""
	for _, word := range strings.Fields(text) {
		switch {
		case line == "":
			line = word
		case len(line)+1+len(word) > n:
			lines, line = append(lines, line), word
		default:
			line += " " + word
		}
	}
	return append(lines, line)
}

// optionNames lists the long or the short options, one on each line.
func optionNames(long bool) string {
	var b strings.Builder
	for _, opt := range optionTable {
		switch {
		case opt.group == "":
		case long:
			for _, name := range opt.names {
				b.WriteString("--" + name + "\n")
			}
		case opt.short != "":
			b.WriteString("-" + opt.short + "\n")
		}
	}
	return b.String()
}
