package appraise

import (
	"time"

	"github.com/countersign/countersign/attestors/evidence"
	"github.com/countersign/countersign/attestors/process"
)

// Facts are what one request's evidence established, or, where a field says
// so, what the broker knows of the host or has only the agent's word for.
// They are recorded with the decision that was made on them.
type Facts struct {
	At      time.Time        `json:"at"` // of the appraisal
	Host    Host             `json:"host"`
	Program *process.Program `json:"program,omitempty"` // nil where only the host was proven
	Subject Subject          `json:"subject"`
}

// Host is one machine as it was appraised.
type Host struct {
	ID        string            `json:"id"`
	Name      string            `json:"name"`                // operators' word
	Labels    map[string]string `json:"labels,omitempty"`    // operators' word
	Tier      string            `json:"tier"`                // TierCertified or TierKnown
	Reference string            `json:"reference,omitempty"` // the set that the quoted PCRs match; empty: none was given
	Address   string            `json:"address"`             // the connection's peer
	Boot      string            `json:"boot"`                // agent's word: kernel's boot id
	OS        string            `json:"os,omitempty"`        // agent's word

	PCRs map[int]evidence.Digest `json:"pcrs"` // SHA-256 bank, quoted

	// Absent until an event log or an IMA list is appraised.
	SecureBoot *bool   `json:"secure_boot,omitempty"`
	IMA        *string `json:"ima,omitempty"`
}

// Tiers: whether the EK's certificate chains to the configured roots.
const (
	TierCertified = "certified"
	TierKnown     = "known"
)

// Subject is what the broker learned about the subject beyond this request.
type Subject struct {
	Risk *int64 `json:"risk,omitempty"` // 0–100, from findings; absent without any
}
