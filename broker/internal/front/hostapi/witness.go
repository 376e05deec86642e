package hostapi

import (
	"context"

	"github.com/countersign/countersign/broker/api/event"
	"github.com/countersign/countersign/broker/internal/front/challenge"
	"github.com/countersign/countersign/broker/internal/lease/journal"
	"github.com/countersign/countersign/broker/internal/state/audit"
	"github.com/countersign/countersign/broker/internal/state/budget"
	"github.com/countersign/countersign/broker/internal/state/store"
	"github.com/countersign/countersign/internal/bounded"
)

// An Open is that a program opened the file of a credential that is not its own, by
// the word of the host.
type Open struct {
	Lease string
	event.Opened
}

// maxSeen bounds a text of an Open as it is kept.
const maxSeen = 512

// Witness enters what a host saw of its own credentials' files. It takes nothing and
// gives nothing, and so needs no fresh evidence; a host can only speak of itself.
func (d *Desk) Witness(ctx context.Context, conn *challenge.Conn, opens []Open, request string) error {
	now := d.Now()
	leases := make([]journal.Lease, len(opens))
	for i, o := range opens {
		g, err := d.own(ctx, conn, o.Lease)
		if err != nil {
			return err
		}
		leases[i] = g
	}
	err := d.Store.Update(ctx, nil, func(tx *store.Tx) error {
		if len(opens) > 0 {
			if until, over := budget.Of(tx).Over(leases[0].Host, now); over {
				return overBudget(until)
			}
		}
		for i, o := range opens {
			if o.Time.After(now) || o.Time.Before(leases[i].Issued) {
				o.Time = now // no clock of a host's moves it to another lease's time
			}
			o.Path, o.Exe, o.User, o.Unit = bounded.Text(o.Path, maxSeen), bounded.Text(o.Exe, maxSeen), bounded.Text(o.User, maxSeen), bounded.Text(o.Unit, maxSeen)
			r := event.Record{Time: now, Actor: "host:" + leases[i].Host, Host: leases[i].Host, Scope: leases[i].Scope, Lease: leases[i].ID, Request: request}
			if _, err := audit.Append(tx, r, o.Opened); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	return nil
}
