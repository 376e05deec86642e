package renew

import (
	"time"

	"github.com/countersign/countersign/attestors/process"
)

// Status is one credential, as `countersign-agent status` shows it.
type Status struct {
	Name     string    `json:"name"`
	Scope    string    `json:"scope"`
	State    string    `json:"state"` // waiting, obtaining, in force, ended, withheld, observed or failing
	Program  string    `json:"program,omitempty"`
	Lease    string    `json:"lease,omitempty"`
	Expires  time.Time `json:"expires,omitzero"`
	Replace  time.Time `json:"replace,omitzero"`
	Problem  string    `json:"problem,omitempty"`
	Failures int       `json:"failures,omitempty"`
}

// Status says how the credential stands.
func (r *Runner) Status() Status {
	r.mu.Lock()
	defer r.mu.Unlock()
	s := Status{Name: r.cfg.Name, Scope: r.cfg.Scope, State: "waiting", Problem: r.problem, Failures: r.failures}
	if r.unseen != "" && (r.lease == nil || r.lease.holds()) {
		s.Problem = "the program can't be seen: " + r.unseen
	}
	if r.program != nil {
		s.Program = r.program.Instance().String()
		s.State = "obtaining"
	}
	switch {
	case r.lease.holds():
		s.State, s.Lease, s.Expires, s.Replace = "in force", r.lease.ID, r.lease.Expires, r.lease.Replace
	case r.lease != nil:
		s.State = "ended" // Problem says what is left of it
	case r.withheld != nil:
		s.State, s.Lease, s.Expires = "withheld", r.withheld.ID, r.withheld.Expires
	case r.observed:
		s.State = "observed"
	case r.problem != "":
		s.State = "failing"
	}
	return s
}

// Held is the lease whose credential stands in the files, "" for none, and the
// program as it was last seen, nil for none. A credential that is just being
// delivered counts when there is no other.
func (r *Runner) Held() (lease string, program *process.Program) {
	r.mu.Lock()
	defer r.mu.Unlock()
	switch {
	case r.lease.holds():
		lease = r.lease.ID
	case r.pending != nil:
		lease = r.pending.ID
	}
	return lease, r.program
}
