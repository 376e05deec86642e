package lease

import (
	"context"
	"errors"
	"fmt"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/countersign/countersign/broker/internal/lease/journal"
	"github.com/countersign/countersign/broker/internal/state/store"
)

const (
	// longestSleep is how long the sweeper trusts a due time that it read.
	longestSleep = 15 * time.Second
	// rest lies between two looks that found no full page, lest a lease that somebody
	// acts on be polled in a loop.
	rest = time.Second
	// late is how long after its due time a lease counts as overdue.
	late = 10 * time.Second
	// oddAgain is how often leases that couldn't be stepped are tried again: what failed
	// may have been the disk for a moment.
	oddAgain = time.Minute
	// claimed is how long this broker keeps the right to sweep a kind of leases after its
	// last sweep, if several brokers share the store.
	claimed = 30 * time.Second
)

// Sweep sends Tick to every lease whose time has come, until ctx ends. It is
// the normal path of everything that waits, and so the repair after a crash.
func (m *Manager) Sweep(ctx context.Context) error {
	group, ctx := errgroup.WithContext(ctx)
	for _, l := range m.lanes {
		group.Go(func() error { m.sweep(ctx, l); return nil })
	}
	group.Go(func() error {
		select {
		case <-ctx.Done():
			return nil
		case <-m.store.Stopped():
			return m.store.Err()
		}
	})
	return group.Wait()
}

// sweep looks after one kind of leases: at their due times, and again at once where a
// look found as many as it could take on.
func (m *Manager) sweep(ctx context.Context, l *lane) {
	defer func() {
		if err := m.store.Release(context.WithoutCancel(ctx), l.claim()); err != nil && !errors.Is(err, store.ErrStopped) {
			m.log.Error("lease: release the claim to sweep", "kind", l.kind, "err", err)
		}
	}()
	odd, tried := map[string]bool{}, m.now()
	for {
		// From here on whoever sets a due time is heard.
		began := m.now()
		if began.Sub(tried) >= oddAgain {
			clear(odd)
			tried = began
		}
		l.alarm.set(began.Add(longestSleep))
		full, err := m.sweepPage(ctx, l, odd)
		switch {
		case ctx.Err() != nil:
			return
		case err != nil:
			m.log.Error("lease: sweeping", "kind", l.kind, "err", err)
		case full:
			continue
		}
		if err := m.store.View(ctx, func(tx *store.Tx) error {
			next, err := journal.NextDue(tx, l.kind)
			if !next.IsZero() {
				l.alarm.by(next)
			}
			return err
		}); err != nil && ctx.Err() == nil {
			m.log.Error("lease: looking for the next due time", "kind", l.kind, "err", err)
		}
		if !l.alarm.wait(ctx.Done(), m.now, began.Add(rest)) {
			return
		}
	}
}

// sweepPage sends Tick to as many due leases as the lane has room for, in one
// transaction that also claims the kind for this broker, and starts the acts that follow.
// It waits while the lane is full, and returns whether it filled the lane: there may be
// more to do. Leases that can't be stepped are added to odd and passed over.
func (m *Manager) sweepPage(ctx context.Context, l *lane, odd map[string]bool) (full bool, err error) {
	places := l.take(ctx)
	started := 0
	defer func() {
		for range places - started {
			<-l.slots
		}
	}()
	if places == 0 {
		return false, ctx.Err()
	}
	ids, err := m.claimDue(ctx, l, odd, places)
	if err != nil || len(ids) == 0 {
		return false, err
	}
	steps, failed, mine, err := m.tick(ctx, l, ids)
	if err != nil || !mine {
		for _, id := range ids {
			m.release(id)
		}
		return false, err
	}
	for id, err := range failed {
		m.release(id)
		m.log.Error("lease: it is due, and can't be looked after", "lease", id, "err", fmt.Errorf("%w; `countersign fsck` says more", err))
		odd[id] = true
	}
	for _, s := range steps {
		if len(s.effects) == 0 {
			m.release(s.lease.ID)
			continue
		}
		started++
		go m.run(context.WithoutCancel(ctx), l, s, Cause{Actor: "broker"}, func() {})
	}
	return started == places, nil
}

// tick sends Tick to leases, as recordAll does, unless another broker has the claim.
func (m *Manager) tick(ctx context.Context, l *lane, ids []string) (steps []step, odd map[string]error, mine bool, err error) {
	err = m.store.Update(ctx, store.Lease(ids...), func(tx *store.Tx) (err error) {
		if mine, err = store.Claim(tx, l.claim(), m.now(), claimed); err != nil || !mine {
			return err
		}
		steps, odd, err = m.recordIn(tx, ids, journal.Tick{}, Cause{Actor: "broker"})
		return err
	})
	if err != nil || !mine {
		return nil, nil, mine, err
	}
	for _, s := range steps {
		m.due(s.lease)
	}
	return steps, odd, true, nil
}

// claim returns the name of the claim to sweep the lane's kind.
func (l *lane) claim() string { return "sweep " + l.kind }

// take holds slots of the lane: at least one, unless ctx ends, and more that are free, up
// to the sweeper's share.
func (l *lane) take(ctx context.Context) (n int) {
	select {
	case l.slots <- struct{}{}:
		n++
	case <-ctx.Done():
		return 0
	}
	for n < share {
		select {
		case l.slots <- struct{}{}:
			n++
		default:
			return n
		}
	}
	return n
}

// claimDue claims at most n leases that are due and that nobody acts on.
func (m *Manager) claimDue(ctx context.Context, l *lane, odd map[string]bool, n int) (ids []string, err error) {
	m.mu.Lock()
	most := n + len(m.running) + len(odd)
	m.mu.Unlock()
	var due []string
	if err := m.store.View(ctx, func(tx *store.Tx) (err error) {
		due, err = journal.Due(tx, l.kind, m.now(), most)
		return err
	}); err != nil {
		return nil, err
	}
	for _, id := range due {
		if len(ids) < n && !odd[id] && m.claim(id) {
			ids = append(ids, id)
		}
	}
	return ids, nil
}

// Overdue is how many leases the sweeper has not looked after for more than ten
// seconds beyond their due time, and by how much the oldest is late.
func (m *Manager) Overdue(ctx context.Context) (n uint64, oldest time.Duration, err error) {
	now := m.now()
	err = m.store.View(ctx, func(tx *store.Tx) error {
		n, oldest = 0, 0
		for kind := range m.lanes {
			some, first, err := journal.Overdue(tx, kind, now.Add(-late))
			if err != nil {
				return err
			}
			if some > 0 {
				n, oldest = n+some, max(oldest, now.Sub(first))
			}
		}
		return nil
	})
	return n, oldest, err
}

// Alarms are what an operator has to know of leases.
func (m *Manager) Alarms(ctx context.Context) []string {
	n, oldest, err := m.Overdue(ctx)
	switch {
	case err != nil:
		return []string{"overdue leases can't be counted: " + err.Error()}
	case n > 0:
		return []string{fmt.Sprintf("%d leases are overdue, the oldest by %s: their end is not yet asked for; the broker's log says why, if it is not load alone", n, oldest.Round(time.Second))}
	}
	return nil
}
