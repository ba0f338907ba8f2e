// Package monitor shows over HTTP how a server is: to Prometheus at /metrics, and to
// whoever starts and stops it at /livez and /readyz.
//
// # Life cycle
//
// [Listen] binds the address, before rights are given up. [Serve] answers from then on;
// the server is not ready until [Monitor.Attach] names it, and not any more once that
// begins to stop. [Monitor.Close] ends everything, after the last connection of a client.
// A program with an HTTP server of its own takes [New] and [Monitor.Handler] instead, and
// has nothing to close. A monitor is for one server; who has several gives each its own.
//
// # Goroutines
//
// Each HTTP request has one of its own, and there are few at a time. They take figures
// from [server.Server.Stats] and from the chain, which count all the time, whether
// anybody asks or not. A read through the plugin is made for one request at a time, and
// its result serves those that come within a second.
package monitor
