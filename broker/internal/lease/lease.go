// Package lease carries leases through their lives: it issues on an allowing
// decision, does what the journal's steps ask for, and sweeps up what a crash,
// an absent Vault or a silent host left behind.
//
// There is one executor. The request path, an operator's word and the sweeper
// all send an event to a lease by the same function, which writes the new
// state and its audit record in one transaction and only then acts. An act
// that gets lost is found by the lease's due time.
package lease

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"time"

	"github.com/countersign/countersign/broker/api/event"
	"github.com/countersign/countersign/broker/internal/issue"
	"github.com/countersign/countersign/broker/internal/lease/journal"
	"github.com/countersign/countersign/broker/internal/policy"
	"github.com/countersign/countersign/broker/internal/state/audit"
	"github.com/countersign/countersign/broker/internal/state/inventory"
	"github.com/countersign/countersign/broker/internal/state/store"
	"github.com/countersign/countersign/broker/internal/verify/appraise"
	"github.com/countersign/countersign/internal/faults"
)

// actTimeout bounds one call of an issuer.
const actTimeout = 20 * time.Second

// A Manager is safe for concurrent use.
type Manager struct {
	store   *store.Store
	issuers map[string]issue.Issuer // by the journal's kind
	log     *slog.Logger
	now     func() time.Time
	lanes   map[string]*lane // by the journal's kind
	guards  []func(*store.Tx) error

	mu      sync.Mutex
	running map[string]bool // guarded by mu; leases whose effects run right now
}

// New makes a manager; Sweep has to run beside it.
func New(s *store.Store, issuers map[string]issue.Issuer, log *slog.Logger, now func() time.Time) *Manager {
	m := &Manager{store: s, issuers: issuers, log: log, now: now, lanes: map[string]*lane{}, running: map[string]bool{}}
	for kind := range issuers {
		m.lanes[kind] = newLane(kind)
	}
	return m
}

// Guard adds a condition: while it returns an error, nothing new is issued, and Issue returns
// ErrHeld with it. What is in force is kept and revoked as before. Set guards before the first
// use.
func (m *Manager) Guard(g func(*store.Tx) error) { m.guards = append(m.guards, g) }

// ErrHeld is returned while nothing new is issued.
var ErrHeld = errors.New("nothing new is issued now")

// A Request is what beside the decision makes a lease.
type Request struct {
	DeliveryID string
	Replaces   string // lease id; must be the same host's and scope's
	HandOver   bool   // for the coming instance of the unit
	CSR        []byte
	ID         string // correlation id, in audit and in Vault's log
	Sources    []string
	With       func(*store.Tx) error // what else belongs into the intent's transaction
}

// Bounds of credentials whose end is not confirmed: a host has few programs, an
// instance of one needs a scope's credential and its successor, and each costs
// Vault a token and a user.
const (
	maxLeases      = 512 // of a host
	maxPerInstance = 8   // of one scope
)

// ErrTooMany says that a host, or a program on it, has as many as it may.
var ErrTooMany = errors.New("too many credentials at once")

// ErrReplaces says that a request wants to replace what isn't its own.
var ErrReplaces = errors.New("the lease to replace is not this host's, or of another scope")

// Issue makes a credential on d. The lease that it returns is provisional
// until Acknowledge.
func (m *Manager) Issue(ctx context.Context, d policy.Decision, r Request) (journal.Lease, issue.Credential, error) {
	if !d.Allows() || d.Facts().Program == nil {
		return journal.Lease{}, issue.Credential{}, errors.New("lease: no allowing decision")
	}
	issuer := m.issuer(d.Scope().Kind)
	order := issue.Order{Decision: d, Lease: inventory.NewID(), Host: d.Facts().Host.ID, CSR: r.CSR, Request: r.ID}
	prepared, err := issuer.Prepare(order)
	if err != nil {
		return journal.Lease{}, issue.Credential{}, err
	}
	g, err := m.intend(ctx, d, r, order.Lease, prepared)
	if err != nil {
		return g, issue.Credential{}, err
	}
	faults.Point("issue.intended")

	// From here on the lease is the journal's: a caller that goes away leaves
	// it to be finished, not half made.
	ctx = context.WithoutCancel(ctx)
	bounded, cancel := context.WithTimeout(ctx, actTimeout)
	defer cancel()
	order.Prepared, order.Now = prepared, m.now()
	c, err := issuer.Issue(bounded, order)
	faults.Point("issue.issued")
	if err != nil {
		if _, eventErr := m.Event(ctx, g.ID, journal.IssueFailed{Err: err}, Cause{Actor: "broker", Request: r.ID}); eventErr != nil {
			err = errors.Join(err, eventErr)
		}
		return g, issue.Credential{}, fmt.Errorf("issue for scope %s: %w", g.Scope, err)
	}
	g, err = m.Event(ctx, g.ID, journal.Issued{
		Ref: c.Ref, Names: c.Names, NotBefore: c.NotBefore, Expires: c.Expires, Whole: c.Whole, Static: c.Static,
	}, Cause{Actor: "broker", Request: r.ID})
	faults.Point("issue.recorded")
	if err != nil {
		return g, issue.Credential{}, err
	}
	if g.State != journal.Provisional {
		return g, issue.Credential{}, fmt.Errorf("the lease was given up while its issuer worked: %s", g.Reason)
	}
	return g, c, nil
}

// issuer returns the issuer of a kind, or issue.None for an unknown kind.
func (m *Manager) issuer(kind string) issue.Issuer {
	if i, ok := m.issuers[kind]; ok {
		return i
	}
	return issue.None(kind)
}

// maxLine bounds a kernel command line as a lease keeps it.
const maxLine = 4 << 10 // of most kernels

func machine(h appraise.Host) journal.Machine {
	m := journal.Machine{SecureBoot: h.SecureBoot, Reference: h.Reference}
	if h.EventLog != nil && h.EventLog.KernelCommandLine != nil {
		if m.CommandLine = *h.EventLog.KernelCommandLine; len(m.CommandLine) > maxLine {
			m.CommandLine = fmt.Sprintf("sha256:%x", sha256.Sum256([]byte(m.CommandLine)))
		}
	}
	return m
}

// intend writes the allow record and the intent in one transaction, and gives
// up what an earlier try of the same delivery made.
func (m *Manager) intend(ctx context.Context, d policy.Decision, r Request, id string, known issue.Prepared) (journal.Lease, error) {
	now := m.now()
	g, allowed, err := draft(d, r, id, known, now)
	if err != nil {
		return journal.Lease{}, err
	}

	var superseded []string
	err = m.store.Update(ctx, store.Host(g.Host).And(store.Lease(g.ID)), func(tx *store.Tx) (err error) {
		for _, guard := range m.guards {
			if err := guard(tx); err != nil {
				return fmt.Errorf("%w: %w", ErrHeld, err)
			}
		}
		if superseded, err = admissible(tx, g); err != nil {
			return err
		}
		// First what else belongs here: the host's facts, of which the allow has the digest.
		if err := r.With(tx); err != nil {
			return err
		}
		about := event.Record{Time: now, Actor: "host:" + g.Host, Host: g.Host, Scope: g.Scope, Lease: g.ID, Request: r.ID}
		if _, err := audit.Append(tx, about, allowed); err != nil {
			return err
		}
		return journal.Save(tx, g)
	})
	if err != nil {
		return g, err
	}

	for _, id := range superseded {
		if _, err := m.Event(ctx, id, journal.Revoke{Reason: "superseded by a repeated delivery"}, Cause{Actor: "host:" + g.Host, Request: r.ID, Later: true}); err != nil {
			return g, err
		}
	}
	m.due(g)
	return g, nil
}

// draft makes the lease and the audit event of an allowing decision.
func draft(d policy.Decision, r Request, id string, known issue.Prepared, now time.Time) (g journal.Lease, allowed event.Allowed, err error) {
	facts, scope := d.Facts(), d.Scope()
	recorded := facts.Recorded()
	allowed = event.Allowed{Decision: d.Result().Event(), Evidence: d.Evidence(), Names: known.Names}
	if allowed.HostFacts, err = facts.Host.Digest(); err != nil {
		return g, allowed, err
	}

	g = journal.Lease{
		ID: id, Host: facts.Host.ID, Scope: scope.Name, Kind: scope.Kind, Ref: known.Ref, Names: known.Names,
		DeliveryID: r.DeliveryID, Unit: facts.Program.Unit(), Boot: facts.Program.Boot, SHA256: facts.Program.Main().SHA256.String(),
		Machine: machine(facts.Host), Policy: d.Result().Policy, Audience: scope.Audience, Sources: r.Sources,
		TTL: scope.TTL, Overlap: scope.Overlap, Grace: scope.Grace, ProveBy: now.Add(scope.Reprove), Replaces: r.Replaces,
	}
	if g.Subject, err = facts.Program.Encode(); err != nil {
		return g, allowed, err
	}
	recorded.Program = nil // the subject has it
	if g.Facts, err = json.Marshal(recorded); err != nil {
		return g, allowed, err
	}
	if len(facts.Releases) > 0 {
		g.Release = facts.Releases[0]
	}
	if instance := facts.Program.Instance().String(); r.HandOver {
		g.From = instance
	} else {
		g.Instance = instance
	}
	return journal.Intend(g, now), allowed, nil
}

// admissible fails if the host must not have another lease. It returns the leases that an
// earlier try of the same delivery left behind.
func admissible(tx *store.Tx, g journal.Lease) (superseded []string, err error) {
	n, err := journal.CountUnended(tx, g.Host)
	if err != nil {
		return nil, err
	}
	if n >= maxLeases {
		return nil, ErrTooMany
	}

	earlier, err := journal.List(tx, journal.Filter{Host: g.Host, Delivery: g.DeliveryID, States: journal.Unended})
	if err != nil {
		return nil, err
	}
	for _, e := range earlier {
		if e.Unreadable == nil {
			superseded = append(superseded, e.ID)
		}
	}

	// Not all of the scope's: a host may have hundreds, and each is read whole.
	same, err := journal.List(tx, journal.Filter{Host: g.Host, Scope: g.Scope, Instance: &g.Instance, States: journal.Unended})
	if err != nil {
		return nil, err
	}
	own := 0
	for _, e := range same {
		if e.From == g.From {
			own++
		}
	}
	if own >= maxPerInstance {
		return nil, ErrTooMany
	}

	if g.Replaces != "" {
		old, err := journal.Load(tx, g.Replaces)
		if err != nil || old.Host != g.Host || old.Scope != g.Scope {
			return nil, ErrReplaces
		}
	}
	return superseded, nil
}

// A Cause says on whose word an event happened.
type Cause struct {
	Actor   string
	Request string
	Later   bool // act in the background: the caller doesn't wait for Vault
}

// recorded are the events that change what a credential is good for; the audit
// keeps them.
func recorded(e journal.Event) (kind event.Kind, ok bool) {
	switch e.(type) {
	case journal.Issued:
		return event.CredentialIssued, true
	case journal.IssueFailed:
		return event.CredentialFailed, true
	case journal.Acknowledged:
		return event.CredentialDelivered, true
	case journal.Replaced:
		return event.CredentialReplaced, true
	case journal.Revoke:
		return event.CredentialRevoking, true
	case journal.Revoked, journal.Vanished:
		return event.CredentialEnded, true
	}
	return "", false
}

// Event sends e to a lease and does what the step asks for. It returns the
// lease as it stands after that; an act that failed is not an error here, it
// is the lease's state.
func (m *Manager) Event(ctx context.Context, id string, e journal.Event, c Cause) (journal.Lease, error) {
	g, effects, err := m.record(ctx, id, e, c)
	if err != nil || len(effects) == 0 {
		return g, err
	}
	if !m.claim(g.ID) {
		return g, nil // who is at it sees the new state when that is done
	}
	if c.Later {
		m.start(ctx, step{g, effects}, c, func() {})
		return g, nil
	}
	defer m.release(g.ID)
	return m.act(context.WithoutCancel(ctx), g, effects, c)
}

// A step is what an event made of a lease, and what is to be done for it.
type step struct {
	lease   journal.Lease
	effects []journal.Effect
}

// record steps a lease and writes its new state and its audit record.
func (m *Manager) record(ctx context.Context, id string, e journal.Event, c Cause) (g journal.Lease, effects []journal.Effect, err error) {
	err = m.store.Update(ctx, store.Lease(id), func(tx *store.Tx) error {
		before, err := journal.Load(tx, id)
		if err != nil {
			return err
		}
		g, effects, err = m.advance(tx, before, e, c, m.now())
		return err
	})
	if err == nil {
		m.due(g)
	}
	return g, effects, err
}

// recordAll steps many leases in one transaction. One that can't be read, or that the
// event doesn't fit, is left as it is and returned in odd; the others go on.
func (m *Manager) recordAll(ctx context.Context, ids []string, e journal.Event, c Cause) (steps []step, odd map[string]error, err error) {
	err = m.store.Update(ctx, store.Lease(ids...), func(tx *store.Tx) (err error) {
		steps, odd, err = m.recordIn(tx, ids, e, c)
		return err
	})
	for _, s := range steps {
		m.due(s.lease)
	}
	return steps, odd, err
}

// recordIn is recordAll in the caller's transaction.
func (m *Manager) recordIn(tx *store.Tx, ids []string, e journal.Event, c Cause) (steps []step, odd map[string]error, err error) {
	odd = map[string]error{}
	now := m.now()
	for _, id := range ids {
		before, err := journal.Load(tx, id)
		if err != nil {
			odd[id] = err
			continue
		}
		g, effects, err := m.advance(tx, before, e, c, now)
		if errors.Is(err, errStep) {
			odd[id] = err
			continue
		}
		if err != nil {
			return nil, odd, err
		}
		steps = append(steps, step{g, effects})
	}
	return steps, odd, nil
}

// RevokeIn records in the caller's transaction that leases are to end, so that the reason
// and the revocation are on disk together. Begin has issuers asked, in the background; it
// is to be called once the transaction is durable. If it never is, the sweeper asks.
func (m *Manager) RevokeIn(tx *store.Tx, ids []string, reason string, c Cause) (begin func(context.Context), err error) {
	if err := tx.Also(store.Lease(ids...)); err != nil {
		return nil, err
	}
	steps, odd, err := m.recordIn(tx, ids, journal.Revoke{Reason: reason}, c)
	for id, err := range odd {
		m.log.Error("lease: not revoked", "lease", id, "err", err)
	}
	return func(ctx context.Context) {
		for _, s := range steps {
			m.due(s.lease)
			if len(s.effects) > 0 && m.claim(s.lease.ID) {
				m.start(ctx, s, c, func() {})
			}
		}
	}, err
}

// errStep is returned where an event doesn't fit a lease. Nothing is written then.
var errStep = errors.New("lease")

// advance steps a lease and keeps what the event made of it, with the audit record of
// it. In the same transaction goes what needs nobody outside: that the lease which this
// one replaces is replaced.
func (m *Manager) advance(tx *store.Tx, before journal.Lease, e journal.Event, c Cause, now time.Time) (journal.Lease, []journal.Effect, error) {
	g, effects, err := journal.Step(before, e, now)
	if err != nil {
		return g, nil, fmt.Errorf("%w: %w", errStep, err)
	}
	if err := recordStep(tx, before, g, e, c, now); err != nil {
		return g, nil, err
	}
	c = Cause{Actor: "broker", Request: c.Request}
	if i := slices.Index(effects, journal.DoReplace); i >= 0 {
		effects = slices.Delete(effects, i, i+1)
		if err := m.replaced(tx, g, c, now); err != nil {
			return g, nil, err
		}
	}
	return g, effects, journal.Save(tx, g)
}

// replaced marks the lease that g replaces, if it is still there. One that can't be read
// doesn't keep g from its length.
func (m *Manager) replaced(tx *store.Tx, g journal.Lease, c Cause, now time.Time) error {
	if err := tx.Also(store.Lease(g.Replaces)); err != nil {
		return err
	}
	before, err := journal.Load(tx, g.Replaces)
	switch {
	case errors.Is(err, journal.ErrUnknown):
		return nil
	case errors.Is(err, journal.ErrUnreadable):
		m.log.Error("lease: not marked as replaced", "lease", g.Replaces, "by", g.ID, "err", err)
		return nil
	case err != nil:
		return err
	}
	old, _, err := m.advance(tx, before, journal.Replaced{}, c, now)
	if err == nil {
		m.due(old)
	}
	return err
}

// recordStep writes the audit record of a step.
func recordStep(tx *store.Tx, before, g journal.Lease, e journal.Event, c Cause, now time.Time) error {
	kind, ok := recorded(e)
	if _, tick := e.(journal.Tick); tick {
		kind, ok = event.CredentialRevoking, true // all that time alone leads to
	}
	if !ok || g.State == before.State {
		return nil
	}
	_, err := audit.Append(tx, event.Record{Time: now, Actor: c.Actor, Host: g.Host, Scope: g.Scope, Lease: g.ID, Request: c.Request}, outcome(kind, g))
	return err
}

// outcome is what the audit says of a lease: how it can be found and ended
// elsewhere, and nothing secret.
func outcome(kind event.Kind, g journal.Lease) event.Outcome {
	return event.Outcome{As: kind, State: string(g.State), Reason: g.Reason, Names: g.Names, Expires: g.Expires,
		Unrotated: g.Unrotated, Error: g.LastError, Instance: g.Instance}
}

// act does the effects of one step, each with its own event after it, for who
// has claimed the lease. What the events ask for in turn, and a revocation that
// came in between, is done too.
func (m *Manager) act(ctx context.Context, g journal.Lease, effects []journal.Effect, c Cause) (journal.Lease, error) {
	for len(effects) > 0 {
		effect := effects[0]
		effects = effects[1:]
		next, more, err := m.record(ctx, g.ID, m.do(ctx, g, effect), Cause{Actor: "broker", Request: c.Request})
		if err != nil {
			return g, err
		}
		g = next
		effects = append(effects, more...)
		if g.State == journal.Revoking && effect != journal.DoRevoke && len(more) == 0 {
			effects = []journal.Effect{journal.DoRevoke}
		}
	}
	return g, nil
}

// do carries out one effect and returns the event that follows.
func (m *Manager) do(ctx context.Context, g journal.Lease, effect journal.Effect) journal.Event {
	ctx, cancel := context.WithTimeout(ctx, actTimeout)
	defer cancel()
	issuer := m.issuer(g.Kind)
	if effect == journal.DoExtend {
		until, err := issuer.Extend(ctx, handle(g), g.TTL)
		faults.Point("lease.extended")
		switch {
		case errors.Is(err, issue.ErrGone):
			return journal.Vanished{}
		case err != nil:
			m.log.Warn("lease: not extended, trying again", "lease", g.ID, "scope", g.Scope, "err", err)
			return journal.ExtendFailed{Err: err}
		}
		return journal.Extended{Expires: until}
	}
	err := issuer.Revoke(ctx, handle(g))
	faults.Point("lease.revoked")
	if err != nil {
		m.log.Warn("lease: revocation is not confirmed, trying again", "lease", g.ID, "scope", g.Scope, "attempt", g.Attempts+1, "err", err)
		return journal.RevokeFailed{Err: err}
	}
	return journal.Revoked{}
}

func handle(g journal.Lease) issue.Handle {
	return issue.Handle{Lease: g.ID, Scope: g.Scope, Ref: g.Ref, Issued: g.Issued, Expires: g.Expires}
}

func (m *Manager) claim(id string) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.running[id] {
		return false
	}
	m.running[id] = true
	return true
}

func (m *Manager) release(id string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	delete(m.running, id)
}

const (
	// revokePage is how many leases RevokeAll revokes in one transaction.
	revokePage = 64
	// confirmTime is how long RevokeAll waits for issuers to confirm the ends.
	confirmTime = 15 * time.Second
)

// RevokeAll revokes the unended leases that f selects and returns their ids. When it
// returns, every one of them is recorded as revoking; their ends are confirmed in the
// background. With wait it gives issuers a while to confirm them first.
func (m *Manager) RevokeAll(ctx context.Context, f journal.Filter, reason string, c Cause, wait bool) (ids []string, err error) {
	f.States, f.Limit = journal.Unended, revokePage
	var acts sync.WaitGroup
	for more := true; more; {
		var page []journal.Cursor
		if err := m.store.View(ctx, func(tx *store.Tx) (err error) {
			page, err = journal.Cursors(tx, f)
			return err
		}); err != nil {
			return ids, err
		}
		if len(page) == 0 {
			break
		}
		more, f.After = len(page) == revokePage, page[len(page)-1]
		of := make([]string, len(page))
		for i, at := range page {
			of[i] = at.ID
		}
		steps, odd, err := m.recordAll(ctx, of, journal.Revoke{Reason: reason}, c)
		if err != nil {
			return ids, err
		}
		for id, err := range odd {
			m.log.Error("lease: not revoked", "lease", id, "err", err)
		}
		for _, s := range steps {
			ids = append(ids, s.lease.ID)
			if len(s.effects) > 0 && m.claim(s.lease.ID) {
				acts.Add(1)
				m.start(ctx, s, c, acts.Done)
			}
		}
	}
	if wait {
		waitFor(ctx, &acts, confirmTime)
	}
	return ids, nil
}

func waitFor(ctx context.Context, acts *sync.WaitGroup, most time.Duration) {
	done := make(chan struct{})
	go func() { acts.Wait(); close(done) }()
	timer := time.NewTimer(most)
	defer timer.Stop()
	select {
	case <-done:
	case <-timer.C:
	case <-ctx.Done():
	}
}
