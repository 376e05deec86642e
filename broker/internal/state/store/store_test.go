package store_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/countersign/countersign/broker/internal/state/store"
)

func set(name, value string) func(*store.Tx) error {
	return func(tx *store.Tx) error {
		_, err := tx.Exec(`INSERT INTO meta (name, value) VALUES (?, ?)`, name, value)
		return err
	}
}

func count(t *testing.T, s *store.Store) (n int) {
	t.Helper()
	if err := s.View(t.Context(), func(tx *store.Tx) error {
		return tx.QueryRow(`SELECT COUNT(*) FROM meta`).Scan(&n)
	}); err != nil {
		t.Fatal(err)
	}
	return n
}

func TestUpdatesShareCommitsButNotFailures(t *testing.T) {
	path := filepath.Join(t.TempDir(), "odd name?#%.db")
	s, err := store.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	boom := errors.New("boom")
	for i := range 200 {
		wg.Go(func() {
			err := s.Update(context.Background(), store.Everything(), func(tx *store.Tx) error {
				if err := set(fmt.Sprint(i), "x")(tx); err != nil {
					return err
				}
				switch i % 4 {
				case 1:
					return boom
				case 2:
					panic("in an update")
				}
				return nil
			})
			switch {
			case i%4 == 1 && !errors.Is(err, boom):
				t.Errorf("update %d: %v, want its own error", i, err)
			case i%4 == 2 && err == nil:
				t.Errorf("update %d: a panic was taken for success", i)
			case i%4 != 1 && i%4 != 2 && err != nil:
				t.Errorf("update %d: %v", i, err)
			}
		})
	}
	wg.Wait()
	if n := count(t, s); n != 100 {
		t.Errorf("%d rows, want the 100 whose update succeeded", n)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if info, err := os.Stat(path); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("store file: %v, %v; want mode 0600", info, err)
	}

	s, err = store.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	if n := count(t, s); n != 100 {
		t.Errorf("after reopening: %d rows, want 100", n)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if err := s.Update(t.Context(), store.Everything(), set("late", "x")); !errors.Is(err, store.ErrStopped) {
		t.Errorf("update after close: %v, want ErrStopped", err)
	}
}

func TestReadOnlyNeverWrites(t *testing.T) {
	path := filepath.Join(t.TempDir(), "store.db")
	s, err := store.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Update(t.Context(), store.Everything(), set("a", "b")); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = s.Close() }()
	r, err := store.OpenReadOnly(path)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = r.Close() }()
	if n := count(t, r); n != 1 {
		t.Errorf("read-only view sees %d rows, want 1", n)
	}
	if err := r.Update(t.Context(), store.Everything(), set("c", "d")); err == nil {
		t.Error("a read-only store took an update")
	}
	if err := r.View(t.Context(), set("c", "d")); err == nil {
		t.Error("a read-only view wrote")
	}
}

// Two brokers on one store would each act on what the other changed.
func TestOneBrokerAStore(t *testing.T) {
	path := filepath.Join(t.TempDir(), "store.db")
	first, err := store.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := store.Open(path); err == nil || !strings.Contains(err.Error(), "another broker has this store open") {
		t.Errorf("a second one: %v", err)
	}
	if err := first.Close(); err != nil {
		t.Fatal(err)
	}
	second, err := store.Open(path)
	if err != nil {
		t.Fatalf("after the first has closed: %v", err)
	}
	if err := second.Close(); err != nil {
		t.Error(err)
	}
}

// Where the database ended the transaction by itself, as for want of space, nothing is
// known of what the updates in it did: the store stops.
func TestATransactionThatEndedByItselfStopsTheStore(t *testing.T) {
	for _, others := range []int{0, 3} {
		s, err := store.Open(filepath.Join(t.TempDir(), "store.db"))
		if err != nil {
			t.Fatal(err)
		}
		full := errors.New("full")
		var group sync.WaitGroup
		for i := range others {
			group.Go(func() { _ = s.Update(context.Background(), store.Any(store.Broker), set(fmt.Sprint(i), "x")) })
		}
		_ = s.Update(t.Context(), store.Any(store.Broker), func(tx *store.Tx) error {
			_, err := tx.Exec(`ROLLBACK`)
			return errors.Join(err, full)
		})
		group.Wait()
		if err := s.Update(t.Context(), store.Any(store.Broker), set("late", "x")); !errors.Is(err, store.ErrStopped) {
			t.Errorf("beside %d others: %v, want ErrStopped", others, err)
		}
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	}
}
