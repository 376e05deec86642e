package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"text/tabwriter"
)

// floor is what precision and recall of every detector must reach.
const floor = 0.99

const program = "bin/countersign"

// A finding is what of one is scored.
type finding struct {
	Detector string `json:"detector"`
	Lease    string `json:"lease"`
	Host     string `json:"host"`
	Account  string `json:"account"`
	Why      string `json:"why"`
}

func (f finding) names() []string { return []string{f.Lease, f.Account, f.Host} }

// replay runs the watch over the logs.
func replay(ctx context.Context, ledger string, sources []source) ([]finding, error) {
	args := []string{"watch", "replay", "--ledger", ledger, "-o", "json"}
	for _, s := range sources {
		args = append(args, "--source", s.kind+"="+s.file)
	}
	cmd := exec.CommandContext(ctx, program, args...)
	cmd.Stderr = os.Stderr
	out, err := cmd.Output()
	if err != nil {
		return nil, fmt.Errorf("%s: %w", program, err)
	}
	var found []finding
	d := json.NewDecoder(bytes.NewReader(out))
	for {
		var f finding
		if err := d.Decode(&f); err == io.EOF {
			return found, nil
		} else if err != nil {
			return nil, fmt.Errorf("finding %d: %w", len(found)+1, err)
		}
		found = append(found, f)
	}
}

// A tally is one detector's score.
type tally struct {
	guilty, found int
	missed, false []string
}

func (t *tally) recall() float64    { return share(t.found, t.guilty) }
func (t *tally) precision() float64 { return share(t.found, t.found+len(t.false)) }

// share of nothing is all of it.
func share(part, whole int) float64 {
	if whole == 0 {
		return 1
	}
	return float64(part) / float64(whole)
}

// score holds findings against labels. A finding belongs to the story that owns
// the lease that it names, or else the account, or else the host. It is right if
// the story wants its detector, it names one of the targets, and it is the first
// to do so: a second finding of one cause is a false one.
func score(labels []label, found []finding) map[string]*tally {
	owner := map[string]*label{}
	tallies := map[string]*tally{}
	of := func(detector string) *tally {
		if tallies[detector] == nil {
			tallies[detector] = &tally{}
		}
		return tallies[detector]
	}
	for i := range labels {
		for _, name := range labels[i].Owns {
			owner[name] = &labels[i]
		}
		for _, d := range labels[i].Wants {
			of(d).guilty++
		}
	}
	type cause struct {
		story    *label
		detector string
	}
	seen := map[cause]bool{}
	for _, f := range found {
		f.Account = sensorName(f)
		story, name := &label{Story: "no story"}, f.Lease
		for _, n := range f.names() {
			if n != "" && owner[n] != nil {
				story, name = owner[n], n
				break
			}
		}
		c := cause{story, f.Detector}
		right := slices.Contains(story.Wants, f.Detector) && slices.ContainsFunc(f.names(), func(n string) bool { return n != "" && slices.Contains(story.Targets, n) })
		t := of(f.Detector)
		switch {
		case right && !seen[c]:
			seen[c] = true
			t.found++
		case right:
			t.false = append(t.false, fmt.Sprintf("%s: %s again: %s", story.Story, name, f.Why))
		case !slices.Contains(story.Also, f.Detector):
			t.false = append(t.false, fmt.Sprintf("%s: lease %q account %q: %s", story.Story, f.Lease, f.Account, f.Why))
		}
	}
	for i := range labels {
		for _, d := range labels[i].Wants {
			if !seen[cause{&labels[i], d}] {
				of(d).missed = append(of(d).missed, fmt.Sprintf("%s: %q", labels[i].Story, labels[i].Targets))
			}
		}
	}
	return tallies
}

// sensorName is a finding's account; of a sensor that is the name of its file, in
// whatever folder.
func sensorName(f finding) string {
	if f.Detector == "silent-sensor" {
		return filepath.Base(f.Account)
	}
	return f.Account
}

// report prints the table, then what was missed and made up, and says whether all
// reached the floor.
func report(out io.Writer, tallies map[string]*tally) bool {
	names := make([]string, 0, len(tallies))
	for d := range tallies {
		names = append(names, d)
	}
	slices.Sort(names)
	table := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	fmt.Fprintln(table, "DETECTOR\tGUILTY\tFOUND\tMISSED\tFALSE\tPRECISION\tRECALL")
	ok := true
	for _, d := range names {
		t := tallies[d]
		ok = ok && t.precision() >= floor && t.recall() >= floor
		fmt.Fprintf(table, "%s\t%d\t%d\t%d\t%d\t%.3f\t%.3f\n", d, t.guilty, t.found, len(t.missed), len(t.false), t.precision(), t.recall())
	}
	_ = table.Flush()
	for _, d := range names {
		for _, m := range tallies[d].missed {
			fmt.Fprintf(out, "missed %s: %s\n", d, m)
		}
		for _, m := range tallies[d].false {
			fmt.Fprintf(out, "false %s: %s\n", d, m)
		}
	}
	return ok
}
