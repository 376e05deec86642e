package renew

import (
	"context"
	"errors"
	"slices"
	"time"

	"github.com/countersign/countersign/attestors/process"
	"github.com/countersign/countersign/broker/api"
	"github.com/countersign/countersign/hostagent/internal/attest"
	"github.com/countersign/countersign/internal/faults"
	"github.com/countersign/countersign/internal/secret"
)

// withdraw takes the credential away and gives the lease back, whatever becomes
// of the first: a file's folder may be the program's user's, who could keep it
// from going.
// What can't be done now is noted in the lease, and is tried again. Where only
// the program's end is the reason, and the broker can't be told, a unit's
// credential is kept in memory for its next start: withhold says so. One that a
// broker took away never is. A lease that took the place of the named one
// meanwhile stays.
func (r *Runner) withdraw(ctx context.Context, id, reason string, withhold bool) {
	r.files.Lock()
	defer r.files.Unlock()
	r.mu.Lock()
	lease := r.lease
	r.mu.Unlock()
	if lease == nil || lease.ID != id {
		return
	}
	var contents []secret.Bytes
	if withhold && r.push != nil && lease.holds() && lease.Unit != "" && lease.Acked && r.now().Before(lease.Expires) {
		contents = r.push.Contents()
	}

	err := r.way().Withdraw()
	if r.pull != nil {
		err = errors.Join(err, r.dropPending()) // what was offered beside it is not, any more
	}
	faults.Point("agent.withdrawn")

	told, returned := true, lease.Returned
	if !returned {
		told, returned = r.release(ctx, []string{lease.ID}, reason)
	}
	if !told && len(contents) > 0 {
		r.withhold(lease, contents)
	}

	if err == nil && !returned {
		err = errors.New("the lease is neither given back nor noted as owed")
	}
	if err == nil {
		err = r.keep.drop()
	}
	if err != nil {
		r.leave(lease, reason, returned, err)
		return
	}
	r.mu.Lock()
	r.lease = nil
	if !lease.holds() {
		r.failures, r.retryAt, r.problem = 0, time.Time{}, ""
	}
	r.mu.Unlock()
	r.log.Info("credential withdrawn", "lease", lease.ID, "reason", reason, "told", told)
}

// withhold keeps a credential in memory for the next start of its unit.
func (r *Runner) withhold(lease *Lease, contents []secret.Bytes) {
	if err := r.keep.withhold(lease, contents); err != nil {
		r.fail("withhold", err)
		return
	}
	r.mu.Lock()
	r.withheld = lease
	r.mu.Unlock()
}

// leave notes of a lease that is over what is left to do: err.
func (r *Runner) leave(lease *Lease, reason string, returned bool, err error) {
	ended := lease.with(func(l *Lease) { l.Ended, l.Returned = reason, returned })
	err = errors.Join(err, r.keep.save(ended))
	r.mu.Lock()
	r.lease = ended
	r.mu.Unlock()
	r.fail(reason+"; left to do", err)
}

// release gives leases back, and says whether the broker heard it. Those it
// didn't hear of are owed until it does; returned is false only where that could
// not be noted either. r.files is held.
func (r *Runner) release(ctx context.Context, leases []string, reason string) (told, returned bool) {
	bounded, cancel := context.WithTimeout(ctx, releaseTimeout)
	defer cancel()
	_, err := r.broker.Release(bounded, leases, reason)
	if err == nil {
		return true, true
	}
	r.log.Warn("lease not given back, trying again", "leases", leases, "err", err)
	if err := r.keep.owe(leases); err != nil {
		r.fail("note what is owed", err)
		return false, false
	}
	return false, true
}

const releaseTimeout = 25 * time.Second

// PayOwed gives back what could not be given back before.
func (r *Runner) PayOwed(ctx context.Context) error {
	// What is owed must not be put back into the files meanwhile.
	r.files.Lock()
	defer r.files.Unlock()
	ctx, cancel := context.WithTimeout(ctx, releaseTimeout)
	defer cancel()
	owed, err := r.keep.owed()
	if err != nil || len(owed) == 0 {
		return err
	}
	r.mu.Lock()
	adopted := r.lease
	r.mu.Unlock()
	if adopted.holds() {
		// A lease that was put back into the files is no longer owed.
		owed = slices.DeleteFunc(owed, func(id string) bool { return id == adopted.ID })
	}
	if len(owed) > 0 {
		if _, err := r.broker.Release(ctx, owed, "the program ended while no broker could be told"); err != nil {
			return err
		}
	}
	if err := r.keep.paid(); err != nil {
		return err
	}
	r.clearWithheld()
	return nil
}

func (r *Runner) clearWithheld() {
	r.mu.Lock()
	withheld := r.withheld
	r.withheld = nil
	r.mu.Unlock()
	if withheld == nil {
		return
	}
	if err := r.keep.dropWithheld(); err != nil {
		r.log.Error("a withheld credential could not be wiped", "err", err)
	}
}

func (r *Runner) dropWithheld(reason string) {
	r.mu.Lock()
	withheld := r.withheld
	r.mu.Unlock()
	if withheld == nil {
		return
	}
	r.clearWithheld()
	r.log.Info("withheld credential dropped", "lease", withheld.ID, "reason", reason)
}

// Proofs are what a proof says of this credential: of the lease in force, and
// of one that is being delivered, which the broker may know as live already.
func (r *Runner) Proofs(ctx context.Context) []attest.LeaseProof {
	r.mu.Lock()
	lease, pending, p := r.lease, r.pending, r.starting
	r.mu.Unlock()
	if !lease.holds() {
		lease = nil
	}
	if lease == nil && pending == nil {
		return nil
	}
	if p == nil {
		found, err := r.find(ctx)
		if err == nil {
			p = &found
		} else {
			// Its end is Run's to notice; until then the last that was seen.
			r.mu.Lock()
			p = r.program
			r.mu.Unlock()
		}
	}
	var proofs []attest.LeaseProof
	for _, l := range []*Lease{lease, pending} {
		if l == nil || len(proofs) > 0 && proofs[0].Lease == l.ID {
			continue
		}
		proofs = append(proofs, attest.LeaseProof{Lease: l.ID, Scope: r.cfg.Scope, Program: p, Ticket: l.Ticket})
	}
	if lease != nil && p != nil {
		r.cameWith(lease, p)
	}
	return proofs
}

// cameWith ends the waiting of a hand-over: the instance that the lease is for
// is here. While the files, and with them the lease, are changing, that waits
// for the next proof: this one waits for no file system, and a lease's file has
// one writer.
func (r *Runner) cameWith(lease *Lease, p *process.Program) {
	if !r.files.TryLock() {
		return
	}
	defer r.files.Unlock()
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.lease != lease || !lease.Coming || p.Instance().String() == lease.Instance {
		return
	}
	r.lease = lease.with(func(l *Lease) { l.Instance, l.Coming = p.Instance().String(), false })
	if err := r.keep.save(r.lease); err != nil {
		r.log.Error("the lease's new instance was not noted", "err", err)
	}
}

// Judged takes a broker's verdict on a lease.
func (r *Runner) Judged(ctx context.Context, lease string, v attest.Verdict) {
	r.mu.Lock()
	mine := r.lease.holds() && r.lease.ID == lease
	offered := r.offered != nil && r.pending.ID == lease
	if mine && v.Outcome == "live" && !v.Expires.IsZero() {
		r.lease = r.lease.with(func(l *Lease) { l.Expires = v.Expires })
	}
	r.mu.Unlock()
	if offered && (v.Outcome == string(api.Refused) || v.Outcome == string(api.Rejected)) {
		r.retract(v.Outcome + ": " + v.Reason)
	}
	if !mine {
		return
	}
	switch v.Outcome {
	case string(api.Refused), string(api.Rejected):
		r.withdraw(ctx, lease, v.Outcome+": "+v.Reason, false)
	case api.CheckGone:
		// It is over at its issuer: a new one takes its place, if policy lets it.
		r.mu.Lock()
		if r.lease != nil && r.lease.ID == lease {
			r.lease = r.lease.with(func(l *Lease) { l.Replace = r.now() })
			r.retryAt = time.Time{}
		}
		r.mu.Unlock()
	}
	r.poke()
}

// Rejected takes a broker's word that the host's evidence is false, or that an
// operator took the host out: nothing may stand any more.
func (r *Runner) Rejected(ctx context.Context, reason string) {
	r.mu.Lock()
	lease := r.lease
	r.mu.Unlock()
	if lease == nil || lease.holds() { // else Run removes what is left, at its pace
		r.fail("prove", api.NewError(api.Rejected, "host", reason))
	}
	if lease.holds() {
		r.withdraw(ctx, lease.ID, "rejected: "+reason, false)
	}
	r.retract("rejected: " + reason)
	r.dropWithheld(reason)
	r.poke()
}
