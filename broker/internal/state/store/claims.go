package store

import (
	"context"
	"time"
)

// Claim gives the name to this process until now+ttl, or extends the claim if this process
// has it already. It reports false if another process has the name. Call it in the update
// that begins the work, for work that only one process may do at a time; that costs no
// commit of its own. The claim of a process that died expires, and so does the claim of one
// that is slower than ttl.
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

// Release deletes the claim if this process has it.
func (s *Store) Release(ctx context.Context, name string) error {
	return s.Update(ctx, nil, func(tx *Tx) error {
		_, err := tx.Exec(`DELETE FROM claims WHERE name = ? AND owner = ?`, name, s.owner)
		return err
	})
}
