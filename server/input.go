package server

import (
	"errors"
	"io"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"nbdhost/backend"
	"nbdhost/protocol"
)

const (
	pageSize = 4096
	// receiveSize is how far into its buffer an input receives, unless one request needs
	// more: enough for some 60 writes of 4 KiB, and still in the processor's cache.
	receiveSize = 256 << 10
	// inputSize has room behind that for the rest of a request that begins there. To
	// move what there is of one to the front costs less than to receive once more
	// where it is movable bytes at most.
	inputSize = 512 << 10
	movable   = 16 << 10
	// keptSize bounds the buffers for longer requests that are kept for the next one.
	keptSize = 3 << 20
	// lingerTime is how long linger waits, and lingerSpared how many times in a row
	// it is left out at most.
	lingerTime   = 20 * time.Microsecond
	lingerSpared = 63
)

// An input is what was received and not yet looked at. It holds no buffer while
// it waits for the client with nothing in hand.
type input struct {
	c          *conn
	secure     TLSConn // c's, or nil without TLS
	buf        *backend.Buffer
	start, end int // what is in hand: buf.B[start:end]
	head       int // size in bytes of what precedes a write's payload

	idle    func()                // before a wait with nothing in hand; nil for none
	receive func(fd uintptr) bool // one try, for RawConn.Read
	room    int                   // capacity that the next try needs
	n       int                   // what it gave
	err     error

	receives int  // since the reader has looked
	boundary bool // of two requests: more may fail with errIdle

	// Of linger: how many times it was in vain in a row, and how many more times
	// it is left out for that.
	vain, spared int
}

func (in *input) init(c *conn) {
	in.c, in.secure = c, c.secure
	in.head = protocol.RequestSize
	in.receive = in.tryReceive
}

// unread returns what is in hand.
func (in *input) unread() []byte {
	if in.buf == nil {
		return nil
	}
	return in.buf.B[in.start:in.end]
}

// take consumes n bytes of what is in hand.
func (in *input) take(n int) { in.start += n }

func (in *input) release() {
	in.buf.Release()
	in.buf = nil
	in.start, in.end = 0, 0
}

// need waits until at least n bytes are in hand, which is at most the largest
// buffer, and returns all of them, contiguous. An end before the first byte is
// io.EOF, one between is io.ErrUnexpectedEOF.
func (in *input) need(n int) ([]byte, error) {
	for in.end-in.start < n {
		if err := in.more(n); err != nil {
			if err == io.EOF && in.end > in.start {
				err = io.ErrUnexpectedEOF
			}
			return nil, err
		}
	}
	return in.unread(), nil
}

// discard consumes n bytes, received already or not.
func (in *input) discard(n uint64) error {
	for n > 0 {
		p, err := in.need(1)
		if err != nil {
			return err
		}
		skip := min(n, uint64(len(p)))
		in.take(int(skip))
		n -= skip
	}
	return nil
}

// more receives once, at least a byte, into a buffer with room for n bytes in
// hand.
func (in *input) more(n int) error {
	in.room = n
	in.receives++
	if in.buf != nil && in.start == in.end {
		in.rewind()
	}
	for in.c.sock.hot() {
		if err := in.makeRoom(); err != nil {
			return err
		}
		if in.end > in.start && in.secure == nil {
			in.linger()
		}
		got, err := in.receiveOnce(uintptr(in.c.sock.fd))
		switch {
		case err == unix.EINTR:
		case err == unix.EAGAIN: // nothing came for hotWait
			in.c.cool()
		case err == io.EOF || err == nil && got == 0:
			return io.EOF
		case err != nil:
			return os.NewSyscallError("recv", err)
		default:
			in.end += got
			return nil
		}
	}
	if in.c.sock.raw == nil {
		if err := in.makeRoom(); err != nil {
			return err
		}
		got, err := in.c.stream().Read(in.window())
		in.end += got
		if got > 0 {
			return nil
		}
		return err
	}
	for {
		err := in.c.sock.raw.Read(in.receive)
		if err == nil {
			break
		}
		if !errors.Is(err, os.ErrDeadlineExceeded) || !in.c.rested() {
			return err
		}
		if in.boundary {
			return errIdle
		}
	}
	if in.err != nil {
		return in.err
	}
	if in.n == 0 {
		return io.EOF
	}
	in.end += in.n
	return nil
}

// linger waits on a hot socket for the rest of a request without sleeping, for
// lingerTime at most, and gives the processor to whoever wants it meanwhile: often that
// is the client, which is just sending the rest. To sleep and be woken takes longer.
// Where it was in vain it is left out for a while.
func (in *input) linger() {
	if in.spared > 0 {
		in.spared--
		return
	}
	for began := now(); now()-began < lingerTime; {
		if readable(uintptr(in.c.sock.fd)) {
			in.vain = 0
			return
		}
		unix.RawSyscallNoError(unix.SYS_SCHED_YIELD, 0, 0, 0)
	}
	in.vain = min(2*in.vain+1, lingerSpared)
	in.spared = in.vain
}

// rewind goes back to the front of an empty buffer: a page less a header, so
// that the payload of a write that comes first lies on a page.
func (in *input) rewind() {
	in.start = pageSize - in.head
	in.end = in.start
}

// tryReceive receives without waiting; false makes RawConn.Read wait and try
// again. An idle connection gives its buffer back before it waits. It must be
// tried again after RawConn.Read has looked at the descriptor, never before:
// the poller reports each change once.
func (in *input) tryReceive(fd uintptr) bool {
	if in.err = in.makeRoom(); in.err != nil {
		return true
	}
	for {
		in.n, in.err = in.receiveOnce(fd)
		switch in.err {
		case unix.EINTR:
			continue
		case unix.EAGAIN:
			if in.start == in.end {
				in.release()
				if in.idle != nil {
					in.idle()
				}
				if in.boundary {
					in.c.rest()
				}
			}
			return false
		case nil:
		case io.EOF:
			in.err = nil // TLS has an end of its own
		default:
			in.err = os.NewSyscallError("receive", in.err)
		}
		return true
	}
}

// makeRoom provides a buffer with room for in.room bytes in hand.
func (in *input) makeRoom() error {
	if in.buf == nil {
		b, err := backend.GetBuffer(max(inputSize, pageSize+in.room))
		if err != nil {
			return err
		}
		in.buf = b
		in.rewind()
		return nil
	}
	have, fits := in.unread(), in.start+in.room <= len(in.buf.B)
	switch {
	case in.start+in.room <= receiveSize:
		return nil
	case in.room <= len(in.buf.B) && in.start > len(have) && (!fits || len(have) <= movable):
		in.end = copy(in.buf.B, have)
		in.start = 0
		return nil
	case fits:
		return nil
	}
	// The request is larger than the buffer: one of its own.
	b, err := backend.GetBuffer(pageSize + in.room)
	if err != nil {
		return err
	}
	old := in.buf
	in.buf = b
	in.rewind()
	in.end += copy(b.B[in.start:], have)
	old.Release()
	return nil
}

// window is where the next receive goes: no further than receiveSize, or to the end of the one
// request that needs more, so that none which follows it has to be moved.
func (in *input) window() []byte {
	return in.buf.B[in.end:min(max(receiveSize, in.start+in.room), len(in.buf.B))]
}

// shrink gives an empty buffer back that was made for a large request, unless the last one
// brought so many bytes that the next may well need it again.
func (in *input) shrink(last uint64) {
	if in.buf == nil || in.start < in.end || len(in.buf.B) <= inputSize {
		return
	}
	if pageSize+last <= inputSize || len(in.buf.B) > keptSize {
		in.release()
	}
}

// part gives the buffer away with the first n bytes in hand. What lies behind them goes to
// another one, which is as large: such requests come one after the other.
func (in *input) part(n int) (p []byte, b *backend.Buffer, err error) {
	rest := in.unread()[n:]
	size := len(in.buf.B)
	if size > keptSize {
		size = max(inputSize, pageSize+len(rest))
	}
	next, err := backend.GetBuffer(size)
	if err != nil {
		return nil, nil, err
	}
	p, b, in.buf = in.unread()[:n], in.buf, next
	in.rewind()
	in.end += copy(next.B[in.start:], rest)
	return p, b, nil
}

// handOver gives what is in hand to to, and leaves the buffer to the caller: a
// call that is under way is using it.
func (in *input) handOver(to *input) error {
	if in.start == in.end {
		return nil
	}
	to.room = in.end - in.start
	if err := to.makeRoom(); err != nil {
		return err
	}
	to.end += copy(to.buf.B[to.start:], in.unread())
	in.end = in.start
	return nil
}
