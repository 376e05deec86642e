package audit_test

import (
	"crypto/rand"
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/countersign/countersign/broker/api/event"
	"github.com/countersign/countersign/broker/internal/state/audit"
	"github.com/countersign/countersign/broker/internal/state/budget"
	"github.com/countersign/countersign/broker/internal/state/store"
	"github.com/countersign/countersign/test/check"
)

// newDir is a folder with a broker's audit key.
func newDir(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	check.Nil(t, audit.CreateKey(dir, "b1", rand.Reader))
	return dir
}

// lines are the log, in short.
func lines(t *testing.T, s *store.Store) (list []string) {
	t.Helper()
	check.Nil(t, s.View(t.Context(), func(tx *store.Tx) error {
		return audit.Read(tx, 0, 1000, func(_ int64, body []byte) error {
			r := check.Must(event.Parse(body))(t)
			line := r.Host + " " + string(r.Kind)
			if e, ok := check.Must(r.Event())(t).(*event.Repeated); ok {
				line += fmt.Sprintf(" %d of %d %s %s-%s", e.Count, e.Record, e.Of, e.First.Format("15:04"), e.Last.Format("15:04"))
			}
			list = append(list, line)
			return nil
		})
	}))
	return list
}

// Equal events are recorded once in an hour, and counted: the first, how many, the last.
func TestAppendOnce(t *testing.T) {
	dir := newDir(t)
	s, _ := open(t, dir, "store.db")
	once := func(at time.Duration, host, what string, detail ...string) {
		t.Helper()
		check.Nil(t, s.Update(t.Context(), store.Host(host), func(tx *store.Tx) error {
			r := event.Record{Time: now.Add(at), Actor: "host:" + host, Host: host}
			return audit.AppendOnce(tx, r, event.Failed{Check: what}, what, detail...)
		}))
	}
	settle := func(at time.Duration) int {
		t.Helper()
		return check.Must(audit.Settle(t.Context(), s, now.Add(at)))(t)
	}
	want := func(list ...string) {
		t.Helper()
		if got := lines(t, s); !slices.Equal(got, list) {
			t.Fatalf("the log has\n%q, want\n%q", got, list)
		}
	}

	once(0, "a", "x")
	once(0, "b", "x") // another host's
	once(0, "a", "y") // something else
	for i := range 50 {
		once(time.Duration(i)*time.Minute, "a", "x")
	}
	first := []string{"a host.failed", "b host.failed", "a host.failed"}
	want(first...)
	if n := settle(59 * time.Minute); n != 0 {
		t.Errorf("%d settled within the hour", n)
	}
	once(59*time.Minute, "a", "x", "another detail") // is told apart
	want(append(first, "a host.failed")...)
	once(59*time.Minute, "a", "x", "another detail")

	// The next one after the hour tells first what was counted.
	once(61*time.Minute, "a", "x")
	want(append(first, "a host.failed", "a audit.repeated 50 of 0 host.failed 12:00-12:49", "a host.failed")...)
	// Nobody has to come for that; of what happened once nothing is said.
	if n := settle(2 * time.Hour); n != 3 {
		t.Errorf("%d settled", n)
	}
	want(append(first, "a host.failed", "a audit.repeated 50 of 0 host.failed 12:00-12:49", "a host.failed", "a audit.repeated 1 of 3 host.failed 12:59-12:59")...)
	if n := settle(9 * time.Hour); n != 1 {
		t.Errorf("%d settled at the end", n)
	}
	if err := verify(t, s); err != nil {
		t.Error(err)
	}
}

// However a host varies its word, what it causes is few rows and few records.
func TestAppendOnceIsBounded(t *testing.T) {
	s, _ := open(t, newDir(t), "store.db")
	for i := range 1000 {
		check.Nil(t, s.Update(t.Context(), store.Host("a"), func(tx *store.Tx) error {
			return audit.AppendOnce(tx, event.Record{Time: now, Actor: "host:a", Host: "a"}, event.Failed{}, "x", fmt.Sprint(i))
		}))
	}
	if n := len(lines(t, s)); n < 64 || n > 70 {
		t.Errorf("%d records of 1000 events that differ in what the host says", n)
	}
	check.Nil(t, s.Update(t.Context(), store.Host("a"), func(tx *store.Tx) error {
		return audit.AppendOnce(tx, event.Record{Time: now, Actor: "host:a", Host: "a"}, event.Failed{}, "something else", "z")
	}))
	for check.Must(audit.Settle(t.Context(), s, now.Add(2*time.Hour)))(t) > 0 {
	}
	list := lines(t, s)
	if last := list[len(list)-1]; last != "a audit.repeated 935 of 64 host.failed 12:00-12:00" && !slices.Contains(list, "a audit.repeated 935 of 64 host.failed 12:00-12:00") {
		t.Errorf("the last is %q", last)
	}
	var n int
	check.Nil(t, s.View(t.Context(), func(tx *store.Tx) error { return tx.QueryRow(`SELECT COUNT(*) FROM repeats`).Scan(&n) }))
	if n != 0 {
		t.Errorf("%d rows are left", n)
	}
}

// What is written for a host is on its account; what an operator does to it is not.
func TestAccounts(t *testing.T) {
	s, _ := open(t, newDir(t), "store.db")
	check.Nil(t, s.Update(t.Context(), store.Host("a"), func(tx *store.Tx) error {
		for _, actor := range []string{"host:a", "broker", "operator:alice"} {
			if _, err := audit.Append(tx, event.Record{Time: now, Actor: actor, Host: "a"}, event.Failed{}); err != nil {
				return err
			}
		}
		b := budget.Of(tx)
		b.Spend("a", budget.Records-3, 0, now)
		if _, over := b.Over("a", now); over {
			t.Error("more is on the account than two records")
		}
		b.Spend("a", 1, 0, now)
		if _, over := b.Over("a", now); !over {
			t.Error("less is on the account than two records")
		}
		return nil
	}))
}
