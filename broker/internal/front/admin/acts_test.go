package admin

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/countersign/countersign/attestors/evidence"
	"github.com/countersign/countersign/broker/api/event"
	"github.com/countersign/countersign/broker/internal/front/pki"
	"github.com/countersign/countersign/broker/internal/issue/issuers"
	"github.com/countersign/countersign/broker/internal/issue/vault"
	"github.com/countersign/countersign/broker/internal/lease"
	"github.com/countersign/countersign/broker/internal/lease/journal"
	"github.com/countersign/countersign/broker/internal/policy"
	"github.com/countersign/countersign/broker/internal/state/audit"
	"github.com/countersign/countersign/broker/internal/state/canary"
	"github.com/countersign/countersign/broker/internal/state/findings"
	"github.com/countersign/countersign/broker/internal/state/inventory"
	"github.com/countersign/countersign/broker/internal/state/store"
	"github.com/countersign/countersign/broker/internal/state/store/storetest"
	"github.com/countersign/countersign/test/check"
)

var noon = time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)

const billing = `scope "billing-db" {
  reprove = "10s"
  process { user = "u" }
  vault {
    path = "database/creds/billing"
    ttl  = "1m"
  }
}
`

// A bench is a desk before a store that has one of each: a trusted host with a lease, a
// host that waits, a quarantined one, a removed one, a finding, a canary, an operator, a
// scope, and a reference set of an approved version and a draft.
type bench struct {
	*Desk
	t       *testing.T
	finding string
	csr     []byte // of a key that no operator has
}

var roles = []Role{Viewer, Responder, Operator, Admin}

func as(r Role) Actor { return Actor{Name: "someone", Role: r, Request: "request-1"} }

func newBench(t *testing.T, ca *pki.CA) *bench {
	t.Helper()
	s := check.Must(storetest.Open(filepath.Join(t.TempDir(), "store.db")))(t)
	t.Cleanup(func() { _ = s.Close() })
	now := func() time.Time { return noon }
	log := slog.New(slog.DiscardHandler)
	parse := func(files []policy.File) (*policy.Set, error) { return issuers.Parse(files) }
	b := &bench{t: t, Desk: &Desk{Store: s, Leases: lease.New(s, nil, log, now), OperatorCA: ca, Policy: InForce(parse).In, ParseSet: parse, Log: log, Now: now}}
	check.Nil(t, s.Update(t.Context(), store.Everything(), func(tx *store.Tx) error {
		for _, h := range []inventory.Host{
			{ID: "trusted", Name: "web-1", State: inventory.Trusted, Admitted: true, Labels: map[string]string{"env": "prod"}, SilentAt: noon.Add(time.Hour)},
			{ID: "waits", Name: "web-2", State: inventory.Pending, AKPublic: []byte("ak")},
			{ID: "bad", Name: "web-3", State: inventory.Quarantined, Admitted: true},
			{ID: "gone", Name: "web-4", State: inventory.Removed, EKs: []evidence.Digest{evidence.Sum([]byte("gone"))}},
		} {
			check.Nil(t, inventory.Save(tx, h))
		}
		check.Nil(t, journal.Save(tx, journal.Lease{ID: "lease", Host: "trusted", Scope: "billing-db", Kind: vault.Kind.Name, State: journal.Live, Issued: noon, Due: noon.Add(time.Hour),
			Names: map[string]string{"db_username": "v-token-billing-abcdefghijklmnopqrst-1772366400"}}))
		f, _, err := findings.Report(tx, sighted("old"), noon)
		check.Nil(t, err)
		b.finding = f.ID
		check.Nil(t, canary.Add(tx, canary.Canary{ID: "canary", Scope: "billing-db", Username: "decoy", Issued: noon, By: "root"}))
		for range 2 {
			check.Must(inventory.AddReference(tx, inventory.Reference{Name: "web", Content: []byte(`{}`), Created: noon}))(t)
		}
		check.Must(inventory.ApproveReference(tx, "web", 1, noon.Add(-time.Hour), noon))(t)
		check.Must(inventory.AddReference(tx, inventory.Reference{Name: "draft", Content: []byte(`{}`), Created: noon}))(t)
		_, err = tx.Exec(`INSERT INTO operators (key_hash, name, role, created, expires) VALUES ('k', 'alice', 'viewer', ?, ?)`, store.Millis(noon), store.Millis(noon.Add(time.Hour)))
		return err
	}))
	check.Must(b.Apply(t.Context(), Actor{Name: "root", Role: Admin}, []policy.File{{Name: "a.hcl", Content: []byte(billing)}}, false))(t)
	key := check.Must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))(t)
	b.csr = check.Must(x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key))(t)
	return b
}

func sighted(cause string) findings.Finding {
	return findings.Finding{Detector: "foreign-source", Cause: cause, Severity: "high", First: noon, Last: noon, Count: 1, Lease: "lease", Host: "trusted", Scope: "billing-db"}
}

// records are the audit log's, from one on.
func (b *bench) records(from int) (list []event.Record) {
	b.t.Helper()
	check.Nil(b.t, b.Store.View(b.t.Context(), func(tx *store.Tx) error {
		return audit.Read(tx, int64(from), 1000, func(_ int64, body []byte) error {
			r, err := event.Parse(body)
			list = append(list, r)
			return err
		})
	}))
	return list
}

// commits are how often each topic was changed.
func (b *bench) commits() string {
	b.t.Helper()
	var all []int64
	check.Nil(b.t, b.Store.View(b.t.Context(), func(tx *store.Tx) error {
		for _, topic := range []store.Topic{store.Hosts, store.Leases, store.Findings, store.Canaries, store.Tokens, store.Scopes, store.References, store.Operators, store.Broker} {
			all = append(all, check.Must(store.Generation(tx, topic))(b.t))
		}
		return nil
	}))
	return fmt.Sprint(all)
}

// An act is one that an operator asks for.
type act struct {
	need  Role
	do    func(b *bench, a Actor) error
	wrote string // its record: kind, host, scope and lease; empty: nothing
	then  string // the record that follows it
}

func change(host string, c Change) func(*bench, Actor) error {
	return func(b *bench, a Actor) error { _, _, err := b.ChangeHost(b.t.Context(), a, host, c); return err }
}

func addHosts(dry bool, hosts ...NewHost) func(*bench, Actor) error {
	return func(b *bench, a Actor) error {
		_, problems, err := b.AddHosts(b.t.Context(), a, hosts, dry)
		if len(problems) > 0 {
			err = invalid("%s", strings.Join(problems, "\n"))
		}
		return err
	}
}

func newToken(t inventory.JoinToken) func(*bench, Actor) error {
	return func(b *bench, a Actor) error { _, err := b.CreateToken(b.t.Context(), a, t); return err }
}

func report(f findings.Finding, over string) func(*bench, Actor) error {
	return func(b *bench, a Actor) error { _, _, err := b.Report(b.t.Context(), a, f, over); return err }
}

func closeFinding(id, reason string, until time.Time) func(*bench, Actor) error {
	return func(b *bench, a Actor) error {
		if id == "" {
			id = b.finding
		}
		_, err := b.CloseFinding(b.t.Context(), a, id, reason, until)
		return err
	}
}

func issueCanary(scope, name string) func(*bench, Actor) error {
	return func(b *bench, a Actor) error { _, err := b.IssueCanary(b.t.Context(), a, scope, name); return err }
}

func addOperator(name string, csr []byte, until time.Time) func(*bench, Actor) error {
	return func(b *bench, a Actor) error {
		if csr == nil {
			csr = b.csr
		}
		_, err := b.AddOperator(b.t.Context(), a, name, Viewer, csr, until)
		return err
	}
}

func apply(text string, plan bool) func(*bench, Actor) error {
	return func(b *bench, a Actor) error {
		_, err := b.Apply(b.t.Context(), a, []policy.File{{Name: "a.hcl", Content: []byte(text)}}, plan)
		return err
	}
}

func revoke(ids []string, host, scope string) func(*bench, Actor) error {
	return func(b *bench, a Actor) error { _, err := b.Revoke(b.t.Context(), a, ids, host, scope, ""); return err }
}

func addReference(name, content string) func(*bench, Actor) error {
	return func(b *bench, a Actor) error {
		_, err := b.AddReference(b.t.Context(), a, name, []byte(content))
		return err
	}
}

func approveReference(name string, version int64) func(*bench, Actor) error {
	return func(b *bench, a Actor) error {
		_, err := b.ApproveReference(b.t.Context(), a, name, version, noon)
		return err
	}
}

func maintain(name string, until time.Time) func(*bench, Actor) error {
	return func(b *bench, a Actor) error { return b.Maintain(b.t.Context(), a, name, until) }
}

func addRelease(name string, files ...inventory.ReleaseFile) func(*bench, Actor) error {
	return func(b *bench, a Actor) error {
		_, err := b.AddRelease(b.t.Context(), a, inventory.Release{Name: name, Files: files, Source: "ci"}, noon)
		return err
	}
}

var (
	ek   = evidence.Sum([]byte("new")).String()
	file = inventory.ReleaseFile{Path: "/opt/app", Digest: "sha256:" + ek}
)

// Each act is done for the role that it takes and those above, and leaves exactly its record
// with who asked for it. For a role below it is forbidden, and nothing is written.
func TestActsTakeTheirRole(t *testing.T) {
	ca := check.Must(pki.Create(t.TempDir(), pki.OperatorCA, "operators", []byte("test password"), noon))(t)
	for name, c := range map[string]act{
		"approve":           {Operator, change("waits", Change{Action: "approve"}), "host.approved waits", ""},
		"label":             {Operator, change("trusted", Change{Action: "label", SetLabels: map[string]string{"a": "b"}}), "host.labelled trusted", ""},
		"quarantine":        {Responder, change("web-1", Change{Action: "quarantine", Reason: "odd"}), "host.quarantined trusted", "credential.revoking trusted billing-db lease"},
		"release":           {Operator, change("bad", Change{Action: "release"}), "host.released bad", ""},
		"reenrol":           {Operator, change("trusted", Change{Action: "reenrol"}), "host.reenrol trusted", ""},
		"remove":            {Operator, change("trusted", Change{Action: "remove"}), "host.removed trusted", "credential.revoking trusted billing-db lease"},
		"reference":         {Operator, change("trusted", Change{Action: "reference", Reference: "web"}), "host.reference trusted", ""},
		"step-up":           {Responder, change("trusted", Change{Action: "step-up"}), "host.step-up trusted", ""},
		"add hosts":         {Operator, addHosts(false, NewHost{Name: "new", EKs: []string{ek}}), "host.added", ""},
		"add hosts, dry":    {Operator, addHosts(true, NewHost{Name: "new", EKs: []string{ek}}), "", ""},
		"create a token":    {Operator, newToken(inventory.JoinToken{Expires: noon.Add(time.Hour)}), "token.created", ""},
		"report":            {Responder, report(sighted("new"), ""), "finding.opened trusted billing-db lease", ""},
		"report again":      {Responder, report(sighted("old"), ""), "", ""},
		"close a finding":   {Operator, closeFinding("", "looked into", time.Time{}), "finding.closed trusted billing-db lease", ""},
		"issue a canary":    {Operator, issueCanary("billing-db", ""), "canary.issued billing-db", ""},
		"remove a canary":   {Operator, func(b *bench, a Actor) error { return b.RemoveCanary(t.Context(), a, "canary") }, "canary.removed billing-db", ""},
		"add an operator":   {Admin, addOperator("bob", nil, time.Time{}), "operator.added", ""},
		"remove one":        {Admin, func(b *bench, a Actor) error { return b.RemoveOperator(t.Context(), a, "alice") }, "operator.removed", ""},
		"apply":             {Admin, apply(billing, false), "policy.applied", ""},
		"plan":              {Viewer, apply(billing, true), "", ""},
		"revoke by id":      {Responder, revoke([]string{"lease"}, "", ""), "lease.revoke", "credential.revoking trusted billing-db lease"},
		"revoke by host":    {Responder, revoke(nil, "web-1", ""), "lease.revoke trusted", "credential.revoking trusted billing-db lease"},
		"revoke by scope":   {Responder, revoke(nil, "", "billing-db"), "lease.revoke", "credential.revoking trusted billing-db lease"},
		"add a reference":   {Operator, addReference("db", `{"ima":{"violations":"ignore","allow":[]}}`), "reference.added", ""},
		"approve a version": {Operator, approveReference("web", 0), "reference.approved", ""},
		"maintain":          {Operator, maintain("web", noon.Add(time.Hour)), "reference.maintenance", ""},
		"add a release":     {Operator, addRelease("app", file), "release.added", ""},

		"status": {Viewer, func(b *bench, a Actor) error { _, err := b.Status(t.Context(), a); return err }, "", ""},
		"hosts": {Viewer, func(b *bench, a Actor) error {
			_, _, _, err := b.Hosts(t.Context(), a, HostFilter{Limit: 9})
			return err
		}, "", ""},
		"host": {Viewer, func(b *bench, a Actor) error { _, err := b.Host(t.Context(), a, "trusted"); return err }, "", ""},
		"findings": {Viewer, func(b *bench, a Actor) error {
			_, err := b.Findings(t.Context(), a, findings.Filter{Limit: 9})
			return err
		}, "", ""},
		"finding": {Viewer, func(b *bench, a Actor) error { _, err := b.Finding(t.Context(), a, b.finding); return err }, "", ""},
		"leases": {Viewer, func(b *bench, a Actor) error {
			_, _, err := b.List(t.Context(), a, journal.Filter{Limit: 9})
			return err
		}, "", ""},
		"lease":     {Viewer, func(b *bench, a Actor) error { _, err := b.Lease(t.Context(), a, "lease"); return err }, "", ""},
		"operators": {Viewer, func(b *bench, a Actor) error { _, err := b.Operators(t.Context(), a); return err }, "", ""},
		"releases":  {Viewer, func(b *bench, a Actor) error { _, err := b.Releases(t.Context(), a, ""); return err }, "", ""},
		"references": {Viewer, func(b *bench, a Actor) error {
			_, _, err := b.References(t.Context(), a, inventory.ReferenceFilter{Limit: 9})
			return err
		}, "", ""},
		"canaries": {Responder, func(b *bench, a Actor) error { _, err := b.Canaries(t.Context(), a, ""); return err }, "", ""},
	} {
		t.Run(name, func(t *testing.T) {
			b := newBench(t, ca)
			before, had := b.commits(), len(b.records(0))
			for _, r := range append([]Role{0}, roles...) {
				if r < c.need {
					if err := c.do(b, as(r)); !errors.Is(err, ErrForbidden) {
						t.Errorf("as %s: %v", r, err)
					}
				}
			}
			if after := b.commits(); after != before || len(b.records(had)) > 0 {
				t.Errorf("what was forbidden was written: %s, was %s; %+v", after, before, b.records(had))
			}
			check.Nil(t, c.do(b, as(c.need)))
			var wrote []string
			for _, r := range b.records(had) {
				wrote = append(wrote, strings.Join(strings.Fields(fmt.Sprint(r.Kind, " ", r.Host, " ", r.Scope, " ", r.Lease)), " "))
				if r.Actor != "operator:someone" || r.Request != "request-1" || !r.Time.Equal(noon) {
					t.Errorf("%s of %s, request %q, at %s", r.Kind, r.Actor, r.Request, r.Time)
				}
			}
			want := slices.DeleteFunc([]string{c.wrote, c.then}, func(s string) bool { return s == "" })
			if !slices.Equal(wrote, want) {
				t.Errorf("recorded %q, want %q", wrote, want)
			}
		})
	}
	for _, c := range []act{{need: Responder, do: change("trusted", Change{Action: "quarantine"})}, {need: Viewer, do: apply(billing, true)}} {
		for _, r := range roles {
			if r >= c.need {
				check.Nil(t, c.do(newBench(t, ca), as(r)))
			}
		}
	}
}

// What can't be done as it is asked for is said, and nothing of it is written.
func TestWhatIsInvalidIsSaid(t *testing.T) {
	ca := check.Must(pki.Create(t.TempDir(), pki.OperatorCA, "operators", []byte("test password"), noon))(t)
	b := newBench(t, ca)
	before, had := b.commits(), len(b.records(0))
	host := func(name string, eks ...string) NewHost { return NewHost{Name: name, EKs: eks} }
	many := map[string]string{}
	for i := range 65 {
		many[fmt.Sprint("l", i)] = ""
	}
	for name, c := range map[string]struct {
		do   func(*bench, Actor) error
		says string
	}{
		"no such action":            {change("trusted", Change{Action: "promote"}), `no such action on a host: "promote"`},
		"approved already":          {change("trusted", Change{Action: "approve"}), "is admitted already"},
		"release of a trusted host": {change("trusted", Change{Action: "release"}), "is trusted, not quarantined"},
		"a removed host":            {change("gone", Change{Action: "label", SetLabels: map[string]string{"a": "b"}}), "only reenrol brings it back"},
		"quarantine of one":         {change("gone", Change{Action: "quarantine"}), "was removed"},
		"a label":                   {change("trusted", Change{Action: "label", SetLabels: map[string]string{"a b": ""}}), `label "a b"=""`},
		"too many labels":           {change("trusted", Change{Action: "label", SetLabels: many}), "66 labels; at most 64"},
		"a set without a version":   {change("trusted", Change{Action: "reference", Reference: "draft"}), "no version of reference set draft is in force"},
		"approval with it":          {change("waits", Change{Action: "approve", Reference: "draft"}), "no version of reference set draft is in force"},

		"no EK":           {addHosts(false, host("a")), "host 1 (a): no EK hash"},
		"an EK":           {addHosts(false, host("a", "xyz")), "host 1 (a): EK hash:"},
		"a host's name":   {addHosts(false, host("a b", ek)), "host 1 (a b): the name is not"},
		"an EK twice":     {addHosts(false, host("a", ek), host("b", ek)), "host 2 (b): EK " + ek + " is host 1's already"},
		"an EK of a host": {addHosts(true, host("a", evidence.Sum([]byte("gone")).String())), "belongs to host gone (web-4)"},

		"a token that ended":        {newToken(inventory.JoinToken{Expires: noon}), "ends within 30 days"},
		"a token for long":          {newToken(inventory.JoinToken{Expires: noon.Add(30*24*time.Hour + 1)}), "ends within 30 days"},
		"a token's name":            {newToken(inventory.JoinToken{Name: "a/b", Expires: noon.Add(1)}), `host name "a/b"`},
		"a token's label":           {newToken(inventory.JoinToken{Labels: map[string]string{"": ""}, Expires: noon.Add(1)}), `label ""`},
		"a token's set":             {newToken(inventory.JoinToken{Reference: "draft", Expires: noon.Add(1)}), "no version of reference set draft"},
		"a finding without cause":   {report(sighted(""), ""), "a finding without its cause"},
		"a reason that is too long": {report(sighted("new"), strings.Repeat("x", maxReason+1)), "at most 512 are kept"},
		"no reason":                 {closeFinding("", "", time.Time{}), "say why"},
		"a long reason":             {closeFinding("", strings.Repeat("x", maxReason+1), time.Time{}), "at most 512 are kept"},
		"closed until now":          {closeFinding("", "x", noon), "has to be in the future"},
		"closed for good":           {closeFinding("", "x", noon.Add(maxClosed+1)), "within 10 years"},
		"a canary of no scope":      {issueCanary("other", "x"), `no scope "other" is in force`},
		"a canary of a credential":  {issueCanary("billing-db", "v-token-billing-abcdefghijklmnopqrst-1772366400"), "of a credential that was issued"},
		"a canary twice":            {issueCanary("billing-db", "decoy"), "has this user name already"},
		"a canary's name":           {issueCanary("billing-db", "a\nb"), "printable"},

		"an operator's name":   {addOperator("a b", nil, time.Time{}), `operator name "a b"`},
		"an operator twice":    {addOperator("alice", nil, time.Time{}), "operator alice exists"},
		"an operator for long": {addOperator("bob", nil, noon.Add(longestOperator+1)), "within a year"},
		"an operator that was": {addOperator("bob", nil, noon), "within a year"},
		"no request":           {addOperator("bob", []byte("x"), time.Time{}), "certificate request"},
		"no such operator":     {func(b *bench, a Actor) error { return b.RemoveOperator(t.Context(), a, "bob") }, "no operator is called bob"},
		"a scope":              {apply(`scope "x" {}`, false), "a.hcl:1"},
		"nothing to revoke":    {revoke(nil, "", ""), "say which leases"},
		"a reference's name":   {addReference("a b", `{}`), `reference name "a b"`},
		"a reference":          {addReference("a", `{"x":1}`), "x"},
		"maintenance for long": {maintain("web", noon.Add(longestMaintenance+1)), "a week at most"},
		"a release's name":     {addRelease("a b", file), `release name "a b"`},
		"a release of nothing": {addRelease("app"), "a release of 0 files"},
		"a release's path":     {addRelease("app", inventory.ReleaseFile{Path: "opt", Digest: file.Digest}), `"opt" is no absolute path`},
		"a release's digest":   {addRelease("app", inventory.ReleaseFile{Path: "/opt", Digest: "md5:1"}), "release app: "},
		"no such state": {func(b *bench, a Actor) error {
			_, _, _, err := b.Hosts(t.Context(), a, HostFilter{State: "happy"})
			return err
		}, `unknown host state "happy"`},
		"no such order": {func(b *bench, a Actor) error {
			_, _, _, err := b.Hosts(t.Context(), a, HostFilter{Sort: "age"})
			return err
		}, `can't be sorted by "age"`},
		"a selector": {func(b *bench, a Actor) error {
			_, _, _, err := b.Hosts(t.Context(), a, HostFilter{Selector: "=x"})
			return err
		}, `selector "=x"`},
		"no state of findings": {func(b *bench, a Actor) error {
			_, err := b.Findings(t.Context(), a, findings.Filter{Status: "new"})
			return err
		}, "open or closed"},
		"no state of leases": {func(b *bench, a Actor) error {
			_, _, err := b.List(t.Context(), a, journal.Filter{States: []journal.State{"new"}})
			return err
		}, `no state "new"`},
		"facts that aren't yet": {func(b *bench, a Actor) error { _, err := b.Facts(t.Context(), a, "trusted", ""); return err }, "has not proven itself yet"},
		"why nothing was asked": {func(b *bench, a Actor) error { _, err := b.Why(t.Context(), a, "trusted", "billing-db"); return err }, "never asked for scope billing-db"},
	} {
		t.Run(name, func(t *testing.T) {
			var bad *InvalidError
			if err := c.do(b, as(Admin)); !errors.As(err, &bad) || !strings.Contains(err.Error(), c.says) {
				t.Errorf("%v, want %q", err, c.says)
			}
			if after := b.commits(); after != before || len(b.records(had)) > 0 {
				t.Errorf("it was written: %s, was %s", after, before)
			}
		})
	}
	for name, c := range map[string]struct {
		do   func(*bench, Actor) error
		want error
	}{
		"host":      {change("nobody", Change{Action: "label"}), inventory.ErrUnknown},
		"lease":     {revoke([]string{"lease", "none"}, "", ""), journal.ErrUnknown},
		"finding":   {closeFinding("none", "x", time.Time{}), findings.ErrUnknown},
		"canary":    {func(b *bench, a Actor) error { return b.RemoveCanary(t.Context(), a, "none") }, canary.ErrUnknown},
		"reference": {maintain("none", noon), inventory.ErrNoReference},
		"version":   {approveReference("web", 9), inventory.ErrNoReference},
	} {
		if err := c.do(b, as(Admin)); !errors.Is(err, c.want) {
			t.Errorf("no such %s: %v", name, err)
		}
		if after := b.commits(); after != before || len(b.records(had)) > 0 {
			t.Errorf("no such %s: it was written: %s, was %s", name, after, before)
		}
	}
}

// What an act makes of a host, state by state.
func TestHostsAfterActs(t *testing.T) {
	for name, c := range map[string]struct {
		host string
		do   Change
		want inventory.Host // of what is compared: the fields that acts change
	}{
		"approve":            {"waits", Change{Action: "approve", SetLabels: map[string]string{"a": "b"}, Reference: "web"}, inventory.Host{State: inventory.Registered, Admitted: true, Labels: map[string]string{"a": "b"}, Reference: "web"}},
		"label":              {"trusted", Change{Action: "label", SetLabels: map[string]string{"a": "b"}, DropLabels: []string{"env"}}, inventory.Host{State: inventory.Trusted, Admitted: true, Labels: map[string]string{"a": "b"}, SilentAt: noon.Add(time.Hour)}},
		"quarantine":         {"trusted", Change{Action: "quarantine", Reason: "odd"}, inventory.Host{State: inventory.Quarantined, Reason: "odd", Admitted: true, Labels: map[string]string{"env": "prod"}}},
		"release":            {"bad", Change{Action: "release"}, inventory.Host{State: inventory.Registered, Reason: "released; not proven since", Admitted: true}},
		"release, why":       {"bad", Change{Action: "release", Reason: "found again"}, inventory.Host{State: inventory.Registered, Reason: "released; not proven since: found again", Admitted: true}},
		"remove, bad":        {"bad", Change{Action: "remove"}, inventory.Host{State: inventory.Removed}},
		"reenrol, trusted":   {"trusted", Change{Action: "reenrol"}, inventory.Host{State: inventory.Trusted, Reason: "waits to join anew", Admitted: true, Reenrolling: true, Labels: map[string]string{"env": "prod"}, SilentAt: noon.Add(time.Hour)}},
		"reenrol, bad":       {"bad", Change{Action: "reenrol"}, inventory.Host{State: inventory.Registered, Reason: "waits to join anew", Admitted: true, Reenrolling: true}},
		"reenrol, removed":   {"gone", Change{Action: "reenrol"}, inventory.Host{State: inventory.Registered, Reason: "waits to join anew", Admitted: true, Reenrolling: true}},
		"remove":             {"trusted", Change{Action: "remove", Reason: "sold"}, inventory.Host{State: inventory.Removed, Reason: "sold", Labels: map[string]string{"env": "prod"}}},
		"step-up":            {"trusted", Change{Action: "step-up"}, inventory.Host{State: inventory.Trusted, Admitted: true, StepUps: 1, Labels: map[string]string{"env": "prod"}, SilentAt: noon.Add(time.Hour)}},
		"reference":          {"bad", Change{Action: "reference", Reference: "web"}, inventory.Host{State: inventory.Quarantined, Admitted: true, Reference: "web"}},
		"reference, to none": {"bad", Change{Action: "reference"}, inventory.Host{State: inventory.Quarantined, Admitted: true}},
	} {
		t.Run(name, func(t *testing.T) {
			b := newBench(t, nil)
			_, _, err := b.ChangeHost(t.Context(), as(Operator), c.host, c.do)
			check.Nil(t, err)
			h := check.Must(b.Host(t.Context(), as(Viewer), c.host))(t)
			brief := func(h inventory.Host) string {
				at := ""
				if h.SilentAt.After(time.Unix(0, 0)) {
					at = h.SilentAt.UTC().String()
				}
				return fmt.Sprint(h.State, "; ", h.Reason, "; ", h.Admitted, h.Reenrolling, h.StepUps, len(h.Labels), h.Labels, h.Reference, "; ", at)
			}
			if got, want := brief(h), brief(c.want); got != want {
				t.Errorf("%s, want %s", got, want)
			}
		})
	}
}

func TestSelectors(t *testing.T) {
	labels := map[string]string{"env": "prod", "zone": "", "app": "web"}
	for selector, want := range map[string]bool{
		"": true, "env=prod": true, "env==prod": true, "env=test": false, "env!=test": true, "env!=prod": false,
		"env": true, "rack": false, "rack!=1": true, "rack=": false, "zone=": true, "zone!=": false,
		"env=prod,app=web": true, "env=prod, app=db": false, "env=prod,rack": false,
	} {
		if got := check.Must(ParseSelector(selector))(t).Matches(labels); got != want {
			t.Errorf("%q: %v", selector, got)
		}
	}
	for _, selector := range []string{",", "=x", "!=x", "a b=c", "a=b,"} {
		if _, err := ParseSelector(selector); err == nil {
			t.Errorf("%q is taken", selector)
		}
	}
}
