// Package fsck checks what of the invariants can be seen in store and audit
// log, without writing to either and while a broker may be running on them.
//
// It replays the log into the state that the store has to have: hosts, operators, join
// tokens, scopes, reference sets, releases and findings are compared with it.
//
// It reads page by page, each from a snapshot of its own, so that it needs little
// memory and doesn't keep the store's write-ahead log from shrinking. What looks
// wrong because the broker went on between two pages is looked at once more.
package fsck

import (
	"bytes"
	"context"
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"
	"hash/maphash"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/countersign/countersign/attestors/process"
	"github.com/countersign/countersign/broker/api/event"
	"github.com/countersign/countersign/broker/internal/lease/journal"
	"github.com/countersign/countersign/broker/internal/state/audit"
	"github.com/countersign/countersign/broker/internal/state/inventory"
	"github.com/countersign/countersign/broker/internal/state/store"
)

// A Violation is an invariant that does not hold.
type Violation struct {
	Invariant string `json:"invariant"`
	Detail    string `json:"detail"`
}

// A Report is what was looked at and what was wrong.
type Report struct {
	Records    int64       `json:"records"`
	Leases     int         `json:"grants"`
	Hosts      int         `json:"hosts"`
	Violations []Violation `json:"violations"` // the first thousand
	Total      int         `json:"total"`      // violations
}

// The invariants, in the words that scripts can look for.
const (
	AuditIntact    = "audit-intact"     // the log is what it was when it was written
	AllowFirst     = "allow-first"      // no lease without an allow recorded before it
	NothingLost    = "nothing-lost"     // every lease is ended, or will be looked at in time
	EndsRecorded   = "ends-recorded"    // what was issued and what ended stands in the log
	SilentSecrets  = "silent-secrets"   // no record looks like it holds a secret
	HostsAdmitted  = "hosts-admitted"   // no trusted host that nobody admitted
	OnlyTrustedNow = "revoked-on-no"    // no working lease of a host that was refused
	HostsReadable  = "hosts-readable"   // every host's row holds what a broker wrote
	AsRecorded     = "as-recorded"      // the store has what the log says was done, and nothing else
	CountsTrue     = "counts-true"      // the numbers that are kept are those that there are
	overdueBy      = 5 * time.Minute    // of a lease's due time, before it counts as forgotten
	secretPattern  = "hvs."             // of Vault's service tokens
	privatePattern = "PRIVATE KEY-----" // of PEM
)

const (
	// page is how many rows are read in one snapshot.
	page = 500
	// maxViolations bounds those that are reported one by one.
	maxViolations = 1000
)

// Progress receives what is being checked, how much of it is done, and how much there is.
type Progress func(what string, done, all int64)

type checker struct {
	store    *store.Store
	now      time.Time
	progress Progress
	report   Report
	log      audit.Verification
	traces   map[string]trace // by lease
	ledger   *ledger
	seed     maphash.Seed
}

// A trace is what the log has of a lease: indexes of records, counted from 1; 0: none.
type trace struct {
	allowed, issued, ended int64
	about                  uint64 // hash of host and scope
	endedAt                int64  // Unix seconds
	revoking, seen         bool   // seen in the journal
}

func (c *checker) about(host, scope string) uint64 {
	return maphash.String(c.seed, host+"\x00"+scope)
}

// forgotten is how long an ended lease is kept at least.
const forgotten = 24 * time.Hour

// aliveKey is when the broker last served, by package liveness.
const aliveKey = "silence.alive"

// served reads the broker's own time, as far as it served: by that, leases are overdue or
// not. The wall clock may have been set since its start, and while it is stopped nobody
// looks after a lease in time.
func (c *checker) served(ctx context.Context) error {
	return c.store.Report(ctx, func(tx *store.Tx) error {
		var text string
		err := tx.QueryRow(`SELECT value FROM meta WHERE name = ?`, aliveKey).Scan(&text)
		if errors.Is(err, sql.ErrNoRows) {
			return nil
		}
		if err != nil {
			return err
		}
		if ms, err := strconv.ParseInt(text, 10, 64); err == nil {
			c.now = store.Time(ms)
		}
		return nil
	})
}

// Check looks at everything once. Now counts where no broker has served from the store.
func Check(ctx context.Context, s *store.Store, now time.Time, progress Progress) (Report, error) {
	c := &checker{store: s, now: now, progress: progress, report: Report{Violations: []Violation{}}, traces: map[string]trace{}, ledger: newLedger(), seed: maphash.MakeSeed()}
	if err := c.served(ctx); err != nil {
		return c.report, err
	}
	if err := c.log.Verify(ctx, s, c.record); err != nil {
		return c.report, err
	}
	// Before the others, of which not all may be listed.
	broken := c.log.Problem != nil
	if broken {
		c.bad(AuditIntact, "%v", c.log.Problem)
	}
	hosts, err := c.hosts(ctx)
	if err != nil {
		return c.report, err
	}
	leases, err := c.leases(ctx)
	if err != nil {
		return c.report, err
	}
	if err := c.again(ctx, hosts, c.hostAgain); err != nil {
		return c.report, err
	}
	if err := c.again(ctx, leases, c.leaseAgain); err != nil {
		return c.report, err
	}
	if err := c.rest(ctx); err != nil {
		return c.report, err
	}
	if err := c.counts(ctx); err != nil {
		return c.report, err
	}
	c.report.Records = c.log.Tree.Size()
	if !broken && c.log.Problem != nil {
		c.bad(AuditIntact, "%v", c.log.Problem)
	}
	return c.report, nil
}

func (c *checker) bad(invariant, format string, args ...any) {
	c.report.Total++
	if len(c.report.Violations) < maxViolations {
		c.report.Violations = append(c.report.Violations, Violation{invariant, fmt.Sprintf(format, args...)})
	}
}

// record looks at one record of the log.
func (c *checker) record(index, all int64, body []byte) error {
	c.progress("records of the audit log", index+1, all)
	for _, pattern := range []string{secretPattern, privatePattern} {
		if bytes.Contains(body, []byte(pattern)) {
			c.bad(SilentSecrets, "record %d holds %q", index, pattern)
		}
	}
	h, err := event.Header(body)
	if err != nil {
		return nil // AuditIntact has it
	}
	if taken[h.Kind] {
		if h, err = event.Parse(body); err == nil {
			c.ledger.take(h)
		}
		return nil
	}
	t := c.traces[h.Lease]
	switch h.Kind {
	case event.CredentialAllowed, event.CredentialAdopted:
		t.allowed, t.about = index+1, c.about(h.Host, h.Scope)
		t.ended, t.revoking = 0, false // a lease that was adopted is again
	case event.CredentialIssued:
		t.issued = index + 1
	case event.CredentialRevoking:
		t.revoking = true
	case event.CredentialEnded:
		t.ended, t.endedAt = index+1, h.Time.Unix()
	default:
		return nil
	}
	c.traces[h.Lease] = t
	return nil
}

// hosts looks at every host, and returns the ids of those that don't look right.
func (c *checker) hosts(ctx context.Context) (suspects []string, err error) {
	missing := map[string]bool{}
	for id := range c.ledger.hosts {
		missing[id] = true
	}
	var after inventory.Cursor
	for more := true; more; {
		var list []inventory.Host
		if err := c.store.Report(ctx, func(tx *store.Tx) (err error) {
			if list, err = inventory.ByName(tx, after, page); err != nil {
				return err
			}
			for _, h := range list {
				if err := c.readable(tx, h.ID); err != nil {
					return err
				}
			}
			return nil
		}); err != nil {
			return nil, err
		}
		for _, h := range list {
			after = h.Cursor()
			delete(missing, h.ID)
			if h.Unreadable == nil && len(c.ledger.host(h)) > 0 {
				suspects = append(suspects, h.ID)
			}
			if (h.State == inventory.Trusted || h.State == inventory.Stale) && !h.Admitted {
				c.bad(HostsAdmitted, "host %s is %s, but nobody admitted it", h.ID, h.State)
			}
		}
		c.report.Hosts += len(list)
		more = len(list) == page
	}
	return slices.AppendSeq(suspects, maps.Keys(missing)), nil
}

// hostAgain reports what is wrong with a host, held against the log as it is in tx.
func (c *checker) hostAgain(tx *store.Tx, id string) error {
	h, err := inventory.Get(tx, id)
	switch {
	case errors.Is(err, inventory.ErrUnknown):
		c.bad(AsRecorded, "host %s: the log has it, and the store doesn't", id)
		return nil
	case errors.Is(err, inventory.ErrUnreadable):
		return nil // HostsReadable has it
	case err != nil:
		return err
	}
	for _, wrong := range c.ledger.host(h) {
		c.bad(AsRecorded, "host %s (%s): %s", h.ID, h.Name, wrong)
	}
	return nil
}

// rest compares what there is little of, in one snapshot with the log's end.
func (c *checker) rest(ctx context.Context) error {
	return c.store.Report(ctx, func(tx *store.Tx) error {
		if err := c.catchUp(tx); err != nil {
			return err
		}
		return c.ledger.rest(tx, func(format string, args ...any) { c.bad(AsRecorded, format, args...) })
	})
}

// readable reads a host whole: one that can't be read can't prove itself.
func (c *checker) readable(tx *store.Tx, id string) error {
	switch h, err := inventory.Get(tx, id); {
	case errors.Is(err, inventory.ErrUnreadable):
		c.bad(HostsReadable, "%v", err)
	case err != nil:
		return err
	case !json.Valid(h.Facts):
		c.bad(HostsReadable, "host %s: its facts are no JSON", id)
	}
	return nil
}

// leases looks at every lease, and returns the ids of those that don't look right.
func (c *checker) leases(ctx context.Context) (suspects []string, err error) {
	all, err := c.all(ctx)
	if err != nil {
		return nil, err
	}
	f := journal.Filter{Limit: page}
	for more := true; more; {
		if err := c.store.Report(ctx, func(tx *store.Tx) error {
			places, err := journal.Cursors(tx, f)
			if err != nil {
				return err
			}
			for _, at := range places {
				f.After = at
				if t, ok := c.traces[at.ID]; ok {
					t.seen = true
					c.traces[at.ID] = t
				}
				wrong, err := c.lease(tx, at.ID)
				if err != nil {
					return err
				}
				if len(wrong) > 0 {
					suspects = append(suspects, at.ID)
				}
			}
			c.report.Leases += len(places)
			more = len(places) == page
			return nil
		}); err != nil {
			return nil, err
		}
		c.progress("leases", int64(c.report.Leases), max(all, int64(c.report.Leases)))
	}
	for id, t := range c.traces {
		if !t.seen && t.allowed != 0 && c.kept(t) {
			suspects = append(suspects, id)
		}
	}
	return suspects, nil
}

// kept reports whether the journal has to have a lease still.
func (c *checker) kept(t trace) bool {
	return t.ended == 0 || c.now.Sub(time.Unix(t.endedAt, 0)) < forgotten
}

// all is how many leases there are, as far as the kept numbers say.
func (c *checker) all(ctx context.Context) (n int64, err error) {
	err = c.store.Report(ctx, func(tx *store.Tx) error {
		return tx.QueryRow(`SELECT COALESCE(SUM(n), 0) FROM counts WHERE topic = 'leases'`).Scan(&n)
	})
	return n, err
}

// again looks once more at what didn't look right, with what the log has got since, in
// one snapshot for each page.
func (c *checker) again(ctx context.Context, suspects []string, look func(*store.Tx, string) error) error {
	for len(suspects) > 0 {
		some := suspects[:min(len(suspects), page)]
		suspects = suspects[len(some):]
		if err := c.store.Report(ctx, func(tx *store.Tx) error {
			if err := c.catchUp(tx); err != nil {
				return err
			}
			for _, id := range some {
				if err := look(tx, id); err != nil {
					return err
				}
			}
			return nil
		}); err != nil {
			return err
		}
	}
	return nil
}

// leaseAgain reports what is wrong with a lease, held against the log as it is in tx.
func (c *checker) leaseAgain(tx *store.Tx, id string) error {
	wrong, err := c.lease(tx, id)
	for _, v := range wrong {
		c.bad(v.Invariant, "%s", v.Detail)
	}
	return err
}

// catchUp reads the records that came since the log was verified: of one snapshot
// with what they are held against.
func (c *checker) catchUp(tx *store.Tx) error {
	for {
		from := c.log.Tree.Size()
		if err := c.log.Page(tx, c.record); err != nil || c.log.Tree.Size() == from {
			return err
		}
	}
}

// lease is what is wrong with one lease, and with what the log has of it.
func (c *checker) lease(tx *store.Tx, id string) (wrong []Violation, err error) {
	bad := func(invariant, format string, args ...any) {
		wrong = append(wrong, Violation{invariant, fmt.Sprintf(format, args...)})
	}
	g, err := journal.Load(tx, id)
	switch {
	case errors.Is(err, journal.ErrUnknown):
		if t := c.traces[id]; t.allowed != 0 && c.kept(t) {
			bad(NothingLost, "lease %s: the log has it, and the journal doesn't", id)
		}
		return wrong, nil
	case errors.Is(err, journal.ErrUnreadable):
		bad(NothingLost, "%v", err)
		return wrong, nil
	case err != nil:
		return nil, err
	}
	t := c.traces[g.ID]
	if t.allowed == 0 {
		bad(AllowFirst, "lease %s of scope %s has no allow in the audit log", g.ID, g.Scope)
	}
	if t.issued != 0 && t.allowed != 0 && t.issued < t.allowed {
		bad(AllowFirst, "lease %s was issued in record %d, before its allow in %d", g.ID, t.issued-1, t.allowed-1)
	}
	if (g.State == journal.Gone) != (t.ended != 0) {
		bad(EndsRecorded, "lease %s is %s, and the audit log says otherwise", g.ID, g.State)
	}
	if t.allowed != 0 && t.about != c.about(g.Host, g.Scope) {
		bad(AsRecorded, "lease %s is of scope %s on host %s, and by the log of another", g.ID, g.Scope, g.Host)
	}
	if t.revoking && g.State != journal.Revoking && g.State != journal.Gone {
		bad(AsRecorded, "lease %s is %s, and by the log it is being revoked", g.ID, g.State)
	}
	if err := json.Unmarshal(g.Subject, &process.Program{}); err != nil {
		bad(AllowFirst, "lease %s: its subject: %v", g.ID, err)
	}
	if strings.Contains(g.LastError, secretPattern) {
		bad(SilentSecrets, "lease %s: its last error holds a token", g.ID)
	}
	if g.State == journal.Gone {
		return wrong, nil
	}
	if g.Due.IsZero() {
		bad(NothingLost, "lease %s is %s and nobody will look at it again", g.ID, g.State)
	} else if c.now.Sub(g.Due) > overdueBy {
		bad(NothingLost, "lease %s is %s and was due at %s", g.ID, g.State, g.Due.Format(time.RFC3339))
	}
	state, err := inventory.StateOf(tx, g.Host)
	if err != nil && !errors.Is(err, inventory.ErrUnknown) {
		return wrong, err
	}
	refused := state == inventory.Failed || state == inventory.Quarantined || state == inventory.Removed
	if refused && (g.State == journal.Live || g.State == journal.Retiring) {
		bad(OnlyTrustedNow, "lease %s is %s, but its host %s is %s", g.ID, g.State, g.Host, state)
	}
	return wrong, nil
}

// counts holds the numbers that the store keeps against what there is.
func (c *checker) counts(ctx context.Context) error {
	return c.store.Report(ctx, func(tx *store.Tx) error {
		return tx.Each(func(row store.Row) error {
			var topic, name string
			var kept, counted int64
			err := row.Scan(&topic, &name, &kept, &counted)
			if err == nil && kept != counted {
				c.bad(CountsTrue, "%s, %s: %d are counted, and there are %d", topic, name, kept, counted)
			}
			return err
		}, `WITH there (topic, name, n) AS (
			SELECT 'hosts', state, COUNT(*) FROM hosts GROUP BY state
			UNION ALL SELECT 'leases', state, COUNT(*) FROM grants WHERE state <> 'gone' GROUP BY state
			UNION ALL SELECT 'leases', 'gone', COUNT(*) FROM grants WHERE state = 'gone'
			UNION ALL SELECT 'findings ' || status, severity, COUNT(*) FROM findings GROUP BY status, severity)
			SELECT there.topic, there.name, COALESCE(counts.n, 0), there.n FROM there LEFT JOIN counts USING (topic, name)
			UNION ALL SELECT counts.topic, counts.name, counts.n, 0 FROM counts LEFT JOIN there USING (topic, name) WHERE there.n IS NULL`)
	})
}
