package abi

import "strconv"

// ThreadModel is how many callbacks of a module may run at once.
// Lower values are stricter.
type ThreadModel int

// Thread models (NBDKIT_THREAD_MODEL_*).
const (
	SerializeConnections ThreadModel = iota // one connection at a time
	SerializeAllRequests                    // one callback at a time in all
	SerializeRequests                       // one callback at a time per connection
	Parallel                                // any number
)

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
	return "ThreadModel(" + strconv.Itoa(int(m)) + ")"
}

// Valid says whether m is one of the four thread models.
func (m ThreadModel) Valid() bool { return m >= SerializeConnections && m <= Parallel }

// Flags of the data callbacks (NBDKIT_FLAG_*).
const (
	FlagMayTrim  uint32 = 1 << 0 // .zero may punch a hole
	FlagFUA      uint32 = 1 << 1 // on stable storage before the callback returns
	FlagReqOne   uint32 = 1 << 2 // .extents may stop after one extent
	FlagFastZero uint32 = 1 << 3 // .zero fails with EOPNOTSUPP where it is not fast
)

// FUA is the answer of .can_fua.
type FUA int

// Answers of .can_fua (NBDKIT_FUA_*).
const (
	FUANone    FUA = iota // not supported
	FUAEmulate            // the server calls .flush after the write
	FUANative             // the callbacks take FlagFUA
)

// Cache is the answer of .can_cache.
type Cache int

// Answers of .can_cache (NBDKIT_CACHE_*).
const (
	CacheNone    Cache = iota // not supported
	CacheEmulate              // the server calls .pread and drops the data
	CacheNative               // the server calls .cache, or does nothing without it
)

// Zero is the answer of a filter's .can_zero.
type Zero int

// Answers of a filter's .can_zero (NBDKIT_ZERO_*). A plugin's is a boolean.
const (
	ZeroNone    Zero = iota // not supported
	ZeroEmulate             // the server calls .pwrite
	ZeroNative              // the server calls .zero
)

// Types of extents (NBDKIT_EXTENT_*), which are those of base:allocation in the
// NBD specification.
const (
	ExtentHole uint32 = 1 << 0 // not allocated
	ExtentZero uint32 = 1 << 1 // reads as zeroes
)
