package check_test

import (
	"fmt"
	"log"
	"os"

	"nbdhost/backend"
	"nbdhost/check"
)

// A disk is a backend in Go, with what checks ask a plugin for.
type disk struct{ *backend.Mem }

func (disk) APIVersion() int        { return 2 }
func (disk) StructSize() uint64     { return 0 }
func (disk) Version() string        { return "1.0" }
func (disk) ConfigHelp() string     { return "" }
func (disk) MagicConfigKey() string { return "" }

// A backend in Go is checked as a plugin is.
func ExampleSubject_Run() {
	d := disk{backend.NewMem(1 << 20)}
	s := &check.Subject{
		Open:    func() (check.Plugin, error) { return d, nil },
		Start:   func() (*backend.Chain, error) { return backend.NewChain(d, nil, backend.Trace{}), nil },
		Serving: func(serve func()) { serve() },
		Stop:    func() {}, // Mem has no .cleanup and no .unload
		Writes:  true,
	}
	names, err := check.Select([]string{"size", "flush", "zero"})
	if err != nil {
		log.Fatal(err)
	}
	report, err := check.NewReporter("text", os.Stdout, d.Name(), len(names), false)
	if err != nil {
		log.Fatal(err)
	}
	if err := s.Run(names, report.Begin, report.End); err != nil {
		log.Fatal(err)
	}
	fmt.Println(report.Close())
	// Output:
	// ok    size.stable
	// skip  size.blocks: the plugin has no block size
	// ok    flush.data
	// ok    zero.data
	// ok    zero.no_hole
	// ok    zero.fast
	// 6 checks: 5 hold, 0 fail, 1 skipped
	// <nil>
}
