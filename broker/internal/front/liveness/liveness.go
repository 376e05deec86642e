// Package liveness notices hosts that stopped proving themselves.
//
// Only time in which this broker was serving counts: while it was down, and
// when the wall clock jumped, every host's limit moves along, so that no
// outage and no clock takes a credential. A host that is silent while others
// are heard becomes stale and loses what its scopes' grace no longer covers.
// More than a few a minute look like an outage of ours: the rest keep their
// leases and wait for an operator's word.
package liveness

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/countersign/countersign/broker/api/event"
	"github.com/countersign/countersign/broker/internal/lease"
	"github.com/countersign/countersign/broker/internal/lease/journal"
	"github.com/countersign/countersign/broker/internal/state/audit"
	"github.com/countersign/countersign/broker/internal/state/inventory"
	"github.com/countersign/countersign/broker/internal/state/store"
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

	mu      sync.Mutex
	held    map[string]bool // guarded by mu; hosts that wait for an operator
	unheard int             // guarded by mu; silent hosts since whose limits nobody was heard
	recent  []time.Time     // of hosts whose leases were revoked, by the loop alone
}

// Run looks until ctx ends.
func (w *Watch) Run(ctx context.Context) error {
	last, err := w.lastAlive(ctx)
	if err != nil {
		return err
	}
	if err := w.recall(ctx); err != nil {
		return err
	}
	ran := time.Duration(0) // since last, as far as this process knows
	ticker := time.NewTicker(Every)
	defer ticker.Stop()
	for {
		now, began := w.Now(), time.Now() // began carries the monotonic clock
		gap := unserved(last, now, ran)
		if err := w.alive(ctx, now, gap); err != nil && ctx.Err() == nil {
			w.Log.Error("silence: not recorded", "err", err)
		} else if err == nil {
			last = now
			if err := w.look(ctx, now); err != nil && ctx.Err() == nil {
				w.Log.Error("silence: not looked", "err", err)
			}
		}
		select {
		case <-ctx.Done():
			return nil
		case <-ticker.C:
		}
		// The look's own time counts: the broker served meanwhile.
		if last.Equal(now) {
			ran = time.Since(began)
		} else {
			ran += time.Since(began)
		}
	}
}

// unserved is the time between last and now in which the broker did not serve: what
// passed on the wall beyond the time that it ran, by a stop, a sleep or a jump.
func unserved(last, now time.Time, ran time.Duration) (gap time.Duration) {
	if last.IsZero() {
		return 0
	}
	return now.Sub(last) - ran
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
	rows := store.Any(store.Broker)
	if gap >= jump || gap <= -jump {
		rows = rows.And(store.Any(store.Hosts, store.Leases))
	}
	return w.Store.Update(ctx, rows, func(tx *store.Tx) error {
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

// page is how many silent hosts are dealt with in one transaction.
const page = 64

// look deals with every host whose limit has passed. A broker that hears nobody writes
// nothing: it may be the broker itself that is cut off.
func (w *Watch) look(ctx context.Context, now time.Time) error {
	if err := w.letGo(ctx); err != nil {
		return err
	}
	unheard := 0
	defer func() {
		w.mu.Lock()
		defer w.mu.Unlock()
		w.unheard = unheard
	}()
	var after inventory.Silence
	for {
		var silent []inventory.Silence
		var heard inventory.Heard
		if err := w.Store.View(ctx, func(tx *store.Tx) (err error) {
			if silent, err = inventory.Silent(tx, now, after, page); err == nil {
				heard, err = inventory.LastHeard(tx, now)
			}
			return err
		}); err != nil {
			return err
		}
		if len(silent) == 0 {
			return nil
		}
		full := len(silent) == page
		after = silent[len(silent)-1]
		due := slices.DeleteFunc(slices.Clone(silent), func(s inventory.Silence) bool { return !heard.Since(store.Time(s.At), s.ID) })
		unheard += len(silent) - len(due)
		if len(due) > 0 {
			if err := w.silent(ctx, due, heard, now); err != nil {
				return err
			}
		}
		if !full {
			return nil
		}
	}
}

// heldWords are in the reason of a host that the brake holds.
const heldWords = "held by the brake"

// recall finds the hosts that were held before a restart: they still wait for an
// operator.
func (w *Watch) recall(ctx context.Context) error {
	held, after := map[string]bool{}, inventory.Cursor{}
	for more := true; more; {
		if err := w.Store.View(ctx, func(tx *store.Tx) error {
			hosts, err := inventory.ByName(tx, after, page)
			for _, h := range hosts {
				after = h.Cursor()
				if h.State == inventory.Stale && h.SilentAt.IsZero() && strings.Contains(h.Reason, heldWords) {
					held[h.ID] = true
				}
			}
			more = len(hosts) == page
			return err
		}); err != nil {
			return err
		}
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.held = held
	return nil
}

// letGo forgets held hosts that are stale no more, or have nothing left to lose: some in
// each look.
func (w *Watch) letGo(ctx context.Context) error {
	w.mu.Lock()
	var ids []string
	for id := range w.held {
		if ids = append(ids, id); len(ids) == page {
			break
		}
	}
	w.mu.Unlock()
	return w.Store.View(ctx, func(tx *store.Tx) error {
		for _, id := range ids {
			h, err := inventory.Get(tx, id)
			if err != nil && !errors.Is(err, inventory.ErrUnknown) && !errors.Is(err, inventory.ErrUnreadable) {
				return err
			}
			left, err := journal.CountUnended(tx, id)
			if err != nil {
				return err
			}
			if left > 0 && (h.Unreadable != nil || h.State == inventory.Stale && h.SilentAt.IsZero()) {
				continue
			}
			w.mu.Lock()
			delete(w.held, id)
			w.mu.Unlock()
		}
		return nil
	})
}

// silent deals with hosts whose limit has passed while others were heard, in one
// transaction, and revokes what their scopes' grace no longer covers.
func (w *Watch) silent(ctx context.Context, hosts []inventory.Silence, heard inventory.Heard, now time.Time) error {
	var held []string
	var begin func(context.Context)
	revoking := 0
	var ids []string
	for _, s := range hosts {
		ids = append(ids, s.ID)
	}
	err := w.Store.Update(ctx, store.Host(ids...), func(tx *store.Tx) (err error) {
		var due []string
		held, revoking = nil, 0
		for _, s := range hosts {
			leases, brake, err := w.judge(tx, s.ID, heard, now, w.mayRevoke(now, revoking))
			if errors.Is(err, inventory.ErrUnreadable) {
				w.Log.Error("silence: a host can't be judged", "host", s.ID, "err", fmt.Errorf("%w; `countersign fsck` says more", err))
				continue
			}
			if err != nil {
				return err
			}
			if brake {
				held = append(held, s.ID)
			}
			if len(leases) > 0 {
				due, revoking = append(due, leases...), revoking+1
			}
		}
		// Nobody looks at these hosts again: what they lose is lost in the same commit.
		begin, err = w.Leases.RevokeIn(tx, due, "host silent beyond the scope's grace", lease.Cause{Actor: "broker"})
		return err
	})
	if err != nil {
		return err
	}
	w.mu.Lock()
	if w.held == nil {
		w.held = map[string]bool{}
	}
	for _, id := range held {
		w.held[id] = true
	}
	w.mu.Unlock()
	for range revoking {
		w.recent = append(w.recent, now)
	}
	begin(ctx)
	return nil
}

// judge makes a host stale that is silent still, and returns its leases that are to
// be revoked; or, where the brake doesn't let it, that the host is held.
func (w *Watch) judge(tx *store.Tx, id string, heard inventory.Heard, now time.Time, mayRevoke bool) (due []string, held bool, err error) {
	h, err := inventory.Get(tx, id)
	if err != nil {
		return nil, false, err
	}
	if h.SilentAt.IsZero() || h.SilentAt.After(now) || !heard.Since(h.SilentAt, id) {
		return nil, false, nil // it was heard meanwhile
	}
	leases, err := journal.List(tx, journal.Filter{Host: id, States: []journal.State{journal.Live, journal.Retiring}})
	if err != nil {
		return nil, false, err
	}
	before := h.State
	if h, err = h.After(inventory.OnSilence, "silent since "+h.LastProved.Format(time.RFC3339)); err != nil {
		return nil, false, err
	}
	if h.State != before {
		if err := w.record(tx, h, now, event.HostStale); err != nil {
			return nil, false, err
		}
	}
	h.SilentAt = time.Time{}
	for _, g := range leases {
		if g.Unreadable != nil {
			w.Log.Error("silence: a lease can't be judged", "lease", g.ID, "err", g.Unreadable)
			continue
		}
		limit := g.ProveBy.Add(g.Grace)
		switch {
		case !limit.After(now):
			due = append(due, g.ID)
		case h.SilentAt.IsZero() || limit.Before(h.SilentAt):
			h.SilentAt = limit
		}
	}
	if len(due) > 0 && !mayRevoke {
		due, held = nil, true
		h.SilentAt = time.Time{}
		if h.State == inventory.Stale {
			h.Reason = fmt.Sprintf("silent since %s; %s: `countersign lease revoke --host %s` ends its leases", h.LastProved.Format(time.RFC3339), heldWords, h.ID)
		}
		if err := w.record(tx, h, now, event.HostHeld); err != nil {
			return nil, false, err
		}
	}
	return due, held, inventory.Save(tx, h)
}

func (w *Watch) record(tx *store.Tx, h inventory.Host, now time.Time, kind event.Kind) error {
	_, err := audit.Append(tx, event.Record{Time: now, Actor: "broker", Host: h.ID}, event.Silence{As: kind, Reason: h.Reason, LastProved: h.LastProved})
	return err
}

// mayRevoke reports whether the brake lets one more host lose its leases, beside the
// ones of this moment.
func (w *Watch) mayRevoke(now time.Time, more int) bool {
	w.recent = slices.DeleteFunc(w.recent, func(t time.Time) bool { return now.Sub(t).Abs() >= time.Minute })
	return len(w.recent)+more < w.Brake
}

// Alarms are what waits for an operator.
func (w *Watch) Alarms() (alarms []string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.unheard > 0 {
		alarms = append(alarms, fmt.Sprintf("%d hosts are silent, and no other was heard since: nothing is taken from them; can hosts reach this broker?", w.unheard))
	}
	if len(w.held) == 0 {
		return alarms
	}
	return append(alarms, fmt.Sprintf("%d silent hosts are held by the brake; `countersign host list --state stale` shows them", len(w.held)))
}
