package backend

// A Callback names one callback of a module, as nbdkit-plugin(3) and
// nbdkit-filter(3) do. The order is that of struct nbdkit_plugin's life cycle,
// which is also the order of the has_* lines of --dump-plugin.
type Callback uint8

const (
	Load Callback = iota
	Unload
	DumpPlugin
	Config
	ConfigComplete
	GetThreadModel
	GetReady
	AfterFork
	Cleanup
	Preconnect
	ListExports
	DefaultExport
	Open
	Prepare
	Finalize
	Close
	ExportDescription
	GetSize
	BlockSizes
	CanWrite
	CanFlush
	IsRotational
	CanTrim
	CanZero
	CanFastZero
	CanExtents
	CanFUA
	CanMultiConn
	CanCache
	Pread
	Pwrite
	Flush
	Trim
	Zero
	GetExtents
	Cache
	callbacks // how many there are
)

var callbackNames = [callbacks]string{
	Load: "load", Unload: "unload", DumpPlugin: "dump_plugin",
	Config: "config", ConfigComplete: "config_complete", GetThreadModel: "thread_model",
	GetReady: "get_ready", AfterFork: "after_fork", Cleanup: "cleanup",
	Preconnect: "preconnect", ListExports: "list_exports", DefaultExport: "default_export",
	Open: "open", Prepare: "prepare", Finalize: "finalize", Close: "close",
	ExportDescription: "export_description", GetSize: "get_size", BlockSizes: "block_size",
	CanWrite: "can_write", CanFlush: "can_flush", IsRotational: "is_rotational",
	CanTrim: "can_trim", CanZero: "can_zero", CanFastZero: "can_fast_zero",
	CanExtents: "can_extents", CanFUA: "can_fua", CanMultiConn: "can_multi_conn",
	CanCache: "can_cache",
	Pread:    "pread", Pwrite: "pwrite", Flush: "flush", Trim: "trim", Zero: "zero",
	GetExtents: "extents", Cache: "cache",
}

// String returns the callback's name in struct nbdkit_plugin.
func (cb Callback) String() string { return callbackNames[cb] }
