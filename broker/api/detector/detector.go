// Package detector lists the names of the watch's detectors, which findings and audit
// records contain. Package compensating/detect describes and implements them.
package detector

// A Name identifies a detector. The names don't change.
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

// All lists the detectors in the order of the documentation.
var All = []Name{
	ForeignSource, UseAfterRevoke, UnmatchedLogin, SharedStaticAccount, OutOfBandRead, DuplicateInstance,
	SubjectDrift, SameSecret, HumanUse, Dormant, SilentSensor, Canary,
}
