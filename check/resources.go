package check

import (
	"errors"
	"fmt"
	"os"
	"runtime/debug"
	"strconv"
	"strings"
	"time"

	"nbdhost/backend"
)

// A thousand connections, or as many as there are in churnTime.
const (
	churnCount  = 1000
	churnTime   = 20 * time.Second
	warmUpCount = 200
	// settleTime is how long what a connection used may take to be gone.
	settleTime = 3 * time.Second
	// maxGrowth is what half of them may add, in bytes, beyond what they would with
	// a plugin of ours: the C library or an interpreter may have to settle yet.
	maxGrowth = 2 << 20
	// Threads that the Go runtime and libraries start and keep.
	maxThreads = 24
)

// usage is what a process has of what it may forget to give back.
type usage struct {
	descriptors, threads int
	memory               int64 // resident, in bytes
}

func measure() (u usage, err error) {
	debug.FreeOSMemory()
	fds, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		return u, err
	}
	tasks, err := os.ReadDir("/proc/self/task")
	if err != nil {
		return u, err
	}
	statm, err := os.ReadFile("/proc/self/statm")
	if err != nil {
		return u, err
	}
	u.descriptors, u.threads = len(fds), len(tasks)
	if f := strings.Fields(string(statm)); len(f) > 1 {
		pages, err := strconv.ParseInt(f[1], 10, 64)
		u.memory = pages * int64(os.Getpagesize())
		return u, err
	}
	return u, fmt.Errorf("read /proc/self/statm: got %q", statm)
}

// A churn is what many connections, one after the other, left behind.
type churn struct {
	connections         int
	before, half, after usage
	// ours is how much memory half of them add with a plugin of ours, in bytes: the
	// server and the client keep some, and much with the race detector.
	ours int64
	err  error
}

// churn opens and closes connections, once for all checks that want to know.
func (s *Subject) churn() (*churn, error) {
	if s.churned == nil {
		s.churned = &churn{}
		s.churned.err = s.churned.run(s)
	}
	if err := s.churned.err; err != nil {
		return nil, err
	}
	s.notef("%d connections", s.churned.connections)
	return s.churned, nil
}

func (ch *churn) run(s *Subject) (err error) {
	if ch.ours, err = baseline(); err != nil {
		return err
	}
	deadline := time.Now().Add(churnTime)
	many := func(n int) error {
		for ; n > 0 && time.Now().Before(deadline); n-- {
			c, err := s.dialSocket()
			if err != nil {
				return fmt.Errorf("connection %d: %w", ch.connections+1, err)
			}
			if err := c.Disconnect(); err != nil {
				return fmt.Errorf("end connection %d: %w", ch.connections+1, err)
			}
			ch.connections++
		}
		return nil
	}
	if err := many(warmUpCount); err != nil {
		return err
	}
	if ch.before, err = settled(usage{}); err != nil {
		return err
	}
	ch.connections = 0
	if err := many(churnCount / 2); err != nil {
		return err
	}
	if ch.half, err = measure(); err != nil {
		return err
	}
	if err := many(churnCount / 2); err != nil {
		return err
	}
	ch.after, err = settled(ch.before)
	return err
}

// baseline returns how much memory half of the connections add with backend.Mem.
func baseline() (grown int64, err error) {
	ours := &Subject{chain: backend.NewChain(backend.NewMem(1<<20), nil, backend.Trace{})}
	defer func() {
		if ours.service != nil {
			err = errors.Join(err, ours.service.end())
		}
	}()
	var before usage
	for i := range warmUpCount + churnCount/2 {
		if i == warmUpCount {
			if before, err = measure(); err != nil {
				return 0, err
			}
		}
		c, err := ours.dialSocket()
		if err == nil {
			err = c.Disconnect()
		}
		if err != nil {
			return 0, fmt.Errorf("measure memory of connections: %w", err)
		}
	}
	after, err := measure()
	return max(0, after.memory-before.memory), err
}

// settled measures when the server has given back what it will: at once where that
// is no more than before, else in the end.
func settled(before usage) (u usage, err error) {
	tick := time.NewTicker(settleTime / 30)
	defer tick.Stop()
	for range 30 {
		if u, err = measure(); err != nil {
			return u, err
		}
		if u.descriptors <= before.descriptors && u.threads <= before.threads+maxThreads {
			return u, nil
		}
		if before == (usage{}) && u.descriptors > 0 {
			before = u // and look once more
		}
		<-tick.C
	}
	return u, nil
}

func (s *Subject) descriptors() error {
	ch, err := s.churn()
	if err != nil {
		return err
	}
	if ch.after.descriptors > ch.before.descriptors {
		return fmt.Errorf("%d descriptors before, %d after %d connections", ch.before.descriptors, ch.after.descriptors, ch.connections)
	}
	return nil
}

func (s *Subject) threads() error {
	ch, err := s.churn()
	if err != nil {
		return skipf("no connections: %v", err)
	}
	if ch.after.threads > ch.before.threads+maxThreads {
		return fmt.Errorf("%d threads before, %d after %d connections", ch.before.threads, ch.after.threads, ch.connections)
	}
	return nil
}

// memory wants it not to grow steadily: what settles does so in the first half.
func (s *Subject) memory() error {
	ch, err := s.churn()
	if err != nil {
		return skipf("no connections: %v", err)
	}
	first, second := ch.half.memory-ch.before.memory, ch.after.memory-ch.half.memory
	s.notef("%+d KiB in the first half, %+d KiB in the second", first>>10, second>>10)
	if ch.connections < churnCount {
		return skipf("only %d connections in %v", ch.connections, churnTime)
	}
	// Threads that were left behind are another check's, their stacks too.
	threads := int64(max(0, ch.after.threads-ch.before.threads)) * (64 << 10)
	limit := maxGrowth + 2*ch.ours
	if first > limit && second > limit+threads {
		return fmt.Errorf("%d KiB before, %d KiB after %d connections, %d KiB after %d: %d bytes each", ch.before.memory>>10,
			ch.half.memory>>10, churnCount/2, ch.after.memory>>10, churnCount, second/(churnCount/2))
	}
	return nil
}

// inFlightReads is how long the reads are that a client does not wait for.
const inFlightReads = 4099

// disconnectInFlight has clients that go away with requests in flight, and then one
// that must see what there was before.
func (s *Subject) disconnectInFlight() error {
	var first []span
	var want [][]byte
	err := s.with(func(c *conn) error {
		first = c.spans()
		first = first[:min(4, len(first))]
		want = c.readAll(first)
		return nil
	})
	if err != nil {
		return err
	}
	for range 16 {
		if err := s.abandon(); err != nil {
			return err
		}
	}
	return s.with(func(c *conn) error {
		for i, got := range c.readAll(first) {
			if where := differ(first[i].off, want[i], got); where != "" {
				return fmt.Errorf("after clients went away %s", where)
			}
			if got == nil && want[i] != nil {
				return fmt.Errorf("after clients went away %d bytes at %d cannot be read any more", first[i].n, first[i].off)
			}
		}
		return nil
	})
}

// abandon connects, asks for much and hangs up once an answer is there.
func (s *Subject) abandon() error {
	c, err := s.dial()
	if err != nil {
		return err
	}
	defer func() {
		c.Close()
		<-c.served
	}()
	n := min((inFlightReads+c.unit-1)/c.unit*c.unit, c.usable())
	if n == 0 {
		return skipf("the export is empty")
	}
	answered := make(chan struct{}, inFlight)
	for range inFlight {
		_, err := c.AioPread(make([]byte, n), 0, 0, func(error) int { answered <- struct{}{}; return 1 })
		if err != nil {
			return err
		}
	}
	<-answered
	return nil
}
