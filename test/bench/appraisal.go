package main

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"os/exec"
	"strconv"
	"strings"
)

// appraisal measures one request from its bytes to its decision, by the
// benchmarks of the package that does it.
func appraisal(ctx context.Context, _ string) ([]Row, error) {
	say("appraisal")
	cmd := exec.CommandContext(ctx, "go", "test", "-run", "^$", "-bench", "^Benchmark(Appraise|Floor)$", "-benchtime", "500ms", "-count", "6",
		"github.com/countersign/countersign/broker/internal/appraise")
	out, err := cmd.CombinedOutput()
	if err != nil {
		return nil, fmt.Errorf("%s: %w\n%s", strings.Join(cmd.Args, " "), err, out)
	}
	samples := map[string][]float64{}
	for lines := bufio.NewScanner(bytes.NewReader(out)); lines.Scan(); {
		fields := strings.Fields(lines.Text())
		if len(fields) < 4 || fields[3] != "ns/op" {
			continue
		}
		ns, err := strconv.ParseFloat(fields[2], 64)
		if err != nil {
			return nil, err
		}
		name, _, _ := strings.Cut(fields[0], "-")
		samples[name] = append(samples[name], ns/1000)
	}
	whole, floor := samples["BenchmarkAppraise"], samples["BenchmarkFloor"]
	if len(whole) == 0 || len(floor) == 0 {
		return nil, fmt.Errorf("no benchmarks in:\n%s", out)
	}
	return []Row{fastest(Row{Name: "appraise one request: ECC quote, program evidence, decision", Unit: "µs"}, whole,
		"one ECDSA P-256 verification; SHA-256 of the statement, the PCRs, the request, the TLS key and the binding", floor, 2)}, nil
}
