package watch

import (
	"slices"
	"time"

	"github.com/countersign/countersign/compensating/detect"
	"github.com/countersign/countersign/compensating/finding"
	"github.com/countersign/countersign/compensating/ledger"
	"github.com/countersign/countersign/compensating/sightings"
)

// lookEvery is how often findings are held against what is known since.
const lookEvery = 10 * time.Second

// settleFindings notes which findings' causes are over. What is seen of one later
// makes it one that isn't.
func (w *Watch) settleFindings() error {
	var late []sightings.Sighting // that the ledger has now, and are to be judged by it
	for i := range w.kept.Findings {
		r := &w.kept.Findings[i]
		if r.over() {
			continue
		}
		why, err := w.over(r.Key, r.Finding)
		if err != nil {
			return err
		}
		if why == "" {
			continue
		}
		r.Over, r.OverAt, w.changed = why, r.Finding.Count, true
		w.log.Info("a finding is over", "detector", r.Finding.Detector, "lease", r.Finding.Lease, "account", r.Finding.Account, "why", why)
		if d := r.Finding.Detector; d == detect.UnmatchedLogin || d == detect.OutOfBandRead {
			late = append(late, r.Finding.Evidence...)
		}
	}
	for _, s := range late {
		found, err := w.judge.See(s)
		if err != nil {
			return err
		}
		w.add(found)
	}
	return nil
}

// over says whether evidence shows that the cause is.
func (r *record) over() bool { return r.OverAt == r.Finding.Count }

// over says how what is known now shows that a finding's cause is over; empty: it
// doesn't. That somebody used what he shouldn't have is never over by itself.
func (w *Watch) over(k finding.Key, f *finding.Finding) (string, error) {
	switch f.Detector {
	case detect.SilentSensor:
		if slices.ContainsFunc(w.sensors, func(s *sensor) bool { return k.Cause == "silent "+s.Name && s.spoke && s.last.After(f.Last) }) {
			return "the log speaks again", nil
		}
	case detect.Dormant:
		entries, err := w.index.Find(ledger.ByID, f.Lease)
		if err != nil || len(entries) == 0 || !w.judge.Uses(entries[0].Host, entries[0].Scope) {
			return "", err
		}
		return "the program uses what it gets", nil
	case detect.UnmatchedLogin, detect.OutOfBandRead:
		if f.Count > len(f.Evidence) {
			return "", nil // not all of it is at hand
		}
		for _, s := range f.Evidence {
			if explained, err := w.judge.Explains(s); err != nil || !explained {
				return "", err
			}
		}
		return "the ledger has it now", nil
	}
	return "", nil
}
