package liveness

import (
	"context"
	"fmt"
	"log/slog"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/countersign/countersign/broker/api/event"
	"github.com/countersign/countersign/broker/internal/issue/vault"
	"github.com/countersign/countersign/broker/internal/lease"
	"github.com/countersign/countersign/broker/internal/lease/journal"
	"github.com/countersign/countersign/broker/internal/state/audit"
	"github.com/countersign/countersign/broker/internal/state/inventory"
	"github.com/countersign/countersign/broker/internal/state/store"
	"github.com/countersign/countersign/broker/internal/state/store/storetest"
	"github.com/countersign/countersign/test/check"
)

// A limit is a lease that has to be proved by a time, with a grace; minutes from noon.
type limit struct {
	proveBy, grace int
	state          journal.State
}

func minutes(n int) time.Time { return noon.Add(time.Duration(n) * time.Minute) }

// quiet is a watch over one host in a state that is silent since noon, with these leases,
// beside another that was heard a minute ago; its clock is now's.
func quiet(t *testing.T, state inventory.State, brake int, limits ...limit) (w *Watch, now *time.Time) {
	t.Helper()
	s := check.Must(storetest.Open(filepath.Join(t.TempDir(), "store.db")))(t)
	t.Cleanup(func() { check.Nil(t, s.Close()) })
	check.Nil(t, s.Update(t.Context(), store.Everything(), func(tx *store.Tx) error {
		for i, l := range limits {
			check.Nil(t, journal.Save(tx, journal.Lease{ID: fmt.Sprint("lease", i), Host: "host", Scope: "s", Kind: vault.Kind.Name, State: l.state, Settled: true,
				ProveBy: minutes(l.proveBy), Grace: time.Duration(l.grace) * time.Minute, Due: minutes(600), Issued: minutes(-60)}))
		}
		return inventory.Save(tx, inventory.Host{ID: "host", Name: "host", State: state, Reason: "as before", Admitted: true, LastProved: minutes(-10), SilentAt: noon})
	}))
	now = new(time.Time)
	*now = noon
	clock := func() time.Time { return *now }
	log := slog.New(slog.DiscardHandler)
	w = &Watch{Store: s, Leases: lease.New(s, nil, log, clock), Brake: brake, Log: log, Now: clock}
	return w, now
}

// lookAt looks at a time at which another host was just heard.
func (w *Watch) lookAt(t *testing.T, now *time.Time, at time.Time) {
	t.Helper()
	*now = at
	check.Nil(t, w.Store.Update(t.Context(), store.Everything(), func(tx *store.Tx) error {
		return inventory.Save(tx, inventory.Host{ID: "other", Name: "other", State: inventory.Trusted, Admitted: true, LastProved: at, SilentAt: at.Add(time.Hour)})
	}))
	check.Nil(t, w.look(t.Context(), at))
}

// stands is the host's state, when it is looked at again in minutes from noon, and the
// states of its leases.
func stands(t *testing.T, w *Watch) (text string) {
	t.Helper()
	check.Nil(t, w.Store.View(t.Context(), func(tx *store.Tx) error {
		h := check.Must(inventory.Get(tx, "host"))(t)
		text = string(h.State)
		if h.SilentAt.UnixMilli() > 0 {
			text += fmt.Sprint(" ", h.SilentAt.Sub(noon).Minutes())
		}
		for _, g := range check.Must(journal.List(tx, journal.Filter{Host: "host"}))(t) {
			text += " " + string(g.State)
		}
		return nil
	}))
	return text
}

func kinds(t *testing.T, w *Watch) (list []event.Kind) {
	t.Helper()
	check.Nil(t, w.Store.View(t.Context(), func(tx *store.Tx) error {
		return audit.Read(tx, 0, 1000, func(_ int64, body []byte) error {
			r, err := event.Parse(body)
			list = append(list, r.Kind)
			return err
		})
	}))
	return list
}

// A silent host becomes stale at its limit, and keeps each lease until its scope's grace is
// over: not a moment less, and no lease for another's sake.
func TestGrace(t *testing.T) {
	w, now := quiet(t, inventory.Trusted, 5, limit{0, 0, journal.Live}, limit{0, 10, journal.Live}, limit{0, 11, journal.Retiring}, limit{0, 0, journal.Provisional})
	for _, c := range []struct {
		at   time.Time
		want string
	}{
		{noon, "trusted 0 live live retiring provisional"}, // nobody was heard after it
		{noon.Add(time.Millisecond), "stale 10 revoking live retiring provisional"},
		{minutes(10), "stale 10 revoking live retiring provisional"},
		{minutes(10).Add(time.Millisecond), "stale 11 revoking revoking retiring provisional"},
		{minutes(11), "stale 11 revoking revoking retiring provisional"},
		{minutes(12), "stale revoking revoking revoking provisional"},
		{minutes(90), "stale revoking revoking revoking provisional"},
	} {
		w.lookAt(t, now, c.at)
		if got := stands(t, w); got != c.want {
			t.Errorf("at %s: %s, want %s", c.at.Format("15:04:05.000"), got, c.want)
		}
	}
	stale := 0
	for _, k := range kinds(t, w) {
		if k == event.HostStale {
			stale++
		}
	}
	if stale != 1 {
		t.Errorf("it is recorded %d times as stale", stale)
	}
}

// Silence makes trusted hosts stale, and says nothing new of the others; leases end all
// the same.
func TestSilenceByState(t *testing.T) {
	for _, state := range inventory.States {
		w, now := quiet(t, state, 5, limit{0, 0, journal.Live})
		w.lookAt(t, now, minutes(1))
		want, reason := string(state)+" revoking", "as before"
		if state == inventory.Trusted {
			want, reason = "stale revoking", "silent since 2026-03-01T11:50:00Z"
		}
		if got := stands(t, w); got != want {
			t.Errorf("%s becomes %s, want %s", state, got, want)
		}
		check.Nil(t, w.Store.View(t.Context(), func(tx *store.Tx) error {
			if h := check.Must(inventory.Get(tx, "host"))(t); h.Reason != reason {
				t.Errorf("%s: its reason is %q, want %q", state, h.Reason, reason)
			}
			return nil
		}))
		if n := slices.Contains(kinds(t, w), event.HostStale); n != (state == inventory.Trusted) {
			t.Errorf("%s is recorded as stale: %v", state, n)
		}
	}
}

// Whom nobody was heard after keeps everything, until somebody is.
func TestSilentAlone(t *testing.T) {
	w, now := quiet(t, inventory.Trusted, 5, limit{0, 0, journal.Live})
	*now = minutes(5)
	check.Nil(t, w.look(t.Context(), *now))
	if got := stands(t, w); got != "trusted 0 live" || len(w.Alarms()) != 1 || len(kinds(t, w)) != 0 {
		t.Errorf("alone: %s; alarms %q", got, w.Alarms())
	}
	w.lookAt(t, now, minutes(6))
	if got := stands(t, w); got != "stale revoking" || len(w.Alarms()) != 0 {
		t.Errorf("beside another: %s; alarms %q", got, w.Alarms())
	}
}

// The brake lets so many hosts lose their leases in a minute, and as many in the next.
// What it held waits for an operator, not for the next minute.
func TestTheBrakeCountsByTheMinute(t *testing.T) {
	w, now := quiet(t, inventory.Trusted, 1, limit{0, 0, journal.Live})
	later := func(id string, at time.Time) {
		check.Nil(t, w.Store.Update(t.Context(), store.Everything(), func(tx *store.Tx) error {
			check.Nil(t, inventory.Save(tx, inventory.Host{ID: id, Name: id, State: inventory.Trusted, Admitted: true, LastProved: minutes(-10), SilentAt: at}))
			return journal.Save(tx, journal.Lease{ID: "of-" + id, Host: id, Scope: "s", Kind: vault.Kind.Name, State: journal.Live, Settled: true, ProveBy: at, Due: minutes(600), Issued: noon})
		}))
	}
	later("second", noon.Add(30*time.Second))
	later("third", minutes(1).Add(10*time.Second))
	for _, at := range []time.Time{noon.Add(time.Second), noon.Add(31 * time.Second), minutes(1).Add(11 * time.Second), minutes(9)} {
		w.lookAt(t, now, at)
	}
	for id, want := range map[string]journal.State{"lease0": journal.Revoking, "of-second": journal.Live, "of-third": journal.Revoking} {
		check.Nil(t, w.Store.View(t.Context(), func(tx *store.Tx) error {
			if g := check.Must(journal.Load(tx, id))(t); g.State != want {
				t.Errorf("%s is %s, want %s", id, g.State, want)
			}
			return nil
		}))
	}
	if alarms := w.Alarms(); len(alarms) != 1 || !strings.HasPrefix(alarms[0], "1 silent hosts are held") || !slices.Contains(kinds(t, w), event.HostHeld) {
		t.Errorf("alarms %q, records %v", alarms, kinds(t, w))
	}
}

// Time in which the broker did not serve is no silence; what passes between two looks is.
func TestUnservedTimeMovesLimits(t *testing.T) {
	for gap, moved := range map[time.Duration]time.Duration{
		0: 0, jump - 1: 0, 1 - jump: 0, jump: jump, -jump: -jump, time.Hour: time.Hour, -time.Hour: -time.Hour, 48 * time.Hour: 48 * time.Hour, -far: -far,
	} {
		w, _ := quiet(t, inventory.Trusted, 5)
		check.Nil(t, w.alive(t.Context(), minutes(3), gap))
		check.Nil(t, w.Store.View(t.Context(), func(tx *store.Tx) error {
			if h := check.Must(inventory.Get(tx, "host"))(t); !h.SilentAt.Equal(noon.Add(moved)) {
				t.Errorf("after %s it is silent at %s, want %s", gap, h.SilentAt, noon.Add(moved))
			}
			return nil
		}))
		if last, err := w.lastAlive(t.Context()); err != nil || !last.Equal(minutes(3)) {
			t.Errorf("served until %s, %v", last, err)
		}
	}
}

// The loop takes the time of a stop, and of a clock that jumps, as nobody's silence, and
// that in which it looks as everybody's.
func TestRunLooks(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w, _ := quiet(t, inventory.Trusted, 5, limit{0, 0, journal.Live})
		began := time.Now()
		start := minutes(-2)
		var jumped atomic.Int64 // nanoseconds
		w.Now = func() time.Time { return start.Add(time.Since(began) + time.Duration(jumped.Load())) }
		check.Nil(t, w.alive(t.Context(), start.Add(-time.Hour), 0)) // it was stopped for an hour
		ctx, cancel := context.WithCancel(t.Context())
		ended := make(chan error, 1)
		go func() { ended <- w.Run(ctx) }()
		after := func(d time.Duration, want string) {
			t.Helper()
			time.Sleep(d)
			synctest.Wait()
			check.Nil(t, w.Store.Update(t.Context(), store.Everything(), func(tx *store.Tx) error {
				return inventory.Save(tx, inventory.Host{ID: "other", State: inventory.Trusted, Admitted: true, LastProved: w.Now(), SilentAt: w.Now().Add(time.Hour)})
			}))
			if got := stands(t, w); got != want {
				t.Errorf("%s later: %s, want %s", time.Since(began), got, want)
			}
		}
		after(time.Second, "trusted 60 live")
		jumped.Store(int64(5 * time.Hour))
		after(time.Minute, "trusted 360 live")
		jumped.Store(0)
		after(time.Minute, "trusted 60 live")
		after(58*time.Minute, "trusted 60 live")
		after(2*time.Minute, "trusted 60 live") // nobody was heard since
		after(2*Every, "stale revoking")
		cancel()
		check.Nil(t, <-ended)
	})
}

// A broker that can't write for a while serves nevertheless: that time counts.
func TestRunWithoutAStoreThatTakesIt(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w, _ := quiet(t, inventory.Trusted, 5)
		began := time.Now()
		w.Now = func() time.Time { return minutes(-9).Add(time.Since(began)) }
		ctx, cancel := context.WithCancel(t.Context())
		ended := make(chan error, 1)
		go func() { ended <- w.Run(ctx) }()
		for _, statement := range []string{`SELECT 1`, `CREATE TRIGGER full BEFORE UPDATE ON meta BEGIN SELECT RAISE(ABORT, 'full'); END`, `DROP TRIGGER full`, `SELECT 1`} {
			check.Nil(t, w.Store.Update(t.Context(), store.Everything(), func(tx *store.Tx) error { _, err := tx.Exec(statement); return err }))
			time.Sleep(time.Minute)
			synctest.Wait()
		}
		if got := stands(t, w); got != "trusted 0" {
			t.Errorf("its limit was moved: %s", got)
		}
		if last := check.Must(w.lastAlive(t.Context()))(t); w.Now().Sub(last) > 2*Every {
			t.Errorf("served until %s; it is %s", last, w.Now())
		}
		cancel()
		check.Nil(t, <-ended)
	})
}
