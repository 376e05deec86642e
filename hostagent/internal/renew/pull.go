package renew

import (
	"context"
	"errors"

	"github.com/countersign/countersign/attestors/process"
	"github.com/countersign/countersign/internal/faults"
	"github.com/countersign/countersign/internal/secret"
)

// offer lets the program read the credential. It isn't acknowledged before that:
// one that is never read dies by itself.
func (r *Runner) offer(ctx context.Context, p *process.Program, lease *Lease, fields map[string]secret.Bytes) error {
	r.files.Lock()
	defer r.files.Unlock()
	defer func() {
		for _, f := range fields {
			f.Wipe()
		}
	}()
	if err := r.keep.savePending(lease); err != nil {
		return err
	}
	faults.Point("agent.pending")
	offered, err := r.pull.Offer(*p, fields)
	if err != nil {
		return errors.Join(err, r.dropPending())
	}
	r.mu.Lock()
	r.pending, r.offered = lease, offered
	r.mu.Unlock()

	r.log.Info("credential offered", "lease", lease.ID, "acknowledge_by", lease.AckBy, "replaces", lease.Replaces)
	if lease.Replaces != "" && !p.Starting {
		r.tell(ctx, *p) // it came by itself for its first one
	}
	return nil
}

// accept acknowledges what was read. Where that doesn't get through in time, the
// old credential is served again: it lives, and the new one dies.
func (r *Runner) accept(ctx context.Context) {
	r.files.Lock()
	defer r.files.Unlock()
	r.mu.Lock()
	lease, offered := r.pending, r.offered
	r.mu.Unlock()
	if offered == nil { // it was withdrawn meanwhile
		return
	}

	expires, err := r.acknowledge(ctx, lease)
	if err == nil {
		faults.Point("agent.acknowledged")
		lease = lease.with(func(l *Lease) { l.Acked, l.Expires = true, expires })
		err = r.keep.save(lease)
	}
	if err != nil {
		offered.Retract()
		r.fail("deliver", errors.Join(err, r.dropPending()))
		r.release(ctx, []string{lease.ID}, "not delivered")
		return
	}
	faults.Point("agent.saved")
	r.mu.Lock()
	r.lease, r.observed = lease, false
	r.mu.Unlock()
	offered.Keep()
	if err := r.dropPending(); err != nil {
		r.fail("deliver", err)
		return
	}
	r.proveNow()
	r.log.Info("credential delivered", "lease", lease.ID, "expires", lease.Expires, "replaces", lease.Replaces)
	r.succeed()
}

// retract ends what is offered and wasn't acknowledged, if anything is.
func (r *Runner) retract(reason string) {
	r.files.Lock()
	defer r.files.Unlock()
	r.mu.Lock()
	lease, offered := r.pending, r.offered
	r.mu.Unlock()
	if offered == nil {
		return
	}
	offered.Retract()
	r.fail("offer "+lease.ID, errors.Join(errors.New(reason), r.dropPending()))
	r.poke()
}

// recoverPull gives back what was offered when the agent died: the secret was in
// its memory. r.files is held.
func (r *Runner) recoverPull(ctx context.Context) error {
	if r.pending == nil {
		return nil
	}
	if r.lease == nil || r.lease.ID != r.pending.ID { // else it was acknowledged and noted
		r.release(ctx, []string{r.pending.ID}, "the agent died before it delivered")
	}
	return r.dropPending()
}

func isClosed(c <-chan struct{}) bool {
	select {
	case <-c:
		return true
	default:
		return false
	}
}
