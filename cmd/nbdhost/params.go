package main

import (
	"bufio"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"

	"github.com/google/shlex"
)

// argsVariable holds arguments that come before those of the command line, in words
// as a shell would split them. It is one variable for all options: with one for each,
// what Kubernetes tells a container about a Service named nbdhost (NBDHOST_PORT=tcp://...)
// would be taken for options.
const argsVariable = "NBDHOST_ARGS"

// withEnvironment puts the arguments in the environment before args, the command line
// without the program's name. What the program runs itself with is complete.
func withEnvironment(args []string) ([]string, error) {
	if len(args) > 0 && slices.ContainsFunc(optionTable, func(o option) bool { return o.group == "" && args[0] == "--"+o.names[0] }) {
		return args, nil
	}
	words, err := shlex.Split(os.Getenv(argsVariable))
	if err != nil {
		return nil, fmt.Errorf("read %s: %w: need words as in a shell, with each quote closed", argsVariable, err)
	}
	return append(words, args...), nil
}

// maxParameterFiles is how deep @FILE parameters may be nested. More of them is
// a file that includes itself.
const maxParameterFiles = 16

// expandParameters replaces each @FILE in args by the parameters in that file
// (nbdkit(1), "@PATH"): one on each line, but for empty lines and those that begin
// with #. An @FILE in a file is relative to the directory of that file.
func expandParameters(args []string) ([]string, error) {
	return expand(nil, args, "", 0)
}

// isFile tells whether an argument is an @FILE: there is a / in it, and no blank before that, as in
// what the plugin data takes ("@0x10 </file").
func isFile(arg string) bool {
	dir, _, ok := strings.Cut(arg, "/")
	return ok && strings.HasPrefix(arg, "@") && !strings.ContainsAny(dir, " \t\n")
}

func expand(list, args []string, dir string, depth int) ([]string, error) {
	for _, arg := range args {
		if !isFile(arg) {
			list = append(list, arg)
			continue
		}
		path := arg[1:]
		if depth == maxParameterFiles {
			return nil, fmt.Errorf("read parameters from %s: got files nested deeper than %d: need one that does not include itself", path, maxParameterFiles)
		}
		if !filepath.IsAbs(path) {
			path = filepath.Join(dir, path)
		}
		lines, err := readLines(path)
		if err != nil {
			return nil, fmt.Errorf("read parameters: %w", err)
		}
		if list, err = expand(list, lines, filepath.Dir(path), depth+1); err != nil {
			return nil, err
		}
	}
	return list, nil
}

func readLines(path string) (lines []string, err error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	in := bufio.NewScanner(f)
	in.Buffer(nil, 1<<20)
	for in.Scan() {
		if line := in.Text(); line != "" && line[0] != '#' {
			lines = append(lines, line)
		}
	}
	if err := in.Err(); err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return lines, nil
}

// parseParameter splits KEY=VALUE. Where there is no key, magic is taken, the
// plugin's magic_config_key; where that is empty too, the first parameter belongs
// to "script" (nbdkit(1), "Magic parameters").
func parseParameter(arg, magic string, first bool) (key, value string, err error) {
	if key, value, ok := strings.Cut(arg, "="); ok && isKey(key) {
		return key, value, nil
	}
	switch {
	case magic != "":
		return magic, arg, nil
	case first:
		return "script", arg, nil
	}
	return "", "", fmt.Errorf("read parameter: got %q: need KEY=VALUE, since the plugin takes no value without a key; see PLUGIN --help", arg)
}

// isKey tells whether s may be a key: a letter, then letters, digits and . _ -
// (nbdkit-plugin(3), ".config").
func isKey(s string) bool {
	for i := range len(s) {
		c := s[i] | 0x20
		if c >= 'a' && c <= 'z' {
			continue
		}
		if i == 0 || (s[i] < '0' || s[i] > '9') && !strings.ContainsRune("._-", rune(s[i])) {
			return false
		}
	}
	return s != ""
}

// checkScript refuses a script of the sh plugin whose first line runs this program.
// The plugin runs the script for every callback, the script would run the server,
// which would run the script, and so on for ever. What cannot be read is left to
// the plugin.
func checkScript(path string) error {
	st, err := os.Stat(path)
	if err != nil || !st.Mode().IsRegular() {
		return nil
	}
	f, err := os.Open(path)
	if err != nil {
		return nil
	}
	defer f.Close()
	line, _ := bufio.NewReader(io.LimitReader(f, 4096)).ReadString('\n')
	interpreter, ok := strings.CutPrefix(line, "#!")
	if !ok {
		return nil
	}
	self, err := os.Stat("/proc/self/exe")
	if err != nil {
		return nil
	}
	for _, word := range strings.Fields(interpreter) { // env(1) may come first
		program, err := exec.LookPath(word)
		if err != nil {
			continue
		}
		if st, err := os.Stat(program); err == nil && os.SameFile(st, self) {
			return fmt.Errorf("run script %s: its first line runs this server again, and so on for ever: "+
				"need a first line for a shell, such as #!/bin/sh, and the command: nbdhost sh %s", path, path)
		}
	}
	return nil
}
