// Package hostapi answers hosts: it takes their evidence through appraisal,
// policy and issuing, and says which of the four outcomes came of it.
//
// It trusts a connection's key for who asks, and nothing else of a request
// before it was appraised. Evidence that is false costs the host its leases;
// a decision that says no costs the one credential; a fault costs nothing.
package hostapi

import (
	"bytes"
	"context"
	"crypto/x509"
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"slices"
	"strings"
	"time"

	"golang.org/x/mod/sumdb/note"

	"github.com/countersign/countersign/attestors/evidence"
	"github.com/countersign/countersign/attestors/tpm"
	tpmappraise "github.com/countersign/countersign/attestors/tpm/appraise"
	"github.com/countersign/countersign/broker/api"
	"github.com/countersign/countersign/broker/api/event"
	"github.com/countersign/countersign/broker/internal/front/challenge"
	"github.com/countersign/countersign/broker/internal/front/enroll"
	"github.com/countersign/countersign/broker/internal/front/pki"
	"github.com/countersign/countersign/broker/internal/lease"
	"github.com/countersign/countersign/broker/internal/lease/journal"
	"github.com/countersign/countersign/broker/internal/policy"
	"github.com/countersign/countersign/broker/internal/state/audit"
	"github.com/countersign/countersign/broker/internal/state/budget"
	"github.com/countersign/countersign/broker/internal/state/findings"
	"github.com/countersign/countersign/broker/internal/state/inventory"
	"github.com/countersign/countersign/broker/internal/state/store"
	"github.com/countersign/countersign/broker/internal/verify/appraise"
	"github.com/countersign/countersign/broker/internal/verify/logcache"
	"github.com/countersign/countersign/broker/internal/verify/refvalues"
)

// DefaultReprove is how often a host without a lease proves itself.
const DefaultReprove = 15 * time.Minute

// A Desk answers hosts.
type Desk struct {
	Store  *store.Store
	Leases *lease.Manager
	Policy func(*store.Tx) (*policy.Set, error) // the set in force
	Basis  *refvalues.Book
	Logs   *logcache.Cache
	CA     *pki.CA     // renews host certificates
	Signer note.Signer // of tickets
	Verify note.Verifier
	Log    *slog.Logger
	// Room fails where the store has none for new leases; nil: there is.
	Room func() error

	Continuations Continuations

	Now  func() time.Time // of leases
	Wall func() time.Time // of certificates
}

// Evidence is what a request proves itself with.
type Evidence struct {
	Body  []byte // the request, as sent
	Nonce []byte
	Quote tpm.Quote
	Boot  string
	OS    string
	Logs  appraise.Logs
}

// Challenge opens up to n nonces on conn, together with what is known now of
// the TPM's counters, and says what of the host's logs needn't be sent again.
func (d *Desk) Challenge(ctx context.Context, conn *challenge.Conn, n int) ([]evidence.Nonce, *appraise.Known, error) {
	h, err := d.host(ctx, conn, nothing)
	if err != nil {
		return nil, nil, err
	}
	return conn.Give(max(n, 1), challenge.Given{At: d.Now(), Seen: h.Counters, Continuity: h.Continuity}), d.Logs.Get(h.ID, h.StepUps), nil
}

// host finds the host of the connection and calls read in the same snapshot. It fails for a
// host that must not make requests.
func (d *Desk) host(ctx context.Context, conn *challenge.Conn, read func(*store.Tx, inventory.Host) error) (inventory.Host, error) {
	var h inventory.Host
	err := d.Store.View(ctx, func(tx *store.Tx) (err error) {
		if h, err = inventory.ByTLSKey(tx, conn.Key()); err != nil {
			return err
		}
		if err := admissible(h); err != nil {
			return err
		}
		return read(tx, h)
	})
	if errors.Is(err, inventory.ErrUnknown) {
		return h, api.NewError(api.Fault, api.CheckUnknownHost, "this broker knows no host with this key; join again")
	}
	return h, err
}

func nothing(*store.Tx, inventory.Host) error { return nil }

// admissible returns an error if the host must not make requests.
func admissible(h inventory.Host) error {
	return refused(h.Status())
}

// refused returns the error for a host that a good proof changes nothing of.
func refused(s inventory.Status) error {
	switch _, err := s.After(inventory.OnProve); {
	case errors.Is(err, inventory.ErrRemoved):
		return api.NewError(api.Rejected, "host-removed", "this host was removed")
	case errors.Is(err, inventory.ErrQuarantined):
		return api.NewError(api.Rejected, "host-quarantined", "this host is quarantined; an operator knows why")
	case errors.Is(err, inventory.ErrReenrolling), errors.Is(err, inventory.ErrNotJoined):
		return api.NewError(api.Fault, api.CheckReenrol, "an operator asks this host to join again")
	case errors.Is(err, inventory.ErrPending):
		return api.NewError(api.Fault, "host-pending", "this host waits for an operator's approval")
	default:
		return err
	}
}

// A proven host, and what to write of it in the transaction that acts on it.
type proven struct {
	host     inventory.Host
	risk     findings.Risk
	set      *policy.Set       // in force when the request was read
	verified appraise.Verified // without a scope's risk
	given    challenge.Given
	conn     *challenge.Conn
	shown    *int64 // what a proof continues from; nil: this is no proof
}

// appraise spends the nonce and holds the evidence against the host. Evidence
// that is false has failed the host when this returns. Where may says no, evidence isn't looked at.
func (d *Desk) appraise(ctx context.Context, conn *challenge.Conn, call evidence.Call, e Evidence, program []byte, request string, may func(*store.Tx, inventory.Host) error) (proven, error) {
	now := d.Now()
	var risk findings.Risk
	var set *policy.Set
	var held appraise.Basis
	var denied error
	h, err := d.host(ctx, conn, func(tx *store.Tx, h inventory.Host) (err error) {
		if denied = may(tx, h); denied != nil {
			return nil
		}
		if risk, err = findings.OfHost(tx, h.ID); err != nil {
			return err
		}
		if set, err = d.Policy(tx); err != nil {
			return err
		}
		held, err = d.Basis.For(tx, h.Reference, now)
		return err
	})
	if err != nil {
		return proven{}, err
	}
	known := d.Logs.Get(h.ID, h.StepUps)
	nonce, err := evidence.ParseNonce(e.Nonce)
	if err != nil {
		return proven{}, api.NewError(api.Retry, "nonce", err.Error())
	}
	given, err := conn.Take(nonce, now)
	if err != nil {
		return proven{}, api.NewError(api.Retry, "nonce", err.Error())
	}
	if denied != nil {
		return proven{}, denied
	}
	verified, err := appraise.Appraise(appraise.Bundle{
		Binding: conn.Binding(call, nonce, e.Body), Quote: e.Quote, Seen: given.Seen, Program: program,
		Boot: e.Boot, OS: e.OS, Address: conn.Address, Logs: e.Logs, Known: known,
	}, h, held, now)
	if err == nil {
		d.Logs.Put(h.ID, h.StepUps, known, verified.Known())
		return proven{host: h, risk: risk, set: set, verified: verified, given: given, conn: conn}, nil
	}
	if errors.Is(err, appraise.ErrResync) {
		d.Logs.Forget(h.ID)
		return proven{}, api.NewError(api.Retry, api.CheckResync, err.Error())
	}
	if errors.Is(err, appraise.ErrProgram) {
		return proven{}, api.NewError(api.Fault, "program-evidence", err.Error())
	}
	var rejected *evidence.Rejected
	if !errors.As(err, &rejected) {
		return proven{}, err
	}
	if rejected.Check == tpmappraise.CheckExtraData {
		return proven{}, api.NewError(api.Retry, string(rejected.Check), "the quote was made for another request, nonce or connection; is there a proxy between host and broker?")
	}
	return proven{}, d.reject(ctx, h, rejected, request)
}

// maxDetail bounds what is kept for good of why evidence was rejected.
const maxDetail = 4096

// reject fails the host and revokes its leases.
func (d *Desk) reject(ctx context.Context, h inventory.Host, r *evidence.Rejected, request string) error {
	found := inventory.OnFail
	r = &evidence.Rejected{Check: r.Check, Detail: strings.ToValidUTF8(r.Detail[:min(len(r.Detail), maxDetail)], "")}
	var failed event.Event = event.Failed{Check: string(r.Check), Detail: r.Detail}
	if r.Check == appraise.CheckCounters || r.Check == checkContinuation {
		found, failed = inventory.OnFork, event.Duplicate{Check: string(r.Check), Detail: r.Detail}
	}
	at := d.Now()
	err := d.Store.Update(ctx, store.Host(h.ID), func(tx *store.Tx) error {
		now, err := inventory.Get(tx, h.ID)
		if err != nil {
			return err
		}
		if !bytes.Equal(now.AKPublic, h.AKPublic) || now.Reenrolling {
			return errEnrolledAnew // with keys that this evidence says nothing of
		}
		before := now.Status()
		if now, err = now.After(found, fmt.Sprintf("%s: %s", r.Check, r.Detail)); err != nil {
			return err
		}
		about := event.Record{Time: at, Actor: "host:" + h.ID, Host: h.ID, Request: request}
		if now.Status() == before { // the log has that it is out
			err = audit.AppendOnce(tx, about, failed, string(failed.Kind())+" "+string(r.Check), r.Detail)
		} else {
			_, err = audit.Append(tx, about, failed)
		}
		if err != nil {
			return err
		}
		return inventory.Save(tx, now)
	})
	if err != nil {
		return err
	}
	d.Log.Warn("evidence rejected", "host", h.ID, "name", h.Name, "check", r.Check, "detail", r.Detail, "request", request)
	if _, err := d.Leases.RevokeAll(ctx, journal.Filter{Host: h.ID}, "evidence rejected: "+string(r.Check), lease.Cause{Actor: "broker", Request: request}, false); err != nil {
		return err
	}
	return api.NewError(api.Rejected, string(r.Check), "the evidence does not hold; an operator sees the details")
}

// save writes what a good proof says of its host: it is trusted, and its
// counters are at least this high. SilentAt is when it counts as silent; only a
// proof of all its leases may put that off. It returns the number that a proof is answered
// with; 0 for one that a later proof has overtaken, since nobody may continue from that.
func (p proven) save(tx *store.Tx, silentAt time.Time) (given int64, err error) {
	given, err = p.saveOver(tx, p.host.Standing(), silentAt)
	if !errors.Is(err, inventory.ErrChanged) {
		return given, err
	}
	h, err := inventory.StandingOf(tx, p.host.ID)
	if err != nil {
		return 0, err
	}
	if err := refused(h.Status()); err != nil {
		return 0, err
	}
	if !bytes.Equal(h.AKPublic, p.host.AKPublic) {
		return 0, errEnrolledAnew
	}
	return p.saveOver(tx, h, silentAt)
}

// errEnrolledAnew is returned for evidence of keys that the host no longer has.
var errEnrolledAnew = api.NewError(api.Fault, api.CheckReenrol, "the host was enrolled anew meanwhile")

// saveOver is save, if the host's row is still as h; otherwise it fails with
// inventory.ErrChanged.
func (p proven) saveOver(tx *store.Tx, h inventory.Standing, silentAt time.Time) (given int64, err error) {
	facts, next := p.verified.Facts(), h
	status, err := h.Status().After(inventory.OnProve)
	if err != nil {
		return 0, err
	}
	next.State = status.State
	counters := p.verified.Counters()
	if h.Counters == nil || h.Counters.Before(counters) {
		next.Counters = &counters
	}
	if p.shown != nil || h.SilentAt.IsZero() || !silentAt.IsZero() && silentAt.Before(h.SilentAt) {
		next.SilentAt = silentAt
	}
	if p.shown != nil && h.Continuity.Allows(*p.shown) {
		next.Continuity = h.Continuity.After(*p.shown)
		given = next.Continuity.Given
	}
	digest, err := facts.Host.Digest()
	if err != nil {
		return 0, err
	}
	next.FactsDigest = digest.String()
	kept := *facts
	kept.Program, kept.Subject = nil, appraise.Subject{}
	until, over := budget.Of(tx).Over(h.ID, facts.At)
	if over && h.State == inventory.Failed {
		return 0, overBudget(until) // it holds nothing, and each time that it fails again is in the log
	}
	if err := h.Become(tx, next, inventory.Showing{Address: p.conn.Address, PCRs: facts.Host.PCRs, Facts: kept, At: facts.At}); err != nil {
		return 0, err
	}
	if h.FactsDigest == next.FactsDigest {
		return given, nil
	}
	if over {
		return 0, overBudget(until) // the log would not have what an allow names
	}
	told, err := json.Marshal(facts.Host)
	if err != nil {
		return 0, err
	}
	_, err = audit.Append(tx, event.Record{Time: facts.At, Actor: "host:" + h.ID, Host: h.ID}, event.Facts{Facts: told, SHA256: next.FactsDigest})
	return given, err
}

// keepDecision keeps what `why` shows, where it differs from what is kept.
func keepDecision(tx *store.Tx, host string, r policy.Result, f *appraise.Facts) error {
	result, err := json.Marshal(r)
	if err != nil {
		return err
	}
	recorded := f.Recorded()
	recorded.At = time.Time{}
	facts, err := json.Marshal(recorded)
	if err != nil {
		return err
	}
	digest, have := evidence.Sum(slices.Concat(result, []byte{0}, facts)).String(), ""
	err = tx.QueryRow(`SELECT digest FROM decisions WHERE host_id = ? AND scope = ?`, host, r.Scope).Scan(&have)
	if have == digest || err != nil && !errors.Is(err, sql.ErrNoRows) {
		return err
	}
	budget.Of(tx).Spend(host, 0, len(result)+len(facts), f.At)
	_, err = tx.Exec(`INSERT INTO decisions (host_id, scope, at, result, facts, digest) VALUES (?, ?, ?, ?, ?, ?)
		ON CONFLICT (host_id, scope) DO UPDATE SET at = excluded.at, result = excluded.result, facts = excluded.facts, digest = excluded.digest`,
		host, r.Scope, store.Millis(f.At), string(result), string(facts), digest)
	return err
}

// refusal tells a host which selectors failed, and not what they wanted.
func refusal(r policy.Result) *api.Error {
	var failed []string
	for _, s := range r.Selectors {
		if s.Result == "fail" {
			failed = append(failed, s.Name)
		}
	}
	check := "policy"
	if len(failed) > 0 {
		check = failed[0]
	}
	return api.NewError(api.Refused, check, fmt.Sprintf("scope %s is not for this program on this host: %s; `countersign why HOST %s` tells an operator more", r.Scope, strings.Join(failed, ", "), r.Scope))
}

// jitter spreads proofs over a tenth of their interval, earlier.
func jitter(d time.Duration) time.Duration {
	return d - time.Duration(rand.Int64N(int64(d)/10+1))
}

func (d *Desk) renewCertificate(conn *challenge.Conn, host string, now time.Time) ([]byte, error) {
	key, err := x509.ParsePKIXPublicKey(conn.KeySPKI)
	if err != nil {
		return nil, err
	}
	return d.CA.Host(key, host, now, enroll.CertificateLifetime)
}
