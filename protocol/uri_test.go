package protocol

import (
	"errors"
	"net/url"
	"reflect"
	"strings"
	"testing"
)

func TestURI(t *testing.T) {
	tests := []struct {
		in               string
		want             URI
		out              string // if not in
		network, address string
	}{
		{"nbd://example.com/disk", URI{Transport: TransportTCP, Host: "example.com", Port: 10809, Export: "disk"}, "", "tcp", "example.com:10809"},
		{"nbd://example.com", URI{Transport: TransportTCP, Host: "example.com", Port: 10809}, "", "tcp", "example.com:10809"},
		{"nbds://alice@example.com:10810/", URI{Transport: TransportTCP, TLS: true, User: "alice", Host: "example.com", Port: 10810}, "nbds://alice@example.com:10810", "tcp", "example.com:10810"},
		{"nbd://example.com//disk", URI{Transport: TransportTCP, Host: "example.com", Port: 10809, Export: "/disk"}, "", "tcp", "example.com:10809"},
		{"nbd://example.com/hello%20world", URI{Transport: TransportTCP, Host: "example.com", Port: 10809, Export: "hello world"}, "", "tcp", "example.com:10809"},
		{"nbd://[::1]:0/", URI{Transport: TransportTCP, Host: "::1", Port: 0}, "nbd://[::1]:0", "tcp", "[::1]:0"},
		{"nbd://[fe80::1%25eth0]/", URI{Transport: TransportTCP, Host: "fe80::1%eth0", Port: 10809}, "nbd://[fe80::1%25eth0]", "tcp", "[fe80::1%eth0]:10809"},
		{"nbd://localhost/a%3Fb%23c%25d", URI{Transport: TransportTCP, Host: "localhost", Port: 10809, Export: "a?b#c%d"}, "", "tcp", "localhost:10809"},
		{"nbd+unix:///?socket=/tmp/s", URI{Transport: TransportUnix, Socket: "/tmp/s"}, "nbd+unix://?socket=/tmp/s", "unix", "/tmp/s"},
		{"nbd+unix:///x?socket=%2Ftmp%2Fa+b%26c", URI{Transport: TransportUnix, Socket: "/tmp/a+b&c", Export: "x"}, "nbd+unix:///x?socket=/tmp/a%2Bb%26c", "unix", "/tmp/a+b&c"},
		{"nbd+unix://?socket=@x%20y", URI{Transport: TransportUnix, Socket: "@x y"}, "nbd+unix://?socket=%40x%20y", "unix", "./@x y"},
		{"nbds+unix:///x?socket=s", URI{Transport: TransportUnix, TLS: true, Socket: "s", Export: "x"}, "", "unix", "s"},
		{"nbd+unix:///?socket=%00/abstract", URI{Transport: TransportUnix, Socket: "\x00/abstract"}, "nbd+unix://?socket=%00/abstract", "unix", "@/abstract"},
		{"nbd+unix:///?socket=s&tls-type=psk&x-a=b%20c", URI{Transport: TransportUnix, Socket: "s", Params: url.Values{"tls-type": {"psk"}, "x-a": {"b c"}}}, "nbd+unix://?socket=s&tls-type=psk&x-a=b%20c", "unix", "s"},
		{"nbd+vsock://2:4000000000/x", URI{Transport: TransportVsock, CID: 2, Port: 4000000000, Export: "x"}, "", "vsock", "2:4000000000"},
		{"nbds+vsock://3/", URI{Transport: TransportVsock, TLS: true, CID: 3, Port: 10809}, "nbds+vsock://3", "vsock", "3:10809"},
		{"NBD://h/%C3%A9", URI{Transport: TransportTCP, Host: "h", Port: 10809, Export: "é"}, "nbd://h/%C3%A9", "tcp", "h:10809"},
	}
	for _, test := range tests {
		got, err := ParseURI(test.in)
		if err != nil {
			t.Error(err)
			continue
		}
		if !reflect.DeepEqual(*got, test.want) {
			t.Errorf("%s: got %+v, need %+v", test.in, *got, test.want)
		}
		out := test.out
		if out == "" {
			out = test.in
		}
		if s := got.String(); s != out {
			t.Errorf("%s: got %s back, need %s", test.in, s, out)
		}
		if network, address := got.Address(); network != test.network || address != test.address {
			t.Errorf("%s: got address %s %s", test.in, network, address)
		}
	}
}

func TestURIRefused(t *testing.T) {
	tests := map[string]string{ // what the error says
		"":                                     "scheme",
		"http://x/":                            `got scheme "http"`,
		"nbd":                                  "scheme",
		"nbd:x":                                "//",
		"nbd+tcp://x/":                         "need nbd",
		"nbd+foo://x/":                         "nbd+unix",
		"nbd+unix:///":                         "socket=PATH",
		"nbd+unix:///?socket=":                 "socket=PATH",
		"nbd+unix:///?socket=a&socket=b":       "socket=PATH",
		"nbd+unix://h/?socket=a":               "got host",
		"nbd://h/?socket=a":                    "nbd+unix",
		"nbd://h:65536/":                       "65535",
		"nbd://::1/":                           "brackets",
		"nbd://h:x/":                           "port",
		"nbd+vsock://h/":                       "vsock context number",
		"nbd+vsock://2:4294967296/":            "4294967295",
		"nbd://h/a#b":                          "%23",
		"nbd://h/a%00b":                        "NUL",
		"nbd://h/%zz":                          "escape",
		"nbd://h/?a=%zz":                       "escape",
		"nbd://h/" + strings.Repeat("a", 4097): "4097",
	}
	for in, says := range tests {
		_, err := ParseURI(in)
		if !errors.Is(err, ErrURI) || !strings.Contains(err.Error(), says) {
			t.Errorf("%q: got %v, need it to say %q", in, err, says)
		}
	}
}

func FuzzParseURI(f *testing.F) {
	for _, s := range []string{"nbd://example.com//disk", "nbds+unix:///x?socket=%00/a&x-b=c", "nbd+vsock://2:1/", "nbd://u@[fe80::1%25eth0]:1/a%2Fb"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		u, err := ParseURI(s)
		if err != nil {
			return
		}
		again, err := ParseURI(u.String())
		if err != nil {
			t.Fatalf("%q gives %q, which is refused: %v", s, u, err)
		}
		if !reflect.DeepEqual(u, again) {
			t.Fatalf("%q gives %+v, and its text %q %+v", s, u, u, again)
		}
	})
}

// Errors go to logs.
func TestParseURIPassword(t *testing.T) {
	_, err := ParseURI("nbd+x://me:secret@host/")
	if err == nil || strings.Contains(err.Error(), "secret") || !strings.Contains(err.Error(), "//me:***@host/") {
		t.Errorf("got %v", err)
	}
}
