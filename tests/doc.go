// Package tests runs nbdhost end to end: the built program, unmodified plugins,
// real clients, and C plugins made for what no real plugin does on demand.
// There is nothing in it to import.
//
// What is where:
//
//	main_test.go        builds the program under test, checks for the tools
//	harness_test.go     starts and stops servers; compare runs nbdkit and nbdhost side by side
//	image_test.go       the images: ext4, qcow2, a file with holes
//	real_test.go        nbdcopy, nbdinfo, qemu-img, qemu-io, fio and nbdsh on Debian's plugins
//	libnbd_test.go      libnbd.so.0 itself, its asynchronous calls and their completions
//	fixture_test.go     compiles fixtures/*.c, reads the journal that they write, holds their gates
//	lifecycle_test.go   order and pairing of callbacks, thread models, API version 1
//	slow_test.go        a slow request beside fast ones
//	disconnect_test.go  nbdkit_disconnect, nbdkit_shutdown, signals
//	error_test.go       error numbers and texts
//	raw_test.go         a client that sends any bytes, and reads what comes back
//	wire_test.go        bad input from the network
//	sparse_test.go      reads that are answered with holes, and extents that are not right
//	tls_test.go         TLS: real clients, bad files and bad clients, rotation; pki makes certificates
//	arrows_test.go      which package may import which; every file is in this list
//	race_on_test.go, race_off_test.go, asan_on_test.go, asan_off_test.go
//	                    whether the tests are under the race detector or the address sanitizer
//
// The command, as a drop-in for nbdkit:
//
//	cli_test.go         runs command lines, under the name nbdkit
//	cli_callers_test.go what importers, virt-v2v, CSI drivers, inetd and service managers do
//	cli_differential_test.go
//	                    a table of command lines, right and wrong, that nbdkit runs too
//	cli_terminal_test.go
//	                    colours, passwords, the system log, signals
//
// Plugins, filters and clients of three releases of nbdkit (trees.sh makes the
// directory trees of the others):
//
//	compat_test.go      the releases, and the tables of docs/compatibility.md
//	compat_functions_test.go
//	                    each function that plugins may call
//	compat_languages_test.go
//	                    plugins in each language
//	compat_plugins_test.go
//	                    each plugin that Debian ships
//	compat_services_test.go
//	                    what those plugins need (appliance.sh makes guestfs's virtual machine)
//	compat_sessions_test.go
//	                    whole sessions of real clients
//	filters_test.go     each filter that Debian ships
//	filters_differential_test.go
//	                    random chains of them
//	filters_trace_test.go
//	                    what each layer sees of a request, in chains of one and of several releases
//	hazard_test.go      plugins that do what a Go program may not like
//	kernel_test.go      the Linux kernel's client, in a virtual machine (kernel.sh unpacks it)
//
// Operations:
//
//	supervise_test.go   plugins that crash, with and without --supervise
//	notify_test.go      what a service manager is told (sd_notify)
//	log_test.go         the log as JSON, and slow requests
//	secrets_test.go     passwords, tokens and keys that nothing may show
//	drain_test.go       a stop as Kubernetes has it
//
// The protocol, what is promised, and what it costs:
//
//	protocol_clients_test.go
//	                    extended headers with libnbd, qemu and package client
//	protocol_differential_test.go
//	                    random conversations, the same with nbdkit and with nbdhost
//	protocol_doc_test.go
//	                    docs/protocol.md names tests that exist, and all of the protocol
//	aio_test.go         package client beside libnbd: flushes and what is durable
//	check_test.go       --check finds each promise that a plugin breaks
//	check_plugins_test.go
//	                    --check on what Debian ships, and docs/check.md
//	monitor_test.go     metrics, health and limits, with real clients and promtool
//	perf_test.go        system calls, calls into plugins and allocations of a request
//
// A test that compares starts /usr/bin/nbdkit and the program under test with
// the same arguments, does the same to both and wants the same result. A
// client's output is the result, with the bytes that it read, and the files
// that the plugin wrote.
//
// The program under test is built by TestMain, under the race detector or the
// address sanitizer if the tests are. NBDHOST_UNDER_TEST names another program
// instead: with nbdkit there, the tests test themselves.
//
// Nothing here waits for a time to pass. A server is ready when its pidfile
// exists, a callback is reached when the fixture's journal says so, and a call
// in a plugin lasts until the test opens the fixture's gate. Deadlines only end
// a test that hangs.
package tests
