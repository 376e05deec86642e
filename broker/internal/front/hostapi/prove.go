package hostapi

import (
	"cmp"
	"context"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
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
	"github.com/countersign/countersign/broker/internal/state/denials"
	"github.com/countersign/countersign/broker/internal/state/inventory"
	"github.com/countersign/countersign/broker/internal/state/store"
	"github.com/countersign/countersign/broker/internal/verify/appraise"
	"github.com/countersign/countersign/internal/lifetime"
)

// maxProofs bounds how many leases one proof speaks of.
const maxProofs = 256

// A LeaseProof is a lease and the program that holds it.
type LeaseProof struct {
	Lease   string
	Scope   string
	Program []byte
	Ticket  []byte
}

// A Proof is a host's proof of itself and of all the leases that it holds.
type Proof struct {
	Evidence
	Leases []LeaseProof
	// Certificate is the one that the connection was opened with.
	Certificate *x509.Certificate
	// Continuation is Proven.Continuation of the last answer that the host kept; empty: none.
	Continuation []byte
}

// A Verdict is what a proof means for one lease.
type Verdict struct {
	Lease   string
	Outcome string // "live", or a api.Outcome, or api.CheckGone
	Reason  string
	ProveBy time.Time
	Expires time.Time
}

// Proven is the answer to a proof.
type Proven struct {
	Host        inventory.Host
	ProveBy     time.Time
	Verdicts    []Verdict
	Certificate []byte // DER, where the old one nears its end
	// Continuation is what the next proof has to show.
	Continuation []byte
}

// Prove appraises a host and decides anew on each of its leases. A lease that
// the host no longer speaks of is revoked.
func (d *Desk) Prove(ctx context.Context, conn *challenge.Conn, proof Proof, request string) (Proven, error) {
	if len(proof.Leases) > maxProofs {
		return Proven{}, api.NewError(api.Fault, "request", "too many leases in one proof")
	}
	p, err := d.appraise(ctx, conn, evidence.CallProve, proof.Evidence, nil, request, nothing)
	if err != nil {
		return Proven{}, err
	}
	if err := d.continues(ctx, &p, proof.Continuation, request); err != nil {
		return Proven{}, err
	}

	now := d.Now()
	rows := store.Host(p.host.ID)
	for _, lp := range proof.Leases {
		rows = rows.And(store.Lease(lp.Lease))
	}
	var j judged
	var given int64
	err = d.Store.Update(ctx, rows, func(tx *store.Tx) (err error) {
		if j, err = d.judgeAll(tx, p, proof.Leases, now, request); err != nil {
			return err
		}
		given, err = p.save(tx, now.Add(j.reprove+j.grace))
		return err
	})
	if err != nil {
		return Proven{}, err
	}

	for _, e := range j.ends {
		if _, err := d.Leases.Event(ctx, e.lease, journal.Revoke{Reason: e.reason}, lease.Cause{Actor: "broker", Request: request, Later: true}); err != nil {
			return Proven{}, err
		}
	}
	out := Proven{Host: p.host, Verdicts: j.verdicts, ProveBy: now.Add(jitter(j.reprove)), Continuation: d.Continuations.seal(p.host.ID, given)}
	if wall := d.Wall(); lifetime.Due(proof.Certificate, wall) {
		if out.Certificate, err = d.renewCertificate(conn, p.host.ID, wall); err != nil {
			return Proven{}, err
		}
	}
	return out, nil
}

// continues holds what a proof continues from against what was known of the host when its
// nonce was given, and sets p.shown. It rejects the proof of a copy.
func (d *Desk) continues(ctx context.Context, p *proven, value []byte, request string) error {
	shown := d.Continuations.open(p.host.ID, value)
	if !p.given.Continuity.Allows(shown) {
		return d.reject(ctx, p.host, &evidence.Rejected{Check: checkContinuation,
			Detail: fmt.Sprintf("it continues from answer %d, and a later proof of this host has continued from another: two machines run with one TPM's state", shown)}, request)
	}
	p.shown = &shown
	return nil
}

// judged are a proof's leases, as they were judged.
type judged struct {
	verdicts       []Verdict
	ends           []struct{ lease, reason string } // to be revoked
	reprove, grace time.Duration                    // the shortest of those that go on
}

// judgeAll decides on the leases that a proof speaks of, and on those that it should.
func (d *Desk) judgeAll(tx *store.Tx, p proven, proofs []LeaseProof, now time.Time, request string) (j judged, err error) {
	j.reprove = DefaultReprove
	held := map[string]bool{}
	for _, lp := range proofs {
		if held[lp.Lease] {
			continue
		}
		held[lp.Lease] = true
		v, stop, err := d.judge(tx, p, lp, now, request)
		if err != nil {
			return j, err
		}
		if stop != "" {
			j.ends = append(j.ends, struct{ lease, reason string }{lp.Lease, stop})
		}
		if scope := p.set.Scope(lp.Scope); v.Outcome == live && scope != nil {
			j.reprove = min(j.reprove, scope.Reprove)
			if j.grace == 0 || scope.Grace < j.grace {
				j.grace = scope.Grace
			}
		}
		j.verdicts = append(j.verdicts, v)
	}
	if j.grace == 0 {
		j.grace = j.reprove
	}

	leases, err := journal.List(tx, journal.Filter{Host: p.host.ID, States: []journal.State{journal.Live}})
	if err != nil {
		return j, err
	}
	for _, g := range leases {
		// A lease that came while the proof was being made is not in it.
		if !held[g.ID] && g.Unreadable == nil && g.Acked.Add(issue.ProvisionalFor).Before(p.given.At) {
			j.ends = append(j.ends, struct{ lease, reason string }{g.ID, "the host no longer holds it"})
		}
	}
	return j, nil
}

const live = "live"

// judge decides on one lease, writes what stays, and says why it has to end
// where it has to.
func (d *Desk) judge(tx *store.Tx, p proven, lp LeaseProof, now time.Time, request string) (v Verdict, stop string, err error) {
	v = Verdict{Lease: lp.Lease}
	g, err := journal.Load(tx, lp.Lease)
	if errors.Is(err, journal.ErrUnknown) {
		g, err = d.adopt(tx, p, lp, now, request)
	}
	switch {
	case errors.Is(err, journal.ErrUnknown), err == nil && g.Host != p.host.ID:
		v.Outcome, v.Reason = api.CheckGone, "this host has no such lease"
		return v, "", nil
	case errors.Is(err, denials.ErrHeld):
		v.Outcome, v.Reason = string(api.Fault), err.Error()
		return v, "", nil
	case errors.Is(err, journal.ErrUnreadable):
		// The host's other leases are decided on all the same.
		v.Outcome, v.Reason = string(api.Fault), journal.ErrUnreadable.Error()
		return v, "", nil
	case err != nil:
		return v, "", err
	case g.State != journal.Live && g.State != journal.Retiring && g.State != journal.Provisional:
		v.Outcome, v.Reason = api.CheckGone, g.Reason
		return v, "", nil
	}
	if g.NotBefore.After(now) {
		// Nobody accepts it yet; the host asks for another at once.
		v.Outcome, v.Reason = api.CheckGone, "the credential was issued by a clock that was ahead, and is not valid yet"
		return v, v.Reason, nil
	}
	verified, err := p.verified.WithProgram(lp.Program)
	if err != nil {
		// Not understood is not untrue: nothing is decided.
		v.Outcome, v.Reason, v.Expires = string(api.Fault), err.Error(), g.Expires
		return v, "", nil
	}
	verified = verified.WithRisk(p.risk.Of(g.Scope))
	decision := p.set.Decide(verified, g.Scope, now)
	result := decision.Result()
	if decision.Scope() != nil {
		if err := keepDecision(tx, p.host.ID, result, verified.Facts()); err != nil {
			return v, "", err
		}
	}
	switch result.Outcome {
	case policy.Fault:
		v.Outcome, v.Reason, v.Expires = string(api.Fault), result.Reason, g.Expires
		return v, "", nil
	case policy.Refused:
		if decision.Scope().Observe {
			break
		}
		if _, err := audit.Append(tx, event.Record{Time: now, Actor: "host:" + g.Host, Host: g.Host, Scope: g.Scope, Lease: g.ID, Request: request},
			event.Decided{As: event.CredentialRefused, Decision: result.Event(), Evidence: decision.Evidence()}); err != nil {
			return v, "", err
		}
		v.Outcome, v.Reason = string(api.Refused), refusal(result).Message
		return v, "refused: " + result.Reason, nil
	}
	program := verified.Facts().Program
	switch instance := program.Instance().String(); {
	case g.Instance == instance, g.Instance == "" && g.From == instance:
		// The instance that has it, or the one that is about to hand it over.
	default:
		if !mayBind(g, verified.Facts(), decision.Scope()) {
			v.Outcome, v.Reason = api.CheckGone, "the lease was issued to another instance of the program"
			return v, "another instance asks with it: " + instance, nil
		}
		if until, over := budget.Of(tx).Over(g.Host, now); over {
			v.Outcome, v.Reason, v.Expires = string(api.Fault), overBudget(until).Message, g.Expires
			return v, "", nil
		}
		if g, _, err = journal.Step(g, journal.Bound{Instance: instance, Subject: lp.Program}, now); err != nil {
			return v, "", err
		}
		if _, err := audit.Append(tx, event.Record{Time: now, Actor: "host:" + g.Host, Host: g.Host, Scope: g.Scope, Lease: g.ID, Request: request},
			event.Bound{Instance: instance}); err != nil {
			return v, "", err
		}
	}
	if g.State == journal.Live || g.State == journal.Retiring {
		if g, _, err = journal.Step(g, journal.Proved{By: now.Add(decision.Scope().Reprove)}, now); err != nil {
			return v, "", err
		}
	}
	g.Sources = withSource(g.Sources, p.conn.Address)
	v.Outcome, v.ProveBy, v.Expires = live, g.ProveBy, g.Expires
	return v, "", journal.Save(tx, g)
}

// maxSources bounds the addresses that are kept of a lease's host.
const maxSources = 16

// withSource is sources with the address that the host proves itself from last:
// the newest are kept.
func withSource(sources []string, address string) []string {
	sources = slices.DeleteFunc(slices.Clone(sources), func(s string) bool { return s == address })
	sources = append(sources, address)
	return sources[max(0, len(sources)-maxSources):]
}

// mayBind says whether a lease may go to the instance that asks: the coming
// one of a hand-over, or, where the scope lets the unit have it while it
// starts, a later invocation of the same unit in the same boot. Both run the
// same file as the one that earned it.
func mayBind(g journal.Lease, f *appraise.Facts, scope *policy.Scope) bool {
	p := f.Program
	if g.Unit == "" || p.Unit() != g.Unit || p.Boot != g.Boot || p.Main().SHA256.String() != g.SHA256 {
		return false
	}
	return g.Instance == "" || scope.Process.BeforeStart
}

// adopt takes a lease back into the journal that this broker issued before its
// store was restored.
func (d *Desk) adopt(tx *store.Tx, p proven, lp LeaseProof, now time.Time, request string) (journal.Lease, error) {
	n, err := note.Open(lp.Ticket, note.VerifierList(d.Verify))
	if err != nil {
		return journal.Lease{}, journal.ErrUnknown
	}
	body, ok := strings.CutPrefix(n.Text, ticketHeader)
	if !ok {
		return journal.Lease{}, journal.ErrUnknown
	}
	var t ticket
	if err := json.Unmarshal([]byte(body), &t); err != nil {
		return journal.Lease{}, err
	}
	g := t.Lease
	if g.ID != lp.Lease || g.Host != p.host.ID || !now.Before(t.Until) {
		return journal.Lease{}, journal.ErrUnknown
	}
	if denied, err := denials.Has(tx, denials.Lease, g.ID); err != nil || denied {
		return journal.Lease{}, cmp.Or(err, journal.ErrUnknown)
	}
	if err := denials.Held(tx); err != nil {
		return journal.Lease{}, err
	}
	// Live and due at once: the sweeper asks the issuer how long it lives.
	g.State, g.Due, g.Instance, g.DeliveryID, g.Issued, g.Acked, g.Settled = journal.Live, now, t.Instance, t.Delivery, t.Issued, now, true
	g.Expires = t.Until
	recorded := p.verified.Facts().Recorded()
	recorded.Program = nil // the subject has it
	if g.Facts, err = json.Marshal(recorded); err != nil {
		return g, err
	}
	if _, err := audit.Append(tx, event.Record{Time: now, Actor: "host:" + g.Host, Host: g.Host, Scope: g.Scope, Lease: g.ID, Request: request},
		event.Adopted{Names: g.Names}); err != nil {
		return g, err
	}
	return g, journal.Save(tx, g)
}
