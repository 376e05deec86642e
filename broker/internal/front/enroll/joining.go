package enroll

import (
	"bytes"
	"crypto/subtle"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/countersign/countersign/attestors/evidence"
	"github.com/countersign/countersign/attestors/tpm"
	tpmappraise "github.com/countersign/countersign/attestors/tpm/appraise"
	"github.com/countersign/countersign/broker/api/event"
	"github.com/countersign/countersign/broker/internal/front/challenge"
	"github.com/countersign/countersign/broker/internal/state/audit"
	"github.com/countersign/countersign/broker/internal/state/budget"
	"github.com/countersign/countersign/broker/internal/state/denials"
	"github.com/countersign/countersign/broker/internal/state/inventory"
	"github.com/countersign/countersign/broker/internal/state/store"
	"github.com/countersign/countersign/broker/internal/verify/appraise"
)

// A joining is a host's verified request to join, and its result.
type joining struct {
	*Desk
	*challenge.Joining
	conn      *challenge.Conn
	spki      []byte // of the certified TLS key
	quoted    *tpmappraise.Verified
	now, wall time.Time
	requestID string

	others          []inventory.Host // own keys of this TPM, too
	spent           bool             // its token
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
	if j.EKs, err = activated(j.EKs, a.Secrets); err != nil {
		return nil, err
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

// activated returns the EKs whose challenge the TPM answered. The first has to be among
// them, and no answer may be wrong.
func activated(eks []challenge.Endorsement, secrets [][]byte) ([]challenge.Endorsement, error) {
	var proven []challenge.Endorsement
	for i, secret := range secrets {
		if i >= len(eks) || len(secret) == 0 && i > 0 {
			continue
		}
		if subtle.ConstantTimeCompare(secret, eks[i].Secret) != 1 {
			return nil, notActivated
		}
		proven = append(proven, eks[i])
	}
	if len(proven) == 0 {
		return nil, notActivated
	}
	return proven, nil
}

var notActivated = &evidence.Rejected{Check: CheckActivation, Detail: "the challenge to the TPM was not answered: AK and EK are not in one TPM"}

// enrol decides on the request and writes the host.
func (j *joining) enrol(tx *store.Tx) error {
	h, err := j.host(tx)
	if err != nil {
		return err
	}
	bound := h.Admitted && len(h.AKPublic) > 0 && !h.Reenrolling // to the keys that it has
	if stopped, err := j.stopped(tx, h, bound); stopped || err != nil {
		return err
	}
	if !bound {
		// It may have been taken out after the backup that the store was restored from.
		if err := denials.Held(tx); err != nil {
			return err
		}
	}

	before := h
	kind := event.HostJoined
	switch {
	case !h.Admitted:
		if h, kind, err = j.admit(tx, h); err != nil {
			return err
		}
	case h.Reenrolling:
		j.revoke, j.because = h.ID, "the host was enrolled anew"
	}
	if h.Admitted {
		if h, err = j.join(h, bound); err != nil {
			return err
		}
	}

	h = j.withKeys(h, !before.Reenrolling)
	if before.Reenrolling { // the operator said that this TPM is h
		for _, other := range j.others {
			if err := inventory.GiveUp(tx, other, h); err != nil {
				return err
			}
		}
	}
	j.result.Host, j.result.Pending = h, !h.Admitted
	if j.result.Pending && sameKeys(before, h) && before.Tier == h.Tier && before.Reason == h.Reason {
		return inventory.Save(tx, h) // it waits, as the log says already
	}
	if j.result.Pending && len(before.AKPublic) > 0 {
		account := budget.Of(tx)
		if _, over := account.Over(h.ID, j.now); over {
			return ErrOften
		}
		account.Spend(h.ID, budget.Records/keyChanges, 0, j.now)
	}
	if h.Admitted {
		if j.result.Certificate, err = j.CA.Host(mustKey(j.spki), h.ID, j.wall, CertificateLifetime); err != nil {
			return err
		}
	}
	j.spent = kind == event.HostAdmitted
	return j.save(tx, h, kind)
}

// host returns the host that owns one of the TPM's keys, or a new one. Where several own
// some, one that an operator allows to join with other keys goes first, and then those that
// are out.
func (j *joining) host(tx *store.Tx) (inventory.Host, error) {
	j.others = nil
	keys := inventory.Keys{AKPublic: j.AK.Encoded(), TLSKey: j.conn.Key()}
	for _, ek := range j.EKs {
		keys.EKs = append(keys.EKs, ek.Hash)
	}
	owners, err := inventory.Owners(tx, keys)
	if err != nil {
		return inventory.Host{}, err
	}
	if len(owners) == 0 {
		return inventory.Host{ID: inventory.NewID(), Name: j.Name, State: inventory.Pending, Created: j.now}, nil
	}
	for _, first := range []func(inventory.Host) bool{
		func(h inventory.Host) bool { return h.Reenrolling && h.State != inventory.Quarantined },
		func(h inventory.Host) bool { return h.State == inventory.Removed },
		func(h inventory.Host) bool { return h.State == inventory.Quarantined },
	} {
		if i := slices.IndexFunc(owners, first); i >= 0 {
			j.others = slices.Delete(slices.Clone(owners), i, i+1)
			return owners[i], nil
		}
	}
	j.others = owners[1:]
	for _, other := range j.others {
		if len(other.AKPublic) > 0 {
			return owners[0], fmt.Errorf("%w: %s and %s", ErrTwoHosts, owners[0].ID, other.ID)
		}
	}
	return owners[0], nil
}

// withKeys returns the host with what the TPM has proven, and counters that don't go back
// where forward is set. EKs that another host is registered with stay its, unless an operator
// has this one enrolled anew.
func (j *joining) withKeys(h inventory.Host, forward bool) inventory.Host {
	counters := j.quoted.Counters
	if forward && h.Counters != nil && bytes.Equal(h.AKPublic, j.AK.Encoded()) && counters.Before(*h.Counters) {
		counters = *h.Counters // a proof has overtaken this
	}
	h.AKPublic, h.TLSKey, h.Counters, h.PCRs, h.Address = j.AK.Encoded(), j.conn.Key(), &counters, j.quoted.PCRs, j.conn.Address
	h.Tier = appraise.TierKnown
	if j.EKs[0].Certified {
		h.Tier = appraise.TierCertified
	}
	h.EKs = slices.Clone(h.EKs)
	for _, ek := range j.EKs {
		theirs := forward && slices.ContainsFunc(j.others, func(o inventory.Host) bool { return slices.Contains(o.EKs, ek.Hash) })
		if !theirs && !slices.Contains(h.EKs, ek.Hash) {
			h.EKs = append(h.EKs, ek.Hash)
		}
	}
	return h
}

// sameKeys reports whether a has the keys of b.
func sameKeys(a, b inventory.Host) bool {
	return bytes.Equal(a.AKPublic, b.AKPublic) && a.TLSKey == b.TLSKey && len(a.EKs) == len(b.EKs)
}

// stopped reports whether the host needs an operator: its keys changed since it was
// admitted, it is quarantined, or the TPM's counters went back since this challenge was
// given. It records why.
func (j *joining) stopped(tx *store.Tx, h inventory.Host, bound bool) (bool, error) {
	sameAK := bytes.Equal(h.AKPublic, j.AK.Encoded())
	otherKeys := bound && !(sameAK && h.TLSKey == j.conn.Key())
	switch {
	case h.State == inventory.Removed:
		return true, ErrRemoved
	case h.State == inventory.Quarantined && !otherKeys:
		return true, ErrQuarantined
	case otherKeys:
		j.result = Result{Host: h, Pending: true}
		return true, j.wanted(tx, h)
	case sameAK && j.Seen != nil && j.quoted.Counters.Before(*j.Seen) && !h.Reenrolling:
		h, err := h.After(inventory.OnFork, "the TPM's counters went back: a copy or a reverted snapshot")
		if err != nil {
			return true, err
		}
		j.result, j.revoke, j.because = Result{Host: h, Pending: true}, h.ID, h.Reason
		return true, j.save(tx, h, event.HostDuplicate)
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
		h.Labels, h.Reference = t.Labels, t.Reference
		h, err = h.After(inventory.OnRedeem, "")
		return h, event.HostAdmitted, err
	}
	asked, err := h.After(inventory.OnAsk, "")
	if err != nil || len(h.AKPublic) > 0 {
		return asked, event.HostJoined, err // it waits already
	}

	// Its first time: one more that waits. Where roots are configured, software
	// can't take the places of those that wait.
	if j.Roots != nil && !j.EKs[0].Certified {
		return h, "", ErrUncertified
	}
	n, err := inventory.CountPending(tx)
	if err != nil {
		return h, "", err
	}
	if n >= j.MostPending {
		return h, "", ErrPendingFull
	}
	return asked, event.HostPending, nil
}

// join returns the admitted host after it has joined, with keys that it is bound to or with
// new ones. One that has joined before, or that has a reference set, is trusted only after
// its next proof.
func (j *joining) join(h inventory.Host, bound bool) (_ inventory.Host, err error) {
	const unproven = "joined; not proven since"
	switch {
	case bound:
		h, err = h.After(inventory.OnRejoin, unproven)
	case h.Reference != "":
		h, err = h.After(inventory.OnJoinBound, unproven)
	default:
		h, err = h.After(inventory.OnJoin, "")
		h.LastProved = j.now
	}
	if h.SilentAt.IsZero() {
		h.SilentAt = j.now.Add(firstProof)
	}
	return h, err
}

// wantsReenrol is the reason of a host whose TPM asks to join with other keys.
const wantsReenrol = "a TPM that it owns asks to join again; `countersign host reenrol` lets it"

// wanted records, once, that a host's TPM asks to join with other keys. Why a
// host is in its state stays its reason.
func (j *joining) wanted(tx *store.Tx, h inventory.Host) error {
	if strings.Contains(h.Reason, wantsReenrol) {
		return nil
	}
	if h.Reason != "" {
		h.Reason += "; "
	}
	h.Reason += wantsReenrol
	return j.save(tx, h, event.HostReenrolWanted)
}

func (j *joining) save(tx *store.Tx, h inventory.Host, kind event.Kind) error {
	enrolment := &event.Enrolment{
		As: kind, Name: h.Name, State: string(h.State), Tier: h.Tier, EKs: h.EKs, AK: evidence.Sum(h.AKPublic), TLSKey: h.TLSKey,
		Address: h.Address, Labels: h.Labels, Reference: h.Reference, Reason: h.Reason,
	}
	if j.spent {
		enrolment.Token = inventory.TokenHash(j.Token)
	}
	var told event.Event = enrolment
	if kind == event.HostDuplicate {
		told = event.Duplicate{Enrolment: enrolment}
	}
	if _, err := audit.Append(tx, event.Record{Time: j.now, Actor: "host:" + h.ID, Host: h.ID, Request: j.requestID}, told); err != nil {
		return err
	}
	return inventory.Save(tx, h)
}
