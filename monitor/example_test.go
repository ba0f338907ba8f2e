package monitor_test

import (
	"fmt"
	"net/http"
	"net/http/httptest"

	"nbdhost/backend"
	"nbdhost/monitor"
	"nbdhost/server"
)

// A program that has an HTTP server shows there how its NBD server is.
func ExampleMonitor_Handler() {
	chain := backend.NewChain(backend.NewMem(1<<20), nil, backend.Trace{})
	m := monitor.New(monitor.Options{Chain: chain})
	mux := http.NewServeMux() // the program's
	mux.Handle("/nbd/", http.StripPrefix("/nbd", m.Handler()))
	get := func(path string) int {
		w := httptest.NewRecorder()
		mux.ServeHTTP(w, httptest.NewRequest(http.MethodGet, path, nil))
		return w.Code
	}
	fmt.Println("before:", get("/nbd/livez"), get("/nbd/readyz"))

	srv := server.New(server.Options{Chain: chain})
	m.Attach(srv)
	fmt.Println("serving:", get("/nbd/livez"), get("/nbd/readyz"), get("/nbd/metrics"), get("/metrics"))

	srv.Shutdown()
	srv.Wait()
	fmt.Println("after:", get("/nbd/livez"), get("/nbd/readyz"))
	// Output:
	// before: 200 503
	// serving: 200 200 200 404
	// after: 200 503
}
