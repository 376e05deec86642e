package event

import (
	"encoding/json"
	"fmt"
	"time"

	"github.com/countersign/countersign/attestors/evidence"
	"github.com/countersign/countersign/broker/api/detector"
)

// Initialised is the event of BrokerInitialised.
type Initialised struct {
	Broker string `json:"broker"`
	HostCA string `json:"host_ca"` // SHA-256, hex
}

// Kind returns BrokerInitialised.
func (Initialised) Kind() Kind { return BrokerInitialised }

// Epoch is the event of AuditEpoch: the log begins a new epoch, because it can't follow a
// checkpoint that an agent has, or after a restore.
type Epoch struct {
	Reason string `json:"reason"`
	Shown  string `json:"shown,omitempty"` // the signed checkpoint that it can't follow
}

// Kind returns AuditEpoch.
func (Epoch) Kind() Kind { return AuditEpoch }

func (e Epoch) why() string { return e.Reason }

// Merged is the event of DenialMerged: the store was restored from a backup, and what was
// taken away after that is taken away again, as the denial log says.
type Merged struct {
	Denial string `json:"denial"` // host, lease, operator, token or value
	Name   string `json:"name"`
	State  string `json:"state,omitempty"` // of a host
	// Admitted reports whether an operator ever let the host in.
	Admitted bool              `json:"admitted,omitempty"`
	EKs      []evidence.Digest `json:"eks,omitempty"` // of a host
	Reason   string            `json:"reason,omitempty"`
}

// Kind returns DenialMerged.
func (Merged) Kind() Kind { return DenialMerged }

func (e Merged) why() string { return e.Reason }

// Acknowledged is the event of RestoreAcknowledged: an operator stands for the log's epoch,
// and accepts that the broker may not know what was taken away between a backup and its
// restore.
type Acknowledged struct {
	Epoch  int64  `json:"epoch"`
	Held   string `json:"held,omitempty"` // why nothing new was issued until then
	Reason string `json:"reason,omitempty"`
}

// Kind returns RestoreAcknowledged.
func (Acknowledged) Kind() Kind { return RestoreAcknowledged }

func (e Acknowledged) why() string { return e.Reason }

// Added is the event of HostAdded.
type Added struct {
	Count int         `json:"count"`
	Hosts []AddedHost `json:"hosts"`
}

// An AddedHost is a host that an operator registered before it joined.
type AddedHost struct {
	ID        string            `json:"id"`
	Name      string            `json:"name"`
	EKs       []evidence.Digest `json:"eks"`
	Labels    map[string]string `json:"labels,omitempty"`
	Reference string            `json:"reference,omitempty"`
}

// Kind returns HostAdded.
func (Added) Kind() Kind { return HostAdded }

// Enrolment is the event of HostJoined, HostAdmitted, HostPending and HostReenrolWanted:
// the result of a host's request to join.
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
	Token     string            `json:"token,omitempty"` // hash of the join token that it spent
}

// Kind returns e.As.
func (e Enrolment) Kind() Kind { return e.As }

func (e Enrolment) why() string { return e.Reason }

// Duplicate is the event of HostDuplicate: the counters of a TPM went back, so that a copy
// of the machine may be running. It was found in a proof (Check and Detail are set) or
// while the host joined (Enrolment is set).
type Duplicate struct {
	*Enrolment

	Check  string `json:"check,omitempty"`
	Detail string `json:"detail,omitempty"`
}

// Kind returns HostDuplicate.
func (Duplicate) Kind() Kind { return HostDuplicate }

func (e Duplicate) why() string {
	if e.Enrolment != nil {
		return first(e.Detail, e.Reason)
	}
	return first(e.Detail, e.Check)
}

// Failed is the event of HostFailed: the broker rejected the host's evidence.
type Failed struct {
	Check  string `json:"check"`
	Detail string `json:"detail"` // for operators; the host doesn't receive it
}

// Kind returns HostFailed.
func (Failed) Kind() Kind { return HostFailed }

func (e Failed) why() string { return first(e.Detail, e.Check) }

// Facts is the event of HostFacts: the proven facts of a host, written when they change.
type Facts struct {
	Facts  json.RawMessage `json:"facts"` // in the vocabulary of scope conditions
	SHA256 string          `json:"sha256"`
}

// Kind returns HostFacts.
func (Facts) Kind() Kind { return HostFacts }

// Silence is the event of HostStale and HostHeld.
type Silence struct {
	As Kind `json:"-"`

	Reason     string    `json:"reason"`
	LastProved time.Time `json:"last_proved"`
}

// Kind returns e.As.
func (e Silence) Kind() Kind { return e.As }

func (e Silence) why() string { return e.Reason }

// Change is the event of HostApproved, HostLabelled, HostQuarantined, HostReleased,
// HostReenrol, HostRemoved, HostReference and HostStepUp: an operator changed a host.
type Change struct {
	As Kind `json:"-"`

	Action     string            `json:"action"`
	SetLabels  map[string]string `json:"set_labels,omitempty"`
	DropLabels []string          `json:"drop_labels,omitempty"`
	Reference  string            `json:"reference,omitempty"`
	Reason     string            `json:"reason,omitempty"`
}

// Kind returns e.As.
func (e Change) Kind() Kind { return e.As }

func (e Change) why() string { return e.Reason }

// UnmarshalJSON also accepts the field names that earlier brokers wrote.
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

// Token is the event of TokenCreated. It doesn't contain the token itself.
type Token struct {
	Name      string            `json:"name"`
	Labels    map[string]string `json:"labels"`
	Reference string            `json:"reference"`
	Expires   time.Time         `json:"expires"`
	Hash      string            `json:"hash,omitempty"` // SHA-256 of the token, hex
}

// Kind returns TokenCreated.
func (Token) Kind() Kind { return TokenCreated }

// A Decision is the result of evaluating a scope for a request.
type Decision struct {
	Scope     string     `json:"scope"`
	Outcome   string     `json:"outcome"`
	Selectors []Selector `json:"selectors"`
	Policy    int64      `json:"policy"` // version of the scopes
	Reason    string     `json:"reason,omitempty"`
}

// A Selector is one condition of a scope, with the value that it was compared with.
type Selector struct {
	Name   string `json:"name"`
	Wanted string `json:"wanted"`
	Saw    string `json:"saw"`
	Result string `json:"result"` // "pass", "fail" or "absent"
}

// Allowed is the event of CredentialAllowed. The broker writes it before it issues the
// credential.
type Allowed struct {
	Decision  Decision          `json:"decision"`
	Evidence  *Evidence         `json:"evidence,omitempty"`
	Facts     json.RawMessage   `json:"facts,omitempty"` // of the program; only earlier brokers wrote them
	HostFacts evidence.Digest   `json:"host_facts"`      // digest of the host's facts; the newest HostFacts has them
	Names     map[string]string `json:"names,omitempty"`
	Serial    string            `json:"serial,omitempty"` // of a certificate; only earlier brokers wrote it
}

// Kind returns CredentialAllowed.
func (Allowed) Kind() Kind { return CredentialAllowed }

func (e Allowed) why() string { return e.Decision.Reason }

// Decided is the event of CredentialRefused, CredentialFault and CredentialObserved:
// decisions that issue nothing.
type Decided struct {
	As Kind `json:"-"`

	Decision Decision        `json:"decision"`
	Evidence *Evidence       `json:"evidence,omitempty"`
	Program  json.RawMessage `json:"program,omitempty"` // as the host sent it; only earlier brokers wrote it
}

// Kind returns e.As.
func (e Decided) Kind() Kind { return e.As }

func (e Decided) why() string { return e.Decision.Reason }

// Evidence identifies the program evidence of a request, which may be long and isn't in
// the log: what was sent, who asked, and what was unusual about it.
type Evidence struct {
	SHA256   evidence.Digest `json:"sha256"` // of the evidence as it was sent
	Size     int             `json:"size"`   // in bytes
	Instance string          `json:"instance,omitempty"`
	User     string          `json:"user,omitempty"`
	Unit     string          `json:"unit,omitempty"`
	Exe      string          `json:"exe,omitempty"`
	Digest   evidence.Digest `json:"exe_sha256,omitzero"`
	Mappings int             `json:"mappings,omitempty"` // how many there are
	// Unusual are the first few things that most programs don't have, in words.
	Unusual []string `json:"unusual,omitempty"`
}

// Repeated is the event of AuditRepeated: what record Record describes happened again,
// Count times from First to Last, and wasn't recorded each time.
type Repeated struct {
	Of     Kind      `json:"of"`
	Record int64     `json:"record"`
	Count  int64     `json:"count"`
	First  time.Time `json:"first"`
	Last   time.Time `json:"last"`
}

// Kind returns AuditRepeated.
func (Repeated) Kind() Kind { return AuditRepeated }

func (e Repeated) why() string {
	return fmt.Sprintf("%d more like record %d (%s), the last at %s", e.Count, e.Record, e.Of, e.Last.UTC().Format(time.RFC3339))
}

// Outcome is the event of CredentialIssued, CredentialFailed, CredentialDelivered,
// CredentialReplaced, CredentialRevoking and CredentialEnded: the lease after the change.
type Outcome struct {
	As Kind `json:"-"`

	State     string            `json:"state"` // of its lease
	Reason    string            `json:"reason"`
	Names     map[string]string `json:"names"` // by which other systems know the credential
	Expires   time.Time         `json:"expires"`
	Unrotated bool              `json:"unrotated"`
	Error     string            `json:"error"`
	Instance  string            `json:"instance"` // of the program
}

// Kind returns e.As.
func (e Outcome) Kind() Kind { return e.As }

func (e Outcome) why() string { return first(e.Reason, e.Error) }

// UnmarshalJSON also accepts records of earlier brokers, which had some of the names in
// fields of their own.
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

// Bound is the event of CredentialBound: the credential belongs to this instance of the
// program from now on.
type Bound struct {
	Instance string `json:"instance"`
}

// Kind returns CredentialBound.
func (Bound) Kind() Kind { return CredentialBound }

// Adopted is the event of CredentialAdopted: after a restore, the broker accepted a lease
// from its ticket.
type Adopted struct {
	Names map[string]string `json:"names"`
}

// Kind returns CredentialAdopted.
func (Adopted) Kind() Kind { return CredentialAdopted }

// UnmarshalJSON also accepts records of earlier brokers; see [Outcome.UnmarshalJSON].
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

// oldNames are the names that earlier brokers wrote in fields of their own.
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

// Opened is the event of CredentialOpened: the host reports that a program other than the credential's
// own opened its file.
type Opened struct {
	Time time.Time `json:"time"`
	Path string    `json:"path"`
	PID  uint32    `json:"pid"`
	Exe  string    `json:"exe"`
	User string    `json:"user"`
	Unit string    `json:"unit,omitempty"`
}

// Kind returns CredentialOpened.
func (Opened) Kind() Kind { return CredentialOpened }

// Revocation is the event of LeaseRevoke: an operator asked the broker to revoke leases.
type Revocation struct {
	Leases []string `json:"leases"`
	Host   string   `json:"host"`
	Scope  string   `json:"scope"`
	Reason string   `json:"reason"`
}

// Kind returns LeaseRevoke.
func (Revocation) Kind() Kind { return LeaseRevoke }

func (e Revocation) why() string { return e.Reason }

// Finding is the event of FindingOpened, FindingReopened and FindingClosed.
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
	Reason   string        `json:"reason,omitempty"` // why it was closed
	Until    time.Time     `json:"until,omitzero"`   // the finding stays closed until then
}

// Kind returns e.As.
func (e Finding) Kind() Kind { return e.As }

func (e Finding) why() string { return first(e.Reason, e.Why) }

// Canary is the event of CanaryIssued and CanaryRemoved.
type Canary struct {
	As Kind `json:"-"`

	ID string `json:"canary"`
}

// Kind returns e.As.
func (e Canary) Kind() Kind { return e.As }

// Operator is the event of OperatorAdded, OperatorRenewed and OperatorRemoved.
type Operator struct {
	As Kind `json:"-"`

	Name  string    `json:"name"`
	Role  string    `json:"role,omitempty"`
	Key   string    `json:"key,omitempty"` // SHA-256, hex
	Until time.Time `json:"until,omitzero"`
}

// Kind returns e.As.
func (e Operator) Kind() Kind { return e.As }

// Policy is the event of PolicyApplied: an operator applied these scope files.
type Policy struct {
	Scopes []ScopeChange `json:"scopes"`
	Files  []File        `json:"files"`
}

// A ScopeChange compares one scope with the set before. Change is "added", "changed",
// "removed" or "same".
type ScopeChange struct {
	Scope  string `json:"scope"`
	Change string `json:"change"`
}

// A File is a scope file.
type File struct {
	Name    string `json:"name"`
	Content []byte `json:"content"`
}

// Kind returns PolicyApplied.
func (Policy) Kind() Kind { return PolicyApplied }

// Reference is the event of ReferenceLearned, ReferenceAdded, ReferenceApproved and
// ReferenceMaintenance.
type Reference struct {
	As Kind `json:"-"`

	Name     string    `json:"name"`
	PCRs     []int     `json:"pcrs,omitempty"`
	Version  int64     `json:"version,omitempty"` // 0: the newest
	OlderEnd time.Time `json:"older_end,omitzero"`
	Until    time.Time `json:"until,omitzero"`
	SHA256   string    `json:"sha256,omitempty"` // of the content, as it is stored; hex
}

// Kind returns e.As.
func (e Reference) Kind() Kind { return e.As }

// Release is the event of ReleaseAdded.
type Release struct {
	Name     string    `json:"name"`
	Files    int       `json:"files"`
	Source   string    `json:"source"`
	OlderEnd time.Time `json:"older_end,omitzero"`
	Version  int64     `json:"version,omitempty"`
	SHA256   string    `json:"sha256,omitempty"` // of the list of files, as it is stored; hex
}

// Kind returns ReleaseAdded.
func (Release) Kind() Kind { return ReleaseAdded }

// first returns the first text that isn't empty.
func first(texts ...string) string {
	for _, t := range texts {
		if t != "" {
			return t
		}
	}
	return ""
}
