package nbdtls

import (
	"errors"
	"fmt"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"unsafe"

	"github.com/ebitengine/purego"
	"golang.org/x/sys/cpu"
)

// Values of gnutls/gnutls.h. They are part of the library's ABI.
const (
	gnutlsServer       = 1 << 0
	gnutlsClient       = 1 << 1
	gnutlsNonblock     = 1 << 3
	gnutlsNoSignal     = 1 << 6
	gnutlsNoTickets    = 1 << 10
	gnutlsCertificate  = 1 // gnutls_credentials_type_t
	gnutlsPSK          = 4
	gnutlsRequire      = 2  // gnutls_certificate_request_t
	gnutlsShutWrite    = 1  // gnutls_close_request_t
	gnutlsPEM          = 1  // gnutls_x509_crt_fmt_t
	gnutlsMedium       = 35 // gnutls_sec_param_t
	gnutlsKeyRaw       = 0  // gnutls_psk_key_flags
	gnutlsX509         = 1  // gnutls_certificate_type_t
	gnutlsPurpose      = 2  // gnutls_vdata_types_t
	gnutlsWriting      = 1  // gnutls_record_get_direction
	gnutlsWarningAlert = -16
	gnutlsFatalAlert   = -12
	gnutlsAgain        = -28
	gnutlsRehandshake  = -37
	gnutlsNoCert       = -49 // with TLS 1.2
	gnutlsInterrupted  = -52
	gnutlsPremature    = -110
	gnutlsCertRequired = -112 // with TLS 1.3
	gnutlsUnverified   = -348
)

// ErrGnuTLS: GnuTLS is needed and cannot be loaded.
var ErrGnuTLS = errors.New("cannot load GnuTLS")

// A datum is gnutls_datum_t.
type datum struct {
	data unsafe.Pointer
	size uint32
}

// pin makes a datum of b, which stays where it is until pinner.Unpin.
func pin(pinner *runtime.Pinner, b []byte) *datum {
	p := unsafe.SliceData(b)
	pinner.Pin(p)
	d := &datum{unsafe.Pointer(p), uint32(len(b))}
	pinner.Pin(d)
	return d
}

// bytes copies what a datum of GnuTLS's points to.
func (d *datum) bytes() []byte {
	return append([]byte(nil), unsafe.Slice((*byte)(d.data), d.size)...)
}

// A typedDatum is gnutls_typed_vdata_st.
type typedDatum struct {
	kind int32
	datum
}

// A handle is a pointer to an object of GnuTLS's.
type handle uintptr

// gnutls is the library. The functions' names are C's without gnutls_.
type gnutls struct {
	record_recv, record_send uintptr // called without what purego.RegisterFunc costs

	check_version                         func(needed string) unsafe.Pointer
	strerror                              func(code int32) string
	init                                  func(s *handle, flags uint32) int32
	deinit                                func(s handle)
	bye                                   func(s handle, how int32) int32
	handshake                             func(s handle) int32
	handshake_set_timeout                 func(s handle, ms uint32)
	record_get_direction                  func(s handle) int32
	transport_set_int2                    func(s handle, recv, send int32)
	alert_get                             func(s handle) int32
	alert_get_name                        func(alert int32) string
	alert_send_appropriate                func(s handle, code int32) int32
	session_get_desc                      func(s handle) unsafe.Pointer
	priority_init                         func(p *handle, text string, where unsafe.Pointer) int32
	priority_deinit                       func(p handle)
	priority_set                          func(s, p handle) int32
	credentials_set                       func(s handle, kind int32, c handle) int32
	certificate_allocate_credentials      func(c *handle) int32
	certificate_free_credentials          func(c handle)
	certificate_set_x509_key_mem          func(c handle, cert, key *datum, format int32) int32
	certificate_set_x509_trust_mem        func(c handle, ca *datum, format int32) int32
	certificate_set_x509_crl_mem          func(c handle, crl *datum, format int32) int32
	certificate_server_set_request        func(s handle, request int32)
	certificate_get_peers                 func(s handle, n *uint32) *datum
	certificate_verification_status_print func(status uint32, kind int32, out *datum, flags uint32) int32
	session_set_verify_cert2              func(s handle, data *typedDatum, n, flags uint32)
	session_get_verify_cert_status        func(s handle) uint32
	psk_allocate_server_credentials       func(c *handle) int32
	psk_free_server_credentials           func(c handle)
	psk_set_server_credentials_function   func(c handle, f uintptr)
	psk_set_server_known_dh_params        func(c handle, strength int32) int32
	psk_allocate_client_credentials       func(c *handle) int32
	psk_free_client_credentials           func(c handle)
	psk_set_client_credentials            func(c handle, user string, key *datum, format int32) int32
	malloc                                func(n uintptr) unsafe.Pointer
	free                                  func(p unsafe.Pointer)

	findKey uintptr // lookUp for C; made once, since callbacks are never freed

	// forClients is the purpose that a client's certificate has to have, if it has
	// any: another server of the same authority is no client. Sessions point to it.
	forClients *typedDatum
	pinner     runtime.Pinner // of forClients
}

// lib loads GnuTLS.
var lib = sync.OnceValues(loadGnuTLS)

func loadGnuTLS() (*gnutls, error) {
	// The text of an error belongs to the thread of the call.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	so, err := purego.Dlopen("libgnutls.so.30", purego.RTLD_NOW|purego.RTLD_LOCAL)
	if err != nil {
		return nil, fmt.Errorf("%w: pre-shared keys, priority strings and some kinds of certificates need it: install the package that has libgnutls.so.30 (Debian: libgnutls30): %w", ErrGnuTLS, err)
	}
	g := &gnutls{}
	for name, f := range map[string]any{
		"check_version":                         &g.check_version,
		"strerror":                              &g.strerror,
		"init":                                  &g.init,
		"deinit":                                &g.deinit,
		"bye":                                   &g.bye,
		"handshake":                             &g.handshake,
		"handshake_set_timeout":                 &g.handshake_set_timeout,
		"record_get_direction":                  &g.record_get_direction,
		"transport_set_int2":                    &g.transport_set_int2,
		"alert_get":                             &g.alert_get,
		"alert_get_name":                        &g.alert_get_name,
		"alert_send_appropriate":                &g.alert_send_appropriate,
		"session_get_desc":                      &g.session_get_desc,
		"priority_init":                         &g.priority_init,
		"priority_deinit":                       &g.priority_deinit,
		"priority_set":                          &g.priority_set,
		"credentials_set":                       &g.credentials_set,
		"certificate_allocate_credentials":      &g.certificate_allocate_credentials,
		"certificate_free_credentials":          &g.certificate_free_credentials,
		"certificate_set_x509_key_mem":          &g.certificate_set_x509_key_mem,
		"certificate_set_x509_trust_mem":        &g.certificate_set_x509_trust_mem,
		"certificate_set_x509_crl_mem":          &g.certificate_set_x509_crl_mem,
		"certificate_server_set_request":        &g.certificate_server_set_request,
		"certificate_get_peers":                 &g.certificate_get_peers,
		"certificate_verification_status_print": &g.certificate_verification_status_print,
		"session_set_verify_cert2":              &g.session_set_verify_cert2,
		"session_get_verify_cert_status":        &g.session_get_verify_cert_status,
		"psk_allocate_server_credentials":       &g.psk_allocate_server_credentials,
		"psk_free_server_credentials":           &g.psk_free_server_credentials,
		"psk_set_server_credentials_function":   &g.psk_set_server_credentials_function,
		"psk_set_server_known_dh_params":        &g.psk_set_server_known_dh_params,
		"psk_allocate_client_credentials":       &g.psk_allocate_client_credentials,
		"psk_free_client_credentials":           &g.psk_free_client_credentials,
		"psk_set_client_credentials":            &g.psk_set_client_credentials,
		"record_recv":                           &g.record_recv,
		"record_send":                           &g.record_send,
		// Variables that hold pointers to functions: see below.
		"malloc": &g.malloc,
		"free":   &g.free,
	} {
		addr, err := purego.Dlsym(so, "gnutls_"+name)
		if err != nil {
			return nil, fmt.Errorf("%w: need release 3.6.3 or later: %w", ErrGnuTLS, err)
		}
		switch f := f.(type) {
		case *uintptr:
			*f = addr
		default:
			if name == "malloc" || name == "free" {
				addr = *(*uintptr)(*(*unsafe.Pointer)(unsafe.Pointer(&addr)))
			}
			purego.RegisterFunc(f, addr)
		}
	}
	if g.check_version("3.6.3") == nil { // the first with TLS 1.3
		return nil, fmt.Errorf("%w: need release 3.6.3 or later", ErrGnuTLS)
	}
	g.findKey = purego.NewCallback(g.lookUp)
	g.forClients = &typedDatum{gnutlsPurpose, *pin(&g.pinner, []byte("1.3.6.1.5.5.7.3.2\x00"))}
	g.pinner.Pin(g.forClients)
	return g, nil
}

// errorOf is the error of a code, nil for success.
func (g *gnutls) errorOf(code int32) error {
	if code >= 0 {
		return nil
	}
	return errors.New(g.text(code))
}

// text is what a code means, without the full stop.
func (g *gnutls) text(code int32) string { return strings.TrimSuffix(g.strerror(code), ".") }

// credentials are what a session needs of the library beside itself: they are
// freed when neither a Server nor a session uses them any more.
type credentials struct {
	g        *gnutls
	kind     int32
	handle   handle
	priority handle
	verify   bool              // a client's certificate
	keys     map[string][]byte // by user, for a server with pre-shared keys
}

// goString copies a string of C's.
func goString(p unsafe.Pointer) string {
	n := 0
	for *(*byte)(unsafe.Add(p, n)) != 0 {
		n++
	}
	return string(unsafe.Slice((*byte)(p), n))
}

// setPriority takes a priority string.
func (c *credentials) setPriority(text string) error {
	if err := c.g.errorOf(c.g.priority_init(&c.priority, text, nil)); err != nil {
		return fmt.Errorf("set priority %q: %w: need a priority string of GnuTLS's, such as NORMAL", text, err)
	}
	g, p := c.g, c.priority
	runtime.AddCleanup(c, g.priority_deinit, p)
	return nil
}

// newCertificateCredentials makes those of a server with certificates.
func newCertificateCredentials(id *identity, config Config) (shaker, error) {
	g, err := lib()
	if err != nil {
		return nil, err
	}
	c := &credentials{g: g, kind: gnutlsCertificate, verify: config.VerifyPeer}
	priority := config.Priority
	if priority == "" {
		priority = defaultPriority()
	}
	if err := c.setPriority(priority); err != nil {
		return nil, err
	}
	if err := g.errorOf(g.certificate_allocate_credentials(&c.handle)); err != nil {
		return nil, err
	}
	runtime.AddCleanup(c, g.certificate_free_credentials, c.handle)

	var pinner runtime.Pinner
	defer pinner.Unpin()
	for _, p := range id.pairs {
		code := g.certificate_set_x509_key_mem(c.handle, pin(&pinner, p.cert), pin(&pinner, p.key), gnutlsPEM)
		if err := g.errorOf(code); err != nil {
			return nil, p.unusable(err)
		}
	}
	for _, f := range []struct {
		name string
		text []byte
		set  func(c handle, text *datum, format int32) int32
	}{
		{caCert, id.ca, g.certificate_set_x509_trust_mem},
		{caCRL, id.crl, g.certificate_set_x509_crl_mem},
	} {
		if f.text == nil {
			continue
		}
		n := f.set(c.handle, pin(&pinner, f.text), gnutlsPEM)
		err := g.errorOf(n)
		if n == 0 {
			err = errors.New("got none: need at least one, in PEM")
		}
		if err != nil {
			return nil, fmt.Errorf("read %s: %w", filepath.Join(config.Certificates, f.name), err)
		}
	}
	return c, nil
}

// pskSource is a file of pre-shared keys.
type pskSource struct{ config Config }

func (s *pskSource) files() []string { return []string{s.config.PSK} }

func (s *pskSource) load() (shaker, error) {
	keys, err := readPSK(s.config.PSK)
	if err != nil {
		return nil, err
	}
	g, err := lib()
	if err != nil {
		return nil, err
	}
	c := &credentials{g: g, kind: gnutlsPSK, keys: keys}
	if err := c.setPriority(pskPriority(s.config.Priority)); err != nil {
		return nil, err
	}
	if err := g.errorOf(g.psk_allocate_server_credentials(&c.handle)); err != nil {
		return nil, err
	}
	runtime.AddCleanup(c, g.psk_free_server_credentials, c.handle)
	g.psk_set_server_credentials_function(c.handle, g.findKey)
	if err := g.errorOf(g.psk_set_server_known_dh_params(c.handle, gnutlsMedium)); err != nil {
		return nil, err
	}
	return c, nil
}

// pskPriority makes the key exchanges those with pre-shared keys, which no priority
// string has by itself. The others need certificates; if they stayed GnuTLS would
// choose one that a client prefers, and then find that it has none.
func pskPriority(text string) string {
	if text == "" {
		text = defaultPriority()
	}
	return text + ":-KX-ALL:+ECDHE-PSK:+DHE-PSK:+PSK"
}

// defaultPriority is what crypto/tls does, too: no protocol before TLS 1.2, and no key
// exchange that gives old sessions away with the key.
func defaultPriority() string {
	text := "NORMAL:-VERS-ALL:+VERS-TLS1.3:+VERS-TLS1.2:-RSA"
	if cpu.X86.HasAES && cpu.X86.HasPCLMULQDQ || cpu.ARM64.HasAES && cpu.ARM64.HasPMULL {
		// NORMAL has ChaCha20 before AES-128-GCM, and AES-256-GCM, which is
		// before both, needs another hash than pre-shared keys have. Where the
		// processor has AES that takes a tenth of the time.
		text += ":-CHACHA20-POLY1305:+CHACHA20-POLY1305:%SERVER_PRECEDENCE"
	}
	return text
}

// shaking has the keys for each session that is in a handshake.
var shaking sync.Map // map[handle]map[string][]byte

// lookUp is what GnuTLS asks for a user's key
// (gnutls_psk_set_server_credentials_function(3)). A user that is unknown is not
// refused at once: GnuTLS goes on with a random key, so that nobody can find out
// who is known.
func (g *gnutls) lookUp(s handle, user *byte, key *datum) int32 {
	const unknown, failed = 1, -1
	keys, ok := shaking.Load(s)
	if !ok || user == nil {
		return failed
	}
	secret, ok := keys.(map[string][]byte)[goString(unsafe.Pointer(user))]
	if !ok {
		return unknown
	}
	key.data = g.malloc(uintptr(len(secret)))
	if key.data == nil {
		return failed
	}
	copy(unsafe.Slice((*byte)(key.data), len(secret)), secret)
	key.size = uint32(len(secret))
	return 0
}
