package hostapi

import (
	"errors"
	"path/filepath"
	"testing"
	"time"

	"github.com/countersign/countersign/broker/api"
	"github.com/countersign/countersign/broker/internal/lease/journal"
	"github.com/countersign/countersign/broker/internal/state/budget"
	"github.com/countersign/countersign/broker/internal/state/store"
	"github.com/countersign/countersign/broker/internal/state/store/storetest"
	"github.com/countersign/countersign/test/check"
)

// Who has used up its budget, and everybody on a full disk, gets nothing new, and
// renews what it holds, once each, when its time has come.
func TestMayIssue(t *testing.T) {
	now := time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)
	s := check.Must(storetest.Open(filepath.Join(t.TempDir(), "store.db")))(t)
	t.Cleanup(func() { _ = s.Close() })
	lease := func(id, host string, state journal.State, issued time.Duration) journal.Lease {
		return journal.Lease{ID: id, Host: host, Scope: "s", State: state, Issued: now.Add(issued), Expires: now.Add(issued + time.Hour), Due: now.Add(time.Hour)}
	}
	check.Nil(t, s.Update(t.Context(), store.Everything(), func(tx *store.Tx) error {
		for _, g := range []journal.Lease{lease("due", "h", journal.Live, -40*time.Minute), lease("new", "h", journal.Live, -20*time.Minute),
			lease("replaced", "h", journal.Retiring, -40*time.Minute), lease("other's", "o", journal.Live, -40*time.Minute)} {
			check.Nil(t, journal.Save(tx, g))
		}
		return nil
	}))
	d := &Desk{Store: s, Now: func() time.Time { return now }}
	may := func(o Order) (why string) {
		t.Helper()
		check.Nil(t, s.View(t.Context(), func(tx *store.Tx) error {
			var e *api.Error
			err := d.mayIssue(tx, "h", o)
			if !errors.As(err, &e) {
				return err
			}
			if why = e.Check; e.Outcome != api.Fault {
				t.Errorf("%s takes something: %s", why, e.Outcome)
			}
			return nil
		}))
		return why
	}
	orders := map[string]Order{
		"new": {Scope: "s"}, "due": {Scope: "s", Replaces: "due"}, "too early": {Scope: "s", Replaces: "new"}, "again": {Scope: "s", Replaces: "replaced"},
		"another's": {Scope: "s", Replaces: "other's"}, "another scope's": {Scope: "t", Replaces: "due"}, "unknown": {Scope: "s", Replaces: "x"},
	}
	all := func(want string) {
		t.Helper()
		for name, o := range orders {
			expected := want
			if name == "due" {
				expected = ""
			}
			if got := may(o); got != expected {
				t.Errorf("%s: %q, want %q", name, got, expected)
			}
		}
	}
	all("")
	check.Nil(t, s.View(t.Context(), func(tx *store.Tx) error { budget.Of(tx).Spend("h", 0, budget.Bytes, now); return nil }))
	all("host-budget")
	full := errors.New("full")
	d.Room = func() error { return full }
	all("disk")
	d.Room = nil
	now = now.Add(time.Hour)
	for name, o := range orders {
		if got := may(o); got != "" {
			t.Errorf("%s, an hour later: %q", name, got)
		}
	}
}
