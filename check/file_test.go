package check

import (
	"maps"
	"os"
	"slices"
	"strings"
	"testing"
)

// What plugins may call is what the server has for them.
func TestReleases(t *testing.T) {
	syms, err := os.ReadFile("../cshim/nbdkit.syms")
	if err != nil {
		t.Fatal(err)
	}
	want := strings.Fields(string(syms))
	slices.Sort(want)
	if got := slices.Sorted(maps.Keys(releases)); !slices.Equal(got, want) {
		t.Errorf("got\n%q\nneed the names of nbdkit.syms\n%q", got, want)
	}
}
