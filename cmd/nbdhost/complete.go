package main

import (
	_ "embed"
	"maps"
	"regexp"
	"slices"
	"strings"

	"nbdhost/check"
	"nbdhost/loader"
)

// completionScripts are what --completion writes. Each is little more than a call
// of nbdhost --complete with the words of the command line.
var completionScripts = map[string]string{"bash": completionBash, "zsh": completionZsh, "fish": completionFish}

//go:embed completion/nbdhost.bash
var completionBash string

//go:embed completion/nbdhost.zsh
var completionZsh string

//go:embed completion/nbdhost.fish
var completionFish string

// filesWanted is the line of complete that lets the shell offer files.
const filesWanted = ":files"

// complete returns what the last of words, which stand behind the program's name,
// may become: one on each line, with a description behind a tab. What ends in
// "=" or "." goes on.
func complete(words []string) string {
	if len(words) == 0 {
		return ""
	}
	var b strings.Builder
	for _, c := range candidates(words[:len(words)-1], words[len(words)-1]) {
		b.WriteString(strings.TrimSuffix(c.word+"\t"+c.help, "\t") + "\n")
	}
	return b.String()
}

// A candidate is a word and what it means.
type candidate struct{ word, help string }

// candidates returns what word may become behind the words before it.
func candidates(before []string, word string) (list []candidate) {
	o := &options{} // as far as the words before tell
	note := func(opt *option, value string) {
		switch opt.names[0] {
		case "filter", "filter-path", "plugin-path", "filter-any-release":
			_ = opt.set(o, value) // what is wrong with it is told when the command runs
		}
	}
	var pending *option // whose value word is
	onlyArgs := false
	for _, w := range before {
		switch {
		case pending != nil:
			note(pending, w)
			pending = nil
		case w == "--":
			onlyArgs = true
		case len(o.args) == 0 && isFile(w): // what is in it does not matter here
		case onlyArgs || !strings.HasPrefix(w, "-") || w == "-":
			o.args = append(o.args, w)
		default:
			opt, value, hasValue := findOption(w)
			if opt != nil && opt.arg != "" && !hasValue {
				pending = opt
			} else if opt != nil {
				note(opt, value)
			}
		}
	}
	switch {
	case pending != nil:
		list = values(pending, "", o)
	case !onlyArgs && strings.HasPrefix(word, "--") && strings.Contains(word, "="):
		if opt, _, _ := findOption(word); opt != nil {
			name, _, _ := strings.Cut(word, "=")
			list = values(opt, name+"=", o)
		}
	case !onlyArgs && strings.HasPrefix(word, "-"):
		list = optionCandidates()
	case len(o.args) == 0:
		list = moduleCandidates(loader.PluginKind, "", o)
	case strings.Contains(word, "="):
		list = []candidate{{filesWanted, ""}}
	default:
		list = append(parameterCandidates(o), candidate{filesWanted, ""})
	}
	return slices.DeleteFunc(list, func(c candidate) bool {
		return c.word != filesWanted && !strings.HasPrefix(c.word, word)
	})
}

// findOption returns the option that a word is, and its value if the word has one.
func findOption(word string) (opt *option, value string, hasValue bool) {
	name, value, hasValue := strings.Cut(strings.TrimPrefix(word, "--"), "=")
	long := strings.HasPrefix(word, "--")
	for i := range optionTable {
		o := &optionTable[i]
		if long && slices.Contains(o.names, name) {
			return o, value, hasValue
		}
		if !long && o.short == word[1:2] {
			if o.arg != "" {
				return o, word[2:], len(word) > 2
			}
			// Of bundled letters the last may want a value.
			if len(word) > 2 {
				return findOption("-" + word[2:])
			}
			return o, "", false
		}
	}
	return nil, "", false
}

func optionCandidates() (list []candidate) {
	for _, o := range optionTable {
		if o.group == "" {
			continue
		}
		suffix := ""
		if o.arg != "" {
			suffix = "="
		}
		list = append(list, candidate{"--" + o.names[0] + suffix, o.help})
		if o.short != "" {
			list = append(list, candidate{"-" + o.short, o.help})
		}
	}
	return list
}

// values returns the values of an option, each behind prefix.
func values(opt *option, prefix string, o *options) (list []candidate) {
	var words []string
	switch opt.names[0] {
	case "filter":
		return moduleCandidates(loader.FilterKind, prefix, o)
	case "debug":
		for _, kind := range []loader.Kind{loader.PluginKind, loader.FilterKind} {
			for _, name := range loader.Installed(kind, o.searchPath(kind)...) {
				words = append(words, name+".")
			}
		}
		words = append(words, "nbdkit.backend.controlpath=0", "nbdkit.backend.datapath=0", "nbdkit.environ=1")
	case "log":
		words = []string{logDefault, logStderr, logSyslog, logNull, filesWanted}
	case "tls":
		words = []string{tlsOff, tlsOn, tlsRequire}
	case "log-format":
		words = []string{logText, logJSON}
	case "sparse-reads":
		words = slices.Sorted(maps.Keys(sparseReads))
	case "check":
		words = check.Formats
	case "completion":
		words = slices.Sorted(maps.Keys(completionScripts))
	case "unix", "pidfile", "tls-psk", "tls-certificates", "plugin-path", "filter-path":
		words = []string{filesWanted}
	}
	for _, w := range words {
		if w != filesWanted {
			w = prefix + w
		}
		list = append(list, candidate{w, ""})
	}
	return list
}

func moduleCandidates(kind loader.Kind, prefix string, o *options) (list []candidate) {
	for _, name := range loader.Installed(kind, o.searchPath(kind)...) {
		list = append(list, candidate{prefix + name, kind.String()})
	}
	if kind == loader.PluginKind {
		list = append(list, candidate{filesWanted, ""}) // a path will do as well
	}
	return list
}

// parameterLine is how modules describe a parameter in their help: KEY=VALUE, perhaps
// in brackets, and what it is.
var parameterLine = regexp.MustCompile(`(?m)^\s*\[?([A-Za-z][A-Za-z0-9._-]*)=\S*\s*(.*)$`)

// parameterCandidates returns the parameters of the filters and the plugin, by what
// their help says. A module that cannot be loaded has none.
func parameterCandidates(o *options) (list []candidate) {
	add := func(kind loader.Kind, name string) {
		d, err := describeModule(kind, name, o)
		if err != nil {
			return
		}
		for _, m := range parameterLine.FindAllStringSubmatch(d.ConfigHelp, -1) {
			list = append(list, candidate{m[1] + "=", strings.TrimSpace(m[2])})
		}
		if key := d.MagicKey + "="; d.MagicKey != "" && !slices.ContainsFunc(list, func(c candidate) bool { return c.word == key }) {
			list = append(list, candidate{key, ""})
		}
	}
	for _, f := range o.filters {
		add(loader.FilterKind, f)
	}
	add(loader.PluginKind, o.args[0])
	return list
}
