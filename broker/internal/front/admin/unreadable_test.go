package admin

import (
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/countersign/countersign/broker/internal/issue/issuers"
	"github.com/countersign/countersign/broker/internal/issue/vault"
	"github.com/countersign/countersign/broker/internal/lease/journal"
	"github.com/countersign/countersign/broker/internal/policy"
	"github.com/countersign/countersign/broker/internal/state/findings"
	"github.com/countersign/countersign/broker/internal/state/inventory"
	"github.com/countersign/countersign/broker/internal/state/store"
	"github.com/countersign/countersign/broker/internal/state/store/storetest"
	"github.com/countersign/countersign/test/check"
)

// One row that can't be read keeps no other from a list, and no set from being applied:
// it is there, with why it can't be read.
func TestUnreadableRows(t *testing.T) {
	s := check.Must(storetest.Open(filepath.Join(t.TempDir(), "store.db")))(t)
	t.Cleanup(func() { _ = s.Close() })
	now := time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)
	check.Nil(t, s.Update(t.Context(), store.Everything(), func(tx *store.Tx) error {
		for _, id := range []string{"a", "b", "c"} {
			check.Nil(t, inventory.Save(tx, inventory.Host{ID: id, Name: id, State: inventory.Trusted, Admitted: true, LastProved: now}))
			check.Nil(t, journal.Save(tx, journal.Lease{ID: "lease-" + id, Host: id, Scope: "s", Kind: vault.Kind.Name, State: journal.Live, Issued: now, Due: now.Add(time.Hour)}))
			_, _, err := findings.Report(tx, findings.Finding{Detector: "d", Cause: id, Severity: "low", First: now, Last: now, Count: 1}, now)
			check.Nil(t, err)
		}
		for _, damage := range []string{
			`UPDATE hosts SET labels = 'x' WHERE id = 'b'`, `UPDATE hosts SET facts = 'x' WHERE id = 'c'`,
			`UPDATE grants SET body = 'x' WHERE id = 'lease-a'`, `UPDATE findings SET body = 'x' WHERE cause_key = 'b'`,
		} {
			if _, err := tx.Exec(damage); err != nil {
				return err
			}
		}
		return nil
	}))
	parse := func(files []policy.File) (*policy.Set, error) { return issuers.Parse(files) }
	d := &Desk{Store: s, Policy: InForce(parse).In, ParseSet: parse, Now: func() time.Time { return now }}
	root := Actor{Name: "root", Role: Admin}

	hosts, _, _, err := d.Hosts(t.Context(), root, HostFilter{Selector: "env=prod", Limit: 10})
	check.Nil(t, err)
	if len(hosts) != 1 || hosts[0].ID != "b" || hosts[0].Unreadable == nil {
		t.Errorf("hosts with a label: %+v; want the one whose labels can't be read", hosts)
	}
	leases, _, err := d.List(t.Context(), root, journal.Filter{Limit: 10})
	check.Nil(t, err)
	if len(leases) != 3 || leases[0].Unreadable == nil || leases[0].Cursor().ID != "lease-a" || leases[0].State != journal.Live {
		t.Errorf("leases: %+v", leases)
	}
	list, err := d.Findings(t.Context(), root, findings.Filter{Limit: 10})
	check.Nil(t, err)
	if len(list) != 3 || list[1].Unreadable == nil || list[1].Cause != "b" {
		t.Errorf("findings: %+v", list)
	}

	p, err := d.Apply(t.Context(), root, nil, false)
	check.Nil(t, err)
	if p.Version != 1 || p.Loses != 3 {
		t.Fatalf("plan: %+v", p)
	}
	for i, word := range []string{"lease-a", "b: labels", "c: recorded facts"} {
		if reason := p.Losses[i].Reason; !strings.Contains(reason, "not known: ") || !strings.Contains(reason, word) {
			t.Errorf("loss %d: %q, want %q in it", i, reason, word)
		}
	}
	if err := s.Update(t.Context(), store.Everything(), func(tx *store.Tx) error { return journal.Save(tx, leases[0]) }); err == nil {
		t.Error("an unreadable lease was overwritten")
	}
}
