package nbdtls

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"os"
	"os/user"
	"path/filepath"
	"runtime"
	"time"

	"nbdhost/protocol"
)

// Client does the client's side of a handshake for an NBD URI (doc/uri.md); it is
// for client.Options. The URI's tls-psk-file is a file of pre-shared keys, from
// which the key of the URI's user is taken, or of the user that runs this program.
// Without it the server's certificate is verified for the URI's host (localhost for
// a Unix socket; tls-hostname names another), by ca-cert.pem in the directory
// tls-certificates, else in the first of [DefaultDirectories], else by the
// authorities that the system trusts. If there are client-cert.pem and
// client-key.pem they are shown to the server. With tls-verify-peer=false the server's
// certificate may be anything. ctx bounds the handshake.
func Client(ctx context.Context, nc net.Conn, uri *protocol.URI) (net.Conn, error) {
	stop := context.AfterFunc(ctx, func() { nc.SetDeadline(time.Unix(1, 0)) })
	c, err := clientHandshake(nc, uri)
	if !stop() && err == nil {
		c.Close()
		err = context.Cause(ctx)
	}
	if err != nil {
		return nil, fmt.Errorf("TLS handshake: %w", err)
	}
	return c, nil
}

func clientHandshake(nc net.Conn, uri *protocol.URI) (Conn, error) {
	if file := uri.Params.Get("tls-psk-file"); file != "" {
		return clientPSK(nc, file, uri.User)
	}
	config := &tls.Config{MinVersion: tls.VersionTLS12, ServerName: uri.Params.Get("tls-hostname"),
		DynamicRecordSizingDisabled: true, KeyLogWriter: keyLog()}
	if config.ServerName == "" {
		config.ServerName = uri.Host
	}
	if config.ServerName == "" {
		config.ServerName = "localhost"
	}
	switch verify := uri.Params.Get("tls-verify-peer"); verify {
	case "", "true", "1":
	case "false", "0":
		config.InsecureSkipVerify = true
	default:
		return nil, fmt.Errorf("got tls-verify-peer=%s, need true or false", verify)
	}
	if dir := clientDirectory(uri.Params.Get("tls-certificates")); dir != "" {
		path := filepath.Join(dir, caCert)
		text, err := os.ReadFile(path)
		if err != nil {
			return nil, err
		}
		authorities, err := certificates(text)
		if err != nil {
			return nil, fmt.Errorf("read %s: %w", path, err)
		}
		config.RootCAs = x509.NewCertPool()
		for _, a := range authorities {
			config.RootCAs.AddCert(a)
		}
		p, err := readPair(dir, clientCert, clientKey)
		switch {
		case errors.Is(err, os.ErrNotExist) && p.cert == nil: // it has none
		case err != nil:
			return nil, err
		default:
			cert, err := tls.X509KeyPair(p.cert, p.key)
			if err != nil {
				return nil, fmt.Errorf("read %s and %s: %w", p.certPath, p.keyPath, err)
			}
			config.Certificates = []tls.Certificate{cert}
		}
	}
	l := &link{Conn: nc}
	return finishStandard(tls.Client(l, config), l)
}

// clientDirectory returns given, or else the first default directory that has an
// authority's certificate, or "".
func clientDirectory(given string) string {
	if given != "" {
		return given
	}
	for _, dir := range DefaultDirectories("libnbd") {
		if _, err := os.Stat(filepath.Join(dir, caCert)); err == nil {
			return dir
		}
	}
	return ""
}

func clientPSK(nc net.Conn, file, name string) (Conn, error) {
	keys, err := readPSK(file)
	if err != nil {
		return nil, err
	}
	if name == "" {
		me, err := user.Current()
		if err != nil {
			return nil, fmt.Errorf("find out the user's name: %w: put one into the URI", err)
		}
		name = me.Username
	}
	key, ok := keys[name]
	if !ok {
		return nil, fmt.Errorf("read %s: got no key of user %q", file, name)
	}
	g, err := lib()
	if err != nil {
		return nil, err
	}
	c := &credentials{g: g, kind: gnutlsPSK}
	if err := c.setPriority(pskPriority("")); err != nil {
		return nil, err
	}
	if err := g.errorOf(g.psk_allocate_client_credentials(&c.handle)); err != nil {
		return nil, err
	}
	runtime.AddCleanup(c, g.psk_free_client_credentials, c.handle)
	var pinner runtime.Pinner
	defer pinner.Unpin()
	if err := g.errorOf(g.psk_set_client_credentials(c.handle, name, pin(&pinner, key), gnutlsKeyRaw)); err != nil {
		return nil, err
	}
	s, err := c.newSession(nc, gnutlsClient)
	if err != nil {
		return nil, err
	}
	return s.shake()
}
