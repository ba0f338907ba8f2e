package nbdtls

import (
	"errors"
	"fmt"
	"io"
	"net"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"unsafe"

	"github.com/ebitengine/purego"
	"golang.org/x/sys/unix"
)

// A session is a Conn of GnuTLS's. The library sends and receives on the
// descriptor of the connection below, and only while syscall.RawConn says that it
// is open.
type session struct {
	net.Conn // below: addresses and deadlines
	raw      syscall.RawConn
	g        *gnutls
	creds    *credentials // kept alive as long as the session is
	peer
	desc string

	// One of the two directions each. Close holds both to free the session; then
	// handle is 0.
	reading, writing sync.Mutex
	handle           handle

	// What GnuTLS said after some data, to be told at the next read: it would not
	// say it again. Guarded by reading.
	ended bool
	end   int32

	// Of the Write under way. Guarded by writing.
	unsent  []byte
	failed  error
	trySend func(fd uintptr) bool // send, for RawConn.Write
}

func (c *credentials) handshake(nc net.Conn) (Conn, error) {
	s, err := c.newSession(nc, gnutlsServer|gnutlsNoTickets)
	if err != nil {
		return nil, err
	}
	if c.verify {
		c.g.certificate_server_set_request(s.handle, gnutlsRequire)
		c.g.session_set_verify_cert2(s.handle, c.g.forClients, 1, 0)
	}
	if c.keys != nil {
		shaking.Store(s.handle, c.keys)
		defer shaking.Delete(s.handle)
	}
	return s.shake()
}

// newSession makes a session that nobody but the caller knows.
func (c *credentials) newSession(nc net.Conn, flags uint32) (*session, error) {
	s := &session{g: c.g, creds: c}
	s.trySend = s.send
	g := c.g
	if err := g.errorOf(g.init(&s.handle, flags|gnutlsNonblock|gnutlsNoSignal)); err != nil {
		return nil, err
	}
	err := g.errorOf(g.priority_set(s.handle, c.priority))
	if err == nil {
		err = g.errorOf(g.credentials_set(s.handle, c.kind, c.handle))
	}
	if err == nil {
		g.handshake_set_timeout(s.handle, 0) // the connection's deadlines do that
		err = s.Move(nc)
	}
	if err != nil {
		s.free()
		return nil, err
	}
	return s, nil
}

// shake does the handshake, and frees the session if it fails.
func (s *session) shake() (Conn, error) {
	var code int32
	for done := false; !done; {
		// Each try is made inside the wait: an event between a try and the
		// wait after it would be lost.
		wait, direction := s.raw.Read, s.g.record_get_direction(s.handle)
		if direction == gnutlsWriting {
			wait = s.raw.Write
		}
		err := wait(func(fd uintptr) bool {
			for {
				code = s.g.handshake(s.handle)
				if !again(code, fd) {
					break
				}
			}
			done = code != gnutlsAgain
			return done || s.g.record_get_direction(s.handle) != direction
		})
		if err != nil {
			s.free()
			return nil, err
		}
	}
	if code < 0 {
		err := s.failure(code)
		if code != gnutlsFatalAlert {
			// The peer gets to know, if it can take it at once.
			_ = s.raw.Control(func(uintptr) { s.g.alert_send_appropriate(s.handle, code) })
		}
		s.free()
		return nil, err
	}
	if desc := s.g.session_get_desc(s.handle); desc != nil {
		s.desc = goString(desc)
		s.g.free(desc)
	}
	if err := s.learnPeer(); err != nil {
		s.free()
		return nil, err
	}
	return s, nil
}

func (s *session) learnPeer() (err error) {
	if der := s.peerCertificate(); der != nil {
		s.peer, err = peerOf(der)
	}
	return err
}

// peerCertificate is the peer's in DER, nil if it showed none.
func (s *session) peerCertificate() []byte {
	var n uint32
	certs := s.g.certificate_get_peers(s.handle, &n)
	if certs == nil || n == 0 {
		return nil
	}
	return certs.bytes()
}

// failure is the error of a code that ends the session.
func (s *session) failure(code int32) error {
	text := s.g.text(code)
	switch code {
	case gnutlsFatalAlert:
		text = "the peer sent an alert: " + s.g.alert_get_name(s.g.alert_get(s.handle))
	case gnutlsRehandshake:
		text = "the peer asks for a renegotiation: need a new connection instead"
	case gnutlsNoCert, gnutlsCertRequired:
		text += ": the client showed none: need one that an authority in " + caCert + " issued"
	case gnutlsUnverified:
		var out datum
		status := s.g.session_get_verify_cert_status(s.handle)
		if s.g.certificate_verification_status_print(status, gnutlsX509, &out, 0) == 0 {
			text += ": " + strings.TrimSpace(string(out.bytes()))
			s.g.free(out.data)
		}
		if o, err := outlineOf(s.peerCertificate()); err == nil {
			// Nobody has signed this name, perhaps.
			text = fmt.Sprintf("certificate of %q (serial %x): %s", distinguishedName(o.Subject.FullBytes), o.SerialNumber, text)
		}
	}
	return errors.New(text)
}

func (s *session) Move(nc net.Conn) error {
	var sc syscall.Conn
	switch nc := nc.(type) { // as package server: what wraps a socket may do more than it does
	case *net.TCPConn:
		sc = nc
	case *net.UnixConn:
		sc = nc
	case interface {
		syscall.Conn
		Socket()
	}:
		sc = nc
	default:
		return fmt.Errorf("use TLS on a %T: need a socket", nc)
	}
	raw, err := sc.SyscallConn()
	if err != nil {
		return err
	}
	s.Conn, s.raw = nc, raw
	return raw.Control(func(fd uintptr) { s.g.transport_set_int2(s.handle, int32(fd), int32(fd)) })
}

func (s *session) Description() string { return s.desc }

func (s *session) free() {
	s.g.deinit(s.handle)
	s.handle = 0
}

// move calls gnutls_record_recv or gnutls_record_send.
func (s *session) move(function uintptr, p []byte) int32 {
	var pinner runtime.Pinner
	start := unsafe.SliceData(p)
	pinner.Pin(start)
	n, _, _ := purego.SyscallN(function, uintptr(s.handle), uintptr(unsafe.Pointer(start)), uintptr(len(p)))
	pinner.Unpin()
	return int32(n)
}

// again tells whether a call that returned code is to be made again at once. It is
// where GnuTLS wants to wait although there is more to receive: it does so after
// messages that are no data, and the poller reports each arrival but once.
func again(code int32, fd uintptr) bool {
	switch code {
	case gnutlsInterrupted, gnutlsWarningAlert:
		return true
	case gnutlsAgain:
		_, _, err := unix.Recvfrom(int(fd), make([]byte, 1), unix.MSG_PEEK|unix.MSG_DONTWAIT)
		return err != unix.EAGAIN
	}
	return false
}

// receive reads a record, or what p takes of it, without waiting. The caller holds
// reading.
func (s *session) receive(fd uintptr, p []byte) (int, error) {
	if s.handle == 0 {
		return 0, net.ErrClosed
	}
	for {
		n := s.end
		if !s.ended {
			n = s.move(s.g.record_recv, p)
		}
		s.ended = false
		switch {
		case n > 0:
			return int(n), nil
		case again(n, fd):
		case n == gnutlsAgain:
			return 0, unix.EAGAIN
		case n == 0 || n == gnutlsPremature: // where the stream may end NBD knows
			return 0, io.EOF
		default:
			return 0, fmt.Errorf("receive with TLS: %w", s.failure(n))
		}
	}
}

func (s *session) TryRead(fd uintptr, p []byte) (int, error) {
	s.reading.Lock()
	defer s.reading.Unlock()
	n, err := s.receive(fd, p)
	if err != nil {
		return 0, err
	}
	there := 0 // bytes that the socket holds, at least
	for n < len(p) {
		if there < longestRecord {
			// A socket that blocks is not to be asked for more than it has.
			if there, err = unix.IoctlGetInt(int(fd), unix.SIOCINQ); there <= 0 || err != nil {
				break
			}
		}
		got := s.move(s.g.record_recv, p[n:])
		if got <= 0 {
			s.ended, s.end = got != gnutlsAgain, got
			break
		}
		n += int(got)
		there -= longestRecord - maxRecord + int(got)
	}
	return n, nil
}

func (s *session) Read(p []byte) (n int, err error) {
	if len(p) == 0 {
		return 0, nil
	}
	s.reading.Lock()
	defer s.reading.Unlock()
	failed := s.raw.Read(func(fd uintptr) bool {
		n, err = s.receive(fd, p)
		return err != unix.EAGAIN
	})
	if failed != nil {
		return 0, failed
	}
	return n, err
}

func (s *session) Write(p []byte) (written int, err error) {
	s.writing.Lock()
	defer s.writing.Unlock()
	s.unsent, s.failed = p, nil
	err = s.raw.Write(s.trySend)
	if s.failed != nil {
		err = s.failed
	}
	written = len(p) - len(s.unsent)
	s.unsent = nil
	return written, err
}

// send sends what is unsent, record by record, and returns false where it would have
// to wait for the peer. The next try has to be with the same record then.
func (s *session) send(uintptr) bool {
	for len(s.unsent) > 0 {
		if s.handle == 0 {
			s.failed = net.ErrClosed
			return true
		}
		n := s.move(s.g.record_send, s.unsent[:min(len(s.unsent), maxRecord)])
		switch {
		case n >= 0:
			s.unsent = s.unsent[n:]
		case n == gnutlsAgain:
			return false
		case n != gnutlsInterrupted && n != gnutlsWarningAlert:
			s.failed = fmt.Errorf("send with TLS: %w", s.failure(n))
			return true
		}
	}
	return true
}

func (s *session) Close() error {
	if s.writing.TryLock() {
		if s.handle != 0 {
			// The end of the stream is told if it can be told at once.
			_ = s.raw.Control(func(uintptr) { s.g.bye(s.handle, gnutlsShutWrite) })
		}
		s.writing.Unlock()
	}
	err := s.Conn.Close() // wakes who reads or writes
	s.reading.Lock()
	defer s.reading.Unlock()
	s.writing.Lock()
	defer s.writing.Unlock()
	if s.handle != 0 {
		s.free()
	}
	return err
}
