package lease

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/countersign/countersign/broker/internal/journal"
	"github.com/countersign/countersign/broker/internal/store"
)

// sweepPage bounds how many grants one look takes on.
const sweepPage = 256

// longestSleep is how long the sweeper trusts a due time that it read: a wall
// clock that was set forward meanwhile brings due times nearer.
const longestSleep = 15 * time.Second

// Sweep sends Tick to every grant whose time has come, until ctx ends. It is
// the normal path of everything that waits, and so the repair after a crash.
func (m *Manager) Sweep(ctx context.Context) error {
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-m.store.Stopped():
			return m.store.Err()
		case <-m.wake:
		case <-timer.C:
			if err := m.sweepOnce(ctx); err != nil && ctx.Err() == nil {
				m.log.Error("lease: sweeping", "err", err)
			}
		}
		timer.Reset(m.untilNextDue(ctx))
	}
}

func (m *Manager) untilNextDue(ctx context.Context) time.Duration {
	var next time.Time
	if err := m.store.View(ctx, func(tx *store.Tx) (err error) {
		next, err = journal.NextDue(tx)
		return err
	}); err != nil || next.IsZero() {
		return longestSleep
	}
	// Not at once again, lest a grant that somebody acts on be polled in a loop.
	return min(max(next.Sub(m.now()), time.Second), longestSleep)
}

func (m *Manager) sweepOnce(ctx context.Context) error {
	var due []journal.Grant
	now := m.now()
	if err := m.store.View(ctx, func(tx *store.Tx) (err error) {
		due, err = journal.List(tx, journal.Filter{DueBy: now, Limit: sweepPage})
		return err
	}); err != nil {
		return err
	}
	var errs []error
	for _, g := range due {
		if m.claimed(g.ID) {
			continue // its act is under way
		}
		if _, err := m.Event(ctx, g.ID, journal.Tick{}, Cause{Actor: "broker", Later: true}); err != nil {
			errs = append(errs, fmt.Errorf("lease %s: %w", g.ID, err))
		}
	}
	return errors.Join(errs...)
}
