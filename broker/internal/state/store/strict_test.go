package store

import (
	"path/filepath"
	"slices"
	"testing"

	"github.com/countersign/countersign/test/check"
)

// Each table is of a topic, or is the store's own, or is what every change appends to.
func TestEachTableHasATopic(t *testing.T) {
	s := check.Must(Open(filepath.Join(t.TempDir(), "store.db")))(t)
	defer func() { check.Nil(t, s.Close()) }()
	own := []string{"schema_version", "generations", "claims", "counts", "audit_records", "audit_hashes", "denials"}
	found := 0
	check.Nil(t, s.View(t.Context(), func(tx *Tx) error {
		return tx.Each(func(r Row) error {
			var table string
			err := r.Scan(&table)
			key, ok := keys[table]
			switch {
			case ok && slices.Contains(topics, key.topic):
				found++
			case ok || !slices.Contains(own, table):
				t.Errorf("table %s is of no topic", table)
			}
			return err
		}, `SELECT name FROM sqlite_schema WHERE type = 'table' AND name NOT LIKE 'sqlite_%'`)
	}))
	if found != len(keys) {
		t.Errorf("%d tables have a topic, of %d that are said to", found, len(keys))
	}
}
