// Package client is an asynchronous NBD client.
//
// Dial or New connects, negotiates and returns a Conn in the transmission
// phase; Disconnect or Close ends it. List and Info ask a server about its
// exports on a connection of their own.
//
// A command is issued by one of the Aio methods, which returns a cookie at
// once: a number of at least 1, never given out twice by one Conn. Later its
// completion function is called, exactly once, whatever happens. If the method
// returned an error nothing was issued, and the completion is never called. A
// completion that returns 1 retires the command; any other command, also one with a
// nil completion, stays known until AioCommandCompleted has told its result.
// AioCancel completes a command before its reply is there. Pread, Pwrite and the
// others issue a command and wait for it; With gives them a context.
//
// # Goroutines
//
// Any number of goroutines may use a Conn. It has one of its own, which receives. It
// takes what the socket holds, goes through all replies in it, and calls their
// completions. The requests that these issue leave in one write when nothing more is
// in hand. A request that is issued elsewhere leaves at once if nothing else is in
// flight; otherwise a second goroutine collects what is issued meanwhile and sends
// it in one write. That one also sends what the socket has no room for, so that
// issuing never waits, and ends when it has nothing left to do.
//
// A completion that blocks holds up the connection, and one that waits for another
// command never returns; issuing commands from a completion is fine. Completions run
// on the receiving goroutine, one after the other, but for two kinds: that of a
// command that AioCancel cancels, which runs there, and that of a large write that the
// server answers before its sender has noted that all of it is sent, which may run
// beside others.
//
// A buffer that was handed to a command belongs to the Conn until the completion is
// called. The data of large reads and writes goes between it and the kernel without
// a copy. Issuing and completing a command allocates nothing if its completion does
// not.
//
// # Protocol
//
// Extended headers are asked for first, then structured replies; with the former
// commands that carry no data may have 64 bits of length. No command is split: one
// that is too long fails.
//
// When the connection is lost, every command in flight completes with an error
// that wraps ErrDisconnected, after all buffers have been let go.
//
// Unless Options.Strict says so the client does not hold a command against the
// export's size or flags: that is the server's to refuse, and tests want to see
// it do so. What it receives it does check, and a server that breaks the protocol
// loses the connection.
package client
