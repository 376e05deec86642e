package ca

import (
	"context"
	"crypto/rand"
	"crypto/x509"
	"errors"
	"fmt"
	"math/big"
	"os"
	"path/filepath"
	"time"

	"github.com/smallstep/certificates/db"

	"github.com/countersign/countersign/broker/internal/issue"
	"github.com/countersign/countersign/internal/bounded"
	"github.com/countersign/countersign/internal/durable"
)

// crlLife is long, because some verifiers refuse everybody once a CRL is over:
// a broker that is away must not end certificates that are good.
const crlLife = 7 * 24 * time.Hour

// rest lies between two CRLs, so that a thousand revocations make few.
const rest = time.Second

// retry is how soon a CRL that couldn't be made is tried again.
const retry = 10 * time.Second

// look is how often the clock is looked at: a CRL of a clock that was ahead is
// refused by verifiers, as is one that was over when the clock went on.
const look = time.Second

// due reports whether the newest CRL is to be replaced, though nothing was
// revoked.
func (i *Issuer) due() bool {
	last, now := i.crl.Load(), i.Now()
	return last == nil || now.Before(last.Made) || !now.Before(last.Made.Add(i.CRLEvery))
}

// Run makes a CRL at its start, at each interval by the wall clock, after each
// revocation, and when the clock was set back, until ctx ends.
func (i *Issuer) Run(ctx context.Context) error {
	timer := time.NewTimer(0)
	defer timer.Stop()
	for first := true; ; first = false {
		select {
		case <-ctx.Done():
			return nil
		case <-timer.C:
			if !first && i.failed.Load() == nil && !i.due() {
				timer.Reset(look)
				continue
			}
		case <-i.revoked:
		}
		next := look
		err := i.publish(ctx)
		switch {
		case ctx.Err() != nil:
			return nil
		case err != nil:
			i.Log.Error("workload CA: no new CRL", "err", err)
			i.failed.Store(&err)
			next = retry
		default:
			i.failed.Store(nil)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(min(rest, next)):
		}
		timer.Reset(next)
	}
}

// publish makes a CRL of what is revoked, and offers it once it is on disk.
//
// smallstep would make one, too, but keeps what it revoked for ever, goes by the
// system's clock, and gives each CRL a critical distribution point of its own.
func (i *Issuer) publish(ctx context.Context) error {
	all, err := i.database.revocations(ctx)
	if err != nil {
		return err
	}
	now := i.Now().UTC().Truncate(time.Second)
	var entries []x509.RevocationListEntry
	var forget []string
	for _, r := range all {
		if i.over(r.ExpiresAt) {
			forget = append(forget, r.Serial)
			continue
		}
		serial, err := parseSerial(r.Serial)
		if err != nil {
			i.Log.Error("workload CA: a revocation is of no serial", "err", err)
			continue
		}
		entries = append(entries, x509.RevocationListEntry{SerialNumber: serial, RevocationTime: r.RevokedAt, ReasonCode: r.ReasonCode})
	}
	// Numbers go up with the clock, so that they do after a restored backup, too.
	number := now.Unix()
	if last := i.crl.Load(); last != nil {
		number = max(number, last.Number+1)
	}
	der, err := x509.CreateRevocationList(rand.Reader, &x509.RevocationList{
		Number: big.NewInt(number), ThisUpdate: now.Add(-backdate), NextUpdate: now.Add(i.crlLife()), RevokedCertificateEntries: entries,
	}, i.issuer, i.key)
	if err != nil {
		return err
	}
	made := &crl{Number: number, Made: now, Entries: len(entries), DER: der}
	// The file is first: it may have what the database will have, never the other way round.
	if err := durable.Write(i.crlFile(), made.DER); err != nil {
		i.Log.Error("workload CA: the CRL is published, and not kept beside the store", "err", err)
	}
	if err := i.database.storeCRL(ctx, made, forget); err != nil {
		return err
	}
	i.crl.Store(made)
	return nil
}

// CRLFile is the newest CRL in the state folder, in DER: a store that was restored doesn't
// have it.
const CRLFile = "workload-ca.crl"

func (i *Issuer) crlFile() string { return filepath.Join(i.Dir, CRLFile) }

// maxCRL bounds a CRL's file, in bytes.
const maxCRL = 256 << 20

// recall returns the newest CRL, of the database or of the file. If the file's is newer, the
// store was restored from a backup: what is on it is revoked again, for as long as any
// certificate may live.
func (i *Issuer) recall(ctx context.Context, last *crl) (*crl, error) {
	der, err := bounded.ReadFile(i.crlFile(), maxCRL)
	if errors.Is(err, os.ErrNotExist) {
		return last, nil
	}
	if err != nil {
		return nil, err
	}
	list, err := x509.ParseRevocationList(der)
	if err == nil {
		err = list.CheckSignatureFrom(i.issuer)
	}
	if err != nil {
		i.Log.Error("workload CA: the CRL beside the store is passed over: it is no CRL of this issuer", "file", i.crlFile(), "err", err)
		return last, nil
	}
	if last != nil && list.Number.Cmp(big.NewInt(last.Number)) <= 0 {
		return last, nil
	}

	for _, e := range list.RevokedCertificateEntries {
		if err := i.database.Revoke(&db.RevokedCertificateInfo{Serial: e.SerialNumber.String(), RevokedAt: e.RevocationTime, ReasonCode: e.ReasonCode,
			ExpiresAt: e.RevocationTime.Add(longest)}); err != nil {
			return nil, err
		}
	}
	return &crl{Number: list.Number.Int64(), Made: list.ThisUpdate.Add(backdate), Entries: len(list.RevokedCertificateEntries), DER: der}, nil
}

// CRL is the newest one, in DER; nil before there is one.
func (i *Issuer) CRL() []byte {
	if c := i.crl.Load(); c != nil {
		return c.DER
	}
	return nil
}

// crlLife is for how long a CRL is good.
func (i *Issuer) crlLife() time.Duration { return max(crlLife, 3*i.CRLEvery) }

// What of the CA ends by itself, as the metric's label has it.
const (
	EndRoot   = "workload-ca"
	EndIssuer = "workload-issuer"
	EndCRL    = "crl"
)

// Ends are when the root's and the issuer's certificates and the newest CRL end.
func (i *Issuer) Ends() []issue.End {
	ends := []issue.End{
		{What: EndRoot, At: i.root.NotAfter, Do: "make a new workload CA and have verifiers trust it: \"Rotate CAs\" in docs/OPERATIONS.md"},
		{What: EndIssuer, At: i.issuer.NotAfter, Do: "make a new issuer by the root's key: \"Rotate CAs\" in docs/OPERATIONS.md"},
	}
	if c := i.crl.Load(); c != nil {
		ends = append(ends, issue.End{What: EndCRL, At: c.Made.Add(i.crlLife())})
	}
	return ends
}

// Status says in words how the CA is.
func (i *Issuer) Status() string {
	words := "no CRL yet"
	if c := i.crl.Load(); c != nil {
		words = fmt.Sprintf("CRL %d of %s lists %d certificates", c.Number, c.Made.Format(time.RFC3339), c.Entries)
	}
	if err := i.failed.Load(); err != nil {
		words += fmt.Sprintf("; a newer one can't be made: %v", *err)
	}
	return words
}
