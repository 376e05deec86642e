package hostapi

import (
	"errors"
	"fmt"
	"time"

	"github.com/countersign/countersign/broker/api"
	"github.com/countersign/countersign/broker/internal/lease/journal"
	"github.com/countersign/countersign/broker/internal/state/budget"
	"github.com/countersign/countersign/broker/internal/state/store"
)

// mayIssue fails, by a fault that takes nothing, where the host has used up what it may
// have written, or the disk what new leases may take. What renews a lease that the host
// holds is served.
func (d *Desk) mayIssue(tx *store.Tx, host string, o Order) error {
	now := d.Now()
	until, over := budget.Of(tx).Over(host, now)
	var full error
	if d.Room != nil {
		full = d.Room()
	}
	if !over && full == nil {
		return nil
	}

	renews, err := renewal(tx, host, o, now)
	switch {
	case err != nil:
		return err
	case renews:
		return nil
	case full != nil:
		return api.NewError(api.Fault, "disk", full.Error())
	}
	return overBudget(until)
}

// renewal reports whether the order replaces a lease of the host and scope that nears its
// end: each lease can be replaced once, and its successor waits for its own time.
func renewal(tx *store.Tx, host string, o Order, now time.Time) (bool, error) {
	if o.Replaces == "" {
		return false, nil
	}
	g, err := journal.Load(tx, o.Replaces)
	if errors.Is(err, journal.ErrUnknown) || errors.Is(err, journal.ErrUnreadable) {
		return false, nil
	}
	half := g.Issued.Add(g.Expires.Sub(g.Issued) / 2)
	return err == nil && g.Host == host && g.Scope == o.Scope && g.State == journal.Live && !now.Before(half), err
}

func overBudget(until time.Time) *api.Error {
	return api.NewError(api.Fault, "host-budget", fmt.Sprintf("this host has had more written than %d records or %d MiB in an hour; until %s only what it holds is renewed",
		budget.Records, budget.Bytes>>20, until.UTC().Format(time.RFC3339)))
}
