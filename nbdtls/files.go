package nbdtls

import (
	"bytes"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

// Files in a directory of certificates (nbdkit-tls(1), nbd_set_tls_certificates(3)).
const (
	caCert     = "ca-cert.pem"
	caCRL      = "ca-crl.pem"
	serverCert = "server-cert.pem"
	serverKey  = "server-key.pem"
	clientCert = "client-cert.pem"
	clientKey  = "client-key.pem"
)

// maxPairs bounds the additional pairs of certificate and key.
const maxPairs = 100

// A stamp tells one state of files from another without reading them.
type stamp struct {
	text string
	// settled: the files are old enough that a change would show. A file may
	// change twice while the clock of the file system stands still.
	settled bool
}

// settling is longer than the tick of any file system's clock in use.
const settling = 2 * time.Second

func stampOf(files []string) stamp {
	var b strings.Builder
	settled := true
	now := time.Now()
	for _, path := range files {
		st, err := os.Stat(path) // of what a link leads to, which may be replaced
		if err != nil {
			fmt.Fprintf(&b, "%s: %v\n", path, err)
			continue
		}
		sys := st.Sys().(*syscall.Stat_t)
		fmt.Fprintf(&b, "%s: %d %d %d %d %d\n", path, sys.Dev, sys.Ino, sys.Size, sys.Mtim.Nano(), sys.Ctim.Nano())
		settled = settled && now.Sub(time.Unix(0, sys.Ctim.Nano())).Abs() > settling
	}
	return stamp{b.String(), settled}
}

// same tells that nothing has changed between old and s for certain.
func (s stamp) same(old stamp) bool { return s.text == old.text && old.settled }

// A pair is a certificate, perhaps with a chain behind it, and its key, in PEM.
type pair struct {
	cert, key         []byte
	certPath, keyPath string
}

func readPair(dir, cert, key string) (p pair, err error) {
	p.certPath, p.keyPath = filepath.Join(dir, cert), filepath.Join(dir, key)
	if p.cert, err = os.ReadFile(p.certPath); err != nil {
		return p, err
	}
	p.key, err = os.ReadFile(p.keyPath)
	return p, err
}

// unusable is why TLS cannot have the pair.
func (p *pair) unusable(err error) error {
	need := "need a certificate and the key it was made for, both in PEM"
	if bytes.Contains(p.key, []byte("ENCRYPTED")) {
		need = "the key is encrypted: need one without a passphrase"
	}
	return fmt.Errorf("read %s and %s: %w: %s", p.certPath, p.keyPath, err, need)
}

// additional returns the names of pair n beside the first.
func additional(n int) (cert, key string) {
	return fmt.Sprintf("server-cert-%d.pem", n), fmt.Sprintf("server-key-%d.pem", n)
}

// An identity is the files of a directory of certificates.
type identity struct {
	pairs   []pair
	ca, crl []byte // nil where there is none
}

// readIdentity reads a server's directory. verify says that clients will be
// verified, which needs the authority.
func readIdentity(dir string, verify bool) (*identity, error) {
	first, err := readPair(dir, serverCert, serverKey)
	if errors.Is(err, syscall.ENOTDIR) {
		return nil, fmt.Errorf("%w: need the directory that has %s and %s", err, serverCert, serverKey)
	}
	if err != nil {
		return nil, err
	}
	id := &identity{pairs: []pair{first}}
	for n := range maxPairs {
		cert, key := additional(n)
		p, err := readPair(dir, cert, key)
		if errors.Is(err, os.ErrNotExist) && p.cert == nil {
			break
		}
		if err != nil {
			return nil, err
		}
		id.pairs = append(id.pairs, p)
	}
	if !verify {
		return id, nil
	}
	if id.ca, err = os.ReadFile(filepath.Join(dir, caCert)); err != nil {
		return nil, fmt.Errorf("%w: clients are to be verified, which needs the authority's certificate", err)
	}
	if id.crl, err = os.ReadFile(filepath.Join(dir, caCRL)); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	return id, nil
}

// identityFiles are all that readIdentity may read.
func identityFiles(dir string) []string {
	files := []string{filepath.Join(dir, caCert), filepath.Join(dir, caCRL),
		filepath.Join(dir, serverCert), filepath.Join(dir, serverKey)}
	for n := range maxPairs {
		cert, key := additional(n)
		path := filepath.Join(dir, cert)
		files = append(files, path, filepath.Join(dir, key))
		if _, err := os.Stat(path); err != nil {
			break
		}
	}
	return files
}

// readPSK reads pre-shared keys by user: lines USER:KEY with KEY in hexadecimal, as
// psktool(1) writes them. A user's name that begins with # is in hexadecimal, too.
// Errors do not show keys.
func readPSK(path string) (map[string][]byte, error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	return parsePSK(path, text)
}

func parsePSK(path string, text []byte) (map[string][]byte, error) {
	keys := map[string][]byte{}
	line := 0
	for l := range bytes.Lines(text) {
		line++
		if l = bytes.TrimSpace(l); len(l) == 0 {
			continue
		}
		user, digits, ok := strings.Cut(string(l), ":")
		if ok && strings.HasPrefix(user, "#") {
			var name []byte
			name, err := hex.DecodeString(user[1:])
			user, ok = string(name), err == nil
		}
		if !ok || user == "" {
			return nil, fmt.Errorf("read %s: line %d: need USER:KEY, as psktool writes it", path, line)
		}
		key, err := hex.DecodeString(digits)
		if err != nil || len(key) == 0 {
			return nil, fmt.Errorf("read %s: line %d: need the key of user %q in hexadecimal digits, an even number of them", path, line, user)
		}
		if _, ok := keys[user]; !ok { // the first counts, as in GnuTLS
			keys[user] = key
		}
	}
	if len(keys) == 0 {
		return nil, fmt.Errorf("read %s: got no key: need at least one line USER:KEY, as psktool writes it", path)
	}
	return keys, nil
}
