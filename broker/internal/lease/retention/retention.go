// Package retention forgets what nothing needs any more, so that a broker's store
// doesn't grow for ever: leases that ended long ago, and decisions on hosts and scopes
// that are gone. The audit log keeps what happened.
//
// It deletes little at a time, and only what ended: a credential that may still work is
// never forgotten.
package retention

import (
	"context"
	"log/slog"
	"time"

	"github.com/countersign/countersign/broker/internal/lease/journal"
	"github.com/countersign/countersign/broker/internal/policy"
	"github.com/countersign/countersign/broker/internal/state/inventory"
	"github.com/countersign/countersign/broker/internal/state/store"
)

const (
	// every is how often is looked for what can be forgotten.
	every = time.Hour
	// page is how much is deleted in one transaction, for which writers wait.
	page = 50
	// rest lies between two pages.
	rest = 100 * time.Millisecond
)

// A Keeper forgets.
type Keeper struct {
	Store  *store.Store
	Keep   time.Duration                        // since a lease's end, or a host's last proof
	Policy func(*store.Tx) (*policy.Set, error) // the set in force
	Log    *slog.Logger
	Now    func() time.Time
}

// Run forgets until ctx ends.
func (k *Keeper) Run(ctx context.Context) error {
	ticker := time.NewTicker(every)
	defer ticker.Stop()
	for {
		if err := k.Once(ctx); err != nil && ctx.Err() == nil {
			k.Log.Error("retention: not all was forgotten that could be", "err", err)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-ticker.C:
		}
	}
}

// Once forgets all that can be forgotten now.
func (k *Keeper) Once(ctx context.Context) error {
	if err := k.leases(ctx); err != nil {
		return err
	}
	return k.decisions(ctx)
}

func (k *Keeper) leases(ctx context.Context) error {
	before, all := k.Now().Add(-k.Keep), 0
	var after journal.Cursor
	for {
		var ids []string
		if err := k.Store.View(ctx, func(tx *store.Tx) (err error) {
			ids, after, err = journal.Forgettable(tx, before, after, page)
			return err
		}); err != nil {
			return err
		}
		if len(ids) > 0 {
			if err := k.Store.Update(ctx, store.Lease(ids...), func(tx *store.Tx) error { return journal.Forget(tx, ids) }); err != nil {
				return err
			}
		}
		if all += len(ids); after == (journal.Cursor{}) {
			break
		}
		if err := pause(ctx); err != nil {
			return err
		}
	}
	if all > 0 {
		k.Log.Info("ended leases were forgotten; the audit log has them", "leases", all, "ended_before", before)
	}
	return nil
}

// A decision is known by its host and scope.
type decision struct{ host, scope string }

// decisions walks through the decisions and deletes those of scopes that are no more,
// and of hosts that were removed or not heard for long.
func (k *Keeper) decisions(ctx context.Context) error {
	before := k.Now().Add(-k.Keep)
	var after decision
	for {
		var list, old []decision
		if err := k.Store.View(ctx, func(tx *store.Tx) error {
			list, old = nil, nil
			set, err := k.Policy(tx)
			if err != nil {
				return err
			}
			return tx.Each(func(row store.Row) error {
				var d decision
				var state inventory.State
				var proved int64
				if err := row.Scan(&d.host, &d.scope, &state, &proved); err != nil {
					return err
				}
				list = append(list, d)
				if state == "" || state == inventory.Removed || store.Time(proved).Before(before) || set.Scope(d.scope) == nil {
					old = append(old, d)
				}
				return nil
			}, `SELECT d.host_id, d.scope, COALESCE(h.state, ''), COALESCE(h.last_proved, 0)
				FROM decisions AS d LEFT JOIN hosts AS h ON h.id = d.host_id
				WHERE (d.host_id, d.scope) > (?, ?) ORDER BY d.host_id, d.scope LIMIT ?`, after.host, after.scope, page)
		}); err != nil {
			return err
		}
		if len(old) > 0 {
			var hosts []string
			for _, d := range old {
				hosts = append(hosts, d.host)
			}
			if err := k.Store.Update(ctx, store.Host(hosts...), func(tx *store.Tx) error {
				for _, d := range old {
					if _, err := tx.Exec(`DELETE FROM decisions WHERE host_id = ? AND scope = ?`, d.host, d.scope); err != nil {
						return err
					}
				}
				return nil
			}); err != nil {
				return err
			}
		}
		if len(list) < page {
			return nil
		}
		after = list[len(list)-1]
		if err := pause(ctx); err != nil {
			return err
		}
	}
}

func pause(ctx context.Context) error {
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(rest):
		return nil
	}
}
