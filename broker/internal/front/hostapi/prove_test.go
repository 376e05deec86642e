package hostapi

import (
	"fmt"
	"log/slog"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/countersign/countersign/broker/api"
	"github.com/countersign/countersign/broker/internal/issue/vault"
	"github.com/countersign/countersign/broker/internal/lease"
	"github.com/countersign/countersign/broker/internal/lease/journal"
	"github.com/countersign/countersign/broker/internal/state/inventory"
	"github.com/countersign/countersign/broker/internal/state/store"
	"github.com/countersign/countersign/broker/internal/state/store/storetest"
	"github.com/countersign/countersign/test/check"
)

func TestTheNewestSourcesAreKept(t *testing.T) {
	at := []string{"10.0.0.1"}
	before := at
	if got := withSource(at, "10.0.0.1"); !slices.Equal(got, at) {
		t.Errorf("the same address: %v", got)
	}
	at = withSource(withSource(at, "10.0.0.2"), "10.0.0.1")
	if !slices.Equal(at, []string{"10.0.0.2", "10.0.0.1"}) || !slices.Equal(before, []string{"10.0.0.1"}) {
		t.Errorf("back again: %v, was %v", at, before)
	}
	for i := range 40 {
		at = withSource(at, fmt.Sprint("192.0.2.", i))
	}
	if len(at) != 16 || at[15] != "192.0.2.39" || at[0] != "192.0.2.24" {
		t.Errorf("%v", at)
	}
}

// Of a lease that can't be read nothing is decided; the host's others are dealt with.
func TestAnUnreadableLease(t *testing.T) {
	s := check.Must(storetest.Open(filepath.Join(t.TempDir(), "store.db")))(t)
	t.Cleanup(func() { _ = s.Close() })
	now := time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)
	check.Nil(t, s.Update(t.Context(), store.Everything(), func(tx *store.Tx) error {
		for _, id := range []string{"a", "b"} {
			check.Nil(t, journal.Save(tx, journal.Lease{ID: id, Host: "h", Scope: "s", Kind: vault.Kind.Name, State: journal.Live, Issued: now, Due: now.Add(time.Hour)}))
		}
		_, err := tx.Exec(`UPDATE grants SET body = 'x' WHERE id = 'a'`)
		return err
	}))
	d := &Desk{Store: s, Leases: lease.New(s, nil, slog.New(slog.DiscardHandler), func() time.Time { return now })}
	p := proven{host: inventory.Host{ID: "h"}}

	check.Nil(t, s.Update(t.Context(), store.Everything(), func(tx *store.Tx) error {
		v, stop, err := d.judge(tx, p, LeaseProof{Lease: "a"}, now, "r")
		if v.Outcome != string(api.Fault) || stop != "" {
			t.Errorf("%+v, %q", v, stop)
		}
		return err
	}))
	check.Nil(t, d.revokeWhere(t.Context(), "h", "s", func(journal.Lease) bool { return true }, "refused", "r"))
	check.Nil(t, s.View(t.Context(), func(tx *store.Tx) error {
		g, err := journal.Load(tx, "b")
		if g.State != journal.Revoking {
			t.Errorf("b is %s", g.State)
		}
		return err
	}))
}
