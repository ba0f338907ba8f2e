package nbdtls

import (
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
)

// Config says who the server is and whom it trusts.
type Config struct {
	// Certificates is a directory with server-cert.pem and server-key.pem,
	// perhaps more pairs server-cert-N.pem and server-key-N.pem (N from 0),
	// ca-cert.pem and ca-crl.pem (nbdkit-tls(1)).
	Certificates string
	// VerifyPeer demands of clients a certificate that the authority in
	// ca-cert.pem issued, not for servers only, and that ca-crl.pem, if there is
	// one, does not revoke.
	VerifyPeer bool
	// PSK is a file of pre-shared keys, as psktool(1) writes it; if it is not
	// empty no certificates are used.
	PSK string
	// Priority is a priority string of GnuTLS's; empty for safe defaults.
	Priority string
	// Log receives what goes wrong with files that have changed, and what will
	// disappoint about those in use; nil for nothing.
	Log *slog.Logger
}

// ErrNoCertificates: none of the default directories has certificates.
var ErrNoCertificates = errors.New("no certificates")

// DefaultDirectories are where nbdkit and libnbd look for certificates if nobody
// says where; program is "nbdkit" for a server and "libnbd" for a client.
func DefaultDirectories(program string) []string {
	if os.Geteuid() == 0 {
		return []string{filepath.Join("/etc/pki", program)}
	}
	home, err := os.UserHomeDir()
	if err != nil {
		return nil
	}
	return []string{filepath.Join(home, ".pki", program), filepath.Join(home, ".config/pki", program)}
}

// FindCertificates returns the first default directory of a server's that has
// server-cert.pem. It fails with ErrNoCertificates.
func FindCertificates() (string, error) {
	dirs := DefaultDirectories("nbdkit")
	for _, dir := range dirs {
		if _, err := os.Stat(filepath.Join(dir, serverCert)); err == nil {
			return dir, nil
		}
	}
	return "", fmt.Errorf("find %s in %s: %w", serverCert, strings.Join(dirs, ", "), ErrNoCertificates)
}

// A Server does the server's side of handshakes.
type Server struct {
	log    *slog.Logger
	source source

	mu     sync.Mutex // guards what follows; held while files are read
	inUse  shaker
	seen   stamp  // of the files when they were read last, good or bad
	reason string // why those are not in use, "" if they are
}

// A source reads the files of a configuration.
type source interface {
	// files are the paths that stamps are taken of.
	files() []string
	// load returns what the files make.
	load() (shaker, error)
}

// A shaker does handshakes with what files had at some time.
type shaker interface {
	handshake(nc net.Conn) (Conn, error)
}

// NewServer reads the files of c. An error says which is missing or wrong, or that
// GnuTLS is needed and not there.
func NewServer(c Config) (*Server, error) {
	s := &Server{log: c.Log}
	if s.log == nil {
		s.log = slog.New(slog.DiscardHandler)
	}
	switch {
	case c.PSK != "":
		s.source = &pskSource{c}
	case c.Certificates == "":
		return nil, errors.New("set up TLS: got neither certificates nor pre-shared keys: need one of them")
	default:
		s.source = &x509Source{config: c, log: s.log}
	}
	s.seen = stampOf(s.source.files())
	inUse, err := s.source.load()
	if err != nil {
		return nil, fmt.Errorf("set up TLS: %w", err)
	}
	s.inUse = inUse
	return s, nil
}

// Handshake secures nc. After an error the caller closes nc, which nobody can use
// any more. How long it takes is bounded by the deadlines of nc only.
func (s *Server) Handshake(nc net.Conn) (Conn, error) {
	c, err := s.current().handshake(nc)
	if err != nil {
		return nil, fmt.Errorf("TLS handshake: %w", err)
	}
	return c, nil
}

// current returns what to do handshakes with, after a look at the files.
func (s *Server) current() shaker {
	s.mu.Lock()
	defer s.mu.Unlock()
	now := stampOf(s.source.files())
	if now.same(s.seen) {
		return s.inUse
	}
	changed := now.text != s.seen.text
	s.seen = now
	inUse, err := s.source.load()
	if err != nil {
		if changed || err.Error() != s.reason {
			s.log.Error("read TLS files again: " + err.Error() + "; going on with those in use")
		}
		s.reason = err.Error()
		return s.inUse
	}
	if changed || s.reason != "" {
		s.log.Debug("TLS files have changed and are in use from now on")
	}
	s.inUse, s.reason = inUse, ""
	return s.inUse
}
