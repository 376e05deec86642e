package lease

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/countersign/countersign/broker/internal/issue"
	"github.com/countersign/countersign/broker/internal/issue/ca"
	"github.com/countersign/countersign/broker/internal/issue/vault"
	"github.com/countersign/countersign/broker/internal/lease/journal"
	"github.com/countersign/countersign/broker/internal/state/store"
	"github.com/countersign/countersign/broker/internal/state/store/storetest"
)

// swept runs a sweeper over leases in a bubble of its own clock, beside what meanwhile
// does, until that returns.
func swept(t *testing.T, issuers map[string]issue.Issuer, leases []journal.Lease, meanwhile func(t *testing.T, m *Manager, load func(string) journal.Lease)) {
	synctest.Test(t, func(t *testing.T) {
		s, err := storetest.Open(filepath.Join(t.TempDir(), "store.db"))
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = s.Close() }()
		if err := s.Update(t.Context(), store.Everything(), func(tx *store.Tx) error {
			for _, g := range leases {
				g.Host, g.Scope = "h", "s"
				if err := journal.Save(tx, g); err != nil {
					return err
				}
			}
			return nil
		}); err != nil {
			t.Fatal(err)
		}
		m := New(s, issuers, slog.New(slog.NewTextHandler(io.Discard, nil)), time.Now)
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- m.Sweep(ctx) }()
		meanwhile(t, m, func(id string) (g journal.Lease) {
			if err := s.View(context.Background(), func(tx *store.Tx) (err error) {
				g, err = journal.Load(tx, id)
				return err
			}); err != nil {
				t.Fatal(err)
			}
			return g
		})
		cancel()
		if err := <-done; err != nil {
			t.Fatal(err)
		}
		time.Sleep(10 * time.Minute) // of the bubble: acts that were started come to their end
	})
}

// What another broker has claimed to sweep is left to it, until its claim ends.
func TestSweepsWhatNobodyElseDoes(t *testing.T) {
	begin := time.Date(2000, 1, 1, 0, 0, 0, 0, time.UTC) // of every bubble
	var ended atomic.Pointer[time.Time]
	revoker := recorder{revoke: func(issue.Handle) error { now := time.Now(); ended.Store(&now); return nil }}
	swept(t, map[string]issue.Issuer{vault.Kind.Name: revoker}, []journal.Lease{
		{ID: "g", Kind: vault.Kind.Name, State: journal.Retiring, Due: begin.Add(time.Minute), Issued: begin},
	}, func(t *testing.T, m *Manager, load func(string) journal.Lease) {
		if err := m.store.Update(t.Context(), nil, func(tx *store.Tx) error {
			_, err := tx.Exec(`INSERT INTO claims (name, owner, until) VALUES (?, 'another', ?)`, "sweep "+vault.Kind.Name, store.Millis(begin.Add(5*time.Minute)))
			return err
		}); err != nil {
			t.Fatal(err)
		}
		time.Sleep(4 * time.Minute)
		if g := load("g"); g.State != journal.Retiring || ended.Load() != nil {
			t.Errorf("it is %s, though another broker has it", g.State)
		}
		time.Sleep(2 * time.Minute)
		at := ended.Load()
		if g := load("g"); g.State != journal.Gone || at == nil || at.After(begin.Add(5*time.Minute+2*time.Second)) {
			t.Errorf("it is %s, ended at %v; the other's claim ended at %v", g.State, at, begin.Add(5*time.Minute))
		}
	})
}

// A sweeper that is woken all the time does its work all the same: every lease is ended
// within two seconds of its due time, whatever else happens.
func TestSweepsUnderSteadyEvents(t *testing.T) {
	begin := time.Date(2000, 1, 1, 0, 0, 0, 0, time.UTC) // of every bubble
	var mu sync.Mutex
	ended := map[string]time.Time{}
	revoker := recorder{revoke: func(h issue.Handle) error {
		mu.Lock()
		defer mu.Unlock()
		ended[h.Lease] = time.Now()
		return nil
	}}
	const due = 300 // more than some pages
	leases := []journal.Lease{{ID: "busy", Kind: ca.Kind.Name, State: journal.Live, Settled: true, Due: begin.Add(time.Hour), Issued: begin}}
	for i := range due {
		leases = append(leases, journal.Lease{ID: fmt.Sprintf("g%04d", i), Kind: ca.Kind.Name, State: journal.Retiring, Due: begin.Add(5 * time.Second), Issued: begin})
	}
	swept(t, map[string]issue.Issuer{ca.Kind.Name: revoker}, leases, func(t *testing.T, m *Manager, _ func(string) journal.Lease) {
		for range 25 { // ten seconds of it
			time.Sleep(400 * time.Millisecond)
			if _, err := m.Event(t.Context(), "busy", journal.Proved{By: time.Now().Add(time.Minute)}, Cause{Actor: "host:h"}); err != nil {
				t.Error(err)
			}
		}
	})
	if len(ended) != due {
		t.Errorf("%d of %d due grants were ended", len(ended), due)
	}
	for id, at := range ended {
		if late := at.Sub(begin.Add(5 * time.Second)); late < 0 || late > 2*time.Second {
			t.Errorf("%s was ended %v after its due time", id, late)
		}
	}
}

// An issuer that hangs holds up the leases of its own kind alone, and what waits for it
// counts as overdue.
func TestAHangingIssuerHoldsUpNoOther(t *testing.T) {
	begin := time.Date(2000, 1, 1, 0, 0, 0, 0, time.UTC)
	var leases []journal.Lease
	for i := range 2 * (backlog + share) {
		leases = append(leases, journal.Lease{ID: fmt.Sprintf("v%04d", i), Kind: vault.Kind.Name, State: journal.Retiring, Due: begin, Issued: begin})
	}
	leases = append(leases, journal.Lease{ID: "c", Kind: ca.Kind.Name, State: journal.Retiring, Due: begin.Add(30 * time.Second), Issued: begin})
	hanging := stubborn{revoke: func(ctx context.Context) error { <-ctx.Done(); return ctx.Err() }}
	swept(t, map[string]issue.Issuer{vault.Kind.Name: hanging, ca.Kind.Name: recorder{revoke: func(issue.Handle) error { return nil }}}, leases,
		func(t *testing.T, m *Manager, load func(string) journal.Lease) {
			time.Sleep(32 * time.Second)
			if state := load("c").State; state != journal.Gone {
				t.Errorf("a certificate is %s two seconds after its end, behind a Vault that hangs", state)
			}
			n, oldest, err := m.Overdue(t.Context())
			if err != nil || n == 0 || oldest < 30*time.Second || len(m.Alarms(t.Context())) != 1 {
				t.Errorf("overdue: %d, the oldest by %v, alarms %q, %v", n, oldest, m.Alarms(t.Context()), err)
			}
		})
}

// One lease that can't be read holds up no other.
func TestAnUnreadableLeaseHoldsUpNoOther(t *testing.T) {
	begin := time.Date(2000, 1, 1, 0, 0, 0, 0, time.UTC)
	leases := []journal.Lease{
		{ID: "bad", Kind: ca.Kind.Name, State: journal.Retiring, Due: begin.Add(time.Second), Issued: begin},
		{ID: "good", Kind: ca.Kind.Name, State: journal.Retiring, Due: begin.Add(2 * time.Second), Issued: begin},
	}
	swept(t, map[string]issue.Issuer{ca.Kind.Name: recorder{revoke: func(issue.Handle) error { return nil }}}, leases, func(t *testing.T, m *Manager, load func(string) journal.Lease) {
		if err := m.store.Update(t.Context(), store.Everything(), func(tx *store.Tx) error {
			_, err := tx.Exec(`UPDATE grants SET body = 'x' WHERE id = 'bad'`)
			return err
		}); err != nil {
			t.Fatal(err)
		}
		time.Sleep(20 * time.Second)
		if state := load("good").State; state != journal.Gone {
			t.Errorf("the good lease is %s", state)
		}
		if n, _, err := m.Overdue(t.Context()); n != 1 || err != nil {
			t.Errorf("%d overdue, %v; want the unreadable one", n, err)
		}
		// It was the disk's fault, for a while.
		if err := m.store.Update(t.Context(), store.Everything(), func(tx *store.Tx) error {
			_, err := tx.Exec(`UPDATE grants SET body = '{}' WHERE id = 'bad'`)
			return err
		}); err != nil {
			t.Fatal(err)
		}
		time.Sleep(2 * oddAgain)
		if state := load("bad").State; state != journal.Gone {
			t.Errorf("once it can be read, the lease stays %s", state)
		}
	})
}

// A mass revocation is recorded whole before it returns, however slow the issuer is.
func TestRevokeAllRecordsAll(t *testing.T) {
	begin := time.Date(2000, 1, 1, 0, 0, 0, 0, time.UTC)
	var leases []journal.Lease
	for i := range 5*revokePage + 7 {
		leases = append(leases, journal.Lease{ID: fmt.Sprintf("g%04d", i), Kind: vault.Kind.Name, State: journal.Live, Settled: true, Due: begin.Add(time.Hour), Issued: begin})
	}
	slow := stubborn{revoke: func(ctx context.Context) error { <-ctx.Done(); return ctx.Err() }}
	swept(t, map[string]issue.Issuer{vault.Kind.Name: slow}, leases, func(t *testing.T, m *Manager, load func(string) journal.Lease) {
		ids, err := m.RevokeAll(t.Context(), journal.Filter{Scope: "s"}, "leaked", Cause{Actor: "operator:x"}, true)
		if err != nil || len(ids) != len(leases) {
			t.Fatalf("%d of %d were revoked, %v", len(ids), len(leases), err)
		}
		if took := time.Since(begin); took > confirmTime+time.Second {
			t.Errorf("it took %v", took)
		}
		for _, id := range ids {
			if g := load(id); g.State != journal.Revoking || g.Reason != "leaked" {
				t.Fatalf("%s is %s (%s)", id, g.State, g.Reason)
			}
		}
	})
}

// A recorder is an issuer of which only ends are asked.
type recorder struct {
	issue.Issuer
	revoke func(issue.Handle) error
}

func (r recorder) Revoke(_ context.Context, h issue.Handle) error { return r.revoke(h) }
func (r recorder) Extend(context.Context, issue.Handle, time.Duration) (time.Time, error) {
	return time.Time{}, errors.New("not asked for here")
}
