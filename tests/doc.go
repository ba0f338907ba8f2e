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
//	tls_test.go         TLS: real clients, bad files and bad clients, rotation; pki makes certificates
//	arrows_test.go      which package may import which
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
