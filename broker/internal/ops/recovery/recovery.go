// Package recovery takes away again, in a store that was restored from a backup, what the
// denial log says was taken away after that backup.
package recovery

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/countersign/countersign/broker/api/event"
	"github.com/countersign/countersign/broker/internal/front/admin"
	"github.com/countersign/countersign/broker/internal/issue/ca"
	"github.com/countersign/countersign/broker/internal/lease"
	"github.com/countersign/countersign/broker/internal/lease/journal"
	"github.com/countersign/countersign/broker/internal/state/audit"
	"github.com/countersign/countersign/broker/internal/state/denials"
	"github.com/countersign/countersign/broker/internal/state/inventory"
	"github.com/countersign/countersign/broker/internal/state/store"
	"github.com/countersign/countersign/broker/internal/state/values"
)

// Merged is how many denials a store did not have.
type Merged map[denials.Kind]int

// Merge takes away what c denies and the store doesn't. Actor does it, in the audit log.
func Merge(ctx context.Context, s *store.Store, c denials.Contents, actor string, now time.Time, log *slog.Logger) (Merged, error) {
	merged := Merged{}
	err := s.Update(ctx, store.Everything(), func(tx *store.Tx) error {
		merged = Merged{}
		if err := denials.Skip(tx, c.Last); err != nil {
			return err
		}
		for _, d := range c.Denials {
			known, err := denials.Knows(tx, d)
			if err != nil {
				return err
			}
			if known || d.Lifted {
				continue
			}
			if err := takeAway(tx, s, d, actor, now, log); err != nil {
				return err
			}
			// A host's own denial has what this one and the store's say together.
			if d.Kind != denials.Host {
				if err := denials.Set(tx, d); err != nil {
					return err
				}
			}
			merged[d.Kind]++
		}
		return nil
	})
	return merged, err
}

// takeAway does what a denial says, and records it.
func takeAway(tx *store.Tx, s *store.Store, d denials.Denial, actor string, now time.Time, log *slog.Logger) error {
	told := event.Merged{Denial: string(d.Kind), Name: d.Name}
	about := event.Record{Time: now, Actor: actor}
	switch d.Kind {
	case denials.Host:
		h, changed, err := inventory.Deny(tx, d)
		if err != nil || !changed {
			return err
		}
		about.Host, told.State, told.Admitted, told.EKs, told.Reason = h.ID, string(h.State), h.Admitted, h.EKs, h.Reason
		if err := revoke(tx, s, journal.Filter{Host: h.ID, States: journal.Unended}, string(h.State)+" before the store was restored", actor, now, log); err != nil {
			return err
		}
	case denials.Lease:
		about.Lease = d.Name
		switch g, err := journal.Load(tx, d.Name); {
		case errors.Is(err, journal.ErrUnknown), errors.Is(err, journal.ErrUnreadable):
		case err != nil:
			return err
		case g.State != journal.Revoking && g.State != journal.Gone:
			if err := revokeAll(tx, s, []string{g.ID}, "revoked before the store was restored", actor, now, log); err != nil {
				return err
			}
		}
	case denials.Operator:
		if err := admin.DenyOperator(tx, d); err != nil {
			return err
		}
	case denials.Token:
		if err := inventory.DenyToken(tx, d); err != nil {
			return err
		}
	case denials.Value:
		if err := values.Deny(tx, d); err != nil {
			return err
		}
	default:
		return fmt.Errorf("the denial log was written by a newer broker: it has denials of the kind %q, which this one doesn't know", d.Kind)
	}
	_, err := audit.Append(tx, about, told)
	return err
}

func revoke(tx *store.Tx, s *store.Store, f journal.Filter, reason, actor string, now time.Time, log *slog.Logger) error {
	list, err := journal.List(tx, f)
	if err != nil {
		return err
	}
	var ids []string
	for _, g := range list {
		if g.Unreadable == nil {
			ids = append(ids, g.ID)
		}
	}
	return revokeAll(tx, s, ids, reason, actor, now, log)
}

// revokeAll records that leases are to end; the sweeper ends them when the broker runs.
func revokeAll(tx *store.Tx, s *store.Store, ids []string, reason, actor string, now time.Time, log *slog.Logger) error {
	recorder := lease.New(s, nil, log, func() time.Time { return now })
	_, err := recorder.RevokeIn(tx, ids, reason, lease.Cause{Actor: actor})
	return err
}

// seeded says that denials has what an earlier version's store took away.
const seeded = "denials.seeded"

// Seed records as denials what was taken away before this version kept them: once.
func Seed(ctx context.Context, s *store.Store, now time.Time) error {
	return s.Update(ctx, store.Everything(), func(tx *store.Tx) error {
		var done int
		if err := tx.QueryRow(`SELECT COUNT(*) FROM meta WHERE name = ?`, seeded).Scan(&done); err != nil || done > 0 {
			return err
		}
		if err := inventory.SeedDenials(tx, now); err != nil {
			return err
		}
		revoking, err := journal.List(tx, journal.Filter{States: []journal.State{journal.Revoking}})
		if err != nil {
			return err
		}
		for _, g := range revoking {
			if g.Unreadable != nil {
				continue
			}
			if err := journal.Save(tx, g); err != nil {
				return err
			}
		}
		if err := values.SeedDenials(tx, ca.RevokedBucket); err != nil {
			return err
		}
		_, err = tx.Exec(`INSERT INTO meta (name, value) VALUES (?, '1')`, seeded)
		return err
	})
}
