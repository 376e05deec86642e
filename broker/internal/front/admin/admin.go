// Package admin is what operators and the watch do: admit and remove hosts,
// apply scopes, revoke leases, report and close findings, read the audit.
//
// It trusts the caller to have authenticated the operator and checks the role
// itself. Each act is written to the audit log in the transaction that does
// it; an act that can't be recorded is not done.
package admin

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/countersign/countersign/broker/api/event"
	"github.com/countersign/countersign/broker/internal/front/pki"
	"github.com/countersign/countersign/broker/internal/lease"
	"github.com/countersign/countersign/broker/internal/lease/journal"
	"github.com/countersign/countersign/broker/internal/policy"
	"github.com/countersign/countersign/broker/internal/state/audit"
	"github.com/countersign/countersign/broker/internal/state/store"
	"github.com/countersign/countersign/broker/internal/verify/logcache"
)

// A Role is what an operator may do; each may do what the ones before it may.
type Role int

const (
	Viewer    Role = iota + 1 // reads everything but secrets, which nobody reads
	Responder                 // reports findings, quarantines hosts and revokes leases: what watch needs
	Operator                  // admits, labels, releases and removes hosts, closes findings
	Admin                     // applies scopes and makes operators
)

var roleNames = map[Role]string{Viewer: "viewer", Responder: "responder", Operator: "operator", Admin: "admin"}

func (r Role) String() string { return roleNames[r] }

// ParseRole reads a role's name.
func ParseRole(s string) (Role, error) {
	for r, name := range roleNames {
		if name == s {
			return r, nil
		}
	}
	return 0, fmt.Errorf("role %q is none of viewer, responder, operator, admin", s)
}

// An Actor is an authenticated operator.
type Actor struct {
	Name    string
	Role    Role
	Request string // correlation id
}

// ErrForbidden says that the role doesn't reach.
var ErrForbidden = errors.New("forbidden")

// An InvalidError is a request that can't be done as it is, with the reason for
// the operator.
type InvalidError struct{ Reason string }

func (e *InvalidError) Error() string { return e.Reason }

func invalid(format string, args ...any) error { return &InvalidError{fmt.Sprintf(format, args...)} }

// A Desk serves operators.
type Desk struct {
	Store      *store.Store
	Leases     *lease.Manager
	Audit      *audit.Log
	OperatorCA *pki.CA
	Policy     func(*store.Tx) (*policy.Set, error) // the set in force
	Logs       *logcache.Cache
	ParseSet   func([]policy.File) (*policy.Set, error)
	Log        *slog.Logger
	Now        func() time.Time
}

func (a Actor) need(r Role) error {
	if a.Role < r {
		return fmt.Errorf("%w: this needs the role %s, and %s is %s", ErrForbidden, r, a.Name, a.Role)
	}
	return nil
}

// act runs change and writes its audit record in one transaction, if the actor has at least
// the role need. change may set the host, scope and lease of the record, and complete told.
// If told has no kind after that, act writes no record.
func (d *Desk) act(ctx context.Context, a Actor, need Role, rows store.Rows, told event.Event, change func(tx *store.Tx, r *event.Record) error) error {
	if err := a.need(need); err != nil {
		return err
	}
	now := d.Now()
	return d.Store.Update(ctx, rows, func(tx *store.Tx) error {
		r := event.Record{Time: now, Actor: "operator:" + a.Name, Request: a.Request}
		if err := change(tx, &r); err != nil || told.Kind() == "" {
			return err
		}
		_, err := audit.Append(tx, r, told)
		return err
	})
}

func plainName(s string) bool {
	if s == "" || len(s) > 64 {
		return false
	}
	for _, c := range []byte(s) {
		switch {
		case c >= 'a' && c <= 'z', c >= 'A' && c <= 'Z', c >= '0' && c <= '9', c == '.', c == '@', c == '_', c == '-':
		default:
			return false
		}
	}
	return true
}

// Status is the broker in numbers.
type Status struct {
	Hosts, Leases map[string]uint64 // by state
	Findings      map[string]uint64 // that are open, by severity
	Policy, Epoch int64
}

// Status counts hosts, unended leases and open findings: the store keeps their numbers.
func (d *Desk) Status(ctx context.Context, a Actor) (Status, error) {
	s := Status{Hosts: map[string]uint64{}, Leases: map[string]uint64{}, Findings: map[string]uint64{}}
	if err := a.need(Viewer); err != nil {
		return s, err
	}
	topics := map[string]map[string]uint64{"hosts": s.Hosts, "leases": s.Leases, "findings open": s.Findings}
	err := d.Store.View(ctx, func(tx *store.Tx) (err error) {
		if s.Epoch, err = audit.Epoch(tx); err != nil {
			return err
		}
		set, err := d.Policy(tx)
		if err != nil {
			return err
		}
		s.Policy = set.Version
		return tx.Each(func(row store.Row) error {
			var topic, name string
			var n uint64
			if err := row.Scan(&topic, &name, &n); err != nil {
				return err
			}
			if counts, ok := topics[topic]; ok {
				counts[name] = n
			}
			return nil
		}, `SELECT topic, name, n FROM counts WHERE n > 0`)
	})
	delete(s.Leases, string(journal.Gone))
	return s, err
}
