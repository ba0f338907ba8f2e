package main

import (
	"testing"
)

func TestRedact(t *testing.T) {
	for _, tt := range []struct {
		params     []string
		text, want string
	}{
		{nil, "memory: config key=size, value=1M", "memory: config key=size, value=1M"},
		{[]string{"password=hunter22"}, "curl: config key=password, value=hunter22", "curl: config key=password, value=***"},
		{[]string{"password=hunter22"}, `opened "https://me@host" with <hunter22>`, `opened "https://me@host" with <***>`},
		{[]string{"password=hunter22", "proxy-password=hunter2255"}, "hunter2255 hunter22", "*** ***"},
		// A short one is hidden after its key only.
		{[]string{"password=abc"}, "config key=password, value=abc; got password=abc; abc", "config key=password, value=***; got password=***; abc"},
		// Where a password is, is no secret.
		{[]string{"password=+/etc/pw", "password=-3", "password=-"}, "value=+/etc/pw value=-3 value=-", "value=+/etc/pw value=-3 value=-"},
		// As URLs and debug messages write it.
		{[]string{`password=a b/c\d+e`}, `a b/c\d+e, a+b%2Fc%5Cd%2Be, a%20b%2Fc%5Cd+e, a b/c\\d+e`, "***, ***, ***, ***"},
		{[]string{"cookie=session=0123456789; theme=dark"}, "Cookie is session=0123456789; theme=dark, or 0123456789", "Cookie is ***, or ***"},
		{[]string{"header=Authorization: Bearer abcdefgh"}, "sent 'Authorization: Bearer abcdefgh', abcdefgh", "sent 'Authorization: ***"},
		{[]string{"header=User-Agent: me"}, "header User-Agent: me", "header User-Agent: me"},
		{[]string{"header=X-Auth-Token: abcdefgh"}, "it is abcdefgh", "it is ***"},
		{[]string{"secret-key=abcdefgh", "access-key=ijklmnop", "session-token=qrstuvwx", "key=disk.img"}, "abcdefgh ijklmnop qrstuvwx disk.img", "*** *** *** disk.img"},
		{[]string{"passphrase=abcdefgh"}, "abcdefgh", "***"},
		{[]string{"cookie-script=/bin/cookie", "cookiefile=/tmp/jar", "cookiejar=/tmp/jar", "tls-psk=/etc/keys.psk"}, "/bin/cookie /tmp/jar /etc/keys.psk", "/bin/cookie /tmp/jar /etc/keys.psk"},
		{[]string{"url=https://me:p%40ssword@host/?token=abcdefgh&part=two"}, "p@ssword p%40ssword abcdefgh two", "*** *** *** two"},
		{[]string{"AWS_SECRET_ACCESS_KEY=abcdefgh"}, "environ: AWS_SECRET_ACCESS_KEY=abcdefgh", "environ: AWS_SECRET_ACCESS_KEY=***"},
		// What nobody has told us.
		{nil, "redirected to https://you:pass@other/x?X-Amz-Signature=abc&X-Amz-Date=1&sig=x", "redirected to https://you:***@other/x?X-Amz-Signature=***&X-Amz-Date=1&sig=***"},
		{nil, "proxy socks5://a:b:c@host:1080 and http://host:80/a@b", "proxy socks5://a:***@host:1080 and http://host:80/a@b"},
		{nil, "> Authorization: Basic bWU6eW91", "> Authorization: ***"},
		{nil, "set-cookie: a=b", "set-cookie: ***"},
		{nil, `C: GET / HTTP/1.1\r\nCookie: a=b\r\nAccept: */*\r\nX-Api-Key: a\\b`, `C: GET / HTTP/1.1\r\nCookie: ***\r\nAccept: */*\r\nX-Api-Key: ***`},
		{nil, "nbd+unix:///?socket=/tmp/a:b", "nbd+unix:///?socket=/tmp/a:b"},
		{nil, "nbds://host:10809/?tls-psk-file=/etc/keys", "nbds://host:10809/?tls-psk-file=/etc/keys"},
		// Options are no parameters.
		{[]string{"--tls-psk=/etc/keys", "-Utoken=1"}, "open /etc/keys", "open /etc/keys"},
	} {
		s := &secrets{}
		s.learn(tt.params)
		if got := s.redact(tt.text); got != tt.want {
			t.Errorf("%q: got\n%s, want\n%s", tt.params, got, tt.want)
		}
	}
	if got := (*secrets)(nil).redact("x"); got != "x" {
		t.Errorf("got %q", got)
	}
}
