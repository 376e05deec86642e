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

	v1 "github.com/countersign/countersign/broker/wire/countersign/v1"
	"github.com/countersign/countersign/broker/wire/countersign/v1/countersignv1connect"
	"github.com/countersign/countersign/compensating/detect"
	"github.com/countersign/countersign/compensating/finding"
	"github.com/countersign/countersign/compensating/ledger"
	"github.com/countersign/countersign/compensating/sightings"
)

const (
	// patience is how long one call to the broker or a receiver may take. The loop
	// waits for it, and reads on after it.
	patience = 3 * time.Second
	// later is how long nobody is told anything after the broker couldn't be.
	later = 5 * time.Second
	// maxEvidence bounds a sighting as the broker takes it.
	maxEvidence = 4 << 10
)

// A speaker tells the broker and other receivers what was found, and acts.
type speaker struct {
	dial   Dial
	log    *slog.Logger
	client countersignv1connect.OperatorServiceClient
	hangUp func()
	until  time.Time // the broker isn't told anything before
	full   time.Time // the broker takes nothing new before
	hooks  []receiver
	quiet  map[string]time.Time // receivers that aren't told anything before
}

func newSpeaker(c *Config, dial Dial, log *slog.Logger) *speaker {
	return &speaker{dial: dial, log: log, hooks: receivers(c), quiet: map[string]time.Time{}}
}

func (s *speaker) lost(now time.Time, err error) {
	s.log.Warn("the broker can't be told of findings", "err", err)
	if s.hangUp != nil {
		s.hangUp()
	}
	s.client, s.hangUp, s.until = nil, nil, now.Add(later)
}

// tell tells of what is new and was written down, and does what the operator chose:
// the broker first, the gravest first, and whoever else wants to hear after it. What
// one finding or one receiver refuses holds up no other.
func (w *Watch) tell(ctx context.Context, s *speaker) {
	var list []*record
	for i := range w.kept.Findings {
		if r := &w.kept.Findings[i]; r.Told != r.Finding.Count || r.Waits || r.over() && r.Closed != r.Finding.Count {
			list = append(list, r)
		}
	}
	slices.SortStableFunc(list, func(a, b *record) int { return b.Finding.Severity.Rank() - a.Finding.Severity.Rank() })
	for _, r := range list {
		if ctx.Err() != nil || w.now().Before(s.until) {
			break
		}
		if s.client == nil {
			client, hangUp, err := s.dial(ctx)
			if err != nil {
				s.lost(w.now(), err)
				break
			}
			s.client, s.hangUp = client, hangUp
		}
		waited := r.Waits
		if err := w.act(ctx, s.client, r); err != nil {
			if s.away(w.now(), err) {
				break
			}
			r.Held, r.Waits = brief("it is tried again: "+err.Error()), true
		}
		if waited && r.Waits {
			continue // nothing new
		}
		if r.Told == 0 && w.now().Before(s.full) {
			continue
		}
		count := r.Finding.Count
		reopened, err := report(ctx, s.client, r)
		if err != nil {
			if s.away(w.now(), err) {
				break
			}
			s.log.Error("the broker doesn't take a finding", "detector", r.Finding.Detector, "lease", r.Finding.Lease, "err", err)
			if connect.CodeOf(err) == connect.CodeResourceExhausted {
				s.full = w.now().Add(time.Minute) // it is told when there is room
				continue
			}
		}
		if reopened {
			r.Notices = nil
		}
		if r.over() && r.Told == count {
			r.Closed = count
		}
		r.Told, w.changed = count, true
	}
	for _, h := range s.hooks {
		if w.now().Before(s.quiet[h.id()]) {
			continue
		}
		for i := range w.kept.Findings {
			r := &w.kept.Findings[i]
			if r.Told == 0 || slices.Contains(r.Notices, h.id()) {
				continue
			}
			if err := h.tell(ctx, r); err != nil {
				s.log.Warn("a receiver can't be told of a finding", "to", h.name(), "err", err)
				s.quiet[h.id()] = w.now().Add(later)
				break
			}
			r.Notices, w.changed = append(r.Notices, h.id()), true
		}
	}
}

// away says whether an error is the broker's absence, and not about one finding.
func (s *speaker) away(now time.Time, err error) bool {
	switch connect.CodeOf(err) {
	case connect.CodeUnavailable, connect.CodeDeadlineExceeded, connect.CodeCanceled:
		s.lost(now, err)
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
		for _, text := range []*string{&s.Account, &s.Target, &s.Program, &s.SSHKeyID, &s.VaultLease, &s.VaultPath, &s.Grant, &s.Actor} {
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
func (w *Watch) act(ctx context.Context, client countersignv1connect.OperatorServiceClient, r *record) error {
	if r.over() {
		r.Waits = false
		return nil
	}
	if r.Action != "" && r.Action != detect.Alert || r.Held != "" && !r.Waits {
		return nil
	}
	scope := ""
	if r.Finding.Lease != "" {
		entries, err := w.index.Find(ledger.ByID, r.Finding.Lease)
		if err != nil {
			return err
		}
		if len(entries) > 0 {
			scope = entries[0].Scope
		}
	}
	action := w.config.response(r.Finding.Detector, scope)
	completed := slices.ContainsFunc(r.Finding.Evidence, func(s sightings.Sighting) bool { return s.Kind == sightings.Login })
	switch {
	case action == detect.Alert, !completed, action == detect.Revoke && r.Finding.Lease == "", action != detect.Revoke && r.Finding.Host == "":
		r.Action = detect.Alert
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	free, err := w.kept.Brake.free(ctx, client, action, w.config.BrakeShare, w.now())
	if err != nil {
		return err
	}
	if !free {
		if r.Waits {
			return nil
		}
		r.Held, r.Action, r.Waits = fmt.Sprintf("%s waits for the brake: do it by hand, if it is right", action), detect.Alert, true
		w.log.Warn("the brake held a response back", "action", action, "detector", r.Finding.Detector, "lease", r.Finding.Lease, "host", r.Finding.Host)
		return nil
	}
	reason := fmt.Sprintf("%s: %s", r.Finding.Detector, r.Finding.Why)
	switch action {
	case detect.Revoke:
		_, err = client.RevokeLeases(ctx, connect.NewRequest(&v1.RevokeLeasesRequest{Leases: []string{r.Finding.Lease}, Reason: reason}))
	case detect.StepUp, detect.Quarantine:
		_, err = client.ChangeHost(ctx, connect.NewRequest(&v1.ChangeHostRequest{Host: r.Finding.Host, Action: string(action), Reason: reason}))
	}
	switch connect.CodeOf(err) {
	case connect.CodeNotFound, connect.CodeFailedPrecondition, connect.CodeInvalidArgument, connect.CodePermissionDenied:
		// It is gone, or can't be done: trying again changes nothing.
		r.Held, r.Waits, r.Action = fmt.Sprintf("%s failed: %v", action, err), false, detect.Alert
		return nil
	}
	if err == nil {
		r.Held, r.Waits, r.Action = "", false, action
		w.kept.Brake.Used, w.changed = append(w.kept.Brake.Used, use{action, w.now()}), true
		w.log.Warn("responded", "action", action, "detector", r.Finding.Detector, "lease", r.Finding.Lease, "host", r.Finding.Host)
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
