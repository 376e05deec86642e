// Package ca issues workloads' X.509 certificates from smallstep's authority,
// embedded in the broker.
//
// What it trusts: the Decision, for every name in a certificate; the journal,
// for the serial, which it chose and wrote down before anything was signed; and
// of a certificate request its key alone, once the request proves that its maker
// holds it. No name, extension or time of a request is looked at. The authority
// is private to this package: it has no listener, its one provisioner's key is
// made at start and stays in memory, and renewal by an old certificate is off,
// so that nothing is signed but here.
//
// What it promises: each certificate bears the ordered serial, the scope's DNS
// names and addresses, the SPIFFE ID spiffe://TRUST DOMAIN/host/HOST/SCOPE and
// nothing more; it may sign in TLS handshakes on both ends, because a program
// that needs a certificate is often the one's server and another's client. A nil
// error of Revoke means that the serial is on disk as revoked, and stands on
// every CRL from the next one on until a day after its certificate is over. What
// revocation is worth is what verifiers make of the CRL: lifetime is the control.
//
// Whoever has the issuer's key file and the key password can name any workload;
// the broker's own door accepts none of these certificates. The root's key is
// needed only to make another issuer and may be kept elsewhere.
//
// One order makes no durable write here. The authority's one-use token is made
// and spent within a call of Issue, so that memory is enough to know it by. The
// certificate is not kept: the journal has its serial and end, the host the rest.
package ca

import (
	"context"
	"crypto"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"math/big"
	"os"
	"path/filepath"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"github.com/smallstep/certificates/authority"
	"go.step.sm/crypto/pemutil"

	"github.com/countersign/countersign/broker/internal/issue"
)

// backdate forgives verifiers whose clock is behind.
const backdate = time.Minute

// forgetAfter is how long a certificate that is over is still remembered, for
// verifiers whose clock is behind.
const forgetAfter = 24 * time.Hour

// over reports whether a certificate that ended at t can be forgotten: not by a
// clock that is ahead, or one would be forgotten that is good when the clock is
// back.
func (i *Issuer) over(t time.Time) bool {
	forget := t.Add(forgetAfter)
	return i.Now().After(forget) && i.Sure().After(forget)
}

// Options are what Open needs.
type Options struct {
	Dir         string // state folder, where Init wrote
	Password    []byte // of the key files
	TrustDomain string
	Values      issue.Values
	CRLURL      string        // stands in certificates; empty: none does
	CRLEvery    time.Duration // between CRLs while nothing is revoked
	Log         *slog.Logger
	Now         func() time.Time
	Sure        func() time.Time // what has surely passed, by no clock that was ahead for a while
}

// An Issuer is safe for concurrent use.
type Issuer struct {
	Options
	root, issuer *x509.Certificate
	key          crypto.Signer // of issuer
	authority    *authority.Authority
	database     *database
	minter       *minter
	signing      chan struct{} // bounds how many certificates are signed at a time
	unsigned     sync.Map      // serials of orders that failed before a signature

	revoked chan struct{} // a CRL is due; capacity 1
	crl     atomic.Pointer[crl]
	failed  atomic.Pointer[error] // of the last try to make a CRL; nil: it was made
}

var _ issue.Service = (*Issuer)(nil)

// open returns the CA that a broker's config describes.
func open(ctx context.Context, e issue.Environment) (issue.Service, error) {
	c := e.Config
	if c.CA == nil {
		return nil, nil
	}
	return Open(ctx, Options{
		Dir: c.StateDir, Password: e.Password, TrustDomain: c.TrustDomain, Values: e.Values,
		CRLURL: c.CA.CRLURL, CRLEvery: c.CA.Every(), Log: e.Log, Now: e.Wall, Sure: e.Sure,
	})
}

// A ref is the content of the CA's issue.Ref.
type ref struct {
	Serial string `json:"serial"` // decimal
}

func encodeRef(serial string) (issue.Ref, error) { return json.Marshal(ref{serial}) }

// serialOf returns the serial number in a Ref.
func serialOf(r issue.Ref) (string, error) {
	var known ref
	if err := json.Unmarshal(r, &known); err != nil {
		return "", fmt.Errorf("workload CA: %.60q names no certificate: %w", r, err)
	}
	return known.Serial, nil
}

// Open loads the CA that Init made. Run has to run beside it.
func Open(ctx context.Context, o Options) (*Issuer, error) {
	if o.CRLEvery <= 0 {
		return nil, errors.New("workload CA: no interval between CRLs")
	}
	i := &Issuer{Options: o, database: newDatabase(o.Values), signing: make(chan struct{}, runtime.GOMAXPROCS(0)), revoked: make(chan struct{}, 1)}
	if err := i.load(); err != nil {
		return nil, fmt.Errorf("workload CA: %w", err)
	}
	last, err := i.database.lastCRL(ctx)
	if err != nil {
		return nil, fmt.Errorf("workload CA: %w", err)
	}
	if last, err = i.recall(ctx, last); err != nil {
		return nil, fmt.Errorf("workload CA: %w", err)
	}
	i.crl.Store(last)
	if i.minter, err = newMinter(); err != nil {
		return nil, fmt.Errorf("workload CA: %w", err)
	}
	if i.authority, err = embed(i); err != nil {
		return nil, fmt.Errorf("workload CA: %w", err)
	}
	return i, nil
}

// load reads and checks root, issuer and the issuer's key.
func (i *Issuer) load() (err error) {
	if i.root, err = readCertificate(i.Dir, rootName); err != nil {
		return err
	}
	if i.issuer, err = readCertificate(i.Dir, issuerName); err != nil {
		return err
	}
	file := filepath.Join(i.Dir, issuerName+".key")
	key, err := pemutil.Read(file, pemutil.WithPassword(i.Password))
	if err != nil {
		return fmt.Errorf("%w; is key_password_file the one that `broker init` wrote?", err)
	}
	signer, ok := key.(crypto.Signer)
	if !ok || !i.issuer.PublicKey.(interface{ Equal(crypto.PublicKey) bool }).Equal(signer.Public()) {
		return fmt.Errorf("%s is not the key of %s.crt", file, issuerName)
	}
	i.key = signer
	if err := i.issuer.CheckSignatureFrom(i.root); err != nil {
		return fmt.Errorf("%s.crt is not of %s.crt: %w", issuerName, rootName, err)
	}
	if id := trustDomainID(i.TrustDomain).String(); len(i.issuer.URIs) != 1 || i.issuer.URIs[0].String() != id {
		return fmt.Errorf("%s.crt is of the trust domain %v, the config's trust_domain is %s", issuerName, i.issuer.URIs, i.TrustDomain)
	}
	return nil
}

func readCertificate(dir, name string) (*x509.Certificate, error) {
	cert, err := pemutil.ReadCertificate(filepath.Join(dir, name+".crt"))
	if errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("%w: `countersign broker init` made it; bring it back from a backup", err)
	}
	return cert, err
}

// Extend says how long the certificate lives: it was signed with its full
// length. It is called over only when no clock step can bring it back.
func (i *Issuer) Extend(_ context.Context, h issue.Handle, _ time.Duration) (time.Time, error) {
	if i.over(h.Expires) {
		return time.Time{}, issue.ErrGone
	}
	return h.Expires, nil
}

// Revoke records the serial as revoked and has it put on a CRL at once. A serial
// that was never signed, as far as the journal knows, is revoked like any other.
func (i *Issuer) Revoke(ctx context.Context, h issue.Handle) error {
	number, err := serialOf(h.Ref)
	if err != nil {
		return err
	}
	serial, err := parseSerial(number)
	if err != nil {
		return err
	}
	if _, never := i.unsigned.LoadAndDelete(number); never {
		return nil
	}
	ends := h.Expires
	if ends.IsZero() {
		ends = i.Now().Add(longest) // the journal has no end of what it never knew to be signed
	}
	if err := i.revoke(ctx, serial, ends); err != nil {
		return fmt.Errorf("workload CA: revoke serial %s: %w", serial, err)
	}
	select {
	case i.revoked <- struct{}{}:
	default:
	}
	return nil
}

// parseSerial reads a serial as RFC 5280, section 4.1.2.2, allows it.
func parseSerial(s string) (*big.Int, error) {
	n, ok := new(big.Int).SetString(s, 10)
	if !ok || n.Sign() <= 0 || n.BitLen() > 159 || n.String() != s {
		return nil, fmt.Errorf("workload CA: %.60q is no decimal serial of at most 159 bits", s)
	}
	return n, nil
}
