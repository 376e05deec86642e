// Package values stores what issuers have to remember, such as revoked serials, in the
// broker's store. It doesn't interpret the values.
//
// It implements issue.Values.
package values

import (
	"context"
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"

	"github.com/countersign/countersign/broker/internal/state/denials"
	"github.com/countersign/countersign/broker/internal/state/store"
)

// A Table is the store's table of values.
type Table struct{ store *store.Store }

// In is the table in a store.
func In(s *store.Store) Table { return Table{s} }

// Get reads one value; nil where there is none.
func (t Table) Get(ctx context.Context, bucket, name string) (value []byte, err error) {
	err = t.store.View(ctx, func(tx *store.Tx) error {
		err := tx.QueryRow(`SELECT value FROM ca_values WHERE bucket = ? AND name = ?`, bucket, name).Scan(&value)
		switch {
		case errors.Is(err, sql.ErrNoRows):
			return nil
		case value == nil:
			value = []byte{} // so it is read where it is empty
		}
		return err
	})
	return value, err
}

// All reads a bucket, by name.
func (t Table) All(ctx context.Context, bucket string, each func(name string, value []byte)) error {
	return t.store.View(ctx, func(tx *store.Tx) error {
		return tx.Each(func(row store.Row) error {
			var name string
			var value []byte
			if err := row.Scan(&name, &value); err != nil {
				return err
			}
			each(name, value)
			return nil
		}, `SELECT name, value FROM ca_values WHERE bucket = ? ORDER BY name`, bucket)
	})
}

// Add writes a value unless there is one of that name. It goes to the denial log, too.
func (t Table) Add(ctx context.Context, bucket, name string, value []byte) error {
	return t.store.Update(ctx, store.Any(store.Values), func(tx *store.Tx) error {
		_, err := tx.Exec(`INSERT INTO ca_values (bucket, name, value) VALUES (?, ?, ?) ON CONFLICT (bucket, name) DO NOTHING`, bucket, name, value)
		if err != nil {
			return err
		}
		return deny(tx, added{bucket, name, value})
	})
}

// Replace writes a value, and removes others with it: both, or neither.
func (t Table) Replace(ctx context.Context, bucket, name string, value []byte, of string, remove []string) error {
	return t.store.Update(ctx, store.Any(store.Values), func(tx *store.Tx) error {
		for _, other := range remove {
			if _, err := tx.Exec(`DELETE FROM ca_values WHERE bucket = ? AND name = ?`, of, other); err != nil {
				return err
			}
			if err := denials.Lift(tx, denials.Value, denialName(of, other)); err != nil {
				return err
			}
		}
		_, err := tx.Exec(`INSERT INTO ca_values (bucket, name, value) VALUES (?, ?, ?) ON CONFLICT (bucket, name) DO UPDATE SET value = excluded.value`,
			bucket, name, value)
		return err
	})
}

// added is a value in the denial log.
type added struct {
	Bucket string `json:"bucket"`
	Name   string `json:"name"`
	Value  []byte `json:"value"`
}

func denialName(bucket, name string) string { return bucket + "/" + name }

func deny(tx *store.Tx, a added) error {
	detail, err := json.Marshal(a)
	if err != nil {
		return err
	}
	return denials.Set(tx, denials.Denial{Kind: denials.Value, Name: denialName(a.Bucket, a.Name), Detail: detail})
}

// SeedDenials records the values of a bucket that an earlier version added.
func SeedDenials(tx *store.Tx, bucket string) error {
	list, err := store.Collect(tx, func(row store.Row) (a added, err error) {
		err = row.Scan(&a.Bucket, &a.Name, &a.Value)
		return a, err
	}, `SELECT bucket, name, value FROM ca_values WHERE bucket = ?`, bucket)
	for _, a := range list {
		err = errors.Join(err, deny(tx, a))
	}
	return err
}

// Deny adds a value again that was added, in a store that was restored from before it.
func Deny(tx *store.Tx, d denials.Denial) error {
	var a added
	if err := json.Unmarshal(d.Detail, &a); err != nil {
		return fmt.Errorf("denial of %s: %w", d.Name, err)
	}
	_, err := tx.Exec(`INSERT INTO ca_values (bucket, name, value) VALUES (?, ?, ?) ON CONFLICT (bucket, name) DO NOTHING`, a.Bucket, a.Name, a.Value)
	return err
}
