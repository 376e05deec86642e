package journal

import (
	"database/sql"
	"errors"
	"time"

	"github.com/countersign/countersign/broker/internal/state/store"
)

// SetBack moves the due times by d, which is negative, that lie at ahead or
// later: the clock that they were set by was ahead. Otherwise what a lease waits
// for, the next try of a revocation among it, would wait for as long as the
// clock was ahead. A lease that is due too early is asked for too early, which
// ends nothing.
func SetBack(tx *store.Tx, ahead time.Time, d time.Duration) error {
	for kind := ""; ; {
		err := tx.QueryRow(`SELECT kind FROM grants WHERE due > 0 AND kind > ? ORDER BY kind LIMIT 1`, kind).Scan(&kind)
		if errors.Is(err, sql.ErrNoRows) {
			return nil
		}
		if err != nil {
			return err
		}
		if _, err := tx.Exec(`UPDATE grants SET due = due + ? WHERE kind = ? AND due > 0 AND due >= ?`, d.Milliseconds(), kind, store.Millis(ahead)); err != nil {
			return err
		}
	}
}
