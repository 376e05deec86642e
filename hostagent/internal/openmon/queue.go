package openmon

import (
	"context"
	"log/slog"
	"maps"
	"os/user"
	"slices"
	"strconv"
	"sync"
	"time"

	"github.com/countersign/countersign/broker/api"
	"github.com/countersign/countersign/hostagent/internal/attest"
)

const (
	again      = time.Hour // one Open of the same kind in this time
	maxKinds   = 16        // of a credential's Opens in this time, and one that says that there are more
	maxCall    = 16        // Opens of one call
	callEvery  = 10 * time.Second
	retryAfter = time.Minute // the broker takes one call in five minutes of who tells it much
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

// others stands in the executable's place, which is a path, for all after maxKinds.
const others = "others: more than 16 within an hour"

// A line is what is to be told of one credential.
type line struct {
	credential string
	told       map[kind]time.Time // when it was entered
	pending    []*seen
}

// A queue is what was seen and is to be told. It is bounded for each credential,
// whatever is done to its files: when Opens come faster than they can be told,
// the first ones stay and later ones are lost. Credentials take turns.
type queue struct {
	log  *slog.Logger
	now  func() time.Time
	wake chan struct{} // capacity 1: something is pending

	mu    sync.Mutex
	lines []*line // guarded by mu; the first one's turn is next
}

func newQueue(log *slog.Logger, now func() time.Time) *queue {
	return &queue{log: log, now: now, wake: make(chan struct{}, 1)}
}

// line is a credential's; q.mu is held.
func (q *queue) line(credential string) *line {
	for _, l := range q.lines {
		if l.credential == credential {
			return l
		}
	}
	l := &line{credential: credential, told: map[kind]time.Time{}}
	q.lines = append(q.lines, l)
	return l
}

// enter takes an open, unless it was told of or there is no room.
func (q *queue) enter(s *seen) {
	q.mu.Lock()
	defer q.mu.Unlock()
	now := q.now()
	l := q.line(s.kind.credential)
	maps.DeleteFunc(l.told, func(_ kind, at time.Time) bool { return now.Sub(at) >= again })
	if _, ok := l.told[s.kind]; !ok && len(l.told) >= maxKinds {
		s = &seen{kind{credential: s.kind.credential, exe: others, uid: -1}, attest.FileOpen{Lease: s.open.Lease, Path: s.open.Path, Exe: others}}
	}
	if _, ok := l.told[s.kind]; ok || len(l.pending) > maxKinds {
		return
	}
	s.open.Time = now
	l.told[s.kind] = now
	l.pending = append(l.pending, s)
	select {
	case q.wake <- struct{}{}:
	default:
	}
}

// next is what one call tells: of one lease, so that the broker's word about a
// lease is about them all.
func (q *queue) next() (batch []*seen) {
	q.mu.Lock()
	defer q.mu.Unlock()
	for range q.lines {
		l := q.lines[0]
		q.lines = append(q.lines[1:], l)
		for _, s := range l.pending {
			if s.open.Lease == l.pending[0].open.Lease && len(batch) < maxCall {
				batch = append(batch, s)
			}
		}
		if len(batch) > 0 {
			break
		}
	}
	return batch
}

// settle takes what was told, or can't be, out of what is pending.
func (q *queue) settle(batch []*seen, told bool) {
	q.mu.Lock()
	defer q.mu.Unlock()
	l := q.line(batch[0].kind.credential)
	l.pending = slices.DeleteFunc(l.pending, func(s *seen) bool { return slices.Contains(batch, s) })
	for _, s := range batch {
		if !told {
			delete(l.told, s.kind) // of the next lease it is told
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
		case api.FromConnect(err).Check == api.CheckGone:
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
