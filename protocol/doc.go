// Package protocol is the NBD protocol's wire format: its constants, its
// messages, the table of its commands and the rules that a request must meet.
//
// The source is the specification in the repository NetworkBlockDevice/nbd,
// doc/proto.md, with its extension of extended headers, and doc/uri.md. Where
// the parts of it are:
//
//	section of the specification               here
//	Oldstyle negotiation                       OldstyleGreeting
//	Newstyle negotiation                       Greeting, ClientFlags, OptionHeader, ExportNameReply
//	Fixed newstyle negotiation                 OptionReplyHeader
//	Request message, extended                  Request
//	Simple reply message                       SimpleReply
//	Structured reply chunk message, extended   ChunkHeader
//	Handshake flags, client flags              HandshakeFlags, ClientFlags
//	Transmission flags                         ExportFlags
//	Option types, option reply types           Option, OptionReply
//	NBD_OPT_INFO, NBD_OPT_GO                   InfoRequest
//	NBD_REP_SERVER                             ServerReply
//	NBD_REP_INFO                               InfoType, ExportInfo, TextInfo, BlockSizeInfo
//	Metadata querying                          MetaContextRequest, MetaContextReply, BlockStatusRequest
//	Command flags, request types               CommandFlags, Commands
//	Structured reply flags and types           ReplyFlags, ReplyType, OffsetData, OffsetHole,
//	                                           ErrorChunk, BlockStatus
//	Error values                               Errno, ErrnoOf, ErrnoFor
//	URI format (uri.md)                        URI
//
// Every message has a pair of methods, but for OldstyleGreeting, which is never
// decoded. AppendTo appends its bytes to a slice and does not allocate if that has room. Decode reads it from a slice: a
// header of fixed size from the slice's start, anything else from all of it.
// Decode checks each length before it uses it, keeps nothing of the slice,
// allocates no more than a small multiple of it, and says on failure what it
// got and what it needed. Its errors wrap ErrShort, ErrLong, ErrMagic,
// ErrString or ErrValue.
//
// Nothing here does any input or output, and nothing has a state: values may be
// used by any goroutine, one at a time.
package protocol
