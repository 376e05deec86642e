package admin

import (
	"cmp"
	"context"
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	boot "github.com/countersign/countersign/attestors/boot/appraise"
	"github.com/countersign/countersign/attestors/process"
	"github.com/countersign/countersign/broker/api/event"
	"github.com/countersign/countersign/broker/internal/lease"
	"github.com/countersign/countersign/broker/internal/lease/journal"
	"github.com/countersign/countersign/broker/internal/policy"
	"github.com/countersign/countersign/broker/internal/state/findings"
	"github.com/countersign/countersign/broker/internal/state/inventory"
	"github.com/countersign/countersign/broker/internal/state/store"
	"github.com/countersign/countersign/broker/internal/verify/appraise"
)

// A Loss is a live lease that a new set would end.
type Loss struct{ Host, Scope, Lease, Reason string }

// Plan is what applying a set would do.
type Plan struct {
	Set     *policy.Set
	Scopes  []policy.Change
	Losses  []Loss // the first ones
	Loses   uint64 // live leases
	Keeps   uint64 // live leases
	Version int64  // that Apply put in force; 0 where it was only planned
}

// Apply puts a whole set in force as one version, or plans it. Leases keep
// what they have until they prove themselves again under the new set.
func (d *Desk) Apply(ctx context.Context, a Actor, files []policy.File, planOnly bool) (Plan, error) {
	need := Admin
	if planOnly {
		need = Viewer
	}
	if err := a.need(need); err != nil {
		return Plan{}, err
	}
	set, err := d.ParseSet(files)
	if err != nil {
		return Plan{}, invalid("%v", err)
	}
	old, err := d.inForce(ctx)
	if err != nil {
		return Plan{}, err
	}
	p := Plan{Set: set, Scopes: policy.Diff(old, set)}
	if err := d.planLeases(ctx, &p); err != nil || planOnly {
		return p, err
	}
	text, err := json.Marshal(files)
	if err != nil {
		return p, err
	}
	told := event.Policy{}
	for _, c := range p.Scopes {
		told.Scopes = append(told.Scopes, event.ScopeChange(c))
	}
	for _, f := range files {
		told.Files = append(told.Files, event.File(f))
	}
	err = d.act(ctx, a, Admin, store.Any(store.Scopes), told, func(tx *store.Tx, _ *event.Record) error {
		if err := tx.QueryRow(`SELECT COALESCE(MAX(version), 0) + 1 FROM policies`).Scan(&p.Version); err != nil {
			return err
		}
		_, err := tx.Exec(`INSERT INTO policies (version, files, applied, by_whom) VALUES (?, ?, ?, ?)`, p.Version, string(text), store.Millis(d.Now()), a.Name)
		return err
	})
	if err != nil {
		return Plan{}, err
	}
	set.Version = p.Version
	return p, nil
}

// inForce returns the set in force.
func (d *Desk) inForce(ctx context.Context) (set *policy.Set, err error) {
	err = d.Store.View(ctx, func(tx *store.Tx) error {
		set, err = d.Policy(tx)
		return err
	})
	return set, err
}

// InForce caches the set in force, which is parsed once after each time that scopes are
// applied. If none ever were, the set is empty and has version 0.
func InForce(parse func([]policy.File) (*policy.Set, error)) *store.Cache[*policy.Set] {
	return &store.Cache[*policy.Set]{Topic: store.Scopes, Read: func(tx *store.Tx) (*policy.Set, error) { return readPolicy(tx, parse) }}
}

func readPolicy(tx *store.Tx, parse func([]policy.File) (*policy.Set, error)) (*policy.Set, error) {
	var version int64
	var text string
	err := tx.QueryRow(`SELECT version, files FROM policies ORDER BY version DESC LIMIT 1`).Scan(&version, &text)
	if errors.Is(err, sql.ErrNoRows) {
		return parse(nil)
	}
	if err != nil {
		return nil, err
	}
	var files []policy.File
	if err := json.Unmarshal([]byte(text), &files); err != nil {
		return nil, fmt.Errorf("policy version %d: %w", version, err)
	}
	set, err := parse(files)
	if err != nil {
		return nil, fmt.Errorf("policy version %d no longer parses: %w", version, err)
	}
	set.Version = version
	return set, nil
}

const (
	// planPage is how many hosts are looked at for a plan in one snapshot.
	planPage = 50
	// maxLosses bounds the leases that a plan names.
	maxLosses = 1000
)

// planLeases replays the recorded evidence of live leases under the plan's set, host by
// host.
func (d *Desk) planLeases(ctx context.Context, p *Plan) error {
	var after inventory.Cursor
	for more := true; more; {
		if err := d.Store.Report(ctx, func(tx *store.Tx) error {
			hosts, err := inventory.ByName(tx, after, planPage)
			if err != nil {
				return err
			}
			for _, h := range hosts {
				after = h.Cursor()
				if err := d.planHost(tx, p, h.ID); err != nil {
					return err
				}
			}
			more = len(hosts) == planPage
			return nil
		}); err != nil {
			return err
		}
	}
	return nil
}

func (d *Desk) planHost(tx *store.Tx, p *Plan, id string) error {
	leases, err := journal.List(tx, journal.Filter{Host: id, States: []journal.State{journal.Live, journal.Provisional}})
	if err != nil || len(leases) == 0 {
		return err
	}
	host, err := lastAppraised(tx, id)
	var odd error
	if errors.Is(err, inventory.ErrUnreadable) {
		odd, err = err, nil
	}
	if err != nil {
		return err
	}
	risk, err := findings.OfHost(tx, id)
	if err != nil {
		return err
	}
	for _, g := range leases {
		facts, err := factsOf(g, host)
		if err = cmp.Or(odd, err); err != nil {
			// One row that can't be read keeps no set from being applied.
			p.lose(Loss{Host: g.Host, Scope: g.Scope, Lease: g.ID, Reason: "not known: " + err.Error()})
			continue
		}
		facts.Subject.Risk = risk.Of(g.Scope)
		if r := p.Set.Evaluate(g.Scope, facts, d.Now()); r.Outcome != policy.Allowed {
			p.lose(Loss{Host: g.Host, Scope: g.Scope, Lease: g.ID, Reason: r.Reason})
		} else {
			p.Keeps++
		}
	}
	return nil
}

// factsOf are the facts that a lease was last decided on, on its host as it was last
// appraised.
func factsOf(g journal.Lease, host appraise.Host) (appraise.Facts, error) {
	if g.Unreadable != nil {
		return appraise.Facts{}, g.Unreadable
	}
	var recorded appraise.Recorded
	if err := json.Unmarshal(g.Facts, &recorded); err != nil {
		return appraise.Facts{}, fmt.Errorf("lease %s: recorded facts: %w", g.ID, err)
	}
	var program process.Program
	if err := json.Unmarshal(g.Subject, &program); err != nil {
		return appraise.Facts{}, fmt.Errorf("lease %s: subject: %w", g.ID, err)
	}
	recorded.Program = &program
	return recorded.Of(host), nil
}

func (p *Plan) lose(l Loss) {
	p.Loses++
	if len(p.Losses) < maxLosses {
		p.Losses = append(p.Losses, l)
	}
}

// lastAppraised is a host as it last proved itself, with its labels of now.
func lastAppraised(tx *store.Tx, id string) (appraise.Host, error) {
	h, err := inventory.Get(tx, id)
	if err != nil {
		return appraise.Host{}, err
	}
	return appraised(h)
}

func appraised(h inventory.Host) (appraise.Host, error) {
	var f appraise.Facts
	if err := json.Unmarshal(h.Facts, &f); err != nil {
		return f.Host, fmt.Errorf("%w: %s: recorded facts: %w", inventory.ErrUnreadable, h.ID, err)
	}
	f.Host.ID, f.Host.Labels = h.ID, h.Labels
	return f.Host, nil
}

// Facts are what the broker last appraised of a host, as CEL sees them, with the
// risk of now: the host's own, or that of its programs in a scope.
func (d *Desk) Facts(ctx context.Context, a Actor, host, scope string) (facts json.RawMessage, err error) {
	if err := a.need(Viewer); err != nil {
		return nil, err
	}
	err = d.Store.Report(ctx, func(tx *store.Tx) error {
		h, err := inventory.Find(tx, host)
		if err != nil {
			return err
		}
		if len(h.Facts) <= len("{}") {
			return invalid("host %s has not proven itself yet", h.ID)
		}
		facts, err = factsWithRisk(tx, h.Facts, scope)
		return err
	})
	return facts, err
}

// An Explanation is a decision on a scope for a host, and what it rests on.
type Explanation struct {
	policy.Result
	At   time.Time  // of the evidence
	PCRs []boot.PCR // what the event log proves, by the host's last proof
}

// Why is the last decision on a scope for a host, held against the set in
// force and the findings that are open now.
func (d *Desk) Why(ctx context.Context, a Actor, host, scope string) (Explanation, error) {
	if err := a.need(Viewer); err != nil {
		return Explanation{}, err
	}
	var f appraise.Facts
	var h inventory.Host
	var set *policy.Set
	err := d.Store.Report(ctx, func(tx *store.Tx) (err error) {
		var text string
		var at int64
		if set, err = d.Policy(tx); err != nil {
			return err
		}
		if h, err = inventory.Find(tx, host); err != nil {
			return err
		}
		err = tx.QueryRow(`SELECT at, facts FROM decisions WHERE host_id = ? AND scope = ?`, h.ID, scope).Scan(&at, &text)
		if errors.Is(err, sql.ErrNoRows) {
			return invalid("host %s never asked for scope %s with good evidence; `countersign audit tail` shows what it did", h.ID, scope)
		}
		if err != nil {
			return err
		}
		var recorded appraise.Recorded
		if err := json.Unmarshal([]byte(text), &recorded); err != nil {
			return fmt.Errorf("host %s, scope %s: recorded facts: %w", h.ID, scope, err)
		}
		host, err := appraised(h)
		if err != nil {
			return err
		}
		recorded.At = store.Time(at)
		f, err = withRisk(tx, recorded.Of(host), scope)
		return err
	})
	if err != nil {
		return Explanation{}, err
	}
	r := set.Evaluate(scope, f, d.Now())
	if h.State == inventory.Quarantined || h.State == inventory.Failed || h.State == inventory.Removed {
		// Whatever the scope says of its last evidence.
		r.Outcome, r.Reason = policy.Refused, fmt.Sprintf("the host is %s: %s", h.State, h.Reason)
	}
	e := Explanation{Result: r, At: f.At}
	if log := f.Host.EventLog; log != nil {
		e.PCRs = log.States
	}
	return e, nil
}

// List reads leases by the time of issue, and the names of their hosts.
func (d *Desk) List(ctx context.Context, a Actor, f journal.Filter) (list []journal.Lease, names map[string]string, err error) {
	if err := a.need(Viewer); err != nil {
		return nil, nil, err
	}
	for _, state := range f.States {
		if state != journal.Gone && !slices.Contains(journal.Unended, state) {
			return nil, nil, invalid("no state %q: intended, provisional, live, retiring, revoking or gone", state)
		}
	}
	err = d.Store.Report(ctx, func(tx *store.Tx) error {
		if f.Host != "" {
			h, err := inventory.Find(tx, f.Host)
			if err != nil {
				return err
			}
			f.Host = h.ID
		}
		if list, err = journal.List(tx, f); err != nil {
			return err
		}
		hosts := map[string]bool{}
		for _, g := range list {
			hosts[g.Host] = true
		}
		names, err = inventory.Names(tx, slices.Collect(maps.Keys(hosts)))
		return err
	})
	return list, names, err
}

// Lease is one lease.
func (d *Desk) Lease(ctx context.Context, a Actor, id string) (g journal.Lease, err error) {
	if err := a.need(Viewer); err != nil {
		return g, err
	}
	err = d.Store.View(ctx, func(tx *store.Tx) error {
		g, err = journal.Load(tx, id)
		return err
	})
	return g, err
}

// Revoke ends leases by id, or all of a host or a scope.
func (d *Desk) Revoke(ctx context.Context, a Actor, ids []string, host, scope, reason string) ([]string, error) {
	if len(ids) == 0 && host == "" && scope == "" {
		return nil, invalid("say which leases: by id, --host or --scope")
	}
	if reason == "" {
		reason = "revoked by " + a.Name
	}
	err := d.act(ctx, a, Responder, nil, event.Revocation{Leases: ids, Host: host, Scope: scope, Reason: reason}, func(tx *store.Tx, r *event.Record) error {
		for _, id := range ids {
			if _, err := journal.Load(tx, id); err != nil {
				return err
			}
		}
		if host == "" {
			return nil
		}
		h, err := inventory.Find(tx, host)
		host, r.Host = h.ID, h.ID
		return err
	})
	if err != nil {
		return nil, err
	}
	cause := lease.Cause{Actor: "operator:" + a.Name, Request: a.Request}
	var revoking []string
	for _, id := range ids {
		if _, err := d.Leases.Event(ctx, id, journal.Revoke{Reason: reason}, cause); err != nil {
			return revoking, err
		}
		revoking = append(revoking, id)
	}
	if host == "" && scope == "" {
		return revoking, nil
	}
	ended, err := d.Leases.RevokeAll(ctx, journal.Filter{Host: host, Scope: scope}, reason, cause, true)
	revoking = append(revoking, ended...)
	if err != nil || len(revoking) > 0 || scope == "" {
		return revoking, err
	}
	set, err := d.inForce(ctx)
	if err == nil && set.Scope(scope) == nil {
		err = invalid("no scope is called %s, and no lease is of one", scope)
	}
	return nil, err
}
