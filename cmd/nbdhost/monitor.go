package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math"
	"strconv"
	"strings"

	"nbdhost/backend"
	"nbdhost/monitor"
)

// startMonitor answers at the address of --metrics, if there is one.
func startMonitor(o *options, chain *backend.Chain, log *slog.Logger) (*monitor.Monitor, error) {
	if o.metrics == nil {
		return nil, nil
	}
	removeDead(o.metrics.Socket(), log)
	l, err := monitor.Listen(*o.metrics)
	if err != nil {
		return nil, err
	}
	at := "http://" + l.Addr().String()
	if l.Addr().Network() == "unix" {
		at = "unix:" + l.Addr().String()
	}
	log.Debug("metrics and health at " + at)
	return monitor.Serve(l, monitor.Options{
		Chain: chain, Version: version, HealthRead: o.healthRead, Export: o.export, Log: log,
	}), nil
}

// healthcheck is --healthcheck.
func healthcheck(stdout io.Writer, a monitor.Address) error {
	ctx, cancel := context.WithTimeout(context.Background(), monitor.CheckTimeout)
	defer cancel()
	if err := monitor.Check(ctx, a); err != nil {
		return err
	}
	return write(stdout, "ready\n")
}

func address(field func(*options) **monitor.Address) func(*options, string) error {
	return func(o *options, v string) error {
		a, err := monitor.ParseAddress(v)
		*field(o) = &a
		return err
	}
}

// count reads a limit: a number of something, 0 for none.
func count(field func(*options) *int) func(*options, string) error {
	return func(o *options, v string) error {
		n, err := strconv.ParseUint(v, 10, 31)
		if err != nil {
			return fmt.Errorf("got %q: need a number, or 0 for no limit", v)
		}
		*field(o) = int(n)
		return nil
	}
}

// size reads a limit in bytes or bits, 0 for none.
func size(field func(*options) *int64) func(*options, string) error {
	return func(o *options, v string) (err error) {
		*field(o), err = parseSize(v)
		return err
	}
}

// parseSize reads a number with one of the suffixes that nbdkit_parse_size(3) knows for
// powers of 1024.
func parseSize(s string) (int64, error) {
	number := strings.TrimRight(s, "bBkKmMgGtTpP")
	shift, ok := map[string]int{"": 0, "B": 0, "K": 10, "M": 20, "G": 30, "T": 40, "P": 50}[strings.ToUpper(s[len(number):])]
	n, err := strconv.ParseUint(number, 10, 63)
	if !ok || err != nil || n > math.MaxInt64>>shift {
		return 0, fmt.Errorf("got %q: need a number such as 1000, 64K, 100M or 2G", s)
	}
	return int64(n) << shift, nil
}

// healthRead is the value of --health-read, which may be left out.
func healthRead(o *options, v string) (err error) {
	if v == noValue {
		o.healthRead = monitor.DefaultHealthRead
		return nil
	}
	if o.healthRead, err = parseDelay(v); err == nil && o.healthRead <= 0 {
		err = errors.New("got no time: need one for the read to take, such as 500ms")
	}
	return err
}
