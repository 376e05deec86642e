// Package storetest is what the broker relies on of a store, as tests that any dialect
// runs against itself, and stores for other packages' tests.
package storetest

import (
	"context"
	"errors"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/countersign/countersign/broker/internal/state/store"
)

// Open is store.Open for tests: an update that changes rows which it didn't name fails.
func Open(path string) (*store.Store, error) { return store.OpenAs(store.SQLite(), path, true) }

func ok(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func must[T any](v T, err error) func(testing.TB) T {
	return func(t testing.TB) T {
		t.Helper()
		ok(t, err)
		return v
	}
}

// Run holds a store to its promises. Open opens the strict store that is in dir; each test
// has a dir of its own, and may open it again after it has closed the store.
func Run(t *testing.T, open func(t *testing.T, dir string) *store.Store) {
	for name, test := range map[string]func(*testing.T, func() *store.Store){
		"an update is whole or not at all":         whole,
		"updates at the same time are all kept":    together,
		"a view is one snapshot and writes not":    snapshot,
		"what is committed is there after opening": durable,
		"an update changes what it names":          named,
		"generations count changes of topics":      generations,
		"a cache is of its snapshot":               cached,
		"changes wake who waits for their topic":   changes,
		"a claim has one owner until it ends":      claims,
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			test(t, func() *store.Store { return open(t, dir) })
		})
	}
}

func put(name, value string) func(*store.Tx) error {
	return func(tx *store.Tx) error {
		_, err := tx.Exec(`INSERT INTO meta (name, value) VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET value = excluded.value`, name, value)
		return err
	}
}

func get(tx *store.Tx, name string) (value string, err error) {
	err = tx.QueryRow(`SELECT COALESCE((SELECT value FROM meta WHERE name = ?), '')`, name).Scan(&value)
	return value, err
}

func read(t *testing.T, s *store.Store, name string) (value string) {
	t.Helper()
	ok(t, s.View(t.Context(), func(tx *store.Tx) (err error) {
		value, err = get(tx, name)
		return err
	}))
	return value
}

func closed(t *testing.T, s *store.Store) {
	t.Helper()
	ok(t, s.Close())
}

var (
	errUndone = errors.New("undone")
	broker    = store.Any(store.Broker)
)

func whole(t *testing.T, open func() *store.Store) {
	s := open()
	defer closed(t, s)
	ok(t, s.Update(t.Context(), broker, put("a", "1")))
	for what, change := range map[string]func(*store.Tx) error{
		"an error": func(tx *store.Tx) error { return errors.Join(put("a", "2")(tx), put("b", "2")(tx), errUndone) },
		"a panic":  func(tx *store.Tx) error { ok(t, put("a", "2")(tx)); panic("in an update") },
		"a panic before a row is read": func(tx *store.Tx) error {
			ok(t, put("a", "2")(tx))
			return tx.QueryRow(`SELECT name FROM meta`).Scan(func() *string { panic("in an update") }())
		},
	} {
		if err := s.Update(t.Context(), broker, change); err == nil {
			t.Errorf("%s was taken for success", what)
		}
		if a, b := read(t, s, "a"), read(t, s, "b"); a != "1" || b != "" {
			t.Errorf("after %s a is %q and b is %q", what, a, b)
		}
	}
	ended, end := context.WithCancel(t.Context())
	end()
	if err := s.Update(ended, broker, put("a", "3")); !errors.Is(err, context.Canceled) || read(t, s, "a") != "1" {
		t.Errorf("an update of somebody who went away: %v", err)
	}
}

func together(t *testing.T, open func() *store.Store) {
	s := open()
	defer closed(t, s)
	ok(t, s.Update(t.Context(), broker, put("sum", "")))
	var group sync.WaitGroup
	const updates = 120
	for i := range updates {
		group.Go(func() {
			err := s.Update(t.Context(), broker, func(tx *store.Tx) error {
				sum, err := get(tx, "sum")
				if err != nil {
					return err
				}
				if err := put("sum", sum+"x")(tx); err != nil || i%3 != 0 {
					return err
				}
				return errUndone
			})
			if (i%3 == 0) != errors.Is(err, errUndone) {
				t.Errorf("update %d: %v", i, err)
			}
		})
	}
	group.Wait()
	if n, want := len(read(t, s, "sum")), updates*2/3; n != want {
		t.Errorf("%d updates were kept, want %d", n, want)
	}
}

func snapshot(t *testing.T, open func() *store.Store) {
	s := open()
	defer closed(t, s)
	ok(t, s.Update(t.Context(), broker, put("a", "1")))
	ok(t, s.View(t.Context(), func(tx *store.Tx) error {
		before := must(get(tx, "a"))(t)
		ok(t, s.Update(t.Context(), broker, put("a", "2")))
		if again := must(get(tx, "a"))(t); before != "1" || again != "1" {
			t.Errorf("one view read %q and %q", before, again)
		}
		return nil
	}))
	if a := read(t, s, "a"); a != "2" {
		t.Errorf("a view after the update read %q", a)
	}
	ok(t, s.Report(t.Context(), func(tx *store.Tx) error {
		if a := must(get(tx, "a"))(t); a != "2" {
			t.Errorf("a report read %q", a)
		}
		return nil
	}))
	for what, in := range map[string]func(context.Context, func(*store.Tx) error) error{"view": s.View, "report": s.Report} {
		_ = in(t.Context(), put("a", "3"))
		if a := read(t, s, "a"); a != "2" {
			t.Errorf("a %s wrote", what)
		}
	}
}

func durable(t *testing.T, open func() *store.Store) {
	s := open()
	ok(t, s.Update(t.Context(), broker, put("a", "1")))
	closed(t, s)
	if err := s.Update(t.Context(), broker, put("a", "2")); !errors.Is(err, store.ErrStopped) {
		t.Errorf("an update of a closed store: %v", err)
	}
	s = open()
	defer closed(t, s)
	if a := read(t, s, "a"); a != "1" {
		t.Errorf("it was %q after opening", a)
	}
}

const (
	addHost  = `INSERT INTO hosts (id, name, state, created) VALUES (?, ?, 'trusted', 1)`
	addLease = `INSERT INTO grants (id, host_id, scope, kind, state, delivery_id, instance, due, issued, body) VALUES (?, 'h', 's', 'k', 'live', 'd', 'i', 0, 1, '{}')`
)

func named(t *testing.T, open func() *store.Store) {
	s := open()
	defer closed(t, s)
	exec := func(statement string, args ...any) func(*store.Tx) error {
		return func(tx *store.Tx) error { _, err := tx.Exec(statement, args...); return err }
	}
	ok(t, s.Update(t.Context(), store.Host("h1", "h2").And(store.Lease("g1")), func(tx *store.Tx) error {
		return errors.Join(exec(addHost, "h1", "one")(tx), exec(addHost, "h2", "two")(tx), exec(addLease, "g1")(tx))
	}))
	for _, c := range []struct {
		rows   store.Rows
		change func(*store.Tx) error
		good   bool
	}{
		{store.Host("h1"), exec(`UPDATE hosts SET name = 'x' WHERE id = ?`, "h1"), true},
		{store.Host("h1"), exec(`UPDATE hosts SET name = 'y' WHERE id = ?`, "h2"), false},
		{store.Host("h1"), exec(`UPDATE hosts SET name = 'y'`), false},
		{store.Any(store.Hosts), exec(`UPDATE hosts SET name = 'z'`), true},
		{store.Host("h1"), exec(`INSERT INTO host_eks (ek_hash, host_id) VALUES ('e', ?)`, "h1"), true},
		{store.Host("h2"), exec(`DELETE FROM host_eks WHERE ek_hash = 'e'`), false},
		{store.Host("h1"), exec(addLease, "g2"), false},
		{store.Lease("g1"), exec(`UPDATE grants SET state = 'gone' WHERE id = ?`, "g1"), true},
		{store.Lease("g2"), exec(`DELETE FROM grants WHERE id = ?`, "g1"), false},
		{nil, func(tx *store.Tx) error {
			return errors.Join(tx.Also(store.Lease("g1")), exec(`DELETE FROM grants WHERE id = ?`, "g1")(tx))
		}, true},
		{store.Host("h1"), put("a", "1"), false},
		{store.Everything(), put("a", "1"), true},
		{nil, exec(`SELECT 1`), true},
	} {
		if err := s.Update(t.Context(), c.rows, c.change); (err == nil) != c.good {
			t.Errorf("an update that names %v: %v", c.rows, err)
		}
	}
}

func generation(t *testing.T, s *store.Store, topic store.Topic) (n int64) {
	t.Helper()
	ok(t, s.View(t.Context(), func(tx *store.Tx) (err error) {
		n, err = store.Generation(tx, topic)
		return err
	}))
	return n
}

func generations(t *testing.T, open func() *store.Store) {
	s := open()
	nothing := func(*store.Tx) error { return nil }
	before, other := generation(t, s, store.Scopes), generation(t, s, store.References)
	ok(t, s.Update(t.Context(), store.Any(store.Scopes), nothing))
	ok(t, s.Update(t.Context(), nil, func(tx *store.Tx) error { return tx.Also(store.Any(store.Scopes)) }))
	if err := s.Update(t.Context(), store.Any(store.Scopes), func(*store.Tx) error { return errUndone }); !errors.Is(err, errUndone) {
		t.Errorf("an update that fails: %v", err)
	}
	ok(t, s.Update(t.Context(), store.Host("h"), nothing))
	if n := generation(t, s, store.Scopes); n != before+2 {
		t.Errorf("two changes made generation %d of %d", n, before)
	}
	if n := generation(t, s, store.References); n != other {
		t.Errorf("another topic's generation went from %d to %d", other, n)
	}
	closed(t, s)
	s = open()
	defer closed(t, s)
	if n := generation(t, s, store.Scopes); n != before+2 {
		t.Errorf("it is generation %d after opening, was %d", n, before+2)
	}
}

func cached(t *testing.T, open func() *store.Store) {
	s := open()
	defer closed(t, s)
	var reads atomic.Int64
	c := &store.Cache[string]{Topic: store.Broker, Read: func(tx *store.Tx) (string, error) {
		reads.Add(1)
		return get(tx, "a")
	}}
	in := func() (value string) {
		ok(t, s.View(t.Context(), func(tx *store.Tx) (err error) { value, err = c.In(tx); return err }))
		return value
	}
	set := func(value string, err error) {
		if got := s.Update(t.Context(), broker, func(tx *store.Tx) error {
			ok(t, put("a", value)(tx))
			if seen := must(c.In(tx))(t); seen != value {
				t.Errorf("an update that wrote %q has %q", value, seen)
			}
			return err
		}); !errors.Is(got, err) {
			t.Errorf("setting %q: %v, want %v", value, got, err)
		}
	}
	set("1", nil)
	if a, b := in(), in(); a != "1" || b != "1" {
		t.Errorf("it is %q and %q, want 1", a, b)
	}
	if n := reads.Load(); n != 2 { // by the update, and once by a view
		t.Errorf("it was read %d times", n)
	}
	// What was undone is never kept, though its generation comes again.
	set("2", errUndone)
	set("3", nil)
	if a := in(); a != "3" {
		t.Errorf("it is %q, want 3", a)
	}
	ok(t, s.View(t.Context(), func(tx *store.Tx) error {
		old := must(get(tx, "a"))(t)
		set("4", nil)
		if a := in(); a != "4" {
			t.Errorf("it is %q, want 4", a)
		}
		if a := must(c.In(tx))(t); a != old {
			t.Errorf("a view from before has %q, want %q", a, old)
		}
		return nil
	}))
	if a := in(); a != "4" {
		t.Errorf("it is %q again, want 4", a)
	}
}

func changes(t *testing.T, open func() *store.Store) {
	s := open()
	defer closed(t, s)
	leases, hosts := s.Changes(store.Leases), s.Changes(store.Hosts)
	told := func(c <-chan struct{}) bool {
		select {
		case <-c:
			return true
		default:
			return false
		}
	}
	nothing := func(*store.Tx) error { return nil }
	for range 3 {
		ok(t, s.Update(t.Context(), store.Lease("g"), nothing))
	}
	if !told(leases) || told(leases) || told(hosts) {
		t.Error("three changes of a lease are one notice of leases, and none of hosts")
	}
	if err := s.Update(t.Context(), store.Any(store.Leases), func(*store.Tx) error { return errUndone }); err == nil || told(leases) {
		t.Errorf("a change that was undone is told: %v", err)
	}
	ok(t, s.Update(t.Context(), nil, func(tx *store.Tx) error { return tx.Also(store.Any(store.Leases, store.Hosts)) }))
	if !told(leases) || !told(hosts) {
		t.Error("a change of any of both is not told")
	}
}

func claims(t *testing.T, open func() *store.Store) {
	s := open()
	now := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	claim := func(name string, at time.Time) (mine bool) {
		ok(t, s.Update(t.Context(), nil, func(tx *store.Tx) (err error) {
			mine, err = store.Claim(tx, name, at, time.Minute)
			return err
		}))
		return mine
	}
	// Another process on the same database is another owner; here it is what it left there.
	left := func(until time.Time) {
		ok(t, s.Update(t.Context(), nil, func(tx *store.Tx) error {
			_, err := tx.Exec(`UPDATE claims SET owner = 'another', until = ? WHERE name = 'a'`, store.Millis(until))
			return err
		}))
	}
	if !claim("a", now) || !claim("a", now.Add(30*time.Second)) || !claim("b", now) {
		t.Error("what nobody has, or who asks, can't be claimed")
	}
	left(now.Add(time.Minute))
	if claim("a", now) || claim("a", now.Add(time.Minute-time.Millisecond)) {
		t.Error("another's claim was taken before its end")
	}
	ok(t, s.Release(t.Context(), "a"))
	if claim("a", now) {
		t.Error("another's claim was released")
	}
	if !claim("a", now.Add(time.Minute)) {
		t.Error("a claim that ended can't be taken")
	}
	err := s.Update(t.Context(), broker, func(tx *store.Tx) error {
		mine, err := store.Claim(tx, "c", now, time.Minute)
		if !mine {
			t.Error("what nobody has can't be claimed")
		}
		return errors.Join(err, errUndone)
	})
	if !errors.Is(err, errUndone) {
		t.Error(err)
	}
	ok(t, s.Update(t.Context(), nil, func(tx *store.Tx) error {
		var n int
		err := tx.QueryRow(`SELECT COUNT(*) FROM claims WHERE name = 'c'`).Scan(&n)
		if n != 0 {
			t.Error("a claim of an update that was undone is kept")
		}
		return err
	}))
	ok(t, s.Release(t.Context(), "b"))
	closed(t, s)
}
