package store

import (
	"context"
	"time"
)

// Claim takes a name for this process until ttl after now, and prolongs a claim that it
// has; false where another process has the name. Whoever works on something of which there
// must be one claims it, in the update by which the work begins: a claim costs no commit of
// its own. A process that dies loses its claims by time, by the clock that callers hand in,
// and one that is slow may lose them while it works.
func Claim(t *Tx, name string, now time.Time, ttl time.Duration) (mine bool, err error) {
	result, err := t.Exec(`INSERT INTO claims (name, owner, until) VALUES (?, ?, ?)
		ON CONFLICT (name) DO UPDATE SET owner = excluded.owner, until = excluded.until WHERE claims.owner = excluded.owner OR claims.until <= ?`,
		name, t.store.owner, Millis(now.Add(ttl)), Millis(now))
	if err != nil {
		return false, err
	}
	n, err := result.RowsAffected()
	return n == 1, err
}

// Release gives a claim up, if this process has it.
func (s *Store) Release(ctx context.Context, name string) error {
	return s.Update(ctx, nil, func(tx *Tx) error {
		_, err := tx.Exec(`DELETE FROM claims WHERE name = ? AND owner = ?`, name, s.owner)
		return err
	})
}
