package check

import (
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"

	"nbdhost/backend"
)

// A Check is one promise and the function that holds a plugin to it.
type Check struct {
	Name    string // GROUP.WORD, which --check-only takes
	Promise string // what must hold
	Writes  bool   // runs only where data may be modified
	// run returns nil where the promise holds, a skipped where it does not
	// apply, and any other error says what was seen instead.
	run func(*Subject) error
}

// Checks is the table of checks, in the order in which they run. Those that need
// the plugin alone come before those that serve it, and what may leave it unable
// to go on comes last.
var Checks = []Check{
	{"file.symbols", "each nbdkit_* function that the file needs is one of nbdkit's", false, (*Subject).fileSymbols},
	{"file.load", "the file loads: it is a plugin of API version 1 or 2 with .name, .open, .get_size and .pread", false, (*Subject).fileLoad},
	{"file.struct", "struct nbdkit_plugin ends at the end of one of its members", false, (*Subject).fileStruct},
	{"file.callbacks", "no callback is there in vain, because another one is missing", false, (*Subject).fileCallbacks},
	{"plugin.start", "the plugin takes its parameters and gets ready", false, (*Subject).start},
	{"plugin.thread_model", ".thread_model is one of the four, and no more parallel than the plugin was built for", false, (*Subject).threadModel},
	{"plugin.open", "the default export can be opened, and all its capabilities and its block size are valid", false, (*Subject).open},
	{"plugin.capabilities", "each can_* that is true has the callbacks that it speaks of", false, (*Subject).capabilities},
	{"plugin.exports", "each export that is listed can be opened", false, (*Subject).exports},
	{"plugin.errors", "a call that fails says why with nbdkit_error or nbdkit_set_error", false, (*Subject).errors},

	{"size.stable", "each connection sees the same size", false, (*Subject).sizeStable},
	{"size.blocks", "the size is a multiple of the minimum block size", false, (*Subject).sizeBlocks},
	{"flags.stable", "each connection sees the same capabilities", false, (*Subject).flagsStable},
	{"read.range", "each byte of the export can be read", false, (*Subject).readRange},
	{"read.repeatable", "the same range reads the same twice", false, (*Subject).readRepeatable},
	{"read.connections", "two connections read the same", false, (*Subject).readConnections},
	{"read.alignment", "a read at any offset and of any length that the block size permits reads the same bytes", false, (*Subject).readAlignment},
	{"read.end", "reads up to the last byte read the same, whatever their length", false, (*Subject).readEnd},
	{"read.limits", "reads of the minimum, the preferred and the maximum block size work", false, (*Subject).readLimits},
	{"read.parallel", "reads that run in parallel read what they read one by one", false, (*Subject).readParallel},
	{"extents.map", "block status covers the export, each answer with at least one extent", false, (*Subject).extentsMap},
	{"extents.zero", "what extents call zero reads as zeroes", false, (*Subject).extentsZero},
	{"extents.one", "asked for one extent (NBD_CMD_FLAG_REQ_ONE), anywhere, the answer is one, and reads as zeroes if it says so", false, (*Subject).extentsOne},
	{"cache.data", "cache succeeds and changes no data", false, (*Subject).cacheData},

	{"write.data", "what was written reads back, at any offset and of any length, and its neighbours stay", true, (*Subject).writeData},
	{"write.end", "the last bytes can be written and read back", true, (*Subject).writeEnd},
	{"write.parallel", "writes that run in parallel all read back", true, (*Subject).writeParallel},
	{"write.fua", "what was written with FUA is there for the next connection", true, (*Subject).writeFUA},
	{"flush.data", "what was written before a flush is there for the next connection", true, (*Subject).flushData},
	{"multi_conn.coherent", "what one connection has written and flushed, the others read (can_multi_conn)", true, (*Subject).multiConn},
	{"trim.neighbours", "trim succeeds and leaves its neighbours alone", true, (*Subject).trimNeighbours},
	{"zero.data", "what was zeroed reads as zeroes, and its neighbours stay", true, (*Subject).zeroData},
	{"zero.no_hole", "zeroes that must not be a hole (NBD_CMD_FLAG_NO_HOLE) are none", true, (*Subject).zeroNoHole},
	{"zero.fast", "a fast zero zeroes, or fails with ENOTSUP and changes nothing", true, (*Subject).zeroFast},

	{"resources.descriptors", "a thousand connections leave no file descriptor behind", false, (*Subject).descriptors},
	{"resources.threads", "a thousand connections leave no thread behind", false, (*Subject).threads},
	{"resources.memory", "a thousand connections leave no memory behind", false, (*Subject).memory},
	{"disconnect.in_flight", "clients that go away amid their requests do no harm to the next one", false, (*Subject).disconnectInFlight},
	{"plugin.stop", "every connection is closed, and .cleanup and .unload return", false, (*Subject).stop},
}

// Names returns the names of the checks, in order.
func Names() []string {
	names := make([]string, len(Checks))
	for i := range Checks {
		names[i] = Checks[i].Name
	}
	return names
}

// Select returns the names of the checks that patterns name, in the table's order:
// each is a check's name or its group, the part before the dot. No patterns select
// all.
func Select(patterns []string) ([]string, error) {
	if len(patterns) == 0 {
		return Names(), nil
	}
	for _, p := range patterns {
		if !slices.ContainsFunc(Checks, func(c Check) bool { return c.matches(p) }) {
			return nil, fmt.Errorf("select check: got %q: need one of %s, or the part before a dot", p, strings.Join(Names(), ", "))
		}
	}
	var names []string
	for _, c := range Checks {
		if slices.ContainsFunc(patterns, c.matches) {
			names = append(names, c.Name)
		}
	}
	return names, nil
}

func (c Check) matches(pattern string) bool {
	group, _, _ := strings.Cut(c.Name, ".")
	return pattern == c.Name || pattern == group
}

// Lookup finds a check by its name.
func Lookup(name string) (Check, bool) {
	i := slices.IndexFunc(Checks, func(c Check) bool { return c.Name == name })
	if i < 0 {
		return Check{}, false
	}
	return Checks[i], true
}

// Status is how a check ended.
type Status string

// How a check ends.
const (
	Pass Status = "pass"
	Fail Status = "fail"
	Skip Status = "skip" // the promise is not made, or could not be looked at
)

// Result is how one check ended.
type Result struct {
	Name    string   `json:"name"`
	Promise string   `json:"promise"`
	Status  Status   `json:"status"`
	Saw     string   `json:"saw,omitempty"`   // of a failure: what was seen instead
	Why     string   `json:"why,omitempty"`   // of a skip: the reason
	Again   string   `json:"again,omitempty"` // of a failure: a command that shows it again
	Notes   []string `json:"notes,omitempty"` // facts worth knowing
}

// A Plugin is what the checks ask a loaded plugin for; *loader.Plugin is one. A
// backend in Go becomes one with API version 2, and 0 or "" for what only a file has.
type Plugin interface {
	backend.Backend
	APIVersion() int    // 1 or 2
	StructSize() uint64 // bytes, as the plugin has it
	Version() string
	ConfigHelp() string
	MagicConfigKey() string
}

// A Subject is a plugin under check. It is used for one Run. Open, Serving, Start and
// Stop are needed.
type Subject struct {
	// Path is the plugin's shared library; "" for a backend in Go.
	Path string
	// Open loads it. It is called once.
	Open func() (Plugin, error)
	// Serving calls serve, once, within which all connections are opened and closed, and
	// returns after it. Only a plugin in C may want more, such as the main thread.
	Serving func(serve func())
	// Start configures it and makes it ready to serve, as a server would; it is
	// called once, after Open. Stop undoes it, with .cleanup and .unload; it is
	// called once where Start was, even in vain, after every connection has been closed.
	Start func() (*backend.Chain, error)
	Stop  func()
	// Filters are name and version of each filter, outermost first; Start may set
	// them. The promises that are looked at are theirs then.
	Filters []string
	// Writes permits to modify data.
	Writes bool
	// Log receives what the server has to say; nil for nothing.
	Log *slog.Logger

	plugin  Plugin
	chain   *backend.Chain
	started bool  // Start was called
	stuck   error // a call into the plugin has not returned
	// unresolved tells that the file has a symbol that nobody has.
	unresolved bool
	broken     error // why no export can be opened
	service    *service
	churned    *churn
	notes      []string
}

// skipped is the reason why a promise is not looked at.
type skipped string

func (s skipped) Error() string { return string(s) }

func skipf(format string, args ...any) error { return skipped(fmt.Sprintf(format, args...)) }

// notef adds a fact to the result of the check that runs.
func (s *Subject) notef(format string, args ...any) {
	s.notes = append(s.notes, fmt.Sprintf(format, args...))
}

// Run runs the checks that patterns name, as they do for [Select]. It tells begin of
// each before it runs, and end of its result. Whatever the patterns are, the plugin is
// loaded, started and stopped. It returns an error where a pattern names no check or the
// subject lacks a function, and then has called nothing; that a check fails is none.
func (s *Subject) Run(patterns []string, begin func(name string), end func(Result)) error {
	names, err := Select(patterns)
	if err != nil {
		return err
	}
	if err := s.complete(); err != nil {
		return err
	}
	run := func(checks []Check) {
		for i := range checks {
			c := &checks[i]
			switch selected := slices.Contains(names, c.Name); {
			case selected:
				begin(c.Name)
				end(s.one(c))
			case Needed(c.Name):
				s.one(c)
			}
		}
	}
	at := func(name string) int {
		return slices.IndexFunc(Checks, func(c Check) bool { return c.Name == name })
	}
	first, last := at("plugin.open"), at("plugin.stop")
	run(Checks[:first])
	s.Serving(func() {
		run(Checks[first:last])
		if s.service != nil {
			s.stuck = s.service.end()
		}
		if s.stuck != nil {
			run(Checks[last:]) // from here, since there may be no way back
		}
	})
	if s.stuck == nil {
		run(Checks[last:])
	}
	return nil
}

// complete says which function the subject lacks.
func (s *Subject) complete() error {
	for _, f := range []struct {
		name string
		is   bool
	}{{"Open", s.Open != nil}, {"Serving", s.Serving != nil}, {"Start", s.Start != nil}, {"Stop", s.Stop != nil}} {
		if !f.is {
			return fmt.Errorf("run checks: got a Subject without %s: need Open, Serving, Start and Stop", f.name)
		}
	}
	return nil
}

// Needed tells whether no later check can run without this one.
func Needed(name string) bool { return slices.Contains(needed, name) }

// Stuck tells, within Serving and after Run, whether a call into the plugin has not
// returned, so that the process must end without touching it any more.
func (s *Subject) Stuck() bool { return s.stuck != nil }

// needed are the checks without which no later one can run.
var needed = []string{"file.load", "plugin.start", "plugin.open", "plugin.stop"}

func (s *Subject) one(c *Check) Result {
	s.notes = nil
	r := Result{Name: c.Name, Promise: c.Promise, Status: Pass}
	err := s.applies(c)
	if err == nil {
		err = c.run(s)
	}
	var skip skipped
	switch {
	case errors.As(err, &skip):
		r.Status, r.Why = Skip, err.Error()
	case err != nil:
		r.Status, r.Saw = Fail, err.Error()
	}
	r.Notes = s.notes
	return r
}

// applies says why a check cannot run yet, or at all.
func (s *Subject) applies(c *Check) error {
	group, _, _ := strings.Cut(c.Name, ".")
	switch {
	case c.Writes && !s.Writes:
		return skipf("it would modify data: give --check-writes to run it")
	case c.Name == "file.symbols" || c.Name == "file.load" || c.Name == "plugin.stop":
		return nil
	case s.plugin == nil:
		return skipf("the file does not load")
	case group == "file" || c.Name == "plugin.start":
		return nil
	case s.chain == nil:
		return skipf("the plugin does not start")
	case c.Name == "plugin.thread_model" || c.Name == "plugin.open":
		return nil
	case s.broken != nil:
		return skipf("the default export cannot be opened")
	}
	return nil
}
