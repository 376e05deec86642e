package event

import (
	"encoding/json"
	"time"

	"github.com/countersign/countersign/attestors/evidence"
	"github.com/countersign/countersign/broker/api/detector"
)

// Initialised is BrokerInitialised.
type Initialised struct {
	Broker string `json:"broker"`
	HostCA string `json:"host_ca"` // SHA-256, hex
}

// Kind is BrokerInitialised.
func (Initialised) Kind() Kind { return BrokerInitialised }

// Epoch is AuditEpoch: the log starts anew at its present size.
type Epoch struct {
	Reason string `json:"reason"`
	Shown  string `json:"shown,omitempty"` // the signed checkpoint that it can't follow
}

// Kind is AuditEpoch.
func (Epoch) Kind() Kind { return AuditEpoch }

func (e Epoch) why() string { return e.Reason }

// Added is HostAdded.
type Added struct {
	Count int         `json:"count"`
	Hosts []AddedHost `json:"hosts"`
}

// An AddedHost was made known before it joined.
type AddedHost struct {
	ID        string            `json:"id"`
	Name      string            `json:"name"`
	EKs       []evidence.Digest `json:"eks"`
	Labels    map[string]string `json:"labels,omitempty"`
	Reference string            `json:"reference,omitempty"`
}

// Kind is HostAdded.
func (Added) Kind() Kind { return HostAdded }

// Enrolment is what became of a host's request to join: HostJoined, HostAdmitted,
// HostPending or HostReenrolWanted.
type Enrolment struct {
	As Kind `json:"-"`

	Name      string            `json:"name"`
	State     string            `json:"state"`
	Tier      string            `json:"tier"`
	EKs       []evidence.Digest `json:"eks"`
	AK        evidence.Digest   `json:"ak"`
	TLSKey    evidence.Digest   `json:"tls_key"`
	Address   string            `json:"address"`
	Labels    map[string]string `json:"labels"`
	Reference string            `json:"reference"`
	Reason    string            `json:"reason"`
}

// Kind is As.
func (e Enrolment) Kind() Kind { return e.As }

func (e Enrolment) why() string { return e.Reason }

// Duplicate is HostDuplicate: a TPM's counters, or its keys, are in two places. It has
// what an Enrolment has where it showed when a host joined.
type Duplicate struct {
	*Enrolment // nil where it showed in a proof

	Check  string `json:"check,omitempty"`
	Detail string `json:"detail,omitempty"`
}

// Kind is HostDuplicate.
func (Duplicate) Kind() Kind { return HostDuplicate }

func (e Duplicate) why() string {
	if e.Enrolment != nil {
		return first(e.Detail, e.Reason)
	}
	return first(e.Detail, e.Check)
}

// Failed is HostFailed: its evidence was rejected.
type Failed struct {
	Check  string `json:"check"`
	Detail string `json:"detail"` // for operators; hosts aren't told
}

// Kind is HostFailed.
func (Failed) Kind() Kind { return HostFailed }

func (e Failed) why() string { return first(e.Detail, e.Check) }

// Facts is HostFacts: what was proven of a host, where it is another thing than before.
type Facts struct {
	Facts  json.RawMessage `json:"facts"` // as conditions of scopes have them
	SHA256 string          `json:"sha256"`
}

// Kind is HostFacts.
func (Facts) Kind() Kind { return HostFacts }

// Silence is HostStale or HostHeld.
type Silence struct {
	As Kind `json:"-"`

	Reason     string    `json:"reason"`
	LastProved time.Time `json:"last_proved"`
}

// Kind is As.
func (e Silence) Kind() Kind { return e.As }

func (e Silence) why() string { return e.Reason }

// Change is what an operator did to a host: HostApproved, HostLabelled,
// HostQuarantined, HostReleased, HostReenrol, HostRemoved, HostReference or HostStepUp.
type Change struct {
	As Kind `json:"-"`

	Action     string            `json:"action"`
	SetLabels  map[string]string `json:"set_labels,omitempty"`
	DropLabels []string          `json:"drop_labels,omitempty"`
	Reference  string            `json:"reference,omitempty"`
	Reason     string            `json:"reason,omitempty"`
}

// Kind is As.
func (e Change) Kind() Kind { return e.As }

func (e Change) why() string { return e.Reason }

// UnmarshalJSON reads the names too that earlier brokers wrote.
func (e *Change) UnmarshalJSON(b []byte) error {
	type change Change // without this method
	old := struct {
		*change
		Set  map[string]string `json:"SetLabels"`
		Drop []string          `json:"DropLabels"`
	}{change: (*change)(e)}
	if err := json.Unmarshal(b, &old); err != nil {
		return err
	}
	if old.Set != nil {
		e.SetLabels = old.Set
	}
	if old.Drop != nil {
		e.DropLabels = old.Drop
	}
	return nil
}

// Token is TokenCreated, and not the token.
type Token struct {
	Name      string            `json:"name"`
	Labels    map[string]string `json:"labels"`
	Reference string            `json:"reference"`
	Expires   time.Time         `json:"expires"`
}

// Kind is TokenCreated.
func (Token) Kind() Kind { return TokenCreated }

// A Decision is what the policy said of a request.
type Decision struct {
	Scope     string     `json:"scope"`
	Outcome   string     `json:"outcome"`
	Selectors []Selector `json:"selectors"`
	Policy    int64      `json:"policy"` // version of the scopes
	Reason    string     `json:"reason,omitempty"`
}

// A Selector is one condition of a scope and what it saw.
type Selector struct {
	Name   string `json:"name"`
	Wanted string `json:"wanted"`
	Saw    string `json:"saw"`
	Result string `json:"result"` // "pass", "fail" or "absent"
}

// Allowed is CredentialAllowed. It stands before the credential is made.
type Allowed struct {
	Decision  Decision          `json:"decision"`
	Facts     json.RawMessage   `json:"facts"`      // of the program; as conditions of scopes have them
	HostFacts evidence.Digest   `json:"host_facts"` // of the host's, as its newest HostFacts has it
	Names     map[string]string `json:"names,omitempty"`
	Serial    string            `json:"serial,omitempty"` // of a certificate, by earlier brokers
}

// Kind is CredentialAllowed.
func (Allowed) Kind() Kind { return CredentialAllowed }

func (e Allowed) why() string { return e.Decision.Reason }

// Decided is a decision by which nothing is issued: CredentialRefused, CredentialFault
// or CredentialObserved.
type Decided struct {
	As Kind `json:"-"`

	Decision Decision        `json:"decision"`
	Program  json.RawMessage `json:"program"` // as conditions of scopes have it
}

// Kind is As.
func (e Decided) Kind() Kind { return e.As }

func (e Decided) why() string { return e.Decision.Reason }

// Outcome is what became of a credential: CredentialIssued, CredentialFailed,
// CredentialDelivered, CredentialReplaced, CredentialRevoking or CredentialEnded.
type Outcome struct {
	As Kind `json:"-"`

	State     string            `json:"state"` // of its lease
	Reason    string            `json:"reason"`
	Names     map[string]string `json:"names"` // what the outside world calls it
	Expires   time.Time         `json:"expires"`
	Unrotated bool              `json:"unrotated"`
	Error     string            `json:"error"`
	Instance  string            `json:"instance"` // of the program that it is for
}

// Kind is As.
func (e Outcome) Kind() Kind { return e.As }

func (e Outcome) why() string { return first(e.Reason, e.Error) }

// UnmarshalJSON reads a record of an earlier broker too, which had some names beside
// the others.
func (e *Outcome) UnmarshalJSON(b []byte) error {
	type outcome Outcome // without this method
	old := struct {
		*outcome
		oldNames
	}{outcome: (*outcome)(e)}
	err := json.Unmarshal(b, &old)
	e.Names = old.with(e.Names)
	return err
}

// Bound is CredentialBound: it belongs to this instance of the program from here on.
type Bound struct {
	Instance string `json:"instance"`
}

// Kind is CredentialBound.
func (Bound) Kind() Kind { return CredentialBound }

// Adopted is CredentialAdopted: the lease came back by its ticket, after a restore.
type Adopted struct {
	Names map[string]string `json:"names"`
}

// Kind is CredentialAdopted.
func (Adopted) Kind() Kind { return CredentialAdopted }

// UnmarshalJSON reads a record of an earlier broker too.
func (e *Adopted) UnmarshalJSON(b []byte) error {
	type adopted Adopted // without this method
	old := struct {
		*adopted
		oldNames
	}{adopted: (*adopted)(e)}
	err := json.Unmarshal(b, &old)
	e.Names = old.with(e.Names)
	return err
}

// oldNames stood beside the names of a credential, in records of earlier brokers.
type oldNames struct {
	Accessor   string `json:"accessor"`
	VaultLease string `json:"vault_lease"`
	Serial     string `json:"serial"`
}

func (o oldNames) with(names map[string]string) map[string]string {
	for name, value := range map[string]string{"vault_accessor": o.Accessor, "vault_lease": o.VaultLease, "certificate_serial": o.Serial} {
		if value == "" {
			continue
		}
		if names == nil {
			names = map[string]string{}
		}
		names[name] = value
	}
	return names
}

// Opened is CredentialOpened: the host reports that a program other than the credential's
// own opened its file.
type Opened struct {
	Time time.Time `json:"time"`
	Path string    `json:"path"`
	PID  uint32    `json:"pid"`
	Exe  string    `json:"exe"`
	User string    `json:"user"`
	Unit string    `json:"unit,omitempty"`
}

// Kind is CredentialOpened.
func (Opened) Kind() Kind { return CredentialOpened }

// Revocation is LeaseRevoke: an operator asked for ends.
type Revocation struct {
	Leases []string `json:"leases"`
	Host   string   `json:"host"`
	Scope  string   `json:"scope"`
	Reason string   `json:"reason"`
}

// Kind is LeaseRevoke.
func (Revocation) Kind() Kind { return LeaseRevoke }

func (e Revocation) why() string { return e.Reason }

// Finding is FindingOpened, FindingReopened or FindingClosed.
type Finding struct {
	As Kind `json:"-"`

	ID       string        `json:"finding"`
	Detector detector.Name `json:"detector"`
	Cause    string        `json:"cause"`
	Severity string        `json:"severity"`
	Account  string        `json:"account"`
	Why      string        `json:"why"`
	First    time.Time     `json:"first"`
	Last     time.Time     `json:"last"`
	Count    int64         `json:"count"`
	Reason   string        `json:"reason,omitempty"` // of closing it
	Until    time.Time     `json:"until,omitzero"`   // it stays closed
}

// Kind is As.
func (e Finding) Kind() Kind { return e.As }

func (e Finding) why() string { return first(e.Reason, e.Why) }

// Canary is CanaryIssued or CanaryRemoved.
type Canary struct {
	As Kind `json:"-"`

	ID string `json:"canary"`
}

// Kind is As.
func (e Canary) Kind() Kind { return e.As }

// Operator is OperatorAdded, OperatorRenewed or OperatorRemoved.
type Operator struct {
	As Kind `json:"-"`

	Name  string    `json:"name"`
	Role  string    `json:"role,omitempty"`
	Key   string    `json:"key,omitempty"` // SHA-256, hex
	Until time.Time `json:"until,omitzero"`
}

// Kind is As.
func (e Operator) Kind() Kind { return e.As }

// Policy is PolicyApplied: these scopes are in force.
type Policy struct {
	Scopes []ScopeChange `json:"scopes"`
	Files  []File        `json:"files"`
}

// A ScopeChange is what became of one scope: "added", "changed", "removed" or "same".
type ScopeChange struct {
	Scope  string `json:"scope"`
	Change string `json:"change"`
}

// A File is one of the scopes' files.
type File struct {
	Name    string `json:"name"`
	Content []byte `json:"content"`
}

// Kind is PolicyApplied.
func (Policy) Kind() Kind { return PolicyApplied }

// Reference is ReferenceLearned, ReferenceAdded, ReferenceApproved or
// ReferenceMaintenance.
type Reference struct {
	As Kind `json:"-"`

	Name     string    `json:"name"`
	PCRs     []int     `json:"pcrs,omitempty"`
	Version  int64     `json:"version,omitempty"` // 0: the newest
	OlderEnd time.Time `json:"older_end,omitzero"`
	Until    time.Time `json:"until,omitzero"`
}

// Kind is As.
func (e Reference) Kind() Kind { return e.As }

// Release is ReleaseAdded.
type Release struct {
	Name     string    `json:"name"`
	Files    int       `json:"files"`
	Source   string    `json:"source"`
	OlderEnd time.Time `json:"older_end,omitzero"`
}

// Kind is ReleaseAdded.
func (Release) Kind() Kind { return ReleaseAdded }

// first is the first text that isn't empty.
func first(texts ...string) string {
	for _, t := range texts {
		if t != "" {
			return t
		}
	}
	return ""
}
