// Package supervisor is the agent at work: a Runner for each credential, one
// prover for the host, and the local socket by which root asks after them.
package supervisor

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	"github.com/countersign/countersign/broker/api"
	"github.com/countersign/countersign/hostagent/internal/attest"
	"github.com/countersign/countersign/hostagent/internal/config"
	"github.com/countersign/countersign/hostagent/internal/deliver"
	"github.com/countersign/countersign/hostagent/internal/notify"
	"github.com/countersign/countersign/hostagent/internal/openmon"
	"github.com/countersign/countersign/hostagent/internal/renew"
)

// Broker is what a Service needs of a broker.
type Broker interface {
	renew.Broker
	Prove(context.Context, []attest.LeaseProof) (attest.Proven, error)
	Witness(context.Context, []attest.FileOpen) error
	Host() string
	Ends() attest.Ends
}

// A Service is one running agent.
type Service struct {
	broker  Broker
	runners []*renew.Runner
	turns   []sync.Mutex // held by who has the runner of that index do its part
	cfg     *config.Agent
	log     *slog.Logger
	now     func() time.Time
	wall    func() time.Time
	prove   chan struct{} // capacity 1: prove as soon as may be

	mu       sync.Mutex
	proved   time.Time // guarded by mu; when the last proof succeeded
	proveBy  time.Time // guarded by mu
	problem  string    // guarded by mu; why the last proof failed
	rejected bool      // guarded by mu; the broker takes nothing of this host
}

// New makes a Service with a Runner for each credential of cfg, which is delivered
// in one of ways. Leases run by now, certificates by wall.
func New(cfg *config.Agent, broker Broker, programs renew.Programs, ways []deliver.Kind, log *slog.Logger, now, wall func() time.Time) (*Service, error) {
	s := &Service{broker: broker, cfg: cfg, log: log, now: now, wall: wall, prove: make(chan struct{}, 1)}
	for _, c := range cfg.Credentials {
		r, err := renew.New(renew.Options{Credential: c, Broker: broker, Programs: programs, Way: wayOf(c, ways, programs), StateDir: cfg.StateDir, RunDir: cfg.RunDir,
			ProveNow: s.proveNow, Log: log, Now: now})
		if err != nil {
			return nil, fmt.Errorf("credential %q: %w", c.Name, err)
		}
		s.runners = append(s.runners, r)
	}
	s.turns = make([]sync.Mutex, len(s.runners))
	return s, nil
}

// wayOf is the first of ways that c has a block of, nil for none.
func wayOf(c *config.Credential, ways []deliver.Kind, programs deliver.Programs) deliver.Way {
	for _, kind := range ways {
		if way := kind(c, programs); way != nil {
			return way
		}
	}
	return nil
}

// Run works until ctx ends. Files and leases stay for the next run.
func (s *Service) Run(ctx context.Context) error {
	socket, err := s.listen()
	if err != nil {
		return err
	}
	if err := notify.Clean(s.cfg.RunDir); err != nil {
		s.log.Warn("copies of credentials, made for checks, could not be removed", "err", err)
	}

	var wg sync.WaitGroup
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	for _, r := range s.runners {
		wg.Go(func() { r.Run(ctx) })
	}
	wg.Go(func() { s.proveLoop(ctx) })
	wg.Go(func() { alive(ctx) })
	if s.cfg.Witness {
		wg.Go(func() { openmon.Run(ctx, s.watched()) })
	}
	serveErr := make(chan error, 1)
	go func() { serveErr <- s.serve(ctx, socket) }()
	select {
	case <-ctx.Done():
	case err = <-serveErr:
		cancel()
	}
	wg.Wait()
	return err
}

// watched is what the witness looks after.
func (s *Service) watched() openmon.Options {
	o := openmon.Options{Tell: s.broker.Witness, Log: s.log, Now: s.now}
	for i, c := range s.cfg.Credentials {
		o.Credentials = append(o.Credentials, openmon.Credential{Config: c, Held: s.runners[i].Held})
	}
	return o
}

func (s *Service) proveNow() {
	select {
	case s.prove <- struct{}{}:
	default:
	}
}

// soon is how long changes are gathered before the host proves itself for them.
const soon = time.Second

// proveLoop proves the host when the broker wants it, and soon after a lease
// came or changed hands. Its next time is absolute: what happens meanwhile brings it
// nearer at most, and after a failure not even that.
func (s *Service) proveLoop(ctx context.Context) {
	failures := 0
	next := time.Now()
	for {
		timer := time.NewTimer(time.Until(next))
		select {
		case <-ctx.Done():
			timer.Stop()
			return
		case <-s.prove:
			timer.Stop()
			if sooner := time.Now().Add(soon); failures == 0 && sooner.Before(next) {
				next = sooner
			}
			continue
		case <-timer.C:
		}
		err := s.proveOnce(ctx)
		if ctx.Err() != nil {
			return
		}
		if err != nil {
			failures++
			wait := min(time.Second<<min(failures, 6), time.Minute)
			next = time.Now().Add(wait/2 + time.Duration(rand.Int64N(int64(wait/2)+1)))
			continue
		}
		failures = 0
		s.mu.Lock()
		next = time.Now().Add(max(s.proveBy.Sub(s.now()), time.Second))
		s.mu.Unlock()
	}
}

// proveOnce gives back what is owed, and proves the host whether or not that
// went: a broker that rejects the host says so to both.
func (s *Service) proveOnce(ctx context.Context) error {
	owing := s.each(ctx, func(r *renew.Runner) error { return r.PayOwed(ctx) })
	proofs := s.proofs(ctx)
	proven, err := s.broker.Prove(ctx, proofs)
	s.note(err)
	errs := append(owing, err)
	if err == nil {
		s.mu.Lock()
		s.proveBy = proven.ProveBy
		s.mu.Unlock()
		errs = append(errs, s.each(ctx, func(r *renew.Runner) error {
			for lease, v := range proven.Verdicts {
				r.Judged(ctx, lease, v)
			}
			return nil
		})...)
	}
	for _, err := range errs {
		if e := rejection(err); e != nil {
			s.note(e)
			s.each(ctx, func(r *renew.Runner) error { r.Rejected(ctx, e.Message); return nil })
			return e
		}
	}
	all := errors.Join(errs...)
	if err == nil && all != nil {
		s.log.Warn("the host is proven, and not all is settled: trying again", "err", all)
	}
	return all
}

func rejection(err error) *api.Error {
	if err == nil {
		return nil
	}
	if e := api.FromConnect(err); e.Outcome == api.Rejected {
		return e
	}
	return nil
}

// proofs are those of all runners, each of which bounds its own.
func (s *Service) proofs(ctx context.Context) (all []attest.LeaseProof) {
	of := make([][]attest.LeaseProof, len(s.runners))
	var wg sync.WaitGroup
	for i, r := range s.runners {
		wg.Go(func() { of[i] = r.Proofs(ctx) })
	}
	wg.Wait()
	return slices.Concat(of...)
}

// patience is how long one runner's part holds up the others'.
const patience = 10 * time.Second

// each has all runners do their part at the same time. One that takes long, in
// a folder whose file system hangs, say, goes on alone, and is left out until
// it is through.
func (s *Service) each(ctx context.Context, part func(*renew.Runner) error) (errs []error) {
	results := make(chan error, len(s.runners))
	working := 0
	for i, r := range s.runners {
		if !s.turns[i].TryLock() {
			errs = append(errs, fmt.Errorf("credential %q is still busy with its files", s.cfg.Credentials[i].Name))
			continue
		}
		working++
		go func() {
			err := part(r)
			s.turns[i].Unlock()
			results <- err
		}()
	}
	timer := time.NewTimer(patience)
	defer timer.Stop()
	for range working {
		select {
		case err := <-results:
			errs = append(errs, err)
		case <-timer.C:
			return errs
		case <-ctx.Done():
			return append(errs, ctx.Err())
		}
	}
	return errs
}

// note keeps how the last proof went, and logs a change.
func (s *Service) note(err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err == nil {
		if s.problem != "" || s.proved.IsZero() {
			s.log.Info("host proven")
		}
		s.proved, s.problem, s.rejected = s.now(), "", false
		return
	}
	if errors.Is(err, context.Canceled) {
		return
	}
	s.rejected = api.FromConnect(err).Outcome == api.Rejected
	if text := err.Error(); text != s.problem {
		s.log.Warn("host not proven", "err", err)
		s.problem = text
	}
}
