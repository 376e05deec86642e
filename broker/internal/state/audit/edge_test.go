package audit

import (
	"errors"
	"fmt"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/mod/sumdb/tlog"

	"github.com/countersign/countersign/broker/api/event"
	"github.com/countersign/countersign/broker/internal/state/store"
	"github.com/countersign/countersign/broker/internal/state/store/storetest"
	"github.com/countersign/countersign/test/check"
)

func openStore(t *testing.T) *store.Store {
	t.Helper()
	s, err := storetest.Open(filepath.Join(t.TempDir(), "store.db"))
	check.Nil(t, err)
	t.Cleanup(func() { check.Nil(t, s.Close()) })
	return s
}

// The tree that is kept is never that of records which were undone, however they lie
// between those that were not.
func TestKeptTreeIsTheStores(t *testing.T) {
	s := openStore(t)
	undone := errors.New("undone")
	size := int64(0)
	for round := range 200 {
		records, want := 1+round%5, error(nil)
		if round%3 == 1 {
			want = undone
		} else {
			size += int64(records)
		}
		err := s.Update(t.Context(), store.Everything(), func(tx *store.Tx) error {
			for range records {
				// The same words each time: only the index and what is before it differ.
				if _, err := Append(tx, event.Record{Time: time.Unix(1, 0), Actor: "broker"}, event.Bound{}); err != nil {
					return err
				}
			}
			return want
		})
		if !errors.Is(err, want) {
			t.Fatalf("round %d: %v, want %v", round, err, want)
		}
		check.Nil(t, s.View(t.Context(), func(tx *store.Tx) error {
			kept := check.Must(load(tx))(t)
			root := check.Must(kept.Root())(t)
			if all := check.Must(tlog.TreeHash(size, reader(tx)))(t); kept.Size() != size || root != all {
				t.Fatalf("round %d: %d records with root %v, want %d with %v", round, kept.Size(), root, size, all)
			}
			return nil
		}))
	}

	var v Verification
	check.Nil(t, v.Verify(t.Context(), s, func(int64, int64, []byte) error { return nil }))
	if v.Problem != nil || v.Tree.Size() != size {
		t.Errorf("%d records, want %d: %v", v.Tree.Size(), size, v.Problem)
	}
}

// A log whose records were cut off takes no more of them.
func TestCutOffLogStops(t *testing.T) {
	s := openStore(t)
	add := func(tx *store.Tx) error {
		_, err := Append(tx, event.Record{Time: time.Unix(1, 0), Actor: "broker"}, event.Bound{})
		return err
	}
	for range 3 {
		check.Nil(t, s.Update(t.Context(), store.Everything(), add))
	}
	check.Nil(t, s.Update(t.Context(), store.Everything(), func(tx *store.Tx) error { _, err := tx.Exec(`DELETE FROM audit_records WHERE idx = 2`); return err }))
	if err := s.Update(t.Context(), store.Everything(), add); err == nil || !strings.Contains(err.Error(), "4 hashes for 2 records") {
		t.Errorf("appended to a log that was cut off: %v", err)
	}
}

// Hashes are found by their index, however many are asked for.
func TestHashesAreNotScanned(t *testing.T) {
	s := openStore(t)
	for _, n := range []int{1, 2, 64} {
		check.Nil(t, s.View(t.Context(), func(tx *store.Tx) error {
			return tx.Each(func(row store.Row) error {
				var id, parent, unused int
				var step string
				err := row.Scan(&id, &parent, &unused, &step)
				if !strings.HasPrefix(step, "SEARCH") {
					t.Errorf("%d hashes: %s", n, step)
				}
				return err
			}, "EXPLAIN QUERY PLAN "+selectHashes(n), make([]any, n)...)
		}))
	}
}

// BenchmarkHead is the head of a log whose tree is kept, or isn't.
func BenchmarkHead(b *testing.B) {
	s, err := storetest.Open(filepath.Join(b.TempDir(), "store.db"))
	check.Nil(b, err)
	b.Cleanup(func() { _ = s.Close() })
	for range 8 {
		check.Nil(b, s.Update(b.Context(), store.Everything(), func(tx *store.Tx) error {
			for i := range 2047 {
				if _, err := Append(tx, event.Record{Time: time.Unix(1, 0), Actor: fmt.Sprint(i)}, event.Bound{}); err != nil {
					return err
				}
			}
			return nil
		}))
	}
	for _, kept := range []bool{true, false} {
		b.Run(fmt.Sprintf("kept=%v", kept), func(b *testing.B) {
			for b.Loop() {
				check.Nil(b, s.View(b.Context(), func(tx *store.Tx) error {
					if !kept {
						keep(tx, Tree{})
					}
					_, err := load(tx)
					return err
				}))
			}
		})
	}
}
