package ca

import (
	"context"
	"crypto/x509"
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/smallstep/certificates/db"

	"github.com/countersign/countersign/broker/internal/state/store"
)

// Buckets, named and filled as smallstep's own database does.
const (
	revokedBucket = "revoked_x509_certs" // by serial
	crlBucket     = "x509_crl"
	crlKey        = "crl"
)

// A database is the authority's, in the broker's store: what it says is revoked
// is as durable as the journal. It keeps no certificate and no used token (see
// the package's comment), and knows no SSH.
type database struct {
	store  *store.Store
	tokens sync.Map // ids of tokens that are made and not used
}

var _ db.AuthDB = (*database)(nil)

func newDatabase(s *store.Store) *database { return &database{store: s} }

// Revoke records a revocation; that of a serial which is revoked already
// changes nothing.
func (d *database) Revoke(info *db.RevokedCertificateInfo) error {
	value, err := json.Marshal(info)
	if err != nil {
		return err
	}
	return d.store.Update(context.Background(), func(tx *store.Tx) error {
		_, err := tx.Exec(`INSERT INTO ca_values (bucket, name, value) VALUES (?, ?, ?) ON CONFLICT (bucket, name) DO NOTHING`,
			revokedBucket, info.Serial, value)
		return err
	})
}

func (d *database) IsRevoked(serial string) (revoked bool, err error) {
	err = d.store.View(context.Background(), func(tx *store.Tx) error {
		return tx.QueryRow(`SELECT COUNT(*) > 0 FROM ca_values WHERE bucket = ? AND name = ?`, revokedBucket, serial).Scan(&revoked)
	})
	return revoked, err
}

// UseToken says whether the token may be used: each one that was made, once.
func (d *database) UseToken(id, _ string) (bool, error) {
	_, unused := d.tokens.LoadAndDelete(id)
	return unused, nil
}

func (d *database) GetCertificate(string) (*x509.Certificate, error) {
	return nil, db.ErrNotImplemented
}

func (d *database) IsSSHRevoked(string) (bool, error)          { return false, db.ErrNotImplemented }
func (d *database) RevokeSSH(*db.RevokedCertificateInfo) error { return db.ErrNotImplemented }
func (d *database) IsSSHHost(string) (bool, error)             { return false, db.ErrNotImplemented }
func (d *database) GetSSHHostPrincipals() ([]string, error)    { return nil, db.ErrNotImplemented }
func (d *database) Shutdown() error                            { return nil } // the store is its opener's

// A crl is one that was made.
type crl struct {
	Number  int64     `json:"number"`
	Made    time.Time `json:"made"`
	Entries int       `json:"entries"`
	DER     []byte    `json:"der"`
}

// lastCRL is the newest CRL; nil where there is none.
func (d *database) lastCRL(ctx context.Context) (*crl, error) {
	var last *crl
	err := d.store.View(ctx, func(tx *store.Tx) error {
		var value []byte
		err := tx.QueryRow(`SELECT value FROM ca_values WHERE bucket = ? AND name = ?`, crlBucket, crlKey).Scan(&value)
		if errors.Is(err, sql.ErrNoRows) {
			return nil
		}
		if err != nil {
			return err
		}
		last = &crl{}
		return json.Unmarshal(value, last)
	})
	if err != nil {
		return nil, fmt.Errorf("read the last CRL: %w", err)
	}
	return last, nil
}

// never is the end of a certificate whose end can't be read.
var never = time.Date(9999, 12, 31, 0, 0, 0, 0, time.UTC)

// revocations are all that is recorded. One that can't be read is of a serial all the
// same: it counts as revoked since ever, for good, and keeps no other off the CRL.
func (d *database) revocations(ctx context.Context) (all []db.RevokedCertificateInfo, err error) {
	err = d.store.View(ctx, func(tx *store.Tx) (err error) {
		all, err = store.Collect(tx, func(row store.Row) (info db.RevokedCertificateInfo, err error) {
			var serial string
			var value []byte
			if err := row.Scan(&serial, &value); err != nil {
				return info, err
			}
			if err := json.Unmarshal(value, &info); err != nil || info.Serial != serial {
				info = db.RevokedCertificateInfo{Serial: serial, RevokedAt: time.Unix(0, 0).UTC(), ExpiresAt: never}
			}
			return info, nil
		}, `SELECT name, value FROM ca_values WHERE bucket = ? ORDER BY name`, revokedBucket)
		return err
	})
	return all, err
}

// storeCRL makes a CRL the newest, and forgets revocations that are on it no
// more.
func (d *database) storeCRL(ctx context.Context, c *crl, forget []string) error {
	value, err := json.Marshal(c)
	if err != nil {
		return err
	}
	return d.store.Update(ctx, func(tx *store.Tx) error {
		for _, serial := range forget {
			if _, err := tx.Exec(`DELETE FROM ca_values WHERE bucket = ? AND name = ?`, revokedBucket, serial); err != nil {
				return err
			}
		}
		_, err := tx.Exec(`INSERT INTO ca_values (bucket, name, value) VALUES (?, ?, ?) ON CONFLICT (bucket, name) DO UPDATE SET value = excluded.value`,
			crlBucket, crlKey, value)
		return err
	})
}
