package liveness

import (
	"errors"
	"log/slog"
	"path/filepath"
	"testing"
	"time"

	"github.com/countersign/countersign/broker/internal/issue/vault"
	"github.com/countersign/countersign/broker/internal/lease/journal"
	"github.com/countersign/countersign/broker/internal/state/inventory"
	"github.com/countersign/countersign/broker/internal/state/store"
	"github.com/countersign/countersign/broker/internal/state/store/storetest"
	"github.com/countersign/countersign/test/check"
)

// A clock that was a month ahead comes back: what was set by it is set back, and
// what was set since is left alone.
func TestTheClockComesBack(t *testing.T) {
	s := check.Must(storetest.Open(filepath.Join(t.TempDir(), "store.db")))(t)
	t.Cleanup(func() { _ = s.Close() })
	w := &Watch{Store: s, Log: slog.New(slog.DiscardHandler)}
	const month = 30 * 24 * time.Hour
	now := time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)

	type row struct{ silent, proved, due time.Time }
	rows := map[string]row{
		"ahead": {now.Add(month + time.Hour), now.Add(month - time.Minute), now.Add(month + time.Minute)},
		"since": {now.Add(30 * time.Minute), now.Add(-time.Second), now.Add(2 * time.Minute)},
	}
	want := map[string]row{
		"ahead": {now.Add(time.Hour), now, now.Add(time.Minute)},
		"since": rows["since"],
	}
	check.Nil(t, s.Update(t.Context(), store.Everything(), func(tx *store.Tx) error {
		var errs []error
		for id, r := range rows {
			errs = append(errs,
				inventory.Save(tx, inventory.Host{ID: id, State: inventory.Trusted, SilentAt: r.silent, LastProved: r.proved}),
				journal.Save(tx, journal.Lease{ID: id, Host: id, Kind: vault.Kind.Name, State: journal.Revoking, Due: r.due}))
		}
		return errors.Join(errs...)
	}))
	check.Nil(t, w.alive(t.Context(), now, -month))
	check.Nil(t, s.View(t.Context(), func(tx *store.Tx) error {
		for id, r := range want {
			h := check.Must(inventory.Get(tx, id))(t)
			g := check.Must(journal.Load(tx, id))(t)
			if !h.SilentAt.Equal(r.silent) || !h.LastProved.Equal(r.proved) || !g.Due.Equal(r.due) {
				t.Errorf("%s: silent at %s, proved %s, due %s; want %+v", id, h.SilentAt, h.LastProved, g.Due, r)
			}
		}
		return nil
	}))
}
