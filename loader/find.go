package loader

import (
	"bufio"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
)

// Kind is what a module is.
type Kind int

// The kinds of modules.
const (
	PluginKind Kind = iota
	FilterKind
)

func (k Kind) String() string {
	if k == FilterKind {
		return "filter"
	}
	return "plugin"
}

// Found is where a module is.
type Found struct {
	Path string // of the shared library
	// Script is the script that the plugin is to run, or "". It is handed to
	// the plugin as if it were the first parameter without a key, which means
	// script=PATH where the plugin has no magic key.
	Script string
}

// Find finds a module. A name with a "/" or a "." in it is the path of a shared
// library. Any other is looked up as nbdkit-NAME-plugin.so or nbdkit-NAME-filter.so
// in the directories that dirs lists (each may be several, separated by colons),
// then in those of the environment variable NBDHOST_PLUGIN_PATH or
// NBDHOST_FILTER_PATH, then where distributions install nbdkit's modules.
//
// A plugin may also be a script, nbdkit-NAME-plugin, whose first line is
// "#!/usr/sbin/nbdkit LANGUAGE": the plugin found is then that of the language.
//
// The error is an [*Error] over [ErrNotFound] or what the system said.
func Find(kind Kind, name string, dirs ...string) (Found, error) {
	fail := func(format string, args ...any) (Found, error) {
		return Found{}, &Error{Op: "find " + kind.String(), Path: name, Err: fmt.Errorf(format, args...)}
	}
	switch _, err := os.Stat(name); {
	case name == "":
		return fail("%w: got an empty name: need the name or the path of a %v", ErrNotFound, kind)
	case !notThere(err):
	case strings.Contains(name, "://"):
		return fail("%w: got a URL: need the name of a plugin before it (nbdhost curl %s)", ErrNotFound, name)
	case kind == PluginKind && strings.HasPrefix(name, "@"):
		return fail("%w: a file of arguments has a / in its name (@./%s)", ErrNotFound, name[1:])
	case kind == PluginKind && strings.Contains(name, "="):
		return fail("%w: got a parameter: need the name of a plugin before it", ErrNotFound)
	case kind == FilterKind && strings.Contains(name, ","):
		return fail("%w: give --filter once for each of them", ErrNotFound)
	}
	if strings.ContainsAny(name, "/.") {
		return Found{Path: name}, nil
	}
	path := searchPath(kind, dirs)
	for _, dir := range path {
		base := filepath.Join(dir, "nbdkit-"+name+"-"+kind.String())
		if _, err := os.Stat(base + ".so"); err == nil {
			return Found{Path: base + ".so"}, nil
		} else if !notThere(err) {
			return fail("%w", err)
		}
		if kind != PluginKind {
			continue
		}
		language, err := interpreter(base)
		if notThere(err) {
			continue
		} else if err != nil {
			return fail("%w", err)
		}
		found, err := Find(kind, language, dirs...)
		if err == nil && found.Script != "" {
			return fail("%s is a script for %s, which is a script itself: need a script for a plugin that is a shared library", base, language)
		}
		found.Script = base
		return found, err
	}
	usual := searchPath(kind, nil)
	var looked []string
	for _, dir := range path {
		if _, err := os.Stat(dir); err == nil {
			looked = append(looked, dir)
		} else if !slices.Contains(usual, dir) { // somebody means this one
			looked = append(looked, fmt.Sprintf("%s (%v)", dir, errors.Unwrap(err)))
		}
	}
	if len(looked) == 0 {
		looked = path
	}
	return fail("%w: looked in %s: %s", ErrNotFound, strings.Join(looked, ", "), advise(kind, name, path))
}

// notThere tells whether a file is absent, for whatever reason.
func notThere(err error) bool {
	return errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ENOTDIR)
}

// interpreter returns the plugin named by the first line of a script.
func interpreter(script string) (string, error) {
	f, err := os.Open(script)
	if err != nil {
		return "", err
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return "", err
	}
	// The kernel reads no more of the line than 256 bytes.
	line, _ := bufio.NewReaderSize(f, 256).ReadSlice('\n')
	command, language, _ := strings.Cut(strings.TrimSpace(strings.TrimPrefix(string(line), "#!")), " ")
	language = strings.TrimSpace(language)
	program := filepath.Base(command)
	switch {
	case !strings.HasPrefix(string(line), "#!"), program != "nbdkit" && program != "nbdhost",
		language == "", strings.ContainsAny(language, " \t/."):
		return "", fmt.Errorf("read %s: got the first line %q: need \"#!/usr/sbin/nbdkit LANGUAGE\"", script, strings.TrimSpace(string(line)))
	case st.Mode()&0o111 == 0:
		return "", fmt.Errorf("read %s: the script is not executable: need the permission (chmod +x)", script)
	}
	return language, nil
}

// Directory returns where modules are, or would be, if no other directory is given.
func Directory(kind Kind) string {
	path := searchPath(kind, nil)
	for _, dir := range path {
		if st, err := os.Stat(dir); err == nil && st.IsDir() {
			return dir
		}
	}
	return path[0]
}

// triplets are Debian's names of architectures in directories.
var triplets = map[string]string{
	"386": "i386-linux-gnu", "amd64": "x86_64-linux-gnu", "arm": "arm-linux-gnueabihf",
	"arm64": "aarch64-linux-gnu", "loong64": "loongarch64-linux-gnu",
	"mips64le": "mips64el-linux-gnuabi64", "ppc64le": "powerpc64le-linux-gnu",
	"riscv64": "riscv64-linux-gnu", "s390x": "s390x-linux-gnu",
}

// searchPath returns the directories to look in, first to last.
func searchPath(kind Kind, dirs []string) []string {
	var path []string
	add := func(list string) {
		for dir := range strings.SplitSeq(list, ":") {
			if dir != "" && !slices.Contains(path, dir) {
				path = append(path, dir)
			}
		}
	}
	for _, list := range dirs {
		add(list)
	}
	add(os.Getenv("NBDHOST_" + strings.ToUpper(kind.String()) + "_PATH"))
	for _, prefix := range []string{"/usr", "/usr/local"} {
		for _, lib := range []string{"lib/" + triplets[runtime.GOARCH], "lib64", "lib"} {
			add(filepath.Join(prefix, lib, "nbdkit", kind.String()+"s"))
		}
	}
	return path
}

// Installed returns the names of the modules that [Find] finds with these
// directories, in order.
func Installed(kind Kind, dirs ...string) []string { return installed(kind, searchPath(kind, dirs)) }

func installed(kind Kind, path []string) (names []string) {
	for _, dir := range path {
		entries, _ := os.ReadDir(dir) // one that cannot be read has nothing to offer
		for _, e := range entries {
			base, isLibrary := strings.CutSuffix(e.Name(), ".so")
			name, ok := strings.CutPrefix(base, "nbdkit-")
			name, isKind := strings.CutSuffix(name, "-"+kind.String())
			if ok && isKind && (isLibrary || kind == PluginKind) {
				names = append(names, name)
			}
		}
	}
	slices.Sort(names)
	return slices.Compact(names)
}

// advise says what to do about a name that was not found.
func advise(kind Kind, name string, path []string) string {
	if other := PluginKind + FilterKind - kind; slices.Contains(Installed(other), name) {
		if other == FilterKind {
			return fmt.Sprintf("%s is a filter: put it before a plugin with --filter=%s", name, name)
		}
		return name + " is a plugin: give it without --filter"
	}
	names := installed(kind, path)
	if pkg := debianPackage(kind, name); pkg != "" {
		if len(names) > 0 && pkg == debianBase {
			return fmt.Sprintf("this release of the package %s does not have it: install a newer one, give the directory with --%v-path, or give the path of a .so file", pkg, kind)
		}
		return fmt.Sprintf("the package that has it on Debian is %s (apt-get install %s)", pkg, pkg)
	}
	if near := Nearest(name, names); len(near) > 0 {
		return "did you mean " + strings.Join(near, " or ") + "?"
	}
	if len(names) == 0 {
		return fmt.Sprintf("no %v is there: install the nbdkit package of your distribution, give the directory with --%v-path, or give the path of a .so file", kind, kind)
	}
	perhaps := ""
	if kind == PluginKind {
		perhaps = " (perhaps nbdkit-plugin-" + name + ")"
	}
	return fmt.Sprintf("install the package that has it%s, give its directory with --%v-path, or give the path of a .so file", perhaps, kind)
}

// Nearest returns those of names that a slip of the keyboard may have meant, at
// most three, the nearest first: names that differ in few letters, and those
// that begin with name.
func Nearest(name string, names []string) (nearest []string) {
	distances := map[string]int{}
	for _, n := range names {
		d := distance(strings.ToLower(name), strings.ToLower(n))
		if d <= max(1, len(name)/3) || name != "" && strings.HasPrefix(n, name) {
			distances[n] = d
			nearest = append(nearest, n)
		}
	}
	slices.SortStableFunc(nearest, func(a, b string) int { return distances[a] - distances[b] })
	return nearest[:min(3, len(nearest))]
}

// distance counts the letters to insert, delete or replace to make b of a.
func distance(a, b string) int {
	row := make([]int, len(b)+1) // row[j]: from the first i letters of a to the first j of b
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diagonal := row[0]
		row[0] = i + 1
		for j := range len(b) {
			cost := diagonal
			if a[i] != b[j] {
				cost++
			}
			diagonal = row[j+1]
			row[j+1] = min(cost, row[j]+1, diagonal+1)
		}
	}
	return row[len(b)]
}
