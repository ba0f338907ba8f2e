package main

import (
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/url"

	"nbdhost/nbdtls"
	"nbdhost/protocol"
	"nbdhost/server"
)

// setUpTLS reads the keys that the options name, and settles t.mode: TLS is off
// where there are no keys, unless it is required. It returns what does handshakes,
// nil for TLS that is off.
func setUpTLS(t *tlsOptions, log *slog.Logger) (func(net.Conn) (server.TLSConn, error), error) {
	if t.mode == tlsOff {
		return nil, nil
	}
	secure, err := newTLS(t, log)
	switch {
	case err == nil:
		if t.mode == tlsUnset {
			t.mode = tlsOn
		}
		keys := "X.509 certificates"
		if t.psk != "" {
			keys = "Pre-Shared Keys (PSK)"
		}
		log.Debug("TLS enabled using: " + keys)
		return func(nc net.Conn) (server.TLSConn, error) {
			c, err := secure.Handshake(nc)
			if err != nil {
				return nil, err // and no nil within an interface
			}
			return c, nil
		}, nil
	case t.mode == tlsRequire || t.psk != "":
		return nil, err
	case t.mode == tlsOn || t.certificates != "" || t.verifyPeer:
		log.Warn(err.Error() + ": going on without TLS; --tls=require makes this an error")
	default:
		// The words before the colon are nbdkit's.
		log.Debug("TLS disabled: could not load TLS certificates: " + err.Error())
	}
	t.mode = tlsOff
	return nil, nil
}

func newTLS(t *tlsOptions, log *slog.Logger) (*nbdtls.Server, error) {
	dir := t.certificates
	if dir == "" && t.psk == "" {
		var err error
		if dir, err = nbdtls.FindCertificates(); errors.Is(err, nbdtls.ErrNoCertificates) {
			return nil, fmt.Errorf("set up TLS: %w: give --tls-certificates=DIR or --tls-psk=FILE", err)
		} else if err != nil {
			return nil, err
		}
	}
	return nbdtls.NewServer(nbdtls.Config{Certificates: dir, VerifyPeer: t.verifyPeer, PSK: t.psk, Priority: t.priority, Log: log})
}

// addTo makes uri one that clients can use as it is. Where TLS is not required
// they need not know about it.
func (t *tlsOptions) addTo(uri *protocol.URI) {
	if t.mode != tlsRequire {
		return
	}
	uri.TLS = true
	switch {
	case t.psk != "":
		uri.Params = url.Values{"tls-psk-file": {t.psk}}
	case t.certificates != "":
		uri.Params = url.Values{"tls-certificates": {t.certificates}}
	}
}

// variables are what a command of --run gets to know.
func (t *tlsOptions) variables() [][2]string {
	mode := map[string]string{tlsOn: "1", tlsRequire: "2"}[t.mode]
	return [][2]string{{"tls", mode}, {"tls_certificates", t.certificates}, {"tls_psk", t.psk}}
}
