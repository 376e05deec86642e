package detect

import (
	"slices"

	"github.com/countersign/countersign/broker/api/detector"
)

// A Name is a detector's.
type Name = detector.Name

// The detectors.
const (
	ForeignSource       = detector.ForeignSource
	UseAfterRevoke      = detector.UseAfterRevoke
	UnmatchedLogin      = detector.UnmatchedLogin
	SharedStaticAccount = detector.SharedStaticAccount
	OutOfBandRead       = detector.OutOfBandRead
	DuplicateInstance   = detector.DuplicateInstance
	SubjectDrift        = detector.SubjectDrift
	SameSecret          = detector.SameSecret
	HumanUse            = detector.HumanUse
	Dormant             = detector.Dormant
	SilentSensor        = detector.SilentSensor
	Canary              = detector.Canary
)

// A Severity is how much a finding matters.
type Severity string

// Severities, from the least.
const (
	Low      Severity = "low"
	Medium   Severity = "medium"
	High     Severity = "high"
	Critical Severity = "critical"
)

// Rank orders severities, from the least.
func (s Severity) Rank() int { return slices.Index([]Severity{Low, Medium, High, Critical}, s) }

// A Response is what is done about a finding.
type Response string

// Responses, from the least. All but Alert need a completed login as evidence.
const (
	Alert      Response = "alert"
	StepUp     Response = "step-up" // the next request needs fresh evidence in full
	Revoke     Response = "revoke"
	Quarantine Response = "quarantine"
)

// Responses are all of them.
var Responses = []Response{Alert, StepUp, Revoke, Quarantine}

// An Entry of the catalogue says what a detector is.
type Entry struct {
	Name     Name
	Severity Severity
	// NHI is its risk in OWASP's Non-Human Identities Top 10 of 2025, by number.
	NHI string
	// Sees and Fooled are for people: what it takes to be seen, and what escapes it
	// or looks like it.
	Sees, Fooled string
	Response     Response // unless the operator chose another
}

// Catalogue is all detectors, in the order in which they are documented.
var Catalogue = []Entry{
	{ForeignSource, High, "NHI2", "a completed login with a credential that was made for one program, from an address that was none of its host's while it lived, and none of a declared NAT or pooler",
		"use on the host itself, or behind its NAT or pooler; a log without addresses; a login from the target's own machine; who can write to the log, or has an SSH CA or a Windows domain of his own that a target trusts and uses the same names, can have the lease revoked", Revoke},
	{UseAfterRevoke, High, "NHI1", "a completed login more than 45 s after the credential's confirmed end or its expiry, by the time of the login",
		"a session that was opened before; clocks that are further apart than 45 s", Alert},
	{UnmatchedLogin, High, "NHI2", "a completed login by an account that only the broker hands out (named as governed, or with a user name of a governed role of Vault's database engine) and that the ledger doesn't know",
		"accounts that nobody named; a ledger that is behind: it is judged when the ledger has caught up", Alert},
	{SharedStaticAccount, Medium, "NHI9", "a completed login with an account whose password lies in Vault, while more than one program holds it, or from an address where none does",
		"two programs on one host where only one of them asks the broker; with an account of KV, a database that its scope's audience doesn't name", Alert},
	{OutOfBandRead, High, "NHI2", "an answer of Vault that gave a secret of a governed path to somebody who is not the broker; a credential's file that another program than its own opened, where the agent is told to look",
		"a reader with the broker's own identity; a path that no scope names; an answer that Vault wrapped; root on the host", Alert},
	{DuplicateInstance, High, "NHI9", "one host in two places: an invocation or boot that is issued to, or whose credentials are used from the host's addresses, after a later one was",
		"clones that never run at the same time", Quarantine},
	{SubjectDrift, Medium, "NHI5", "a credential issued to another exe, unit, user or parent than any before for this scope on this host, or to a digest that no release announced; or on a machine whose Secure Boot went off or whose kernel command line is new, unless the boot matched an approved reference set",
		"the first program of a scope on a host; a program that changes what it does, not what it is; a boot without a measured log", Alert},
	{SameSecret, Medium, "NHI9", "two accounts or scopes with one secret, by the broker's keyed hash of it",
		"secrets that differ in a byte, as in a number at their end", Alert},
	{HumanUse, Medium, "NHI10", "an interactive logon, or a database client for people (psql, SSMS and their like), with a program's account",
		"a client that gives itself another name; a program that gives itself theirs", Alert},
	{Dormant, Low, "NHI5", "a program that used none of its credentials for the whole life of one, while the logs that would show it were read",
		"sessions that began before the logs did and never show again", Alert},
	{SilentSensor, Medium, "NHI1", "a log that is empty, or ends long before the others while it used not to; one that was removed or truncated before it was read, waits long for the broker, or whose sender was turned away: what it would show is not known, so nothing of it is called clean",
		"a log that is written to but no longer of logins", Alert},
	{Canary, Critical, "NHI2", "any appearance of a canary's names, a failed login too: nobody was given it",
		"who recognises the canary", Alert},
}

// Of is a detector's entry.
func Of(n Name) Entry {
	for _, e := range Catalogue {
		if e.Name == n {
			return e
		}
	}
	return Entry{Name: n, Severity: Medium, Response: Alert}
}
