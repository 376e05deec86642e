package fsck

import (
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/countersign/countersign/attestors/evidence"
	"github.com/countersign/countersign/broker/api/event"
	"github.com/countersign/countersign/broker/internal/state/inventory"
	"github.com/countersign/countersign/broker/internal/state/store"
)

// A ledger is the state that follows from the audit log: what the store has to say, too. It
// has what operators and hosts did by a record; what a record of an earlier version left out
// is not compared.
type ledger struct {
	hosts       map[string]*expectedHost
	operators   []expectedOperator
	tokens      map[string]bool // created, by hash, to whether they were spent
	oldTokens   bool            // some were created without their hash in the log
	policies    []string        // what each version's files are, in short
	references  map[string][]expectedVersion
	maintenance map[string]time.Time // by name of a set
	releases    map[string][]expectedVersion
	findings    map[string]bool // that are open
	odd         []string        // records that can't be read
}

func newLedger() *ledger {
	return &ledger{hosts: map[string]*expectedHost{}, tokens: map[string]bool{}, references: map[string][]expectedVersion{},
		maintenance: map[string]time.Time{}, releases: map[string][]expectedVersion{}, findings: map[string]bool{}}
}

type expectedHost struct {
	status    inventory.Status
	tier      string // empty: it never joined
	labels    map[string]string
	reference string
	eks       map[evidence.Digest]bool
	ak, tls   evidence.Digest
}

type expectedOperator struct {
	name, role, key string // no key: an earlier version wrote none
	until           time.Time
}

// An expectedVersion is of a reference set or a release.
type expectedVersion struct {
	digest   string // of its content; empty: an earlier version wrote none
	approved bool
	ends     int64 // in Unix milliseconds; 0: never
}

// taken lists the kinds of records that the ledger reads whole.
var taken = map[event.Kind]bool{
	event.HostAdded: true, event.HostJoined: true, event.HostAdmitted: true, event.HostPending: true, event.HostReenrolWanted: true,
	event.HostDuplicate: true, event.HostFailed: true, event.HostStale: true, event.HostApproved: true, event.HostLabelled: true,
	event.HostQuarantined: true, event.HostReleased: true, event.HostReenrol: true, event.HostRemoved: true, event.HostReference: true,
	event.DenialMerged: true, event.TokenCreated: true, event.OperatorAdded: true, event.OperatorRenewed: true, event.OperatorRemoved: true,
	event.PolicyApplied: true, event.ReferenceLearned: true, event.ReferenceAdded: true, event.ReferenceApproved: true,
	event.ReferenceMaintenance: true, event.ReleaseAdded: true, event.FindingOpened: true, event.FindingReopened: true, event.FindingClosed: true,
}

// take reads one record.
func (l *ledger) take(r event.Record) {
	e, err := r.Event()
	if err != nil {
		l.odd = append(l.odd, err.Error())
		return
	}
	switch e := e.(type) {
	case *event.Added:
		for _, h := range e.Hosts {
			l.hosts[h.ID] = &expectedHost{status: inventory.Status{State: inventory.Registered, Admitted: true}, labels: h.Labels, reference: h.Reference, eks: set(h.EKs)}
		}
	case *event.Enrolment:
		l.enrolled(r.Host, e)
		if e.Token != "" {
			l.tokens[e.Token] = true
		}
	case *event.Duplicate:
		if e.Enrolment != nil {
			l.enrolled(r.Host, e.Enrolment)
		} else {
			l.on(r.Host, inventory.OnFork)
		}
	case *event.Failed:
		l.on(r.Host, inventory.OnFail)
	case *event.Silence:
		if h := l.hosts[r.Host]; h != nil && r.Kind == event.HostStale {
			h.status.State = inventory.Stale // it was trusted, by proofs of which there is no record
		}
	case *event.Change:
		l.changed(r.Host, e)
	case *event.Merged:
		l.merged(r.Host, e)
	case *event.Token:
		if e.Hash == "" {
			l.oldTokens = true
		} else if !l.tokens[e.Hash] {
			l.tokens[e.Hash] = false
		}
	case *event.Operator:
		l.operator(e)
	case *event.Policy:
		l.policies = append(l.policies, filesDigest(e.Files))
	case *event.Reference:
		l.referenced(r.Host, e)
	case *event.Release:
		for i, v := range l.releases[e.Name] {
			l.releases[e.Name][i].ends = earlier(v.ends, store.Millis(e.OlderEnd))
		}
		l.releases[e.Name] = append(l.releases[e.Name], expectedVersion{digest: e.SHA256, approved: true})
	case *event.Finding:
		if delete(l.findings, e.ID); r.Kind != event.FindingClosed {
			l.findings[e.ID] = true
		}
	}
}

func set(eks []evidence.Digest) map[evidence.Digest]bool {
	m := map[evidence.Digest]bool{}
	for _, ek := range eks {
		m[ek] = true
	}
	return m
}

// enrolled takes what joining made of a host: its record has all of it.
func (l *ledger) enrolled(id string, e *event.Enrolment) {
	h := l.hosts[id]
	if h == nil {
		h = &expectedHost{eks: map[evidence.Digest]bool{}}
		l.hosts[id] = h
	}
	was := h.status
	if e.As == event.HostJoined && was.Reenrolling {
		l.givenUp(id, e)
	}
	h.status.State = inventory.State(e.State)
	h.tier, h.labels, h.reference, h.ak, h.tls = e.Tier, e.Labels, e.Reference, e.AK, e.TLSKey
	for _, ek := range e.EKs {
		h.eks[ek] = true
	}
	h.status.Joined = e.AK != evidence.Sum(nil)
	switch e.As {
	case event.HostAdmitted:
		h.status.Admitted = true
	case event.HostJoined:
		h.status.Reenrolling = was.Reenrolling && !was.Admitted
	}
}

// givenUp takes the keys of a host that was enrolled anew from all others.
func (l *ledger) givenUp(heir string, e *event.Enrolment) {
	for id, h := range l.hosts {
		if id == heir {
			continue
		}
		for _, ek := range e.EKs {
			delete(h.eks, ek)
		}
		if h.ak == e.AK {
			h.ak, h.status.Joined = evidence.Sum(nil), false
		}
		if h.tls == e.TLSKey {
			h.tls = evidence.Digest{}
		}
	}
}

func (l *ledger) on(id string, e inventory.Event) {
	h := l.hosts[id]
	if h == nil {
		return
	}
	if next, err := h.status.After(e); err == nil {
		h.status = next
	}
}

var words = map[event.Kind]inventory.Event{
	event.HostApproved: inventory.OnApprove, event.HostQuarantined: inventory.OnQuarantine, event.HostReleased: inventory.OnRelease,
	event.HostReenrol: inventory.OnReenrol, event.HostRemoved: inventory.OnRemove,
}

func (l *ledger) changed(id string, e *event.Change) {
	h := l.hosts[id]
	if h == nil {
		return
	}
	if on, ok := words[e.As]; ok {
		l.on(id, on)
	}
	if e.As == event.HostApproved || e.As == event.HostLabelled {
		h.labels = maps.Clone(h.labels)
		if h.labels == nil {
			h.labels = map[string]string{}
		}
		maps.Copy(h.labels, e.SetLabels)
		for _, k := range e.DropLabels {
			delete(h.labels, k)
		}
	}
	if e.As == event.HostReference || e.As == event.HostApproved && e.Reference != "" {
		h.reference = e.Reference
	}
}

func (l *ledger) merged(id string, e *event.Merged) {
	switch e.Denial {
	case "host":
		h := l.hosts[id]
		if h == nil {
			h = &expectedHost{eks: map[evidence.Digest]bool{}}
			l.hosts[id] = h
		}
		h.status.State, h.status.Admitted = inventory.State(e.State), e.Admitted
		if h.status.State == inventory.Removed {
			h.status.Reenrolling = false
		}
		h.ak, h.tls = evidence.Digest{}, evidence.Digest{} // as of after the backup
		for _, ek := range e.EKs {
			h.eks[ek] = true
		}
	case "operator":
		l.operators = slices.DeleteFunc(l.operators, func(o expectedOperator) bool { return o.key == e.Name })
	case "token":
		l.tokens[e.Name] = true
	}
}

func (l *ledger) operator(e *event.Operator) {
	switch e.As {
	case event.OperatorAdded:
		l.operators = append(l.operators, expectedOperator{e.Name, e.Role, e.Key, e.Until})
	case event.OperatorRenewed:
		for i, o := range l.operators {
			if o.key == e.Key || o.key == "" && o.name == e.Name {
				l.operators[i].until, l.operators[i].key = e.Until, e.Key
				return
			}
		}
	case event.OperatorRemoved:
		l.operators = slices.DeleteFunc(l.operators, func(o expectedOperator) bool { return o.name == e.Name })
	}
}

func (l *ledger) referenced(host string, e *event.Reference) {
	versions := l.references[e.Name]
	switch e.As {
	case event.ReferenceLearned, event.ReferenceAdded:
		l.references[e.Name] = append(versions, expectedVersion{digest: e.SHA256})
	case event.ReferenceMaintenance:
		l.maintenance[e.Name] = e.Until
	case event.ReferenceApproved:
		at := int(e.Version) - 1
		if e.Version == 0 {
			at = len(versions) - 1
		}
		for i, v := range versions {
			if v.approved {
				versions[i].ends = earlier(v.ends, store.Millis(e.OlderEnd))
			}
			if i == at {
				versions[i].approved, versions[i].ends = true, 0
			}
		}
		if h := l.hosts[host]; h != nil {
			h.reference = e.Name
		}
	}
}

// earlier returns the earlier of two ends, of which 0 is never.
func earlier(a, b int64) int64 {
	if a == 0 || b < a {
		return b
	}
	return a
}

func filesDigest(files []event.File) string {
	var all strings.Builder
	for _, f := range files {
		fmt.Fprintf(&all, "%q %s\n", f.Name, evidence.Sum(f.Content))
	}
	return evidence.Sum([]byte(all.String())).String()
}

// host returns what of a host isn't as the log says.
func (l *ledger) host(h inventory.Host) (wrong []string) {
	e := l.hosts[h.ID]
	if e == nil {
		return []string{"no record is of it"}
	}
	differ := func(what string, got, want any) {
		if fmt.Sprint(got) != fmt.Sprint(want) {
			wrong = append(wrong, fmt.Sprintf("%s: %v, and by the log %v", what, got, want))
		}
	}
	// A proof that made it trusted is in no record.
	proven := h.State == inventory.Trusted && (e.status.State == inventory.Stale || e.status.State == inventory.Failed)
	if !proven {
		differ("state", h.State, e.status.State)
	}
	differ("admitted", h.Admitted, e.status.Admitted)
	differ("may join with other keys", h.Reenrolling, e.status.Reenrolling)
	differ("labels", fmt.Sprint(nonNil(h.Labels)), fmt.Sprint(nonNil(e.labels)))
	differ("reference", h.Reference, e.reference)
	if e.tier != "" {
		differ("tier", h.Tier, e.tier)
	}
	if !e.ak.IsZero() {
		differ("AK", evidence.Sum(h.AKPublic), e.ak)
	}
	if !e.tls.IsZero() && !h.TLSKey.IsZero() {
		differ("TLS key", h.TLSKey, e.tls)
	}
	if have := set(h.EKs); !maps.Equal(have, e.eks) {
		differ("EKs", h.EKs, slices.Collect(maps.Keys(e.eks)))
	}
	return wrong
}

func nonNil(m map[string]string) map[string]string {
	if m == nil {
		return map[string]string{}
	}
	return m
}

// rest compares the small tables, in the transaction that the log was read to its end in.
func (l *ledger) rest(tx *store.Tx, bad func(format string, args ...any)) error {
	for _, compare := range []func(*store.Tx, func(string, ...any)) error{l.operatorRows, l.tokenRows, l.policyRows, l.versionRows, l.findingRows} {
		if err := compare(tx, bad); err != nil {
			return err
		}
	}
	for _, odd := range l.odd {
		bad("%s", odd)
	}
	return nil
}

func (l *ledger) operatorRows(tx *store.Tx, bad func(string, ...any)) error {
	left := slices.Clone(l.operators)
	err := tx.Each(func(row store.Row) error {
		var name, role, key string
		var expires int64
		if err := row.Scan(&name, &role, &key, &expires); err != nil {
			return err
		}
		i := slices.IndexFunc(left, func(o expectedOperator) bool {
			return o.name == name && o.role == role && (o.key == "" || o.key == key) && store.Millis(o.until) == expires
		})
		if i < 0 {
			bad("operator %s, %s until %s: no record is of it", name, role, store.Time(expires).Format(time.RFC3339))
			return nil
		}
		left = slices.Delete(left, i, i+1)
		return nil
	}, `SELECT name, role, key_hash, expires FROM operators ORDER BY name`)
	for _, o := range left {
		bad("operator %s, %s: the log has it, and the store doesn't", o.name, o.role)
	}
	return err
}

func (l *ledger) tokenRows(tx *store.Tx, bad func(string, ...any)) error {
	return tx.Each(func(row store.Row) error {
		var hash string
		var used int64
		if err := row.Scan(&hash, &used); err != nil {
			return err
		}
		switch spent, known := l.tokens[hash]; {
		case !known && !l.oldTokens:
			bad("join token %.16s: no record is of it", hash)
		case spent && used == 0:
			bad("join token %.16s was spent, and can be used again", hash)
		}
		return nil
	}, `SELECT hash, used FROM join_tokens`)
}

func (l *ledger) policyRows(tx *store.Tx, bad func(string, ...any)) error {
	found := 0
	err := tx.Each(func(row store.Row) error {
		var version int
		var text string
		if err := row.Scan(&version, &text); err != nil {
			return err
		}
		found++
		var files []event.File
		if err := json.Unmarshal([]byte(text), &files); err != nil {
			bad("version %d of the scopes can't be read: %v", version, err)
			return nil
		}
		if version < 1 || version > len(l.policies) || filesDigest(files) != l.policies[version-1] {
			bad("version %d of the scopes isn't what was applied", version)
		}
		return nil
	}, `SELECT version, files FROM policies ORDER BY version`)
	if found < len(l.policies) {
		bad("the log has %d versions of the scopes, and the store %d", len(l.policies), found)
	}
	return err
}

func (l *ledger) versionRows(tx *store.Tx, bad func(string, ...any)) error {
	sets, releases := versions{what: "reference set", all: l.references, bad: bad}, versions{what: "release", all: l.releases, bad: bad}
	if err := tx.Each(sets.row, `SELECT name, version, content, approved, ends FROM reference_sets`); err != nil {
		return err
	}
	if err := tx.Each(releases.row, `SELECT name, version, files, 1, ends FROM releases`); err != nil {
		return err
	}
	sets.missing()
	releases.missing()
	return tx.Each(func(row store.Row) error {
		var name string
		var ends int64
		if err := row.Scan(&name, &ends); err != nil {
			return err
		}
		if want, ok := l.maintenance[name]; !ok || store.Millis(want) != ends {
			bad("maintenance of reference set %s ends at %s, and by the log at %s", name, store.Time(ends).Format(time.RFC3339), want.Format(time.RFC3339))
		}
		return nil
	}, `SELECT name, ends FROM reference_maintenance`)
}

// versions compares the rows of a table of versions with all that the log has.
type versions struct {
	what  string
	all   map[string][]expectedVersion
	bad   func(string, ...any)
	found map[string]int
}

func (v *versions) row(row store.Row) error {
	var name, content string
	var version, approved, ends int64
	if err := row.Scan(&name, &version, &content, &approved, &ends); err != nil {
		return err
	}
	if v.found == nil {
		v.found = map[string]int{}
	}
	v.found[name]++
	list := v.all[name]
	if version < 1 || int(version) > len(list) {
		v.bad("%s %s version %d: no record is of it", v.what, name, version)
		return nil
	}

	want := list[version-1]
	if want.digest != "" && evidence.Sum([]byte(content)).String() != want.digest {
		v.bad("%s %s version %d: its content was changed", v.what, name, version)
	}
	if (approved != 0) != want.approved || ends != want.ends {
		v.bad("%s %s version %d is in force otherwise than the log says", v.what, name, version)
	}
	return nil
}

func (v *versions) missing() {
	for name, list := range v.all {
		if v.found[name] < len(list) {
			v.bad("%s %s: the log has %d versions, and the store %d", v.what, name, len(list), v.found[name])
		}
	}
}

func (l *ledger) findingRows(tx *store.Tx, bad func(string, ...any)) error {
	open := map[string]bool{}
	err := tx.Each(func(row store.Row) error {
		var id string
		if err := row.Scan(&id); err != nil {
			return err
		}
		open[id] = true
		if !l.findings[id] {
			bad("finding %s is open, and by the log it isn't", id)
		}
		return nil
	}, `SELECT id FROM findings WHERE status = 'open'`)
	for id := range l.findings {
		if !open[id] {
			bad("finding %s is open by the log, and not in the store", id)
		}
	}
	return err
}
