package watch

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"log/slog"
	"math"
	"slices"
	"strings"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/types/known/timestamppb"

	v1 "github.com/countersign/countersign/broker/api/countersign/v1"
	"github.com/countersign/countersign/broker/api/countersign/v1/countersignv1connect"
	"github.com/countersign/countersign/compensating/detect"
	"github.com/countersign/countersign/compensating/finding"
	"github.com/countersign/countersign/compensating/ledger"
	"github.com/countersign/countersign/compensating/sightings"
)

const (
	// patience is how long one call to the broker or a receiver may take.
	patience = 3 * time.Second
	// later is how long nobody is told anything after the broker couldn't be.
	later = 5 * time.Second
	// maxEvidence bounds a sighting as the broker takes it.
	maxEvidence = 4 << 10
	// maxTold and toldTime bound what is told in one go: what is graver and new isn't to
	// wait long behind it.
	maxTold  = 256
	toldTime = time.Second
)

// A speaker tells the broker and other receivers what was found, and acts. Each of them
// is told beside the watch's loop, one go at a time: meanwhile the speaker's fields for
// it are its own. What came of it is a function that the loop gets from done, and calls.
type speaker struct {
	dial  Dial
	log   *slog.Logger
	now   func() time.Time
	brake float64
	done  chan func()
	busy  map[string]bool // by receiver; "" is the broker

	client countersignv1connect.OperatorServiceClient
	hangUp func()
	until  time.Time // the broker isn't told anything before
	full   time.Time // the broker takes nothing new before
	hooks  []receiver
	quiet  map[string]time.Time // receivers that aren't told anything before
}

func newSpeaker(c *Config, dial Dial, log *slog.Logger, now func() time.Time) *speaker {
	hooks := receivers(c)
	return &speaker{dial: dial, log: log, now: now, brake: c.BrakeShare, done: make(chan func(), 1+len(hooks)), busy: map[string]bool{}, hooks: hooks, quiet: map[string]time.Time{}}
}

// begin has a receiver told something. What tell returns is called by the loop.
func (s *speaker) begin(receiver string, tell func() func()) {
	s.busy[receiver] = true
	go func() {
		came := tell()
		s.done <- func() {
			s.busy[receiver] = false
			came()
		}
	}()
}

func (s *speaker) idle() bool {
	for _, busy := range s.busy {
		if busy {
			return false
		}
	}
	return true
}

// end waits for what is still being told, but not for long.
func (s *speaker) end(most time.Duration) {
	for end := time.After(most); !s.idle(); {
		select {
		case apply := <-s.done:
			apply()
		case <-end:
			return
		}
	}
}

func (s *speaker) lost(now time.Time, err error) {
	s.log.Warn("the broker can't be told of findings", "err", err)
	if s.hangUp != nil {
		s.hangUp()
	}
	s.client, s.hangUp, s.until = nil, nil, now.Add(later)
}

// A task is a finding as it was when telling of it began.
type task struct {
	record
	action   detect.Response // what the operator wants done
	reopened bool
}

// task copies a record: the loop goes on adding to it.
func (w *Watch) task(r *record) (*task, error) {
	t := &task{record: *r}
	f := *r.Finding
	f.Evidence = slices.Clone(f.Evidence)
	t.Finding, t.Notices = &f, nil

	scope := ""
	if f.Lease != "" {
		entries, err := w.index.Find(ledger.ByID, f.Lease)
		if err != nil {
			return nil, err
		}
		if len(entries) > 0 {
			scope = entries[0].Scope
		}
	}
	t.action = w.config.response(f.Detector, scope)
	return t, nil
}

// tell has everybody told of what is new and was written down: the broker, who also does
// what the operator chose, the gravest first, and whoever else wants to hear after it.
// What one finding or one receiver refuses holds up no other.
func (w *Watch) tell(ctx context.Context, s *speaker) {
	if !s.busy[""] && !w.now().Before(s.until) {
		tasks := w.tasks(maxTold, func(r *record) bool {
			return r.Told != r.Finding.Count || r.Waits || r.over() && r.Closed != r.Finding.Count
		})
		brake := brake{slices.Clone(w.kept.Brake.Used)}
		if len(tasks) > 0 {
			s.begin("", func() func() {
				told := s.tellBroker(ctx, tasks, &brake)
				return func() { w.told(told, brake) }
			})
		}
	}

	for _, h := range s.hooks {
		if s.busy[h.id()] || w.now().Before(s.quiet[h.id()]) {
			continue
		}
		tasks := w.tasks(maxTold, func(r *record) bool { return r.Told != 0 && !slices.Contains(r.Notices, h.id()) })
		if len(tasks) == 0 {
			continue
		}
		s.begin(h.id(), func() func() {
			told, err := s.tellReceiver(ctx, h, tasks)
			return func() {
				if err != nil {
					s.quiet[h.id()] = w.now().Add(later)
				}
				for _, t := range told {
					if r := w.records[t.Key]; r != nil {
						r.Notices, w.changed = append(r.Notices, h.id()), true
					}
				}
			}
		})
	}
}

// tasks are the gravest findings that are due, so many.
func (w *Watch) tasks(most int, due func(*record) bool) (list []*task) {
	var records []*record
	for _, r := range w.kept.Findings {
		if due(r) {
			records = append(records, r)
		}
	}
	slices.SortStableFunc(records, func(a, b *record) int { return b.Finding.Severity.Rank() - a.Finding.Severity.Rank() })
	for _, r := range records[:min(len(records), most)] {
		t, err := w.task(r)
		if err != nil {
			w.log.Error("a finding's lease can't be looked up", "detector", r.Finding.Detector, "lease", r.Finding.Lease, "err", err)
			continue
		}
		list = append(list, t)
	}
	return list
}

// told takes what came of telling the broker.
func (w *Watch) told(tasks []*task, b brake) {
	w.kept.Brake = b
	w.changed = w.changed || len(tasks) > 0
	for _, t := range tasks {
		r := w.records[t.Key]
		if r == nil {
			continue
		}
		r.Action, r.Held, r.Waits, r.Told, r.Closed = t.Action, t.Held, t.Waits, t.Told, t.Closed
		if t.reopened {
			r.Notices = nil
		}
	}
}

// tellBroker tells the broker, and does what the operator chose. It returns the tasks
// of which something came.
func (s *speaker) tellBroker(ctx context.Context, tasks []*task, b *brake) (told []*task) {
	end := s.now().Add(toldTime)
	for _, t := range tasks {
		if ctx.Err() != nil || s.now().After(end) {
			break
		}
		if s.client == nil {
			client, hangUp, err := s.dial(ctx)
			if err != nil {
				s.lost(s.now(), err)
				break
			}
			s.client, s.hangUp = client, hangUp
		}
		before := t.record
		err := s.tellOne(ctx, t, b)
		if err != nil {
			s.lost(s.now(), err)
		}
		if t.Action != before.Action || t.Held != before.Held || t.Waits != before.Waits || t.Told != before.Told || t.Closed != before.Closed {
			told = append(told, t)
		}
		if err != nil {
			break
		}
	}
	return told
}

// tellOne tells the broker of one finding. An error is the broker's absence.
func (s *speaker) tellOne(ctx context.Context, t *task, b *brake) error {
	waited := t.Waits
	if err := s.act(ctx, t, b); err != nil {
		if isAway(err) {
			return err
		}
		t.Held, t.Waits = brief("it is tried again: "+err.Error()), true
	}
	if waited && t.Waits {
		return nil // nothing new
	}
	if t.Told == 0 && s.now().Before(s.full) {
		return nil
	}

	count := t.Finding.Count
	reopened, err := report(ctx, s.client, &t.record)
	if err != nil {
		if isAway(err) {
			return err
		}
		s.log.Error("the broker doesn't take a finding", "detector", t.Finding.Detector, "lease", t.Finding.Lease, "err", err)
		if connect.CodeOf(err) == connect.CodeResourceExhausted {
			s.full = s.now().Add(time.Minute) // it is told when there is room
			return nil
		}
	}
	t.reopened = reopened
	if t.over() && t.Told == count {
		t.Closed = count
	}
	t.Told = count
	return nil
}

// tellReceiver tells a receiver. It returns what the receiver took.
func (s *speaker) tellReceiver(ctx context.Context, h receiver, tasks []*task) (told []*task, err error) {
	end := s.now().Add(toldTime)
	for _, t := range tasks {
		if ctx.Err() != nil || s.now().After(end) {
			break
		}
		if err := h.tell(ctx, &t.record); err != nil {
			s.log.Warn("a receiver can't be told of a finding", "to", h.name(), "err", err)
			return told, err
		}
		told = append(told, t)
	}
	return told, nil
}

// isAway reports whether an error is the broker's absence, and not about one finding.
func isAway(err error) bool {
	switch connect.CodeOf(err) {
	case connect.CodeUnavailable, connect.CodeDeadlineExceeded, connect.CodeCanceled:
		return true
	}
	return false
}

// report tells the broker.
func report(ctx context.Context, client countersignv1connect.OperatorServiceClient, r *record) (reopened bool, err error) {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	f := r.Finding
	why := f.Why
	if r.Held != "" {
		why = r.Held + "; " + why
	}
	m := &v1.Finding{Cause: cause(r.Key), Detector: string(f.Detector), Severity: string(f.Severity), Nhi: f.NHI, Lease: brief(f.Lease), Host: brief(f.Host),
		Account: brief(f.Account), Why: brief(why), First: timestamppb.New(f.First), Last: timestamppb.New(f.Last), Count: uint64(f.Count), Response: string(r.Action)}
	for _, s := range f.Evidence {
		b, err := shown(s)
		if err != nil {
			return false, err
		}
		m.Evidence = append(m.Evidence, b)
	}
	over := ""
	if r.over() && r.Told == f.Count { // what wasn't told yet isn't closed before it is
		over = brief(r.Over)
	}
	a, err := client.ReportFinding(ctx, connect.NewRequest(&v1.ReportFindingRequest{Finding: m, Over: over}))
	if err != nil {
		return false, err
	}
	return a.Msg.GetReopened(), nil
}

// shown is a sighting as the broker takes it: texts that make it too long, which those
// with control characters do, are cut.
func shown(s sightings.Sighting) ([]byte, error) {
	for most := maxText; ; most /= 2 {
		for _, text := range []*string{&s.Account, &s.Target, &s.Program, &s.SSHKeyID, &s.VaultLease, &s.VaultPath, &s.Lease, &s.Actor} {
			*text = (*text)[:min(len(*text), most)]
		}
		b, err := json.Marshal(s)
		if err != nil || len(b) <= maxEvidence || most == 0 {
			return b, err
		}
	}
}

// maxText bounds a text as the broker takes it.
const maxText = 512

// brief is a text as the broker takes it: logs hold longer ones, and other bytes.
func brief(s string) string {
	s = strings.ToValidUTF8(s, "\uFFFD")
	if len(s) > maxText {
		s = strings.ToValidUTF8(s[:maxText-len("…")], "") + "…"
	}
	return s
}

// cause is a key in its one form: two that differ only behind what is brief differ.
func cause(k finding.Key) string {
	if s := brief(k.Cause); s != k.Cause {
		sum := sha256.Sum256([]byte(k.Cause))
		return hex.EncodeToString(sum[:])
	}
	return k.Cause
}

// act does what the operator chose, once for a finding. More than an alert needs a
// completed login; what the brake holds back is left to the operator, and said.
func (s *speaker) act(ctx context.Context, r *task, b *brake) error {
	if r.over() {
		r.Waits = false
		return nil
	}
	if r.Action != "" && r.Action != detect.Alert || r.Held != "" && !r.Waits {
		return nil
	}
	action := r.action
	completed := slices.ContainsFunc(r.Finding.Evidence, func(seen sightings.Sighting) bool { return seen.Kind == sightings.Login })
	switch {
	case action == detect.Alert, !completed, action == detect.Revoke && r.Finding.Lease == "", action != detect.Revoke && r.Finding.Host == "":
		r.Action = detect.Alert
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	free, err := b.free(ctx, s.client, action, s.brake, s.now())
	if err != nil {
		return err
	}
	if !free {
		if r.Waits {
			return nil
		}
		r.Held, r.Action, r.Waits = fmt.Sprintf("%s waits for the brake: do it by hand, if it is right", action), detect.Alert, true
		s.log.Warn("the brake held a response back", "action", action, "detector", r.Finding.Detector, "lease", r.Finding.Lease, "host", r.Finding.Host)
		return nil
	}
	reason := fmt.Sprintf("%s: %s", r.Finding.Detector, r.Finding.Why)
	switch action {
	case detect.Revoke:
		_, err = s.client.RevokeLeases(ctx, connect.NewRequest(&v1.RevokeLeasesRequest{Leases: []string{r.Finding.Lease}, Reason: reason}))
	case detect.StepUp, detect.Quarantine:
		_, err = s.client.ChangeHost(ctx, connect.NewRequest(&v1.ChangeHostRequest{Host: r.Finding.Host, Action: string(action), Reason: reason}))
	}
	switch connect.CodeOf(err) {
	case connect.CodeNotFound, connect.CodeFailedPrecondition, connect.CodeInvalidArgument, connect.CodePermissionDenied:
		// It is gone, or can't be done: trying again changes nothing.
		r.Held, r.Waits, r.Action = fmt.Sprintf("%s failed: %v", action, err), false, detect.Alert
		return nil
	}
	if err == nil {
		r.Held, r.Waits, r.Action = "", false, action
		b.Used = append(b.Used, use{action, s.now()})
		s.log.Warn("responded", "action", action, "detector", r.Finding.Detector, "lease", r.Finding.Lease, "host", r.Finding.Host)
	}
	return err
}

// A brake bounds what is done in a minute.
type brake struct {
	Used []use `json:"used,omitempty"`
}

type use struct {
	Action detect.Response `json:"action"`
	At     time.Time       `json:"at"`
}

// free says whether one more may be done: of leases for revoking them, of hosts for
// the rest.
func (b *brake) free(ctx context.Context, client countersignv1connect.OperatorServiceClient, action detect.Response, share float64, now time.Time) (bool, error) {
	b.Used = slices.DeleteFunc(b.Used, func(u use) bool { return now.Sub(u.At) > time.Minute || u.At.After(now) })
	n := 0
	for _, u := range b.Used {
		if (u.Action == detect.Revoke) == (action == detect.Revoke) {
			n++
		}
	}
	if n == 0 {
		return true, nil
	}
	a, err := client.GetStatus(ctx, connect.NewRequest(&v1.GetStatusRequest{}))
	if err != nil {
		return false, err
	}
	of := a.Msg.GetLeases()["live"] + uint64(n)
	if action != detect.Revoke {
		of = 0
		for _, hosts := range a.Msg.GetHosts() {
			of += hosts
		}
	}
	return allowed(n, of, share), nil
}

// allowed says whether one more than n may be acted on in a minute, of so many.
func allowed(n int, of uint64, share float64) bool {
	return n == 0 || float64(n) < math.Floor(share*float64(of))
}
