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
	"github.com/countersign/countersign/hostagent/internal/deliver"
	"github.com/countersign/countersign/hostagent/internal/notify"
	"github.com/countersign/countersign/hostagent/internal/program"
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
	// Find is the program's evidence; program.ErrNotRunning while there is
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

	push deliver.Push // one of push and pull is set
	pull deliver.Pull

	// files is held by who changes what is delivered, the lease of it, and what is
	// owed. It is taken before mu.
	files sync.Mutex

	mu       sync.Mutex // guards what follows; a *Lease is never changed once it is here
	lease    *Lease
	pending  *Lease        // that is being delivered
	offered  deliver.Offer // of pending; nil: pending is being pushed
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
	Way        deliver.Way // of the credential
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
	switch w := o.Way.(type) {
	case deliver.Push:
		r.push = w
	case deliver.Pull:
		r.pull = w
	default:
		return nil, fmt.Errorf("a way of delivery (%T) that neither puts a credential in its place nor hands it out", w)
	}
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
	changes := r.watch(ctx)
	for ctx.Err() == nil {
		o := r.observe(ctx)
		switch a := Plan(o); a.Kind {
		case Wait:
			r.wait(ctx, a.Until, changes)
		case Obtain:
			r.obtain(ctx, o.Program)
		case Accept:
			r.accept(ctx)
		case Retract:
			r.retract(a.Reason)
		case Adopt:
			r.adopt(o.Program)
		case Withdraw:
			r.withdraw(ctx, o.Lease.ID, a.Reason, true)
		case Drop:
			r.dropWithheld(a.Reason)
		}
	}
}

// recover finishes a delivery that the agent died in.
func (r *Runner) recover(ctx context.Context) error {
	r.files.Lock()
	defer r.files.Unlock()
	if r.pull != nil {
		return r.recoverPull(ctx)
	}
	return r.recoverPush(ctx)
}

// way is how the credential is delivered.
func (r *Runner) way() deliver.Way {
	if r.pull != nil {
		return r.pull
	}
	return r.push
}

// watch sends when observe may see something else.
func (r *Runner) watch(ctx context.Context) <-chan struct{} {
	if r.pull != nil {
		return r.pull.Watch(ctx)
	}
	return r.programs.Watch(ctx, r.cfg.Process)
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
		case !errors.Is(err, program.ErrNotRunning):
			unseen = err.Error()
		}
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if unseen != "" && unseen != r.unseen && ctx.Err() == nil {
		r.log.Warn("the program can't be seen", "err", unseen)
	}
	r.unseen = unseen
	if p != nil && p.Starting && starting == nil && r.pull == nil && (r.lease == nil || r.lease.Instance != p.Instance().String()) {
		p = nil // it starts and doesn't wait for us: it is served when it runs
	}
	if r.program != nil && p != nil && r.program.Instance() != p.Instance() {
		r.failures, r.retryAt = 0, time.Time{} // another one may be served at once
	}
	if unseen == "" {
		r.program = p
	}
	o := Observed{Now: r.now(), Program: p, Unknown: unseen != "", Lease: r.lease, Withheld: r.withheld, RetryAt: r.retryAt, Offline: r.offline}
	if r.pull != nil {
		o.Asked = r.pull.Asked()
	}
	if r.offered != nil {
		o.Offered, o.Read = r.pending, isClosed(r.offered.Read())
	}
	return o
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
	if r.pull != nil {
		return r.pull.Find(ctx, held)
	}
	return r.programs.Find(ctx, r.cfg.Process, held)
}

// longestWait bounds a wait, so that a clock that was set is noticed.
const longestWait = time.Minute

func (r *Runner) wait(ctx context.Context, until time.Time, changes <-chan struct{}) {
	d := longestWait
	if !until.IsZero() {
		d = min(max(until.Sub(r.now()), 10*time.Millisecond), d)
	}
	var read <-chan struct{}
	r.mu.Lock()
	if r.offered != nil {
		read = r.offered.Read()
	}
	r.mu.Unlock()
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-ctx.Done():
	case <-read:
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
	if r.pull != nil {
		err = r.offer(ctx, p, lease, fields)
	} else {
		err = r.put(ctx, p, lease, fields)
	}
	if err != nil {
		r.fail("deliver", err)
		r.files.Lock()
		defer r.files.Unlock()
		r.release(ctx, []string{lease.ID}, "not delivered")
		return
	}
	if r.push != nil {
		r.succeed() // what is only offered is not delivered yet
	}
}

func (r *Runner) request(ctx context.Context, p *process.Program, old *Lease) (*Lease, map[string]secret.Bytes, error) {
	o := attest.Order{Scope: r.cfg.Scope, Program: *p, DeliveryID: newDeliveryID(), BeforeStart: p.Starting,
		HandOver: r.push != nil && r.cfg.OnChange != nil && r.cfg.OnChange.Restart && !p.Starting}
	if old != nil {
		o.Replaces = old.ID
	}
	var key *hostKey
	var err error
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
	return &Lease{ID: issued.Lease, Delivery: o.DeliveryID, Instance: p.Instance().String(), Coming: o.HandOver, Boot: p.Boot, Unit: p.Unit(),
		SHA256: p.Main().SHA256.String(), Expires: issued.Expires, Replace: issued.ReplaceAt, Ticket: issued.Ticket, AckBy: issued.AcknowledgeBy, Replaces: o.Replaces}, issued.Fields, nil
}

// observeEvery is how often an observing scope is asked again.
const observeEvery = 15 * time.Minute

// tell tells the program in the background: a restart must not hold up the loop
// that sees the program come back.
func (r *Runner) tell(ctx context.Context, p process.Program) {
	go func() {
		// A program that ended has nothing to be told.
		if err := notify.Notify(ctx, r.cfg.OnChange, p); err != nil && !errors.Is(err, notify.ErrEnded) {
			r.complain("tell the program", err)
		}
	}()
}

func (r *Runner) dropPending() error {
	r.mu.Lock()
	r.pending, r.offered = nil, nil
	r.mu.Unlock()
	return r.keep.dropPending()
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
	if r.pull != nil {
		return errors.New("the program comes for this credential itself: there is nothing to wait for")
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
	if l.holds() && l.Acked && (l.Instance == p.Instance().String() || l.Coming) && r.now().Before(l.Expires) && r.push.Present() {
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
