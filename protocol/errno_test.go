package protocol

import (
	"errors"
	"fmt"
	"io/fs"
	"syscall"
	"testing"
)

func TestErrnoOf(t *testing.T) {
	tests := []struct {
		err  error
		want Errno
	}{
		{nil, 0},
		{errors.New("no number"), EIO},
		{syscall.Errno(0), EIO},
		{syscall.EPERM, EPERM}, {syscall.EROFS, EPERM},
		{syscall.EIO, EIO}, {syscall.ENOMEM, ENOMEM},
		{syscall.ENOSPC, ENOSPC}, {syscall.EDQUOT, ENOSPC}, {syscall.EFBIG, ENOSPC},
		{syscall.EOVERFLOW, EOVERFLOW}, {syscall.ENOTSUP, ENOTSUP}, {syscall.EOPNOTSUPP, ENOTSUP},
		{syscall.ESHUTDOWN, ESHUTDOWN},
		{syscall.EINVAL, EINVAL}, {syscall.EACCES, EINVAL}, {syscall.ENOENT, EINVAL}, {syscall.EBADF, EINVAL},
		{fmt.Errorf("deep: %w", &fs.PathError{Op: "read", Path: "x", Err: syscall.ENOSPC}), ENOSPC},
		{fmt.Errorf("deep: %w", &RequestError{Command: CmdRead, Errno: ENOMEM}), ENOMEM},
	}
	for _, test := range tests {
		if got := ErrnoOf(test.err); got != test.want {
			t.Errorf("%v: got %v, need %v", test.err, got, test.want)
		}
	}
}

func TestErrnoFor(t *testing.T) {
	tests := []struct {
		err   error
		flags CommandFlags
		want  Errno
	}{
		{nil, 0, 0},
		{syscall.ENOSPC, 0, ENOSPC},
		{syscall.ENOTSUP, 0, EINVAL}, {syscall.ENOTSUP, CmdFlagDF, EINVAL}, {syscall.ENOTSUP, CmdFlagFastZero | CmdFlagFUA, ENOTSUP},
		{syscall.EOVERFLOW, 0, EINVAL}, {syscall.EOVERFLOW, CmdFlagFastZero, EINVAL}, {syscall.EOVERFLOW, CmdFlagDF, EOVERFLOW},
	}
	for _, test := range tests {
		if got := ErrnoFor(test.err, test.flags); got != test.want {
			t.Errorf("%v with %v: got %v, need %v", test.err, test.flags, got, test.want)
		}
	}
}

func TestErrnoSyscall(t *testing.T) {
	for _, e := range []Errno{EPERM, EIO, ENOMEM, EINVAL, ENOSPC, EOVERFLOW, ENOTSUP, ESHUTDOWN} {
		if got := ErrnoOf(e.Syscall()); got != e {
			t.Errorf("%v: got %v back", e, got)
		}
	}
	if got := Errno(2).Syscall(); got != syscall.EINVAL {
		t.Errorf("unknown: got %v, need EINVAL", got)
	}
	if got := Errno(0).Syscall(); got != 0 {
		t.Errorf("0: got %v", got)
	}
}
