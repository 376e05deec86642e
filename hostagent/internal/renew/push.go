package renew

import (
	"context"
	"errors"

	"github.com/countersign/countersign/attestors/process"
	"github.com/countersign/countersign/hostagent/internal/deliver"
	"github.com/countersign/countersign/hostagent/internal/notify"
	"github.com/countersign/countersign/internal/faults"
	"github.com/countersign/countersign/internal/secret"
)

// put puts the credential where the program reads it, and acknowledges. The old
// one comes back where the acknowledgement doesn't get through in time: it
// lives, and the new one dies.
func (r *Runner) put(ctx context.Context, p *process.Program, lease *Lease, fields map[string]secret.Bytes) error {
	r.files.Lock()
	defer r.files.Unlock()
	staged, err := r.push.Stage(fields)
	for _, f := range fields {
		f.Wipe()
	}
	if err != nil {
		return err
	}
	defer staged.Discard()
	if err := notify.Check(ctx, r.cfg, r.keep.run, staged.Contents()); err != nil {
		return err
	}
	faults.Point("agent.prepared")
	if err := r.keep.savePending(lease); err != nil {
		return err
	}
	r.mu.Lock()
	r.pending = lease
	r.mu.Unlock()
	faults.Point("agent.pending")
	if err := staged.Commit(); err != nil {
		return errors.Join(err, r.dropPending())
	}
	faults.Point("agent.swapped")
	return r.settle(ctx, p, lease, staged)
}

// settle acknowledges what is committed, and finishes or undoes it. r.files is held.
func (r *Runner) settle(ctx context.Context, p *process.Program, lease *Lease, staged deliver.Staged) error {
	expires, err := r.acknowledge(ctx, lease)
	if err != nil {
		return r.undo(staged, err)
	}
	faults.Point("agent.acknowledged")
	lease = lease.with(func(l *Lease) { l.Acked, l.Expires = true, expires })
	if err := r.keep.save(lease); err != nil {
		return r.undo(staged, err)
	}
	faults.Point("agent.saved")
	r.mu.Lock()
	r.lease, r.offline, r.observed = lease, false, false
	r.mu.Unlock()
	if err := staged.Finish(); err != nil {
		r.log.Warn("the old files could not be wiped", "err", err)
	}
	faults.Point("agent.finished")
	if err := r.dropPending(); err != nil {
		return err
	}
	r.proveNow()
	r.log.Info("credential delivered", "lease", lease.ID, "expires", lease.Expires, "replaces", lease.Replaces)
	r.clearWithheld()
	if p != nil && !p.Starting {
		r.tell(ctx, *p)
	}
	return nil
}

// undo brings the old credential back. While that fails the pending note stays: the
// next run of the agent tries again.
func (r *Runner) undo(staged deliver.Staged, err error) error {
	if rollback := staged.Rollback(); rollback != nil {
		return errors.Join(err, rollback)
	}
	return errors.Join(err, r.dropPending())
}

// recoverPush keeps the new credential where the broker still takes its
// acknowledgement; else the old one comes back. r.files is held.
func (r *Runner) recoverPush(ctx context.Context) error {
	pending := r.pending
	staged, committed, err := r.push.Recover()
	if err != nil {
		return err
	}
	if pending == nil {
		return staged.Finish() // leftovers of a swap that was settled
	}
	defer staged.Discard()
	if r.lease != nil && r.lease.ID == pending.ID {
		// It was acknowledged and noted: only the tidying up is missing.
		return errors.Join(staged.Finish(), r.dropPending())
	}
	if !committed {
		r.release(ctx, []string{pending.ID}, "the agent died before it delivered")
		return r.dropPending()
	}
	return r.settle(ctx, nil, pending, staged)
}

// adopt puts a withheld credential back for the next start of its unit.
func (r *Runner) adopt(p *process.Program) {
	r.files.Lock()
	defer r.files.Unlock()
	lease, contents, err := r.keep.loadWithheld()
	if err == nil && lease != nil {
		var staged deliver.Staged
		if staged, err = r.push.PutBack(contents); err == nil {
			defer staged.Discard()
			if err = staged.Commit(); err == nil {
				err = staged.Finish()
			}
		}
	}
	if err == nil {
		lease = lease.with(func(l *Lease) { l.Instance, l.Coming = p.Instance().String(), false })
		if err = r.keep.save(lease); err == nil {
			r.mu.Lock()
			r.lease, r.withheld = lease, nil
			r.mu.Unlock()
			err = r.keep.dropWithheld()
		}
	}
	if err != nil {
		r.fail("put the withheld credential back", err)
		r.mu.Lock()
		r.withheld = nil
		r.mu.Unlock()
		r.proceed(err)
		return
	}
	r.log.Warn("no broker can be asked: the unit goes on with the credential that it had", "lease", lease.ID, "expires", lease.Expires)
	r.proceed(nil)
	r.proveNow()
}
