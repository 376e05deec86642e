// Package watch is `countersign watch serve`: it follows the logs of those who see
// credentials used and the broker's own audit log, judges each sighting, tells the
// broker what it found, and responds as the operator chose.
//
// One loop owns everything. What it knows (how far each log was read, what of it
// waits, what was found) is written as one file, whole, before anybody is told: a
// watch that is killed anywhere goes on from there, has missed no line and counts
// none twice, and tells again what it may not have told.
//
// Trust: the broker, whose responder it is. Logs are hostile (package sightings).
// What a sighting doesn't match waits until the ledger has caught up with it; while
// the broker is away nothing is judged unmatched.
package watch

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"github.com/countersign/countersign/broker/wire/durable"
	"github.com/countersign/countersign/compensating/detect"
	"github.com/countersign/countersign/compensating/finding"
	"github.com/countersign/countersign/compensating/ledger"
	"github.com/countersign/countersign/compensating/sightings"
	"github.com/countersign/countersign/compensating/tail"
)

const (
	pollEvery = 250 * time.Millisecond
	saveEvery = time.Second
	// idle is how long after its last line a log's reader gives what waited for more.
	idle = 2 * time.Second
	// settle is how long the ledger has to be ahead of a sighting before it is judged
	// unmatched.
	settle = 3 * time.Second
	// keep is how long a finding that nothing adds to is remembered here; the broker
	// keeps it.
	keep = 30 * 24 * time.Hour
	// absent is how long a log may be missing.
	absent = 10 * time.Minute
	// maxHeld bounds the sightings that wait for the ledger.
	maxHeld = 1 << 16
	// maxAttempts bounds the failed logins that are remembered for a trap that the
	// ledger hears of after it was touched.
	maxAttempts = 1024
)

// A Watch is the service. Run uses it; it is not safe for concurrent use.
type Watch struct {
	config *Config
	dial   Dial
	log    *slog.Logger
	now    func() time.Time
	meter  *meter

	file    *os.File // the ledger
	size    int64
	lock    *os.File
	index   *ledger.Index
	judge   *detect.Judge
	sensors []*sensor
	book    finding.Book
	traps   map[string]ledger.Entry
	kept    state
	synced  time.Time // the ledger is no older
	changed bool
	fresh   bool // there is a finding that wasn't there at the last round
}

// state is the file that is written whole.
type state struct {
	Audit    int64                  `json:"audit"` // the next of the broker's records
	Epoch    uint64                 `json:"epoch"` // of the log that they are in
	Sensors  map[string]sensorState `json:"sensors"`
	Judge    detect.State           `json:"judge"`
	Held     []held                 `json:"held,omitempty"`
	Attempts []sightings.Sighting   `json:"attempts,omitempty"` // the last ones: of traps, it may be, that are heard of late
	Findings []record               `json:"findings,omitempty"`
	Brake    brake                  `json:"brake,omitzero"`
}

type sensorState struct {
	Places []tail.Place    `json:"places"`
	Reader json.RawMessage `json:"reader"`
}

// A record is a finding, and what became of it.
type record struct {
	Key     finding.Key      `json:"key"`
	Finding *finding.Finding `json:"finding"`
	Told    int              `json:"told"`              // the count that the broker was told
	Action  detect.Response  `json:"action,omitempty"`  // what was done
	Held    string           `json:"held,omitempty"`    // why not more
	Waits   bool             `json:"waits,omitempty"`   // it is tried again, or waits for the brake
	Notices []string         `json:"notices,omitempty"` // receivers that were told
	Over    string           `json:"over,omitempty"`    // how evidence shows that the cause is over
	OverAt  int              `json:"over_at,omitempty"` // of what was seen up to this count
	Closed  int              `json:"closed,omitempty"`  // the count up to which the broker was told so
}

// Open takes up the state in the config's folder.
func Open(c *Config, dial Dial, log *slog.Logger, now func() time.Time) (_ *Watch, err error) {
	w := &Watch{config: c, dial: dial, log: log, now: now, meter: newMeter(), book: finding.Book{}, traps: map[string]ledger.Entry{}}
	if err := os.MkdirAll(c.StateDir, 0o700); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			w.Close()
		}
	}()
	if w.lock, err = os.OpenFile(filepath.Join(c.StateDir, "lock"), os.O_RDWR|os.O_CREATE, 0o600); err != nil {
		return nil, err
	}
	if err := unix.Flock(int(w.lock.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		return nil, fmt.Errorf("another watch runs on %s: %w", c.StateDir, err)
	}
	text, err := os.ReadFile(w.stateFile())
	if err == nil {
		err = json.Unmarshal(text, &w.kept)
	}
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("%s: %w (without it every log is read again from its start; move it away for that)", w.stateFile(), err)
	}
	if err := w.load(w.kept.Judge); err != nil {
		return nil, err
	}
	if err := w.compact(); err != nil {
		return nil, err
	}
	for i := range w.kept.Findings {
		w.book[w.kept.Findings[i].Key] = w.kept.Findings[i].Finding
	}
	for _, s := range c.Sensors {
		if err := w.openSensor(s); err != nil {
			return nil, fmt.Errorf("sensor %q: %w", s.Name, err)
		}
	}
	return w, nil
}

func (w *Watch) stateFile() string { return filepath.Join(w.config.StateDir, "state.json") }

// load reads the ledger, and makes the judge that holds sightings against it, who goes
// on from what is kept.
func (w *Watch) load(kept detect.State) error {
	if err := w.openLedger(); err != nil {
		return err
	}
	w.judge = detect.NewJudge(w.index, w.config.World())
	w.judge.Restore(kept)
	return w.index.Each(func(e ledger.Entry) error { w.learn(e); return nil })
}

// openLedger reads the ledger. A last line that isn't whole was being written when
// the watch was killed; the broker's log tells of it again.
func (w *Watch) openLedger() (err error) {
	if w.file, err = os.OpenFile(w.ledgerFile(), os.O_RDWR|os.O_CREATE, 0o600); err != nil {
		return err
	}
	info, err := w.file.Stat()
	if err != nil {
		return err
	}
	w.size = info.Size()
	last := make([]byte, min(w.size, ledger.MaxLine))
	if _, err := w.file.ReadAt(last, w.size-int64(len(last))); err != nil && !errors.Is(err, io.EOF) {
		return err
	}
	for len(last) > 0 && last[len(last)-1] != '\n' {
		last = last[:len(last)-1]
		w.size--
	}
	if err := w.file.Truncate(w.size); err != nil {
		return err
	}
	w.index = ledger.NewIndex(w.file)
	return w.index.Load(w.size)
}

// Close lets go of the files.
func (w *Watch) Close() {
	for _, s := range w.sensors {
		s.tail.Close()
	}
	for _, f := range []*os.File{w.file, w.lock} {
		if f != nil {
			_ = f.Close()
		}
	}
}

// Run watches until ctx ends.
func (w *Watch) Run(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	f := &follower{dial: w.dial, log: w.log, now: w.now, next: w.kept.Audit, epoch: w.kept.Epoch, empty: w.index.Len() == 0, out: make(chan update)}
	go f.run(ctx)
	speak := newSpeaker(w.config, w.dial, w.log)
	stopMetrics, err := w.meter.serve(w.config.MetricsListen)
	if err != nil {
		return err
	}
	defer stopMetrics()
	for _, s := range w.sensors {
		if s.spool == nil {
			continue
		}
		switch {
		case s.DSNFile != "":
			go s.ask(ctx, s.spool, w.log)
		case s.Journal != "":
			go s.journal(ctx, s.reader.(*sightings.Sshd).Cursor(), s.spool, w.log)
		default:
			if err := s.listen(ctx, s.spool, w.log); err != nil {
				return fmt.Errorf("sensor %q: %w", s.Name, err)
			}
		}
	}
	poll, save, look, tidy := time.NewTicker(pollEvery), time.NewTicker(saveEvery), time.NewTicker(lookEvery), time.NewTicker(compactEvery)
	for _, t := range []*time.Ticker{poll, save, look, tidy} {
		defer t.Stop()
	}
	for {
		select {
		case <-ctx.Done():
			return w.save()
		case u := <-f.out:
			if err := w.apply(u); err != nil {
				return err
			}
		case <-poll.C:
			if w.index.Len() == 0 && w.synced.IsZero() {
				continue // whose logins they are can't be known yet
			}
			if err := w.poll(); err != nil {
				return err
			}
			if w.fresh { // nobody waits for what is new
				if err := w.round(ctx, speak); err != nil {
					return err
				}
			}
		case <-save.C:
			if err := w.round(ctx, speak); err != nil {
				return err
			}
		case <-look.C:
			if err := w.settleFindings(); err != nil {
				return err
			}
		case <-tidy.C:
			if err := w.compact(); err != nil {
				return err
			}
		}
	}
}

// round judges what has waited long enough, writes down what is new, and tells of it.
func (w *Watch) round(ctx context.Context, s *speaker) error {
	if err := w.settled(); err != nil {
		return err
	}
	w.blind()
	if w.changed {
		if err := w.save(); err != nil {
			return err
		}
	}
	w.fresh = false
	w.tell(ctx, s)
	w.meter.update(w)
	return nil
}

// apply takes what the broker's log says is new.
func (w *Watch) apply(u update) error {
	if u.traps {
		u.entries = w.changedTraps(u.entries)
	}
	for _, e := range u.entries {
		line, err := json.Marshal(e)
		if err != nil {
			return err
		}
		line = append(line, '\n')
		if len(line) > ledger.MaxLine {
			return fmt.Errorf("lease %s: an entry of %d bytes", e.ID, len(line))
		}
		if _, err := w.file.WriteAt(line, w.size); err != nil {
			return err
		}
		if err := w.index.Add(w.size, len(line), e); err != nil {
			return err
		}
		w.size += int64(len(line))
		w.learn(e)
		if err := w.touched(e); err != nil {
			return err
		}
	}
	judged := map[string]bool{} // an update may have many of one program
	for _, e := range u.entries {
		if e.Kind == ledger.KindCanary {
			continue
		}
		if program := e.Host + " " + e.Scope; !judged[program] {
			judged[program] = true
			if err := w.program(e.Host, e.Scope); err != nil {
				return err
			}
		}
		if err := w.entered(e); err != nil {
			return err
		}
	}
	for _, s := range u.opens {
		if err := w.see(s); err != nil {
			return err
		}
	}
	if len(u.entries) > 0 || u.next != w.kept.Audit || u.epoch != w.kept.Epoch {
		w.kept.Audit, w.kept.Epoch, w.changed = u.next, u.epoch, true
	}
	if u.synced.After(w.synced) {
		w.synced = u.synced
	}
	return nil
}

// learn takes what an entry says beyond itself.
func (w *Watch) learn(e ledger.Entry) {
	w.judge.Learn(e)
	if e.Kind == ledger.KindCanary {
		w.traps[e.ID] = e
	}
}

// changedTraps are those of the broker's traps that are new, and those that it has
// no more: nothing comes of their use.
func (w *Watch) changedTraps(now []ledger.Entry) (out []ledger.Entry) {
	set := map[string]bool{}
	for _, e := range now {
		set[e.ID] = true
		if _, known := w.traps[e.ID]; !known {
			out = append(out, e)
		}
	}
	for id, e := range w.traps {
		if !set[id] && e.Revoked.IsZero() {
			e.Revoked = w.now()
			out = append(out, e)
		}
	}
	return out
}

// program judges a program's entries, of which there are new ones.
func (w *Watch) program(host, scope string) error {
	list, err := w.index.Program(host, scope)
	if err != nil {
		return err
	}
	found, err := w.judge.Program(list)
	if err == nil && len(found) > 0 {
		// What is new beside the last ones may be old.
		if list, err = w.index.History(host, scope); err == nil {
			found, err = w.judge.Program(list)
		}
	}
	w.add(found)
	return err
}

// entered judges an entry by its secret, and by its end.
func (w *Watch) entered(e ledger.Entry) error {
	if !e.Revoked.IsZero() && !w.judge.Uses(e.Host, e.Scope) {
		list, err := w.index.Program(e.Host, e.Scope)
		if err != nil {
			return err
		}
		w.add(w.judge.Unused(list, w.covered(sightings.Databases), w.covered(func(kind string) bool { return kind == "sshd" })))
	}
	if e.Names.SecretHMAC != "" {
		same, err := w.index.Find(ledger.BySecret, e.Names.SecretHMAC)
		if err != nil {
			return err
		}
		if len(same) > 1 {
			w.add(detect.Equal(same))
		}
	}
	return nil
}

func (w *Watch) add(list []detect.Detection) {
	for _, d := range list {
		key, known := finding.Of(d), 0
		if f := w.book[key]; f != nil {
			known = f.Count
		}
		f, fresh := w.book.Add(d)
		if fresh {
			w.kept.Findings, w.fresh = append(w.kept.Findings, record{Key: key, Finding: f}), true
			w.log.Warn("finding", "detector", f.Detector, "severity", f.Severity, "lease", f.Lease, "host", f.Host, "account", f.Account, "why", f.Why)
		}
		w.changed = w.changed || f.Count != known
	}
}

// save writes all that is known. The ledger's lines come first: the state says up to
// which of the broker's records they are.
func (w *Watch) save() error {
	if err := w.file.Sync(); err != nil {
		return err
	}
	w.kept.Sensors = map[string]sensorState{}
	for _, s := range w.sensors {
		reader, err := s.reader.Save()
		if err != nil {
			return err
		}
		w.kept.Sensors[s.Name] = sensorState{Places: s.tail.Places(), Reader: reader}
	}
	w.kept.Judge = w.judge.Save()
	w.forget()
	text, err := json.Marshal(w.kept)
	if err != nil {
		return err
	}
	if err := durable.Write(w.stateFile(), text); err != nil {
		return err
	}
	w.changed = false
	for _, s := range w.sensors {
		if s.spool != nil {
			s.spool.drop(w.kept.Sensors[s.Name].Places)
		}
	}
	return nil
}

// forget drops findings that nothing was added to for long, and that were told.
func (w *Watch) forget() {
	left := w.kept.Findings[:0]
	for _, r := range w.kept.Findings {
		if w.now().Sub(r.Finding.Last) > keep && r.Told == r.Finding.Count {
			delete(w.book, r.Key)
			continue
		}
		left = append(left, r)
	}
	w.kept.Findings = left
}
