package admin

import (
	"bytes"
	"context"
	"crypto/x509"
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"github.com/countersign/countersign/attestors/evidence"
	"github.com/countersign/countersign/broker/api/event"
	"github.com/countersign/countersign/broker/internal/state/audit"
	"github.com/countersign/countersign/broker/internal/state/denials"
	"github.com/countersign/countersign/broker/internal/state/store"
	"github.com/countersign/countersign/internal/lifetime"
)

// longestOperator bounds operators' certificates.
const longestOperator = 366 * 24 * time.Hour

// AddOperator certifies the key of a CSR as an operator's.
func (d *Desk) AddOperator(ctx context.Context, a Actor, name string, role Role, csr []byte, until time.Time) ([]byte, error) {
	now := d.Now()
	if until.IsZero() {
		until = now.Add(longestOperator)
	}
	switch {
	case !plainName(name):
		return nil, invalid("operator name %q: 1 to 64 letters, digits, and . @ _ -", name)
	case !until.After(now) || until.Sub(now) > longestOperator:
		return nil, invalid("an operator's certificate ends within a year from now")
	}
	der, key, err := d.OperatorCA.Operator(csr, name, now, until)
	if err != nil {
		return nil, invalid("%v", err)
	}
	spki, err := x509.MarshalPKIXPublicKey(key)
	if err != nil {
		return nil, err
	}
	err = d.act(ctx, a, Admin, store.Any(store.Operators), event.Operator{As: event.OperatorAdded, Name: name, Role: role.String(), Key: evidence.Sum(spki).String(), Until: until}, func(tx *store.Tx, _ *event.Record) error {
		// One name, one key, or nobody knows what the other one still may.
		var taken int
		if err := tx.QueryRow(`SELECT COUNT(*) FROM operators WHERE name = ? AND expires > ?`, name, store.Millis(now)).Scan(&taken); err != nil {
			return err
		}
		if taken > 0 {
			return invalid("operator %s exists; `countersign operator remove %s` first", name, name)
		}
		var owner string
		switch err := tx.QueryRow(`SELECT name FROM operators WHERE key_hash = ?`, evidence.Sum(spki).String()).Scan(&owner); {
		case err == nil:
			return invalid("this key is operator %s's; make another, or `countersign operator remove %s` first", owner, owner)
		case !errors.Is(err, sql.ErrNoRows):
			return err
		}
		_, err := tx.Exec(`INSERT INTO operators (key_hash, name, role, created, expires) VALUES (?, ?, ?, ?, ?)`,
			evidence.Sum(spki).String(), name, role.String(), store.Millis(now), store.Millis(until))
		return err
	})
	return der, err
}

// RenewOperator certifies the key of a connection anew, for as long as the
// certificate shown was made for, and no longer than the newest of this key was:
// an admin may have added the key again, for less. Only responders can: theirs is the role of
// programs, which nobody tends. The end of a person's certificate is an admin's
// choice, and renewing it would undo that.
func (d *Desk) RenewOperator(ctx context.Context, a Actor, spki []byte, shown *x509.Certificate, csr []byte) ([]byte, error) {
	now := d.Now()
	if a.Role != Responder {
		return nil, fmt.Errorf("%w: only certificates of the role %s are renewed; for %s's, an admin runs `countersign operator remove %s` and `countersign operator add %s --role %s`",
			ErrForbidden, Responder, a.Name, a.Name, a.Name, a.Role)
	}
	if !lifetime.Due(shown, now) {
		return nil, invalid("operator %s's certificate is renewed from %s on", a.Name, lifetime.RenewAt(shown).UTC().Format(time.RFC3339))
	}

	life, err := d.operatorLife(ctx, spki)
	if err != nil {
		return nil, err
	}
	until := now.Add(min(lifetime.Of(shown), life, longestOperator))
	der, key, err := d.OperatorCA.Operator(csr, a.Name, now, until)
	if err != nil {
		return nil, invalid("%v", err)
	}
	asked, err := x509.MarshalPKIXPublicKey(key)
	if err != nil {
		return nil, err
	}
	if !bytes.Equal(asked, spki) {
		return nil, invalid("certificate request: its key is not the one that opened this connection")
	}

	hash := evidence.Sum(spki).String()
	err = d.act(ctx, a, Responder, store.Any(store.Operators), event.Operator{As: event.OperatorRenewed, Name: a.Name, Role: a.Role.String(), Key: hash, Until: until}, func(tx *store.Tx, _ *event.Record) error {
		// Looked up again here: an admin may have removed it meanwhile.
		r, err := tx.Exec(`UPDATE operators SET created = ?, expires = ? WHERE key_hash = ? AND name = ? AND role = ? AND expires > ?`,
			store.Millis(now), store.Millis(until), hash, a.Name, a.Role.String(), store.Millis(now))
		if err != nil {
			return err
		}
		if n, err := r.RowsAffected(); err != nil || n == 0 {
			return errors.Join(err, fmt.Errorf("%w: no operator has this key", ErrForbidden))
		}
		return nil
	})
	return der, err
}

// operatorLife is for how long the newest certificate of a key was made.
func (d *Desk) operatorLife(ctx context.Context, spki []byte) (time.Duration, error) {
	var created, expires int64
	err := d.Store.View(ctx, func(tx *store.Tx) error {
		return tx.QueryRow(`SELECT created, expires FROM operators WHERE key_hash = ?`, evidence.Sum(spki).String()).Scan(&created, &expires)
	})
	if errors.Is(err, sql.ErrNoRows) {
		return 0, fmt.Errorf("%w: no operator has this key", ErrForbidden)
	}
	return store.Time(expires).Sub(store.Time(created)), err
}

// ActorByKey is the operator with this key, by its PKIX DER.
func (d *Desk) ActorByKey(ctx context.Context, spki []byte) (Actor, error) {
	var name, role string
	var expires int64
	err := d.Store.View(ctx, func(tx *store.Tx) error {
		if err := denials.Held(tx); err != nil {
			return err
		}
		return tx.QueryRow(`SELECT name, role, expires FROM operators WHERE key_hash = ?`, evidence.Sum(spki).String()).Scan(&name, &role, &expires)
	})
	if errors.Is(err, denials.ErrHeld) {
		return Actor{}, fmt.Errorf("%w: %w", ErrForbidden, err)
	}
	if err != nil || !d.Now().Before(store.Time(expires)) {
		return Actor{}, fmt.Errorf("%w: no operator has this key", ErrForbidden)
	}
	r, err := ParseRole(role)
	return Actor{Name: name, Role: r}, err
}

// KnowsKey reports whether an operator has this key.
func (d *Desk) KnowsKey(ctx context.Context, spki []byte) (bool, error) {
	_, err := d.ActorByKey(ctx, spki)
	if errors.Is(err, ErrForbidden) {
		return false, nil
	}
	return err == nil, err
}

// An OperatorKey is one by which somebody may call from outside.
type OperatorKey struct {
	Name, Role       string
	Key              string // hex SHA-256 of the key's PKIX DER
	Created, Expires time.Time
}

// Operators lists all, those whose certificate has ended too.
func (d *Desk) Operators(ctx context.Context, a Actor) (list []OperatorKey, err error) {
	if err := a.need(Viewer); err != nil {
		return nil, err
	}
	err = d.Store.View(ctx, func(tx *store.Tx) error {
		list, err = store.Collect(tx, func(row store.Row) (o OperatorKey, err error) {
			var created, expires int64
			err = row.Scan(&o.Name, &o.Role, &o.Key, &created, &expires)
			o.Created, o.Expires = store.Time(created), store.Time(expires)
			return o, err
		}, `SELECT name, role, key_hash, created, expires FROM operators ORDER BY name, created`)
		return err
	})
	return list, err
}

// RemoveOperator ends what an operator's certificate is good for, at once.
func (d *Desk) RemoveOperator(ctx context.Context, a Actor, name string) error {
	return d.act(ctx, a, Admin, store.Any(store.Operators), event.Operator{As: event.OperatorRemoved, Name: name}, func(tx *store.Tx, _ *event.Record) error {
		var removed []denials.Denial
		detail, err := json.Marshal(removal{d.Now()})
		if err != nil {
			return err
		}
		if err := tx.Each(func(row store.Row) error {
			var key string
			var expires int64
			if err := row.Scan(&key, &expires); err != nil {
				return err
			}
			removed = append(removed, denials.Denial{Kind: denials.Operator, Name: key, Until: store.Time(expires), Detail: detail})
			return nil
		}, `SELECT key_hash, expires FROM operators WHERE name = ?`, name); err != nil {
			return err
		}
		for _, one := range removed {
			if err := denials.Set(tx, one); err != nil {
				return err
			}
		}
		r, err := tx.Exec(`DELETE FROM operators WHERE name = ?`, name)
		if err != nil {
			return err
		}
		if n, err := r.RowsAffected(); err != nil || n == 0 {
			return errors.Join(err, invalid("no operator is called %s; `countersign operator list` shows who is", name))
		}
		return nil
	})
}

// AcknowledgeRestore has the operator stand for the log's present epoch, and ends the hold of a
// broker that was restored without a denial log. It returns why the broker was held; empty: it
// wasn't.
func (d *Desk) AcknowledgeRestore(ctx context.Context, a Actor, reason string) (held string, epoch int64, err error) {
	if len(reason) > maxReason {
		return "", 0, invalid("the reason has %d bytes; at most %d are kept", len(reason), maxReason)
	}
	said := &event.Acknowledged{Reason: reason}
	err = d.act(ctx, a, Admin, store.Any(store.Broker), said, func(tx *store.Tx, _ *event.Record) error {
		if held, err = denials.Hold(tx); err != nil {
			return err
		}
		var isNew bool
		if epoch, isNew, err = audit.Acknowledge(tx, a.Name); err != nil {
			return err
		}
		if held == "" && !isNew {
			return invalid("nothing waits to be acknowledged")
		}
		said.Held, said.Epoch = held, epoch
		return denials.SetHold(tx, "")
	})
	return held, epoch, err
}

// A removal of an operator's key, in the denial log. The key may have been added again.
type removal struct {
	At time.Time `json:"at"`
}

// DenyOperator removes an operator's key that was removed, in a store that was restored from
// before it.
func DenyOperator(tx *store.Tx, d denials.Denial) error {
	var r removal
	if err := json.Unmarshal(d.Detail, &r); err != nil {
		return fmt.Errorf("denial of operator %s: %w", d.Name, err)
	}
	_, err := tx.Exec(`DELETE FROM operators WHERE key_hash = ? AND created <= ?`, d.Name, store.Millis(r.At))
	return err
}
