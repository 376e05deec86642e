package timekeeper

import (
	"log/slog"
	"path/filepath"
	"testing"
	"time"

	"github.com/countersign/countersign/broker/internal/state/store"
	"github.com/countersign/countersign/broker/internal/state/store/storetest"
	"github.com/countersign/countersign/test/check"
)

const day = 24 * time.Hour

// right is the right time at the start of each test.
var right = time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)

// A rig is a machine: it has run for some time, and its wall clock may be wrong.
type rig struct {
	*Keeper
	ran, ahead time.Duration
}

func (r *rig) at() time.Time { return right.Add(r.ran) }

// boots starts a keeper on a machine whose clock is ahead, where sure had surely
// passed before the right time.
func boots(ahead, sure time.Duration) *rig {
	r := &rig{ahead: ahead}
	r.restart(right.Add(-sure))
	return r
}

func (r *rig) restart(sure time.Time) {
	r.Keeper = start(nil, slog.New(slog.DiscardHandler), func() time.Time { return r.at().Add(r.ahead) }, func() time.Duration { return r.ran }, sure)
}

// runs lets time pass, and looks at the clock each minute, as the broker does.
func (r *rig) runs(d time.Duration) {
	for until := r.ran + d; r.ran < until; {
		r.ran += min(time.Minute, until-r.ran)
		r.Now()
	}
}

// off is how far the keeper is from the right time.
func (r *rig) off() time.Duration { return r.Now().Sub(r.at()) }

func TestAClockThatIsWrongForAnHourMovesNothing(t *testing.T) {
	for _, step := range []time.Duration{time.Hour, -time.Hour, 30 * day, -30 * day, 21 * 365 * day} {
		r := boots(0, time.Minute)
		r.runs(2 * day)
		r.ahead = step
		r.runs(time.Hour)
		if r.off() != 0 {
			t.Errorf("%s: in that hour it is off by %s", step, r.off())
		}
		if sure := r.Sure(); sure.After(r.at()) {
			t.Errorf("%s: it is sure of %s, which is %s ahead", step, sure, sure.Sub(r.at()))
		}
		r.ahead = 0
		r.runs(time.Hour)
		if r.off() != 0 || r.Sure().Before(r.at().Add(-time.Minute)) {
			t.Errorf("%s: afterwards it is off by %s, and sure of %s", step, r.off(), r.Sure())
		}
	}
}

func TestAStartInThatHour(t *testing.T) {
	r := boots(30*day, time.Minute)
	r.runs(time.Hour)
	if r.off() != 30*day {
		t.Errorf("off by %s", r.off())
	}
	if sure := r.Sure(); sure.After(r.at()) {
		t.Errorf("sure of %s more than has passed", sure.Sub(r.at()))
	}
	r.ahead = 0
	if r.off() != 0 {
		t.Errorf("the clock is back, and it is off by %s", r.off())
	}
}

// A clock that goes back behind what has surely passed is wrong now, and was
// right before.
func TestAClockThatGoesBackTooFar(t *testing.T) {
	r := boots(0, time.Minute)
	r.runs(time.Hour)
	r.ahead = -30 * day
	r.runs(3 * day)
	if r.off() != 0 {
		t.Errorf("off by %s", r.off())
	}
}

// A machine that was paused runs for less than the time that passed.
func TestAPause(t *testing.T) {
	r := boots(0, time.Minute)
	r.runs(2 * day)
	r.ahead = 31 * day // for good: the right time, now
	r.runs(forwardAfter - time.Minute)
	if r.off() != 0 {
		t.Errorf("followed too early: %s", r.off())
	}
	r.runs(2 * time.Minute)
	if r.off() != 31*day {
		t.Errorf("not followed: %s", r.off())
	}
}

// A wall clock that was believed for a day and then corrected is believed
// again, in a day.
func TestSureGoesBack(t *testing.T) {
	r := boots(400*day, time.Minute)
	r.runs(2 * day)
	if r.Sure().Sub(r.at()) != 400*day {
		t.Fatalf("sure of %s ahead", r.Sure().Sub(r.at()))
	}
	r.ahead = 0
	if r.Sure().After(r.at()) {
		t.Error("it is sure of more than the wall clock says")
	}
	r.restart(r.at().Add(400 * day))
	r.runs(2 * day)
	if r.off() != 0 || r.Sure() != r.Now() {
		t.Errorf("off by %s, sure of %s", r.off(), r.Sure())
	}
}

func TestItIsKept(t *testing.T) {
	s := check.Must(storetest.Open(filepath.Join(t.TempDir(), "store.db")))(t)
	t.Cleanup(func() { _ = s.Close() })
	if sure := check.Must(load(t.Context(), s))(t); !sure.IsZero() {
		t.Errorf("a new store: %s", sure)
	}
	check.Nil(t, s.Update(t.Context(), store.Everything(), func(tx *store.Tx) error {
		_, err := tx.Exec(`INSERT INTO meta (name, value) VALUES (?, '1000')`, aliveKey)
		return err
	}))
	if sure := check.Must(load(t.Context(), s))(t); !sure.Equal(time.UnixMilli(1000)) {
		t.Errorf("a store that was served: %s", sure)
	}
	r := boots(0, time.Minute)
	r.store = s
	check.Nil(t, r.save(t.Context()))
	if sure := check.Must(load(t.Context(), s))(t); !sure.Equal(right.Add(-time.Minute)) {
		t.Errorf("kept: %s", sure)
	}
}
