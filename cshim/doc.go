// Package cshim is where Go and C modules meet, and the only package that uses
// cgo. It has two halves:
//
//   - the nbdkit_* functions that modules call. All are C, since variadic
//     functions cannot be exported from Go, and the executable exports them by
//     name; nbdkit.syms lists them. Text and list functions are C whole; what
//     concerns the server (log, shutdown, disconnect) goes to the functions of [Host].
//   - the Call functions, one per shape of callback, through which the loader calls
//     modules. Each is one crossing: it sets the state of the call (connection,
//     worker, no error), calls, and collects the result in the same C function. A
//     [Burst] is several reads and writes in one crossing.
//
// Filters add to both: what they call next is C too, tables of functions that make
// one request each of the Go values ([Below], [OpenFilter], [NextSession]) whose
// handles are in the C objects that filters hold. A handle is never used again, so
// that a filter which uses an object too late gets an error. Reads and writes need
// no Go once [Next.Direct] has said which callback they are for.
//
// There is no policy here: no fallback, nothing is asked and remembered, and a range is
// only compared to know that there is nothing to be decided about it. One function of
// libc is exported besides: pthread_mutex_init, which makes adaptive mutexes (mutex.c).
//
// # Lifecycle
//
// [Init], [SetHost] and the other settings, [SaveSignals], then the modules are
// loaded and called, with [RestoreSignals] after the callbacks that it names.
// For each connection [NewConn], [NewContext] as needed, the calls, then
// [Context.Free] and last [Conn.Free]. [SetQuit] when the server begins to
// stop. [Exit] ends the process.
//
// # Threads
//
// A Call function may be called on any goroutine, for as many calls at once as the
// thread model of the module allows; nothing here serializes them. The state of a
// call is thread-local C data on the C stack, so calls nest: a callback may reach a
// Host function, which may call a module again.
//
// The Host functions run on whichever thread the module called from, also one that
// the module made. A process that a module forked never enters Go: its log lines
// are written to standard error, and its requests to shut down or disconnect
// are dropped.
//
// Threads that call modules get a larger stack for signal handlers than Go's, and
// signals that a process without handlers ignores are left alone, SIGURG among
// them: the runtime preempts at function calls only.
//
// # Memory
//
// Conn, Context and CStr are C memory; a [Burst] is Go's, which C uses during its Run. No Go
// pointer is kept by C but that of a pinned counter ([Next.Direct]); a pointer passed to a
// Call function is the module's until the call returns.
package cshim
