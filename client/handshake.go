package client

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"

	"nbdhost/protocol"
)

// OptionError is a server's refusal of an option.
type OptionError struct {
	Option protocol.Option
	Reply  protocol.OptionReply
	Msg    string // the server's words, may be empty
}

func (e *OptionError) Error() string {
	if e.Msg == "" {
		return fmt.Sprintf("negotiate %v: server replied %v", e.Option, e.Reply)
	}
	return fmt.Sprintf("negotiate %v: server replied %v: %s", e.Option, e.Reply, e.Msg)
}

// handshake is a connection before the transmission phase.
type handshake struct {
	socket     net.Conn // what it began on
	nc         net.Conn // socket, or TLS over it
	in         *bufio.Reader
	opts       Options
	noZeroes   bool
	fixed      bool
	structured bool // also true with extended headers
	extended   bool
	contexts   map[uint32]string
	export     Export
}

// shake does the greeting and then what is asked, within ctx. It closes nc if it fails.
func shake(ctx context.Context, nc net.Conn, opts *Options, then func(*handshake) error) (*handshake, error) {
	h := &handshake{socket: nc, nc: nc, in: bufio.NewReader(nc)}
	if opts != nil {
		h.opts = *opts
	}
	h.export.Name = h.opts.Export
	// Closing ends the waiting on any connection; those of SSH have no deadlines.
	stop := context.AfterFunc(ctx, func() { nc.Close() })
	err := h.greet()
	if err == nil && h.opts.secure != nil {
		err = h.startTLS(ctx)
	}
	if err == nil {
		err = then(h)
	}
	if !stop() {
		// It is closed, or will be at any moment.
		err = fmt.Errorf("negotiate: %w", context.Cause(ctx))
	}
	if err != nil {
		h.nc.Close()
		return nil, err
	}
	return h, nil
}

func (h *handshake) greet() error {
	b := make([]byte, protocol.GreetingSize)
	if _, err := io.ReadFull(h.in, b); err != nil {
		return fmt.Errorf("read greeting: %w", err)
	}
	var g protocol.Greeting
	if err := g.Decode(b); err != nil {
		return err
	}
	g.Flags &^= h.opts.Decline
	var flags protocol.ClientFlags
	if g.Flags&protocol.FlagFixedNewstyle != 0 {
		h.fixed = true
		flags |= protocol.FlagCFixedNewstyle
	}
	if g.Flags&protocol.FlagNoZeroes != 0 {
		h.noZeroes = true
		flags |= protocol.FlagCNoZeroes
	}
	if _, err := h.nc.Write(flags.AppendTo(nil)); err != nil {
		return fmt.Errorf("write client flags: %w", err)
	}
	return nil
}

// startTLS goes on under TLS. There is no way back: the error ends the connection.
func (h *handshake) startTLS(ctx context.Context) error {
	if !h.fixed {
		return fmt.Errorf("negotiate %v: the server does not know it: use nbd instead of nbds", protocol.OptStartTLS)
	}
	if err := h.ask(protocol.OptStartTLS, nil, nil); err != nil {
		return err
	}
	if n := h.in.Buffered(); n > 0 {
		// Somebody between the two may have put it there.
		return fmt.Errorf("negotiate %v: got %d bytes behind the reply in plain text, need none", protocol.OptStartTLS, n)
	}
	secure, err := h.opts.TLS(ctx, h.nc, h.opts.secure)
	if err != nil {
		return err
	}
	h.nc = secure
	h.in.Reset(secure)
	return nil
}

// enter negotiates all that is wanted, up to the transmission phase.
func (h *handshake) enter() error {
	if !h.fixed {
		return h.exportName()
	}
	if !h.opts.SimpleReplies && !h.opts.CompactHeaders && !h.opts.NoGo {
		if err := wanted(h.extendedHeaders()); err != nil {
			return err
		}
	}
	if !h.opts.SimpleReplies && !h.extended {
		if err := wanted(h.structuredReplies()); err != nil {
			return err
		}
	}
	if h.structured {
		if err := wanted(h.setMetaContexts()); err != nil {
			return err
		}
	}
	if h.opts.NoGo {
		return h.exportName()
	}
	err := h.info(protocol.OptGo)
	var refused *OptionError
	if errors.As(err, &refused) {
		if refused.Reply == protocol.RepErrUnsup && !h.extended {
			return h.exportName()
		}
		// Leave politely; the refusal is what counts.
		_ = h.abort()
	}
	return err
}

// wanted drops a server's refusal of what this client can do without.
func wanted(err error) error {
	var refused *OptionError
	if errors.As(err, &refused) {
		return nil
	}
	return err
}

func (h *handshake) structuredReplies() error {
	if err := h.ask(protocol.OptStructuredReply, nil, nil); err != nil {
		return err
	}
	h.structured = true
	return nil
}

func (h *handshake) extendedHeaders() error {
	if err := h.ask(protocol.OptExtendedHeaders, nil, nil); err != nil {
		return err
	}
	h.structured, h.extended = true, true
	return nil
}

func (h *handshake) setMetaContexts() error {
	queries := h.opts.MetaContexts
	if queries == nil {
		queries = []string{protocol.ContextBaseAllocation}
	}
	if len(queries) == 0 {
		return nil
	}
	q := protocol.MetaContextRequest{Export: h.opts.Export, Queries: queries}
	contexts := make(map[uint32]string)
	err := h.ask(protocol.OptSetMetaContext, q.AppendTo(nil), func(t protocol.OptionReply, b []byte) error {
		if t != protocol.RepMetaContext {
			return unexpected(protocol.OptSetMetaContext, t)
		}
		var m protocol.MetaContextReply
		if err := m.Decode(b); err != nil {
			return err
		}
		contexts[m.ID] = m.Name
		return nil
	})
	if err == nil {
		h.contexts = contexts
	}
	return err
}

// info sends NBD_OPT_INFO or NBD_OPT_GO.
func (h *handshake) info(opt protocol.Option) error {
	q := protocol.InfoRequest{
		Export: h.opts.Export,
		Infos:  []protocol.Info{protocol.InfoName, protocol.InfoDescription, protocol.InfoBlockSize},
	}
	told := false
	err := h.ask(opt, q.AppendTo(nil), func(t protocol.OptionReply, b []byte) error {
		if t != protocol.RepInfo {
			return unexpected(opt, t)
		}
		kind, err := protocol.InfoType(b)
		if err != nil {
			return err
		}
		switch kind {
		case protocol.InfoExport:
			var e protocol.ExportInfo
			if err := e.Decode(b); err != nil {
				return err
			}
			told = true
			h.export.Size, h.export.Flags = e.Size, e.Flags
		case protocol.InfoName, protocol.InfoDescription:
			var text protocol.TextInfo
			if err := text.Decode(b); err != nil {
				return err
			}
			if kind == protocol.InfoName {
				h.export.Name = text.Text
			} else {
				h.export.Description = text.Text
			}
		case protocol.InfoBlockSize:
			return h.export.BlockSize.Decode(b)
		}
		return nil
	})
	if err == nil && !told {
		return fmt.Errorf("negotiate %v: server replied without %v", opt, protocol.InfoExport)
	}
	return err
}

func (h *handshake) list() ([]Export, error) {
	var exports []Export
	err := h.ask(protocol.OptList, nil, func(t protocol.OptionReply, b []byte) error {
		if t != protocol.RepServer {
			return unexpected(protocol.OptList, t)
		}
		var s protocol.ServerReply
		if err := s.Decode(b); err != nil {
			return err
		}
		exports = append(exports, Export{Name: s.Name, Description: s.Details})
		return nil
	})
	return exports, err
}

// exportName enters the transmission phase with NBD_OPT_EXPORT_NAME, which a
// server refuses by closing the connection.
func (h *handshake) exportName() error {
	if err := h.write(protocol.OptExportName, []byte(h.opts.Export)); err != nil {
		return err
	}
	reply := protocol.ExportNameReply{NoZeroes: h.noZeroes}
	b := make([]byte, reply.WireSize())
	if _, err := io.ReadFull(h.in, b); err != nil {
		return fmt.Errorf("negotiate %v: server closed the connection, perhaps it has no such export: %w", protocol.OptExportName, err)
	}
	if err := reply.Decode(b); err != nil {
		return err
	}
	h.export.Size, h.export.Flags = reply.Size, reply.Flags
	return nil
}

// abort ends the handshake. A server may close without acknowledging it.
func (h *handshake) abort() error {
	if !h.fixed {
		return nil
	}
	err := h.ask(protocol.OptAbort, nil, nil)
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		return nil
	}
	return err
}

func unexpected(opt protocol.Option, t protocol.OptionReply) error {
	return fmt.Errorf("negotiate %v: got %v from the server, which does not answer it", opt, t)
}

func (h *handshake) write(opt protocol.Option, data []byte) error {
	header := protocol.OptionHeader{Option: opt, Length: uint32(len(data))}
	b := append(header.AppendTo(nil), data...)
	if _, err := h.nc.Write(b); err != nil {
		return fmt.Errorf("negotiate %v: %w", opt, err)
	}
	return nil
}

// ask sends an option and hands each reply to each, up to NBD_REP_ACK. An error
// reply comes back as *OptionError.
func (h *handshake) ask(opt protocol.Option, data []byte, each func(protocol.OptionReply, []byte) error) error {
	if err := h.write(opt, data); err != nil {
		return err
	}
	for replies := 0; ; replies++ {
		t, b, err := h.reply(opt)
		switch {
		case err != nil:
			return err
		case t == protocol.RepAck:
			return nil
		case t.IsError():
			return &OptionError{Option: opt, Reply: t, Msg: string(b)}
		case each == nil:
			return unexpected(opt, t)
		case replies == protocol.MaxExports:
			return fmt.Errorf("negotiate %v: got more than %d replies", opt, protocol.MaxExports)
		}
		if err := each(t, b); err != nil {
			return err
		}
	}
}

func (h *handshake) reply(opt protocol.Option) (protocol.OptionReply, []byte, error) {
	b := make([]byte, protocol.OptionReplyHeaderSize)
	if _, err := io.ReadFull(h.in, b); err != nil {
		return 0, nil, fmt.Errorf("negotiate %v: %w", opt, err)
	}
	var header protocol.OptionReplyHeader
	if err := header.Decode(b); err != nil {
		return 0, nil, err
	}
	if header.Option != opt {
		return 0, nil, fmt.Errorf("negotiate %v: got a reply to %v", opt, header.Option)
	}
	if header.Length > protocol.MaxOptionReplyLength {
		return 0, nil, fmt.Errorf("negotiate %v: got a reply of %d bytes, need at most %d", opt, header.Length, protocol.MaxOptionReplyLength)
	}
	data := make([]byte, header.Length)
	if _, err := io.ReadFull(h.in, data); err != nil {
		return 0, nil, fmt.Errorf("negotiate %v: %w", opt, err)
	}
	return header.Type, data, nil
}
