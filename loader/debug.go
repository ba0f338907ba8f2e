package loader

import (
	"fmt"
	"strconv"
	"strings"
)

// A DebugFlag is the value of one -D MODULE.FLAG=N.
type DebugFlag struct {
	Module, Flag string
	Value        int32
	used         bool
}

// ParseDebugFlag parses MODULE.FLAG=N. N is decimal, or hexadecimal after 0x, or
// octal after 0, and fits a C int.
func ParseDebugFlag(s string) (DebugFlag, error) {
	fail := func(cause string) (DebugFlag, error) {
		return DebugFlag{}, fmt.Errorf("parse debug flag %q: %s: need MODULE.FLAG=N, for example memory.datapath=1", s, cause)
	}
	name, value, ok := strings.Cut(s, "=")
	if !ok {
		return fail("got no =")
	}
	module, flag, _ := strings.Cut(name, ".")
	if module == "" || flag == "" {
		return fail("got no module, or no flag")
	}
	// An underscore between digits is Go's, not C's.
	n, err := strconv.ParseInt(value, 0, 32)
	if err != nil || strings.Contains(value, "_") {
		return fail(fmt.Sprintf("got %q, need a number from -2147483648 to 2147483647", value))
	}
	return DebugFlag{Module: module, Flag: flag, Value: int32(n)}, nil
}

// ApplyDebugFlags sets those of flags that name this module: for FLAG the int
// variable NAME_debug_FLAG of the library, where "." in FLAG stands for "_". It
// must come before .load. A flag without a variable is worth a warning only,
// because which there are changes from release to release.
func (m *module) ApplyDebugFlags(flags []DebugFlag) (warnings []string) {
	for i := range flags {
		f := &flags[i]
		if f.Module != m.name {
			continue
		}
		f.used = true
		symbol := m.name + "_debug_" + strings.ReplaceAll(f.Flag, ".", "_")
		if v := (*int32)(m.lib.lookup(symbol)); v != nil {
			*v = f.Value
		} else {
			warnings = append(warnings, fmt.Sprintf("-D %s.%s: %s does not contain a global variable called %s",
				f.Module, f.Flag, m.name, symbol))
		}
	}
	return warnings
}

// UnusedDebugFlags returns a warning for each flag that named no module. Call it
// once all modules have been given the flags, without those for "nbdkit".
func UnusedDebugFlags(flags []DebugFlag) (warnings []string) {
	for _, f := range flags {
		if !f.used {
			warnings = append(warnings, fmt.Sprintf("debug flag -D %s.%s was not used", f.Module, f.Flag))
		}
	}
	return warnings
}
