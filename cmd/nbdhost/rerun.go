package main

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// nbdkit's vddk plugin runs the program again while it is configured, in the same process, with
// the arguments of /proc/self/cmdline and the environment: VMware's libraries want LD_LIBRARY_PATH
// to be there from the beginning (nbdkit-vddk-plugin(1)). A parameter of its own then says that it has.

// rerunParameter is that parameter's beginning.
const rerunParameter = "reexeced_="

// runsAgain tells whether the plugin that args begins with is going to run the program again. Then
// neither arguments nor what the environment hands over may be taken away.
func runsAgain(args []string) bool {
	if len(args) == 0 {
		return false
	}
	name := strings.TrimSuffix(strings.TrimPrefix(filepath.Base(args[0]), "nbdkit-"), "-plugin.so")
	return name == "vddk" && !slices.ContainsFunc(args[1:], func(arg string) bool { return strings.HasPrefix(arg, rerunParameter) })
}

// environment is what the process was started with.
var environment = os.Environ()

// handoverVariables are those that are hidden from modules and the programs that they run.
var handoverVariables = slices.Concat([]string{argsVariable, readyVariable, superviseVariable}, listenVariables, notifyVariables)

// handBack shows the variables again, and leaves the descriptors that they name open.
func handBack(fds []int) error {
	for _, v := range environment {
		name, value, _ := strings.Cut(v, "=")
		if !slices.Contains(handoverVariables, name) {
			continue
		}
		if err := os.Setenv(name, value); err != nil {
			return fmt.Errorf("set %s again: %w", name, err)
		}
	}
	return passOn(fds)
}

// takeBack hides everything, where the plugin is not going to run the program again any more.
func (o *options) takeBack(start *starter) {
	if !o.secrets.bare {
		return
	}
	o.secrets.bare = false
	for _, name := range handoverVariables {
		os.Unsetenv(name)
	}
	keepBack(handedOver(o, start))
	o.secrets.hideArguments(os.Args)
}

// handedOver returns the descriptors that the environment names.
func handedOver(o *options, start *starter) (fds []int) {
	for i := range o.inherited {
		fds = append(fds, firstInherited+i)
	}
	if start != nil {
		fds = append(fds, int(start.pipe.Fd()))
	}
	if s := o.superior; s != nil {
		fds = append(append(fds, s.Listeners...), s.Control)
	}
	return fds
}
