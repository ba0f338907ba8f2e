package server

import (
	"net"
	"sync"

	"nbdhost/backend"
)

const (
	// minBatch and maxBatch bound the replies in bytes that leave with one write,
	// unless it is one that is longer; see reader.batches. Larger batches have left
	// the processor's cache when the kernel copies them: 2 MiB lost 30 % on large
	// reads. The least are eight pages and their headers.
	minBatch = 33 << 10
	maxBatch = 144 << 10
	// maxQueued bounds the replies that wait for a client that does not read,
	// in bytes. Who has more to send waits.
	maxQueued = 1 << 20
)

// A batch is a run of replies that will leave together. The zero value is empty
// and holds no buffer.
type batch struct {
	buf        *backend.Buffer
	start, end int  // the replies: buf.B[start:end]
	held       held // to be given back when they are sent
}

func (b *batch) empty() bool { return b.start == b.end }

func (b *batch) release() {
	b.buf.Release()
	*b = batch{}
}

// claim tells whether n more bytes can be added now. There is nothing of another
// client's in them, for a module that leaves some of them as they are.
func (b *batch) claim(n int) bool {
	if b.buf == nil || b.end+n > len(b.buf.B) {
		return false
	}
	b.buf.Claim(b.end + n)
	return true
}

// grow makes room for n bytes in an empty batch. The payload behind the first
// head bytes will lie on a page, if the reply is large.
func (b *batch) grow(owner uint64, head, n int) error {
	if b.buf == nil || pageSize+n > len(b.buf.B) {
		b.buf.Release()
		*b = batch{}
		buf, err := backend.GetBufferFor(owner, pageSize+max(maxBatch, n))
		if err != nil {
			return err
		}
		b.buf = buf
	}
	b.start = 0
	if n >= pageSize {
		b.start = pageSize - head
	}
	b.end = b.start
	b.claim(n)
	return nil
}

// A sender writes a connection's replies. Whoever has a batch while nobody
// writes becomes the writer, and writes what others hand in meanwhile; so
// replies that are ready together leave together, and nobody waits for a
// goroutine to be scheduled.
type sender struct {
	c       *conn
	mu      sync.Mutex
	room    sync.Cond // queued has fallen
	writing bool
	queue   []batch // handed in while another one writes
	spare   []batch // the queue's memory, when the writer has it
	queued  int     // bytes in queue
	vector  net.Buffers
	pieces  [][]byte // vector's memory, which WriteTo loses hold of
}

func (s *sender) init(c *conn) {
	s.c = c
	s.room.L = &s.mu
}

// put has b written before whatever is sent from here on. b is empty after it.
func (s *sender) put(b *batch) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.add(b)
}

// add puts b into the queue. mu is held.
func (s *sender) add(b *batch) {
	s.queue = append(s.queue, *b)
	s.queued += b.end - b.start
	*b = batch{}
}

// send writes what was put, and then b, or hands b to who is writing. Either way b is empty
// after it; its buffer stays with it, if it was not handed over and is of the usual size.
func (s *sender) send(b *batch) {
	s.mu.Lock()
	for !b.empty() && s.writing && s.queued > maxQueued {
		s.room.Wait()
	}
	if !b.empty() && (s.writing || len(s.queue) > 0) {
		s.add(b)
	}
	if s.writing || b.empty() && len(s.queue) == 0 {
		s.mu.Unlock()
		return
	}
	s.writing = true
	if !b.empty() {
		s.mu.Unlock()
		s.write(b.buf.B[b.start:b.end])
		s.c.giveBack(&b.held)
		b.start, b.end = 0, 0
		if len(b.buf.B) > 2*maxBatch { // made for a long reply
			b.release()
		}
		s.mu.Lock()
	}
	for len(s.queue) > 0 {
		queue := s.queue
		s.queue, s.queued = s.spare[:0], 0
		s.room.Broadcast()
		s.mu.Unlock()
		s.writeAll(queue)
		clear(queue)
		s.mu.Lock()
		s.spare = queue[:0]
	}
	s.writing = false
	s.room.Broadcast()
	s.mu.Unlock()
}

// bare tells whether there is a descriptor only, and no net.Conn to write to.
func (s *sender) bare() bool { return s.c.sock.hot() && s.c.secure == nil }

func (s *sender) write(p []byte) {
	if status(s.c.status.Load()) == dead {
		return
	}
	var err error
	if s.bare() {
		err = s.c.sock.write(p)
	} else {
		_, err = s.c.stream().Write(p)
	}
	if err != nil {
		s.failed(err)
	}
}

func (s *sender) writeAll(queue []batch) {
	switch {
	case s.bare():
		for _, b := range queue {
			s.write(b.buf.B[b.start:b.end])
		}
	case status(s.c.status.Load()) != dead:
		s.pieces = s.pieces[:0]
		for _, b := range queue {
			s.pieces = append(s.pieces, b.buf.B[b.start:b.end])
		}
		s.vector = s.pieces
		if _, err := s.vector.WriteTo(s.c.stream()); err != nil {
			s.failed(err)
		}
	}
	for i := range queue {
		s.c.giveBack(&queue[i].held)
		queue[i].release()
	}
}

// pause runs f while nobody writes, unless somebody does: then it returns false.
func (s *sender) pause(f func()) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.writing {
		return false
	}
	f()
	return true
}

// failed gives the connection up: the reader will find it closed.
func (s *sender) failed(err error) {
	if status(s.c.status.Load()) != dead {
		s.c.call.Debugf("write reply: %v", err)
		s.c.disconnect(true)
	}
}
