// Command bench measures speed and size, prints a table and writes bench.json.
//
// What fails is a ratio to a floor that is measured in the same run on the same
// machine, a count, or a size. Times and rates by themselves are reported: they
// say as much of the machine as of us. The load comes from the same machine as
// the broker and takes its share of it.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"text/tabwriter"
	"time"
)

// A Row is one measurement.
type Row struct {
	Name  string    `json:"name"`
	Value float64   `json:"value"`
	Unit  string    `json:"unit"`
	Raw   []float64 `json:"raw,omitempty"` // what Value was made of

	// A floor is what no implementation can do without, in the unit of Value.
	Floor      string    `json:"floor,omitempty"` // its operations
	FloorValue float64   `json:"floor_value,omitempty"`
	FloorRaw   []float64 `json:"floor_raw,omitempty"`
	Ratio      float64   `json:"ratio,omitempty"`

	// Limit bounds the ratio where there is a floor, else the value. Pass is
	// absent where the number is only reported.
	Limit string `json:"limit,omitempty"`
	Pass  *bool  `json:"pass,omitempty"`
	Note  string `json:"note,omitempty"`
}

// within is r with value at most limit, or failed.
func (r Row) within(limit float64) Row {
	pass := r.Value <= limit
	r.Limit, r.Pass = fmt.Sprintf("≤ %g %s", limit, r.Unit), &pass
	return r
}

// fastest holds the fastest of many runs against the fastest of its floor's:
// whatever else the machine does only adds to either. It fails beyond limit
// times the floor.
func fastest(r Row, runs []float64, floor string, floorRuns []float64, limit float64) Row {
	r.Value, r.Raw = slices.Min(runs), runs
	r.Floor, r.FloorValue, r.FloorRaw = floor, slices.Min(floorRuns), floorRuns
	r.Ratio = r.Value / r.FloorValue
	return r.atMost(limit, "floor")
}

// atMost is r with its ratio at most limit times what, or failed.
func (r Row) atMost(limit float64, what string) Row {
	pass := r.Ratio <= limit
	r.Limit, r.Pass = fmt.Sprintf("≤ %g × %s", limit, what), &pass
	return r
}

// aim says what the design aims at, without failing.
func (r Row) aim(text string) Row {
	r.Limit = "aim: " + text
	return r
}

// A Report is bench.json.
type Report struct {
	Time   time.Time `json:"time"`
	Go     string    `json:"go"`
	System string    `json:"system"`
	CPUs   int       `json:"cpus"`
	Rows   []Row     `json:"rows"`
}

func main() {
	only := flag.String("only", "", "measure one part: "+strings.Join(names(), ", "))
	flag.StringVar(&against.program, "against", "", "another build of the broker, to compare processor time with")
	flag.Float64Var(&against.most, "most", 1.05, "how much of the other build's processor time this one may use")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, *only); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

// against is the other build of the broker that the command line names; without a program: none.
var against struct {
	program string
	most    float64
}

var parts = []struct {
	name    string
	measure func(context.Context, string) ([]Row, error)
}{
	{"appraisal", appraisal}, {"watching", watching}, {"alerting", alerting},
	{"brokers", brokers}, {"certificates", certificates}, {"agents", agents},
}

func names() (list []string) {
	for _, p := range parts {
		list = append(list, p.name)
	}
	return list
}

func run(ctx context.Context, only string) error {
	if only != "" && !slices.Contains(names(), only) {
		return fmt.Errorf("no part is named %s", only)
	}
	report := Report{Time: time.Now().UTC().Truncate(time.Second), Go: runtime.Version(), System: runtime.GOOS + "/" + runtime.GOARCH, CPUs: runtime.NumCPU()}
	// Not /tmp, which may be in memory: what is measured waits for a disk.
	dir, err := os.MkdirTemp("/var/tmp", "countersign-bench-")
	if err != nil {
		return err
	}
	defer func() { _ = os.RemoveAll(dir) }()
	for _, p := range parts {
		if only != "" && p.name != only {
			continue
		}
		rows, err := p.measure(ctx, dir)
		if err != nil {
			return err
		}
		report.Rows = append(report.Rows, rows...)
	}
	text, err := json.MarshalIndent(report, "", "  ")
	if err != nil {
		return err
	}
	if err := os.WriteFile("bench.json", append(text, '\n'), 0o644); err != nil {
		return err
	}
	if failed := table(os.Stdout, report.Rows); failed > 0 {
		return fmt.Errorf("%d limits don't hold", failed)
	}
	return nil
}

// table prints the rows and counts those that failed.
func table(out io.Writer, rows []Row) (failed int) {
	t := tabwriter.NewWriter(out, 0, 4, 2, ' ', 0)
	fmt.Fprintln(t, "WHAT\tVALUE\tFLOOR\tRATIO\tLIMIT\t")
	for _, r := range rows {
		floor, ratio, verdict := "", "", ""
		if r.Floor != "" {
			floor, ratio = fmt.Sprintf("%.4g %s", r.FloorValue, r.Unit), fmt.Sprintf("%.2f", r.Ratio)
		}
		if r.Pass != nil {
			verdict = "ok"
			if !*r.Pass {
				verdict = "FAILED"
				failed++
			}
		}
		fmt.Fprintf(t, "%s\t%.4g %s\t%s\t%s\t%s\t%s\n", r.Name, r.Value, r.Unit, floor, ratio, r.Limit, verdict)
	}
	_ = t.Flush()
	return failed
}

// say tells who waits what is being measured.
func say(what string) { fmt.Fprintln(os.Stderr, "bench:", what) }

// pause waits, unless ctx ends.
func pause(ctx context.Context, d time.Duration) error {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return errors.New("interrupted")
	case <-timer.C:
		return nil
	}
}
