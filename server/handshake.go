package server

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"syscall"
	"time"

	"nbdhost/backend"
	"nbdhost/protocol"
)

// A negotiation is one handshake: fixed newstyle (NBD specification, "Newstyle
// negotiation" and "Option types").
type negotiation struct {
	c  *conn
	in *input

	fixed    bool // the client knows fixed newstyle
	noZeroes bool

	structured bool // also true with extended headers
	extended   bool
	// contextFor is the export for which base:allocation was selected.
	contextFor *string

	informed bool // an NBD_OPT_INFO was answered

	reply []byte // of the option under way, sent as a whole
}

// forget drops what was negotiated so far: nothing that was said in plain text
// may survive NBD_OPT_STARTTLS (CVE-2021-3716).
func (n *negotiation) forget() {
	n.structured, n.extended, n.contextFor = false, false, nil
}

var (
	errAborted = errors.New("client sent NBD_OPT_ABORT")
	errOptions = fmt.Errorf("client sent more than %d options", protocol.MaxOptions)
)

// handshake leads to the transmission phase: it returns nil with c.session open
// and c.negotiated set, or an error, and then nothing is open.
func (c *conn) handshake(in *input) error {
	if t := c.s.opts.HandshakeTimeout; t > 0 {
		_ = c.sock.nc.SetDeadline(time.Now().Add(t)) // fails only on a closed connection
	}
	negotiate := (&negotiation{c: c, in: in}).negotiate
	if c.s.opts.Oldstyle {
		negotiate = c.oldstyle
	}
	if err := negotiate(); err != nil {
		return err
	}
	_ = c.sock.nc.SetDeadline(time.Time{})
	if c.s.quitting() {
		c.sock.wake(lastWords) // what Shutdown set may just have been undone
	}
	return nil
}

// failed counts a handshake that err has ended.
func (c *conn) failed(err error) {
	reason := ReasonProtocol
	var module *backend.Error
	var errno syscall.Errno
	switch {
	case c.s.quitting():
		reason = ReasonShutdown
	case c.refusal == ReasonTLS:
		reason = ReasonTLS
	case err == errPlain:
		reason = ReasonTLSRequired
	case errors.As(err, &module):
		reason = ReasonExport
	case err == errAborted && c.refusal == ReasonClient:
		return // it has what it came for
	case errors.Is(err, os.ErrDeadlineExceeded):
		reason = ReasonTimeout
	case err == errAborted, err == io.EOF, err == io.ErrUnexpectedEOF, errors.As(err, &errno), errors.Is(err, net.ErrClosed):
		reason = c.refusal
	}
	c.s.failures[reason].Add(1)
}

func (n *negotiation) negotiate() error {
	greeting := protocol.Greeting{Flags: (protocol.FlagFixedNewstyle | protocol.FlagNoZeroes) &^ n.c.s.opts.HandshakeMask}
	n.c.call.Debugf("newstyle negotiation: flags: global %#x", uint16(greeting.Flags))
	if err := n.write(greeting.AppendTo(nil)); err != nil {
		return err
	}
	b, err := n.in.need(protocol.ClientFlagsSize)
	if err != nil {
		return err
	}
	var flags protocol.ClientFlags
	if err := flags.Decode(b); err != nil {
		return err
	}
	n.in.take(protocol.ClientFlagsSize)
	n.c.call.Debugf("newstyle negotiation: client flags: %#x", uint32(flags))
	if unknown := flags &^ protocol.ClientFlags(greeting.Flags); unknown != 0 {
		return fmt.Errorf("client flags: got %v, need none that the server did not offer (%v)", flags, greeting.Flags)
	}
	n.fixed = flags&protocol.FlagCFixedNewstyle != 0
	n.noZeroes = flags&protocol.FlagCNoZeroes != 0

	for range protocol.MaxOptions {
		if over, err := n.option(); over || err != nil {
			return err
		}
	}
	return errOptions
}

func (n *negotiation) write(p []byte) error {
	_, err := n.c.stream().Write(p)
	return err
}

// option reads one option and answers it. over is true where the transmission
// phase begins.
func (n *negotiation) option() (over bool, err error) {
	b, err := n.in.need(protocol.OptionHeaderSize)
	if err != nil {
		return false, err
	}
	var h protocol.OptionHeader
	if err := h.Decode(b); err != nil {
		return false, err
	}
	if h.Length > protocol.MaxOptionLength {
		return false, n.tooBig(&h)
	}
	total := protocol.OptionHeaderSize + int(h.Length)
	if b, err = n.in.need(total); err != nil {
		return false, err
	}
	// The data is the input's until the next need, and that comes with the
	// next option.
	data := b[protocol.OptionHeaderSize:total]
	n.in.take(total)

	if h.Option == protocol.OptExportName {
		if n.c.denied != "" {
			return false, errors.New(n.c.denied)
		}
		if n.plain(h.Option) {
			return false, errPlain // there is no reply for an error
		}
		return true, n.exportName(string(data))
	}
	n.reply = n.reply[:0]
	over, err = n.answer(h.Option, data)
	if err != nil && err != errAborted {
		return false, err
	}
	if werr := n.write(n.reply); werr != nil {
		if over {
			n.c.closeSession()
		}
		return false, werr
	}
	return over, err
}

// tooBig consumes and refuses an option with more data than is looked at. More
// than a write may bring is an attack: nobody is asked to send it to the end.
func (n *negotiation) tooBig(h *protocol.OptionHeader) error {
	why := fmt.Sprintf("got %d bytes of data, need at most %d", h.Length, protocol.MaxOptionLength)
	if h.Option == protocol.OptExportName || h.Length > protocol.MaxRequestLength {
		return fmt.Errorf("%v: %s", h.Option, why)
	}
	n.in.take(protocol.OptionHeaderSize)
	if err := n.in.discard(uint64(h.Length)); err != nil {
		return err
	}
	if h.Option == protocol.OptSetMetaContext {
		n.contextFor = nil
	}
	n.reply = n.reply[:0]
	if n.plain(h.Option) {
		n.refuse(h.Option, protocol.RepErrTLSReqd, errPlain.Error())
	} else {
		n.refuse(h.Option, protocol.RepErrTooBig, why)
	}
	return n.write(n.reply)
}

// answer composes the reply to an option of fixed newstyle.
func (n *negotiation) answer(opt protocol.Option, data []byte) (over bool, err error) {
	if n.c.denied != "" && opt != protocol.OptAbort {
		n.refuse(opt, protocol.RepErrPolicy, n.c.denied)
		return false, nil
	}
	// A module may stop the server when it is closed, as nbdkit's exitlast filter does, also after
	// NBD_OPT_INFO. Who has asked may go on.
	if n.c.s.quitting() && !n.informed && opt != protocol.OptAbort {
		n.refuse(opt, protocol.RepErrShutdown, "the server is shutting down")
		return false, nil
	}
	if n.plain(opt) {
		n.c.refusal = ReasonTLSRequired
		n.refuse(opt, protocol.RepErrTLSReqd, errPlain.Error())
		return false, nil
	}
	if !n.fixed && opt != protocol.OptAbort {
		n.refuse(opt, protocol.RepErrInvalid, fmt.Sprintf("got no %v from the client, need it for all but %v", protocol.FlagCFixedNewstyle, protocol.OptExportName))
		return false, nil
	}
	noData := func() bool {
		if len(data) != 0 {
			n.refuse(opt, protocol.RepErrInvalid, fmt.Sprintf("got %d bytes of data, need none", len(data)))
		}
		return len(data) == 0
	}
	switch opt {
	case protocol.OptAbort:
		n.accept(opt)
		return false, errAborted

	case protocol.OptList:
		if noData() {
			return false, n.list(opt)
		}

	case protocol.OptStructuredReply:
		switch {
		case !noData():
		case n.extended:
			n.refuse(opt, protocol.RepErrExtHeaderReqd, "extended headers were negotiated, which include structured replies")
		case n.c.s.opts.NoStructuredReplies:
			n.refuse(opt, protocol.RepErrUnsup, "structured replies are switched off")
		default:
			n.structured = true
			n.accept(opt)
		}

	case protocol.OptExtendedHeaders:
		switch {
		case !noData():
		case n.extended:
			n.refuse(opt, protocol.RepErrInvalid, "extended headers were negotiated already")
		case n.c.s.opts.NoExtendedHeaders || n.c.s.opts.NoStructuredReplies:
			n.refuse(opt, protocol.RepErrUnsup, "extended headers are switched off")
		default:
			n.structured, n.extended = true, true
			n.accept(opt)
		}

	case protocol.OptListMetaContext, protocol.OptSetMetaContext:
		n.metaContext(opt, data)

	case protocol.OptInfo, protocol.OptGo:
		return n.info(opt, data)

	case protocol.OptStartTLS:
		if noData() {
			return false, n.startTLS(opt)
		}

	default:
		n.refuse(opt, protocol.RepErrUnsup, "this server does not know the option")
	}
	return false, nil
}

func (n *negotiation) append(opt protocol.Option, typ protocol.OptionReply, data []byte) {
	h := protocol.OptionReplyHeader{Option: opt, Type: typ, Length: uint32(len(data))}
	n.reply = append(h.AppendTo(n.reply), data...)
}

func (n *negotiation) accept(opt protocol.Option) {
	n.c.call.Debugf("replying to %v with %v", opt, protocol.RepAck)
	n.append(opt, protocol.RepAck, nil)
}

// refuse answers with an error and a text for people.
func (n *negotiation) refuse(opt protocol.Option, typ protocol.OptionReply, why string) {
	n.c.call.Debugf("replying to %v with %v: %s", opt, typ, why)
	n.append(opt, typ, []byte(why[:min(len(why), protocol.MaxStringLength)]))
}

// maxReply is how much of an answer is put together before it is sent, in bytes.
const maxReply = 64 << 10

// list sends a long list in pieces.
func (n *negotiation) list(opt protocol.Option) error {
	c := n.c
	c.lane.Lock()
	list, err := c.s.opts.Chain.ListExports(&c.call, c.s.opts.ReadOnly)
	c.lane.Unlock()
	if err != nil {
		n.refuse(opt, protocol.RepErrPlatform, errorText(err))
		return nil
	}
	for _, e := range list[:min(len(list), protocol.MaxExports)] {
		m := protocol.ServerReply{Name: e.Name, Details: e.Description}
		n.append(opt, protocol.RepServer, m.AppendTo(nil))
		if len(n.reply) >= maxReply {
			if err := n.write(n.reply); err != nil {
				return err
			}
			n.reply = n.reply[:0]
		}
	}
	n.accept(opt)
	return nil
}

// metaContext answers with base:allocation, the one context that there is, if it
// is asked for.
func (n *negotiation) metaContext(opt protocol.Option, data []byte) {
	set := opt == protocol.OptSetMetaContext
	if set {
		n.contextFor = nil // whatever comes of it
	}
	if n.c.s.opts.NoMetaContexts {
		n.refuse(opt, protocol.RepErrUnsup, "meta contexts are switched off")
		return
	}
	if set && !n.structured {
		n.refuse(opt, protocol.RepErrInvalid, "negotiate structured replies first")
		return
	}
	var q protocol.MetaContextRequest
	if err := q.Decode(data); err != nil {
		n.refuse(opt, protocol.RepErrInvalid, err.Error())
		return
	}
	n.c.call.Debugf("newstyle negotiation: %v: client requested export '%s' with %d queries", opt, q.Export, len(q.Queries))
	match := len(q.Queries) == 0 && !set
	for _, query := range q.Queries {
		match = match || query == protocol.ContextBaseAllocation || query == "base:" && !set
	}
	if match {
		m := protocol.MetaContextReply{Name: protocol.ContextBaseAllocation}
		if set {
			m.ID = baseAllocation
			n.contextFor = &q.Export
		}
		n.append(opt, protocol.RepMetaContext, m.AppendTo(nil))
	}
	n.accept(opt)
}

// badName says what is wrong with an export name, or "".
func badName(name string) string {
	switch {
	case len(name) > protocol.MaxStringLength:
		return fmt.Sprintf("got an export name of %d bytes, need at most %d", len(name), protocol.MaxStringLength)
	case strings.IndexByte(name, 0) >= 0:
		return "got an export name with a NUL byte, need a text without"
	}
	return ""
}

// exportName is NBD_OPT_EXPORT_NAME, which has no reply for an error.
func (n *negotiation) exportName(name string) error {
	n.c.call.Debugf("newstyle negotiation: %v: client requested export '%s'", protocol.OptExportName, name)
	if why := badName(name); why != "" {
		return errors.New(why)
	}
	if n.extended {
		return fmt.Errorf("%v: extended headers were negotiated, need %v", protocol.OptExportName, protocol.OptGo)
	}
	if n.c.s.quitting() {
		return errors.New("the server is shutting down")
	}
	caps, err := n.c.openSession(name)
	if err != nil {
		return err
	}
	flags := n.settle(name, caps)
	m := protocol.ExportNameReply{Size: caps.Size, Flags: flags, NoZeroes: n.noZeroes}
	if err := n.write(m.AppendTo(nil)); err != nil {
		n.c.closeSession()
		return err
	}
	return nil
}

// info is NBD_OPT_INFO and NBD_OPT_GO.
func (n *negotiation) info(opt protocol.Option, data []byte) (over bool, err error) {
	c := n.c
	var q protocol.InfoRequest
	if err := q.Decode(data); err != nil {
		n.refuse(opt, protocol.RepErrInvalid, err.Error())
		return false, nil
	}
	c.call.Debugf("newstyle negotiation: %v: client requested export '%s'", opt, q.Export)
	if why := badName(q.Export); why != "" {
		n.refuse(opt, protocol.RepErrInvalid, why)
		return false, nil
	}
	caps, err := c.openSession(q.Export)
	if err != nil {
		c.refusal = ReasonExport
		n.refuse(opt, protocol.RepErrUnknown, errorText(err))
		return false, nil
	}
	flags := n.settle(q.Export, caps)
	m := protocol.ExportInfo{Size: caps.Size, Flags: flags}
	n.append(opt, protocol.RepInfo, m.AppendTo(nil))
	if err := n.moreInfo(opt, q.Infos); err != nil {
		c.closeSession()
		n.reply = n.reply[:0]
		n.refuse(opt, protocol.RepErrUnknown, errorText(err))
		return false, nil
	}
	n.accept(opt)
	if opt == protocol.OptInfo {
		n.informed = true
		c.closeSession()
		return false, nil
	}
	return true, nil
}

// moreInfo answers what the client wants to know besides NBD_INFO_EXPORT; each
// once, and only what the module can tell.
func (n *negotiation) moreInfo(opt protocol.Option, infos []protocol.Info) error {
	c := n.c
	c.lane.Lock()
	defer c.lane.Unlock()
	answered := map[protocol.Info]bool{}
	for _, i := range infos {
		if answered[i] {
			continue
		}
		answered[i] = true
		switch i {
		case protocol.InfoName:
			m := protocol.TextInfo{Type: i, Text: c.session.Export()}
			n.append(opt, protocol.RepInfo, m.AppendTo(nil))
		case protocol.InfoDescription:
			if text, ok := c.session.ExportDescription(&c.call); ok {
				m := protocol.TextInfo{Type: i, Text: text}
				n.append(opt, protocol.RepInfo, m.AppendTo(nil))
			}
		case protocol.InfoBlockSize:
			b, err := c.session.BlockSize(&c.call)
			if err != nil {
				return err
			}
			if b != (backend.BlockSize{}) {
				m := protocol.BlockSizeInfo{Minimum: b.Min, Preferred: b.Preferred, Maximum: b.Max}
				n.append(opt, protocol.RepInfo, m.AppendTo(nil))
				c.negotiated.BlockSize, c.negotiated.StrictBlockSize = m, c.s.opts.StrictBlockSize
			}
		}
	}
	return nil
}

// settle fixes what the transmission phase goes by, and returns the transmission
// flags of the export that was opened as name.
func (n *negotiation) settle(name string, caps backend.Caps) protocol.ExportFlags {
	f := protocol.FlagHasFlags
	set := func(on bool, flag protocol.ExportFlags) {
		if on {
			f |= flag
		}
	}
	set(!caps.Write, protocol.FlagReadOnly)
	set(caps.Flush, protocol.FlagSendFlush)
	set(caps.FUA != backend.None, protocol.FlagSendFUA)
	set(caps.Rotational, protocol.FlagRotational)
	set(caps.Trim, protocol.FlagSendTrim)
	set(caps.Zero != backend.None, protocol.FlagSendWriteZeroes)
	set(caps.FastZero, protocol.FlagSendFastZero)
	set(caps.MultiConn, protocol.FlagCanMultiConn)
	set(caps.Cache != backend.None, protocol.FlagSendCache)
	set(n.structured, protocol.FlagSendDF)
	contexts := n.contextFor != nil && *n.contextFor == name
	set(n.extended && contexts, protocol.FlagBlockStatusPayload)
	n.c.call.Debugf("newstyle negotiation: flags: export %#x", uint16(f))
	n.c.negotiated = protocol.Negotiated{
		Size: caps.Size, Flags: f, StructuredReplies: n.structured,
		ExtendedHeaders: n.extended, MetaContexts: contexts,
	}
	n.c.sparse = n.c.s.opts.sparseMode(n.structured, caps.Extents)
	return f
}
