package tests

import (
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"nbdhost/protocol"
)

// TestProtocolPage holds docs/protocol.md to tests that exist, each row to at least
// one, and the page to every name of the protocol.
func TestProtocolPage(t *testing.T) {
	b, err := os.ReadFile("../docs/protocol.md")
	if err != nil {
		t.Fatal(err)
	}
	page := string(b)
	exists := map[string]bool{}
	function := regexp.MustCompile(`(?m)^func ((?:Test|Fuzz)\w+)\(`)
	for _, pkg := range []string{"protocol", "server", "client", "nbdtls", "backend", "tests"} {
		files, err := filepath.Glob("../" + pkg + "/*_test.go")
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range files {
			b, err := os.ReadFile(f)
			if err != nil {
				t.Fatal(err)
			}
			for _, m := range function.FindAllStringSubmatch(string(b), -1) {
				exists[pkg+"."+m[1]] = true
			}
		}
	}
	test := regexp.MustCompile("`(\\w+\\.(?:Test|Fuzz)\\w+)`")
	for _, line := range strings.Split(page, "\n") {
		named := test.FindAllStringSubmatch(line, -1)
		row := strings.HasPrefix(line, "|") && !strings.HasPrefix(line, "|--") && !strings.HasSuffix(line, " shown by |")
		if row && len(named) == 0 {
			t.Errorf("no test is named in %q", line)
		}
		for _, m := range named {
			if !exists[m[1]] {
				t.Errorf("there is no test %s", m[1])
			}
		}
	}

	var names []string
	for o := protocol.OptExportName; o <= protocol.OptExtendedHeaders; o++ {
		names = append(names, o.String())
	}
	for r := protocol.RepAck; r <= protocol.RepMetaContext; r++ {
		names = append(names, r.String())
	}
	for r := protocol.RepErrUnsup; r <= protocol.RepErrExtHeaderReqd; r++ {
		names = append(names, r.String())
	}
	for i := protocol.InfoExport; i <= protocol.InfoBlockSize; i++ {
		names = append(names, i.String())
	}
	for _, c := range protocol.Commands {
		names = append(names, c.Name)
	}
	for _, r := range []protocol.ReplyType{
		protocol.ReplyNone, protocol.ReplyOffsetData, protocol.ReplyOffsetHole, protocol.ReplyBlockStatus,
		protocol.ReplyBlockStatusExt, protocol.ReplyError, protocol.ReplyErrorOffset,
	} {
		names = append(names, r.String())
	}
	for _, e := range []protocol.Errno{
		protocol.EPERM, protocol.EIO, protocol.ENOMEM, protocol.EINVAL, protocol.ENOSPC, protocol.EOVERFLOW, protocol.ENOTSUP, protocol.ESHUTDOWN,
	} {
		names = append(names, e.String())
	}
	for i := range 16 {
		for _, s := range []string{
			protocol.HandshakeFlags(1 << i).String(), protocol.ClientFlags(1 << i).String(), protocol.ExportFlags(1 << i).String(),
			protocol.CommandFlags(1 << i).String(), protocol.ReplyFlags(1 << i).String(),
		} {
			if strings.HasPrefix(s, "NBD_") { // else the bit has no name
				names = append(names, s)
			}
		}
	}
	for _, name := range names {
		if !regexp.MustCompile(`\b` + name + `\b`).MatchString(page) {
			t.Errorf("docs/protocol.md does not mention %s", name)
		}
	}
}
