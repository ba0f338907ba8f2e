package loader_test

import (
	"fmt"
	"log"
	"net"
	"os"

	"nbdhost/backend"
	"nbdhost/loader"
	"nbdhost/server"
)

// A program serves 1 GiB of nbdkit's memory plugin, until the plugin wants it to stop. Since some
// plugins insist on the main thread, this is the main goroutine, and an init function has called
// runtime.LockOSThread.
func Example() {
	must := func(err error) {
		if err != nil {
			log.Fatal(err)
		}
	}
	var s *server.Server
	must(loader.Init(loader.Host{
		Log:      func(m loader.Message) { fmt.Fprintln(os.Stderr, m.Level, m.Module, m.Text) },
		Shutdown: func() { s.Shutdown() },
	}))
	found, err := loader.Find(loader.PluginKind, "memory")
	must(err)
	plugin, err := loader.Open(found.Path)
	must(err)

	chain := backend.NewChain(plugin, nil, backend.Trace{})
	chain.Load()
	must(chain.Config("size", "1G"))
	must(chain.ConfigComplete())
	must(chain.SetThreadModel(backend.Parallel))
	must(chain.GetReady())
	loader.EndConfiguration()
	s = server.New(server.Options{Chain: chain})
	must(chain.AfterFork())

	l, err := net.Listen("unix", "/run/nbd.sock")
	must(err)
	must(s.Serve(l)) // until somebody calls s.Shutdown
	loader.Quit()
	if !s.Wait() {
		loader.Exit(1) // a call has not come back: the plugin must not be called any more
	}
	chain.Cleanup()
	chain.Unload()
}
