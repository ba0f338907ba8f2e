// Package client is an asynchronous NBD client.
//
// Dial or New connects, negotiates and returns a Conn in the transmission
// phase; Disconnect or Close ends it. List and Info ask a server about its
// exports on a connection of their own.
//
// A command is issued by one of the Aio methods, which returns a cookie at
// once: a number of at least 1, never given out twice by one Conn. Later its
// completion function is called, exactly once, whatever happens. A completion
// that returns 1 retires the command; any other command stays known until
// AioCommandCompleted has told its result. Pread, Pwrite and the others issue
// a command and wait for it.
//
// Any number of goroutines may use a Conn. It has two of its own: one sends,
// and writes all requests that are queued at the time in one go; one receives.
// Completions run on those two, so one that blocks holds up the connection,
// and one that waits for another command never returns; issuing commands from
// a completion is fine. A buffer that was handed to a command belongs to the
// Conn until the completion is called.
//
// Extended headers are asked for first, then structured replies; with the former
// commands that carry no data may have 64 bits of length.
//
// When the connection is lost, every command in flight completes with an error
// that wraps ErrDisconnected, after both goroutines have let go of all buffers.
//
// Unless Options.Strict says so the client does not hold a command against the
// export's size or flags: that is the server's to refuse, and tests want to see
// it do so. What it receives it does check, and a server that breaks the protocol
// loses the connection.
package client
