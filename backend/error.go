package backend

import (
	"fmt"
	"syscall"
)

// An Error is a callback of a module that failed.
type Error struct {
	Module string        // which the error is from, for example "file"; not always the one that was called
	Op     string        // the callback, for example "pread"
	Errno  syscall.Errno // never 0
	Msg    string        // the text of the call's last nbdkit_error, or ""
}

func (e *Error) Error() string {
	if e.Msg == "" {
		return fmt.Sprintf("%s: %s: %v", e.Module, e.Op, e.Errno)
	}
	return fmt.Sprintf("%s: %s: %s", e.Module, e.Op, e.Msg)
}

// Unwrap lets errors.As find the errno.
func (e *Error) Unwrap() error { return e.Errno }
