package liveness

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/countersign/countersign/broker/internal/issue/vault"
	"github.com/countersign/countersign/broker/internal/lease"
	"github.com/countersign/countersign/broker/internal/lease/journal"
	"github.com/countersign/countersign/broker/internal/state/audit"
	"github.com/countersign/countersign/broker/internal/state/inventory"
	"github.com/countersign/countersign/broker/internal/state/store"
	"github.com/countersign/countersign/broker/internal/state/store/storetest"
)

var noon = time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)

// watched is a watch over n hosts that fell silent an hour ago, each with a lease
// whose grace ended then, and one host that was heard last at heard.
func watched(t *testing.T, n, brake int, heard time.Time) (*Watch, *store.Store) {
	t.Helper()
	s, err := storetest.Open(filepath.Join(t.TempDir(), "store.db"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.Close() })
	if err := s.Update(t.Context(), store.Everything(), func(tx *store.Tx) error {
		for i := range n {
			id := fmt.Sprintf("silent-%04d", i)
			if err := inventory.Save(tx, inventory.Host{ID: id, Name: id, State: inventory.Trusted, Admitted: true, LastProved: noon.Add(-2 * time.Hour), SilentAt: noon.Add(-time.Hour)}); err != nil {
				return err
			}
			if err := journal.Save(tx, journal.Lease{ID: "lease-" + id, Host: id, Scope: "s", Kind: vault.Kind.Name, State: journal.Live, Settled: true,
				ProveBy: noon.Add(-90 * time.Minute), Grace: 30 * time.Minute, Due: noon.Add(time.Hour), Issued: noon.Add(-3 * time.Hour)}); err != nil {
				return err
			}
		}
		return inventory.Save(tx, inventory.Host{ID: "heard", Name: "heard", State: inventory.Trusted, Admitted: true, LastProved: heard, SilentAt: noon.Add(time.Hour)})
	}); err != nil {
		t.Fatal(err)
	}
	log := slog.New(slog.NewTextHandler(io.Discard, nil))
	now := func() time.Time { return noon }
	return &Watch{Store: s, Leases: lease.New(s, nil, log, now), Brake: brake, Log: log, Now: now}, s
}

// have counts the silent hosts in a state, the leases in one, and the log's records.
func have(t *testing.T, s *store.Store, host inventory.State, state journal.State) (hosts, leases int, records int64) {
	t.Helper()
	if err := s.View(t.Context(), func(tx *store.Tx) error {
		all, err := inventory.ByName(tx, inventory.Cursor{}, 10_000)
		if err != nil {
			return err
		}
		for _, h := range all {
			if h.State == host && strings.HasPrefix(h.ID, "silent-") {
				hosts++
			}
		}
		found, err := journal.List(tx, journal.Filter{States: []journal.State{state}})
		if err != nil {
			return err
		}
		leases = len(found)
		return audit.Read(tx, 0, 100_000, func(int64, []byte) error { records++; return nil })
	}); err != nil {
		t.Fatal(err)
	}
	return hosts, leases, records
}

// However many hosts are silent, one look deals with them all, and some lose their
// leases up to the brake.
func TestOneLookDealsWithAll(t *testing.T) {
	const n, brake = 3*page + 1, 5
	w, s := watched(t, n, brake, noon.Add(-time.Minute))
	if err := w.look(t.Context(), noon); err != nil {
		t.Fatal(err)
	}
	hosts, leases, _ := have(t, s, inventory.Stale, journal.Revoking)
	if hosts != n || leases != brake {
		t.Errorf("%d of %d hosts are stale, %d leases are revoked; the brake allows %d", hosts, n, leases, brake)
	}
	if alarms := w.Alarms(); len(alarms) != 1 || !strings.Contains(alarms[0], fmt.Sprint(n-brake)) {
		t.Errorf("alarms %q, want the %d that are held", alarms, n-brake)
	}
	// The next look has nothing left to do.
	_, _, before := have(t, s, inventory.Stale, journal.Revoking)
	if err := w.look(t.Context(), noon); err != nil {
		t.Fatal(err)
	}
	if _, _, after := have(t, s, inventory.Stale, journal.Revoking); after != before {
		t.Errorf("the next look wrote %d records", after-before)
	}
}

// A broker that hears nobody writes nothing, and says so.
func TestHearingNobodyWritesNothing(t *testing.T) {
	w, s := watched(t, 100, 5, noon.Add(-2*time.Hour))
	for range 3 {
		if err := w.look(t.Context(), noon); err != nil {
			t.Fatal(err)
		}
	}
	hosts, leases, records := have(t, s, inventory.Trusted, journal.Live)
	if hosts != 100 || leases != 100 || records != 0 {
		t.Errorf("%d hosts are trusted still, %d leases live, %d records written; want 100, 100, 0", hosts, leases, records)
	}
	if alarms := w.Alarms(); len(alarms) != 1 || !strings.Contains(alarms[0], "100 hosts are silent") {
		t.Errorf("alarms: %q", alarms)
	}
}

// A host that comes back is held no longer.
func TestAHeldHostThatComesBackIsLetGo(t *testing.T) {
	w, s := watched(t, 2, 1, noon.Add(-time.Minute))
	if err := w.look(t.Context(), noon); err != nil {
		t.Fatal(err)
	}
	if len(w.Alarms()) != 1 {
		t.Fatalf("alarms: %q", w.Alarms())
	}
	if err := s.Update(context.Background(), store.Everything(), func(tx *store.Tx) error {
		for i := range 2 {
			h, err := inventory.Get(tx, fmt.Sprintf("silent-%04d", i))
			if err != nil {
				return err
			}
			h.State, h.LastProved, h.SilentAt = inventory.Trusted, noon, noon.Add(time.Hour)
			if err := inventory.Save(tx, h); err != nil {
				return err
			}
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	if err := w.look(t.Context(), noon); err != nil {
		t.Fatal(err)
	}
	if alarms := w.Alarms(); len(alarms) != 0 {
		t.Errorf("alarms: %q", alarms)
	}
}

// One host that can't be read keeps no other from being dealt with.
func TestOneOddHost(t *testing.T) {
	w, s := watched(t, 3, 5, noon.Add(-time.Minute))
	if err := s.Update(t.Context(), store.Everything(), func(tx *store.Tx) error {
		_, err := tx.Exec(`UPDATE hosts SET counters = 'x' WHERE id = 'silent-0001'`)
		return err
	}); err != nil {
		t.Fatal(err)
	}
	if err := w.look(t.Context(), noon); err != nil {
		t.Fatal(err)
	}
	if hosts, leases, _ := have(t, s, inventory.Stale, journal.Revoking); hosts != 2 || leases != 2 {
		t.Errorf("%d hosts are stale, %d leases revoked; want the 2 that can be read", hosts, leases)
	}
}

// One lease that can't be read keeps no other of its host from being revoked.
func TestOneOddLease(t *testing.T) {
	w, s := watched(t, 1, 5, noon.Add(-time.Minute))
	if err := s.Update(t.Context(), store.Everything(), func(tx *store.Tx) error {
		g, err := journal.Load(tx, "lease-silent-0000")
		if err != nil {
			return err
		}
		g.ID = "odd"
		if err := journal.Save(tx, g); err != nil {
			return err
		}
		_, err = tx.Exec(`UPDATE grants SET body = 'x' WHERE id = 'odd'`)
		return err
	}); err != nil {
		t.Fatal(err)
	}
	if err := w.look(t.Context(), noon); err != nil {
		t.Fatal(err)
	}
	if hosts, leases, _ := have(t, s, inventory.Stale, journal.Revoking); hosts != 1 || leases != 1 {
		t.Errorf("%d hosts are stale, %d leases revoked; want the one that can be read", hosts, leases)
	}
}

// A host that nobody looks at again has lost its leases by then: what keeps a
// revocation from being recorded keeps the host on the list, too.
func TestNoRevocationIsLost(t *testing.T) {
	w, s := watched(t, 3, 5, noon.Add(-time.Minute))
	exec := func(statement string) {
		t.Helper()
		if err := s.Update(t.Context(), store.Everything(), func(tx *store.Tx) error { _, err := tx.Exec(statement); return err }); err != nil {
			t.Fatal(err)
		}
	}
	exec(`CREATE TRIGGER stopped BEFORE UPDATE ON grants WHEN NEW.id = 'lease-silent-0001' AND NEW.state = 'revoking' BEGIN SELECT RAISE(ABORT, 'stopped'); END`)
	if err := w.look(t.Context(), noon); err == nil {
		t.Fatal("the look went well")
	}
	exec(`DROP TRIGGER stopped`)
	if err := w.look(t.Context(), noon); err != nil {
		t.Fatal(err)
	}
	if hosts, leases, _ := have(t, s, inventory.Stale, journal.Revoking); hosts != 3 || leases != 3 {
		t.Errorf("%d hosts are stale, %d leases revoked; want 3 and 3", hosts, leases)
	}
}

// A held host that can't be read any more stays held, and stops no look.
func TestOneOddHeldHost(t *testing.T) {
	w, s := watched(t, 2, 1, noon.Add(-time.Minute))
	if err := w.look(t.Context(), noon); err != nil {
		t.Fatal(err)
	}
	if err := s.Update(t.Context(), store.Everything(), func(tx *store.Tx) error { _, err := tx.Exec(`UPDATE hosts SET labels = 'x'`); return err }); err != nil {
		t.Fatal(err)
	}
	if err := w.look(t.Context(), noon); err != nil {
		t.Error(err)
	}
	if alarms := w.Alarms(); len(alarms) != 1 {
		t.Errorf("alarms: %q", alarms)
	}
}

// What the brake counted by a clock that was ahead doesn't hold it once the clock is
// back.
func TestTheBrakeAfterAClockThatWasAhead(t *testing.T) {
	w, _ := watched(t, 0, 1, noon)
	w.recent = []time.Time{noon.Add(31 * 24 * time.Hour)}
	if !w.mayRevoke(noon, 0) {
		t.Error("the brake holds for a month")
	}
}

// Held hosts wait for an operator over a restart, too, until their leases have ended.
func TestHeldOverARestart(t *testing.T) {
	w, s := watched(t, 3, 1, noon.Add(-time.Minute))
	if err := w.look(t.Context(), noon); err != nil {
		t.Fatal(err)
	}
	w = &Watch{Store: s, Leases: w.Leases, Brake: w.Brake, Log: w.Log, Now: w.Now}
	if err := w.recall(t.Context()); err != nil {
		t.Fatal(err)
	}
	if alarms := w.Alarms(); len(alarms) != 1 || !strings.Contains(alarms[0], "2 silent hosts are held") {
		t.Errorf("after a restart: %q", alarms)
	}
	if err := s.Update(t.Context(), store.Everything(), func(tx *store.Tx) error { _, err := tx.Exec(`UPDATE grants SET state = 'gone'`); return err }); err != nil {
		t.Fatal(err)
	}
	if err := w.look(t.Context(), noon); err != nil {
		t.Fatal(err)
	}
	if alarms := w.Alarms(); len(alarms) != 0 {
		t.Errorf("with nothing left to end: %q", alarms)
	}
}

// A proof of a clock that was ahead by some hours is nobody who was heard.
func TestHeardByAClockThatWasAhead(t *testing.T) {
	w, s := watched(t, 3, 3, noon.Add(20*time.Hour))
	if err := w.look(t.Context(), noon); err != nil {
		t.Fatal(err)
	}
	if hosts, leases, _ := have(t, s, inventory.Stale, journal.Revoking); hosts != 0 || leases != 0 {
		t.Errorf("%d hosts are stale, %d leases revoked, and nobody was heard", hosts, leases)
	}
}

// Time in which the broker ran counts as served, however slow it was; a stop and a
// jump of the clock don't.
func TestUnservedTime(t *testing.T) {
	for name, c := range map[string]struct {
		last time.Time
		ran  time.Duration
		want time.Duration
	}{
		"a first start":          {time.Time{}, 0, 0},
		"after a stop":           {noon.Add(-time.Hour), 0, time.Hour},
		"a slow look":            {noon.Add(-40 * time.Second), 40 * time.Second, 0},
		"a clock set back":       {noon.Add(time.Hour), 5 * time.Second, -time.Hour - 5*time.Second},
		"asleep between looks":   {noon.Add(-time.Minute), 5 * time.Second, 55 * time.Second},
		"one tick, as it should": {noon.Add(-5 * time.Second), 5 * time.Second, 0},
	} {
		if got := unserved(c.last, noon, c.ran); got != c.want {
			t.Errorf("%s: %v, want %v", name, got, c.want)
		}
	}
}
