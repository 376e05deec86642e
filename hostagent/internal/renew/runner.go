package renew

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	"github.com/countersign/countersign/attestors/process"
	"github.com/countersign/countersign/broker/api"
	"github.com/countersign/countersign/hostagent/internal/attest"
	"github.com/countersign/countersign/hostagent/internal/config"
	"github.com/countersign/countersign/hostagent/internal/deliver/files"
	"github.com/countersign/countersign/hostagent/internal/instance"
	"github.com/countersign/countersign/hostagent/internal/notify"
	"github.com/countersign/countersign/internal/faults"
	"github.com/countersign/countersign/internal/secret"
)

// Broker is what a Runner needs of a broker.
type Broker interface {
	Issue(context.Context, attest.Order) (attest.Issued, error)
	Acknowledge(ctx context.Context, lease, delivery string) (time.Time, error)
	Release(ctx context.Context, leases []string, reason string) ([]string, error)
}

// Programs is what a Runner needs to know of what runs.
type Programs interface {
	// Find is the program's evidence; instance.ErrNotRunning while there is
	// none. Of several that answer to p, it is of the instance named held. It
	// returns when ctx ends.
	Find(ctx context.Context, p config.Process, held string) (process.Program, error)
	// Starting is the evidence of a unit that waits for its credential.
	Starting(ctx context.Context, unit string) (process.Program, error)
	// Watch sends when Find may answer differently, until ctx ends.
	Watch(ctx context.Context, p config.Process) <-chan struct{}
}

// A Runner keeps one credential.
type Runner struct {
	cfg      *config.Credential
	broker   Broker
	programs Programs
	keep     *keeper
	proveNow func() // the leases that the host holds changed
	log      *slog.Logger
	now      func() time.Time
	wake     chan struct{}

	// files is held by who changes the credential's files, the lease that stands
	// in them, and what is owed. It is taken before mu.
	files sync.Mutex

	mu       sync.Mutex // guards what follows; a *Lease is never changed once it is here
	lease    *Lease
	pending  *Lease // that is being delivered
	withheld *Lease
	program  *process.Program // as last seen
	starting *process.Program // of a unit that waits in Ready
	waiters  []chan error     // of Ready
	retryAt  time.Time
	failures int
	offline  bool
	problem  string // what keeps the credential from being in force, in words
	unseen   string // why the program can't be seen, in words
	observed bool   // the scope only observes
}

// Options make a Runner.
type Options struct {
	Credential *config.Credential
	Broker     Broker
	Programs   Programs
	StateDir   string
	RunDir     string // in memory
	ProveNow   func()
	Log        *slog.Logger
	Now        func() time.Time
}

// New reads what an earlier run of the agent left, and finishes a delivery
// that it died in.
func New(o Options) (*Runner, error) {
	r := &Runner{cfg: o.Credential, broker: o.Broker, programs: o.Programs, keep: &keeper{o.StateDir, o.RunDir, o.Credential.Name},
		proveNow: o.ProveNow, log: o.Log.With("credential", o.Credential.Name), now: o.Now, wake: make(chan struct{}, 1)}
	var err error
	if r.lease, err = r.keep.load(); err != nil {
		return nil, err
	}
	if r.pending, err = r.keep.loadPending(); err != nil {
		return nil, err
	}
	if r.withheld, _, err = r.keep.loadWithheld(); err != nil {
		return nil, err
	}
	return r, nil
}

// Run keeps the credential in force until ctx ends. What stands then stays:
// the next run adopts it.
func (r *Runner) Run(ctx context.Context) {
	if err := r.recover(ctx); err != nil {
		r.fail("recover from an interrupted delivery", err)
	}
	changes := r.programs.Watch(ctx, r.cfg.Process)
	for ctx.Err() == nil {
		o := r.observe(ctx)
		switch a := Plan(o); a.Kind {
		case Wait:
			r.wait(ctx, a.Until, changes)
		case Obtain:
			r.obtain(ctx, o.Program)
		case Adopt:
			r.adopt(o.Program)
		case Withdraw:
			r.withdraw(ctx, o.Lease.ID, a.Reason, true)
		case Drop:
			r.dropWithheld(a.Reason)
		}
	}
}

// observe looks at the program anew.
func (r *Runner) observe(ctx context.Context) Observed {
	r.mu.Lock()
	starting := r.starting
	r.mu.Unlock()
	p, unseen := starting, ""
	if p == nil {
		found, err := r.find(ctx)
		switch {
		case err == nil:
			p = &found
		case !errors.Is(err, instance.ErrNotRunning):
			unseen = err.Error()
		}
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if unseen != "" && unseen != r.unseen && ctx.Err() == nil {
		r.log.Warn("the program can't be seen", "err", unseen)
	}
	r.unseen = unseen
	if p != nil && p.Starting && starting == nil && (r.lease == nil || r.lease.Instance != p.Instance().String()) {
		p = nil // it starts and doesn't wait for us: it is served when it runs
	}
	if r.program != nil && p != nil && r.program.Instance() != p.Instance() {
		r.failures, r.retryAt = 0, time.Time{} // another one may be served at once
	}
	if unseen == "" {
		r.program = p
	}
	return Observed{Now: r.now(), Program: p, Unknown: unseen != "", Lease: r.lease, Withheld: r.withheld, RetryAt: r.retryAt, Offline: r.offline}
}

// seeTime bounds one look at the program: a proof waits for it.
const seeTime = 5 * time.Second

// find looks at the program that has the credential, or is to have it.
func (r *Runner) find(ctx context.Context) (process.Program, error) {
	r.mu.Lock()
	held := ""
	if r.lease.holds() {
		held = r.lease.Instance
	}
	r.mu.Unlock()
	ctx, cancel := context.WithTimeout(ctx, seeTime)
	defer cancel()
	return r.programs.Find(ctx, r.cfg.Process, held)
}

// longestWait bounds a wait, so that a clock that was set is noticed.
const longestWait = time.Minute

func (r *Runner) wait(ctx context.Context, until time.Time, changes <-chan struct{}) {
	d := longestWait
	if !until.IsZero() {
		d = min(max(until.Sub(r.now()), 10*time.Millisecond), d)
	}
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-ctx.Done():
	case <-changes:
	case <-r.wake:
	case <-timer.C:
	}
}

// poke has Run look again.
func (r *Runner) poke() {
	select {
	case r.wake <- struct{}{}:
	default:
	}
}

// obtain asks for a credential for p and delivers it.
func (r *Runner) obtain(ctx context.Context, p *process.Program) {
	r.mu.Lock()
	old := r.lease
	r.mu.Unlock()
	lease, fields, err := r.request(ctx, p, old)
	if err != nil {
		r.answered(ctx, err)
		return
	}
	if lease == nil { // observed only
		return
	}
	faults.Point("agent.issued")
	if err := r.put(ctx, p, lease, fields); err != nil {
		r.fail("deliver", err)
		r.files.Lock()
		defer r.files.Unlock()
		r.release(ctx, []string{lease.ID}, "not delivered")
		return
	}
	r.succeed()
}

func (r *Runner) request(ctx context.Context, p *process.Program, old *Lease) (*Lease, map[string]secret.Bytes, error) {
	encoded, err := p.Encode()
	if err != nil {
		return nil, nil, err
	}
	o := attest.Order{Scope: r.cfg.Scope, Program: encoded, DeliveryID: newDeliveryID(), BeforeStart: p.Starting,
		HandOver: r.cfg.OnChange != nil && r.cfg.OnChange.Restart && !p.Starting}
	if old != nil {
		o.Replaces = old.ID
	}
	var key *hostKey
	if r.cfg.Key != "" {
		if key, err = newHostKey(r.cfg.Key); err != nil {
			return nil, nil, err
		}
		if o.CSR, err = key.csr(); err != nil {
			return nil, nil, err
		}
	}
	issued, err := r.broker.Issue(ctx, o)
	if err != nil {
		return nil, nil, err
	}
	if issued.Observe {
		r.mu.Lock()
		r.observed, r.problem, r.retryAt = true, "", r.now().Add(observeEvery)
		r.mu.Unlock()
		r.proceed(nil)
		return nil, nil, nil
	}
	if key != nil {
		issued.Fields["private_key"] = key.pem()
	}
	return &Lease{ID: issued.Lease, Delivery: o.DeliveryID, Instance: p.Instance().String(), Coming: o.HandOver, Boot: p.Boot, Unit: p.Unit,
		SHA256: p.SHA256.String(), Expires: issued.Expires, Replace: issued.ReplaceAt, Ticket: issued.Ticket, AckBy: issued.AcknowledgeBy, Replaces: o.Replaces}, issued.Fields, nil
}

// observeEvery is how often an observing scope is asked again.
const observeEvery = 15 * time.Minute

// put swaps the files and acknowledges. The old files come back where the
// acknowledgement doesn't get through in time: they hold a credential that
// lives, the new ones one that dies.
func (r *Runner) put(ctx context.Context, p *process.Program, lease *Lease, fields map[string]secret.Bytes) error {
	r.files.Lock()
	defer r.files.Unlock()
	swap, err := files.Prepare(r.cfg.Files, fields)
	for _, f := range fields {
		f.Wipe()
	}
	if err != nil {
		return err
	}
	defer swap.Discard()
	if err := notify.Check(ctx, r.cfg.OnChange, swap.Paths()); err != nil {
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
	if err := swap.Commit(); err != nil {
		return errors.Join(err, r.dropPending())
	}
	faults.Point("agent.swapped")
	return r.settle(ctx, p, lease, swap)
}

// settle acknowledges a swap that stands in the files, and finishes or undoes
// it. r.files is held.
func (r *Runner) settle(ctx context.Context, p *process.Program, lease *Lease, swap *files.Swap) error {
	expires, err := r.acknowledge(ctx, lease)
	if err != nil {
		return r.undo(swap, err)
	}
	faults.Point("agent.acknowledged")
	acknowledged := *lease
	acknowledged.Acked, acknowledged.Expires = true, expires
	lease = &acknowledged
	if err := r.keep.save(lease); err != nil {
		return r.undo(swap, err)
	}
	faults.Point("agent.saved")
	r.mu.Lock()
	r.lease, r.offline, r.observed = lease, false, false
	r.mu.Unlock()
	if err := swap.Finish(); err != nil {
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
		// In the background: a restart must not hold up the loop that sees the
		// program come back.
		go func() {
			// A program that ended has nothing to be told.
			if err := notify.Notify(ctx, r.cfg.OnChange, *p); err != nil && !errors.Is(err, notify.ErrEnded) {
				r.complain("tell the program", err)
			}
		}()
	}
	return nil
}

func (r *Runner) dropPending() error {
	r.mu.Lock()
	r.pending = nil
	r.mu.Unlock()
	return r.keep.dropPending()
}

// undo brings the old files back. While that fails the pending note stays: the
// next run of the agent tries again.
func (r *Runner) undo(swap *files.Swap, err error) error {
	if rollback := swap.Rollback(); rollback != nil {
		return errors.Join(err, rollback)
	}
	return errors.Join(err, r.dropPending())
}

// acknowledge tries until it gets an answer or the time for it is over.
func (r *Runner) acknowledge(ctx context.Context, lease *Lease) (time.Time, error) {
	for wait := 200 * time.Millisecond; ; wait = min(2*wait, 5*time.Second) {
		expires, err := r.broker.Acknowledge(ctx, lease.ID, lease.Delivery)
		if err == nil {
			return expires, nil
		}
		var e *api.Error
		if errors.As(err, &e) && (e.Check == api.CheckGone || e.Outcome == api.Rejected) || !r.now().Before(lease.AckBy) {
			return time.Time{}, err
		}
		select {
		case <-ctx.Done():
			return time.Time{}, ctx.Err()
		case <-time.After(wait):
		}
	}
}

// answered deals with a broker's answer that isn't a credential.
func (r *Runner) answered(ctx context.Context, err error) {
	e := api.FromConnect(err)
	r.mu.Lock()
	r.offline = e.Outcome == api.Fault
	lease := r.lease
	if e.Check == api.CheckGone && lease != nil {
		r.lease = lease.with(func(l *Lease) { l.Replace = r.now() }) // ask again, for a new one
	}
	r.mu.Unlock()
	switch e.Outcome {
	case api.Refused, api.Rejected:
		r.fail("obtain", e)
		if lease != nil {
			r.withdraw(ctx, lease.ID, e.Error(), false)
		}
		r.dropWithheld(e.Error())
		r.proceed(e)
		return
	}
	r.fail("obtain", e) // who waits in Ready waits on: a fault may pass
}

// fail notes a problem and when to try again.
func (r *Runner) fail(what string, err error) {
	r.complain(what, err)
	r.mu.Lock()
	defer r.mu.Unlock()
	r.retryAt = r.now().Add(backoff(r.failures))
	r.failures++
}

// complain notes a problem that nothing has to wait for.
func (r *Runner) complain(what string, err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	text := what + ": " + err.Error()
	if text != r.problem {
		r.log.Warn("credential not renewed", "doing", what, "err", err)
	}
	r.problem = text
}

// backoff is a second doubling to a minute, jittered.
func backoff(failures int) time.Duration {
	d := min(time.Second<<min(failures, 6), time.Minute)
	return d/2 + time.Duration(rand.Int64N(int64(d/2)+1))
}

func (r *Runner) succeed() {
	r.mu.Lock()
	r.failures, r.retryAt, r.problem, r.offline = 0, time.Time{}, "", false
	r.mu.Unlock()
	r.proceed(nil)
}

// proceed answers those who wait in Ready.
func (r *Runner) proceed(err error) {
	r.mu.Lock()
	waiters := r.waiters
	r.waiters, r.starting = nil, nil
	r.mu.Unlock()
	for _, w := range waiters {
		w <- err
	}
}

// Ready obtains the credential for a unit that is starting and waits for it.
func (r *Runner) Ready(ctx context.Context) error {
	if r.cfg.Process.Unit == "" {
		return errors.New("only a credential whose program is found by its unit can be waited for")
	}
	p, err := r.programs.Starting(ctx, r.cfg.Process.Unit)
	if err != nil {
		return err
	}
	done := make(chan error, 1)
	r.mu.Lock()
	l := r.lease
	r.mu.Unlock()
	// Not under mu, which proofs wait for: the files' file system may hang.
	if l.holds() && l.Acked && (l.Instance == p.Instance().String() || l.Coming) && r.now().Before(l.Expires) && files.Standing(r.cfg.Files) {
		return nil // handed over, and there already
	}
	r.mu.Lock()
	r.starting = &p
	r.waiters = append(r.waiters, done)
	r.retryAt, r.failures = time.Time{}, 0
	r.mu.Unlock()
	r.poke()
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.waiters = slices.DeleteFunc(r.waiters, func(w chan error) bool { return w == done }); len(r.waiters) == 0 {
		r.starting = nil
	}
	return fmt.Errorf("not delivered in time: %s", r.problem)
}
