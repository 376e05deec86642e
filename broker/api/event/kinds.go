package event

import (
	"maps"
	"slices"

	"github.com/countersign/countersign/broker/api/detector"
)

// A Kind names what happened. The names don't change.
type Kind string

// The kinds of records.
const (
	BrokerInitialised Kind = "broker.initialised"
	AuditEpoch        Kind = "audit.epoch"
	AuditRepeated     Kind = "audit.repeated" // what a host caused again and again, and was recorded once

	DenialMerged        Kind = "denial.merged"
	RestoreAcknowledged Kind = "restore.acknowledged"

	HostAdded         Kind = "host.added" // registered by an operator, by its EK
	HostJoined        Kind = "host.joined"
	HostAdmitted      Kind = "host.admitted"
	HostPending       Kind = "host.pending"
	HostReenrolWanted Kind = "host.reenrol-wanted"
	HostDuplicate     Kind = "finding." + Kind(detector.DuplicateInstance) // its TPM's counters went back
	HostFailed        Kind = "host.failed"
	HostFacts         Kind = "host.facts"
	HostStale         Kind = "host.stale"
	HostHeld          Kind = "host.held"
	HostApproved      Kind = "host.approved"
	HostLabelled      Kind = "host.labelled"
	HostQuarantined   Kind = "host.quarantined"
	HostReleased      Kind = "host.released"
	HostReenrol       Kind = "host.reenrol"
	HostRemoved       Kind = "host.removed"
	HostReference     Kind = "host.reference"
	HostStepUp        Kind = "host.step-up"
	TokenCreated      Kind = "token.created"

	CredentialAllowed   Kind = "credential.allowed"
	CredentialRefused   Kind = "credential.refused"
	CredentialFault     Kind = "credential.fault"
	CredentialObserved  Kind = "credential.observed"
	CredentialIssued    Kind = "credential.issued"
	CredentialFailed    Kind = "credential.failed"
	CredentialDelivered Kind = "credential.delivered"
	CredentialReplaced  Kind = "credential.replaced"
	CredentialRevoking  Kind = "credential.revoking"
	CredentialEnded     Kind = "credential.ended"
	CredentialBound     Kind = "credential.bound"
	CredentialAdopted   Kind = "credential.adopted"
	CredentialOpened    Kind = "credential.opened"
	LeaseRevoke         Kind = "lease.revoke"

	FindingOpened   Kind = "finding.opened"
	FindingReopened Kind = "finding.reopened"
	FindingClosed   Kind = "finding.closed"
	CanaryIssued    Kind = "canary.issued"
	CanaryRemoved   Kind = "canary.removed"

	OperatorAdded   Kind = "operator.added"
	OperatorRenewed Kind = "operator.renewed"
	OperatorRemoved Kind = "operator.removed"

	PolicyApplied        Kind = "policy.applied"
	ReferenceLearned     Kind = "reference.learned"
	ReferenceAdded       Kind = "reference.added"
	ReferenceApproved    Kind = "reference.approved"
	ReferenceMaintenance Kind = "reference.maintenance"
	ReleaseAdded         Kind = "release.added"
)

// events returns an empty event for each kind.
var events = map[Kind]func(Kind) Event{
	BrokerInitialised: func(Kind) Event { return &Initialised{} },
	AuditEpoch:        func(Kind) Event { return &Epoch{} },
	AuditRepeated:     func(Kind) Event { return &Repeated{} },
	DenialMerged:      func(Kind) Event { return &Merged{} }, RestoreAcknowledged: func(Kind) Event { return &Acknowledged{} },
	HostAdded:  func(Kind) Event { return &Added{} },
	HostJoined: enrolment, HostAdmitted: enrolment, HostPending: enrolment, HostReenrolWanted: enrolment,
	HostDuplicate: func(Kind) Event { return &Duplicate{} },
	HostFailed:    func(Kind) Event { return &Failed{} },
	HostFacts:     func(Kind) Event { return &Facts{} },
	HostStale:     silence, HostHeld: silence,
	HostApproved: change, HostLabelled: change, HostQuarantined: change, HostReleased: change, HostReenrol: change, HostRemoved: change, HostReference: change, HostStepUp: change,
	TokenCreated:      func(Kind) Event { return &Token{} },
	CredentialAllowed: func(Kind) Event { return &Allowed{} },
	CredentialRefused: decision, CredentialFault: decision, CredentialObserved: decision,
	CredentialIssued: outcome, CredentialFailed: outcome, CredentialDelivered: outcome, CredentialReplaced: outcome, CredentialRevoking: outcome, CredentialEnded: outcome,
	CredentialBound:   func(Kind) Event { return &Bound{} },
	CredentialAdopted: func(Kind) Event { return &Adopted{} },
	CredentialOpened:  func(Kind) Event { return &Opened{} },
	LeaseRevoke:       func(Kind) Event { return &Revocation{} },
	FindingOpened:     finding, FindingReopened: finding, FindingClosed: finding,
	CanaryIssued: canary, CanaryRemoved: canary,
	OperatorAdded: operator, OperatorRenewed: operator, OperatorRemoved: operator,
	PolicyApplied:    func(Kind) Event { return &Policy{} },
	ReferenceLearned: reference, ReferenceAdded: reference, ReferenceApproved: reference, ReferenceMaintenance: reference,
	ReleaseAdded: func(Kind) Event { return &Release{} },
}

func enrolment(k Kind) Event { return &Enrolment{As: k} }
func silence(k Kind) Event   { return &Silence{As: k} }
func change(k Kind) Event    { return &Change{As: k} }
func decision(k Kind) Event  { return &Decided{As: k} }
func outcome(k Kind) Event   { return &Outcome{As: k} }
func finding(k Kind) Event   { return &Finding{As: k} }
func canary(k Kind) Event    { return &Canary{As: k} }
func operator(k Kind) Event  { return &Operator{As: k} }
func reference(k Kind) Event { return &Reference{As: k} }

// empty returns an event to decode the kind's detail into, or nil if the kind is unknown.
func (k Kind) empty() Event {
	if of, ok := events[k]; ok {
		return of(k)
	}
	return nil
}

// Kinds returns all kinds, sorted by name.
func Kinds() []Kind { return slices.Sorted(maps.Keys(events)) }
