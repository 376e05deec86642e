package admin

import (
	"context"
	"errors"
	"time"

	"github.com/countersign/countersign/broker/api/event"
	"github.com/countersign/countersign/broker/internal/lease/journal"
	"github.com/countersign/countersign/broker/internal/policy"
	"github.com/countersign/countersign/broker/internal/state/canary"
	"github.com/countersign/countersign/broker/internal/state/inventory"
	"github.com/countersign/countersign/broker/internal/state/store"
)

// IssueCanary makes a canary that looks like a scope's credentials. The audit log,
// which viewers read, doesn't tell its name.
func (d *Desk) IssueCanary(ctx context.Context, a Actor, scope, username string) (canary.Canary, error) {
	if err := a.need(Operator); err != nil {
		return canary.Canary{}, err
	}
	set, err := d.inForce(ctx)
	if err != nil {
		return canary.Canary{}, err
	}
	sc := set.Scope(scope)
	if sc == nil {
		return canary.Canary{}, invalid("no scope %.64q is in force", scope)
	}
	now := d.Now()
	c := canary.Canary{ID: inventory.NewID(), Scope: scope, Username: username, Audience: sc.Audience, Issued: now, By: a.Name}
	issued, err := d.userNames(ctx, scope)
	if err != nil {
		return c, err
	}
	if username == "" {
		if c.Username, err = likeThose(sc, issued, now); err != nil {
			return c, err
		}
	}
	if err := canary.CheckName(c.Username); err != nil {
		return c, invalid("%v", err)
	}
	for _, name := range issued {
		if name == c.Username {
			return c, invalid("%s is the user name of a credential that was issued: a canary has one that nobody was given", c.Username)
		}
	}
	err = d.act(ctx, a, Operator, store.Any(store.Canaries), event.Canary{As: event.CanaryIssued, ID: c.ID}, func(tx *store.Tx, r *event.Record) error {
		r.Scope = scope
		return canaryError(canary.Add(tx, c))
	})
	return c, err
}

func canaryError(err error) error {
	if errors.Is(err, canary.ErrTaken) || errors.Is(err, canary.ErrFull) {
		return invalid("%v", err)
	}
	return err
}

// userNames are those that a scope's credentials have had, the newest first.
func (d *Desk) userNames(ctx context.Context, scope string) (names []string, err error) {
	const page = 1000
	f := journal.Filter{Scope: scope, Newest: true, Limit: page}
	for {
		var leases []journal.Lease
		if err := d.Store.Report(ctx, func(tx *store.Tx) (err error) {
			leases, err = journal.List(tx, f)
			return err
		}); err != nil {
			return nil, err
		}
		for _, g := range leases {
			f.After = g.Cursor()
			if name := g.Names["db_username"]; name != "" {
				names = append(names, name)
			}
		}
		if len(leases) < page {
			return names, nil
		}
	}
}

// likeThose is a name that the scope's credentials could have.
func likeThose(sc *policy.Scope, issued []string, now time.Time) (string, error) {
	if len(issued) > 0 {
		if name, ok := canary.Like(issued[0], now); ok {
			return name, nil
		}
	} else if source, ok := sc.Source.(interface{ AccountRole() string }); ok {
		if role := source.AccountRole(); role != "" {
			return canary.ForRole(role, now), nil
		}
	}
	return "", invalid("scope %s hands out no user names that end in random letters: name one like them by --username", sc.Name)
}

// Canaries lists canaries. Who can read them knows what not to touch: not viewers.
func (d *Desk) Canaries(ctx context.Context, a Actor, scope string) (list []canary.Canary, err error) {
	if err := a.need(Responder); err != nil {
		return nil, err
	}
	err = d.Store.View(ctx, func(tx *store.Tx) error {
		list, err = canary.List(tx, scope)
		return err
	})
	return list, err
}

// RemoveCanary removes a canary.
func (d *Desk) RemoveCanary(ctx context.Context, a Actor, id string) error {
	return d.act(ctx, a, Operator, store.Any(store.Canaries), event.Canary{As: event.CanaryRemoved, ID: id}, func(tx *store.Tx, r *event.Record) (err error) {
		r.Scope, err = canary.Remove(tx, id)
		return err
	})
}
