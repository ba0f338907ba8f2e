// Package loader finds nbdkit modules, loads them into the process and serves
// each as a [backend.Backend] or a [backend.Filter].
//
// [Find] turns a name into a file, [Open] loads a plugin from it and checks it,
// [OpenFilter] does the same for a filter, of any release of nbdkit that package abi
// knows, and the [Plugin] and its filters are then handed to [backend.NewChain], which takes it through
// its life cycle. A module is never unloaded from memory: threads of its own and
// of the libraries it brought may still run in it.
//
// # Goroutines
//
// [Init] comes first, then the settings, then Open. They, and the methods of
// Plugin that are not given a [backend.Call], are called by the one goroutine
// that is kept on the process's main thread: some modules insist on that thread,
// and it is the one that runs their .load. What takes a Call runs on the thread
// the goroutine happens to be on, or in [OnMain] on the main one if it is Ruby's
// plugin; all that the C side knows of the call is set anew at
// each one. The functions of [Host] are called on any thread, also on
// those that modules create.
//
// A program that is not nbdhost begins its main goroutine with [runtime.LockOSThread], in
// an init function, and makes these calls there. Some plugins work without that; which ones
// is not known.
//
// # One process
//
// What [Init] and the settings do holds for the process, for all of its servers: there is
// one Host, and [Quit] is for good. A library has its variables once, so a plugin can be
// served once at a time.
//
// # Signals
//
// Init leaves SIGURG, SIGCHLD and SIGWINCH to the kernel's default, since Go's handlers
// of them interrupt what modules wait for: a goroutine is preempted at its next function
// call only, so that a loop without one holds up all others, and [os/signal.Notify] brings
// none of the three. SIGPIPE ends nothing; [EndConfiguration] has it ignored.
//
// Modules change signal handlers that the Go runtime needs, or that stop the
// server. Open records them before the module is loaded, and these are put back
// (a module keeps its handlers of other signals, made fit for Go's threads) after
// each step that is known to change them: the loading itself, .load, .config, .config_complete,
// .get_ready, .after_fork and each .open of a plugin. So os/signal must be set up
// before Open.
package loader
