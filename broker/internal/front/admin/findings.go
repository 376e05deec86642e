package admin

import (
	"context"
	"encoding/json"
	"errors"
	"time"

	"github.com/countersign/countersign/broker/api/detector"
	"github.com/countersign/countersign/broker/api/event"
	"github.com/countersign/countersign/broker/internal/lease/journal"
	"github.com/countersign/countersign/broker/internal/state/findings"
	"github.com/countersign/countersign/broker/internal/state/inventory"
	"github.com/countersign/countersign/broker/internal/state/store"
	"github.com/countersign/countersign/broker/internal/verify/appraise"
)

// told returns the audit event for a finding.
func told(kind event.Kind, f findings.Finding) event.Finding {
	return event.Finding{As: kind, ID: f.ID, Detector: detector.Name(f.Detector), Cause: f.Cause, Severity: string(f.Severity),
		Account: f.Account, Why: f.Why, First: f.First, Last: f.Last, Count: f.Count}
}

// Report enters a finding, and closes one that is known where over says how evidence
// shows that its cause is. The log has a record where it is new, happened again or is
// closed, and none for each further sighting.
func (d *Desk) Report(ctx context.Context, a Actor, f findings.Finding, over string) (findings.Finding, findings.Outcome, error) {
	if err := a.need(Responder); err != nil {
		return f, findings.Known, err
	}
	if err := f.Check(); err != nil {
		return f, findings.Known, invalid("%v", err)
	}
	if len(over) > maxReason {
		return f, findings.Known, invalid("why it is over has %d bytes; at most %d are kept", len(over), maxReason)
	}
	outcome := findings.Known
	said, report := &event.Finding{}, f
	err := d.act(ctx, a, Responder, store.Any(store.Findings), said, func(tx *store.Tx, r *event.Record) error {
		f = report
		// A lease that the journal doesn't have, a canary's, says nothing of a scope.
		if f.Lease != "" {
			g, err := journal.Load(tx, f.Lease)
			if err != nil && !errors.Is(err, journal.ErrUnknown) {
				return err
			}
			if err == nil {
				f.Host, f.Scope = g.Host, g.Scope
			}
		}
		var err error
		if f, outcome, err = findings.Report(tx, f, d.Now()); err != nil {
			return err
		}
		var kind event.Kind
		switch outcome {
		case findings.New:
			kind = event.FindingOpened
		case findings.Reopened:
			kind = event.FindingReopened
		}
		closed := ""
		if over != "" && outcome == findings.Known && f.Settles() {
			if f, err = findings.Settle(tx, f, a.Name, over, d.Now()); err != nil {
				return err
			}
			kind, closed = event.FindingClosed, over
		}
		r.Host, r.Scope, r.Lease = f.Host, f.Scope, f.Lease
		*said = told(kind, f)
		said.Reason = closed
		return nil
	})
	return f, outcome, err
}

// Findings lists findings in the order of opening.
func (d *Desk) Findings(ctx context.Context, a Actor, f findings.Filter) (list []findings.Finding, err error) {
	if err := a.need(Viewer); err != nil {
		return nil, err
	}
	if f.Status != "" && f.Status != findings.Open && f.Status != findings.Closed {
		return nil, invalid("no finding is ever %q: open or closed", f.Status)
	}
	err = d.Store.Report(ctx, func(tx *store.Tx) error {
		if f.Host != "" {
			h, err := inventory.Find(tx, f.Host)
			if err != nil {
				return err
			}
			f.Host = h.ID
		}
		list, err = findings.List(tx, f)
		return err
	})
	return list, err
}

// Finding is one finding.
func (d *Desk) Finding(ctx context.Context, a Actor, id string) (f findings.Finding, err error) {
	if err := a.need(Viewer); err != nil {
		return f, err
	}
	err = d.Store.View(ctx, func(tx *store.Tx) error {
		f, err = findings.Load(tx, id)
		return err
	})
	return f, err
}

const (
	maxReason = 512                       // bytes
	maxClosed = 10 * 365 * 24 * time.Hour // an end further away is none
)

// CloseFinding says that a finding was looked into, and why that is enough.
func (d *Desk) CloseFinding(ctx context.Context, a Actor, id, reason string, until time.Time) (f findings.Finding, err error) {
	now := d.Now()
	switch {
	case reason == "":
		return f, invalid("say why: a finding is closed for a reason that whoever reads the audit log can follow")
	case len(reason) > maxReason:
		return f, invalid("the reason has %d bytes; at most %d are kept", len(reason), maxReason)
	case !until.IsZero() && (!until.After(now) || until.Sub(now) > maxClosed):
		return f, invalid("closed until %s: it has to be in the future, and within 10 years; leave it away to have the next sighting open it again", until.UTC().Format(time.RFC3339))
	}
	said := &event.Finding{}
	err = d.act(ctx, a, Operator, store.Any(store.Findings), said, func(tx *store.Tx, r *event.Record) error {
		if f, err = findings.Close(tx, id, a.Name, reason, until, now); err != nil {
			return err
		}
		r.Host, r.Scope, r.Lease = f.Host, f.Scope, f.Lease
		*said = told(event.FindingClosed, f)
		said.Reason, said.Until = reason, until
		return nil
	})
	return f, err
}

// withRisk is f as it stands with the findings that are open now.
func withRisk(tx *store.Tx, f appraise.Facts, scope string) (appraise.Facts, error) {
	risk, err := findings.OfHost(tx, f.Host.ID)
	f.Subject.Risk = risk.Of(scope)
	return f, err
}

// factsWithRisk are a host's recorded facts, with its risk of now.
func factsWithRisk(tx *store.Tx, recorded json.RawMessage, scope string) (json.RawMessage, error) {
	var f appraise.Facts
	if err := json.Unmarshal(recorded, &f); err != nil {
		return nil, err
	}
	f, err := withRisk(tx, f, scope)
	if err != nil {
		return nil, err
	}
	return json.Marshal(f)
}
