// Package service is the agent at work: a Runner for each credential, one
// prover for the host, and the local socket by which root asks after them.
package service

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"sync"
	"time"

	"github.com/countersign/countersign/broker/wire"
	"github.com/countersign/countersign/hostagent/internal/attest"
	"github.com/countersign/countersign/hostagent/internal/config"
	"github.com/countersign/countersign/hostagent/internal/renew"
)

// A Service is one running agent.
type Service struct {
	client  *attest.Client
	runners []*renew.Runner
	cfg     *config.Agent
	log     *slog.Logger
	now     func() time.Time
	prove   chan struct{} // capacity 1: prove as soon as may be

	mu       sync.Mutex
	proved   time.Time // guarded by mu; when the last proof succeeded
	proveBy  time.Time // guarded by mu
	problem  string    // guarded by mu; why the last proof failed
	rejected bool      // guarded by mu; the broker takes nothing of this host
}

// New makes a Service with a Runner for each credential of cfg.
func New(cfg *config.Agent, client *attest.Client, programs renew.Programs, log *slog.Logger, now func() time.Time) (*Service, error) {
	s := &Service{client: client, cfg: cfg, log: log, now: now, prove: make(chan struct{}, 1)}
	for _, c := range cfg.Credentials {
		r, err := renew.New(renew.Options{Credential: c, Broker: client, Programs: programs, StateDir: cfg.StateDir, RunDir: cfg.RunDir,
			ProveNow: s.proveNow, Log: log, Now: now})
		if err != nil {
			return nil, fmt.Errorf("credential %q: %w", c.Name, err)
		}
		s.runners = append(s.runners, r)
	}
	return s, nil
}

// Run works until ctx ends. Files and leases stay for the next run.
func (s *Service) Run(ctx context.Context) error {
	socket, err := s.listen()
	if err != nil {
		return err
	}
	var wg sync.WaitGroup
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	for _, r := range s.runners {
		wg.Go(func() { r.Run(ctx) })
	}
	wg.Go(func() { s.proveLoop(ctx) })
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

func (s *Service) proveNow() {
	select {
	case s.prove <- struct{}{}:
	default:
	}
}

// soon is how long changes are gathered before the host proves itself for them.
const soon = time.Second

// proveLoop proves the host when the broker wants it, and soon after a lease
// came or changed hands.
func (s *Service) proveLoop(ctx context.Context) {
	failures := 0
	next := time.Duration(0)
	for {
		timer := time.NewTimer(next)
		select {
		case <-ctx.Done():
			timer.Stop()
			return
		case <-s.prove:
			timer.Stop()
			if failures > 0 {
				break // its turn comes
			}
			select {
			case <-ctx.Done():
				return
			case <-time.After(soon):
			}
		case <-timer.C:
		}
		err := s.proveOnce(ctx)
		if ctx.Err() != nil {
			return
		}
		if err != nil {
			failures++
			next = min(time.Second<<min(failures, 6), time.Minute)
			next = next/2 + time.Duration(rand.Int64N(int64(next/2)+1))
			continue
		}
		failures = 0
		s.mu.Lock()
		next = max(s.proveBy.Sub(s.now()), time.Second)
		s.mu.Unlock()
	}
}

func (s *Service) proveOnce(ctx context.Context) error {
	for _, r := range s.runners {
		if err := r.PayOwed(ctx); err != nil {
			s.note(err)
			return err
		}
	}
	var proofs []attest.LeaseProof
	owner := map[string]*renew.Runner{}
	for _, r := range s.runners {
		for _, p := range r.Proofs(ctx) {
			proofs = append(proofs, p)
			owner[p.Lease] = r
		}
	}
	proven, err := s.client.Prove(ctx, proofs)
	if err != nil {
		s.note(err)
		if e := wire.FromConnect(err); e.Outcome == wire.Rejected {
			for _, r := range s.runners {
				r.Rejected(ctx, e.Message)
			}
		}
		return err
	}
	s.note(nil)
	s.mu.Lock()
	s.proveBy = proven.ProveBy
	s.mu.Unlock()
	for lease, v := range proven.Verdicts {
		if r, ok := owner[lease]; ok {
			r.Judged(ctx, lease, v)
		}
	}
	return nil
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
	s.rejected = wire.FromConnect(err).Outcome == wire.Rejected
	if text := err.Error(); text != s.problem {
		s.log.Warn("host not proven", "err", err)
		s.problem = text
	}
}
