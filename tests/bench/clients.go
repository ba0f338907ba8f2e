package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os/exec"
	"time"
)

// sampleClient measures a server with fio, nbdcopy or qemu-img. A copy counts as
// one operation for each MiB.
func (b *bench) sampleClient(ctx context.Context, s *server, r row) (x sample, err error) {
	var args []string
	switch r.client {
	case "fio":
		args = []string{"--name=bench", "--ioengine=nbd", "--uri=" + s.uri(), "--rw=rand" + r.op,
			fmt.Sprintf("--bs=%d", r.size), fmt.Sprintf("--iodepth=%d", r.depth), fmt.Sprintf("--size=%d", b.copySize),
			"--time_based", fmt.Sprintf("--runtime=%dms", int(b.seconds*1000)), "--output-format=json"}
	case "nbdcopy":
		args = []string{fmt.Sprintf("--request-size=%d", r.size), fmt.Sprintf("--requests=%d", r.depth),
			fmt.Sprintf("--connections=%d", r.conns)}
		if r.op == "write" {
			args = append(args, b.path("data"), s.uri())
		} else {
			args = append(args, s.uri(), "null:")
		}
	case "qemu-img":
		args = []string{"convert", "-n", "-W", "-m", fmt.Sprint(r.depth), "-f", "raw"}
		if r.op == "write" {
			args = append(args, "-O", "raw", b.path("data"), s.uri())
		} else {
			args = append(args, "--target-image-opts", s.uri(), fmt.Sprintf("driver=null-co,size=%d", b.copySize))
		}
	}
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	cmd := exec.CommandContext(ctx, r.client, args...)
	cmd.Dir = b.dir
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	before, err := s.cpu()
	if err != nil {
		return x, err
	}
	began := time.Now()
	if err := cmd.Run(); err != nil {
		return x, fmt.Errorf("%s: %w: %s", r.client, err, lastLine(stderr.String()))
	}
	wall := time.Since(began)
	after, err := s.cpu()
	if err != nil {
		return x, err
	}
	var n float64
	if r.client == "fio" {
		if n, err = readFio(&x, stdout.Bytes(), r.op); err != nil {
			return x, err
		}
	} else {
		n = float64(b.copySize) / mib
		x.ops = n / wall.Seconds()
	}
	x.cpu = float64(after-before) / n
	x.client = float64(cmd.ProcessState.UserTime()+cmd.ProcessState.SystemTime()) / n
	return x, nil
}

// readFio takes fio's figures, and returns the number of operations.
func readFio(x *sample, out []byte, op string) (float64, error) {
	type direction struct {
		IOPS  float64 `json:"iops"`
		Total float64 `json:"total_ios"`
		Clat  struct {
			Percentile map[string]float64 `json:"percentile"`
		} `json:"clat_ns"`
	}
	var v struct {
		Jobs []map[string]json.RawMessage `json:"jobs"`
	}
	// fio may print warnings before.
	if i := bytes.IndexByte(out, '{'); i > 0 {
		out = out[i:]
	}
	if err := json.Unmarshal(out, &v); err != nil {
		return 0, fmt.Errorf("read what fio printed: %w", err)
	}
	var d direction
	if len(v.Jobs) == 1 {
		if err := json.Unmarshal(v.Jobs[0][op], &d); err != nil {
			return 0, fmt.Errorf("read what fio printed: %w", err)
		}
	}
	if d.Total == 0 {
		return 0, fmt.Errorf("read what fio printed: got no operations")
	}
	x.ops, x.p50, x.p99 = d.IOPS, d.Clat.Percentile["50.000000"], d.Clat.Percentile["99.000000"]
	return d.Total, nil
}
