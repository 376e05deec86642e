package hostapi

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"golang.org/x/mod/sumdb/note"

	"github.com/countersign/countersign/attestors/evidence"
	"github.com/countersign/countersign/broker/api"
	"github.com/countersign/countersign/broker/api/event"
	"github.com/countersign/countersign/broker/internal/front/challenge"
	"github.com/countersign/countersign/broker/internal/issue"
	"github.com/countersign/countersign/broker/internal/lease"
	"github.com/countersign/countersign/broker/internal/lease/journal"
	"github.com/countersign/countersign/broker/internal/policy"
	"github.com/countersign/countersign/broker/internal/state/audit"
	"github.com/countersign/countersign/broker/internal/state/budget"
	"github.com/countersign/countersign/broker/internal/state/inventory"
	"github.com/countersign/countersign/broker/internal/state/store"
	"github.com/countersign/countersign/internal/bounded"
)

// An Order is a request for one credential.
type Order struct {
	Evidence
	Scope       string
	Program     []byte
	CSR         []byte
	Replaces    string
	DeliveryID  string
	BeforeStart bool
	HandOver    bool
}

// An Issued credential, or the answer of a scope that only observes.
type Issued struct {
	Lease     journal.Lease
	Fields    []issue.Field
	ReplaceAt time.Time // when to ask for its successor
	Ticket    []byte
	Observe   bool
}

const maxDeliveryID = 64

// Issue appraises, decides and issues.
func (d *Desk) Issue(ctx context.Context, conn *challenge.Conn, o Order, request string) (Issued, error) {
	if o.DeliveryID == "" || len(o.DeliveryID) > maxDeliveryID || len(o.Program) == 0 {
		return Issued{}, api.NewError(api.Fault, "request", "a request names its delivery in at most 64 bytes and brings program evidence")
	}
	mayIssue := func(tx *store.Tx, h inventory.Host) error { return d.mayIssue(tx, h.ID, o) }
	p, err := d.appraise(ctx, conn, evidence.CallIssue, o.Evidence, o.Program, request, mayIssue)
	if err != nil {
		return Issued{}, err
	}
	now := d.Now()
	p.verified = p.verified.WithRisk(p.risk.Of(o.Scope))
	decision := p.set.Decide(p.verified, o.Scope, now)
	result := decision.Result()
	if result.Outcome != policy.Allowed || decision.Scope().Observe {
		return d.notIssued(ctx, p, decision, o, request, now)
	}
	scope := decision.Scope()
	g, c, err := d.Leases.Issue(ctx, decision, lease.Request{
		DeliveryID: o.DeliveryID, Replaces: o.Replaces, HandOver: o.HandOver, CSR: o.CSR, ID: request, Sources: []string{conn.Address},
		With: func(tx *store.Tx) error {
			budget.Of(tx).Spend(p.host.ID, 0, len(o.Program), now) // the lease keeps it
			if _, err := p.save(tx, now.Add(scope.Reprove+scope.Grace)); err != nil {
				return err
			}
			return keepDecision(tx, p.host.ID, result, p.verified.Facts())
		},
	})
	var wrong *issue.OrderError
	if errors.As(err, &wrong) {
		return Issued{}, api.NewError(api.Fault, wrong.Part, wrong.Error())
	}
	if errors.Is(err, lease.ErrReplaces) {
		return Issued{}, api.NewError(api.Fault, api.CheckGone, err.Error())
	}
	if errors.Is(err, lease.ErrHeld) {
		return Issued{}, api.NewError(api.Fault, api.CheckHeld, err.Error())
	}
	if errors.Is(err, lease.ErrTooMany) {
		return Issued{}, api.NewError(api.Fault, "too-many", err.Error())
	}
	if err != nil {
		return Issued{}, err
	}
	ticket, err := d.ticket(g)
	if err != nil {
		return Issued{}, err
	}
	full := now.Add(scope.TTL)
	if c.Whole {
		full = g.Expires
	}
	return Issued{Lease: g, Fields: c.Fields, ReplaceAt: replaceAt(now, full, scope), Ticket: ticket}, nil
}

// replaceAt leaves the overlap, and a third of the life for a broker or Vault
// that is away.
func replaceAt(now, end time.Time, scope *policy.Scope) time.Time {
	return now.Add((end.Sub(now) - scope.Overlap) * 2 / 3)
}

// notIssued records a decision that issues nothing, and takes away what stands
// on the ground that it denies.
func (d *Desk) notIssued(ctx context.Context, p proven, decision policy.Decision, o Order, request string, now time.Time) (Issued, error) {
	result := decision.Result()
	observe := decision.Scope() != nil && decision.Scope().Observe
	told := event.Decided{As: event.CredentialRefused, Decision: result.Event(), Evidence: decision.Evidence()}
	switch {
	case observe:
		told.As = event.CredentialObserved
	case result.Outcome == policy.Fault:
		told.As = event.CredentialFault
	}
	err := d.Store.Update(ctx, store.Host(p.host.ID), func(tx *store.Tx) error {
		if _, err := p.save(tx, time.Time{}); err != nil {
			return err
		}
		if decision.Scope() != nil {
			if err := keepDecision(tx, p.host.ID, result, p.verified.Facts()); err != nil {
				return err
			}
		}
		return audit.AppendOnce(tx, event.Record{Time: now, Actor: "host:" + p.host.ID, Host: p.host.ID, Scope: bounded.Text(o.Scope, maxWord), Request: request},
			told, sameDecision(told.As, decision), programOf(decision)...)
	})
	if err != nil {
		return Issued{}, err
	}
	switch {
	case observe:
		return Issued{Observe: true}, nil
	case result.Outcome == policy.Fault:
		return Issued{}, api.NewError(api.Fault, "policy", result.Reason)
	}
	instance := p.verified.Facts().Program.Instance().String()
	if err := d.revokeWhere(ctx, p.host.ID, o.Scope, func(g journal.Lease) bool {
		return g.Instance == instance || g.ID == o.Replaces
	}, "refused: "+result.Reason, request); err != nil {
		return Issued{}, err
	}
	return Issued{}, refusal(result)
}

// sameDecision is what decisions that issue nothing have in common where the log counts
// them: the scope that there is, and the selector that said no. The program isn't part
// of it, as a host can make up any number of them.
func sameDecision(as event.Kind, decision policy.Decision) string {
	if decision.Scope() == nil {
		return string(as) + " no such scope"
	}
	r := decision.Result()
	check := ""
	for _, s := range r.Selectors {
		if s.Result != "pass" {
			check = s.Name
			break
		}
	}
	return fmt.Sprintf("%s %s %s", as, r.Scope, check)
}

// programOf tells apart, as long as there are few, which programs asked for which scopes.
func programOf(decision policy.Decision) []string {
	p := decision.Facts().Program
	if p == nil {
		return nil
	}
	return []string{decision.Result().Scope, p.User, p.Unit(), p.Main().Path, p.Main().SHA256.String()}
}

func (d *Desk) revokeWhere(ctx context.Context, host, scope string, which func(journal.Lease) bool, reason, request string) error {
	var leases []journal.Lease
	if err := d.Store.View(ctx, func(tx *store.Tx) (err error) {
		leases, err = journal.List(tx, journal.Filter{Host: host, Scope: scope, States: journal.Unended})
		return err
	}); err != nil {
		return err
	}
	for _, g := range leases {
		if g.Unreadable != nil || !which(g) {
			continue
		}
		if _, err := d.Leases.Event(ctx, g.ID, journal.Revoke{Reason: reason}, lease.Cause{Actor: "broker", Request: request, Later: true}); err != nil {
			return err
		}
	}
	return nil
}

// maxWord bounds a text that a host chooses, in the audit.
const maxWord = 128

// Acknowledge makes a provisional lease live.
func (d *Desk) Acknowledge(ctx context.Context, conn *challenge.Conn, id, delivery, request string) (journal.Lease, error) {
	g, err := d.own(ctx, conn, id)
	if err != nil {
		return g, err
	}
	if g.DeliveryID != delivery || g.State == journal.Revoking || g.State == journal.Gone {
		return g, api.NewError(api.Fault, api.CheckGone, "the lease has ended; request a new credential")
	}
	g, err = d.Leases.Event(ctx, id, journal.Acknowledged{}, lease.Cause{Actor: "host:" + g.Host, Request: request})
	if err != nil {
		return g, err
	}
	if !g.Settled {
		// The host keeps the old credential at hand until this succeeds.
		return g, api.NewError(api.Fault, "not-extended", "the issuer has not given the credential its length yet; acknowledge again")
	}
	return g, nil
}

// own loads a lease of the host that speaks.
func (d *Desk) own(ctx context.Context, conn *challenge.Conn, id string) (journal.Lease, error) {
	var g journal.Lease
	_, err := d.host(ctx, conn, func(tx *store.Tx, h inventory.Host) (err error) {
		if g, err = journal.Load(tx, id); err == nil && g.Host != h.ID {
			err = journal.ErrUnknown
		}
		return err
	})
	if errors.Is(err, journal.ErrUnknown) {
		return journal.Lease{}, api.NewError(api.Fault, api.CheckGone, "this host has no such lease")
	}
	return g, err
}

// Release ends leases that the host gives back, and returns those whose end is
// confirmed. Only a host's own leases can be named, and giving up needs no
// fresh evidence: it takes nothing that the caller could not drop anyway.
func (d *Desk) Release(ctx context.Context, conn *challenge.Conn, ids []string, reason, request string) (confirmed []string, err error) {
	for _, id := range ids {
		g, err := d.own(ctx, conn, id)
		var e *api.Error
		if errors.As(err, &e) && e.Check == api.CheckGone {
			confirmed = append(confirmed, id)
			continue
		}
		if err != nil {
			return confirmed, err
		}
		g, err = d.Leases.Event(ctx, id, journal.Revoke{Reason: "released by the host: " + bounded.Text(reason, maxWord)}, lease.Cause{Actor: "host:" + g.Host, Request: request})
		if err != nil {
			return confirmed, err
		}
		if g.State == journal.Gone {
			confirmed = append(confirmed, id)
		}
	}
	return confirmed, nil
}

// ticket is the lease in the broker's signed words, for the agent to keep.
func (d *Desk) ticket(g journal.Lease) ([]byte, error) {
	t := ticket{Lease: g, Due: g.Due, Instance: g.Instance, Delivery: g.DeliveryID, Issued: g.Issued, Until: g.TicketEnd()}
	t.Lease.Facts = nil
	body, err := json.Marshal(t)
	if err != nil {
		return nil, err
	}
	return note.Sign(&note.Note{Text: ticketHeader + string(body) + "\n"}, d.Signer)
}

const ticketHeader = "countersign lease\n"

type ticket struct {
	Lease    journal.Lease `json:"grant"`
	Due      time.Time     `json:"due"`
	Instance string        `json:"instance"`
	Delivery string        `json:"delivery"`
	Issued   time.Time     `json:"issued"`
	Until    time.Time     `json:"until"`
}
