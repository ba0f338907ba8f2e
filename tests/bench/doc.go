// Command bench compares nbdhost with nbdkit, with qemu-nbd where the data is a
// file, and with a floor: the least that a server can do for the same client.
//
//	make bench
//	make bench ROWS='memory/.*/4k' ROUNDS=3 SECONDS=0.3
//	make bench DOC=docs/performance.md
//
// A row is a plugin, an operation, a size, a number of requests in flight (d),
// a number of connections (c), a transport and a number of filters (f), such as
// memory/read/4k/d64/c1/unix/f0; n is for layers of nofilter. The transports tls and
// psk are TLS on a Unix socket, with certificates and with a pre-shared key, tlstcp and
// psktcp on TCP. Client and servers negotiate by themselves; a row of which the
// servers negotiate different algorithms fails.
// Rows that begin with metrics: compare nbdhost that has --metrics with itself without,
// and start both anew in each round, of which they have ten times as many.
// All servers of a row run at the same time and are measured in turn, ROUNDS times
// SECONDS each; in each round another one
// begins. A ratio is the median over the rounds of nbdhost's figure divided by
// the other server's of the same round. A round in which the host of a virtual machine took more
// than 2 % of the processors' time away (proc_stat(5), steal) is measured again after a rest of 5 s, for 10
// minutes in all. Without ROWS a selection of rows is
// measured, with ROWS those of all combinations that the expression matches;
// -list prints their names.
//
// The servers of a line are nbdhost, nbdkit, qemu-nbd, floor, and
//
//	floor+plugin  the floor that calls nbdkit's memory plugin instead of memcpy
//	nbdkit -t     nbdkit with as many threads as nbdhost in rows that end in t64
//	without       nbdhost without --metrics
//
// Operations are counted as answered over the wall time of all connections
// together. A server's processor time is read from its process's clock at the
// start and the end of the same time.
//
// What is where:
//
//	rows.go     which rows there are, and the goals
//	servers.go  starts and stops the servers
//	measure.go  one row
//	clients.go  fio, nbdcopy and qemu-img
//	steal.go    rounds that the host of a virtual machine disturbed
//	single.go   figures that are no rows: start, memory, idle connections
//	secure.go   keys and certificates for TLS
//	report.go   tables; the part of docs/performance.md between its marks
//	plot.go     plots
//	load.go     the load generator, on package client
//	floor.c     the floor
//	slow.c      a plugin whose calls take a millisecond, or some of them a while, or none
//	memory.pl   a disk in memory, for Perl
//
// The C sources are part of the program, which compiles them when it starts.
package main
