package protocol

import (
	"errors"
	"fmt"
	"net"
	"net/url"
	"regexp"
	"strconv"
	"strings"
)

// ErrURI: a text is no NBD URI.
var ErrURI = errors.New("bad NBD URI")

// Transport is how a URI's server is reached.
type Transport string

// Transports, as a URI's scheme names them after "nbd" or "nbds" and "+".
const (
	TransportTCP   Transport = "tcp"
	TransportUnix  Transport = "unix"
	TransportVsock Transport = "vsock"
)

// URI names an export on a server (doc/uri.md).
type URI struct {
	Transport Transport
	TLS       bool   // schemes nbds, nbds+unix, nbds+vsock
	User      string // for TLS-PSK, may be empty
	Host      string // TCP: a name or an address, without brackets
	CID       uint32 // vsock: the context's number
	Port      uint32 // TCP and vsock; DefaultPort if the URI has none
	Socket    string // Unix: a path; a leading NUL means the abstract namespace
	Export    string
	// Params are the remaining parameters of the query, such as tls-type.
	Params url.Values
}

// password is what no error shows.
var password = regexp.MustCompile(`(//[^/@:]*:)[^/@]*@`)

// ParseURI parses a URI. Schemes are nbd, nbds, nbd+unix, nbds+unix, nbd+vsock
// and nbds+vsock. Errors wrap ErrURI.
func ParseURI(s string) (*URI, error) {
	fail := func(format string, args ...any) (*URI, error) {
		return nil, fmt.Errorf("parse %q: %s: %w", password.ReplaceAllString(s, "$1***@"), fmt.Sprintf(format, args...), ErrURI)
	}
	u, err := url.Parse(s)
	if err != nil {
		var cause *url.Error
		if errors.As(err, &cause) {
			err = cause.Err
		}
		return fail("%v", err)
	}
	uri := &URI{Transport: TransportTCP}
	scheme, transport, plus := strings.Cut(u.Scheme, "+")
	switch scheme {
	case "nbd":
	case "nbds":
		uri.TLS = true
	default:
		return fail("got scheme %q, need nbd, nbds, nbd+unix, nbds+unix, nbd+vsock or nbds+vsock", u.Scheme)
	}
	if plus {
		uri.Transport = Transport(transport)
	}
	if u.Opaque != "" || !strings.HasPrefix(s[len(u.Scheme):], "://") {
		return fail("need // after the scheme")
	}
	if u.Fragment != "" {
		return fail("got a fragment %q; write # as %%23", u.Fragment)
	}
	// A plus sign is one, not the space of HTML's forms.
	if uri.Params, err = url.ParseQuery(strings.ReplaceAll(u.RawQuery, "+", "%2B")); err != nil {
		return fail("%v", err)
	}
	socket := uri.Params["socket"]
	delete(uri.Params, "socket")
	if len(uri.Params) == 0 {
		uri.Params = nil
	}
	uri.User = u.User.Username()
	uri.Export = strings.TrimPrefix(u.Path, "/")
	if strings.ContainsRune(uri.Export, 0) {
		return fail("got a NUL in the export's name")
	}
	if len(uri.Export) > MaxStringLength {
		return fail("got an export name of %d bytes, need at most %d", len(uri.Export), MaxStringLength)
	}

	if uri.Transport == TransportUnix {
		if len(socket) != 1 || socket[0] == "" {
			return fail("need one socket=PATH")
		}
		if u.Host != "" {
			return fail("got host %q, need none with a Unix socket", u.Host)
		}
		uri.Socket = socket[0]
		return uri, nil
	}
	if socket != nil {
		return fail("got socket=, which needs the scheme %s+unix", scheme)
	}
	if strings.Contains(u.Hostname(), ":") && !strings.HasPrefix(u.Host, "[") {
		return fail("got host %q; write an IPv6 address in brackets", u.Host)
	}
	bits := 16
	switch uri.Transport {
	case TransportTCP:
		if plus {
			return fail("got scheme %q, need %s", u.Scheme, scheme)
		}
		uri.Host = u.Hostname()
	case TransportVsock:
		cid, err := strconv.ParseUint(u.Hostname(), 10, 32)
		if err != nil {
			return fail("got %q, need a vsock context number", u.Hostname())
		}
		uri.CID = uint32(cid)
		bits = 32
	default:
		return fail("got scheme %q, need %s, %s+unix or %s+vsock", u.Scheme, scheme, scheme, scheme)
	}
	uri.Port = DefaultPort
	if p := u.Port(); p != "" {
		port, err := strconv.ParseUint(p, 10, bits)
		if err != nil {
			return fail("got port %q, need 0 to %d", p, uint64(1)<<bits-1)
		}
		uri.Port = uint32(port)
	}
	return uri, nil
}

// String is the URI as text, percent-escaped so that ParseURI gives it back.
// The default port is left out, and the slash before an export that has no name,
// as by nbdkit: callers append "/NAME".
func (u *URI) String() string {
	scheme := "nbd"
	if u.TLS {
		scheme = "nbds"
	}
	if u.Transport == TransportUnix || u.Transport == TransportVsock {
		scheme += "+" + string(u.Transport)
	}
	var out url.URL
	if u.User != "" {
		out.User = url.User(u.User)
	}
	switch u.Transport {
	case TransportUnix:
	case TransportVsock:
		out.Host = strconv.FormatUint(uint64(u.CID), 10)
	default:
		out.Host = u.Host
		if strings.Contains(u.Host, ":") {
			out.Host = "[" + u.Host + "]"
		}
	}
	if u.Transport != TransportUnix && u.Port != DefaultPort {
		out.Host += ":" + strconv.FormatUint(uint64(u.Port), 10)
	}
	var query []string
	if u.Transport == TransportUnix {
		query = append(query, "socket="+escape(u.Socket))
	}
	if len(u.Params) > 0 {
		query = append(query, legible(u.Params.Encode()))
	}
	text := "//"
	if out.User != nil || out.Host != "" {
		text = out.String()
	}
	if u.Export != "" {
		text += "/" + escape(u.Export)
	}
	if query != nil {
		text += "?" + strings.Join(query, "&")
	}
	return scheme + ":" + text
}

func escape(s string) string { return legible(url.QueryEscape(s)) }

// legible writes a space as %20, since not every client reads "+" as one, and
// slashes as they are: RFC 3986 allows them in a query.
func legible(query string) string { return strings.NewReplacer("+", "%20", "%2F", "/").Replace(query) }

// Address is what net.Dial takes for this URI: a network and an address. A
// vsock URI gives "vsock" and "CID:PORT", which package net does not know.
func (u *URI) Address() (network, address string) {
	port := strconv.FormatUint(uint64(u.Port), 10)
	switch u.Transport {
	case TransportUnix:
		if strings.HasPrefix(u.Socket, "\x00") {
			return "unix", "@" + u.Socket[1:] // how package net spells the abstract namespace
		}
		if strings.HasPrefix(u.Socket, "@") {
			return "unix", "./" + u.Socket // which package net would take for an abstract one
		}
		return "unix", u.Socket
	case TransportVsock:
		return "vsock", strconv.FormatUint(uint64(u.CID), 10) + ":" + port
	}
	return "tcp", net.JoinHostPort(u.Host, port)
}
