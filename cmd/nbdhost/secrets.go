package main

import (
	"cmp"
	"net/url"
	"os"
	"regexp"
	"slices"
	"strings"
	"sync"
	"sync/atomic"

	"nbdhost/loader"
)

// hidden is what messages have in the place of a secret.
const hidden = "***"

// minSecret is the least length in bytes of a text that is hidden wherever it occurs.
// A shorter one would hide half of every message; it is hidden after its key.
const minSecret = 4

// secrets knows what no message, no client and no list of processes may show: the values
// of parameters with such names, what is in URLs and headers, and every password that
// a module reads with nbdkit_read_password(3). The nil one knows patterns only. It may
// be used on any thread.
type secrets struct {
	bare bool // a process that is started again needs its arguments as they are: see runsAgain

	mu       sync.Mutex
	hide     map[string]string
	replacer atomic.Pointer[strings.Replacer]
}

// add hides text, and the ways in which URLs and debug messages write it.
func (s *secrets) add(text string) {
	if len(text) < minSecret {
		return
	}
	for _, t := range []string{text, url.QueryEscape(text), url.PathEscape(text), strings.ReplaceAll(text, `\`, `\\`)} {
		s.replace(t, hidden)
	}
}

func (s *secrets) replace(text, by string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.hide == nil {
		s.hide = map[string]string{}
	}
	if _, ok := s.hide[text]; ok {
		return
	}
	s.hide[text] = by
	texts := make([]string, 0, len(s.hide))
	for t := range s.hide {
		texts = append(texts, t)
	}
	// Of two that begin in one place the longer one has to go whole.
	slices.SortFunc(texts, func(a, b string) int { return cmp.Or(cmp.Compare(len(b), len(a)), cmp.Compare(a, b)) })
	var pairs []string
	for _, t := range texts {
		pairs = append(pairs, t, s.hide[t])
	}
	s.replacer.Store(strings.NewReplacer(pairs...))
}

// learn takes in the secrets among arguments or variables of the form KEY=VALUE.
func (s *secrets) learn(args []string) {
	for _, arg := range args {
		key, value, ok := strings.Cut(arg, "=")
		if !ok || !isKey(key) {
			key, value = "", arg
		}
		s.learnParameter(key, value)
	}
}

// learnParameter takes in what is secret of one parameter.
func (s *secrets) learnParameter(key, value string) {
	if value == "" {
		return
	}
	name := strings.ReplaceAll(strings.ToLower(key), "_", "-")
	switch {
	case strings.Contains(name, "pass") && (value == "-" || value[0] == '+' || isDescriptor(value)):
		return // where the password is
	case name == "header" || name == "proxy-header":
		s.learnHeader(value)
	case isSecret(name):
		s.add(value)
		s.replace(key+"="+value, key+"="+hidden)
		s.replace("key="+key+", value="+value, "key="+key+", value="+hidden)
		if strings.Contains(name, "cookie") {
			s.learnCookies(value)
		}
	}
	if strings.Contains(value, "://") {
		s.learnURL(value)
	}
}

// isDescriptor tells whether nbdkit_read_password(3) takes value for a descriptor.
func isDescriptor(value string) bool {
	digits, ok := strings.CutPrefix(value, "-")
	return ok && digits != "" && strings.Trim(digits, "0123456789") == ""
}

func (s *secrets) learnHeader(header string) {
	name, value, _ := strings.Cut(header, ":")
	value = strings.TrimSpace(value)
	if !isSecret(strings.ToLower(strings.TrimSpace(name))) {
		return
	}
	s.add(value)
	if _, token, ok := strings.Cut(value, " "); ok { // "Bearer TOKEN"
		s.add(strings.TrimSpace(token))
	}
	s.learnCookies(value)
}

// learnCookies takes in the values in "a=1; b=2".
func (s *secrets) learnCookies(list string) {
	for c := range strings.SplitSeq(list, ";") {
		if _, v, ok := strings.Cut(c, "="); ok && len(v) >= 2*minSecret {
			s.add(strings.TrimSpace(v))
		}
	}
}

func (s *secrets) learnURL(text string) {
	u, err := url.Parse(text)
	if err != nil {
		return // patterns have to do
	}
	if password, ok := u.User.Password(); ok {
		s.add(password)
	}
	for name, values := range u.Query() {
		if isSecret(strings.ToLower(name)) {
			for _, v := range values {
				s.add(v)
			}
		}
	}
}

// secretName matches what is secret by its name: a parameter, a variable, a header, a
// part of a query. References, such as a file's name, are not.
var (
	secretName = regexp.MustCompile(`passw|passphrase|(^|-)pass$|secret|token|cookie|credential|(access|api|private|account|shared|auth)-?key|^key$|` +
		`(^|-)(auth|authorization|signature|sig|psk)$|^x-auth`)
	reference = regexp.MustCompile(`(script|script-renew|file|jar|path|dir)$`)
)

func isSecret(name string) bool {
	name = strings.ReplaceAll(name, "_", "-")
	return name != "key" && name != "tls-psk" && secretName.MatchString(name) && !reference.MatchString(name)
}

// Patterns of what is secret wherever it comes from, such as an address to which a web
// server redirects.
var (
	userInfo   = regexp.MustCompile(`(://[^/?#@\s:]*:)[^/?#\s]*@`)
	queryValue = regexp.MustCompile(`([?&])([A-Za-z0-9_.-]+)=([^&\s"'#]+)`)
	// In debug messages ends of lines are written \r\n, as in C.
	headerValue = regexp.MustCompile(`(?i)(^|\\[rn]|[^a-z0-9-])((?:proxy-)?authorization|(?:set-)?cookie|x-[a-z0-9-]*(?:token|key|secret)[a-z0-9-]*)(: *)(?:[^\\]|\\[^rn])+`)
)

// redact returns text without the secrets in it.
func (s *secrets) redact(text string) string {
	if s != nil {
		if r := s.replacer.Load(); r != nil {
			text = r.Replace(text)
		}
	}
	if strings.Contains(text, "://") {
		text = userInfo.ReplaceAllString(text, "${1}"+hidden+"@")
		if strings.Contains(text, "?") {
			text = queryValue.ReplaceAllStringFunc(text, func(m string) string {
				if name, _, _ := strings.Cut(m[1:], "="); isSecret(strings.ToLower(name)) {
					return m[:1] + name + "=" + hidden
				}
				return m
			})
		}
	}
	if strings.Contains(text, ":") && mayHaveHeader(text) {
		text = headerValue.ReplaceAllString(text, "$1$2$3"+hidden)
	}
	return text
}

// mayHaveHeader is quicker than the pattern.
func mayHaveHeader(text string) bool {
	for _, part := range []string{"uthorization", "UTHORIZATION", "ookie", "OOKIE", "oken", "OKEN", "x-", "X-"} {
		if strings.Contains(text, part) {
			return true
		}
	}
	return false
}

// redactAll returns args without the secrets in them.
func (s *secrets) redactAll(args []string) []string {
	list := make([]string, len(args))
	for i, arg := range args {
		list[i] = s.redact(arg)
	}
	return list
}

// hideArguments takes the secrets out of what ps(1) shows of this process.
func (s *secrets) hideArguments(args []string) {
	if shown := s.redactAll(args); !slices.Equal(shown, args) {
		loader.SetCommandLine(shown)
	}
}

// cloneArguments returns the command line in memory of its own: that of os.Args is what
// ps(1) shows.
func cloneArguments() []string {
	args := make([]string, len(os.Args))
	for i, arg := range os.Args {
		args[i] = strings.Clone(arg)
	}
	os.Args = args
	return args
}
