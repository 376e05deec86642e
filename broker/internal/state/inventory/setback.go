package inventory

import (
	"errors"
	"time"

	"github.com/countersign/countersign/broker/internal/state/store"
)

// SetBack takes back, by d, which is negative, what was set by a clock that was
// ahead: every SilentAt at ahead or later, and the times of last proofs, which
// [LastHeard] would otherwise take for later than now's. What was set since the
// clock is back stays.
func SetBack(tx *store.Tx, ahead, now time.Time, d time.Duration) error {
	_, silent := tx.Exec(`UPDATE hosts SET silent_at = silent_at + ? WHERE silent_at > 0 AND silent_at >= ?`, d.Milliseconds(), store.Millis(ahead))
	_, proved := tx.Exec(`UPDATE hosts SET last_proved = ? WHERE last_proved > ?`, store.Millis(now), store.Millis(now))
	return errors.Join(silent, proved)
}
