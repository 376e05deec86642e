package e2e_test

import (
	"database/sql"
	"os"
	"testing"

	_ "modernc.org/sqlite" // opens the broker's store, which is stopped

	"github.com/countersign/countersign/test/check"
)

// plant changes a stopped broker's store behind its back.
func plant(t *testing.T, store, statement string) {
	t.Helper()
	for _, leftover := range []string{"-wal", "-shm"} {
		_ = os.Remove(store + leftover)
	}
	db := check.Must(sql.Open("sqlite", store))(t)
	defer func() { check.Nil(t, db.Close()) }()
	_, err := db.Exec(statement)
	check.Nil(t, err)
	_, err = db.Exec(`PRAGMA wal_checkpoint(TRUNCATE)`)
	check.Nil(t, err)
}
