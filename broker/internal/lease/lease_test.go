package lease

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"path/filepath"
	"runtime"
	"testing"
	"time"

	"github.com/countersign/countersign/broker/internal/issue"
	"github.com/countersign/countersign/broker/internal/issue/vault"
	"github.com/countersign/countersign/broker/internal/lease/journal"
	"github.com/countersign/countersign/broker/internal/state/store"
	"github.com/countersign/countersign/broker/internal/state/store/storetest"
	"github.com/countersign/countersign/test/check"
)

// stubborn is an issuer that answers as it is told; what it is not told, it
// must not be asked.
type stubborn struct {
	issue.Issuer
	extend func(issue.Handle) (time.Time, error)
	revoke func(context.Context) error
}

func (s stubborn) Extend(_ context.Context, h issue.Handle, _ time.Duration) (time.Time, error) {
	return s.extend(h)
}
func (s stubborn) Revoke(ctx context.Context, _ issue.Handle) error { return s.revoke(ctx) }

func manager(t *testing.T, i issue.Issuer, leases ...journal.Lease) (*Manager, func(string) journal.Lease) {
	t.Helper()
	s, err := storetest.Open(filepath.Join(t.TempDir(), "store.db"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.Close() })
	if err := s.Update(t.Context(), store.Everything(), func(tx *store.Tx) error {
		for _, g := range leases {
			g.Host, g.Scope, g.Kind = "h", "s", vault.Kind.Name
			if err := journal.Save(tx, g); err != nil {
				return err
			}
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	m := New(s, map[string]issue.Issuer{vault.Kind.Name: i}, slog.New(slog.NewTextHandler(io.Discard, nil)), time.Now)
	return m, func(id string) (g journal.Lease) {
		t.Helper()
		if err := s.View(context.Background(), func(tx *store.Tx) (err error) {
			g, err = journal.Load(tx, id)
			return err
		}); err != nil {
			t.Fatal(err)
		}
		return g
	}
}

func becomes(t *testing.T, load func(string) journal.Lease, id string, want journal.State) {
	t.Helper()
	check.Eventually(t, 10*time.Second, id+" is "+string(want), func() (bool, string) {
		state := load(id).State
		return state == want, string(state)
	})
}

// While an issuer hangs, what waits for it is one goroutine a lease.
func TestAHangingIssuerPilesNothingUp(t *testing.T) {
	const n = 300
	var leases []journal.Lease
	for i := range n {
		leases = append(leases, journal.Lease{ID: fmt.Sprintf("g%05d", i), Kind: vault.Kind.Name, State: journal.Live, Ref: []byte(`{}`), Issued: time.Now()})
	}
	hangs := stubborn{revoke: func(ctx context.Context) error { <-ctx.Done(); return ctx.Err() }}
	swept(t, map[string]issue.Issuer{vault.Kind.Name: hangs}, leases, func(t *testing.T, m *Manager, _ func(string) journal.Lease) {
		before := runtime.NumGoroutine()
		if _, err := m.RevokeAll(t.Context(), journal.Filter{Host: "h"}, "quarantine", Cause{Actor: "x"}, false); err != nil {
			t.Fatal(err)
		}
		for range 4 { // the leases are due again and again
			time.Sleep(1500 * time.Millisecond)
			if more := runtime.NumGoroutine() - before; more > n+50 {
				t.Fatalf("%d goroutines more for %d grants", more, n)
			}
		}
	})
}

// An old credential is retired when its successor has its length, not before.
func TestReplacedOnlyByOneThatLives(t *testing.T) {
	now := time.Now()
	sealed := true
	m, load := manager(t, stubborn{extend: func(issue.Handle) (time.Time, error) {
		if sealed {
			return time.Time{}, errors.New("Vault is sealed")
		}
		return now.Add(8 * time.Hour), nil
	}},
		journal.Lease{ID: "old", State: journal.Live, Settled: true, Overlap: time.Minute, Expires: now.Add(3 * time.Hour), Due: now.Add(3 * time.Hour), Issued: now},
		journal.Lease{ID: "new", State: journal.Provisional, Replaces: "old", TTL: 8 * time.Hour, Expires: now.Add(2 * time.Minute), Due: now.Add(2 * time.Minute), Issued: now})
	g, err := m.Event(t.Context(), "new", journal.Acknowledged{}, Cause{Actor: "host:h"})
	if err != nil || g.Settled {
		t.Fatalf("acknowledged while sealed: %+v, %v", g, err)
	}
	if old := load("old"); old.State != journal.Live {
		t.Fatalf("the old one is %s, and the new one has two minutes", old.State)
	}
	sealed = false
	if g, err = m.Event(t.Context(), "new", journal.Acknowledged{}, Cause{Actor: "host:h"}); err != nil || !g.Settled {
		t.Fatalf("acknowledged again: %+v, %v", g, err)
	}
	becomes(t, load, "old", journal.Retiring)
}

// A revocation that comes while the issuer extends is done right after.
func TestRevokedWhileExtending(t *testing.T) {
	now := time.Now()
	extending, goOn := make(chan struct{}), make(chan struct{})
	m, load := manager(t, stubborn{
		extend: func(issue.Handle) (time.Time, error) { close(extending); <-goOn; return now.Add(time.Hour), nil },
		revoke: func(context.Context) error { return nil },
	}, journal.Lease{ID: "g", State: journal.Provisional, Expires: now.Add(2 * time.Minute), Due: now.Add(2 * time.Minute), Issued: now})
	if _, err := m.Event(t.Context(), "g", journal.Acknowledged{}, Cause{Actor: "host:h", Later: true}); err != nil {
		t.Fatal(err)
	}
	<-extending
	if g, err := m.Event(t.Context(), "g", journal.Revoke{Reason: "quarantined"}, Cause{Actor: "operator:x"}); err != nil || g.State != journal.Revoking {
		t.Fatalf("%+v, %v", g, err)
	}
	close(goOn)
	becomes(t, load, "g", journal.Gone)
}

// A lease that has its whole length from the start is acknowledged and replaces the old
// one in one transaction, and its issuer isn't asked.
func TestWholeLeasesNeedNoAsking(t *testing.T) {
	now := time.Now()
	m, load := manager(t, stubborn{},
		journal.Lease{ID: "old", State: journal.Live, Settled: true, Overlap: time.Minute, Expires: now.Add(time.Hour), Due: now.Add(time.Hour), Issued: now},
		journal.Lease{ID: "new", State: journal.Provisional, Whole: true, Replaces: "old", Expires: now.Add(time.Hour), Due: now.Add(time.Minute), Issued: now})
	if err := m.store.Update(t.Context(), store.Everything(), func(tx *store.Tx) error {
		g, effects, err := m.advance(tx, load("new"), journal.Acknowledged{}, Cause{Actor: "host:h"}, now)
		if err != nil || !g.Settled || !g.Due.Equal(g.Expires) || len(effects) != 0 {
			t.Errorf("acknowledged: %+v, effects %v, %v", g, effects, err)
		}
		old, err := journal.Load(tx, "old")
		if old.State != journal.Retiring {
			t.Errorf("the old one is %s", old.State)
		}
		return err
	}); err != nil {
		t.Fatal(err)
	}
}
