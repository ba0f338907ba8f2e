package nbdtls

import (
	"io"
	"net"
	"os"
	"sync"

	"golang.org/x/sys/unix"
)

// maxRecord is how many bytes of data a TLS record holds (RFC 8446, 5.1).
const maxRecord = 16 << 10

// longestRecord is what such a record takes on the wire, header and padding included
// (RFC 5246, 6.2.3).
const longestRecord = 5 + maxRecord + 2048

// corkSize is how much encrypted data leaves with one write.
const corkSize = 64 << 10

// A link is the connection below a tls.Conn. It can be read without waiting, and
// collect what is written.
type link struct {
	net.Conn

	// Of the goroutine that reads.
	trying     bool // Read does not wait, and reads the descriptor itself
	descriptor int
	more       bool // something has come: Read must not wait, even if the socket would
	drained    bool // the last read took all that was there

	mu     sync.Mutex // guards what follows; held while it is written
	corked bool
	buf    *[]byte // while corked
	err    error   // of a write while corked
}

// wouldBlock is what a Read that does not wait returns where nothing is there. To
// crypto/tls it is a timeout, after which Read may be tried again.
type wouldBlock struct{}

func (wouldBlock) Error() string   { return "no data yet" }
func (wouldBlock) Timeout() bool   { return true }
func (wouldBlock) Temporary() bool { return true }

func (l *link) Read(p []byte) (int, error) {
	if !l.trying {
		return l.Conn.Read(p)
	}
	if l.more && l.drained {
		return 0, wouldBlock{}
	}
	for {
		var n int
		var err error
		if l.more {
			n, _, err = unix.Recvfrom(l.descriptor, p, unix.MSG_DONTWAIT)
		} else {
			n, err = unix.Read(l.descriptor, p)
		}
		l.drained = n < len(p)
		switch {
		case err == unix.EINTR:
			continue
		case err == unix.EAGAIN, err == unix.ENOTSOCK: // not a pipe's first read
			return 0, wouldBlock{}
		case err != nil:
			return 0, os.NewSyscallError("receive", err)
		case n == 0 && len(p) > 0:
			return 0, io.EOF
		}
		return n, nil
	}
}

// corkBuffers are the buffers of links that are corked, so that an idle connection
// has none.
var corkBuffers = sync.Pool{New: func() any {
	b := make([]byte, 0, corkSize+2*maxRecord)
	return &b
}}

func (l *link) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if !l.corked {
		return l.Conn.Write(p)
	}
	*l.buf = append(*l.buf, p...)
	if len(*l.buf) >= corkSize {
		l.flush()
	}
	return len(p), l.err
}

func (l *link) move(nc net.Conn) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.Conn = nc
}

func (l *link) flush() {
	if l.err == nil && len(*l.buf) > 0 {
		_, l.err = l.Conn.Write(*l.buf)
	}
	*l.buf = (*l.buf)[:0]
}

// cork makes Write collect, uncork sends what was collected.
func (l *link) cork() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.corked = true
	l.buf = corkBuffers.Get().(*[]byte)
}

func (l *link) uncork() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.flush()
	l.corked = false
	corkBuffers.Put(l.buf)
	l.buf = nil
	return l.err
}
