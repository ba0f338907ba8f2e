package loader

import (
	"sync/atomic"

	"nbdhost/backend"
	"nbdhost/cshim"
)

// A plugin that was compiled for serialize_all_requests, or less, may keep something in
// variables of the thread that it is called on (Perl does), and a goroutine is on another
// thread at each call. nbdkit has a thread for each connection, and so the server has one
// for those of such a plugin (backend.Pinned). That is not enough for Ruby, which has to be
// called on the thread that it was started on, the main one.

var (
	mainCalls   = make(chan func())
	mainServing atomic.Bool
)

// OnMain calls serve on a goroutine of its own and returns when it has returned.
// Meanwhile the calling goroutine, which is the one on the main thread, makes the
// calls that have to be made there. No connection may be open before or after.
func OnMain(serve func()) {
	done := make(chan struct{})
	mainServing.Store(true)
	defer mainServing.Store(false)
	go func() {
		defer close(done)
		serve()
	}()
	for {
		select {
		case call := <-mainCalls:
			call()
		case <-done:
			return
		}
	}
}

// isOnMain tells whether the plugin is called on the main thread only.
func (p *Plugin) isOnMain() bool { return p.name == "ruby" && mainServing.Load() }

// Pinned is that of [backend.Pinned].
func (p *Plugin) Pinned() bool {
	return p.ThreadModel() <= backend.SerializeAllRequests && !p.isOnMain()
}

// onMain makes a call on the main thread and waits for it.
func onMain(call func()) {
	done := make(chan struct{})
	within := cshim.CurrentCall() // a filter's, if one waits here
	mainCalls <- func() {
		defer close(done)
		within.Do(call)
	}
	<-done
}

// A mainHandle is a handle of a plugin that is called on the main thread only.
type mainHandle struct{ h *handle }

func (m mainHandle) String() string { return m.h.String() }

func (m mainHandle) Close(c *backend.Call) { onMain(func() { m.h.Close(c) }) }

func (m mainHandle) GetSize(c *backend.Call) (n int64, err error) {
	onMain(func() { n, err = m.h.GetSize(c) })
	return n, err
}

func (m mainHandle) ExportDescription(c *backend.Call) (text string, ok bool) {
	onMain(func() { text, ok = m.h.ExportDescription(c) })
	return text, ok
}

func (m mainHandle) BlockSize(c *backend.Call) (b backend.BlockSize, err error) {
	onMain(func() { b, err = m.h.BlockSize(c) })
	return b, err
}

func (m mainHandle) Can(c *backend.Call, cb backend.Callback) (n int, err error) {
	onMain(func() { n, err = m.h.Can(c, cb) })
	return n, err
}

func (m mainHandle) Pread(c *backend.Call, b []byte, off uint64) (err error) {
	onMain(func() { err = m.h.Pread(c, b, off) })
	return err
}

func (m mainHandle) Pwrite(c *backend.Call, b []byte, off uint64, flags backend.Flags) (err error) {
	onMain(func() { err = m.h.Pwrite(c, b, off, flags) })
	return err
}

func (m mainHandle) Flush(c *backend.Call) (err error) {
	onMain(func() { err = m.h.Flush(c) })
	return err
}

func (m mainHandle) Trim(c *backend.Call, n uint32, off uint64, flags backend.Flags) (err error) {
	onMain(func() { err = m.h.Trim(c, n, off, flags) })
	return err
}

func (m mainHandle) Zero(c *backend.Call, n uint32, off uint64, flags backend.Flags) (err error) {
	onMain(func() { err = m.h.Zero(c, n, off, flags) })
	return err
}

func (m mainHandle) Extents(c *backend.Call, n uint32, off uint64, flags backend.Flags, x *backend.Extents) (err error) {
	onMain(func() { err = m.h.Extents(c, n, off, flags, x) })
	return err
}

func (m mainHandle) Cache(c *backend.Call, n uint32, off uint64) (err error) {
	onMain(func() { err = m.h.Cache(c, n, off) })
	return err
}
