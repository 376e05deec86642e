package lease

import (
	"context"
	"sync"
	"time"

	"github.com/countersign/countersign/broker/internal/lease/journal"
)

const (
	// atOnce is how many calls of one kind's issuer run in the background at a time.
	atOnce = 16
	// backlog is how many more wait for that. What finds no place is left to the
	// sweeper, by its due time: an issuer that hangs piles nothing up.
	backlog = 256
	// share is how many of those places the sweeper takes in one look.
	share = backlog / 4
)

// A lane is what is done in the background for the leases of one kind. Each kind has
// its own, so that a Vault that hangs holds up no certificate.
type lane struct {
	kind    string
	slots   chan struct{} // held by acts that wait or run
	running chan struct{} // held by acts that run
	alarm   alarm         // of the sweeper
}

func newLane(kind string) *lane {
	return &lane{kind: kind, slots: make(chan struct{}, backlog), running: make(chan struct{}, atOnce), alarm: alarm{nearer: make(chan struct{}, 1)}}
}

// start acts in the background on a lease that the caller has claimed, if there is
// place, and calls done at the end in any case.
func (m *Manager) start(ctx context.Context, s step, c Cause, done func()) {
	if l, ok := m.lanes[s.lease.Kind]; ok {
		select {
		case l.slots <- struct{}{}:
			go m.run(context.WithoutCancel(ctx), l, s, c, done)
			return
		default:
		}
	}
	m.release(s.lease.ID)
	done()
}

// run acts on a claimed lease for which a slot of its lane is held.
func (m *Manager) run(ctx context.Context, l *lane, s step, c Cause, done func()) {
	defer done()
	defer func() { <-l.slots }()
	defer m.release(s.lease.ID)
	l.running <- struct{}{}
	defer func() { <-l.running }()
	if _, err := m.act(ctx, s.lease, s.effects, c); err != nil {
		m.log.Error("lease: could not record what was done; the sweeper tries again", "lease", s.lease.ID, "err", err)
	}
}

// due has the sweeper come when g wants to be looked at.
func (m *Manager) due(g journal.Lease) {
	if l, ok := m.lanes[g.Kind]; ok && !g.Due.IsZero() {
		l.alarm.by(g.Due)
	}
}

// An alarm wakes one sleeper at an absolute time. Others may bring that time nearer
// and never put it off, so that no number of wake-ups keeps the sleeper from its work.
type alarm struct {
	mu     sync.Mutex
	at     time.Time     // guarded by mu
	nearer chan struct{} // at was brought nearer; capacity 1
}

// set is the sleeper's own: it puts the alarm to t, before looking for what is due.
func (a *alarm) set(t time.Time) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.at = t
}

// by brings the alarm nearer, to t.
func (a *alarm) by(t time.Time) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if !t.Before(a.at) {
		return
	}
	a.at = t
	select {
	case a.nearer <- struct{}{}:
	default:
	}
}

func (a *alarm) time() time.Time {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.at
}

// wait sleeps until the alarm, though not before earliest; it returns false once stop
// is closed.
func (a *alarm) wait(stop <-chan struct{}, now func() time.Time, earliest time.Time) bool {
	for {
		at := a.time()
		if at.Before(earliest) {
			at = earliest
		}
		left := at.Sub(now())
		if left <= 0 {
			return true
		}
		timer := time.NewTimer(left)
		select {
		case <-stop:
			timer.Stop()
			return false
		case <-timer.C:
		case <-a.nearer:
			timer.Stop()
		}
	}
}
