package check

import (
	"fmt"
	"os"
	"runtime/debug"
	"strconv"
	"strings"
	"time"
)

// A thousand connections, or as many as there are in churnTime.
const (
	churnCount  = 1000
	churnTime   = 20 * time.Second
	warmUpCount = 50
	// settleTime is how long what a connection used may take to be gone.
	settleTime = 3 * time.Second
	// A plugin of a language may keep some memory; the C library and Go do, too.
	maxGrowth     = 4 << 20
	growthPerConn = 1 << 10
	// Threads that the Go runtime and libraries start and keep.
	maxThreads = 24
)

// usage is what a process has of what it may forget to give back.
type usage struct {
	descriptors, threads int
	memory               int64 // resident, in bytes
}

func measure() (u usage, err error) {
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
	connections   int
	before, after usage
	err           error
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
	open := func() error {
		c, err := s.dialSocket()
		if err != nil {
			return err
		}
		defer c.Close()
		return c.Disconnect()
	}
	deadline := time.Now().Add(churnTime)
	for n := 0; n < warmUpCount && time.Now().Before(deadline); n++ {
		if err := open(); err != nil {
			return fmt.Errorf("connection %d: %w", n+1, err)
		}
	}
	if ch.before, err = settled(usage{}); err != nil {
		return err
	}
	for ch.connections < churnCount && time.Now().Before(deadline) {
		if err := open(); err != nil {
			return fmt.Errorf("connection %d: %w", ch.connections+1, err)
		}
		ch.connections++
	}
	ch.after, err = settled(ch.before)
	return err
}

// settled measures when the server has given back what it will: at once where that
// is no more than before, else in the end.
func settled(before usage) (u usage, err error) {
	tick := time.NewTicker(settleTime / 30)
	defer tick.Stop()
	for range 30 {
		debug.FreeOSMemory()
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

func (s *Subject) memory() error {
	ch, err := s.churn()
	if err != nil {
		return skipf("no connections: %v", err)
	}
	grown := ch.after.memory - ch.before.memory
	s.notef("%+d KiB", grown>>10)
	// A leak of threads is one of their stacks, which is that check's.
	threads := int64(max(0, ch.after.threads-ch.before.threads))
	if grown > maxGrowth+growthPerConn*int64(ch.connections)+threads*(64<<10) {
		return fmt.Errorf("%d KiB before, %d KiB after %d connections: %d bytes each",
			ch.before.memory>>10, ch.after.memory>>10, ch.connections, grown/int64(max(1, ch.connections)))
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
	defer c.Close()
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
