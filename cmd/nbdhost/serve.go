package main

import (
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"nbdhost/backend"
	"nbdhost/loader"
	"nbdhost/protocol"
	"nbdhost/server"
)

// The Go scheduler keeps one of its processors for a thread that blocks until it notices, so
// there are more than the machine has: minProcs, and up to maxProcs while readers of hot
// sockets block, but no more than that, since the scheduler looks through all of them for
// work: see RATIONALE.md.
const (
	minProcs = 16
	maxProcs = 128
)

// maxThreads is how many threads there may be, instead of the 10,000 of Go: each call that a plugin
// does not return from has one, and the last must not end the process.
const maxThreads = 1 << 22

// setProcs sets with how many a server begins, and mostProcs returns how many it may have,
// unless the environment says how many there are to be.
func setProcs() {
	if !procsGiven() && runtime.GOMAXPROCS(0) < minProcs {
		runtime.GOMAXPROCS(minProcs)
	}
}

func mostProcs() int {
	if procsGiven() {
		return 0
	}
	return max(runtime.GOMAXPROCS(0), maxProcs)
}

func procsGiven() bool { return os.Getenv("GOMAXPROCS") != "" }

// serve opens the plugin and does with it what the options say, up to the end of
// the process. start is whom to tell that it is ready, or nil.
func serve(o *options, start *starter, stdout io.Writer, out *logHandler) (int, error) {
	setProcs()
	debug.SetMaxThreads(maxThreads)
	// Files that plugins and we make do not depend on who starts the server.
	unix.Umask(0o022)
	switch {
	case o.log != logDefault:
		if err := out.logTo(o.log); err != nil {
			return 1, err
		}
	case o.superior != nil && o.superior.Background && o.superior.Again:
		if err := out.logTo(logSyslog); err != nil {
			return 1, err
		}
	}
	log := slog.New(out)
	who, err := lookUpIdentity(o.user, o.group)
	if err != nil {
		return 1, err
	}
	var stop stopper
	// Before a plugin is opened: from then on what plugins do to the handlers is
	// undone, again and again.
	stop.onSignals()
	if o.superior != nil {
		o.superior.watch(func() { stop.ask(1) })
	}
	err = loader.Init(loader.Host{
		Log:      out.fromModule,
		Secret:   o.secrets.add,
		Redact:   o.secrets.redact,
		Shutdown: stop.stop,
		Name:     o.name,
	})
	if err != nil {
		return 1, err
	}
	loader.SetVerbose(o.verbose)
	loader.SetStdioSafe(!o.stdio)
	o.secrets.learn(os.Environ()) // plugins print what they find there, and so does -D nbdkit.environ
	log.Debug(versionText(os.Args[0]))
	log.Debug("service mode: " + o.serviceMode())

	found, err := loader.Find(loader.PluginKind, o.args[0], o.pluginPath...)
	if err != nil {
		return 1, o.swallowed(err)
	}
	if found.Script != "" { // whatever it is called
		o.takeBack(start)
	}
	log.Debug("registering plugin " + found.Path)
	plugin, err := loader.Open(found.Path)
	if err != nil {
		return 1, err
	}
	log.Debug(fmt.Sprintf("registered plugin %s (name %s)", found.Path, plugin.Name()))
	out.setModule(plugin.Name())
	filters, err := openFilters(o, log)
	if err != nil {
		return 1, err
	}
	switch {
	case o.help:
		return 0, write(stdout, usage()+helpText(plugin, filters))
	case o.version:
		return 0, write(stdout, moduleVersions(plugin, filters))
	}
	log.Debug("request processing: " + layers(plugin, filters))

	args := o.args[1:]
	if found.Script != "" {
		args = append([]string{found.Script}, args...)
	}
	if args, err = expandParameters(args); err != nil {
		return 1, err
	}
	o.secrets.learn(args)
	chain := newChain(o, plugin, filters, log)
	chain.Load()
	command := &captive{log: log}
	code, err := serveLoaded(o, start, stdout, out, plugin, filters, chain, args, who, &stop, command)
	if code != statusStuck {
		chain.Unload()
	}
	return command.finish(code), err
}

// swallowed adds to err, that there is no such plugin, which option has taken one's name for its
// value.
func (o *options) swallowed(err error) error {
	installed := loader.Installed(loader.PluginKind, o.pluginPath...)
	for _, v := range []struct{ option, value string }{{"--unix", o.unix}, {"--pidfile", o.pidfile}, {"--run", o.command}} {
		if slices.Contains(installed, filepath.Base(v.value)) { // the path is absolute by now
			return fmt.Errorf("%w; %s was taken for the value of %s", err, filepath.Base(v.value), v.option)
		}
	}
	return err
}

// openFilters opens the filters, the one next to the plugin first, and returns them
// with the outermost first.
func openFilters(o *options, log *slog.Logger) ([]*loader.Filter, error) {
	filters := make([]*loader.Filter, len(o.filters))
	for i, name := range slices.Backward(o.filters) {
		found, err := loader.Find(loader.FilterKind, name, o.filterPath...)
		if err != nil {
			return nil, err
		}
		log.Debug("registering filter " + found.Path)
		f, err := loader.OpenFilter(found.Path, o.filterAnyRelease)
		if err != nil {
			return nil, err
		}
		log.Debug(fmt.Sprintf("registered filter %s (name %s)", found.Path, f.Name()))
		filters[i] = f
	}
	return filters, nil
}

func newChain(o *options, plugin *loader.Plugin, filters []*loader.Filter, log *slog.Logger) *backend.Chain {
	modules := []debuggable{plugin}
	var layers []backend.Filter
	for _, f := range filters {
		modules = append(modules, f)
		layers = append(layers, f)
	}
	chain := backend.NewChain(plugin, log, setDebugFlags(o.debug, log, modules...), layers...)
	if o.tls.mode == tlsRequire {
		chain.RequireTLS()
	}
	return chain
}

// helpText is what --help adds for the modules.
func helpText(plugin *loader.Plugin, filters []*loader.Filter) string {
	var b strings.Builder
	for _, f := range filters {
		b.WriteString("\n" + f.Help())
	}
	return b.String() + "\n" + plugin.Help()
}

// moduleVersions is the text of --version where a plugin is given.
func moduleVersions(plugin *loader.Plugin, filters []*loader.Filter) string {
	text := versionText(os.Args[0])
	for _, f := range filters {
		text += "\n" + f.Name() + " " + f.Version()
	}
	return strings.TrimSpace(text+"\n"+plugin.Name()+" "+plugin.Version()) + "\n"
}

// layers shows which way requests go.
func layers(plugin *loader.Plugin, filters []*loader.Filter) string {
	if len(filters) == 0 {
		return plugin.Name() + " (plugin, first)"
	}
	way := ""
	for i, f := range filters {
		if way += f.Name() + " (filter"; i == 0 {
			way += ", first"
		}
		way += ") -> "
	}
	return way + plugin.Name() + " (plugin, last)"
}

// debuggable is a module with debug flags.
type debuggable interface {
	ApplyDebugFlags([]loader.DebugFlag) (warnings []string)
}

// setDebugFlags sets the flags of the modules and returns those of the server.
func setDebugFlags(flags []loader.DebugFlag, log *slog.Logger, modules ...debuggable) backend.Trace {
	trace := backend.Trace{Control: true, Data: true}
	var ofModules []loader.DebugFlag
	var warnings []string
	for _, f := range flags {
		switch {
		case f.Module != "nbdkit":
			ofModules = append(ofModules, f)
		case f.Flag == "backend.controlpath":
			trace.Control = f.Value != 0
		case f.Flag == "backend.datapath":
			trace.Data = f.Value != 0
		case f.Flag == "environ":
			if f.Value != 0 {
				for _, v := range os.Environ() {
					log.Debug("environ: " + v)
				}
			}
		case f.Flag == "tls.log" || f.Flag == "tls.session": // nothing is said about TLS
		default:
			warnings = append(warnings, fmt.Sprintf("debug flag -D %s.%s was not used", f.Module, f.Flag))
		}
	}
	for _, m := range modules {
		warnings = append(warnings, m.ApplyDebugFlags(ofModules)...)
	}
	for _, w := range append(warnings, loader.UnusedDebugFlags(ofModules)...) {
		log.Warn(w)
	}
	return trace
}

// serveLoaded goes on from .load to the end of .cleanup.
func serveLoaded(o *options, start *starter, stdout io.Writer, out *logHandler,
	plugin *loader.Plugin, filters []*loader.Filter, chain *backend.Chain, args []string, who identity,
	stop *stopper, command *captive) (int, error) {
	for i, arg := range args {
		key, value, err := parseParameter(arg, plugin.MagicConfigKey(), i == 0)
		if err != nil {
			return 1, err
		}
		if plugin.Name() == "sh" && key == "script" {
			if err := checkScript(value); err != nil {
				return 1, err
			}
		}
		if err := chain.Config(key, value); err != nil {
			return 1, err
		}
	}
	if o.dumpPlugin {
		// Scripts are loaded by now, but parameters that are missing do no harm.
		if err := chain.SetThreadModel(backend.Parallel); err != nil {
			return 1, err
		}
		if err := plugin.Dump(stdout, chain.ThreadModel()); err != nil {
			return 1, err
		}
		for _, f := range slices.Backward(filters) {
			if err := f.Dump(stdout); err != nil {
				return 1, err
			}
		}
		return 0, nil
	}
	if err := chain.ConfigComplete(); err != nil {
		return 1, err
	}
	if err := chain.SetThreadModel(backend.Parallel); err != nil {
		return 1, err
	}
	if err := chain.GetReady(); err != nil {
		return 1, err
	}
	loader.EndConfiguration()
	o.takeBack(start)

	stop.inOrder()
	log := slog.New(out)
	if o.swap {
		if err := lockMemory(who, log); err != nil {
			return 1, err
		}
	}
	secure, err := setUpTLS(&o.tls, log)
	if err != nil {
		return 1, err
	}
	e, err := listen(o, log)
	if err != nil {
		return 1, err
	}
	e.tls = secure
	o.tls.addTo(&e.uri)
	defer e.remove()
	if e.monitor, err = startMonitor(o, chain, log); err != nil {
		e.abandon()
		return 1, err
	}
	if start != nil {
		if err := start.detach(); err != nil {
			e.abandon()
			return 1, err
		}
		log.Debug(fmt.Sprintf("forked into background (new pid = %d)", os.Getpid()))
	}
	if e.conn == nil {
		log.Debug("NBD URI: " + e.uri.String())
	} else {
		log.Debug("no NBD URI because service mode is " + o.serviceMode())
	}
	if o.printURI && e.conn == nil {
		if err := write(stdout, uriText(e.uri.String())); err != nil {
			e.abandon()
			return 1, fmt.Errorf("print URI: %w", err)
		}
	}
	// The command keeps the rights that the server gives up. It can connect: the
	// sockets are bound.
	err = command.start(o, e.uri, stop.stop)
	if err == nil {
		// They are the command's. What a module reads and prints must not come in between.
		err = giveUp(0, 1)
	}
	if err == nil {
		err = who.assume(e.private, log)
	}
	if err == nil {
		err = chain.AfterFork()
	}
	if err != nil {
		e.abandon()
		chain.Cleanup()
		return 1, err
	}
	var code int
	loader.OnMain(func() {
		code, err = serveClients(o, start, out, chain, e, stop)
		if code == statusStuck {
			command.finish(code)
			os.Exit(1) // as main would, but it may be what is stuck
		}
	})
	if code != statusStuck {
		chain.Cleanup()
	}
	return code, err
}

// serveClients serves until somebody asks to stop and all clients are gone.
func serveClients(o *options, start *starter, out *logHandler,
	chain *backend.Chain, e *endpoint, stop *stopper) (int, error) {
	log := slog.New(out)
	srv := server.New(server.Options{
		Chain: chain, ReadOnly: o.readonly, Threads: o.threads, MaxProcs: mostProcs(), Log: log,
		Oldstyle: o.oldstyle, NoStructuredReplies: o.noSR, NoExtendedHeaders: o.noEH, NoMetaContexts: o.noMC,
		SparseReads:      o.sparseReads,
		StrictBlockSize:  o.strictBlockSize,
		SlowRequest:      o.slow,
		Limits:           o.limits,
		HandshakeMask:    ^protocol.HandshakeFlags(o.handshakeMask), // the server is told what to hide
		HandshakeTimeout: o.timeout, DrainTimeout: o.drainTimeout,
		TLS: e.tls, TLSRequired: o.tls.mode == tlsRequire,
	})
	var lost atomic.Bool // a listener
	for _, l := range e.listeners {
		go func() {
			if err := srv.Serve(l); err != nil {
				log.Error(fmt.Sprintf("accept connections on %v: %v", l.Addr(), err))
				lost.Store(true)
				srv.Shutdown()
			}
		}()
	}
	if e.conn != nil {
		go func() {
			srv.ServeConn(e.conn)
			srv.Shutdown()
		}()
	}
	e.monitor.Attach(srv) // before anybody hears of it who may ask whether it is ready
	err := announce(o, start, out)
	stop.attach(srv)
	done := make(chan struct{})
	defer close(done)
	go o.notify.follow(srv, done)
	if err != nil {
		srv.Shutdown()
	}

	<-srv.Quit()
	log.Debug("shutting down")
	o.notify.stopping()
	loader.Quit()
	clean := srv.Wait()
	switch {
	case !clean:
		unread := time.AfterFunc(time.Second, func() { os.Exit(1) }) // where nobody reads the log
		log.Error(fmt.Sprintf("shut down: plugin %s has not returned from a call within the drain timeout of %v: "+
			"exiting without .cleanup and .unload", chain.Name(), o.drainTimeout))
		unread.Stop()
		e.remove()
		return statusStuck, nil
	case err != nil:
		e.abandon()
		return 1, err
	case lost.Load():
		return 1, nil
	}
	return 0, nil
}

// announce tells everybody who waits for it that clients are served.
func announce(o *options, start *starter, out *logHandler) (err error) {
	if o.pidfile != "" {
		if err := writePidfile(o.pidfile); err != nil {
			return err
		}
		defer func() {
			if err != nil {
				os.Remove(o.pidfile)
			}
		}()
		slog.New(out).Debug("written pidfile " + o.pidfile)
	}
	if start != nil || o.superior != nil && o.superior.Background {
		if o.log == logDefault {
			if err := out.logTo(logSyslog); err != nil {
				return err
			}
		}
		if err := giveUpStderr(o); err != nil {
			return err
		}
	}
	if start != nil {
		if err := start.ready(); err != nil {
			return err
		}
	}
	o.notify.ready()
	return nil
}

// uriText is what --print-uri writes: the URI, and how to use it in a shell.
func uriText(uri string) string {
	quoted := uri
	if strings.ContainsAny(uri, "?&'()*;") {
		quoted = `"` + uri + `"` // what a URI has that double quotes do not hide is %-encoded
	}
	return fmt.Sprintf("%s\nShell-quoted URI: %s\nCommand to query the NBD endpoint:\n  nbdinfo %s\n", uri, quoted, quoted)
}

// A stopper takes wishes for the server to stop, also while there is none yet.
type stopper struct {
	mu      sync.Mutex
	ordered bool // there is something that needs an orderly end
	asked   bool
	srv     *server.Server
}

// onSignals makes the signals that stop the server do so. Up to inOrder, while
// plugins may wait for anything in their configuration, they end the process.
func (s *stopper) onSignals() {
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, stopSignals...)
	go func() {
		for sig := range signals {
			s.ask(128 + int(sig.(unix.Signal))) // as a shell has it
		}
	}()
}

// ask stops the server, or ends the process with status up to inOrder.
func (s *stopper) ask(status int) {
	s.mu.Lock()
	ordered := s.ordered
	s.mu.Unlock()
	if !ordered {
		os.Exit(status)
	}
	s.stop()
}

func (s *stopper) inOrder() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.ordered = true
}

func (s *stopper) stop() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.asked = true
	if s.srv != nil {
		s.srv.Shutdown()
	}
}

func (s *stopper) attach(srv *server.Server) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.srv = srv
	if s.asked {
		srv.Shutdown()
	}
}

// A captive is the command of --run, which may outlive the server: its status is that of the
// process. Without --run there is nothing to start and nothing to wait for.
type captive struct {
	log *slog.Logger
	*exec.Cmd
	ended      chan struct{} // closed once ProcessState is known; nil where nothing was started
	terminated atomic.Bool   // by us
	denied     chan struct{} // closed where we may not end it, since we gave up rights
}

// start starts the command, if there is one. stop is called when it ends. Whoever sends us
// SIGTERM means the command too: it may be all that a container runs. What a terminal sends it gets
// from there.
func (c *captive) start(o *options, uri protocol.URI, stop func()) (err error) {
	if !o.captive {
		return nil
	}
	terms := make(chan os.Signal, 1)
	signal.Notify(terms, unix.SIGTERM) // before the command can send it
	if c.Cmd, err = runCommand(o.command, uri, &o.tls); err != nil {
		signal.Stop(terms)
		return err
	}
	c.ended, c.denied = make(chan struct{}), make(chan struct{})
	go func() {
		c.Wait() // what comes of it is in ProcessState
		close(c.ended)
		stop()
	}()
	go func() {
		defer signal.Stop(terms)
		for {
			select {
			case <-c.ended:
				return
			case <-terms:
			}
			c.terminated.Store(true)
			// Another error means that it has ended now.
			if errors.Is(c.Process.Signal(unix.SIGTERM), unix.EPERM) {
				close(c.denied)
				return
			}
		}
	}()
	return nil
}

// finish waits until the command has ended, and returns what status to end with where that of
// the server is code: the command's, unless only the server has failed.
func (c *captive) finish(code int) int {
	if c.ended == nil {
		return code
	}
	select {
	case <-c.ended:
	case <-c.denied:
		c.log.Error("external command goes on: the user of --user may not end it")
		return 1
	}
	if c.ProcessState == nil {
		c.log.Error("external command has ended, and a module has taken its exit status: it ignores SIGCHLD, or waits for all children")
		return 1
	}
	status, text := exitStatus(c.ProcessState)
	if text != "" && !c.terminated.Load() {
		c.log.Error("external command " + text)
	}
	if status == 0 || code == statusStuck {
		return code
	}
	return status
}
