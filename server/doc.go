// Package server speaks the NBD protocol to clients and calls a backend.Chain
// for what they want. It knows nothing of C.
//
// # Life cycle
//
// [New] takes a chain that is ready to serve. Any number of [Server.Serve] and
// [Server.ServeConn] run until [Server.Shutdown], which may be called on any
// thread; [Server.Wait] then waits until every connection has been closed, for a
// bounded time. After that the caller ends the chain.
//
// # A connection
//
// One goroutine takes a connection through preconnect, the handshake
// (handshake.go) and, once an export is open, the transmission phase (reader.go):
// it receives as much as the socket holds in one system call, runs every complete
// request, and sends the replies with one or two more. While the connection is idle it
// holds no buffer, and after a while no reader either: it is parked (park.go). Where
// requests follow each other at once, and few connections are active, the goroutine
// blocks in the receive and keeps the poller out of it (socket.go). Who has a part in the
// connection last ends it.
//
// Calls that are short, or that the thread model serialises, run on that
// goroutine. Short reads and writes in hand are carried out together (burst.go). Long ones
// are for workers where they gain by it (reader.ahead). Where calls
// take long (pace.go) they go to workers, which are started when they are needed (worker.go),
// and the runtime's monitor is kept awake, so that more of them can block than Go has
// processors (procs.go). The last request in hand stays with the reader, if few calls are under
// way; its connection goes to another goroutine when the client sends more (guard.go). A call
// that was expected to be short and is not loses the connection: the watcher (watch.go)
// hands the connection to a new goroutine at its second look, after one to sixteen
// milliseconds, together with the replies that wait to be sent and the requests that wait
// to be run. So one slow request never holds up the others. Where threads wait for
// processors (contention.go) a long call is not taken for a slow one.
//
// A chain that is pinned has all calls for a connection made on one thread, that of the
// goroutine of its handshake: such a connection is never parked, and a long call does not lose
// it, but the replies that wait for the call are sent.
//
// A request of more than 4 GiB, which only clients with extended headers can make,
// becomes several calls, and others go between them (task.go). A long read that
// brings zeroes only is answered with a hole (sparse.go). Replies are composed in memory
// that has nothing of another client's in it (backend.Buffer.Claim).
//
// What one client can make the server hold is bounded, also where it never reads
// its replies: Limits.BytesPerConnection for requests that run on workers, or are
// large, until their replies are sent; a buffer of input, which is for the request under way or of
// 3 MiB at most, at most Options.Threads small requests that were taken for short, or a burst of
// them, and 1 MiB of small replies behind them. Then no more calls are made for it. Block status
// is bounded by the number of calls, each by backend.MaxExtents, and by the module's own
// list of 2^20 extents while it lasts.
//
// # Limits and figures
//
// A connection beyond the limits is admitted only to be told why not (limits.go). A
// request that must wait for bytes or bandwidth does so on the reader, before it has a buffer,
// and so holds up its own connection alone. What it takes from the budgets of bytes goes with
// its reply, through the batch and the sender, until that is written. Limits.Requests is taken
// for calls only, with the turn that the thread model gives: no client can hold it.
//
// [Server.Stats] adds up what tasks have counted (stats.go). A task counts in memory of
// its own and tells its connection before it sends: of requests that are in hand together none
// costs an atomic operation or a reading of the clock for that. [Server.Probe] is a
// health check's read (probe.go).
//
// # Who owns what
//
// A reader owns its input and output buffers. While a call runs (state busy)
// nobody touches them but the call, or the calls of a burst, and a watcher that takes the
// connection away copies what it needs and leaves both to the call. Everything sent goes through
// the connection's sender, which has one writer at a time (sender.go).
package server
