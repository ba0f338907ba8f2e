package backend

import (
	"context"
	"fmt"
	"log/slog"
	"math"
	"sync"
	"sync/atomic"
	"syscall"
)

// A Session is one layer of a chain, opened for one connection. It asks the
// module for each capability once at most, and keeps from it every request that
// the capabilities exclude.
//
// The session of a filter stands over that of the next layer, which its own
// methods prepare, finalize and close. What a filter has no callback for is asked
// of the next session without a detour.
//
// Prepare comes first and Close last; between them any goroutine may call the
// data methods as the [Gate] admits.
type Session struct {
	layer    *Layer
	chain    *Chain
	module   Module
	handle   Handle
	filter   FilterHandle // nil for the plugin
	next     atomic.Pointer[Session]
	readonly bool
	export   string
	prepared bool // and not finalized

	// OnClose, if not nil, is called once the session has been closed. It
	// belongs to the module that opened the session.
	OnClose func()

	// asking is held while the module is asked for something to be cached.
	asking sync.Mutex
	// can holds what was answered plus 1, by Callback - CanWrite; 0 is not asked.
	can  [CanCache - CanWrite + 1]atomic.Int32
	size atomic.Int64 // its complement, so that 0 is not asked

	blockSize struct {
		known bool
		value BlockSize
	}
}

// Export returns the name under which the session was opened, after the default
// name was resolved.
func (s *Session) Export() string { return s.export }

// ReadOnly tells whether the session was opened for reading only.
func (s *Session) ReadOnly() bool { return s.readonly }

// OpenNext opens the layer below and puts it under this session, which has to be
// one of a filter with nothing below it yet.
func (s *Session) OpenNext(c *Call, readonly bool, export string) (*Session, error) {
	if s.next.Load() != nil {
		return nil, s.errorf(c, Open, syscall.EINVAL, "next was opened a second time: need nbdkit_next_context_open for more sessions")
	}
	next, err := s.layer.next.Open(c, readonly, export)
	if err == nil {
		s.next.Store(next)
	}
	return next, err
}

// SetNext puts next, which may be nil, below this session, and returns the one
// that was there: that is now the caller's to finalize and close.
func (s *Session) SetNext(next *Session) (previous *Session) { return s.next.Swap(next) }

// DropNext takes next away if it is below this session.
func (s *Session) DropNext(next *Session) { s.next.CompareAndSwap(next, nil) }

// below returns the next session.
func (s *Session) below(c *Call, op Callback) (*Session, error) {
	if next := s.next.Load(); next != nil {
		return next, nil
	}
	return nil, s.errorf(c, op, syscall.EIO, "not possible: the filter has not opened the next layer")
}

func (s *Session) traceControl(c *Call, cb Callback) {
	s.chain.traceCall(c, "%s: %s", s.module.Name(), cb)
}

// errorf makes an error of the session's own and logs it, as a module's
// nbdkit_error would have.
func (s *Session) errorf(c *Call, op Callback, errno syscall.Errno, format string, args ...any) *Error {
	return reported(c, &Error{Module: s.module.Name(), Op: op.String(), Errno: errno, Msg: fmt.Sprintf(format, args...)})
}

func reported(c *Call, e *Error) *Error {
	if c.Log != nil {
		c.Log.LogAttrs(context.Background(), slog.LevelError, e.Error(),
			append(c.attributes(), slog.String("module", e.Module), slog.String("callback", e.Op))...)
	}
	return e
}

// Prepare completes the opening, from the plugin outwards.
func (s *Session) Prepare(c *Call) error {
	if next := s.next.Load(); next != nil && !next.prepared {
		if err := next.Prepare(c); err != nil {
			return err
		}
	}
	s.chain.traceCall(c, "%s: prepare readonly=%d", s.module.Name(), digit(s.readonly))
	if s.filter != nil && !s.layer.passes[Prepare] {
		if err := s.filter.Prepare(c, s.readonly); err != nil {
			return err
		}
	}
	s.prepared = true
	return nil
}

// Finalize and Close end the session, from the outermost layer inwards; every
// other call must have returned. A layer that was not prepared is not finalized,
// nor are those below one that fails.
func (s *Session) Finalize(c *Call) error {
	if s.prepared {
		s.prepared = false
		s.traceControl(c, Finalize)
		if s.filter != nil && !s.layer.passes[Finalize] {
			if err := s.filter.Finalize(c); err != nil {
				return err
			}
		}
	}
	if next := s.next.Load(); next != nil {
		return next.Finalize(c)
	}
	return nil
}

// Close gives the handles back to the modules.
func (s *Session) Close(c *Call) {
	s.traceControl(c, Close)
	s.handle.Close(c)
	if next := s.next.Swap(nil); next != nil {
		next.Close(c)
	}
	if s.OnClose != nil {
		s.OnClose()
	}
}

// Size returns the size of the export in bytes, 0 to 2^63-1.
func (s *Session) Size(c *Call) (uint64, error) {
	if n := s.size.Load(); n != 0 {
		return uint64(^n), nil
	}
	s.asking.Lock()
	defer s.asking.Unlock()
	if n := s.size.Load(); n != 0 {
		return uint64(^n), nil
	}
	s.traceControl(c, GetSize)
	n, err := s.getSize(c)
	if err != nil {
		return 0, err
	}
	if n < 0 {
		return 0, s.errorf(c, GetSize, syscall.EINVAL, "get_size returned %d: need at least 0", n)
	}
	s.size.Store(^n)
	return uint64(n), nil
}

func (s *Session) getSize(c *Call) (int64, error) {
	if !s.layer.passes[GetSize] {
		return s.handle.GetSize(c)
	}
	next, err := s.below(c, GetSize)
	if err != nil {
		return 0, err
	}
	n, err := next.Size(c)
	return int64(n), err
}

// ExportDescription returns the description of the export; ok is false where
// there is none that the protocol could carry. The module is asked each time.
func (s *Session) ExportDescription(c *Call) (text string, ok bool) {
	s.traceControl(c, ExportDescription)
	if s.layer.passes[ExportDescription] {
		next, err := s.below(c, ExportDescription)
		if err != nil {
			return "", false
		}
		return next.ExportDescription(c)
	}
	if !s.module.Has(ExportDescription) {
		return "", false
	}
	text, ok = s.handle.ExportDescription(c)
	if len(text) > MaxString {
		s.chain.traceCall(c, "%s: export_description: ignoring invalid string", s.module.Name())
		return "", false
	}
	return text, ok
}

// BlockSize returns the module's block size constraints, all zero where it has
// none. Valid ones obey 1 <= Min <= Preferred <= Max; Min is a power of two of
// at most 64 KiB, Preferred a power of two from 512 to 32 MiB, Max is 2^32-1 or a
// multiple of Min (NBD specification, "Block size constraints").
func (s *Session) BlockSize(c *Call) (BlockSize, error) {
	s.asking.Lock()
	defer s.asking.Unlock()
	if s.blockSize.known {
		return s.blockSize.value, nil
	}
	s.traceControl(c, BlockSizes)
	var b BlockSize
	if s.layer.passes[BlockSizes] {
		next, err := s.below(c, BlockSizes)
		if err == nil {
			b, err = next.BlockSize(c)
		}
		if err != nil {
			return b, err
		}
	} else if s.module.Has(BlockSizes) {
		var err error
		if b, err = s.handle.BlockSize(c); err != nil {
			return b, err
		}
		if why := b.invalid(); why != "" {
			return b, s.errorf(c, BlockSizes, syscall.EINVAL, "block_size returned minimum %d, preferred %d, maximum %d: need %s",
				b.Min, b.Preferred, b.Max, why)
		}
	}
	s.blockSize.known, s.blockSize.value = true, b
	return b, nil
}

// invalid says what is wrong with b, or "".
func (b BlockSize) invalid() string {
	powerOf2 := func(n uint32) bool { return n != 0 && n&(n-1) == 0 }
	switch {
	case b == BlockSize{}:
		return ""
	case !powerOf2(b.Min) || b.Min > 65536:
		return "a minimum that is a power of 2 from 1 to 65536"
	case !powerOf2(b.Preferred) || b.Preferred < 512 || b.Preferred > 32<<20:
		return "a preferred size that is a power of 2 from 512 to 33554432"
	case b.Preferred < b.Min:
		return "a preferred size of at least the minimum"
	case b.Max != math.MaxUint32 && (b.Max < b.Preferred || b.Max%b.Min != 0):
		return "a maximum that is 4294967295, or at least the preferred size and a multiple of the minimum"
	}
	return ""
}

// ask returns the capability cb, asking only once.
func (s *Session) ask(c *Call, cb Callback) (int, error) {
	if n, ok := s.asked(cb); ok {
		return n, nil
	}
	n, err := s.capability(c, cb)
	if err != nil {
		return 0, err
	}
	s.can[cb-CanWrite].Store(int32(n + 1))
	return n, nil
}

// asked returns the capability cb if it has been found out.
func (s *Session) asked(cb Callback) (n int, ok bool) {
	v := s.can[cb-CanWrite].Load()
	return int(v - 1), v != 0
}

// capability finds out a capability: what follows from others, then what the
// module says, then what its callbacks imply (nbdkit-plugin(3), can_*). A
// capability is found out by the goroutine of the handshake, before others make
// calls, so two that ask at the same time are possible but rare, and harmless.
func (s *Session) capability(c *Call, cb Callback) (int, error) {
	if cb == CanWrite && s.readonly {
		return 0, nil
	}
	s.traceControl(c, cb)
	switch cb {
	case CanTrim, CanZero, CanFUA:
		if w, err := s.ask(c, CanWrite); err != nil || w == 0 {
			return 0, err
		}
	case CanFastZero:
		if z, err := s.ask(c, CanZero); err != nil || z == None {
			return 0, err
		}
	}
	if s.layer.passes[cb] {
		next, err := s.below(c, cb)
		if err != nil {
			return 0, err
		}
		return next.ask(c, cb)
	}
	if !s.module.Has(cb) {
		return s.implied(c, cb)
	}
	n, err := s.handle.Can(c, cb)
	if err != nil {
		return 0, err
	}
	switch {
	case cb == CanFUA, cb == CanCache, cb == CanZero && s.filter != nil:
		if n < None || n > Native {
			return 0, s.errorf(c, cb, syscall.EINVAL, "%s returned %d: need 0 (none), 1 (emulate) or 2 (native)", cb, n)
		}
	default:
		n = min(n, 1)
	}
	if cb == CanZero && s.filter == nil {
		// The plugin says whether .zero is worth calling; that zeroes can be
		// written at all, with .pwrite, does not depend on it.
		n += Emulate
	}
	return n, nil
}

// implied is the capability of a module that has no callback to ask.
func (s *Session) implied(c *Call, cb Callback) (int, error) {
	has := s.module.Has
	switch cb {
	case CanWrite:
		return digit(has(Pwrite)), nil
	case CanFlush:
		return digit(has(Flush)), nil
	case CanTrim:
		return digit(has(Trim)), nil
	case CanExtents:
		return digit(has(GetExtents)), nil
	case CanZero:
		return Emulate + digit(has(Zero)), nil
	case CanFastZero:
		// Where zeroes are written with .pwrite, a fast zero fails at once,
		// and that is what the flag promises.
		z, err := s.ask(c, CanZero)
		return digit(!has(Zero) || z == Emulate), err
	case CanFUA:
		return Emulate * digit(has(Flush)), nil
	case CanCache:
		return Native * digit(has(Cache)), nil
	}
	return 0, nil // CanMultiConn, IsRotational
}

// Caps is everything that a client is told of a session.
type Caps struct {
	Size       uint64 // bytes
	Write      bool
	Flush      bool
	Rotational bool
	Trim       bool
	Zero       int // None, Emulate (by pwrite) or Native
	FastZero   bool
	FUA        int // None, Emulate (by flush) or Native
	MultiConn  bool
	Cache      int // None, Emulate (by pread) or Native
	Extents    bool
}

// Can asks one of CanWrite ... CanCache. CanZero, CanFUA and CanCache give None,
// Emulate or Native, the others 0 or 1.
func (s *Session) Can(c *Call, cb Callback) (int, error) { return s.ask(c, cb) }

// Caps asks for all capabilities, in nbdkit's order.
func (s *Session) Caps(c *Call) (caps Caps, err error) {
	if caps.Size, err = s.Size(c); err != nil {
		return caps, err
	}
	ask := func(cb Callback) int {
		if err != nil {
			return 0
		}
		var n int
		n, err = s.ask(c, cb)
		return n
	}
	caps.Write = ask(CanWrite) != 0
	caps.Zero = ask(CanZero)
	caps.FastZero = ask(CanFastZero) != 0
	caps.Trim = ask(CanTrim) != 0
	caps.FUA = ask(CanFUA)
	caps.Flush = ask(CanFlush) != 0
	caps.Rotational = ask(IsRotational) != 0
	// Several connections cannot help where only one is served at a time.
	caps.MultiConn = ask(CanMultiConn) != 0 && s.chain.model != SerializeConnections
	caps.Cache = ask(CanCache)
	caps.Extents = ask(CanExtents) != 0
	return caps, err
}
