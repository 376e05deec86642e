// Package detector has the names of what finds misuse: findings bear them, and so do
// records of the audit log. What each detector sees is in compensating/detect.
package detector

// A Name is a detector's, for good.
type Name string

// The detectors.
const (
	ForeignSource       Name = "foreign-source"
	UseAfterRevoke      Name = "use-after-revoke"
	UnmatchedLogin      Name = "unmatched-login"
	SharedStaticAccount Name = "shared-static-account"
	OutOfBandRead       Name = "out-of-band-read"
	DuplicateInstance   Name = "duplicate-instance"
	SubjectDrift        Name = "subject-drift"
	SameSecret          Name = "same-secret"
	HumanUse            Name = "human-use"
	Dormant             Name = "dormant"
	SilentSensor        Name = "silent-sensor"
	Canary              Name = "canary"
)

// All are all of them, in the order in which they are documented.
var All = []Name{
	ForeignSource, UseAfterRevoke, UnmatchedLogin, SharedStaticAccount, OutOfBandRead, DuplicateInstance,
	SubjectDrift, SameSecret, HumanUse, Dormant, SilentSensor, Canary,
}
