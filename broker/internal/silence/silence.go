// Package silence notices hosts that stopped proving themselves.
//
// Only time in which this broker was serving counts: while it was down, and
// when the wall clock jumped, every host's limit moves along, so that no
// outage and no clock takes a credential. A host that is silent while others
// are heard becomes stale and loses what its scopes' grace no longer covers.
// More than a few a minute look like an outage of ours: the rest keep their
// leases and wait for an operator's word.
package silence

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strconv"
	"sync"
	"time"

	"github.com/countersign/countersign/broker/internal/audit"
	"github.com/countersign/countersign/broker/internal/inventory"
	"github.com/countersign/countersign/broker/internal/journal"
	"github.com/countersign/countersign/broker/internal/lease"
	"github.com/countersign/countersign/broker/internal/store"
)

// Every is how often the watch looks.
const Every = 5 * time.Second

// jump is how far wall clock and running time may part in one look.
const jump = 10 * time.Second

const (
	// far is how far a clock has to go back until due times are set back, too:
	// what waits an hour longer harms nobody.
	far = 24 * time.Hour
	// late is how long a time may have passed that still waits for what it was
	// set for.
	late = time.Hour
)

// A Watch looks for silent hosts.
type Watch struct {
	Store  *store.Store
	Leases *lease.Manager
	Brake  int // hosts a minute
	Log    *slog.Logger
	Now    func() time.Time

	mu     sync.Mutex
	held   map[string]bool // guarded by mu; hosts that wait for an operator
	recent []time.Time     // of hosts whose leases were revoked, by the loop alone
}

// Run looks until ctx ends.
func (w *Watch) Run(ctx context.Context) error {
	wall, err := w.lastAlive(ctx)
	if err != nil {
		return err
	}
	elapsed := time.Duration(0)
	ticker := time.NewTicker(Every)
	defer ticker.Stop()
	for {
		now := w.Now()
		// What passed on the wall beyond what was run: down time, or a jump.
		gap := now.Sub(wall) - elapsed
		if wall.IsZero() {
			gap = 0
		}
		if err := w.alive(ctx, now, gap); err != nil && ctx.Err() == nil {
			w.Log.Error("silence: not recorded", "err", err)
		} else if err == nil {
			wall = now
			if err := w.look(ctx, now); err != nil && ctx.Err() == nil {
				w.Log.Error("silence: not looked", "err", err)
			}
		}
		ran := time.Now() // carries the monotonic clock
		select {
		case <-ctx.Done():
			return nil
		case <-ticker.C:
		}
		elapsed = time.Since(ran)
	}
}

const aliveKey = "silence.alive"

func (w *Watch) lastAlive(ctx context.Context) (time.Time, error) {
	var text string
	err := w.Store.View(ctx, func(tx *store.Tx) error {
		return tx.QueryRow(`SELECT COALESCE((SELECT value FROM meta WHERE name = ?), '0')`, aliveKey).Scan(&text)
	})
	if err != nil {
		return time.Time{}, err
	}
	ms, err := strconv.ParseInt(text, 10, 64)
	return store.Time(ms), err
}

// alive records that the broker served until now, and moves all limits by a
// gap that it did not serve in.
func (w *Watch) alive(ctx context.Context, now time.Time, gap time.Duration) error {
	return w.Store.Update(ctx, func(tx *store.Tx) error {
		if _, err := tx.Exec(`INSERT INTO meta (name, value) VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET value = excluded.value`,
			aliveKey, strconv.FormatInt(store.Millis(now), 10)); err != nil {
			return err
		}
		if gap < jump && gap > -jump {
			return nil
		}
		w.Log.Warn("the broker did not serve, or the clock jumped; hosts get the time back", "gap", gap)
		if gap < -far {
			// What was set by the clock that was ahead lies around its last time or
			// after it; what was set since then lies around now.
			ahead := now.Add(-gap - late)
			return errors.Join(journal.SetBack(tx, ahead, gap), inventory.SetBack(tx, ahead, now, gap))
		}
		return inventory.Shift(tx, gap)
	})
}

func (w *Watch) look(ctx context.Context, now time.Time) error {
	var silent []inventory.Host
	if err := w.Store.View(ctx, func(tx *store.Tx) (err error) {
		silent, err = inventory.Silent(tx, now)
		return err
	}); err != nil {
		return err
	}
	for _, h := range silent {
		if err := w.silent(ctx, h, now); err != nil {
			return err
		}
	}
	return nil
}

// silent deals with one host whose limit has passed.
func (w *Watch) silent(ctx context.Context, h inventory.Host, now time.Time) error {
	var due []journal.Grant
	held := false
	err := w.Store.Update(ctx, func(tx *store.Tx) error {
		due, held = nil, false
		h, err := inventory.Get(tx, h.ID)
		if err != nil || h.SilentAt.IsZero() || h.SilentAt.After(now) {
			return err
		}
		others, err := inventory.HeardSince(tx, h.ID, h.SilentAt)
		if err != nil {
			return err
		}
		if h.State == inventory.Trusted {
			h.State, h.Reason = inventory.Stale, "silent since "+h.LastProved.Format(time.RFC3339)
			if err := w.record(tx, h, now, "host.stale"); err != nil {
				return err
			}
		}
		if !others {
			// It may be us: look again when somebody was heard.
			return inventory.Save(tx, h)
		}
		grants, err := journal.List(tx, journal.Filter{Host: h.ID, States: []journal.State{journal.Live, journal.Retiring}})
		if err != nil {
			return err
		}
		h.SilentAt = time.Time{}
		for _, g := range grants {
			limit := g.ProveBy.Add(g.Grace)
			switch {
			case !limit.After(now):
				due = append(due, g)
			case h.SilentAt.IsZero() || limit.Before(h.SilentAt):
				h.SilentAt = limit
			}
		}
		if len(due) > 0 && !w.mayRevoke(now) {
			held, due = true, nil
			h.SilentAt = time.Time{}
			h.Reason = fmt.Sprintf("silent since %s; held by the brake: `countersign lease revoke --host %s` ends its leases", h.LastProved.Format(time.RFC3339), h.ID)
			if err := w.record(tx, h, now, "host.held"); err != nil {
				return err
			}
		}
		return inventory.Save(tx, h)
	})
	if err != nil {
		return err
	}
	w.mu.Lock()
	if w.held == nil {
		w.held = map[string]bool{}
	}
	if held {
		w.held[h.ID] = true
	}
	w.mu.Unlock()
	if len(due) > 0 {
		w.recent = append(w.recent, now)
	}
	for _, g := range due {
		if _, err := w.Leases.Event(ctx, g.ID, journal.Revoke{Reason: "host silent beyond the scope's grace"}, lease.Cause{Actor: "broker", Later: true}); err != nil {
			return err
		}
	}
	return nil
}

func (w *Watch) record(tx *store.Tx, h inventory.Host, now time.Time, kind string) error {
	_, err := audit.Append(tx, audit.Record{Time: now, Kind: kind, Actor: "broker", Host: h.ID}, map[string]any{"reason": h.Reason, "last_proved": h.LastProved})
	return err
}

// mayRevoke says whether the brake lets one more host lose its leases.
func (w *Watch) mayRevoke(now time.Time) bool {
	n := 0
	for _, t := range w.recent {
		if now.Sub(t) < time.Minute {
			n++
		}
	}
	if n == 0 {
		w.recent = nil
	}
	return n < w.Brake
}

// Alarms says what waits for an operator.
func (w *Watch) Alarms() []string {
	w.mu.Lock()
	defer w.mu.Unlock()
	if len(w.held) == 0 {
		return nil
	}
	return []string{fmt.Sprintf("%d silent hosts are held by the brake; `countersign host list --state stale` shows them", len(w.held))}
}
