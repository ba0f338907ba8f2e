package loader

import (
	"errors"

	"nbdhost/abi"
)

// An Error says which module could not be found, opened or used, and why. Err
// is or wraps one of the sentinels below, where one of them fits.
type Error struct {
	Op   string // "find plugin", "open plugin", and the same of a filter
	Path string // the file, or the name that was looked up
	Err  error
}

func (e *Error) Error() string { return e.Op + " " + e.Path + ": " + e.Err.Error() }

// Unwrap returns Err.
func (e *Error) Unwrap() error { return e.Err }

// What can be wrong with a module.
var (
	ErrNotFound        = errors.New("not found")
	ErrNotELF          = errors.New("not a shared library for this machine")
	ErrNotModule       = errors.New("not a plugin")
	ErrNotFilter       = errors.New("not a filter")
	ErrMissingLibrary  = errors.New("a library that it needs is missing")
	ErrMissingSymbol   = errors.New("missing symbol")
	ErrStaticTLS       = errors.New("no memory left for thread-local variables of libraries")
	ErrVersion         = abi.ErrAPIVersion
	ErrFilterRelease   = abi.ErrFilterRelease
	ErrInUse           = errors.New("the plugin is in use")
	ErrMissingCallback = errors.New("missing callback")
	ErrInvalid         = errors.New("invalid struct of the module")
	ErrStructSize      = abi.ErrStructSize
)
