package watch

import (
	"cmp"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/countersign/countersign/compensating/detect"
	"github.com/countersign/countersign/compensating/ledger"
	"github.com/countersign/countersign/compensating/sightings"
	"github.com/countersign/countersign/compensating/tail"
)

type sensor struct {
	Sensor
	tail   *tail.Tail
	spool  *spool // of one that listens
	reader sightings.Reader
	last   time.Time // when a line came
	spoke  bool      // some came since this run began
	flush  bool      // what waits was not yet given
	failed string
	since  time.Time // it failed so
}

// held is a sighting that the ledger doesn't explain yet.
type held struct {
	Sighting sightings.Sighting `json:"sighting"`
	Since    time.Time          `json:"since"`
}

func (w *Watch) openSensor(s Sensor) error {
	r, err := sightings.New(s.Kind, s.Name, sightings.Options{LogLinePrefix: s.LogLinePrefix, Now: w.now})
	if err != nil {
		return err
	}
	kept, ok := w.kept.Sensors[s.Name]
	if ok {
		if err := r.Restore(kept.Reader); err != nil {
			return err
		}
	}
	var sent *spool
	if s.Path == "" {
		dir := filepath.Join(w.config.StateDir, "spool", s.Name)
		if s.Journal != "" {
			kept.Places = nil
			if err := os.RemoveAll(dir); err != nil { // the journal has it
				return err
			}
		}
		if sent, err = openSpool(dir); err != nil {
			return err
		}
		s.Path = sent.pattern
	}
	t, err := tail.New(s.Path, kept.Places, w.now)
	if err != nil {
		return err
	}
	for _, path := range t.Lost() {
		if sent != nil {
			break // it was read, and dropped
		}
		w.log.Warn("a log is gone with what was not yet read of it", "sensor", s.Name, "path", path)
		w.add([]detect.Detection{{Detector: detect.SilentSensor, Account: s.Name, Time: w.now(), Cause: "lost " + s.Name,
			Why: path + " was removed before it was read to its end: what it had is not known"}})
	}
	w.sensors = append(w.sensors, &sensor{Sensor: s, tail: t, spool: sent, reader: r, last: w.now(), flush: true})
	return nil
}

// covered is the time of which all logs of some kinds tell: which of them a credential
// would show in isn't known. A replay takes what any tells of, since there one file after
// the other is often of one log.
func (w *Watch) covered(of func(kind string) bool) (c detect.Coverage) {
	for _, s := range w.sensors {
		h := s.reader.Health()
		if !of(s.Kind) || h.First.IsZero() {
			continue
		}
		if c.First.IsZero() || h.First.After(c.First) {
			c.First = h.First
		}
		if c.Last.IsZero() || h.Last.Before(c.Last) {
			c.Last = h.Last
		}
	}
	return c
}

// poll reads what the logs have that is new.
func (w *Watch) poll() error {
	var failed error
	for _, s := range w.sensors {
		emit := func(seen sightings.Sighting) { failed = errors.Join(failed, w.see(seen)) }
		some, err := s.tail.Poll(func(path string, number int64, line []byte) { s.reader.Line(number, line, emit) }, s.reader.Rest)
		switch {
		case err != nil && err.Error() != s.failed:
			s.failed, s.since = err.Error(), w.now()
			w.log.Warn("a log can't be read", "sensor", s.Name, "err", err)
		case err == nil:
			s.failed = ""
		}
		if some {
			s.last, s.spoke, s.flush, w.changed = w.now(), true, true, true
		} else if s.flush && w.now().Sub(s.last) > idle {
			s.reader.Flush(emit)
			s.flush, w.changed = false, true
		}
	}
	return failed
}

// blind sees logs that say nothing for much longer than they used to, and logs that
// aren't there.
func (w *Watch) blind() {
	for _, s := range w.sensors {
		h, quiet := s.reader.Health(), w.now().Sub(s.last)
		failed, since := s.failed, s.since
		if failed == "" && s.spool != nil {
			failed, since = s.spool.failing()
		}
		why := ""
		switch {
		case h.Lines == 0 && quiet > absent:
			why = fmt.Sprintf("nothing was ever read of it: is %s right?", cmp.Or(s.Listen, s.Journal, s.Path))
		case failed != "" && w.now().Sub(since) > absent:
			why = failed
		case h.Silent(quiet):
			why = fmt.Sprintf("it says nothing since %s, and was never silent for more than %s before", s.last.UTC().Format(time.RFC3339), h.Gap.Round(time.Second))
		}
		if why != "" {
			w.add([]detect.Detection{{Detector: detect.SilentSensor, Account: s.Name, Time: s.last, Cause: "silent " + s.Name, Why: why + "; what it would show is not known"}})
		}
	}
}

// see judges a sighting, or has it wait for the ledger.
func (w *Watch) see(s sightings.Sighting) error {
	w.meter.seen(s)
	known, err := w.judge.Known(s)
	if err != nil {
		return err
	}
	if !known {
		if len(w.kept.Held) >= maxHeld {
			// The oldest is let go: had it been issued, the ledger would know by now.
			w.meter.dropped.Inc()
			w.kept.Held = w.kept.Held[1:]
		}
		w.kept.Held = append(w.kept.Held, held{s, w.now()})
		return nil
	}
	found, err := w.judge.See(s)
	w.add(found)
	if s.Kind == sightings.Attempt && len(found) == 0 {
		if len(w.kept.Attempts) >= maxAttempts {
			w.kept.Attempts = slices.Clone(w.kept.Attempts[maxAttempts/2:])
		}
		w.kept.Attempts = append(w.kept.Attempts, s)
	}
	return err
}

// touched judges the last attempts again by a trap that is new.
func (w *Watch) touched(e ledger.Entry) error {
	if e.Kind != ledger.KindCanary {
		return nil
	}
	left := w.kept.Attempts[:0]
	for _, s := range w.kept.Attempts {
		found, err := w.judge.See(s)
		if err != nil {
			return err
		}
		w.add(found)
		if len(found) == 0 {
			left = append(left, s)
		}
	}
	w.kept.Attempts = left
	return nil
}

// settled judges the sightings that the ledger has had the time to explain.
func (w *Watch) settled() error {
	n := 0
	for n < len(w.kept.Held) && w.kept.Held[n].Since.Add(settle).Before(w.synced) {
		found, err := w.judge.See(w.kept.Held[n].Sighting)
		if err != nil {
			return err
		}
		w.add(found)
		n++
	}
	if n == 0 {
		return nil
	}
	w.kept.Held, w.changed = slices.Clone(w.kept.Held[n:]), true
	found, err := w.judge.Reads()
	w.add(found)
	return err
}
