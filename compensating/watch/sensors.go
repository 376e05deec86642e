package watch

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/countersign/countersign/compensating/detect"
	"github.com/countersign/countersign/compensating/sightings"
	"github.com/countersign/countersign/compensating/tail"
)

type sensor struct {
	Sensor
	tail   *tail.Tail
	spool  *spool // of one that listens
	queue  *queue
	reader sightings.Reader
	last   time.Time // when a line came
	spoke  bool      // some came since this run began
	flush  bool      // what waits was not yet given
	failed string
	since  time.Time // it failed so
	full   time.Time // since when its queue is; zero: it isn't
	turned int       // how often its senders were turned away, as far as that was found
}

func (w *Watch) openSensor(s Sensor) error {
	r, err := sightings.New(s.Kind, s.Name, sightings.Options{LogLinePrefix: s.LogLinePrefix, Now: w.now})
	if err != nil {
		return err
	}
	kept := w.kept.sensor(s.Name)
	if kept.reader != nil {
		text, err := joinObject(kept.reader, kept.large)
		if err == nil {
			err = r.Restore(text)
		}
		if err != nil {
			return err
		}
	}
	var sent *spool
	if s.Path == "" {
		dir := filepath.Join(w.config.StateDir, "spool", s.Name)
		if s.Journal != "" {
			kept.places = nil
			if err := os.RemoveAll(dir); err != nil { // the journal has it
				return err
			}
		}
		if sent, err = openSpool(dir); err != nil {
			return err
		}
		s.Path = sent.pattern
	}
	t, err := tail.New(s.Path, kept.places, w.now)
	if err != nil {
		return err
	}
	if sent != nil {
		_ = t.Lost() // it was read, and dropped
	}
	w.sensors = append(w.sensors, &sensor{Sensor: s, tail: t, spool: sent, queue: w.queue(s.Name), reader: r, last: w.now(), flush: true})
	w.lost(w.sensors[len(w.sensors)-1])
	return nil
}

// lost finds what of a log can't be read any more.
func (w *Watch) lost(s *sensor) {
	for _, path := range s.tail.Lost() {
		w.meter.dropped.Inc()
		w.log.Warn("a log is gone with what was not yet read of it", "sensor", s.Name, "path", path)
		w.add([]detect.Detection{{Detector: detect.SilentSensor, Account: s.Name, Time: w.now(), Cause: "lost " + s.Name,
			Why: path + " was removed or truncated before it was read to its end: what it had is not known"}})
	}
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

// poll reads a piece of what the logs have that is new.
func (w *Watch) poll(ctx context.Context) error {
	var failed error
	w.behind = false
	for _, s := range w.sensors {
		var since time.Time
		emit := func(seen sightings.Sighting) { failed = errors.Join(failed, w.see(s.queue, seen, since)) }
		left, inTime := sliceBytes, w.spender(ctx, sliceTime)
		room := func() bool { return s.queue.bytes < w.room }

		some, more, err := s.tail.Poll(func() bool { return failed == nil && left > 0 && room() && inTime() },
			func(l tail.Line) {
				since = l.Since
				left -= len(l.Text) + 1
				s.reader.Line(l.Number, l.Text, emit)
			},
			func(part []byte) {
				left -= len(part)
				s.reader.Rest(part)
			})
		w.lost(s)

		switch {
		case err != nil && err.Error() != s.failed:
			s.failed, s.since = err.Error(), w.now()
			w.log.Warn("a log can't be read", "sensor", s.Name, "err", err)
		case err == nil:
			s.failed = ""
		}
		if some {
			s.last, s.spoke, s.flush, w.changed = w.now(), true, true, true
		} else if !more && s.flush && w.now().Sub(s.last) > idle {
			since = w.now()
			s.reader.Flush(emit)
			s.flush, w.changed = false, true
		}
		switch {
		case room():
			s.full, w.behind = time.Time{}, w.behind || more
		case s.full.IsZero():
			s.full = w.now()
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
		why, from := "", s.last
		switch {
		case !s.full.IsZero() && w.now().Sub(s.full) > blocked:
			why, from = "too much of it waits for the broker, who is away or behind: it isn't read on until he isn't", s.full
		case h.Lines == 0 && quiet > absent:
			why = fmt.Sprintf("nothing was ever read of it: is %s right?", cmp.Or(s.Listen, s.Journal, s.Path))
		case failed != "" && w.now().Sub(since) > absent:
			why = failed
		case h.Silent(quiet):
			why = fmt.Sprintf("it says nothing since %s, and was never silent for more than %s before", s.last.UTC().Format(time.RFC3339), h.Gap.Round(time.Second))
		}
		if why != "" {
			w.add([]detect.Detection{{Detector: detect.SilentSensor, Account: s.Name, Time: from, Cause: "silent " + s.Name, Why: why + "; what it would show is not known"}})
		}
		if s.spool == nil {
			continue
		}
		if n, last := s.spool.turnedAway(); n != s.turned {
			w.meter.dropped.Add(float64(n - s.turned))
			s.turned = n
			w.add([]detect.Detection{{Detector: detect.SilentSensor, Account: s.Name, Time: w.now(), Cause: "turned away " + s.Name,
				Why: "a sender was turned away (" + last + "): unless he sends it again, what he had is not known"}})
		}
	}
}

// see judges a sighting, or has it wait for the ledger: it had been written by since.
// What the ledger knew nothing of when it was ahead of that, it never will explain.
func (w *Watch) see(q *queue, s sightings.Sighting, since time.Time) error {
	w.meter.seen(s)
	if !w.ahead(since) {
		known, err := w.judge.Known(s)
		if err != nil {
			return err
		}
		if !known {
			q.add(held{s, since})
			return nil
		}
	}
	return w.judged(s)
}

// ahead reports whether the ledger has had the time to hear of what was issued by t.
func (w *Watch) ahead(t time.Time) bool { return t.Add(settle).Before(w.synced) }

func (w *Watch) judged(s sightings.Sighting) error {
	found, err := w.judge.See(s)
	w.add(found)
	return err
}

// settled judges the sightings that the ledger has had the time to explain.
func (w *Watch) settled(ctx context.Context) error {
	for _, q := range w.queues {
		n, inTime := 0, w.spender(ctx, sliceTime)
		waits := func() bool { return n < len(q.list) && w.ahead(q.list[n].Since) }
		for ; waits() && inTime(); n++ {
			if err := w.judged(q.list[n].Sighting); err != nil {
				return err
			}
		}
		w.changed, w.behind = w.changed || n > 0, w.behind || waits()
		q.drop(n)
	}
	for _, s := range w.sensors { // there is room again
		w.behind = w.behind || !s.full.IsZero() && s.queue.bytes < w.room
	}
	return nil
}
