// Package enroll lets hosts in: it challenges a TPM, has it prove that AK,
// EK and TLS key are in one chip, and then asks whether the host is ours.
//
// A vendor's certificate never admits anybody; a registered EK, a one-use join
// token or an operator does. Nothing is stored before the TPM has answered, so
// a peer that only talks leaves nothing behind, and each challenge lives in
// its own connection, so no peer displaces another's.
package enroll

import (
	"cmp"
	"context"
	"crypto/rand"
	"crypto/x509"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"
	"unicode"

	"github.com/countersign/countersign/attestors/evidence"
	"github.com/countersign/countersign/attestors/tpm"
	tpmappraise "github.com/countersign/countersign/attestors/tpm/appraise"
	"github.com/countersign/countersign/broker/internal/front/challenge"
	"github.com/countersign/countersign/broker/internal/front/pki"
	"github.com/countersign/countersign/broker/internal/lease"
	"github.com/countersign/countersign/broker/internal/lease/journal"
	"github.com/countersign/countersign/broker/internal/state/inventory"
	"github.com/countersign/countersign/broker/internal/state/store"
)

// CertificateLifetime is how long a host certificate lives; it is made anew in
// a proof when two thirds of that are over.
const CertificateLifetime = 30 * 24 * time.Hour

// firstProof is how long a host that joined may take to prove itself before it
// counts as silent.
const firstProof = 30 * time.Minute

// What counts in choosing an EK: that a maker's certificate vouches for it and,
// more than that, that the inventory has it.
const (
	badScore       = -1 // its certificate is not good
	certifiedScore = 1
	knownScore     = 2
)

// keyChanges is how often in an hour a host that waits may come with other keys: each
// is in the log for good.
const keyChanges = 20

// maxEKs is how many EKs a host may offer.
const maxEKs = 8

// A Desk admits hosts.
type Desk struct {
	Store         *store.Store
	Leases        *lease.Manager
	CA            *pki.CA
	Roots         *x509.CertPool // of TPM vendors
	Intermediates *x509.CertPool
	MostPending   int
	Now           func() time.Time // of leases and silence
	Wall          func() time.Time // of certificates and tokens
}

// An Application is what a host asks with.
type Application struct {
	Body      []byte // as sent: what certification and quote commit to
	EKs       []tpm.EK
	Issuers   [][]byte // DER: CAs' certificates that the TPM holds
	AKPublic  []byte
	TLSPublic []byte
	Token     string
	Hostname  string
}

// Errors that a host hears. They say nothing of other hosts.
var (
	ErrPendingFull = errors.New("too many hosts wait for an operator; ask for a join token")
	ErrOften       = errors.New("this host waits for an operator, and joined with other keys too often; try again in an hour")
	ErrRemoved     = errors.New("this TPM's host was removed; an operator has to reenrol it")
	ErrQuarantined = errors.New("this host is quarantined; an operator knows why")
	ErrTwoHosts    = errors.New("this TPM's keys belong to two hosts of the inventory; `countersign host reenrol` says which of them it is")
	ErrUncertified = errors.New("this TPM's key has no certificate of a configured root: an operator has to register its EK hash, or give a join token")
)

// A CheckActivation rejection is a TPM that didn't answer its challenge.
const CheckActivation evidence.Check = "activation"

// A Challenge is what the host's TPM has to answer.
type Challenge struct {
	Keys  []KeyChallenge // at least one; the first is of the EK that counts
	Nonce evidence.Nonce
}

// A KeyChallenge is for one EK.
type KeyChallenge struct {
	tpm.Challenge
	EK int // index in Application.EKs
}

// Begin judges the keys of an application and challenges every EK that a TPM can have.
// One counts for the tier: a registered one if there is, else a certified one.
func (d *Desk) Begin(ctx context.Context, conn *challenge.Conn, a Application) (Challenge, error) {
	if len(a.EKs) == 0 || len(a.EKs) > maxEKs {
		return Challenge{}, &evidence.Rejected{Check: tpmappraise.CheckEKKey, Detail: fmt.Sprintf("%d endorsement keys; 1 to %d are looked at", len(a.EKs), maxEKs)}
	}
	ak, err := tpmappraise.ParseAK(a.AKPublic)
	if err != nil {
		return Challenge{}, err
	}
	offered, err := d.judge(ctx, a)
	if err != nil {
		return Challenge{}, err
	}
	seen, err := d.seen(ctx, ak)
	if err != nil {
		return Challenge{}, err
	}

	c := Challenge{Nonce: challenge.NewNonce()}
	j := &challenge.Joining{Nonce: c.Nonce, Body: a.Body, AK: ak, Seen: seen, TLS: a.TLSPublic, Token: a.Token, Name: hostname(a.Hostname)}
	for _, o := range offered {
		toTPM, answer, err := tpmappraise.NewChallenge(rand.Reader, o.ek, ak)
		if err != nil {
			return Challenge{}, err
		}
		c.Keys = append(c.Keys, KeyChallenge{toTPM, o.index})
		j.EKs = append(j.EKs, challenge.Endorsement{EK: o.ek, Secret: answer})
	}
	conn.Join(j, d.Now())
	return c, nil
}

// An offer is an EK that a host shows, and how much it counts.
type offer struct {
	ek    *tpmappraise.EK
	index int // in Application.EKs
	score int
}

// judge returns the EKs that can be challenged, the one that counts most first.
//
// A key that an operator or a maker vouches for is the one that counts: what the host
// offers beside it, such as a second key whose certificate has ended or leads to another
// root, says nothing against it. With nobody to vouch for any of them, why a certificate is
// not good is what an operator can mend.
func (d *Desk) judge(ctx context.Context, a Application) ([]offer, error) {
	now := d.Wall()
	intermediates := tpmappraise.WithIssuers(d.Intermediates, a.Issuers)
	var offers []offer
	var bad error // the first key that is not good
	for i, shown := range a.EKs {
		known, err := d.known(ctx, shown.Hash())
		if err != nil {
			return nil, err
		}
		ek, err := d.verifyEK(shown, intermediates, known, now)
		score := 0
		if err != nil {
			bad = cmp.Or(bad, err)
			if ek, err = tpmappraise.VerifyEK(tpm.EK{Public: shown.Public}, nil, nil, now); err != nil {
				continue // it is no EK
			}
			score = badScore
		} else {
			if ek.Certified {
				score = certifiedScore
			}
			if known {
				score += knownScore
			}
		}
		offers = append(offers, offer{ek, i, score})
	}

	slices.SortStableFunc(offers, func(a, b offer) int { return cmp.Compare(b.score, a.score) })
	if bad != nil && (len(offers) == 0 || offers[0].score < certifiedScore) {
		return nil, bad
	}
	return offers, nil
}

// seen returns the counters that the inventory has of AK's TPM; nil: none.
func (d *Desk) seen(ctx context.Context, ak *tpmappraise.AK) (seen *tpmappraise.Counters, err error) {
	err = d.Store.View(ctx, func(tx *store.Tx) error {
		h, err := inventory.ByAK(tx, ak.Encoded())
		seen = h.Counters
		if errors.Is(err, inventory.ErrUnknown) {
			err = nil
		}
		return err
	})
	return seen, err
}

// verifyEK judges one endorsement key. Of a known one no dates count: a key that
// was certified in a TPM doesn't leave it when the certificate, or the vendor's
// CA, comes to its end.
func (d *Desk) verifyEK(offered tpm.EK, intermediates *x509.CertPool, known bool, now time.Time) (*tpmappraise.EK, error) {
	if d.Roots == nil {
		offered.Certificate = nil // nothing to hold it against: the tier is known at best
	}

	ek, err := tpmappraise.VerifyEK(offered, d.Roots, intermediates, now)
	if check := evidence.CheckOf(err); known && (check == tpmappraise.CheckEKExpired || check == tpmappraise.CheckEKChain) {
		if made, parseErr := x509.ParseCertificate(offered.Certificate); parseErr == nil {
			ek, err = tpmappraise.VerifyEK(offered, d.Roots, intermediates, made.NotBefore)
		}
	}

	switch check := evidence.CheckOf(err); {
	case known && check == tpmappraise.CheckEKChain:
		// Operators vouch for this key, whoever its maker is.
		offered.Certificate = nil
		return tpmappraise.VerifyEK(offered, nil, nil, now)
	case check == tpmappraise.CheckEKExpired || check == tpmappraise.CheckEKChain:
		var r *evidence.Rejected
		if errors.As(err, &r) {
			err = &evidence.Rejected{Check: r.Check, Detail: fmt.Sprintf("%s (the broker's clock says %s); an operator can register the key: `countersign host add NAME --ek-hash %s`",
				r.Detail, now.UTC().Format(time.RFC3339), offered.Hash())}
		}
	}
	return ek, err
}

// KnowsKey reports whether a host of the inventory has this TLS key, and whether that
// host was admitted and not removed since. A row that can't be read is an admitted
// host's: what it hears is decided where it is read.
func (d *Desk) KnowsKey(ctx context.Context, key evidence.Digest) (registered, admitted bool, err error) {
	err = d.Store.View(ctx, func(tx *store.Tx) error {
		h, err := inventory.ByTLSKey(tx, key)
		switch {
		case errors.Is(err, inventory.ErrUnknown):
			return nil
		case errors.Is(err, inventory.ErrUnreadable):
			registered, admitted = true, true
			return nil
		}
		registered, admitted = err == nil, err == nil && h.Admitted && h.State != inventory.Removed
		return err
	})
	return registered, admitted, err
}

func (d *Desk) known(ctx context.Context, ek evidence.Digest) (known bool, err error) {
	err = d.Store.View(ctx, func(tx *store.Tx) error {
		_, err := inventory.ByEK(tx, ek)
		known = err == nil
		if errors.Is(err, inventory.ErrUnknown) {
			err = nil
		}
		return err
	})
	return known, err
}

// An Answer is what the host's TPM gave back.
type Answer struct {
	Secrets       [][]byte // of Challenge.Keys; an empty one: the TPM can't use that key
	Certification tpm.Certification
	Quote         tpm.Quote
}

// A Result says whether the host is in.
type Result struct {
	Host        inventory.Host
	Pending     bool   // an operator has to act
	Certificate []byte // DER, unless pending
}

// Finish verifies the TPM's answer and admits the host, or leaves it pending.
//
// A host that was admitted before and shows the same EK, AK and TLS key gets a
// new certificate and keeps its state: joining again trusts nobody. One that is
// quarantined gets nothing, and one with another key waits for an operator.
func (d *Desk) Finish(ctx context.Context, conn *challenge.Conn, a Answer, requestID string) (Result, error) {
	j, err := d.verify(conn, a)
	if err != nil {
		return Result{}, err
	}
	j.requestID = requestID

	err = d.Store.Update(ctx, store.Any(store.Hosts, store.Tokens), func(tx *store.Tx) error {
		j.result, j.revoke, j.because = Result{}, "", ""
		return j.enrol(tx)
	})
	if err != nil {
		return Result{}, err
	}
	if j.revoke != "" {
		if _, err := d.Leases.RevokeAll(ctx, journal.Filter{Host: j.revoke}, j.because, lease.Cause{Actor: "host:" + j.revoke, Request: requestID}, false); err != nil {
			return Result{}, err
		}
	}
	return j.result, nil
}

// mustKey parses what VerifyCertification has just encoded.
func mustKey(spki []byte) any {
	key, err := x509.ParsePKIXPublicKey(spki)
	if err != nil {
		panic(err)
	}
	return key
}

// hostname keeps of a host's own word what is safe to show.
func hostname(s string) string {
	s = strings.Map(func(r rune) rune {
		if r < unicode.MaxASCII && (unicode.IsLetter(r) || unicode.IsDigit(r) || strings.ContainsRune(".-_", r)) {
			return r
		}
		return -1
	}, s)
	return s[:min(len(s), 64)]
}
