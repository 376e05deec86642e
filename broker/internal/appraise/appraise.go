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
	"strings"
	"time"

	"github.com/countersign/countersign/attestors/evidence"
	"github.com/countersign/countersign/attestors/process"
	"github.com/countersign/countersign/attestors/tpm"
	"github.com/countersign/countersign/attestors/tpm/appraise"
	"github.com/countersign/countersign/broker/internal/inventory"
)

// A Bundle is one request's evidence, as it came.
type Bundle struct {
	Binding evidence.Binding // what the quote has to commit to
	Quote   tpm.Quote
	Seen    *appraise.Counters // the highest counters known when the nonce was given
	Program []byte             // the process attestor's encoding; nil: only the host
	Boot    string             // agent's word
	OS      string             // agent's word
	Address string             // the connection's peer
}

// A Verified is appraised evidence. The zero value verifies nothing.
type Verified struct {
	facts    *Facts
	counters appraise.Counters
}

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

// Appraise verifies b as evidence of the host h. The reference is the set that
// h has to match, nil where it has none. An error is a *evidence.Rejected: the
// evidence says no.
func Appraise(b Bundle, h inventory.Host, reference []inventory.Reference, now time.Time) (Verified, error) {
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
	f := &Facts{At: now, Host: Host{
		ID: h.ID, Name: h.Name, Labels: h.Labels, Tier: h.Tier, Address: b.Address, Boot: b.Boot, OS: b.OS, PCRs: quoted.PCRs,
	}}
	if h.Reference != "" {
		if err := match(reference, quoted.PCRs); err != nil {
			return Verified{}, err
		}
		f.Host.Reference = h.Reference
	}
	if b.Program != nil {
		return Verified{facts: f, counters: quoted.Counters}.WithProgram(b.Program)
	}
	return Verified{facts: f, counters: quoted.Counters}, nil
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
	f.Program = &p
	return Verified{facts: &f, counters: v.counters}, nil
}

// match holds the quoted values against every version of a set.
func match(versions []inventory.Reference, pcrs map[int]evidence.Digest) error {
	var newest []string
	for _, r := range versions {
		diffs := r.Mismatch(pcrs)
		if len(diffs) == 0 {
			return nil
		}
		if newest == nil {
			newest = diffs
		}
	}
	name := "(none)"
	if len(versions) > 0 {
		name = versions[0].Name
	}
	return &evidence.Rejected{Check: CheckReference, Detail: fmt.Sprintf("reference set %s: %s", name, strings.Join(newest, "; "))}
}
