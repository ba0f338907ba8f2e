package backend

import "sync"

// A Gate admits calls into a chain as its thread model says. It stands before
// the first crossing into a module: waiting inside would hold a thread.
type Gate struct {
	model ThreadModel
	turn  chan struct{} // SerializeConnections: holds a token while a connection is open
	all   sync.Mutex    // SerializeAllRequests
}

// NewGate returns the gate for a chain of the given model.
func NewGate(model ThreadModel) *Gate {
	return &Gate{model: model, turn: make(chan struct{}, 1)}
}

// A Lane is one connection's way through a gate.
type Lane struct {
	gate *Gate
	own  sync.Mutex // SerializeRequests
}

// Connect admits a connection. Where the model is SerializeConnections it waits
// until the previous one has left, or until quit is closed; then it returns nil.
func (g *Gate) Connect(quit <-chan struct{}) *Lane {
	if g.model == SerializeConnections {
		select {
		case g.turn <- struct{}{}:
		case <-quit:
			return nil
		}
	}
	return &Lane{gate: g}
}

// TryConnect is Connect where that need not wait, and returns nil where it must.
func (g *Gate) TryConnect() *Lane {
	if g.model == SerializeConnections {
		select {
		case g.turn <- struct{}{}:
		default:
			return nil
		}
	}
	return &Lane{gate: g}
}

// Leave lets the next connection in. No call follows.
func (l *Lane) Leave() {
	if l.gate.model == SerializeConnections {
		<-l.gate.turn
	}
}

// Parallel tells whether calls on the lane may overlap.
func (l *Lane) Parallel() bool { return l.gate.model == Parallel }

// Lock admits one call; it waits while another one is under way.
func (l *Lane) Lock() {
	switch l.gate.model {
	case SerializeAllRequests:
		l.gate.all.Lock()
	case SerializeRequests, SerializeConnections:
		l.own.Lock()
	}
}

// TryLock is Lock where that need not wait, and returns false where it must.
func (l *Lane) TryLock() bool {
	switch l.gate.model {
	case SerializeAllRequests:
		return l.gate.all.TryLock()
	case SerializeRequests, SerializeConnections:
		return l.own.TryLock()
	}
	return true
}

// Unlock ends the call that Lock admitted.
func (l *Lane) Unlock() {
	switch l.gate.model {
	case SerializeAllRequests:
		l.gate.all.Unlock()
	case SerializeRequests, SerializeConnections:
		l.own.Unlock()
	}
}
