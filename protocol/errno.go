package protocol

import (
	"errors"
	"fmt"
	"syscall"
)

// Errno is an error number on the wire ("Error values"). It is not the
// operating system's, although the numbers are Linux's.
type Errno uint32

// The error numbers that a reply may carry.
const (
	EPERM     Errno = 1
	EIO       Errno = 5
	ENOMEM    Errno = 12
	EINVAL    Errno = 22
	ENOSPC    Errno = 28
	EOVERFLOW Errno = 75
	ENOTSUP   Errno = 95
	ESHUTDOWN Errno = 108
)

// String gives the specification's name, such as NBD_EPERM; 0 gives "0".
func (e Errno) String() string {
	switch e {
	case 0:
		return "0"
	case EPERM:
		return "NBD_EPERM"
	case EIO:
		return "NBD_EIO"
	case ENOMEM:
		return "NBD_ENOMEM"
	case EINVAL:
		return "NBD_EINVAL"
	case ENOSPC:
		return "NBD_ENOSPC"
	case EOVERFLOW:
		return "NBD_EOVERFLOW"
	case ENOTSUP:
		return "NBD_ENOTSUP"
	case ESHUTDOWN:
		return "NBD_ESHUTDOWN"
	}
	return fmt.Sprintf("NBD_ERRNO(%d)", uint32(e))
}

// Syscall is the operating system's error of the same meaning. A number that
// the specification does not have means EINVAL, as it asks of clients.
func (e Errno) Syscall() syscall.Errno {
	switch e {
	case 0:
		return 0
	case EPERM:
		return syscall.EPERM
	case EIO:
		return syscall.EIO
	case ENOMEM:
		return syscall.ENOMEM
	case ENOSPC:
		return syscall.ENOSPC
	case EOVERFLOW:
		return syscall.EOVERFLOW
	case ENOTSUP:
		return syscall.ENOTSUP
	case ESHUTDOWN:
		return syscall.ESHUTDOWN
	}
	return syscall.EINVAL
}

// ErrnoOf is the error number on the wire for err: that of a *RequestError, or
// of the syscall.Errno in err's tree, or EIO if there is neither. nil gives 0.
func ErrnoOf(err error) Errno {
	if err == nil {
		return 0
	}
	var refused *RequestError
	if errors.As(err, &refused) {
		return refused.Errno
	}
	var errno syscall.Errno
	if !errors.As(err, &errno) {
		return EIO
	}
	switch errno {
	case 0:
		return EIO // a failure without a number is still a failure
	case syscall.EPERM, syscall.EROFS:
		return EPERM
	case syscall.EIO:
		return EIO
	case syscall.ENOMEM:
		return ENOMEM
	case syscall.ENOSPC, syscall.EDQUOT, syscall.EFBIG:
		return ENOSPC
	case syscall.EOVERFLOW:
		return EOVERFLOW
	case syscall.ENOTSUP:
		return ENOTSUP
	case syscall.ESHUTDOWN:
		return ESHUTDOWN
	}
	return EINVAL
}

// ErrnoFor is ErrnoOf for the reply to a request with these flags: clients
// expect ENOTSUP only of a fast zero, and EOVERFLOW only of a read that must
// not be fragmented. Elsewhere both become EINVAL.
func ErrnoFor(err error, flags CommandFlags) Errno {
	errno := ErrnoOf(err)
	if errno == ENOTSUP && flags&CmdFlagFastZero == 0 || errno == EOVERFLOW && flags&CmdFlagDF == 0 {
		return EINVAL
	}
	return errno
}
