// Package denials remembers what was taken away: quarantines and removals of hosts, ended
// leases, removed operators, spent join tokens, revoked serials. A backup of the store
// doesn't know what was taken after it; so each denial also goes to a signed file outside
// the store, the denial log, before whoever asked for it is answered.
//
// Trust: the file is the broker's own, as the store is. Its lines are signed by the audit
// key, so that another broker's file, or one that was damaged, is not merged.
//
// Promise: a denial that is in the store is in the file, or [Log.Behind] says why it isn't
// yet. A denial that names a lease or a certificate goes when that has ended anyway, and one
// of a host when an operator lets the host back.
package denials

import (
	"database/sql"
	"encoding/json"
	"errors"
	"time"

	"github.com/countersign/countersign/broker/internal/state/store"
)

// A Kind says what a denial names.
type Kind string

// The kinds of denials, and what their names are.
const (
	Host     Kind = "host"     // a host's id; it is quarantined or removed
	Lease    Kind = "lease"    // a lease's id; it was revoked, and no ticket brings it back
	Operator Kind = "operator" // the digest of an operator's key
	Token    Kind = "token"    // the hash of a join token that was spent
	Value    Kind = "value"    // an issuer's value, such as a revoked serial
)

// A Denial is one thing that was taken away.
type Denial struct {
	Seq    int64           `json:"seq"` // in the order of denials
	Kind   Kind            `json:"kind"`
	Name   string          `json:"name"`
	Until  time.Time       `json:"until,omitzero"` // when what it names has ended anyway; zero: never
	Lifted bool            `json:"lifted,omitempty"`
	Detail json.RawMessage `json:"detail,omitempty"` // what the kind's package needs to take it away again
}

// Set records a denial. It replaces an earlier one of the same name, and changes nothing if
// that says the same.
func Set(tx *store.Tx, d Denial) error {
	if d.Detail == nil {
		d.Detail = json.RawMessage("{}")
	}
	had, err := get(tx, d.Kind, d.Name)
	switch {
	case errors.Is(err, sql.ErrNoRows):
	case err != nil:
		return err
	case had.Lifted == d.Lifted && store.Millis(had.Until) == store.Millis(d.Until) && string(had.Detail) == string(d.Detail):
		return nil
	}

	if err := tx.QueryRow(`INSERT INTO generations (topic, n) VALUES ('denials', 1) ON CONFLICT (topic) DO UPDATE SET n = generations.n + 1 RETURNING n`).Scan(&d.Seq); err != nil {
		return err
	}
	if _, err := tx.Exec(`DELETE FROM denials WHERE kind = ? AND name = ?`, string(d.Kind), d.Name); err != nil {
		return err
	}
	_, err = tx.Exec(`INSERT INTO denials (seq, kind, name, until, lifted, detail) VALUES (?, ?, ?, ?, ?, ?)`,
		d.Seq, string(d.Kind), d.Name, store.Millis(d.Until), d.Lifted, string(d.Detail))
	tx.Follow()
	return err
}

// Lift records that a denial is taken back, if there is one.
func Lift(tx *store.Tx, kind Kind, name string) error {
	denied, err := Has(tx, kind, name)
	if err != nil || !denied {
		return err
	}
	return Set(tx, Denial{Kind: kind, Name: name, Lifted: true, Until: store.Time(1)})
}

// Has reports whether a denial is in force.
func Has(tx *store.Tx, kind Kind, name string) (bool, error) {
	d, err := get(tx, kind, name)
	if errors.Is(err, sql.ErrNoRows) {
		return false, nil
	}
	return err == nil && !d.Lifted, err
}

// Knows reports whether the store has a denial, or a later one of its name that says the same.
func Knows(tx *store.Tx, d Denial) (bool, error) {
	had, err := get(tx, d.Kind, d.Name)
	if errors.Is(err, sql.ErrNoRows) {
		return false, nil
	}
	return err == nil && had.Lifted == d.Lifted && string(had.Detail) == string(d.Detail), err
}

const columns = `seq, kind, name, until, lifted, detail`

func get(tx *store.Tx, kind Kind, name string) (Denial, error) {
	return scan(tx.QueryRow(`SELECT `+columns+` FROM denials WHERE kind = ? AND name = ?`, string(kind), name))
}

func scan(row store.Row) (d Denial, err error) {
	var kind, detail string
	var until int64
	err = row.Scan(&d.Seq, &kind, &d.Name, &until, &d.Lifted, &detail)
	d.Kind, d.Until, d.Detail = Kind(kind), store.Time(until), json.RawMessage(detail)
	return d, err
}

// after reads at most limit denials that were recorded after number seq.
func after(tx *store.Tx, seq int64, limit int) ([]Denial, error) {
	return store.Collect(tx, scan, `SELECT `+columns+` FROM denials WHERE seq > ? ORDER BY seq LIMIT ?`, seq, limit)
}

// prune deletes at most limit denials that have ended or were lifted. They have to be in the
// file.
func prune(tx *store.Tx, now time.Time, limit int) (n int64, err error) {
	result, err := tx.Exec(`DELETE FROM denials WHERE seq IN (SELECT seq FROM denials WHERE until > 0 AND until <= ? LIMIT ?)`, store.Millis(now), limit)
	if err != nil {
		return 0, err
	}
	return result.RowsAffected()
}

// Skip lets numbers up to n go to nobody: a file that is newer than the store has them.
func Skip(tx *store.Tx, n int64) error {
	_, err := tx.Exec(`INSERT INTO generations (topic, n) VALUES ('denials', ?) ON CONFLICT (topic) DO UPDATE SET n = CASE WHEN excluded.n > generations.n THEN excluded.n ELSE generations.n END`, n)
	return err
}

// Last returns the number of the newest denial that was ever recorded.
func Last(tx *store.Tx) (n int64, err error) { return store.Generation(tx, "denials") }

// A hold is on a broker whose store may have forgotten what was taken away: nothing new is
// issued until an operator acknowledges it.
const hold = "restore.hold"

// ErrHeld is returned for requests that a hold keeps from being served.
var ErrHeld = errors.New("this broker's store was restored, and what was taken away since its backup isn't known: nothing new is issued until `countersign broker acknowledge` on its machine")

// Hold returns why the broker is held; empty: it isn't.
func Hold(tx *store.Tx) (why string, err error) {
	err = tx.QueryRow(`SELECT value FROM meta WHERE name = ?`, hold).Scan(&why)
	if errors.Is(err, sql.ErrNoRows) {
		err = nil
	}
	return why, err
}

// Held is ErrHeld, if the broker is held.
func Held(tx *store.Tx) error {
	why, err := Hold(tx)
	if err == nil && why != "" {
		err = ErrHeld
	}
	return err
}

// begun says that the denial log was begun anew beside a store that isn't new.
const begun = "denials.begun"

// MarkBegun records that the denial log was begun anew: from then on only agents' checkpoints
// show a backup that is put in place by hand. The update has to name [store.Broker].
func MarkBegun(tx *store.Tx) error {
	_, err := tx.Exec(`INSERT INTO meta (name, value) VALUES (?, '1') ON CONFLICT (name) DO NOTHING`, begun)
	return err
}

// Begun reports whether MarkBegun was called.
func Begun(tx *store.Tx) (bool, error) {
	var n int
	err := tx.QueryRow(`SELECT COUNT(*) FROM meta WHERE name = ?`, begun).Scan(&n)
	return n > 0, err
}

// SetHold holds the broker, and reason says why; an empty one ends the hold. The update has
// to name [store.Broker].
func SetHold(tx *store.Tx, reason string) error {
	if reason == "" {
		_, err := tx.Exec(`DELETE FROM meta WHERE name = ?`, hold)
		return err
	}
	_, err := tx.Exec(`INSERT INTO meta (name, value) VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET value = excluded.value`, hold, reason)
	return err
}
