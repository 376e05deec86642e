package challenge_test

import (
	"errors"
	"testing"
	"time"

	"github.com/countersign/countersign/broker/internal/front/challenge"
)

func TestNonces(t *testing.T) {
	t0 := time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)
	var here, there challenge.Conn
	n := here.Give(2, challenge.Given{At: t0})
	if _, err := here.Take(n[0], t0.Add(challenge.Lifetime)); err != nil {
		t.Fatalf("in time: %v", err)
	}
	if _, err := here.Take(n[0], t0); !errors.Is(err, challenge.ErrSpent) {
		t.Errorf("twice: %v", err)
	}
	if _, err := there.Take(n[1], t0); !errors.Is(err, challenge.ErrSpent) {
		t.Errorf("on another connection: %v", err)
	}
	if _, err := here.Take(n[1], t0.Add(challenge.Lifetime+1)); !errors.Is(err, challenge.ErrSpent) {
		t.Errorf("late: %v", err)
	}
	if _, err := here.Take(challenge.NewNonce(), t0); !errors.Is(err, challenge.ErrSpent) {
		t.Errorf("never given: %v", err)
	}
	if got := here.Give(1000, challenge.Given{At: t0}); len(got) != challenge.MostNonces {
		t.Errorf("%d nonces open, want at most %d", len(got), challenge.MostNonces)
	}
	if got := here.Give(1, challenge.Given{At: t0}); len(got) != 0 {
		t.Error("one more than the most")
	}
	if got := here.Give(1, challenge.Given{At: t0.Add(challenge.Lifetime + 1)}); len(got) != 1 {
		t.Error("old nonces were not forgotten")
	}
}

func TestJoining(t *testing.T) {
	t0 := time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)
	var mine, other challenge.Conn
	mine.Join(&challenge.Joining{Name: "mine"}, t0)
	other.Join(&challenge.Joining{Name: "other"}, t0)
	if j, err := mine.TakeJoin(t0); err != nil || j.Name != "mine" {
		t.Errorf("displaced by another connection: %v, %v", j, err)
	}
	if _, err := mine.TakeJoin(t0); !errors.Is(err, challenge.ErrSpent) {
		t.Errorf("twice: %v", err)
	}
	if _, err := other.TakeJoin(t0.Add(challenge.Lifetime + 1)); !errors.Is(err, challenge.ErrSpent) {
		t.Errorf("late: %v", err)
	}
}
