// Package watch is `countersign watch serve`: it follows the logs of those who see
// credentials used and the broker's own audit log, judges each sighting, tells the
// broker what it found, and responds as the operator chose.
//
// One loop owns everything. It works in short turns: a bounded piece of each log, what
// the broker's log has that is new, what waited long enough. So it obeys within a second
// however much there is to read, and no log keeps another from its turn. What it knows
// (how far each log was read, what of it waits, what was found) is saved as of one
// moment, every few seconds at the latest and before anybody is told: a watch that is
// killed anywhere goes on from there, has missed no line and counts none twice, and
// tells again what it may not have told. Who is told (the broker, receivers) is told
// beside the loop: one that is slow holds up nothing but itself.
//
// Trust: the broker, whose responder it is. Logs are hostile (package sightings).
// What a sighting doesn't match waits until the ledger has caught up with it; while
// the broker is away nothing is judged unmatched. What waits is bounded for each log:
// where there is no more room, the log waits on the disk. Nothing is dropped to make
// room, and what is lost for another reason is a finding.
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

	"github.com/countersign/countersign/compensating/detect"
	"github.com/countersign/countersign/compensating/finding"
	"github.com/countersign/countersign/compensating/ledger"
	"github.com/countersign/countersign/compensating/sightings"
)

const (
	pollEvery = 250 * time.Millisecond
	// saveEvery is how often what is known is saved, where that is quick. It is saved less
	// often the longer it takes, down to saveLatest; what is new is saved sooner.
	saveEvery  = time.Second
	saveLatest = 4 * time.Second
	saveFresh  = 100 * time.Millisecond
	saveShare  = 20 // of the time that passes, one part is for saving
	// sliceTime and sliceBytes bound what one turn reads of one log.
	sliceTime  = 100 * time.Millisecond
	sliceBytes = 8 << 20
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
	// blocked is how long a log may wait for the ledger.
	blocked = time.Minute
	// heldBytes bounds the sightings that wait for the ledger. Each log has a share of it.
	heldBytes = 32 << 20
	// goodbye is how long the end waits for who is being told something.
	goodbye = time.Second
)

// A Watch is the service. Run uses it; it is not safe for concurrent use.
type Watch struct {
	config *Config
	dial   Dial
	log    *slog.Logger
	now    func() time.Time
	meter  *meter

	file     *os.File // the ledger
	size     int64
	lock     *os.File
	index    *ledger.Index
	judge    *detect.Judge
	sensors  []*sensor
	queues   map[string]*queue // what waits for the ledger, by its log
	room     int               // of each queue, in bytes
	book     finding.Book
	records  map[finding.Key]*record
	canaries map[string]ledger.Entry
	kept     state
	disk     *partsFile
	synced   time.Time // the ledger is no older
	changed  bool
	fresh    bool // there is a finding that wasn't there at the last round

	behind  bool          // there is more to read, or to judge, at once
	polled  time.Time     // when each of these was done last
	rounded time.Time     //
	looked  time.Time     //
	tidied  time.Time     //
	looking int           // the finding to look at next; 0: none is
	cost    time.Duration // of the last save
}

// Open takes up the state in the config's folder.
func Open(c *Config, dial Dial, log *slog.Logger, now func() time.Time) (_ *Watch, err error) {
	w := &Watch{config: c, dial: dial, log: log, now: now, meter: newMeter(), book: finding.Book{}, records: map[finding.Key]*record{}, queues: map[string]*queue{},
		canaries: map[string]ledger.Entry{}, room: heldBytes / max(1, len(c.Sensors))}
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

	w.disk = newPartsFile(w.stateFile())
	parts, err := w.disk.load()
	switch {
	case errors.Is(err, errWhole):
		err = w.restoreWhole()
	case err == nil:
		err = w.restore(parts)
	}
	if err != nil {
		return nil, fmt.Errorf("%w (without it every log is read again from its start; move it away for that)", err)
	}
	if err := w.load(w.kept.Judge); err != nil {
		return nil, err
	}
	if err := w.compact(context.Background()); err != nil {
		return nil, err
	}
	for _, r := range w.kept.Findings {
		w.book[r.Key], w.records[r.Key] = r.Finding, r
	}

	for _, s := range c.Sensors {
		if err := w.openSensor(s); err != nil {
			return nil, fmt.Errorf("sensor %q: %w", s.Name, err)
		}
	}
	w.looked, w.tidied = now(), now()
	return w, nil
}

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
	if w.disk != nil {
		w.disk.close()
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
	speak := newSpeaker(w.config, w.dial, w.log, w.now)
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
	tick := time.NewTicker(pollEvery)
	defer tick.Stop()
	for ctx.Err() == nil {
		var at <-chan time.Time
		if !w.behind {
			at = tick.C
		}
		if err := w.wait(ctx, f.out, speak.done, at); err != nil {
			return err
		}
		if err := w.turn(ctx, speak); err != nil {
			return err // without a save: what failed is read again
		}
	}
	speak.end(goodbye)
	return w.save()
}

// wait takes what comes from the broker, or back from who was told something, until
// there is a reason for a turn. Without a tick it takes only what is there already.
func (w *Watch) wait(ctx context.Context, updates <-chan update, told <-chan func(), tick <-chan time.Time) error {
	if tick != nil {
		select {
		case <-ctx.Done():
		case u := <-updates:
			return w.apply(u)
		case apply := <-told:
			apply()
		case <-tick:
		}
		return nil
	}

	for inTime := w.spender(ctx, sliceTime); inTime(); {
		select {
		case u := <-updates:
			if err := w.apply(u); err != nil {
				return err
			}
		case apply := <-told:
			apply()
		default:
			return nil
		}
	}
	return nil
}

// turn does what is due by the clock, whatever woke the loop, and no more of anything
// than takes a moment.
func (w *Watch) turn(ctx context.Context, s *speaker) error {
	due := func(last *time.Time, every time.Duration) bool {
		now := w.now()
		if since := now.Sub(*last); since >= 0 && since < every {
			return false
		}
		*last = now
		return true
	}
	known := w.index.Len() > 0 || !w.synced.IsZero() // otherwise it can't be known whose logins they are
	if known && (w.behind || due(&w.polled, pollEvery)) {
		if err := w.poll(ctx); err != nil {
			return err
		}
		if err := w.settled(ctx); err != nil {
			return err
		}
	}
	if due(&w.rounded, w.every()) {
		if err := w.round(ctx, s); err != nil {
			return err
		}
	}
	if w.looking > 0 || due(&w.looked, lookEvery) {
		if err := w.settleFindings(ctx); err != nil {
			return err
		}
	}
	if due(&w.tidied, compactEvery) {
		return w.compact(ctx)
	}
	return nil
}

// every is how long after a round the next one is due.
func (w *Watch) every() time.Duration {
	if w.fresh { // nobody waits for what is new
		return min(max(saveFresh, 2*w.cost), saveLatest)
	}
	return min(max(saveEvery, saveShare*w.cost), saveLatest)
}

// round writes down what is new, and tells of it.
func (w *Watch) round(ctx context.Context, s *speaker) error {
	found, err := w.judge.Reads()
	if err != nil {
		return err
	}
	w.add(found)
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

// spender returns a question for whether there is time left for more work of one kind.
func (w *Watch) spender(ctx context.Context, most time.Duration) func() bool {
	end := w.now().Add(most)
	return func() bool { return ctx.Err() == nil && w.now().Before(end) }
}

// apply takes what the broker's log says is new.
func (w *Watch) apply(u update) error {
	if u.canaries {
		u.entries = w.changedCanaries(u.entries)
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
		w.meter.seen(s)
		if err := w.judged(s); err != nil {
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
		w.canaries[e.ID] = e
	}
}

// changedCanaries are those of the broker's canaries that are new, and those that it has
// no more: nothing comes of their use.
func (w *Watch) changedCanaries(now []ledger.Entry) (out []ledger.Entry) {
	set := map[string]bool{}
	for _, e := range now {
		set[e.ID] = true
		if _, known := w.canaries[e.ID]; !known {
			out = append(out, e)
		}
	}
	for id, e := range w.canaries {
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
			r := &record{Key: key, Finding: f}
			if n := len(w.kept.Findings); n > 0 {
				r.number = w.kept.Findings[n-1].number + 1
			}
			w.kept.Findings, w.records[key], w.fresh = append(w.kept.Findings, r), r, true
			w.log.Warn("finding", "detector", f.Detector, "severity", f.Severity, "lease", f.Lease, "host", f.Host, "account", f.Account, "why", f.Why)
		}
		w.changed = w.changed || f.Count != known
	}
}

// save writes what is known. The ledger's lines come first: the state says up to which
// of the broker's records they are.
func (w *Watch) save() error {
	start := w.now()
	if err := w.file.Sync(); err != nil {
		return err
	}
	w.forget()
	if err := w.disk.save(w.parts); err != nil {
		return err
	}
	w.changed = false
	for _, s := range w.sensors {
		if s.spool != nil {
			s.spool.drop(s.tail.Places())
		}
	}
	w.cost = w.now().Sub(start)
	return nil
}

// forget drops findings that nothing was added to for long, and that were told.
func (w *Watch) forget() {
	left := w.kept.Findings[:0]
	for _, r := range w.kept.Findings {
		if w.now().Sub(r.Finding.Last) > keep && r.Told == r.Finding.Count {
			delete(w.book, r.Key)
			delete(w.records, r.Key)
			continue
		}
		left = append(left, r)
	}
	clear(w.kept.Findings[len(left):])
	w.kept.Findings = left
}
