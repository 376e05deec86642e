package watch

import (
	"context"
	"errors"
	"log/slog"
	"sync/atomic"
	"testing"
	"time"

	"github.com/countersign/countersign/test/fakebroker"
)

// TestConfirmed: that the broker's log is open for reading doesn't make the ledger newer.
// Only what the broker says of its length does, as of when it was asked.
func TestConfirmed(t *testing.T) {
	t.Parallel()
	b, err := fakebroker.Start()
	if err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	var gone atomic.Bool
	refused := make(chan struct{}, 100)
	b.OnCheckpoint = func(context.Context) error {
		if gone.Load() {
			refused <- struct{}{}
			return errors.New("no answer")
		}
		return nil
	}
	if err := b.Issue(fakebroker.Lease("L1", "a", "10.0.0.1", noon)); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	f := &follower{dial: b.Dial, log: slog.New(slog.DiscardHandler), now: time.Now, empty: true, out: make(chan update)}
	go f.run(ctx)

	// Once confirmed, the ledger has what was issued by then.
	next := func() (last time.Time, entries int) {
		for last.IsZero() {
			u := <-f.out
			entries += len(u.entries)
			last = u.synced
		}
		return last, entries
	}
	if at, entries := next(); entries == 0 || at.After(time.Now()) {
		t.Fatalf("confirmed as of %v with %d entries", at, entries)
	}
	if err := b.Issue(fakebroker.Lease("L2", "b", "10.0.0.1", noon)); err != nil {
		t.Fatal(err)
	}
	issued := time.Now()
	entries := 0
	for at := (time.Time{}); at.Before(issued); {
		var n int
		at, n = next()
		entries += n
	}
	if entries == 0 {
		t.Error("the ledger is called newer than a lease that it lacks")
	}

	// The broker is gone, by and by, with the stream open.
	gone.Store(true)
	left := time.Now()
	for n := 0; n < 2; {
		select {
		case u := <-f.out:
			if u.synced.After(left) {
				t.Fatal("the ledger grows newer without the broker")
			}
		case <-refused:
			n++
		}
	}
	gone.Store(false)
	for at := (time.Time{}); !at.After(left); {
		at, _ = next()
	}
}
