// Package enroll lets hosts in: it challenges a TPM, has it prove that AK,
// EK and TLS key are in one chip, and then asks whether the host is ours.
//
// A vendor's certificate never admits anybody; a registered EK, a one-use join
// token or an operator does. Nothing is stored before the TPM has answered, so
// a peer that only talks leaves nothing behind, and each challenge lives in
// its own connection, so no peer displaces another's.
package enroll

import (
	"bytes"
	"cmp"
	"context"
	"crypto/rand"
	"crypto/subtle"
	"crypto/x509"
	"errors"
	"fmt"
	"strings"
	"time"
	"unicode"

	"github.com/countersign/countersign/attestors/evidence"
	"github.com/countersign/countersign/attestors/tpm"
	tpmappraise "github.com/countersign/countersign/attestors/tpm/appraise"
	"github.com/countersign/countersign/broker/api/event"
	"github.com/countersign/countersign/broker/internal/front/challenge"
	"github.com/countersign/countersign/broker/internal/front/pki"
	"github.com/countersign/countersign/broker/internal/lease"
	"github.com/countersign/countersign/broker/internal/lease/journal"
	"github.com/countersign/countersign/broker/internal/state/audit"
	"github.com/countersign/countersign/broker/internal/state/inventory"
	"github.com/countersign/countersign/broker/internal/state/store"
	"github.com/countersign/countersign/broker/internal/verify/appraise"
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
	certifiedScore = 1
	knownScore     = 2
)

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
	ErrRemoved     = errors.New("this TPM's host was removed; an operator has to reenrol it")
	ErrQuarantined = errors.New("this host is quarantined; an operator knows why")
	ErrUncertified = errors.New("this TPM's key has no certificate of a configured root: an operator has to register its EK hash, or give a join token")
)

// A CheckActivation rejection is a TPM that didn't answer its challenge.
const CheckActivation evidence.Check = "activation"

// A Challenge is what the host's TPM has to answer.
type Challenge struct {
	tpm.Challenge
	EK    int // index in Application.EKs
	Nonce evidence.Nonce
}

// Begin judges the keys of an application and challenges one EK: a registered
// one if there is, else a certified one.
func (d *Desk) Begin(ctx context.Context, conn *challenge.Conn, a Application) (Challenge, error) {
	if len(a.EKs) == 0 || len(a.EKs) > maxEKs {
		return Challenge{}, &evidence.Rejected{Check: tpmappraise.CheckEKKey, Detail: fmt.Sprintf("%d endorsement keys; 1 to %d are looked at", len(a.EKs), maxEKs)}
	}
	ak, err := tpmappraise.ParseAK(a.AKPublic)
	if err != nil {
		return Challenge{}, err
	}
	now := d.Wall()
	intermediates := tpmappraise.WithIssuers(d.Intermediates, a.Issuers)
	best, bestScore := -1, -1
	var chosen *tpmappraise.EK
	var bad error // the first key that is not good
	for i, offered := range a.EKs {
		known, err := d.known(ctx, offered.Hash())
		if err != nil {
			return Challenge{}, err
		}
		ek, err := d.verifyEK(offered, intermediates, known, now)
		if err != nil {
			bad = cmp.Or(bad, err)
			continue
		}
		score := 0
		if ek.Certified {
			score = certifiedScore
		}
		if known {
			score += knownScore
		}
		if score > bestScore {
			best, bestScore, chosen = i, score, ek
		}
	}
	// A key that an operator or a maker vouches for is the one that is challenged:
	// what the host offers beside it, such as a second key whose certificate has
	// ended or leads to another root, says nothing against it. With nobody to vouch
	// for any of them, why a certificate is not good is what an operator can mend.
	if bad != nil && bestScore < certifiedScore {
		return Challenge{}, bad
	}
	toTPM, answer, err := tpmappraise.NewChallenge(rand.Reader, chosen, ak)
	if err != nil {
		return Challenge{}, err
	}
	nonce := challenge.NewNonce()
	conn.Join(&challenge.Joining{
		Nonce: nonce, Secret: answer, Body: a.Body, EK: chosen, AK: ak, TLS: a.TLSPublic, Token: a.Token, Name: hostname(a.Hostname),
	}, d.Now())
	return Challenge{Challenge: toTPM, EK: best, Nonce: nonce}, nil
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

// KnowsKey reports whether a host of the inventory has this TLS key.
func (d *Desk) KnowsKey(ctx context.Context, key evidence.Digest) (known bool, err error) {
	err = d.Store.View(ctx, func(tx *store.Tx) error {
		_, err := inventory.ByTLSKey(tx, key)
		known = err == nil
		if errors.Is(err, inventory.ErrUnknown) {
			err = nil
		}
		return err
	})
	return known, err
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
	Secret        []byte
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

// A joining is a host's verified request to join, and its result.
type joining struct {
	*Desk
	*challenge.Joining
	conn      *challenge.Conn
	spki      []byte // of the certified TLS key
	quoted    *tpmappraise.Verified
	now, wall time.Time
	requestID string

	result          Result
	revoke, because string // the host whose leases to revoke, and the reason
}

// verify checks the TPM's answer against the challenge and the connection: EK, AK and TLS
// key are in one TPM.
func (d *Desk) verify(conn *challenge.Conn, a Answer) (*joining, error) {
	now := d.Now()
	j, err := conn.TakeJoin(now)
	if err != nil {
		return nil, err
	}
	if subtle.ConstantTimeCompare(a.Secret, j.Secret) != 1 {
		return nil, &evidence.Rejected{Check: CheckActivation, Detail: "the challenge to the TPM was not answered: AK and EK are not in one TPM"}
	}
	spki, err := j.AK.VerifyCertification(j.TLS, a.Certification, conn.Binding(evidence.CallCertify, j.Nonce, j.Body).ExtraData())
	if err != nil {
		return nil, err
	}
	if !bytes.Equal(spki, conn.KeySPKI) {
		return nil, &evidence.Rejected{Check: tpmappraise.CheckName, Detail: "the certified TLS key is not the one that opened this connection"}
	}
	quoted, err := j.AK.VerifyQuote(a.Quote, conn.Binding(evidence.CallJoin, j.Nonce, j.Body).ExtraData(), tpm.DefaultPCRs())
	if err != nil {
		return nil, err
	}
	return &joining{Desk: d, Joining: j, conn: conn, spki: spki, quoted: quoted, now: now, wall: d.Wall()}, nil
}

// enrol decides on the request and writes the host.
func (j *joining) enrol(tx *store.Tx) error {
	h, err := j.host(tx)
	if err != nil {
		return err
	}
	if stopped, err := j.stopped(tx, h); stopped || err != nil {
		return err
	}

	rejoined := h.Admitted && len(h.AKPublic) > 0 && !h.Reenrolling
	if h.Reenrolling {
		j.revoke, j.because = h.ID, "the host was enrolled anew"
	}
	kind := event.HostJoined
	if !h.Admitted {
		if h, kind, err = j.admit(tx, h); err != nil {
			return err
		}
	}
	h.AKPublic, h.TLSKey, h.Counters, h.PCRs = j.AK.Encoded(), j.conn.Key(), &j.quoted.Counters, j.quoted.PCRs
	h.Tier, h.Address, h.Reenrolling = appraise.TierKnown, j.conn.Address, false
	if j.EK.Certified {
		h.Tier = appraise.TierCertified
	}
	if h.Admitted {
		h = j.stateOf(h, rejoined)
		if j.result.Certificate, err = j.CA.Host(mustKey(j.spki), h.ID, j.wall, CertificateLifetime); err != nil {
			return err
		}
	}
	j.result.Host, j.result.Pending = h, !h.Admitted
	return j.save(tx, h, kind, j.requestID, j.now)
}

// host returns the host that owns the EK, or a new one.
func (j *joining) host(tx *store.Tx) (inventory.Host, error) {
	h, err := inventory.ByEK(tx, j.EK.Hash)
	switch {
	case errors.Is(err, inventory.ErrUnknown):
		return inventory.Host{ID: inventory.NewID(), Name: j.Name, State: inventory.Pending, EKs: []evidence.Digest{j.EK.Hash}, Created: j.now}, nil
	case err == nil && h.State == inventory.Removed:
		return h, ErrRemoved
	}
	return h, err
}

// stopped reports whether the host needs an operator: its keys changed since it was
// admitted, it is quarantined, or the TPM's counters went back. It records why.
func (j *joining) stopped(tx *store.Tx, h inventory.Host) (bool, error) {
	sameAK := bytes.Equal(h.AKPublic, j.AK.Encoded())
	sameKeys := sameAK && h.TLSKey == j.conn.Key()
	if h.Admitted && len(h.AKPublic) > 0 && !h.Reenrolling {
		switch {
		case h.State == inventory.Quarantined && sameKeys:
			return true, ErrQuarantined
		case h.State == inventory.Quarantined || !sameKeys:
			j.result = Result{Host: h, Pending: true}
			return true, j.wanted(tx, h, j.requestID, j.now)
		}
	}
	if sameAK && h.Counters != nil && j.quoted.Counters.Before(*h.Counters) && !h.Reenrolling {
		h.State, h.Reason = inventory.Quarantined, "the TPM's counters went back: a copy or a reverted snapshot"
		h.SilentAt = time.Time{}
		j.result, j.revoke, j.because = Result{Host: h, Pending: true}, h.ID, h.Reason
		return true, j.save(tx, h, event.HostDuplicate, j.requestID, j.now)
	}
	return false, nil
}

// admit admits a host that has a join token. Other hosts wait for an operator.
func (j *joining) admit(tx *store.Tx, h inventory.Host) (inventory.Host, event.Kind, error) {
	if j.Token != "" {
		t, err := inventory.UseToken(tx, j.Token, h.ID, j.wall)
		if err != nil {
			return h, "", err
		}
		if t.Name != "" {
			h.Name = t.Name
		}
		h.Admitted, h.Labels, h.Reference = true, t.Labels, t.Reference
		return h, event.HostAdmitted, nil
	}
	if len(h.AKPublic) > 0 {
		return h, event.HostJoined, nil // it waits already
	}

	// Its first time: one more that waits. Where roots are configured, software
	// can't take the places of those that wait.
	if j.Roots != nil && !j.EK.Certified {
		return h, "", ErrUncertified
	}
	n, err := inventory.CountPending(tx)
	if err != nil {
		return h, "", err
	}
	if n >= j.MostPending {
		return h, "", ErrPendingFull
	}
	return h, event.HostPending, nil
}

// stateOf sets the state of an admitted host that has joined. A host that was admitted
// before, or that has a reference set, is trusted only after its next proof.
func (j *joining) stateOf(h inventory.Host, rejoined bool) inventory.Host {
	switch {
	case !rejoined && h.Reference == "":
		h.State, h.Reason, h.LastProved = inventory.Trusted, "", j.now
	case h.State != inventory.Failed && h.State != inventory.Trusted:
		h.State, h.Reason = inventory.Stale, "joined; not proven since"
	}
	if h.SilentAt.IsZero() {
		h.SilentAt = j.now.Add(firstProof)
	}
	return h
}

// wantsReenrol is the reason of a host whose TPM asks to join with other keys.
const wantsReenrol = "a TPM that it owns asks to join again; `countersign host reenrol` lets it"

// wanted records, once, that a host's TPM asks to join with other keys. Why a
// host is quarantined stays its reason.
func (d *Desk) wanted(tx *store.Tx, h inventory.Host, requestID string, now time.Time) error {
	if strings.HasSuffix(h.Reason, wantsReenrol) {
		return nil
	}
	if h.State == inventory.Quarantined && h.Reason != "" {
		h.Reason += "; " + wantsReenrol
	} else {
		h.Reason = wantsReenrol
	}
	return d.save(tx, h, event.HostReenrolWanted, requestID, now)
}

func (d *Desk) save(tx *store.Tx, h inventory.Host, kind event.Kind, requestID string, now time.Time) error {
	enrolment := &event.Enrolment{
		As: kind, Name: h.Name, State: string(h.State), Tier: h.Tier, EKs: h.EKs, AK: evidence.Sum(h.AKPublic), TLSKey: h.TLSKey,
		Address: h.Address, Labels: h.Labels, Reference: h.Reference, Reason: h.Reason,
	}
	var told event.Event = enrolment
	if kind == event.HostDuplicate {
		told = event.Duplicate{Enrolment: enrolment}
	}
	if _, err := audit.Append(tx, event.Record{Time: now, Actor: "host:" + h.ID, Host: h.ID, Request: requestID}, told); err != nil {
		return err
	}
	return inventory.Save(tx, h)
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
