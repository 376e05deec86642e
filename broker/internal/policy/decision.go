package policy

import (
	"time"

	"github.com/countersign/countersign/broker/api/event"
	"github.com/countersign/countersign/broker/internal/verify/appraise"
	"github.com/countersign/countersign/internal/bounded"
)

// A Scope is one credential that subjects may earn.
type Scope struct {
	Name        string
	Description string
	Owner       string
	Observe     bool // decide and record, issue nothing
	Audience    []string
	Reprove     time.Duration // how often host and program are proven again
	Grace       time.Duration // how long a host may be silent after that
	Host        HostSelector
	Process     ProcessSelector
	When        string // CEL; empty: no condition

	Kind    string // of its credential: the name of a Kind
	Source  Source // settings for the issuer
	TTL     time.Duration
	Overlap time.Duration // the old credential lives on this long after a rotation

	compiled compiled // of When and Process.Mappings
}

// A HostSelector's set fields must all hold.
type HostSelector struct {
	Labels     map[string]string
	Tier       []string // any of them
	SecureBoot *bool
	Reference  string
	IMA        string

	// Of what was measured, everything has to be among these.
	BootImages         []string // Authenticode SHA-256, lowercase hex
	KernelCommandLines []string // * is any run of characters that aren't spaces
}

// A ProcessSelector's set fields must all hold; an empty one is refused by
// Parse.
type ProcessSelector struct {
	User        string
	Unit        string
	Exe         string
	SHA256      []string // any of them, lowercase hex
	Release     string   // announced the exe's digest, under its path
	BeforeStart bool     // the unit may have it while it starts

	// Mappings are globs of the files that may be mapped executable beside the
	// exe; none: the system's libraries and the program's own.
	Mappings []string
}

// An Outcome is what a scope says of one subject. Refused and Fault are never
// mixed up: a selector that could not be evaluated refuses nobody.
type Outcome string

const (
	Allowed Outcome = "allowed"
	Refused Outcome = "refused" // every selector was evaluated, and one said no
	Fault   Outcome = "fault"   // unknown scope, absent fact, CEL error
)

// A Selector is one condition of a scope and what it saw.
type Selector struct {
	Name   string `json:"name"` // as "process.unit" or "when"
	Wanted string `json:"wanted"`
	Saw    string `json:"saw"`
	Result string `json:"result"` // "pass", "fail", or "absent"
}

// A Result is the outcome of Evaluate.
type Result struct {
	Scope     string     `json:"scope"`
	Outcome   Outcome    `json:"outcome"`
	Selectors []Selector `json:"selectors"`
	Policy    int64      `json:"policy"`           // version of the set
	Reason    string     `json:"reason,omitempty"` // in words, for Refused and Fault
}

// Event returns the result for the audit log, where what a host says of itself is cut
// short.
func (r Result) Event() event.Decision {
	d := event.Decision{Outcome: string(r.Outcome), Policy: r.Policy}
	d.Scope, d.Reason = bounded.Text(r.Scope, maxWord), bounded.Text(r.Reason, maxSaw)
	for _, s := range r.Selectors {
		s.Saw = bounded.Text(s.Saw, maxSaw)
		d.Selectors = append(d.Selectors, event.Selector(s))
	}
	return d
}

// A Decision is a Result on verified evidence for one request. Only
// Set.Decide makes one; the zero value allows nothing.
type Decision struct {
	result Result
	scope  *Scope
	facts  appraise.Facts
}

// Result is what was decided, and why.
func (d Decision) Result() Result { return d.result }

// Allows says whether a credential may be issued on this decision.
func (d Decision) Allows() bool { return d.scope != nil && d.result.Outcome == Allowed }

// Scope is what was decided on; nil where there is no such scope.
func (d Decision) Scope() *Scope { return d.scope }

// Facts are what was decided from.
func (d Decision) Facts() appraise.Facts { return d.facts }
