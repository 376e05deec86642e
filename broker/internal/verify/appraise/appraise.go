// Package appraise turns what a host sent into facts, or says why it is false.
//
// It trusts the inventory for who a host is, and of the evidence only what the
// TPM signed over this request, this connection and this nonce. What it
// promises is its result type: a Verified can be made here alone, so whatever
// asks for one can't be called on evidence that nobody looked at.
package appraise

import (
	"errors"
	"fmt"
	"time"

	"github.com/countersign/countersign/attestors/evidence"
	"github.com/countersign/countersign/attestors/process"
	"github.com/countersign/countersign/attestors/tpm"
	"github.com/countersign/countersign/attestors/tpm/appraise"
	"github.com/countersign/countersign/broker/internal/state/inventory"
)

// A Bundle is one request's evidence, as it came.
type Bundle struct {
	Binding evidence.Binding // what the quote has to commit to
	Quote   tpm.Quote
	Seen    *appraise.Counters // the highest counters known when the nonce was given
	Program []byte             // the process attestor's encoding; nil: only the host
	Logs    Logs
	Known   *Known // of this host's logs; nil: nothing
	Boot    string // agent's word
	OS      string // agent's word
	Address string // the connection's peer
}

// A Verified is appraised evidence. The zero value verifies nothing.
type Verified struct {
	facts    *Facts
	counters appraise.Counters
	known    *Known
	// reference is what known was held against.
	reference *Reference
	releases  Releases
}

// Known is what is known of the host's logs now.
func (v Verified) Known() *Known { return v.known }

// Facts are what the evidence established; nil on the zero value.
func (v Verified) Facts() *Facts { return v.facts }

// Counters are the TPM's, as quoted.
func (v Verified) Counters() appraise.Counters { return v.counters }

// Checks of this package, beside those of attestors/tpm/appraise.
const (
	CheckCounters  = "tpm-counters"
	CheckReference = "reference"
)

// ErrProgram says that program evidence can't be understood: an agent of
// another version, or one that could not see its program. It is not untrue.
var ErrProgram = errors.New("program evidence")

// Releases says which releases announced a file, by its path and digest.
type Releases func(path, digest string) []string

// A Basis is what operators said that evidence is held against.
type Basis struct {
	Reference *Reference // the set that the host has to match; nil: none
	Releases  Releases   // nil: there are none
}

// Appraise verifies b as evidence of the host h. An error is a
// *evidence.Rejected where the evidence says no, and ErrResync or ErrProgram
// where it says nothing.
func Appraise(b Bundle, h inventory.Host, basis Basis, now time.Time) (Verified, error) {
	ak, err := appraise.ParseAK(h.AKPublic)
	if err != nil {
		return Verified{}, err
	}
	quoted, err := ak.VerifyQuote(b.Quote, b.Binding.ExtraData(), tpm.DefaultPCRs())
	if err != nil {
		return Verified{}, err
	}
	if b.Seen != nil && quoted.Counters.Before(*b.Seen) {
		return Verified{}, &evidence.Rejected{Check: CheckCounters, Detail: fmt.Sprintf(
			"the TPM's counters went back (reset %d, restart %d, clock %d; seen before: %d, %d, %d): a copy or a reverted snapshot; "+
				"`countersign host reenrol` after looking into it", quoted.Counters.ResetCount, quoted.Counters.RestartCount, quoted.Counters.Clock,
			b.Seen.ResetCount, b.Seen.RestartCount, b.Seen.Clock)}
	}
	known, err := appraiseLogs(b.Logs, b.Boot, quoted.Counters.ResetCount, quoted.PCRs, b.Known)
	if err != nil {
		return Verified{}, err
	}
	if err := basis.Reference.match(known, quoted.PCRs); err != nil {
		return Verified{}, err
	}
	f := &Facts{At: now, Host: Host{
		ID: h.ID, Name: h.Name, Labels: h.Labels, Tier: h.Tier, Reference: h.Reference, Address: b.Address, Boot: b.Boot, OS: b.OS, PCRs: quoted.PCRs,
	}}
	known.describe(&f.Host)
	v := Verified{facts: f, counters: quoted.Counters, known: known, reference: basis.Reference, releases: basis.Releases}
	if b.Program != nil {
		return v.WithProgram(b.Program)
	}
	return v, nil
}

// WithProgram is v for one more program of the same quote; ErrProgram where its
// evidence can't be understood.
func (v Verified) WithProgram(encoded []byte) (Verified, error) {
	p, err := process.Parse(encoded)
	if err != nil {
		return Verified{}, fmt.Errorf("%w: %w", ErrProgram, err)
	}
	if p.Boot != v.facts.Host.Boot {
		return Verified{}, fmt.Errorf("%w: the program ran in another boot than the host says it is in", ErrProgram)
	}
	f := *v.facts
	f.Program, f.Measured = &p, v.known.measured(&p, v.reference)
	if v.releases != nil {
		f.Releases = v.releases(p.Main().Path, "sha256:"+p.Main().SHA256.String())
	}
	v.facts = &f
	return v, nil
}

// WithRisk is v with what is open against its subject; nil: nothing is.
func (v Verified) WithRisk(risk *int64) Verified {
	f := *v.facts
	f.Subject.Risk = risk
	v.facts = &f
	return v
}
