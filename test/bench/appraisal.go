package main

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
)

// rounds alternate between the request and its floor, so that both see the
// same weather on the machine. They have one processor, so that collecting the
// garbage of a request is in its time.
const rounds = 20

// appraisal measures one request from its bytes to its decision, by the
// benchmarks of the package that does it.
func appraisal(ctx context.Context, dir string) ([]Row, error) {
	say("appraisal")
	binary := filepath.Join(dir, "appraise.test")
	if out, err := exec.CommandContext(ctx, "go", "test", "-c", "-o", binary, "github.com/countersign/countersign/broker/internal/appraise").CombinedOutput(); err != nil {
		return nil, fmt.Errorf("go test -c: %w\n%s", err, out)
	}
	samples := map[string][]float64{}
	for range rounds {
		out, err := exec.CommandContext(ctx, binary, "-test.run", "^$", "-test.bench", "^Benchmark(Appraise|Floor)$", "-test.benchtime", "150ms", "-test.cpu", "1").CombinedOutput()
		if err != nil {
			return nil, fmt.Errorf("benchmark: %w\n%s", err, out)
		}
		if err := collect(samples, out); err != nil {
			return nil, err
		}
	}
	whole, floor := samples["BenchmarkAppraise"], samples["BenchmarkFloor"]
	if len(whole) == 0 || len(floor) == 0 {
		return nil, errors.New("the benchmarks printed no times")
	}
	return []Row{fastest(Row{Name: "appraise one request: ECC quote, program evidence, decision", Unit: "µs"}, whole,
		"one ECDSA P-256 verification; SHA-256 of the statement, the PCRs, the request, the TLS key and the binding", floor, 2)}, nil
}

// collect reads what a benchmark prints, in µs.
func collect(samples map[string][]float64, out []byte) error {
	for lines := bufio.NewScanner(bytes.NewReader(out)); lines.Scan(); {
		fields := strings.Fields(lines.Text())
		if len(fields) < 4 || fields[3] != "ns/op" {
			continue
		}
		ns, err := strconv.ParseFloat(fields[2], 64)
		if err != nil {
			return err
		}
		name, _, _ := strings.Cut(fields[0], "-")
		samples[name] = append(samples[name], ns/1000)
	}
	return nil
}
