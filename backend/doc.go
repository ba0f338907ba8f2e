// Package backend is the generic layer between the NBD server and the modules
// (plugins and filters) that hold the data. It knows neither the wire protocol
// nor C.
//
// A [Module] is a plugin ([Backend]) or a [Filter]: it says which callbacks it has
// and performs them, and nothing else. A [Chain] stacks them, filters outside and
// the plugin innermost; each is a [Layer], which a filter calls for what is below
// it. The chain takes them through nbdkit's life cycle:
//
//	load -> config* -> config_complete -> thread_model -> get_ready -> after_fork ->
//	{ preconnect -> (list_exports | default_export)* -> open -> prepare ->
//	  get_size, can_*, block_size (each asked once, then cached) ->
//	  requests -> finalize -> close }* -> cleanup -> unload
//
// Up to after_fork the plugin comes first where each layer is called by the chain;
// prepare goes from the plugin outwards, finalize and close from the outside inwards.
//
// A [Session] is what an open returned: the handle of one layer for one
// connection, over the session of the next layer. All policy stands in Session: the order of calls, what is asked
// only once, what stands in for a callback that a module lacks (a flush for
// FUA, a pwrite for zero, a pread for cache, all allocated for extents), and
// which requests never reach a module. What needs none of it can go to the module
// without it, a call at a time ([Session.Direct]) or several ([Burst]).
//
// # Goroutines
//
// Everything from load to after_fork, and cleanup and unload, is called by one
// goroutine, which cmd/nbdhost keeps on the process's main thread. Everything
// that takes a [Call] is called by any goroutine of the server, each with a Call
// of its own; the [Gate] holds them back as the thread model of the chain
// demands, before the call and never inside it, because a goroutine that waits
// inside a callback from C keeps its thread. Where the chain is pinned all calls for one
// connection come from one thread. A filter may call the layer below on
// any goroutine, with the Call that [Conn.Call] gives it.
package backend
