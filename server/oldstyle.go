package server

import (
	"fmt"

	"nbdhost/protocol"
)

// oldstyle is the handshake of nbdkit -o (NBD specification, "Oldstyle
// negotiation"): the server describes the default export, and what the client
// sends next are requests. It returns as [conn.handshake] does.
func (c *conn) oldstyle() error {
	if c.s.opts.TLSRequired {
		return errPlain // which the oldstyle protocol cannot do
	}
	caps, err := c.openSession("")
	if err != nil {
		return err
	}
	n := negotiation{c: c}
	greeting := protocol.OldstyleGreeting{Size: caps.Size, Flags: n.settle("", caps)}
	c.call.Debugf("oldstyle negotiation: flags: export %#x", uint16(greeting.Flags))
	if err := n.write(greeting.AppendTo(nil)); err != nil {
		c.closeSession()
		return fmt.Errorf("oldstyle negotiation: %w", err)
	}
	return nil
}
