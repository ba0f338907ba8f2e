package backend

import (
	"errors"
	"sync/atomic"
	"syscall"
)

// The data calls of a session. Each checks its range first: a request from the
// network has been checked by the server, but one from a filter has not.

func (s *Session) traceData(c *Call, format string, args ...any) {
	c.Debugf(format, append([]any{s.module.Name()}, args...)...)
}

func (s *Session) tracing(c *Call) bool { return s.chain.trace.Data && c.tracing() }

// check refuses what lies outside the export.
func (s *Session) check(c *Call, op Callback, n, off uint64) error {
	size, err := s.Size(c)
	if err != nil {
		return err
	}
	if off > size || n > size-off {
		return s.errorf(c, op, syscall.EINVAL, "got offset %d and count %d: need a range within the %d bytes of the export", off, n, size)
	}
	return nil
}

// need refuses an operation that the session has not got.
func (s *Session) need(c *Call, op, cb Callback) error {
	n, err := s.ask(c, cb)
	if err == nil && n == 0 {
		errno := syscall.EOPNOTSUPP
		if cb == CanWrite {
			errno = syscall.EROFS
		}
		return s.errorf(c, op, errno, "not supported here: %s is false", cb)
	}
	return err
}

// Pread reads len(p) bytes at off into p.
func (s *Session) Pread(c *Call, p []byte, off uint64) error {
	if s.tracing(c) {
		s.traceData(c, "%s: pread count=%d offset=%d", len(p), off)
	}
	if err := s.check(c, Pread, uint64(len(p)), off); err != nil {
		return err
	}
	return s.pread(c, p, off)
}

func (s *Session) pread(c *Call, p []byte, off uint64) error {
	if s.layer.passes[Pread] {
		next, err := s.below(c, Pread)
		if err != nil {
			return err
		}
		return next.Pread(c, p, off)
	}
	c.Conn.count(s.layer, Pread)
	return s.handle.Pread(c, p, off)
}

// Pwrite writes p at off. With FUA it returns when the data is on permanent
// storage.
func (s *Session) Pwrite(c *Call, p []byte, off uint64, flags Flags) error {
	if s.tracing(c) {
		s.traceData(c, "%s: pwrite count=%d offset=%d fua=%d", len(p), off, digit(flags&FUA != 0))
	}
	if err := s.check(c, Pwrite, uint64(len(p)), off); err != nil {
		return err
	}
	if err := s.need(c, Pwrite, CanWrite); err != nil {
		return err
	}
	flags, flush, err := s.emulateFUA(c, flags)
	if err == nil {
		err = s.pwrite(c, p, off, flags)
	}
	return s.thenFlush(c, flush, err)
}

func (s *Session) pwrite(c *Call, p []byte, off uint64, flags Flags) error {
	if s.layer.passes[Pwrite] {
		next, err := s.below(c, Pwrite)
		if err != nil {
			return err
		}
		return next.Pwrite(c, p, off, flags)
	}
	if !s.module.Has(Pwrite) {
		return s.errorf(c, Pwrite, syscall.EROFS, "not supported here: the module has no pwrite")
	}
	c.Conn.count(s.layer, Pwrite)
	return s.handle.Pwrite(c, p, off, flags)
}

// emulateFUA takes FUA out of flags where the plugin does not know it; flush is
// true where a flush after the call takes its place. A filter gets the flag, and
// passes it on as it likes.
func (s *Session) emulateFUA(c *Call, flags Flags) (_ Flags, flush bool, err error) {
	if flags&FUA == 0 {
		return flags, false, nil
	}
	fua, err := s.ask(c, CanFUA)
	switch {
	case err != nil:
		return flags, false, err
	case s.filter != nil && fua == None:
		return flags, false, s.errorf(c, CanFUA, syscall.EINVAL, "got the flag FUA, which is not supported here")
	case s.filter != nil || fua == Native:
		return flags, false, nil
	}
	return flags &^ FUA, true, nil
}

// thenFlush flushes after a call that succeeded, where FUA is emulated.
func (s *Session) thenFlush(c *Call, flush bool, err error) error {
	if !flush || err != nil {
		return err
	}
	return s.flush(c)
}

// Flush returns when all that was written before is on permanent storage.
func (s *Session) Flush(c *Call) error {
	if s.tracing(c) {
		s.traceData(c, "%s: flush")
	}
	if err := s.need(c, Flush, CanFlush); err != nil {
		return err
	}
	return s.flush(c)
}

// flush is also called where can_flush is false but FUA is emulated
// (nbdkit-plugin(3), can_fua).
func (s *Session) flush(c *Call) error {
	if s.layer.passes[Flush] {
		next, err := s.below(c, Flush)
		if err != nil {
			return err
		}
		return next.Flush(c)
	}
	if !s.module.Has(Flush) {
		return s.errorf(c, Flush, syscall.EINVAL, "not supported here: the module has no flush")
	}
	c.Conn.count(s.layer, Flush)
	return s.handle.Flush(c)
}

// Trim tells the module that n bytes at off are not needed.
func (s *Session) Trim(c *Call, n uint32, off uint64, flags Flags) error {
	if s.tracing(c) {
		s.traceData(c, "%s: trim count=%d offset=%d fua=%d", n, off, digit(flags&FUA != 0))
	}
	if err := s.check(c, Trim, uint64(n), off); err != nil {
		return err
	}
	if err := s.need(c, Trim, CanTrim); err != nil {
		return err
	}
	if s.layer.passes[Trim] {
		next, err := s.below(c, Trim)
		if err != nil {
			return err
		}
		return next.Trim(c, n, off, flags)
	}
	if !s.module.Has(Trim) {
		return s.errorf(c, Trim, syscall.EINVAL, "not supported here: the module has no trim")
	}
	flags, flush, err := s.emulateFUA(c, flags)
	if err == nil {
		c.Conn.count(s.layer, Trim)
		err = s.handle.Trim(c, n, off, flags)
	}
	return s.thenFlush(c, flush, err)
}

// Zero writes n zeroes at off: with the module's .zero, or with .pwrite where
// there is none, can_zero is Emulate, or the plugin's says ENOTSUP or EOPNOTSUPP.
// With FastZero it fails with EOPNOTSUPP instead of using .pwrite.
func (s *Session) Zero(c *Call, n uint32, off uint64, flags Flags) error {
	if s.tracing(c) {
		s.traceData(c, "%s: zero count=%d offset=%d may_trim=%d fua=%d fast=%d",
			n, off, digit(flags&MayTrim != 0), digit(flags&FUA != 0), digit(flags&FastZero != 0))
	}
	if err := s.check(c, Zero, uint64(n), off); err != nil {
		return err
	}
	if err := s.need(c, Zero, CanZero); err != nil {
		return err
	}
	mode, err := s.ask(c, CanZero)
	switch {
	case err != nil:
		return err
	case mode == Emulate && flags&FastZero != 0:
		return s.notFast()
	case mode == Emulate:
		return s.writeZeroes(n, off, func(p []byte, off uint64) error { return s.Pwrite(c, p, off, flags&FUA) })
	case s.layer.passes[Zero]:
		next, err := s.below(c, Zero)
		if err != nil {
			return err
		}
		return next.Zero(c, n, off, flags)
	}
	flags, flush, err := s.emulateFUA(c, flags)
	if err == nil {
		err = s.zero(c, n, off, flags)
	}
	return s.thenFlush(c, flush, err)
}

func (s *Session) zero(c *Call, n uint32, off uint64, flags Flags) error {
	if s.module.Has(Zero) {
		c.Conn.count(s.layer, Zero)
		err := s.handle.Zero(c, n, off, flags)
		if s.filter != nil || err == nil || !errors.Is(err, syscall.EOPNOTSUPP) { // which is ENOTSUP too
			return err
		}
	}
	if flags&FastZero != 0 {
		return s.notFast()
	}
	return s.writeZeroes(n, off, func(p []byte, off uint64) error { return s.pwrite(c, p, off, flags&FUA) })
}

// notFast is the answer to a fast zero that would not be. The client expects it,
// so that nobody else is told.
func (s *Session) notFast() error {
	return &Error{Module: s.module.Name(), Op: Zero.String(), Errno: syscall.EOPNOTSUPP,
		Msg: "zeroes would have to be written one by one, which is not fast"}
}

// writeZeroes has n zeroes written at off, in pieces.
func (s *Session) writeZeroes(n uint32, off uint64, write func(p []byte, off uint64) error) error {
	return s.bounce(n, func(p []byte, done uint32) error {
		if done == 0 {
			clear(p) // the pieces that follow are no longer than the first
		}
		return write(p, off+uint64(done))
	})
}

// Cache tells the module that n bytes at off will be wanted.
func (s *Session) Cache(c *Call, n uint32, off uint64) error {
	if s.tracing(c) {
		s.traceData(c, "%s: cache count=%d offset=%d", n, off)
	}
	if err := s.check(c, Cache, uint64(n), off); err != nil {
		return err
	}
	if err := s.need(c, Cache, CanCache); err != nil {
		return err
	}
	mode, err := s.ask(c, CanCache)
	switch {
	case err != nil:
		return err
	case mode == Emulate:
		return s.bounce(n, func(p []byte, done uint32) error {
			return s.Pread(c, p, off+uint64(done))
		})
	case s.layer.passes[Cache]:
		next, err := s.below(c, Cache)
		if err != nil {
			return err
		}
		return next.Cache(c, n, off)
	case !s.module.Has(Cache):
		return nil
	}
	c.Conn.count(s.layer, Cache)
	return s.handle.Cache(c, n, off)
}

// bounceSize is the largest piece of a request that is carried out by others, in
// bytes; it is the largest request that nbdkit makes of a module.
const bounceSize = 64 << 20

// bounce calls f for n bytes in pieces that fit a buffer.
func (s *Session) bounce(n uint32, f func(p []byte, done uint32) error) error {
	if n == 0 {
		return nil
	}
	buf, err := GetBuffer(int(min(n, bounceSize)))
	if err != nil {
		return err
	}
	defer buf.Release()
	for done := uint32(0); done < n; {
		p := buf.B[:min(n-done, bounceSize)]
		if err := f(p, done); err != nil {
			return err
		}
		done += uint32(len(p))
	}
	return nil
}

// Extents resets x to [off, size of the export) and adds what is known of the n
// bytes at off: at least one extent, perhaps beyond off+n, perhaps less. Without
// extents all is allocated.
func (s *Session) Extents(c *Call, n uint32, off uint64, flags Flags, x *Extents) error {
	if s.tracing(c) {
		s.traceData(c, "%s: extents count=%d offset=%d req_one=%d", n, off, digit(flags&ReqOne != 0))
	}
	if err := s.check(c, GetExtents, uint64(n), off); err != nil {
		return err
	}
	can, err := s.ask(c, CanExtents)
	if err != nil {
		return err
	}
	size, err := s.Size(c)
	if err != nil {
		return err
	}
	x.Reset(off, size)
	if can == 0 {
		return x.Add(off, uint64(n), 0)
	}
	if s.layer.passes[GetExtents] {
		next, err := s.below(c, GetExtents)
		if err == nil {
			err = next.Extents(c, n, off, flags, x)
		}
		if err == nil {
			x.Cut(size)
		}
		return err
	}
	if !s.module.Has(GetExtents) {
		return s.errorf(c, GetExtents, syscall.EINVAL, "can_extents is true but the module has no extents")
	}
	c.Conn.count(s.layer, GetExtents)
	if err := s.handle.Extents(c, n, off, flags, x); err != nil {
		return err
	}
	if len(x.list) == 0 {
		return s.errorf(c, GetExtents, syscall.EINVAL, "extents added nothing: need at least one extent at offset %d", off)
	}
	return nil
}

// Direct is how a data callback of a session's module can be called without the session.
type Direct struct {
	Handle Handle
	Size   uint64         // in bytes; for a range that is not within it the session is asked
	Calls  *atomic.Uint64 // counts the calls that are made on behalf of the connection
}

// Direct returns how the Pread or Pwrite of the session's module, cb, can be called without
// the session until that is closed, for requests without flags. ok is false where the session
// does more than to compare the range with its size, or would ask the module something first.
func (s *Session) Direct(c *Call, cb Callback) (d Direct, ok bool) {
	size, canWrite := s.size.Load(), 1
	if cb == Pwrite {
		canWrite, _ = s.asked(CanWrite)
	}
	calls := c.Conn.counter(s.layer, cb)
	if s.tracing(c) || s.layer.passes[cb] || !s.module.Has(cb) || size == 0 || canWrite != 1 || calls == nil {
		return Direct{}, false
	}
	return Direct{Handle: s.handle, Size: uint64(^size), Calls: calls}, true
}
