package main

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"strings"
	"time"

	"nbdhost/client"
	"nbdhost/nbdtls"
	"nbdhost/protocol"
)

// writeKeys makes a file of pre-shared keys with one of the user bench.
func writeKeys(path string) error {
	return os.WriteFile(path, []byte("bench:"+strings.Repeat("5a", 32)+"\n"), 0o600)
}

// writeCertificates makes a directory for a server and for its clients: a certificate
// of localhost that is its own authority.
func writeCertificates(dir string) error {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "localhost"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageDigitalSignature,
		DNSNames: []string{"localhost"}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
	}
	cert, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		return err
	}
	private, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	for name, block := range map[string]*pem.Block{
		"ca-cert.pem":     {Type: "CERTIFICATE", Bytes: cert},
		"server-cert.pem": {Type: "CERTIFICATE", Bytes: cert},
		"server-key.pem":  {Type: "PRIVATE KEY", Bytes: private},
	} {
		if err := os.WriteFile(filepath.Join(dir, name), pem.EncodeToMemory(block), 0o600); err != nil {
			return err
		}
	}
	return nil
}

// negotiated returns which protocol and algorithms the load generator gets of the
// server at an nbds URI.
func negotiated(ctx context.Context, uri string) (text string, err error) {
	c, err := client.Dial(ctx, uri, &client.Options{
		TLS: func(ctx context.Context, nc net.Conn, uri *protocol.URI) (net.Conn, error) {
			secure, err := nbdtls.Client(ctx, nc, uri)
			if err == nil {
				text = secure.(nbdtls.Conn).Description()
			}
			return secure, err
		},
	})
	if err != nil {
		return "", err
	}
	return text, c.Disconnect()
}
