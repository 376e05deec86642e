package ca

import (
	"context"
	"crypto/x509"
	"encoding/json"
	"fmt"
	"sync"
	"time"

	"github.com/smallstep/certificates/db"

	"github.com/countersign/countersign/broker/internal/issue"
)

// Buckets, named and filled as smallstep's own database does.
const (
	RevokedBucket = "revoked_x509_certs" // revoked serials
	crlBucket     = "x509_crl"
	crlKey        = "crl"
)

// A database is the authority's, in the broker's store: what it says is revoked
// is as durable as the journal. It keeps no certificate and no used token (see
// the package's comment), and knows no SSH.
type database struct {
	values issue.Values
	tokens sync.Map // ids of tokens that are made and not used
}

var _ db.AuthDB = (*database)(nil)

func newDatabase(v issue.Values) *database { return &database{values: v} }

// Revoke records a revocation; that of a serial which is revoked already
// changes nothing.
func (d *database) Revoke(info *db.RevokedCertificateInfo) error {
	value, err := json.Marshal(info)
	if err != nil {
		return err
	}
	return d.values.Add(context.Background(), RevokedBucket, info.Serial, value)
}

func (d *database) IsRevoked(serial string) (revoked bool, err error) {
	value, err := d.values.Get(context.Background(), RevokedBucket, serial)
	return value != nil, err
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
	value, err := d.values.Get(ctx, crlBucket, crlKey)
	if err != nil || value == nil {
		return nil, err
	}
	last := &crl{}
	if err := json.Unmarshal(value, last); err != nil {
		return nil, fmt.Errorf("read the last CRL: %w", err)
	}
	return last, nil
}

// never is the end of a certificate whose end can't be read.
var never = time.Date(9999, 12, 31, 0, 0, 0, 0, time.UTC)

// revocations are all that is recorded. One that can't be read is of a serial all the
// same: it counts as revoked since ever, for good, and keeps no other off the CRL.
func (d *database) revocations(ctx context.Context) (all []db.RevokedCertificateInfo, err error) {
	err = d.values.All(ctx, RevokedBucket, func(serial string, value []byte) {
		var info db.RevokedCertificateInfo
		if err := json.Unmarshal(value, &info); err != nil || info.Serial != serial {
			info = db.RevokedCertificateInfo{Serial: serial, RevokedAt: time.Unix(0, 0).UTC(), ExpiresAt: never}
		}
		all = append(all, info)
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
	return d.values.Replace(ctx, crlBucket, crlKey, value, RevokedBucket, forget)
}
