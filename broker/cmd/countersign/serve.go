package main

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"slices"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/countersign/countersign/broker/internal/config"
	"github.com/countersign/countersign/broker/internal/front/admin"
	"github.com/countersign/countersign/broker/internal/front/enroll"
	"github.com/countersign/countersign/broker/internal/front/hostapi"
	"github.com/countersign/countersign/broker/internal/front/liveness"
	"github.com/countersign/countersign/broker/internal/front/pki"
	"github.com/countersign/countersign/broker/internal/issue"
	"github.com/countersign/countersign/broker/internal/issue/fingerprint"
	"github.com/countersign/countersign/broker/internal/issue/issuers"
	"github.com/countersign/countersign/broker/internal/issue/vault"
	"github.com/countersign/countersign/broker/internal/lease"
	"github.com/countersign/countersign/broker/internal/lease/retention"
	"github.com/countersign/countersign/broker/internal/ops/expiry"
	"github.com/countersign/countersign/broker/internal/ops/metrics"
	"github.com/countersign/countersign/broker/internal/policy"
	"github.com/countersign/countersign/broker/internal/state/audit"
	"github.com/countersign/countersign/broker/internal/state/store"
	"github.com/countersign/countersign/broker/internal/state/timekeeper"
	"github.com/countersign/countersign/broker/internal/state/values"
	"github.com/countersign/countersign/broker/internal/verify/logcache"
	"github.com/countersign/countersign/broker/internal/verify/refvalues"
	"github.com/countersign/countersign/broker/internal/verify/vendors"
	"github.com/countersign/countersign/broker/server"
	"github.com/countersign/countersign/internal/faults"
	"github.com/countersign/countersign/internal/secret"
)

// serve runs a broker until ctx ends or its store stops.
func serve(ctx context.Context, c *config.Broker, stderr io.Writer) (err error) {
	if err := secret.ProtectProcess(); err != nil {
		return err
	}
	log := newLog(c.LogFormat, stderr)
	password, err := keyPassword(c.KeyPasswordFile, false)
	if err != nil {
		return err
	}
	s, err := openStore(c, log)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, s.Close()) }()
	id, err := brokerID(ctx, s)
	if err != nil {
		return err
	}
	hostCA, err := pki.Load(c.StateDir, pki.HostCA, password)
	if err != nil {
		return err
	}
	operatorCA, err := pki.Load(c.StateDir, pki.OperatorCA, password)
	if err != nil {
		return err
	}
	auditLog, err := audit.Open(s, c.StateDir, id)
	if err != nil {
		return err
	}
	fingerprints, err := fingerprint.Open(c.StateDir)
	if err != nil {
		return err
	}
	ekRoots, err := vendors.Load(c.EKRoots)
	if err != nil {
		return err
	}
	parse := func(files []policy.File) (*policy.Set, error) {
		return issuers.Parse(files, c.Names...)
	}
	inForce := admin.InForce(parse)
	if err := s.View(ctx, func(tx *store.Tx) error { _, err := inForce.In(tx); return err }); err != nil {
		return err
	}

	// Leases and silence run by a clock that nobody can set; certificates by
	// the wall clock.
	keeper, err := timekeeper.Open(ctx, s, log, faults.Now)
	if err != nil {
		return err
	}
	steady := keeper.Now

	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error { return keeper.Run(ctx) })
	group.Go(func() error { keepInForce(ctx, s, inForce, log); return nil })
	known := ends{store: s, hostCA: hostCA.Certificate, ekRoots: ekRoots.All}
	ready, services, err := openIssuers(ctx, issue.Environment{
		Config: c, Password: password, Values: values.In(s), Log: log, Wall: faults.Now, Steady: steady, Sure: keeper.Sure,
	}, fingerprints)
	if err != nil {
		return err
	}
	vaultStatus, crl := func() string { return "not configured" }, func() []byte { return nil }
	for kind, service := range services {
		group.Go(func() error { return service.Run(ctx) })
		known.issuers = append(known.issuers, service)
		if kind == vault.Kind.Name {
			vaultStatus = service.Status
		}
		if lists, ok := service.(interface{ CRL() []byte }); ok {
			crl = lists.CRL
		}
	}
	book, logs := refvalues.New(), logcache.New(logcache.Most)
	leases := lease.New(s, ready, log, steady)
	watch := &liveness.Watch{Store: s, Leases: leases, Brake: c.BrakeHostsPerMinute, Log: log, Now: steady}
	desk := &admin.Desk{Store: s, Leases: leases, Audit: auditLog, OperatorCA: operatorCA, Policy: inForce.In, Logs: logs, ParseSet: parse, Log: log, Now: faults.Now}
	root := admin.Actor{Name: "root", Role: admin.Viewer}
	// By the sure time: a lease that is forgotten too early could come back by its ticket.
	forgets := &retention.Keeper{Store: s, Keep: c.Retention(), Policy: inForce.In, Log: log, Now: keeper.Sure}
	alarms := func(ctx context.Context) []string {
		return slices.Concat(watch.Alarms(), leases.Alarms(ctx), known.alarms(log, faults.Now()))
	}
	for _, a := range known.alarms(log, faults.Now()) {
		log.Error("something ends, and no program renews it", "alarm", a)
	}
	handler, requests := metrics.New(metrics.Source{
		Counts: func(ctx context.Context) (metrics.Counts, error) {
			st, err := desk.Status(ctx, root)
			if err != nil {
				return metrics.Counts{}, err
			}
			overdue, _, err := leases.Overdue(ctx)
			return metrics.Counts{Hosts: st.Hosts, Leases: st.Leases, Findings: st.Findings, Overdue: overdue}, err
		},
		Alarms: alarms,
		Ends:   func(ctx context.Context) ([]expiry.End, error) { return known.list(ctx, faults.Now()) },
		Ready: func(context.Context) error {
			select {
			case <-s.Stopped():
				return store.ErrStopped
			default:
				return nil
			}
		},
		CRL: crl,
	})
	broker := &server.Server{
		Door: &server.Door{HostCA: hostCA.Certificate, OperatorCA: operatorCA.Certificate, Certificate: listenerCertificate(hostCA, c.Names, faults.Now), Now: faults.Now},
		Hosts: &server.Hosts{
			Admission: &enroll.Desk{Store: s, Leases: leases, CA: hostCA, Roots: ekRoots.Roots, Intermediates: ekRoots.Intermediates, MostPending: c.PendingHosts, Now: steady, Wall: faults.Now},
			Credentials: &hostapi.Desk{Store: s, Leases: leases, Policy: inForce.In, Basis: book, Logs: logs, CA: hostCA, Signer: auditLog.Signer(), Verify: auditLog.Verifier(),
				Log: log, Now: steady, Wall: faults.Now},
			Audit: auditLog, TrustDomain: c.TrustDomain, CA: hostCA.Certificate.Raw, Now: steady,
		},
		Operators: &server.Operators{Desk: desk, BrokerID: id, Version: version, Alarms: alarms, Vault: vaultStatus},
		Metrics:   handler, Requests: requests, Log: log,
		Listen: c.Listen, Socket: c.Socket(), MetricsListen: c.MetricsListen,
	}
	group.Go(func() error { return leases.Sweep(ctx) })
	group.Go(func() error { return watch.Run(ctx) })
	group.Go(func() error { return forgets.Run(ctx) })
	group.Go(func() error { return broker.Run(ctx) })
	group.Go(func() error {
		select {
		case <-ctx.Done():
			return nil
		case <-s.Stopped():
			return s.Err()
		}
	})
	return group.Wait()
}

// openIssuers opens the issuers that the config has. Ready has one of each kind, whose
// secrets are fingerprinted; of a kind that isn't configured issue.None.
func openIssuers(ctx context.Context, e issue.Environment, key fingerprint.Key) (ready map[string]issue.Issuer, services map[string]issue.Service, err error) {
	ready, services = map[string]issue.Issuer{}, map[string]issue.Service{}
	for _, k := range issuers.Kinds {
		service, err := k.Open(ctx, e)
		switch {
		case err != nil:
			return nil, nil, err
		case service == nil:
			ready[k.Name] = issue.None(k.Name)
		default:
			services[k.Name] = service
			ready[k.Name] = fingerprint.Issuer{Issuer: service, Key: key}
		}
	}
	return ready, services, nil
}

// keepInForce parses scopes as soon as they are applied, by whichever broker: a set that
// this one can't read is told then, and not by the first host that asks.
func keepInForce(ctx context.Context, s *store.Store, inForce *store.Cache[*policy.Set], log *slog.Logger) {
	changed := s.Changes(store.Scopes)
	for {
		select {
		case <-ctx.Done():
			return
		case <-changed:
		}
		if err := s.View(ctx, func(tx *store.Tx) error { _, err := inForce.In(tx); return err }); err != nil && ctx.Err() == nil {
			log.Error("the scopes that were applied can't be read", "err", err)
		}
	}
}

func newLog(format string, w io.Writer) *slog.Logger {
	if format == "json" {
		return slog.New(slog.NewJSONHandler(w, nil))
	}
	return slog.New(slog.NewTextHandler(w, nil))
}

func openStore(c *config.Broker, log *slog.Logger) (*store.Store, error) {
	if _, err := os.Stat(c.StoreFile()); err != nil {
		return nil, fmt.Errorf("%w: `countersign broker init` makes a new broker, `countersign broker restore` brings one back", err)
	}
	// An error of this is Open's to tell, in its own words.
	if behind, err := store.Behind(c.StoreFile()); err == nil && behind {
		log.Info("bringing an earlier version's store up to date; a large one takes minutes", "store", c.StoreFile())
	}
	return store.Open(c.StoreFile())
}

func brokerID(ctx context.Context, s *store.Store) (id string, err error) {
	err = s.View(ctx, func(tx *store.Tx) error {
		return tx.QueryRow(`SELECT value FROM meta WHERE name = 'broker.id'`).Scan(&id)
	})
	if err != nil {
		return "", fmt.Errorf("this store is of no broker: %w", err)
	}
	return id, nil
}

// listenerLifetime is short: the key is made anew at every start and never
// leaves memory.
const listenerLifetime = 90 * 24 * time.Hour

// listenerCertificate returns what gives the listener's certificate, which is
// made anew at two thirds of its life. One that was made by a clock that was
// ahead is replaced as soon as the clock is back, as hosts don't accept it yet.
func listenerCertificate(ca *pki.CA, names []string, now func() time.Time) func() (*tls.Certificate, error) {
	var mu sync.Mutex
	var current *tls.Certificate
	var made time.Time
	return func() (*tls.Certificate, error) {
		mu.Lock()
		defer mu.Unlock()
		now := now()
		if current != nil && !now.Before(made) && now.Before(made.Add(listenerLifetime*2/3)) {
			return current, nil
		}

		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			return nil, err
		}
		der, err := ca.Server(key.Public(), names, now, listenerLifetime)
		if err != nil {
			return nil, err
		}
		current, made = &tls.Certificate{Certificate: [][]byte{der, ca.Certificate.Raw}, PrivateKey: key}, now
		return current, nil
	}
}
