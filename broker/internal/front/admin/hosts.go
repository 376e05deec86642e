package admin

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/countersign/countersign/attestors/evidence"
	"github.com/countersign/countersign/broker/api/event"
	"github.com/countersign/countersign/broker/internal/lease"
	"github.com/countersign/countersign/broker/internal/lease/journal"
	"github.com/countersign/countersign/broker/internal/state/inventory"
	"github.com/countersign/countersign/broker/internal/state/store"
	"github.com/countersign/countersign/internal/secret"
)

// A Selector is label conditions, "k=v,k2!=v2,k3".
type Selector []func(map[string]string) bool

// ParseSelector reads kubectl's equality-based form.
func ParseSelector(s string) (Selector, error) {
	var sel Selector
	if s == "" {
		return nil, nil
	}
	for part := range strings.SplitSeq(s, ",") {
		key, value, hasValue := strings.Cut(strings.TrimSpace(part), "=")
		negated := strings.HasSuffix(key, "!")
		key = strings.TrimSuffix(key, "!")
		if !plainName(key) {
			return nil, invalid("selector %q is not of the form k=v,k2!=v2", s)
		}
		value = strings.TrimPrefix(value, "=")
		sel = append(sel, func(labels map[string]string) bool {
			have, ok := labels[key]
			if !hasValue {
				return ok
			}
			return (ok && have == value) != negated
		})
	}
	return sel, nil
}

// Matches says whether labels meet every condition.
func (s Selector) Matches(labels map[string]string) bool {
	for _, cond := range s {
		if !cond(labels) {
			return false
		}
	}
	return true
}

// Orders of lists of hosts.
const (
	SortName   = "name"
	SortProved = "proved" // by the last proof, the oldest first
)

// A HostFilter selects hosts; empty fields select all but tombstones.
type HostFilter struct {
	Selector string // of labels
	State    string
	Sort     string // SortName where empty
	After    inventory.Cursor
	Limit    int
}

// looked is how many hosts one page looks at, of which a selector may leave few.
const looked = 1000

// Hosts lists a page of hosts. More tells whether hosts behind the returned cursor may
// be selected, too; a page can be empty and have more behind it.
func (d *Desk) Hosts(ctx context.Context, a Actor, f HostFilter) (list []inventory.Host, next inventory.Cursor, more bool, err error) {
	if err := a.need(Viewer); err != nil {
		return nil, next, false, err
	}
	sel, err := ParseSelector(f.Selector)
	if err != nil {
		return nil, next, false, err
	}
	if f.State != "" && !slices.Contains(inventory.States, inventory.State(f.State)) {
		return nil, next, false, invalid("unknown host state %q; use one of %v", f.State, inventory.States)
	}
	read := inventory.ByName
	switch f.Sort {
	case "", SortName:
	case SortProved:
		read = inventory.ByProof
	default:
		return nil, next, false, invalid("hosts can't be sorted by %q; use %s or %s", f.Sort, SortName, SortProved)
	}
	var page []inventory.Host
	if err := d.Store.Report(ctx, func(tx *store.Tx) error {
		page, err = read(tx, f.After, looked)
		return err
	}); err != nil {
		return nil, next, false, err
	}
	next, more = f.After, len(page) == looked
	for _, h := range page {
		if len(list) == f.Limit {
			return list, next, true, nil
		}
		next = h.Cursor()
		if f.State == "" && h.State == inventory.Removed || f.State != "" && string(h.State) != f.State || h.Unreadable == nil && !sel.Matches(h.Labels) {
			continue
		}
		list = append(list, h)
	}
	return list, next, more, nil
}

// Host is one host, by id or name.
func (d *Desk) Host(ctx context.Context, a Actor, idOrName string) (h inventory.Host, err error) {
	if err := a.need(Viewer); err != nil {
		return h, err
	}
	err = d.Store.View(ctx, func(tx *store.Tx) error {
		h, err = inventory.Find(tx, idOrName)
		return err
	})
	return h, err
}

// A NewHost is a host to expect.
type NewHost struct {
	Name      string
	EKs       []string // lowercase hex SHA-256 of the EKs' PKIX DER
	Labels    map[string]string
	Reference string
}

// addPage is how many hosts are registered in one transaction, for which all requests
// wait.
const addPage = 50

// AddHosts registers hosts beforehand: all of them, or none and why not. They are written
// little by little; a broker that dies in the middle has those that the audit log names.
func (d *Desk) AddHosts(ctx context.Context, a Actor, hosts []NewHost, dryRun bool) (ids, problems []string, err error) {
	if err := a.need(Operator); err != nil {
		return nil, nil, err
	}
	now := d.Now()
	seen := map[evidence.Digest]int{}
	list := make([]inventory.Host, len(hosts))
	for i, n := range hosts {
		bad := func(format string, args ...any) {
			problems = append(problems, fmt.Sprintf("host %d (%s): ", i+1, n.Name)+fmt.Sprintf(format, args...))
		}
		h := inventory.Host{ID: inventory.NewID(), Name: n.Name, State: inventory.Registered, Admitted: true, Labels: n.Labels, Reference: n.Reference, Created: now}
		if !plainName(n.Name) {
			bad("the name is not 1 to 64 letters, digits, and . @ _ -")
		}
		if err := checkLabels(n.Labels); err != nil {
			bad("%v", err)
		}
		if len(n.EKs) == 0 {
			bad("no EK hash")
		}
		for _, text := range n.EKs {
			ek, err := evidence.ParseDigest(text)
			if err != nil {
				bad("EK hash: %v", err)
				continue
			}
			if first, ok := seen[ek]; ok {
				bad("EK %s is host %d's already", ek, first+1)
			}
			seen[ek] = i
			h.EKs = append(h.EKs, ek)
		}
		list[i] = h
		ids = append(ids, h.ID)
	}
	taken := func(tx *store.Tx) error {
		for i, h := range list {
			for _, ek := range h.EKs {
				if owner, err := inventory.ByEK(tx, ek); err == nil {
					problems = append(problems, fmt.Sprintf("host %d (%s): EK %s belongs to host %s (%s)", i+1, h.Name, ek, owner.ID, owner.Name))
				} else if !errors.Is(err, inventory.ErrUnknown) {
					return err
				}
			}
		}
		return nil
	}
	if len(problems) == 0 {
		err = d.Store.View(ctx, taken)
	}
	if err != nil || len(problems) > 0 || dryRun {
		return nil, problems, err
	}
	for first := 0; first < len(list); first += addPage {
		some := list[first:min(first+addPage, len(list))]
		if err := d.act(ctx, a, Operator, store.Any(store.Hosts), added(some), func(tx *store.Tx, _ *event.Record) error {
			for _, h := range some {
				if err := inventory.Save(tx, h); err != nil {
					return err
				}
			}
			return nil
		}); err != nil {
			return ids[:first], nil, fmt.Errorf("the first %d of %d hosts were added: %w", first, len(list), err)
		}
	}
	return ids, nil, nil
}

// added returns the audit event for registered hosts.
func added(hosts []inventory.Host) event.Added {
	told := event.Added{Count: len(hosts)}
	for _, h := range hosts {
		told.Hosts = append(told.Hosts, event.AddedHost{ID: h.ID, Name: h.Name, EKs: h.EKs, Labels: h.Labels, Reference: h.Reference})
	}
	return told
}

func checkLabels(labels map[string]string) error {
	if len(labels) > 64 {
		return invalid("%d labels; at most 64", len(labels))
	}
	for k, v := range labels {
		if !plainName(k) || v != "" && !plainName(v) {
			return invalid("label %q=%q: up to 64 letters, digits, and . @ _ -", k, v)
		}
	}
	return nil
}

// A Change is one act on a host.
type Change struct {
	Action     string // approve, label, quarantine, release, reenrol, remove, reference, step-up
	SetLabels  map[string]string
	DropLabels []string
	Reference  string
	Reason     string
}

// acts lists the actions, with the role that each needs, its kind of audit record, and for
// those that change a host's status the event and what it says beside the operator's reason.
var acts = map[string]struct {
	need   Role
	kind   event.Kind
	on     inventory.Event
	reason string
}{
	"approve":    {need: Operator, kind: event.HostApproved, on: inventory.OnApprove},
	"label":      {need: Operator, kind: event.HostLabelled},
	"quarantine": {need: Responder, kind: event.HostQuarantined, on: inventory.OnQuarantine},
	"release":    {need: Operator, kind: event.HostReleased, on: inventory.OnRelease, reason: "released; not proven since"},
	"reenrol":    {need: Operator, kind: event.HostReenrol, on: inventory.OnReenrol, reason: "waits to join anew"},
	"remove":     {need: Operator, kind: event.HostRemoved, on: inventory.OnRemove},
	"reference":  {need: Operator, kind: event.HostReference},
	"step-up":    {need: Responder, kind: event.HostStepUp},
}

// ChangeHost does c to a host. Quarantine and removal revoke its leases
// without its help; the number of them is returned.
func (d *Desk) ChangeHost(ctx context.Context, a Actor, host string, c Change) (inventory.Host, int, error) {
	act, ok := acts[c.Action]
	if !ok {
		return inventory.Host{}, 0, invalid("no such action on a host: %q", c.Action)
	}
	if len(c.Reason) > maxReason {
		return inventory.Host{}, 0, invalid("the reason has %d bytes; at most %d are kept", len(c.Reason), maxReason)
	}
	var h inventory.Host
	err := d.act(ctx, a, act.need, store.Any(store.Hosts), event.Change{As: act.kind, Action: c.Action, SetLabels: c.SetLabels, DropLabels: c.DropLabels, Reference: c.Reference, Reason: c.Reason}, func(tx *store.Tx, r *event.Record) (err error) {
		if h, err = inventory.Find(tx, host); err != nil {
			return err
		}
		r.Host = h.ID
		if h, err = changed(tx, h, c, d.Now()); err != nil {
			return err
		}
		return inventory.Save(tx, h)
	})
	if err != nil || c.Action != "quarantine" && c.Action != "remove" {
		return h, 0, err
	}
	ended, err := d.Leases.RevokeAll(ctx, journal.Filter{Host: h.ID}, string(h.State)+" by "+a.Name, lease.Cause{Actor: "operator:" + a.Name, Request: a.Request}, true)
	return h, len(ended), err
}

func changed(tx *store.Tx, h inventory.Host, c Change, now time.Time) (inventory.Host, error) {
	if h.State == inventory.Removed && c.Action != "reenrol" {
		return h, invalid("host %s: %v", h.ID, inventory.ErrRemoved)
	}
	switch c.Action {
	case "label":
		h = withLabels(h, c)
		return h, checkLabels(h.Labels)
	case "reference":
		if c.Reference == "" {
			h.Reference = ""
			return h, nil
		}
		return withReference(tx, h, c.Reference, now)
	case "step-up":
		// Its next request then has to show its logs from their first entry.
		h.StepUps++
		return h, nil
	}

	act := acts[c.Action]
	reason := cmp.Or(act.reason, c.Reason)
	if act.reason != "" && c.Reason != "" {
		reason += ": " + c.Reason
	}
	h, err := h.After(act.on, reason)
	if err != nil {
		return h, invalid("host %s: %v", h.ID, err)
	}
	if c.Action == "approve" {
		return withReference(tx, withLabels(h, c), c.Reference, now)
	}
	return h, nil
}

func withLabels(h inventory.Host, c Change) inventory.Host {
	labels := map[string]string{}
	maps.Copy(labels, h.Labels)
	maps.Copy(labels, c.SetLabels)
	for _, k := range c.DropLabels {
		delete(labels, k)
	}
	h.Labels = labels
	return h
}

func withReference(tx *store.Tx, h inventory.Host, name string, now time.Time) (inventory.Host, error) {
	if name == "" {
		return h, nil
	}
	if err := inForce(tx, name, now); err != nil {
		return h, err
	}
	h.Reference = name
	return h, nil
}

// CreateToken makes a one-use join token.
func (d *Desk) CreateToken(ctx context.Context, a Actor, t inventory.JoinToken) (token secret.Bytes, err error) {
	if now := d.Now(); !t.Expires.After(now) || t.Expires.Sub(now) > 30*24*time.Hour {
		return token, invalid("a join token ends within 30 days from now")
	}
	if err := checkLabels(t.Labels); err != nil {
		return token, err
	}
	if t.Name != "" && !plainName(t.Name) {
		return token, invalid("host name %q: 1 to 64 letters, digits, and . @ _ -", t.Name)
	}
	told := &event.Token{Name: t.Name, Labels: t.Labels, Reference: t.Reference, Expires: t.Expires}
	err = d.act(ctx, a, Operator, store.Any(store.Tokens), told,
		func(tx *store.Tx, _ *event.Record) (err error) {
			if t.Reference != "" {
				if err := inForce(tx, t.Reference, d.Now()); err != nil {
					return err
				}
			}
			token, err = inventory.CreateToken(tx, t)
			told.Hash = inventory.TokenHash(string(token.Reveal()))
			return err
		})
	return token, err
}
