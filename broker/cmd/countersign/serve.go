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
	"runtime/debug"
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
	"github.com/countersign/countersign/broker/internal/ops/recovery"
	"github.com/countersign/countersign/broker/internal/ops/space"
	"github.com/countersign/countersign/broker/internal/policy"
	"github.com/countersign/countersign/broker/internal/state/audit"
	"github.com/countersign/countersign/broker/internal/state/budget"
	"github.com/countersign/countersign/broker/internal/state/denials"
	"github.com/countersign/countersign/broker/internal/state/store"
	"github.com/countersign/countersign/broker/internal/state/timekeeper"
	"github.com/countersign/countersign/broker/internal/state/values"
	"github.com/countersign/countersign/broker/internal/verify/logcache"
	"github.com/countersign/countersign/broker/internal/verify/refvalues"
	"github.com/countersign/countersign/broker/internal/verify/vendors"
	"github.com/countersign/countersign/broker/server"
	"github.com/countersign/countersign/internal/cli"
	"github.com/countersign/countersign/internal/durable"
	"github.com/countersign/countersign/internal/faults"
	"github.com/countersign/countersign/internal/secret"
)

// collectAt is how much of what lives may be garbage beside it before it is collected,
// in percent. What peers may have in memory is bounded, and so is the garbage of it.
const collectAt = 50

// serve runs a broker until ctx ends or its store stops.
func serve(ctx context.Context, c *config.Broker, stderr io.Writer) (err error) {
	if os.Getenv("GOGC") == "" {
		debug.SetGCPercent(collectAt)
	}
	if err := secret.ProtectProcess(); err != nil {
		return err
	}
	log := cli.Log(c.LogFormat, stderr)
	password, err := keyPassword(c.KeyPasswordFile, false)
	if err != nil {
		return err
	}
	s, err := openStore(c, log)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, s.Close()) }()

	b := &broker{config: c, store: s, log: log}
	if err := b.readKeys(ctx, password); err != nil {
		return err
	}
	b.scopes = admin.InForce(b.parse)
	if err := s.View(ctx, func(tx *store.Tx) error { _, err := b.scopes.In(tx); return err }); err != nil {
		return err
	}
	// Leases and silence run by a clock that nobody can set; certificates by
	// the wall clock.
	if b.clock, err = timekeeper.Open(ctx, s, log, faults.Now); err != nil {
		return err
	}
	if err := b.openDenials(ctx); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, b.denials.Close()) }()
	group, ctx := errgroup.WithContext(ctx)
	ready, err := b.openIssuers(ctx, password)
	if err != nil {
		return err
	}
	b.assemble(ready)
	for _, a := range b.ends().alarms(log, faults.Now()) {
		log.Error("something ends, and no program renews it", "alarm", a)
	}

	for _, service := range b.services {
		group.Go(func() error { return service.Run(ctx) })
	}
	server := b.server()
	for _, run := range []func(context.Context) error{b.clock.Run, b.denials.Run, b.keepScopes, b.space.Run, b.keepRepeats, b.leases.Sweep, b.silence.Run, b.retention().Run, server.Run, b.untilStopped} {
		group.Go(func() error { return run(ctx) })
	}
	return group.Wait()
}

// A broker holds the parts of a running broker.
type broker struct {
	config *config.Broker
	store  *store.Store
	log    *slog.Logger
	clock  *timekeeper.Keeper

	id                 string
	hostCA, operatorCA *pki.CA
	audit              *audit.Log
	denials            *denials.Log
	fingerprints       fingerprint.Key
	ekRoots            vendors.Set

	scopes   *store.Cache[*policy.Set]
	services map[string]issue.Service // by kind, of those that are configured
	leases   *lease.Manager
	silence  *liveness.Watch
	logs     *logcache.Cache
	space    *space.Gauge
	desk     *admin.Desk
}

// readKeys reads the broker's identity, its keys, and the roots that it trusts.
func (b *broker) readKeys(ctx context.Context, password []byte) (err error) {
	dir := b.config.StateDir
	if b.id, err = brokerID(ctx, b.store); err != nil {
		return err
	}
	if b.hostCA, err = pki.Load(dir, pki.HostCA, password); err != nil {
		return err
	}
	if b.operatorCA, err = pki.Load(dir, pki.OperatorCA, password); err != nil {
		return err
	}
	if b.audit, err = audit.Open(b.store, dir, b.id); err != nil {
		return err
	}
	if b.fingerprints, err = fingerprint.Open(dir); err != nil {
		return err
	}
	b.ekRoots, err = vendors.Load(b.config.EKRoots)
	return err
}

// openDenials opens the denial log, and takes away again what it has and the store hasn't:
// somebody put a backup of the store in place.
func (b *broker) openDenials(ctx context.Context) error {
	file := b.config.DenialLog
	c, err := denials.Read(file, b.audit.Verifier())
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("%w; if it is another broker's, move it away", err)
	}
	if c.Bad > 0 {
		b.log.Error("the denial log has lines that can't be read; a copy is kept", "lines", c.Bad, "file", file)
		if err := durable.Copy(file, fmt.Sprintf("%s.damaged-%d", file, faults.Now().Unix())); err != nil {
			b.log.Error("the damaged denial log is not copied", "err", err)
		}
	}
	if err := recovery.Seed(ctx, b.store, faults.Now()); err != nil {
		return err
	}

	var last int64
	var used bool // beyond the record of its beginning
	if err := b.store.View(ctx, func(tx *store.Tx) (err error) {
		if last, err = denials.Last(tx); err != nil {
			return err
		}
		return tx.QueryRow(`SELECT EXISTS (SELECT 1 FROM audit_records WHERE idx = 1)`).Scan(&used)
	}); err != nil {
		return err
	}
	held := ""
	if c.Bad > 0 {
		held = fmt.Sprintf("the store is older than its denial log, of which %d lines can't be read", c.Bad)
	}
	switch {
	case c.Absent() && used:
		b.log.Warn("there is no denial log; it is written anew from the store", "file", file)
		if err := b.store.Update(ctx, store.Any(store.Broker), denials.MarkBegun); err != nil {
			return err
		}
	case c.Last > last:
		const reason = "the store is older than its denial log"
		merged, err := recovery.Merge(ctx, b.store, c, "broker", faults.Now(), b.log)
		if err != nil {
			return err
		}
		b.log.Warn(reason+": what was taken away since is taken away again", "denials", merged)
		if _, err := openEpoch(ctx, b.store, "broker", reason, held); err != nil {
			return err
		}
	}
	b.audit.Restored = func(tx *store.Tx) error {
		anew, err := denials.Begun(tx)
		if err != nil || !anew && held == "" {
			return err
		}
		return denials.SetHold(tx, "an agent's checkpoint shows that the store is older than it was, and its denial log was begun anew or is damaged")
	}
	b.denials, err = denials.Open(ctx, b.store, file, b.audit.Signer(), c, b.log, faults.Now, b.clock.Sure)
	return err
}

func (b *broker) parse(files []policy.File) (*policy.Set, error) {
	return issuers.Parse(files, b.config.Names...)
}

// openIssuers opens the configured issuers. It returns one issuer for each kind, which adds
// fingerprints of the secrets; kinds that aren't configured get issue.None.
func (b *broker) openIssuers(ctx context.Context, password []byte) (ready map[string]issue.Issuer, err error) {
	ready, b.services = map[string]issue.Issuer{}, map[string]issue.Service{}
	environment := issue.Environment{
		Config: b.config, Password: password, Values: values.In(b.store), Log: b.log,
		Wall: faults.Now, Steady: b.clock.Now, Sure: b.clock.Sure,
	}
	for _, k := range issuers.Kinds {
		service, err := k.Open(ctx, environment)
		switch {
		case err != nil:
			return nil, err
		case service == nil:
			ready[k.Name] = issue.None(k.Name)
		default:
			b.services[k.Name] = service
			ready[k.Name] = fingerprint.Issuer{Issuer: service, Key: b.fingerprints}
		}
	}
	return ready, nil
}

// assemble makes the lease manager, the silence watcher and the operators' desk.
func (b *broker) assemble(ready map[string]issue.Issuer) {
	b.leases = lease.New(b.store, ready, b.log, b.clock.Now)
	b.leases.Guard(denials.Held)
	b.leases.Guard(func(*store.Tx) error { return b.denials.Behind() })
	b.silence = &liveness.Watch{Store: b.store, Leases: b.leases, Brake: b.config.BrakeHostsPerMinute, Log: b.log, Now: b.clock.Now}
	b.logs = logcache.New(logcache.Most)
	b.space = &space.Gauge{Dir: b.config.StateDir, Log: b.log}
	b.space.Look()
	b.desk = &admin.Desk{Store: b.store, Leases: b.leases, Audit: b.audit, OperatorCA: b.operatorCA, Policy: b.scopes.In,
		Logs: b.logs, ParseSet: b.parse, Log: b.log, Now: faults.Now}
}

// retention deletes old leases by the sure time: a ticket could bring back a lease that was
// deleted too early.
func (b *broker) retention() *retention.Keeper {
	return &retention.Keeper{Store: b.store, Keep: b.config.Retention(), Policy: b.scopes.In, Log: b.log, Now: b.clock.Sure}
}

// ends lists what the broker depends on and when it expires.
func (b *broker) ends() ends {
	known := ends{store: b.store, hostCA: b.hostCA.Certificate, ekRoots: b.ekRoots.All}
	for _, service := range b.services {
		known.issuers = append(known.issuers, service)
	}
	return known
}

func (b *broker) alarms(ctx context.Context) []string {
	return slices.Concat(b.held(ctx), b.silence.Alarms(), b.leases.Alarms(ctx), b.space.Alarms(), b.budgetAlarms(ctx), b.ends().alarms(b.log, faults.Now()))
}

// held returns why nothing new is issued.
func (b *broker) held(ctx context.Context) (alarms []string) {
	if err := b.denials.Behind(); err != nil {
		alarms = append(alarms, err.Error())
	}
	err := b.store.View(ctx, func(tx *store.Tx) error {
		why, err := denials.Hold(tx)
		if err != nil {
			return err
		}
		epoch, err := audit.Unacknowledged(tx)
		switch {
		case why != "":
			alarms = append(alarms, fmt.Sprintf("%s: nothing new is issued, and operators from outside are refused, until `countersign broker acknowledge` on this machine", why))
		case epoch != 0:
			alarms = append(alarms, fmt.Sprintf("nobody stands for epoch %d of the audit log, and agents report it: `countersign broker acknowledge`", epoch))
		}
		return err
	})
	if err != nil {
		b.log.Error("whether the broker is held can't be read", "err", err)
	}
	return alarms
}

// exceeded lists the hosts that have used up what they may have written in this hour.
func (b *broker) exceeded(ctx context.Context) (list []budget.Excess, err error) {
	err = b.store.View(ctx, func(tx *store.Tx) error {
		list = budget.Of(tx).Exceeded(b.clock.Now())
		return nil
	})
	return list, err
}

// shownHosts is how many hosts are named one by one.
const shownHosts = 20

func (b *broker) budgetAlarms(ctx context.Context) (alarms []string) {
	list, err := b.exceeded(ctx)
	if err != nil {
		return []string{"which hosts are over their budget can't be read: " + err.Error()}
	}
	for _, e := range list[:min(len(list), shownHosts)] {
		alarms = append(alarms, fmt.Sprintf("host %s is over its budget, with %d records and %d KiB in an hour: until %s only what it holds is renewed; `countersign audit tail` shows what it does",
			e.Host, e.Records, e.Bytes>>10, e.Until.UTC().Format(time.RFC3339)))
	}
	if more := len(list) - shownHosts; more > 0 {
		alarms = append(alarms, fmt.Sprintf("%d more hosts are over their budget", more))
	}
	return alarms
}

func (b *broker) keepRepeats(ctx context.Context) error {
	return audit.KeepRepeats(ctx, b.store, b.clock.Now, b.log)
}

// server makes the server for hosts, operators and metrics.
func (b *broker) server() *server.Server {
	c := b.config
	handler, requests := metrics.New(b.metrics())
	vaultStatus := func() string { return "not configured" }
	if v, ok := b.services[vault.Kind.Name]; ok {
		vaultStatus = v.Status
	}
	return &server.Server{
		Door: &server.Door{HostCA: b.hostCA.Certificate, OperatorCA: b.operatorCA.Certificate,
			Certificate: listenerCertificate(b.hostCA, c.Names, faults.Now), Now: faults.Now},
		Hosts: &server.Hosts{
			Admission: &enroll.Desk{Store: b.store, Leases: b.leases, CA: b.hostCA, Roots: b.ekRoots.Roots, Intermediates: b.ekRoots.Intermediates,
				MostPending: c.PendingHosts, Now: b.clock.Now, Wall: faults.Now},
			Credentials: &hostapi.Desk{Store: b.store, Leases: b.leases, Policy: b.scopes.In, Basis: refvalues.New(), Logs: b.logs, CA: b.hostCA,
				Signer: b.audit.Signer(), Verify: b.audit.Verifier(), Log: b.log, Room: b.space.New, Now: b.clock.Now, Wall: faults.Now,
				Continuations: hostapi.Continuations{Key: b.fingerprints.For("continuations")}},
			Audit: b.audit, TrustDomain: c.TrustDomain, CA: b.hostCA.Certificate.Raw, Now: b.clock.Now,
		},
		Operators: &server.Operators{Desk: b.desk, BrokerID: b.id, Version: version, Alarms: b.alarms, Vault: vaultStatus},
		Metrics:   handler, Requests: requests, Log: b.log,
		Listen: c.Listen, Socket: c.Socket(), MetricsListen: c.MetricsListen,
	}
}

// metrics makes the source of /metrics, /readyz and /crl.
func (b *broker) metrics() metrics.Source {
	root := admin.Actor{Name: "root", Role: admin.Viewer}
	crl := func() []byte { return nil }
	for _, service := range b.services {
		if lists, ok := service.(interface{ CRL() []byte }); ok {
			crl = lists.CRL
		}
	}
	return metrics.Source{
		Counts: func(ctx context.Context) (metrics.Counts, error) {
			st, err := b.desk.Status(ctx, root)
			if err != nil {
				return metrics.Counts{}, err
			}
			overdue, _, err := b.leases.Overdue(ctx)
			if err != nil {
				return metrics.Counts{}, err
			}
			exceeded, err := b.exceeded(ctx)
			counts := metrics.Counts{Hosts: st.Hosts, Leases: st.Leases, Findings: st.Findings, Overdue: overdue, OverBudget: len(exceeded)}
			for _, e := range exceeded[:min(len(exceeded), shownHosts)] {
				counts.OverBudgetHosts = append(counts.OverBudgetHosts, e.Host)
			}
			return counts, err
		},
		Space: func() (level string, free, size uint64) {
			l, free, size := b.space.Now()
			return string(l), free, size
		},
		Alarms: b.alarms,
		Ends:   func(ctx context.Context) ([]expiry.End, error) { return b.ends().list(ctx, faults.Now()) },
		Ready: func(context.Context) error {
			select {
			case <-b.store.Stopped():
				return store.ErrStopped
			default:
				return nil
			}
		},
		CRL: crl,
	}
}

// untilStopped returns an error when the store stops, which ends the broker.
func (b *broker) untilStopped(ctx context.Context) error {
	select {
	case <-ctx.Done():
		return nil
	case <-b.store.Stopped():
		return b.store.Err()
	}
}

// keepScopes parses scopes as soon as they are applied, so that the log has an error at
// once if this broker can't read them, and not at the first request of a host.
func (b *broker) keepScopes(ctx context.Context) error {
	changed := b.store.Changes(store.Scopes)
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-changed:
		}
		if err := b.store.View(ctx, func(tx *store.Tx) error { _, err := b.scopes.In(tx); return err }); err != nil && ctx.Err() == nil {
			b.log.Error("the scopes that were applied can't be read", "err", err)
		}
	}
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
