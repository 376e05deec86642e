package witness

import (
	"context"
	"log/slog"
	"os/user"
	"slices"
	"strconv"
	"sync"
	"time"

	"github.com/countersign/countersign/broker/wire"
	"github.com/countersign/countersign/hostagent/internal/attest"
)

const (
	again      = time.Hour // one Open of the same kind in this time
	maxTold    = 1024      // kinds that are remembered
	maxPending = 64        // Opens that wait for the broker
	maxCall    = 16        // Opens of one call
	callEvery  = 10 * time.Second
	retryAfter = time.Minute // the broker takes one call a minute of who tells it much
	callTime   = 30 * time.Second
)

// A kind of open is told of once an hour.
type kind struct {
	credential string
	exe        string
	uid        int
	unit       string
}

type seen struct {
	kind kind
	open attest.FileOpen // without its user's name
}

// A queue is what was seen and is to be told. It is bounded, whatever is done
// to the files: when Opens come faster than they can be told, the first ones
// stay and later ones are lost.
type queue struct {
	log  *slog.Logger
	now  func() time.Time
	wake chan struct{} // capacity 1: something is pending

	mu      sync.Mutex
	told    map[kind]time.Time // guarded by mu; when it was entered
	pending []*seen            // guarded by mu
}

func newQueue(log *slog.Logger, now func() time.Time) *queue {
	return &queue{log: log, now: now, wake: make(chan struct{}, 1), told: map[kind]time.Time{}}
}

// enter takes an open, unless it was told of or there is no room.
func (q *queue) enter(s *seen) {
	q.mu.Lock()
	defer q.mu.Unlock()
	now := q.now()
	if at, ok := q.told[s.kind]; ok && now.Sub(at) < again || len(q.pending) == maxPending {
		return
	}
	if len(q.told) >= maxTold {
		q.forgetOldest()
	}
	s.open.Time = now
	q.told[s.kind] = now
	q.pending = append(q.pending, s)
	select {
	case q.wake <- struct{}{}:
	default:
	}
}

// forgetOldest makes room; q.mu is held.
func (q *queue) forgetOldest() {
	var oldest kind
	var since time.Time
	for k, at := range q.told {
		if since.IsZero() || at.Before(since) {
			oldest, since = k, at
		}
	}
	delete(q.told, oldest)
}

// next is what one call tells: of one lease, so that the broker's word about a
// lease is about them all.
func (q *queue) next() (batch []*seen) {
	q.mu.Lock()
	defer q.mu.Unlock()
	for _, s := range q.pending {
		if s.open.Lease == q.pending[0].open.Lease && len(batch) < maxCall {
			batch = append(batch, s)
		}
	}
	return batch
}

// settle takes what was told, or can't be, out of what is pending.
func (q *queue) settle(batch []*seen, told bool) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.pending = slices.DeleteFunc(q.pending, func(s *seen) bool { return slices.Contains(batch, s) })
	for _, s := range batch {
		if !told {
			delete(q.told, s.kind) // of the next lease it is told
		}
	}
}

// tell sends what is pending until ctx ends.
func (q *queue) tell(ctx context.Context, send func(context.Context, []attest.FileOpen) error) {
	problem := ""
	for {
		batch := q.next()
		if len(batch) == 0 {
			select {
			case <-ctx.Done():
				return
			case <-q.wake:
			}
			continue
		}
		opens := make([]attest.FileOpen, len(batch))
		for i, s := range batch {
			opens[i] = s.open
			opens[i].User = text(userName(s.kind.uid))
		}
		limited, cancel := context.WithTimeout(ctx, callTime)
		err := send(limited, opens)
		cancel()
		pause := callEvery
		switch {
		case err == nil:
			problem = ""
			q.settle(batch, true)
			for _, o := range opens {
				q.log.Warn("another program opened a credential's file", "lease", o.Lease, "path", o.Path, "pid", o.PID, "exe", o.Exe, "user", o.User, "unit", o.Unit)
			}
		case wire.FromConnect(err).Check == wire.CheckGone:
			q.settle(batch, false)
		default:
			pause = retryAfter
			if err.Error() != problem && ctx.Err() == nil {
				problem = err.Error()
				q.log.Warn("who opened a credential's file is not told yet", "err", err)
			}
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(pause):
		}
	}
}

// userName is a user's name, or the number where it has none here.
func userName(uid int) string {
	if uid < 0 {
		return ""
	}
	id := strconv.Itoa(uid)
	if u, err := user.LookupId(id); err == nil {
		return u.Username
	}
	return id
}
