package backend

// A ThreadModel says how many calls into a chain may run at the same time. The
// values, which grow with the parallelism they allow, and the names are those of
// nbdkit-plugin(3), "Threads".
type ThreadModel int

const (
	// SerializeConnections allows one open connection at a time.
	SerializeConnections ThreadModel = iota
	// SerializeAllRequests allows one call at a time in the whole server.
	SerializeAllRequests
	// SerializeRequests allows one call at a time on each connection.
	SerializeRequests
	// Parallel allows any number of calls.
	Parallel
)

// Valid tells whether m is one of the four models.
func (m ThreadModel) Valid() bool { return m >= SerializeConnections && m <= Parallel }

// String returns the name that --dump-plugin prints.
func (m ThreadModel) String() string {
	switch m {
	case SerializeConnections:
		return "serialize_connections"
	case SerializeAllRequests:
		return "serialize_all_requests"
	case SerializeRequests:
		return "serialize_requests"
	case Parallel:
		return "parallel"
	}
	return "unknown"
}
