package main

import (
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"runtime"

	"nbdhost/loader"
)

// The main goroutine stays on the main thread, which some modules insist on.
func init() { runtime.LockOSThread() }

func main() {
	code := run(cloneArguments(), os.Stdout, os.Stderr)
	if code == statusStuck {
		// C's exit would run the handlers and destructors of a module that is
		// still in the middle of a call.
		os.Exit(1)
	}
	loader.Exit(code) // modules may have something to do at the end (atexit)
}

// statusStuck is no exit status: a module has not returned from a call.
const statusStuck = -1

// run does what the command line args says, args[0] being the program's name,
// and returns the exit status or statusStuck. It is called once in a process.
func run(args []string, stdout, stderr io.Writer) int {
	known := &secrets{}
	code, err := dispatch(args, stdout, stderr, known)
	if err == nil {
		return code
	}
	if code == 0 {
		code = 1
	}
	if !saidByModule(err) && !errors.Is(err, errReported) {
		fmt.Fprintf(stderr, "%s: error: %s\n", filepath.Base(args[0]), known.redact(err.Error()))
	}
	return code
}

func dispatch(args []string, stdout, stderr io.Writer, known *secrets) (int, error) {
	args, err := fullArguments(args)
	if err != nil {
		return 1, err
	}
	nameProcess(args[0])
	start, err := findStarter()
	if err != nil {
		return 1, err
	}
	findings, checks, err := findCheck()
	if err != nil {
		return 1, err
	}
	superior, err := findSupervisor()
	if err != nil {
		return 1, err
	}
	words, err := withEnvironment(args[1:])
	if err != nil {
		return 1, err
	}
	known.learn(words)
	o, err := parse(words)
	// Checks show what the plugin does; those of vddk want LD_LIBRARY_PATH to be there.
	if known.bare = err == nil && o.check == "" && findings == nil && runsAgain(o.args); !known.bare {
		known.hideArguments(args)
	}
	if err != nil {
		return 1, err
	}
	o.secrets = known
	switch {
	case o.longOptions || o.shortOptions:
		return 0, write(stdout, optionNames(o.longOptions))
	case o.dumpConfig:
		return 0, write(stdout, dumpConfig(args[0]))
	case o.completion != "":
		return 0, write(stdout, completionScripts[o.completion])
	case o.complete:
		return 0, write(stdout, complete(o.args))
	case o.manual:
		return 0, write(stdout, manualPage())
	case o.list:
		return 0, list(stdout, o)
	case o.healthcheck != nil:
		return 0, healthcheck(stdout, *o.healthcheck)
	case o.describe:
		return 0, describe(stdout, o)
	case len(o.args) > 0:
	case o.help:
		return 0, write(stdout, usage())
	case o.version:
		return 0, write(stdout, versionText(args[0])+"\n")
	default:
		return 1, errors.New("got no plugin: need the name of one, such as: nbdhost memory 1G; see --help")
	}
	serving := !o.help && !o.version
	switch {
	case findings != nil:
		os.Unsetenv(argsVariable) // as below
		return runChecks(o, checks, findings, newLog(o, stderr))
	case serving && o.check != "":
		return checkPlugin(o, args, stdout)
	}
	if superior != nil {
		superior.obey(o)
	}
	if serving {
		if o.inherited, err = inheritSockets(); err != nil {
			return 1, err
		}
		if err := o.settle(); err != nil {
			return 1, err
		}
	}
	if o.exitWithParent {
		if err := exitWithParent(); err != nil {
			return 1, err
		}
	}
	out := newLog(o, stderr)
	if start == nil && serving && !o.foreground && !o.dumpPlugin {
		known.hideArguments(args)
		code, err := background(args, known)
		return code, out.report(err)
	}
	if o.notify == nil && serving {
		if o.notify, err = findNotifier(start); err != nil {
			slog.New(out).Warn(err.Error() + "; going on without")
		}
	}
	if o.supervise && superior == nil && serving && !o.dumpPlugin {
		known.hideArguments(args)
		code, err := supervise(o, args, start, stdout, out)
		return code, out.report(err)
	}
	if !known.bare {
		os.Unsetenv(argsVariable) // not for servers that a module runs
	} else if err := handBack(handedOver(o, start)); err != nil {
		return 1, err
	}
	code, err := serve(o, start, stdout, out)
	return code, out.report(superior.tellError(err, known))
}

func write(w io.Writer, text string) error {
	_, err := io.WriteString(w, text)
	return err
}
