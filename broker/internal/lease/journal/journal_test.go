package journal_test

import (
	"errors"
	"testing"
	"time"

	"github.com/countersign/countersign/broker/internal/issue"
	"github.com/countersign/countersign/broker/internal/lease/journal"
)

var t0 = time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)

func intended() journal.Lease {
	return journal.Intend(journal.Lease{ID: "g", TTL: 8 * time.Hour, Overlap: 10 * time.Minute}, t0)
}

func step(t *testing.T, g journal.Lease, e journal.Event, now time.Time) (journal.Lease, []journal.Effect) {
	t.Helper()
	g, effects, err := journal.Step(g, e, now)
	if err != nil {
		t.Fatal(err)
	}
	return g, effects
}

func has(effects []journal.Effect, want journal.Effect) bool {
	for _, e := range effects {
		if e == want {
			return true
		}
	}
	return false
}

func live(t *testing.T) journal.Lease {
	g, _ := step(t, intended(), journal.Issued{Ref: []byte(`{"accessor":"a"}`), Expires: t0.Add(issue.ProvisionalFor)}, t0)
	g, effects := step(t, g, journal.Acknowledged{}, t0)
	if g.State != journal.Live || !has(effects, journal.DoExtend) {
		t.Fatalf("acknowledged: %s %v, want live and to be extended", g.State, effects)
	}
	g, _ = step(t, g, journal.Extended{Expires: t0.Add(8 * time.Hour)}, t0)
	return g
}

func TestALeasesDays(t *testing.T) {
	g := live(t)
	if !g.Due.Equal(g.Expires) {
		t.Errorf("live until %v, but due at %v", g.Expires, g.Due)
	}
	g, _ = step(t, g, journal.Replaced{}, t0.Add(7*time.Hour))
	if g.State != journal.Retiring || !g.Due.Equal(t0.Add(7*time.Hour+10*time.Minute)) {
		t.Fatalf("replaced: %s due %v, want retiring for the overlap", g.State, g.Due)
	}
	g, effects := step(t, g, journal.Tick{}, g.Due)
	if g.State != journal.Revoking || !has(effects, journal.DoRevoke) {
		t.Fatalf("after the overlap: %s %v", g.State, effects)
	}
	g, _ = step(t, g, journal.Revoked{}, g.Due)
	if g.State != journal.Gone || !g.Due.IsZero() {
		t.Errorf("confirmed: %s due %v", g.State, g.Due)
	}
}

func TestOverlapNeverOutlivesTheCredential(t *testing.T) {
	g, _ := step(t, live(t), journal.Replaced{}, t0.Add(8*time.Hour-time.Minute))
	if g.Due.After(g.Expires) {
		t.Errorf("due %v, after its end %v", g.Due, g.Expires)
	}
}

func TestWhatIsNotAcknowledgedDies(t *testing.T) {
	g, _ := step(t, intended(), journal.Issued{Ref: []byte(`{"accessor":"a"}`), Expires: t0.Add(issue.ProvisionalFor)}, t0)
	if early, effects := step(t, g, journal.Tick{}, t0.Add(issue.ProvisionalFor-1)); early.State != journal.Provisional || effects != nil {
		t.Errorf("early: %s %v", early.State, effects)
	}
	g, effects := step(t, g, journal.Tick{}, t0.Add(issue.ProvisionalFor))
	if g.State != journal.Revoking || !has(effects, journal.DoRevoke) {
		t.Errorf("unacknowledged: %s %v", g.State, effects)
	}
	if _, _, err := journal.Step(g, journal.Acknowledged{}, t0.Add(3*time.Minute)); err == nil {
		t.Error("a late acknowledgement brought it back")
	}
}

func TestRevocationIsRetriedForever(t *testing.T) {
	g, _ := step(t, live(t), journal.Revoke{Reason: "quarantined"}, t0)
	now := t0
	for range 1000 {
		g, _ = step(t, g, journal.RevokeFailed{Err: errors.New("sealed")}, now)
		if wait := g.Due.Sub(now); wait <= 0 || wait > time.Minute {
			t.Fatalf("attempt %d: next in %v", g.Attempts, wait)
		}
		now = g.Due
		var effects []journal.Effect
		if g, effects = step(t, g, journal.Tick{}, now); !has(effects, journal.DoRevoke) {
			t.Fatal("gave up")
		}
	}
	if g.Reason != "quarantined" {
		t.Errorf("reason became %q", g.Reason)
	}
}

func TestIssuedAfterGivingUp(t *testing.T) {
	g, _ := step(t, intended(), journal.Tick{}, t0.Add(issue.ProvisionalFor))
	g, effects := step(t, g, journal.Issued{Ref: []byte(`{"accessor":"late"}`)}, t0.Add(3*time.Minute))
	if g.State != journal.Revoking || string(g.Ref) != `{"accessor":"late"}` || !has(effects, journal.DoRevoke) {
		t.Errorf("%s %q %v: the late token must be ended", g.State, g.Ref, effects)
	}
}

func TestFailedExtensionIsTriedAgainWhileItLives(t *testing.T) {
	g := intended()
	g.Replaces = "old"
	g, _ = step(t, g, journal.Issued{Ref: []byte(`{"accessor":"a"}`), Expires: t0.Add(issue.ProvisionalFor)}, t0)
	g, effects := step(t, g, journal.Acknowledged{}, t0)
	if has(effects, journal.DoReplace) {
		t.Error("the old one is retired before the new one has its length")
	}
	g, _ = step(t, g, journal.ExtendFailed{Err: errors.New("503")}, t0)
	g, effects = step(t, g, journal.Tick{}, g.Due)
	if g.State != journal.Live || !has(effects, journal.DoExtend) {
		t.Errorf("%s %v", g.State, effects)
	}
	if again, effects := step(t, g, journal.Acknowledged{}, t0); again.Settled || !has(effects, journal.DoExtend) {
		t.Errorf("acknowledged again: %v", effects)
	}
	if over, _ := step(t, g, journal.Tick{}, t0.Add(issue.ProvisionalFor)); over.State != journal.Revoking {
		t.Errorf("never extended: %s, but the host has gone back to the old one", over.State)
	}
	g, effects = step(t, g, journal.Extended{Expires: t0.Add(8 * time.Hour)}, t0)
	if !g.Settled || !has(effects, journal.DoReplace) {
		t.Errorf("extended: %v", effects)
	}
	if _, effects = step(t, g, journal.Extended{Expires: g.Expires}, t0); has(effects, journal.DoReplace) {
		t.Error("replaces twice")
	}
	g, effects = step(t, g, journal.Tick{}, g.Expires)
	if g.State != journal.Live || !has(effects, journal.DoExtend) {
		t.Errorf("at its end: %s %v; only the issuer knows that it is over", g.State, effects)
	}
	if g, _ = step(t, g, journal.Vanished{}, g.Expires); g.State != journal.Gone || g.Reason != "expired" {
		t.Errorf("over: %s because %q", g.State, g.Reason)
	}
}

// Every state answers every event without a panic, never comes back from gone,
// never leaves a lease that could still work without a time to look at it,
// and never issues.
func TestEveryEventInEveryState(t *testing.T) {
	events := []journal.Event{
		journal.Issued{Ref: []byte(`{"accessor":"a"}`), Expires: t0.Add(time.Hour)}, journal.IssueFailed{Err: errors.New("x")},
		journal.Acknowledged{}, journal.Extended{Expires: t0.Add(time.Hour)}, journal.ExtendFailed{Err: errors.New("x")},
		journal.Proved{By: t0}, journal.Bound{Instance: "i"}, journal.Replaced{}, journal.Revoke{Reason: "r"},
		journal.Vanished{}, journal.Revoked{}, journal.RevokeFailed{Err: errors.New("x")}, journal.Tick{},
	}
	var walk func(g journal.Lease, now time.Time, depth int)
	walk = func(g journal.Lease, now time.Time, depth int) {
		if depth == 0 {
			return
		}
		for _, e := range events {
			next, _, err := journal.Step(g, e, now)
			if err != nil && next.State != g.State {
				t.Fatalf("%s + %T: failed and moved to %s", g.State, e, next.State)
			}
			if g.State == journal.Gone && next.State != journal.Gone {
				t.Fatalf("gone + %T: came back as %s", e, next.State)
			}
			if next.State != journal.Gone && next.Due.IsZero() {
				t.Fatalf("%s + %T: %s with no time to look at it again", g.State, e, next.State)
			}
			if next.State == journal.Live && g.State != journal.Live && g.State != journal.Provisional {
				t.Fatalf("%s + %T: live without an acknowledgement", g.State, e)
			}
			walk(next, now.Add(time.Minute), depth-1)
		}
	}
	walk(intended(), t0, 5)
}
