// Package timekeeper is the broker's time for leases and silence: it goes on by
// the machine's running time, whatever the wall clock is set to, and recovers
// from a start at a wrong wall clock without a restart.
//
// It trusts the machine's running time, and of the wall clock what it said for
// a day without a jump. That much it calls sure, and keeps in the store: what
// must not happen too early, such as forgetting a revocation, waits for both
// the wall clock and the sure time. A wall clock that is wrong for less than
// forwardAfter moves nothing.
package timekeeper

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"log/slog"
	"strconv"
	"sync"
	"time"

	"github.com/countersign/countersign/broker/internal/state/store"
	"github.com/countersign/countersign/internal/clock"
)

const (
	// tolerance is how far wall clock and running time may part before they
	// disagree.
	tolerance = time.Minute
	// far is how far the keeper's time may be from the wall clock for good. Lower
	// differences harm nobody, since certificates begin a day before they are made.
	far = 24 * time.Hour
	// sureAfter is how long the wall clock has to agree with the running time
	// until it is believed.
	sureAfter = 24 * time.Hour
	// forwardAfter is how long a wall clock has to be ahead until the keeper
	// follows it: a machine that was paused, and no mistake of an hour.
	forwardAfter = 2 * time.Hour
	// saveEvery is how often the sure time is kept.
	saveEvery = time.Minute
)

const (
	sureKey = "clock.sure"
	// aliveKey is when the broker last served, by package liveness: what a store
	// begins with that has no sure time yet.
	aliveKey = "silence.alive"
)

// A Keeper is safe for concurrent use.
type Keeper struct {
	store *store.Store
	log   *slog.Logger
	wall  func() time.Time
	boot  func() time.Duration // the machine's running time

	mu     sync.Mutex    // guards what follows
	start  time.Time     // the time at begin
	begin  time.Duration // by boot
	sure   time.Time     // so much had surely passed at sureAt; zero: nothing is known
	sureAt time.Duration // by boot
	agreed time.Duration // by boot: since when wall clock and running time agree
	ahead  time.Duration // by boot: since when the wall clock is far ahead, 0: it isn't
}

// Open starts at the wall clock.
func Open(ctx context.Context, s *store.Store, log *slog.Logger, wall func() time.Time) (*Keeper, error) {
	sure, err := load(ctx, s)
	if err != nil {
		return nil, fmt.Errorf("read the store's last sure time: %w", err)
	}
	return start(s, log, wall, clock.SinceBoot, sure), nil
}

func start(s *store.Store, log *slog.Logger, wall func() time.Time, boot func() time.Duration, sure time.Time) *Keeper {
	now := boot()
	return &Keeper{store: s, log: log, wall: wall, boot: boot, start: wall().Round(0), begin: now, sure: sure, sureAt: now, agreed: now}
}

func load(ctx context.Context, s *store.Store) (time.Time, error) {
	var text string
	err := s.View(ctx, func(tx *store.Tx) error {
		err := tx.QueryRow(`SELECT value FROM meta WHERE name IN (?, ?) ORDER BY name LIMIT 1`, sureKey, aliveKey).Scan(&text)
		if errors.Is(err, sql.ErrNoRows) {
			text, err = "0", nil
		}
		return err
	})
	if err != nil {
		return time.Time{}, err
	}
	ms, err := strconv.ParseInt(text, 10, 64)
	return store.Time(ms), err
}

// Now returns the keeper's time.
func (k *Keeper) Now() time.Time {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.look()
}

// Sure returns a time that has surely passed, by no clock that was ahead for an
// hour: never later than the wall clock, and zero while a new broker knows of none.
func (k *Keeper) Sure() time.Time {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.look()
	if k.sure.IsZero() {
		return time.Time{}
	}

	sure := k.sureNow(k.boot())
	if wall := k.wall().Round(0); wall.Before(sure) {
		return wall
	}
	return sure
}

// look compares the clocks, follows the wall clock where it has to, and returns
// the keeper's time. k.mu is held.
func (k *Keeper) look() time.Time {
	boot, wall := k.boot(), k.wall().Round(0)
	now := k.start.Add(boot - k.begin)
	ahead := wall.Sub(now)

	if ahead.Abs() > tolerance {
		k.agreed = boot
	}
	switch {
	case ahead <= far:
		k.ahead = 0
	case k.ahead == 0:
		k.ahead = max(boot, 1)
	}

	switch {
	case ahead < -far && !k.sure.IsZero() && !wall.Before(k.sureNow(boot)):
		// The start was at a clock that was ahead: it has come back to a time that
		// nothing speaks against.
		now = k.follow(wall, boot)
	case k.ahead != 0 && boot-k.ahead >= forwardAfter:
		now = k.follow(wall, boot)
	case boot-k.agreed >= sureAfter:
		k.sure, k.sureAt = now, boot
	}
	return now
}

func (k *Keeper) follow(wall time.Time, boot time.Duration) time.Time {
	k.log.Warn("the broker's time follows the wall clock", "was", k.start.Add(boot-k.begin).UTC(), "now", wall.UTC())
	k.start, k.begin, k.agreed, k.ahead = wall, boot, boot, 0
	return wall
}

func (k *Keeper) sureNow(boot time.Duration) time.Time { return k.sure.Add(boot - k.sureAt) }

// Run keeps the sure time in the store until ctx ends.
func (k *Keeper) Run(ctx context.Context) error {
	ticker := time.NewTicker(saveEvery)
	defer ticker.Stop()
	for {
		if err := k.save(ctx); err != nil && ctx.Err() == nil {
			k.log.Error("the sure time is not kept", "err", err)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-ticker.C:
		}
	}
}

func (k *Keeper) save(ctx context.Context) error {
	sure := k.Sure()
	if sure.IsZero() {
		return nil
	}
	return k.store.Update(ctx, store.Any(store.Broker), func(tx *store.Tx) error {
		_, err := tx.Exec(`INSERT INTO meta (name, value) VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET value = excluded.value`,
			sureKey, strconv.FormatInt(store.Millis(sure), 10))
		return err
	})
}
