package server

import (
	"errors"
	"maps"
	"math/bits"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"nbdhost/backend"
	"nbdhost/protocol"
)

// Stats is what a server has counted since it was made, and how it stands now.
type Stats struct {
	Connections int    // open now
	Accepted    uint64 // connections so far, without those beyond a limit
	InFlight    int    // requests that the chain is working on
	Workers     int    // goroutines that make calls besides the connections' own
	TLSFailures uint64 // handshakes of TLS that failed
	// Failures counts the connections that did not get through the handshake.
	Failures [reasons]uint64
	// Delays is about requests, by the limit that they waited for.
	Delays [limits]DelayStats
	// Exports are those that clients have used, by name, and the rest together.
	Exports []ExportStats
}

// Operations is how many requests were answered.
func (s Stats) Operations() (n uint64) {
	return s.sum(func(c *CommandStats) uint64 { return c.Operations })
}

// Bytes is how many bytes of data were read and written.
func (s Stats) Bytes() uint64 {
	return s.sum(func(c *CommandStats) uint64 {
		if c.Command == protocol.CmdRead || c.Command == protocol.CmdWrite {
			return c.Bytes
		}
		return 0
	})
}

func (s Stats) sum(of func(*CommandStats) uint64) (n uint64) {
	for i := range s.Exports {
		for j := range s.Exports[i].Commands {
			n += of(&s.Exports[i].Commands[j])
		}
	}
	return n
}

// A Reason says why a connection did not get through the handshake.
type Reason int

const (
	ReasonClient                Reason = iota // the client went away
	ReasonConnections                         // Limits.Connections
	ReasonConnectionsPerAddress               // Limits.ConnectionsPerAddress
	ReasonExport                              // the chain did not open the export
	ReasonPreconnect                          // the chain's .preconnect refused the client
	ReasonProtocol                            // the client broke the protocol
	ReasonShutdown                            // the server was stopping
	ReasonTimeout                             // the client took too long
	ReasonTLS                                 // the TLS handshake failed
	ReasonTLSRequired                         // the client did not want TLS
	reasons
)

// String is a word for a label, such as "tls_required".
func (r Reason) String() string {
	return [reasons]string{"client", "max_connections", "max_connections_per_address", "export", "preconnect",
		"protocol", "shutdown", "timeout", "tls", "tls_required"}[r]
}

// ExportStats is about the connections of one export.
type ExportStats struct {
	Name        string // in UTF-8, whatever the clients sent; or OtherExports
	Connections int
	// Commands are those that were used, in the order of their numbers.
	Commands []CommandStats
}

// CommandStats is about one command of the connections of one export.
type CommandStats struct {
	Command    protocol.Command // one that is not in the protocol's table counts as [UnknownCommand]
	Operations uint64           // that were answered, also with an error
	Bytes      uint64           // that those without an error were about
	// Errors counts what was answered with an error by the name of the module
	// that it came from, "" for the server's own. A fast zero that would not
	// be fast is no error.
	Errors map[string]uint64
	// Latency counts operations by the time from when they were received until
	// their reply was ready to be sent; Latency[i] is those of at most
	// LatencyBounds[i] and more than the bound before, and the last is of
	// those above all bounds.
	Latency [len(LatencyBounds) + 1]uint64
	// Seconds is the sum of the latencies.
	Seconds float64
}

// UnknownCommand stands for all commands that are not in the protocol's table.
const UnknownCommand = protocol.Command(len(protocol.Commands))

// LatencyBounds are the upper bounds of the ranges of latencies that are counted.
var LatencyBounds = [...]time.Duration{
	10 * time.Microsecond, 25 * time.Microsecond, 50 * time.Microsecond,
	100 * time.Microsecond, 250 * time.Microsecond, 500 * time.Microsecond,
	time.Millisecond, 2500 * time.Microsecond, 5 * time.Millisecond,
	10 * time.Millisecond, 25 * time.Millisecond, 50 * time.Millisecond,
	100 * time.Millisecond, 250 * time.Millisecond, 500 * time.Millisecond,
	time.Second, 2500 * time.Millisecond, 5 * time.Second, 10 * time.Second,
}

// OtherExports is the name under which all exports are counted that came after the first
// maxNamedExports.
const OtherExports = "(other)"

// maxNamedExports bounds the exports that are counted each on their own: clients
// choose the names.
const maxNamedExports = 100

const countedCommands = int(UnknownCommand) + 1

// A tally is what a task has answered since it last told its connection. It
// belongs to the task, so that counting costs a request next to nothing; what
// costs more happens once for a batch of replies.
type tally struct {
	used  uint // a bit for each command
	ops   [countedCommands]uint32
	bytes [countedCommands]uint64
}

// count takes note of the answer to t.req.
func (t *task) count() {
	t.tally.add(&t.req, t.failure())
	if err := t.failure(); err != nil {
		t.c.counters.failed(t.req.Type, err, t.req.Flags)
	}
}

func (t *tally) add(req *protocol.Request, err error) {
	i := min(int(req.Type), countedCommands-1)
	t.used |= 1 << i
	t.ops[i]++
	if err == nil && req.Type != protocol.CmdBlockStatus {
		t.bytes[i] += req.Length
	}
}

// failure is the error that the reply to t.req has, or ends with; nil for none.
func (t *task) failure() error {
	if t.err != nil {
		return t.err
	}
	return t.tail
}

// account passes on what was counted. It comes right before the replies are sent,
// which ends the latency of each. at is what time it is, 0 where nobody has looked.
func (t *task) account(at time.Duration) {
	if t.tally.used == 0 {
		return
	}
	if at == 0 {
		at = now()
	}
	t.c.counters.add(&t.tally, at-t.arrived)
}

// send sends the replies that wait.
func (t *task) send() { t.sendAt(0) }

// sendAt is send at a time that somebody has just looked at, or 0.
func (t *task) sendAt(at time.Duration) {
	t.account(at)
	t.c.sender.send(&t.out)
}

// counters are those of one connection, or of those of an export that are gone.
type counters struct {
	mu       sync.Mutex
	commands [countedCommands]*CommandStats // nil for those not used
}

// of returns what is counted for a command. mu is held.
func (c *counters) of(i int) *CommandStats {
	if c.commands[i] == nil {
		c.commands[i] = &CommandStats{Command: protocol.Command(i)}
	}
	return c.commands[i]
}

// add takes over what t has.
func (c *counters) add(t *tally, latency time.Duration) {
	bucket := 0
	for bucket < len(LatencyBounds) && latency > LatencyBounds[bucket] {
		bucket++
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	for ; t.used != 0; t.used &= t.used - 1 {
		i := bits.TrailingZeros(t.used)
		s, n := c.of(i), uint64(t.ops[i])
		s.Operations += n
		s.Bytes += t.bytes[i]
		s.Latency[bucket] += n
		s.Seconds += float64(latency) * float64(n) / float64(time.Second)
		t.ops[i], t.bytes[i] = 0, 0
	}
}

// failed counts an error.
func (c *counters) failed(cmd protocol.Command, err error, flags protocol.CommandFlags) {
	if flags&protocol.CmdFlagFastZero != 0 && errors.Is(err, syscall.EOPNOTSUPP) {
		return // an answer that the client asked for
	}
	module := moduleOf(err)
	c.mu.Lock()
	defer c.mu.Unlock()
	s := c.of(min(int(cmd), countedCommands-1))
	if s.Errors == nil {
		s.Errors = map[string]uint64{}
	}
	s.Errors[module]++
}

// moduleOf returns the name of the module that an error came from, or "".
func moduleOf(err error) string {
	if e := (*backend.Error)(nil); errors.As(err, &e) {
		return e.Module
	}
	return ""
}

// addTo adds everything to sum, which nobody else uses.
func (c *counters) addTo(sum *counters) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for i, s := range c.commands {
		if s == nil {
			continue
		}
		to := sum.of(i)
		to.Operations += s.Operations
		to.Bytes += s.Bytes
		to.Seconds += s.Seconds
		for b, n := range s.Latency {
			to.Latency[b] += n
		}
		for module, n := range s.Errors {
			if to.Errors == nil {
				to.Errors = map[string]uint64{}
			}
			to.Errors[module] += n
		}
	}
}

// An export is one that clients have open, or one of those that are kept.
type export struct {
	name          string
	kept          bool // among the first maxNamedExports
	conns         map[*conn]struct{}
	past          counters // of connections that are gone
	reads, writes bucket
}

// exports are a server's. Its mutex is never held while anybody waits.
type exports struct {
	bandwidth int64 // see Limits
	mu        sync.Mutex
	named     map[string]*export
	kept      int
	rest      counters // of those not kept that are gone
}

// enter puts c among the connections of the export that it has opened.
func (x *exports) enter(c *conn, name string) {
	name = strings.ToValidUTF8(name, "\uFFFD")
	x.mu.Lock()
	defer x.mu.Unlock()
	e := x.named[name]
	if e == nil {
		if x.named == nil {
			x.named = map[string]*export{}
		}
		e = &export{name: name, conns: map[*conn]struct{}{}, reads: newBucket(x.bandwidth), writes: newBucket(x.bandwidth)}
		if x.kept < maxNamedExports && name != OtherExports {
			e.kept = true
			x.kept++
		}
		x.named[name] = e
	}
	e.conns[c] = struct{}{}
	c.export = e
}

// leave ends what enter began; no request follows.
func (x *exports) leave(c *conn) {
	x.mu.Lock()
	defer x.mu.Unlock()
	e := c.export
	delete(e.conns, c)
	c.counters.addTo(&e.past)
	if !e.kept && len(e.conns) == 0 {
		e.past.addTo(&x.rest)
		delete(x.named, e.name)
	}
}

// stats adds up what is counted, and tells how many requests are in flight.
func (x *exports) stats() (list []ExportStats, inFlight int) {
	x.mu.Lock()
	defer x.mu.Unlock()
	other := ExportStats{Name: OtherExports}
	var rest counters
	x.rest.addTo(&rest)
	for _, e := range slices.SortedFunc(maps.Values(x.named), func(a, b *export) int { return strings.Compare(a.name, b.name) }) {
		var own counters
		sum := &own
		if !e.kept {
			sum = &rest
			other.Connections += len(e.conns)
		}
		e.past.addTo(sum)
		for c := range e.conns {
			c.counters.addTo(sum)
			inFlight += c.inFlight()
		}
		if e.kept {
			list = append(list, ExportStats{Name: e.name, Connections: len(e.conns), Commands: own.list()})
		}
	}
	if other.Commands = rest.list(); len(other.Commands) > 0 || other.Connections > 0 {
		list = append(list, other)
	}
	return list, inFlight
}

// list returns what is counted, which nobody goes on counting.
func (c *counters) list() (list []CommandStats) {
	for _, s := range c.commands {
		if s != nil {
			list = append(list, *s)
		}
	}
	return list
}

// inFlight is how many calls are under way.
func (c *conn) inFlight() int {
	n := len(c.slots)
	if r := c.reader.Load(); r != nil {
		switch r.state.Load() & mask {
		case busy, guarded, taken:
			n++
		}
	}
	return n
}

// Stats may be called by any goroutine at any time. It holds up no request for
// longer than it takes to copy a connection's counters.
func (s *Server) Stats() Stats {
	var st Stats
	s.mu.Lock()
	st.Connections, st.Accepted = s.admitted, s.accepted
	s.mu.Unlock()
	st.Workers = int(s.workers.Load())
	st.TLSFailures = s.tlsFailures.Load()
	for r := range st.Failures {
		st.Failures[r] = s.failures[r].Load()
	}
	for l := range st.Delays {
		d := &s.delays[l]
		st.Delays[l] = DelayStats{d.requests.Load(), time.Duration(d.nanoseconds.Load()).Seconds()}
	}
	st.Exports, st.InFlight = s.exports.stats()
	return st
}
