package tests

import (
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"
)

const secret = "k0nfidential"

// showProcesses is a command for --run: it shows what ps(1) does of the server, and of the
// processes that this has started, and then lets a client do what it can.
const showProcesses = `for p in $PPID $(cat /proc/$PPID/task/*/children); do tr '\0' ' ' </proc/$p/cmdline; echo; done
nbdinfo "$uri"; nbdsh -u "$uri" -c 'h.pread(512, 0)'; true`

// TestSecrets: what a plugin is told in confidence is in no message, also with -v and where
// the plugin prints it itself, and not in the list of processes; and the plugin gets it.
func TestSecrets(t *testing.T) {
	t.Parallel()
	onlyNbdhost(t)
	var mu sync.Mutex
	received := map[string]bool{} // headers that had the secret
	web := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		mu.Lock()
		if _, password, _ := r.BasicAuth(); password == secret {
			received["password"] = true
		}
		if strings.Contains(r.Header.Get("Proxy-Authorization"), "Basic ") {
			received["proxy-password"] = true
		}
		for _, h := range []string{"Authorization", "Cookie", "X-Auth-Token"} {
			if strings.Contains(r.Header.Get(h), secret) {
				received[h] = true
			}
		}
		if r.URL.Query().Get("token") == secret {
			received["token"] = true
		}
		mu.Unlock()
		http.ServeContent(w, r, "disk", time.Time{}, strings.NewReader(strings.Repeat("x", 1<<20)))
	}))
	t.Cleanup(web.Close)
	address := strings.TrimPrefix(web.URL, "http://")
	dir := tempDir(t)
	file := func(name, text string) string {
		path := filepath.Join(dir, name)
		writeFile(t, path, text, 0o600)
		return path
	}
	keys := file("keys.psk", "me:"+fmt.Sprintf("%x", secret)+"\n")
	password := file("password", secret+"\n")
	vddk := vddkPath(t, dir)

	var tests sync.WaitGroup
	for name, test := range map[string]struct {
		args     []string
		env      []string
		received string // a header that must have come
		// nothing: there is nothing to hide, but that must not be shown.
		nothing bool
	}{
		"curl password":                   {args: []string{"curl", "url=" + web.URL, "user=me", "password=" + secret}, received: "password"},
		"curl password in a file":         {args: []string{"curl", "url=" + web.URL, "user=me", "password=+" + password}, received: "password", nothing: true},
		"curl proxy-password":             {args: []string{"curl", "url=http://example.invalid/", "proxy=" + web.URL, "proxy-user=me", "proxy-password=" + secret}, received: "proxy-password"},
		"curl password in the proxy":      {args: []string{"curl", "url=http://example.invalid/", "proxy=http://me:" + secret + "@" + address}, received: "proxy-password"},
		"curl cookie":                     {args: []string{"curl", "url=" + web.URL, "cookie=session=" + secret}, received: "Cookie"},
		"curl header Authorization":       {args: []string{"curl", "url=" + web.URL, "header=Authorization: Bearer " + secret}, received: "Authorization"},
		"curl header X-Auth-Token":        {args: []string{"curl", "url=" + web.URL, "header=X-Auth-Token: " + secret}, received: "X-Auth-Token"},
		"curl cookie-script":              {args: []string{"curl", "url=" + web.URL, "cookie-script=cat '" + file("cookie", "session="+secret) + "'"}, received: "Cookie", nothing: true},
		"curl password in the URL":        {args: []string{"curl", "url=http://me:" + secret + "@" + address + "/"}, received: "password"},
		"curl magic parameter":            {args: []string{"curl", "http://me:" + secret + "@" + address + "/"}, received: "password"},
		"curl token in the URL":           {args: []string{"curl", "url=" + web.URL + "/?token=" + secret}, received: "token"},
		"curl parameters in a file":       {args: []string{"curl", "@" + file("params", "url="+web.URL+"\nuser=me\npassword="+secret+"\n")}, received: "password", nothing: true},
		"curl parameters in NBDHOST_ARGS": {args: []string{"url=" + web.URL}, env: []string{"NBDHOST_ARGS=curl user=me password=" + secret}, received: "password", nothing: true},
		"ssh password":                    {args: []string{"ssh", "host=127.0.0.1", "port=1", "/disk", "user=me", "password=" + secret}},
		"ssh password in a file":          {args: []string{"ssh", "host=127.0.0.1", "port=1", "/disk", "user=me", "password=+" + password}, nothing: true},
		"vddk password":                   {args: []string{vddk, "server=host", "user=me", "file=disk", "password=" + secret}},
		"vddk password in a file":         {args: []string{vddk, "server=host", "user=me", "file=disk", "password=+" + password}},
		"vddk cookie":                     {args: []string{vddk, "server=host", "file=disk", "cookie=" + secret}},
		"luks passphrase":                 {args: []string{"--filter=luks", "memory", "1M", "passphrase=" + secret}},
		"luks passphrase in a file":       {args: []string{"--filter=luks", "memory", "1M", "passphrase=+" + password}, nothing: true},
		"S3 keys":                         {args: []string{"S3", "endpoint-url=" + web.URL, "bucket=b", "key=disk", "access-key=" + secret, "secret-key=" + secret, "session-token=" + secret}},
		"nbd uri":                         {args: []string{"nbd", "uri=nbds://me:" + secret + "@127.0.0.1:1/"}},
		"nbd tls-psk":                     {args: []string{"nbd", "hostname=127.0.0.1", "port=1", "retry=0", "tls=require", "tls-username=me", "tls-psk=" + keys}, nothing: true},
		"--tls-psk":                       {args: []string{"--tls=require", "--tls-psk=" + keys, "memory", "1M"}, nothing: true},
		"environment":                     {args: []string{"-D", "nbdkit.environ=1", "memory", "1M"}, env: []string{"AWS_SECRET_ACCESS_KEY=" + secret}},
		"the wrong plugin":                {args: []string{"memory", "1M", "password=" + secret}},
		"the wrong order":                 {args: []string{"null", "x", "password=" + secret, "https://me:" + secret + "@host/"}, nothing: true},
		"python":                          {args: []string{"python", "script=" + file("p.py", "import nbdkit\ndef config(k, v):\n nbdkit.debug('%s is %s' % (k, v))\ndef open(r):\n return 1\ndef get_size(h):\n return 512\ndef pread(h, b, o, f):\n raise Exception('no')\nAPI_VERSION = 2\n"), "api_key=" + secret}},
	} {
		tests.Add(1)
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			defer tests.Done()
			for _, mode := range [][]string{nil, {"--supervise"}, {"--log-format=json"}} {
				dir := tempDir(t)
				args := append(mode, "-v", "-D", "curl.verbose=1", "-U", filepath.Join(dir, "sock"), "--run", showProcesses)
				// In the environment of a shell, since the harness has none of its own.
				got := runCLI(t, dir, "", "/usr/bin/env", append(append(test.env, nbdhost), append(args, test.args...)...)...)
				for what, text := range map[string]string{"standard error": got.stderr, "the list of processes": got.stdout} {
					for line := range strings.Lines(text) {
						if strings.Contains(line, secret) || strings.Contains(line, fmt.Sprintf("%x", secret)) || strings.Contains(line, "k0nf") {
							t.Errorf("%v: %s shows the secret: %s", mode, what, line)
						}
					}
				}
				if !test.nothing && !strings.Contains(got.stderr, "***") {
					t.Errorf("%v: nothing was hidden:\n%s", mode, got.stderr)
				}
				if (len(got.stdout) == 0) != strings.HasPrefix(name, "the wrong") {
					t.Errorf("%v: the list of processes is %q\n%s", mode, got.stdout, got.stderr)
				}
			}
			mu.Lock()
			defer mu.Unlock()
			if test.received != "" && !received[test.received] {
				t.Errorf("no request had the secret as %s", test.received)
			}
		})
	}
	// The web server is for all of them.
	t.Run("background", func(t *testing.T) {
		t.Parallel()
		dir := tempDir(t)
		pidfile := filepath.Join(dir, "pid")
		got := runCLI(t, dir, "", nbdhost, "-U", "sock", "-P", pidfile, vddk, "server=host", "user=me", "file=disk", "password="+secret)
		if got.status != 0 {
			t.Fatal(got.stderr)
		}
		pid := strings.TrimSpace(command(t, "cat", pidfile))
		t.Cleanup(func() { try(t, "kill", "-KILL", pid) })
		line, err := os.ReadFile("/proc/" + pid + "/cmdline")
		if err != nil {
			t.Fatal(err)
		}
		shown := strings.TrimRight(strings.ReplaceAll(string(line), "\x00", " "), " ")
		if want := fmt.Sprintf("%s -U sock -P %s %s server=host user=me file=disk password=***", nbdhost, pidfile, vddk); shown != want {
			t.Errorf("the list of processes has %q, want %q", shown, want)
		}
	})

	// Clients are strangers too.
	t.Run("client", func(t *testing.T) {
		t.Parallel()
		script := filepath.Join(tempDir(t), "script")
		writeFile(t, script, "#!/bin/sh\ncase $1 in\nconfig) echo \"$3\" >$tmpdir/value ;;\nget_size) echo 1M ;;\npread) echo EIO cannot use $(cat $tmpdir/value) >&2; exit 1 ;;\n*) exit 2 ;;\nesac\n", 0o700)
		s := startHost(t, "sh", script, "password="+secret)
		c := s.hello(true)
		c.read(1, 0, 512)
		if r := c.next(); !strings.HasSuffix(r.msg, "cannot use ***") {
			t.Errorf("the client was told %q", r.msg)
		}
		c.disc()
		s.stop()
		wantLog(t, s, `nbdkit: sh\[1\]: error: .*cannot use \*\*\*`)
	})
}
