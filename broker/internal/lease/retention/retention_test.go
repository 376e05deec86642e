package retention

import (
	"fmt"
	"io"
	"log/slog"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/countersign/countersign/broker/internal/issue/issuers"
	"github.com/countersign/countersign/broker/internal/issue/vault"
	"github.com/countersign/countersign/broker/internal/lease/journal"
	"github.com/countersign/countersign/broker/internal/policy"
	"github.com/countersign/countersign/broker/internal/state/inventory"
	"github.com/countersign/countersign/broker/internal/state/store"
	"github.com/countersign/countersign/broker/internal/state/store/storetest"
)

const scopes = `
scope "kept" {
  process { unit = "a.service" }
  certificate {
    dns = ["a.example.com"]
    ttl = "1h"
  }
}
`

// What ended long ago is forgotten, and nothing else: no credential that may still
// work, however old, and no decision that `why` may be asked for.
func TestForgetsOnlyWhatEnded(t *testing.T) {
	now := time.Date(2026, 6, 1, 0, 0, 0, 0, time.UTC)
	day := 24 * time.Hour
	s, err := storetest.Open(filepath.Join(t.TempDir(), "store.db"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.Close() })
	set, err := issuers.Parse([]policy.File{{Name: "a.hcl", Content: []byte(scopes)}})
	if err != nil {
		t.Fatal(err)
	}
	var want []string
	if err := s.Update(t.Context(), store.Everything(), func(tx *store.Tx) error {
		for i := range 3*page + 5 { // ended over the last 180 days, and some that never end
			ended := now.Add(-180 * day * time.Duration(i) / (3*page + 5))
			g := journal.Lease{ID: fmt.Sprintf("g%05d", i), Host: "h", Scope: "kept", Kind: vault.Kind.Name, State: journal.Gone, Issued: ended.Add(-day), Ended: ended}
			if i%50 == 0 {
				g.State, g.Ended, g.Due = journal.Unended[i/50%len(journal.Unended)], time.Time{}, now
			}
			if i%50 == 1 {
				g.TTL = 365 * day // by its ticket it could come back
			}
			if g.State != journal.Gone || g.TTL > 0 || now.Sub(ended) < 90*day {
				want = append(want, g.ID)
			}
			if err := journal.Save(tx, g); err != nil {
				return err
			}
		}
		for id, damage := range map[string]string{"odd-body": `'x'`, "odd-ttl": `'{"ttl":"1h"}'`} { // unreadable rows hold up no other
			ended := now.Add(-170 * day)
			if err := journal.Save(tx, journal.Lease{ID: id, Host: "h", Scope: "kept", Kind: vault.Kind.Name, State: journal.Gone, Issued: ended.Add(-day), Ended: ended}); err != nil {
				return err
			}
			if _, err := tx.Exec(`UPDATE grants SET body = ` + damage + ` WHERE id = '` + id + `'`); err != nil {
				return err
			}
			want = append(want, id)
		}
		for id, h := range map[string]inventory.Host{
			"h": {State: inventory.Trusted, LastProved: now}, "gone": {State: inventory.Removed, LastProved: now}, "long": {State: inventory.Stale, LastProved: now.Add(-91 * day)},
		} {
			h.ID, h.Name = id, id
			if err := inventory.Save(tx, h); err != nil {
				return err
			}
		}
		for _, d := range []decision{{"h", "kept"}, {"h", "dropped"}, {"gone", "kept"}, {"long", "kept"}, {"unknown", "kept"}} {
			if _, err := tx.Exec(`INSERT INTO decisions (host_id, scope, at, result, facts) VALUES (?, ?, ?, '{}', '{}')`, d.host, d.scope, store.Millis(now.Add(-200*day))); err != nil {
				return err
			}
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	k := &Keeper{Store: s, Keep: 90 * day, Policy: func(*store.Tx) (*policy.Set, error) { return set, nil }, Log: slog.New(slog.NewTextHandler(io.Discard, nil)), Now: func() time.Time { return now }}
	if err := k.Once(t.Context()); err != nil {
		t.Fatal(err)
	}
	var left []string
	var decisions []decision
	if err := s.View(t.Context(), func(tx *store.Tx) error {
		leases, err := journal.List(tx, journal.Filter{})
		if err != nil {
			return err
		}
		for _, g := range leases {
			left = append(left, g.ID)
		}
		decisions, err = store.Collect(tx, func(row store.Row) (d decision, err error) {
			return d, row.Scan(&d.host, &d.scope)
		}, `SELECT host_id, scope FROM decisions`)
		return err
	}); err != nil {
		t.Fatal(err)
	}
	slices.Sort(left)
	slices.Sort(want)
	if !slices.Equal(left, want) {
		t.Errorf("%d leases are left, want %d: those that may still work or come back, and those that ended within 90 days", len(left), len(want))
	}
	if len(decisions) != 1 || decisions[0] != (decision{"h", "kept"}) {
		t.Errorf("decisions left: %v", decisions)
	}
}
