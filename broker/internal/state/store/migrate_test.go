package store_test

import (
	"database/sql"
	"fmt"
	"io/fs"
	"path/filepath"
	"testing"

	"github.com/countersign/countersign/broker/internal/state/store"
	"github.com/countersign/countersign/test/check"
)

// A store of each earlier schema is brought up to date, with what it holds.
func TestEarlierSchemasAreBroughtUpToDate(t *testing.T) {
	t.Parallel()
	names := check.Must(fs.Glob(store.SQLite().Migrations, "*.sql"))(t)
	for n := 1; n < len(names); n++ {
		t.Run(names[n-1], func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "store.db")
			before(t, path, names[:n])
			if behind := check.Must(store.Behind(path))(t); !behind {
				t.Error("it is not said to be behind")
			}
			if s, err := store.OpenReadOnly(path); err == nil {
				_ = s.Close()
				t.Error("it can be read without being brought up to date")
			}

			s := check.Must(store.Open(path))(t)
			defer func() { check.Nil(t, s.Close()) }()
			if behind := check.Must(store.Behind(path))(t); behind {
				t.Error("it is still behind")
			}
			check.Nil(t, s.Update(t.Context(), store.Any(store.Broker), set("b", "new")))
			check.Nil(t, s.View(t.Context(), func(tx *store.Tx) error {
				var value string
				check.Nil(t, tx.QueryRow(`SELECT value FROM meta WHERE name = 'a'`).Scan(&value))
				generation := check.Must(store.Generation(tx, store.Broker))(t)
				if value != "old" || generation != 1 {
					t.Errorf("it holds %q, at generation %d", value, generation)
				}
				return nil
			}))
		})
	}
}

// before makes a store as an earlier broker did, which knew only these migrations.
func before(t *testing.T, path string, names []string) {
	t.Helper()
	db := check.Must(sql.Open("sqlite", path))(t)
	defer func() { check.Nil(t, db.Close()) }()
	statements := []string{`CREATE TABLE schema_version (version INTEGER NOT NULL)`}
	for i, name := range names {
		text := check.Must(fs.ReadFile(store.SQLite().Migrations, name))(t)
		statements = append(statements, string(text), fmt.Sprintf(`INSERT INTO schema_version (version) VALUES (%d)`, i+1))
	}
	for _, statement := range append(statements, `INSERT INTO meta (name, value) VALUES ('a', 'old')`) {
		check.Must(db.Exec(statement))(t)
	}
}
