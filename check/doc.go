// Package check holds a plugin to its promises: those of nbdkit-plugin(3) to the
// server, and those that its capabilities make to clients.
//
// [Checks] is the one table of checks. A [Subject] is a plugin under check; its
// [Subject.Run] goes through the table in order: first what the file says, then
// the plugin is opened, configured and asked, then it is served, in process, to
// package client, over socket pairs and a Unix socket. Every check opens the
// connections that it needs, and has closed them when it returns. A backend in Go is
// held to the same promises (see the example of [Subject.Run]).
//
// Nothing is modified unless Subject.Writes is set: without it the plugin is
// opened read-only. With it the middle and the end of the export are written to,
// and what was there before is written back.
//
// A plugin may crash or hang, and take the process with it. So Run tells of each
// check before it runs it, and a caller that wants to survive runs the subject in
// a process of its own, and this function over there; cmd/nbdhost does so.
//
// # Goroutines
//
// Run, and with it the functions Open and Start of the subject, are called by one
// goroutine; the server and the clients bring their own.
package check
