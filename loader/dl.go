package loader

import (
	"debug/elf"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"unsafe"

	"github.com/ebitengine/purego"

	"nbdhost/cshim"
)

// A library is what dlopen(3) returned. It is never closed.
type library uintptr

// dlopen loads a shared library and all it needs, with every symbol resolved now
// and visible to what is loaded later, as language plugins need it for theirs.
func dlopen(path string) (library, error) {
	if err := checkELF(path); err != nil {
		return 0, err
	}
	if !strings.Contains(path, "/") {
		path = "./" + path // or dlopen would search the system's libraries
	}
	// The text of an error belongs to the thread of the call.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	h, err := purego.Dlopen(path, purego.RTLD_NOW|purego.RTLD_GLOBAL)
	if err != nil {
		return 0, explain(err.Error())
	}
	return library(h), nil
}

// lookup returns the address of a symbol, nil if there is none.
func (l library) lookup(symbol string) unsafe.Pointer {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	addr, err := purego.Dlsym(uintptr(l), symbol)
	if err != nil {
		return nil
	}
	return cshim.Fn(addr)
}

// call calls a function without parameters that returns a pointer.
func call(fn unsafe.Pointer) unsafe.Pointer {
	r, _, _ := purego.SyscallN(uintptr(fn))
	return cshim.Fn(r)
}

// flushC writes out what C code has printed to its standard output.
func flushC() {
	if fflush := library(purego.RTLD_DEFAULT).lookup("fflush"); fflush != nil {
		_, _, _ = purego.SyscallN(uintptr(fflush), 0) // 0: all streams
	}
}

// machines are the ELF names of the architectures.
var machines = map[string]elf.Machine{
	"386": elf.EM_386, "amd64": elf.EM_X86_64, "arm": elf.EM_ARM, "arm64": elf.EM_AARCH64,
	"loong64": elf.EM_LOONGARCH, "mips64le": elf.EM_MIPS, "ppc64le": elf.EM_PPC64,
	"riscv64": elf.EM_RISCV, "s390x": elf.EM_S390,
}

// checkELF refuses what dlopen cannot load, in clearer words than its own.
func checkELF(path string) error {
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("%w: need a file that exists, or a plugin's name without . and /", ErrNotFound)
	} else if err != nil {
		return errors.Unwrap(err) // the path is in the message already
	}
	defer f.Close()
	if st, err := f.Stat(); err != nil {
		return err
	} else if !st.Mode().IsRegular() {
		return fmt.Errorf("%w: got a %s, need a file", ErrNotELF, fileType(st.Mode()))
	}
	var magic [4]byte
	if n, _ := io.ReadFull(f, magic[:]); n == 0 {
		return fmt.Errorf("%w: the file is empty: install it again", ErrNotELF)
	} else if string(magic[:]) != elf.ELFMAG {
		if string(magic[:2]) == "#!" {
			return fmt.Errorf("%w: got a script: need a .so file, or the name of the script's language before the script (for example: nbdhost python %s)", ErrNotELF, path)
		}
		return fmt.Errorf("%w: the file begins with %q, need %q: give the name or the path of a plugin first; to serve a file: nbdhost file %s",
			ErrNotELF, magic[:n], elf.ELFMAG, path)
	}
	e, err := elf.NewFile(f)
	if err != nil {
		return fmt.Errorf("%w: the file is cut short or damaged: install it again: %w", ErrNotELF, err)
	}
	if want, ok := machines[runtime.GOARCH]; ok && e.Machine != want {
		return fmt.Errorf("%w: got %v, need %v", ErrNotELF, e.Machine, want)
	}
	if e.Type != elf.ET_DYN {
		return fmt.Errorf("%w: got type %v, need %v: link it with -shared", ErrNotELF, e.Type, elf.ET_DYN)
	}
	return nil
}

func fileType(m fs.FileMode) string {
	switch {
	case m.IsDir():
		return "directory"
	case m&fs.ModeDevice != 0:
		return "device"
	}
	return "special file"
}

// explain turns the text of dlerror(3) into an error that says what to do. The
// texts are those of glibc; any other is passed on as it is.
func explain(text string) error {
	if _, symbol, ok := strings.Cut(text, "undefined symbol: "); ok {
		if strings.HasPrefix(symbol, "nbdkit_") {
			return fmt.Errorf("%w %s: the module was built for a later release of nbdkit than this program knows: need a newer nbdhost", ErrMissingSymbol, symbol)
		}
		return fmt.Errorf("%w %s: install or link the library that has it", ErrMissingSymbol, symbol)
	}
	if strings.Contains(text, "static TLS") {
		return fmt.Errorf("%w: start again with GLIBC_TUNABLES=glibc.rtld.optional_static_tls=4096 (or more) in the environment: %s", ErrStaticTLS, text)
	}
	if lib, _, ok := strings.Cut(text, ": cannot open shared object file"); ok {
		return fmt.Errorf("%w: %s: install the package that has it", ErrMissingLibrary, lib)
	}
	return errors.New(text)
}

// realPath is the path without symbolic links, as nbdkit_realpath gives it.
func realPath(path string) string {
	if abs, err := filepath.Abs(path); err == nil {
		path = abs
	}
	if real, err := filepath.EvalSymlinks(path); err == nil {
		return real
	}
	return path
}
