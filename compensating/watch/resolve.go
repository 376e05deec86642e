package watch

import (
	"context"
	"slices"
	"time"

	"github.com/countersign/countersign/compensating/detect"
	"github.com/countersign/countersign/compensating/finding"
	"github.com/countersign/countersign/compensating/ledger"
)

// lookEvery is how often findings are held against what is known since.
const lookEvery = 10 * time.Second

// settleFindings marks findings whose cause is resolved; a later sighting reopens them. It
// goes on where it was when its time is spent.
func (w *Watch) settleFindings(ctx context.Context) error {
	for inTime := w.spender(ctx, sliceTime); w.looking < len(w.kept.Findings); w.looking++ {
		if !inTime() {
			w.behind = true
			return nil
		}
		if err := w.settleFinding(w.kept.Findings[w.looking]); err != nil {
			return err
		}
	}
	w.looking = 0
	return nil
}

func (w *Watch) settleFinding(r *record) error {
	if r.over() {
		return nil
	}
	why, err := w.over(r.Key, r.Finding)
	if err != nil || why == "" {
		return err
	}
	r.Over, r.OverAt, w.changed = why, r.Finding.Count, true
	w.log.Info("a finding is over", "detector", r.Finding.Detector, "lease", r.Finding.Lease, "account", r.Finding.Account, "why", why)
	if d := r.Finding.Detector; d != detect.UnmatchedLogin && d != detect.OutOfBandRead {
		return nil
	}
	for _, s := range slices.Clone(r.Finding.Evidence) { // which the ledger has now
		if err := w.judged(s); err != nil {
			return err
		}
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
