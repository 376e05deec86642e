package main

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
)

// rounds alternate between the request and its floor, so that both see the
// same weather on the machine. They have one processor, so that collecting the
// garbage of a request is in its time.
const rounds = 20

// A measured benchmark is one of a package's, and the floor beside it.
type measured struct {
	pkg         string // its folder
	name, floor string // of the Benchmark functions
	row         Row
	floorIs     string
	limit       float64 // times the floor
	per         float64 // operations in a run, of which the row tells one
}

// appraisal measures what is done from the bytes of a request to its decision,
// by the benchmarks of the packages that do it.
func appraisal(ctx context.Context, dir string) (rows []Row, err error) {
	say("appraisal")
	return benchmarks(ctx, dir, []measured{
		{"broker/internal/verify/appraise", "Appraise", "Floor", Row{Name: "appraise one request: ECC quote, program evidence, decision", Unit: "µs"},
			"one ECDSA P-256 verification; SHA-256 of the statement, the PCRs, the request, the TLS key and the binding", 2, 1},
		{"attestors/boot/appraise", "Appraise", "Floor", Row{Name: "appraise an event log of 160 events (aim: ≤ 500 µs)", Unit: "µs"}, bare, 30, 1},
		{"attestors/boot/appraise", "Largest", "Replay", Row{Name: "appraise the largest log of a real machine (aim: ≤ 2 times its replay)", Unit: "µs"},
			"parse and replay the same log", 2, 1},
		{"attestors/boot/appraise", "Kernels", "KernelsReplay", Row{Name: "appraise a log of 1 MB that names 9,000 kernels", Unit: "µs"}, "parse and replay the same log", 6, 1},
		{"attestors/ima/appraise", "Appraise", "Floor", Row{Name: "appraise an IMA list, for each of its entries (aim: ≤ 15 µs)", Unit: "µs"}, bare, 30, 1000},
		{"broker/internal/verify/appraise", "Delta", "DeltaFloor", Row{Name: "1,000 IMA entries on top of 100,000 (aim: ≤ 10,000 µs)", Unit: "µs"}, bare, 60, 1},
		{"broker/internal/verify/appraise", "LongList", "LongListFloor", Row{Name: "100,000 IMA entries at once (aim: ≤ 1,500,000 µs)", Unit: "µs"}, bare, 80, 1},
	})
}

const bare = "SHA-256 of the same bytes"

// benchmarks runs benchmarks of packages, each beside its floor.
func benchmarks(ctx context.Context, dir string, list []measured) (rows []Row, err error) {
	binaries := map[string]string{}
	for _, m := range list {
		if binaries[m.pkg] == "" {
			binaries[m.pkg] = filepath.Join(dir, strings.ReplaceAll(m.pkg, "/", "-")+".test")
			if out, err := exec.CommandContext(ctx, "go", "test", "-c", "-o", binaries[m.pkg], "./"+m.pkg).CombinedOutput(); err != nil {
				return nil, fmt.Errorf("go test -c: %w\n%s", err, out)
			}
		}
		row, memory, err := m.run(ctx, binaries[m.pkg])
		if err != nil {
			return nil, err
		}
		rows = append(rows, row)
		if len(memory) > 0 {
			rows = append(rows, Row{Name: "what is kept of them", Value: slices.Max(memory), Unit: "MiB", Raw: memory}.within(64))
		}
	}
	return rows, nil
}

// run gives the row, and what the benchmark says that it keeps.
func (m measured) run(ctx context.Context, binary string) (Row, []float64, error) {
	samples := map[string][]float64{}
	for range rounds {
		cmd := exec.CommandContext(ctx, binary, "-test.run", "^$", "-test.bench", fmt.Sprintf("^Benchmark(%s|%s)$", m.name, m.floor), "-test.benchtime", "100ms", "-test.cpu", "1")
		cmd.Dir = m.pkg // where its test vectors are
		out, err := cmd.CombinedOutput()
		if err != nil {
			return Row{}, nil, fmt.Errorf("benchmark: %w\n%s", err, out)
		}
		if err := collect(samples, out); err != nil {
			return Row{}, nil, err
		}
	}
	whole, floor := samples["Benchmark"+m.name], samples["Benchmark"+m.floor]
	if len(whole) == 0 || len(floor) == 0 {
		return Row{}, nil, errors.New("the benchmarks printed no times")
	}
	for i := range whole {
		whole[i] /= m.per
	}
	for i := range floor {
		floor[i] /= m.per
	}
	return fastest(m.row, whole, m.floorIs, floor, m.limit), samples["MiB-kept"], nil
}

// collect reads what a benchmark prints, in µs, and what it keeps.
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
		for i := 4; i+1 < len(fields); i++ {
			if fields[i+1] == "MiB-kept" {
				kept, err := strconv.ParseFloat(fields[i], 64)
				if err != nil {
					return err
				}
				samples["MiB-kept"] = append(samples["MiB-kept"], kept)
			}
		}
	}
	return nil
}
