// Nbdhost is an NBD server that runs nbdkit plugins. Run it with --help for its
// options.
//
// This package has the flags, the help, the signals and the wiring; what it
// wires is in packages loader, backend and server.
//
// # Life cycle
//
// [run] reads the command line. Unless the server is to stay in the foreground
// it then starts the same program once more ([background]) and waits until that
// says it is ready, since a Go process cannot fork. What remains happens in one
// process, in [serve]: the plugin is opened, loaded and configured; sockets are
// bound after .get_ready, so that no client waits for a server that may fail; then
// the command of --run starts, rights are given up, and after .after_fork clients
// are accepted; the process ID file is written last.
//
// # One table
//
// [optionTable] is the source of parsing, --help, --man, --long-options,
// --short-options and --complete, which the scripts of --completion call.
// For --list and --complete each module is loaded in a process of its own, which
// runs the program with --describe.
//
// # Goroutines
//
// The main goroutine is kept on the main thread of the process: it opens the
// plugin and makes all calls that are not on behalf of a connection. Signals,
// the command of --run and nbdkit_shutdown all end in [server.Server.Shutdown],
// which the main goroutine waits for.
package main
