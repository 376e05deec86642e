package appraise

import (
	"encoding/json"
	"maps"
	"slices"
	"time"

	boot "github.com/countersign/countersign/attestors/boot/appraise"
	"github.com/countersign/countersign/attestors/evidence"
	"github.com/countersign/countersign/attestors/ima"
	imaappraise "github.com/countersign/countersign/attestors/ima/appraise"
	"github.com/countersign/countersign/attestors/process"
)

// Facts are what one request's evidence established, or, where a field says
// so, what the broker knows of the host or has only the agent's word for.
// They are recorded with the decision that was made on them.
type Facts struct {
	At      time.Time        `json:"at"` // of the appraisal
	Host    Host             `json:"host"`
	Program *process.Program `json:"program,omitempty"` // nil where only the host was proven

	Measured *Measured `json:"measured,omitempty"` // the program's, nil without an IMA list
	Releases []string  `json:"releases,omitempty"` // that announced the program's digest under its path

	Subject Subject `json:"subject"`
}

// Recorded are the facts of a program, as they are kept with its leases and
// decisions. Those of its host are kept once, with the host.
type Recorded struct {
	At       time.Time        `json:"at,omitzero"`
	Program  *process.Program `json:"program,omitempty"`
	Measured *Measured        `json:"measured,omitempty"`
	Releases []string         `json:"releases,omitempty"`
}

// Recorded is what is kept of f.
func (f Facts) Recorded() Recorded {
	return Recorded{At: f.At, Program: f.Program, Measured: f.Measured, Releases: f.Releases}
}

// Of are the facts of a recorded program on a host, as it was last appraised.
func (r Recorded) Of(h Host) Facts {
	return Facts{At: r.At, Host: h, Program: r.Program, Measured: r.Measured, Releases: r.Releases}
}

// pcrIMA is extended with each file that the kernel measures.
const pcrIMA = 10

// Digest tells whether what was appraised of a machine is the same as before. Where
// it connects from, its names, and how far a verified IMA list has grown are not part
// of it.
func (h Host) Digest() (evidence.Digest, error) {
	h.Name, h.Labels, h.Address = "", nil, ""
	if h.List != nil {
		list := *h.List
		list.Proven, list.Others, list.OtherExamples = 0, 0, nil
		h.List = &list
		h.PCRs = maps.Clone(h.PCRs)
		delete(h.PCRs, pcrIMA)
		for _, pcr := range list.PCRs {
			delete(h.PCRs, pcr)
		}
	}
	b, err := json.Marshal(h)
	return evidence.Sum(b), err
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

	// Absent unless an event log was appraised and proves them.
	SecureBoot *bool     `json:"secure_boot,omitempty"`
	EventLog   *EventLog `json:"event_log,omitempty"`

	// EventLogProblem says why an event log that was shown gives no facts.
	EventLogProblem string `json:"event_log_problem,omitempty"`

	// Absent unless an IMA list was appraised.
	IMA  *string `json:"ima,omitempty"` // IMAVerified
	List *List   `json:"ima_list,omitempty"`
}

// IMAVerified is the IMA fact of a host whose list was replayed and held.
const IMAVerified = "verified"

// An EventLog is what decisions need to know of a measured boot. Digests are
// lowercase hex of SHA-256, in the order of measurement.
type EventLog struct {
	SecureBootMode     string   `json:"secure_boot_mode,omitempty"` // setup, user, audit or deployed
	FirmwareVersion    *string  `json:"firmware_version,omitempty"`
	KernelCommandLine  *string  `json:"kernel_command_line,omitempty"`  // absent where another reading is possible
	KernelCommandLines []string `json:"kernel_command_lines,omitempty"` // all that may have been a kernel's
	Images             []string `json:"boot_images,omitempty"`          // Authenticode, PCR 4
	Files              []string `json:"boot_files,omitempty"`           // PCR 9
	Authorities        []string `json:"authorities,omitempty"`          // what images were verified by, PCR 7
	PCRs               []int    `json:"pcrs_replayed"`
	// Incomplete are PCRs that were extended by what the logs don't show, or whose
	// list an event that isn't understood keeps from being known: a list of what they
	// hold is not the whole list.
	Incomplete []int `json:"pcrs_incomplete,omitempty"`
	// States says of each quoted PCR what is known of it.
	States []boot.PCR `json:"pcr_states,omitempty"`
	// LinesComplete says that KernelCommandLines are all: nothing in PCR 8 and 12
	// is one under another name.
	LinesComplete bool `json:"kernel_command_lines_complete"`

	Windows *boot.Windows `json:"windows,omitempty"` // of a Windows' log
}

// Understood lists the PCRs that are proven and have no event that the appraisal
// doesn't know.
func (e *EventLog) Understood() []int {
	out := []int{}
	for _, s := range e.States {
		if s.Understood {
			out = append(out, s.Index)
		}
	}
	return out
}

// Limit is the first event of a PCR that isn't understood, in words, or empty.
func (e *EventLog) Limit(pcr int) string {
	for _, s := range e.States {
		if s.Index == pcr && s.Limit != nil {
			return s.Limit.String()
		}
	}
	return ""
}

// CommandLines are all that may have been a kernel's: the one, where it is proven.
func (e *EventLog) CommandLines() []string {
	if e.KernelCommandLine != nil {
		return []string{*e.KernelCommandLine}
	}
	return e.KernelCommandLines
}

// A List is what decisions need to know of an IMA list.
type List struct {
	Proven     int              `json:"proven"` // entries
	Violations int              `json:"violations"`
	Bank       imaappraise.Bank `json:"bank,omitempty"`
	Unexpected int              `json:"unexpected"`         // files that the reference set doesn't allow, and lets be
	Examples   []string         `json:"examples,omitempty"` // of them
	// Others are files that the set doesn't allow and doesn't hold: any user may have run them.
	Others        int      `json:"others,omitempty"`
	OtherExamples []string `json:"other_examples,omitempty"`
	PCRs          []int    `json:"pcrs,omitempty"` // that the list extends beside IMA's own
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

// describe writes down what k knows for decisions.
func (k *Known) describe(h *Host) {
	if f := k.facts; f != nil {
		e := &EventLog{SecureBootMode: f.SecureBootMode, FirmwareVersion: f.FirmwareVersion, KernelCommandLine: f.KernelCommandLine,
			KernelCommandLines: f.KernelCommandLines, PCRs: f.PCRsReplayed, States: f.PCRs, Incomplete: slices.Concat(f.PCRsUnreplayed, f.PCRsUnexplained), Windows: f.Windows, LinesComplete: f.LinesComplete}
		for _, p := range f.PCRs {
			if p.Proven && !f.Complete(p.Index) {
				e.Incomplete = append(e.Incomplete, p.Index)
			}
		}
		for _, c := range f.Components {
			switch c.PCR {
			case pcrImages:
				e.Images = append(e.Images, c.SHA256.String())
			case pcrFiles:
				e.Files = append(e.Files, c.SHA256.String())
			}
		}
		for _, a := range f.Authorities {
			e.Authorities = append(e.Authorities, a.SHA256.String())
		}
		e.bound()
		h.SecureBoot, h.EventLog = f.SecureBoot, e
	}
	h.EventLogProblem = k.problem
	if s := k.ima; s != nil && s.Entries > 0 {
		verified := IMAVerified
		h.IMA = &verified
		h.List = &List{Proven: s.Entries, Violations: s.Violations, Bank: s.Bank, Unexpected: k.count, Examples: k.unexpected,
			Others: k.othersSeen, OtherExamples: k.others}
		for _, pcr := range s.PCRs() {
			if pcr != ima.DefaultPCR {
				h.List.PCRs = append(h.List.PCRs, pcr)
			}
		}
	}
}

const (
	pcrImages = 4
	pcrFiles  = 9

	maxFacts = 256  // in a list
	maxLine  = 4096 // bytes of a kernel command line; Linux takes as many at most

	maxWindows = 128 << 10 // bytes of its facts as JSON; a machine with 215 modules has 32,000
)

// bound keeps what is written down with each decision short. What is cut off
// makes its PCR incomplete, so that nothing passes for the whole.
func (e *EventLog) bound() {
	cut := func(list []string, pcr int) []string {
		if len(list) <= maxFacts {
			return list
		}
		e.Incomplete = append(e.Incomplete, pcr)
		return list[:maxFacts]
	}
	e.Images, e.Files, e.Authorities = cut(e.Images, pcrImages), cut(e.Files, pcrFiles), cut(e.Authorities, 7)
	short := make([]string, 0, min(len(e.KernelCommandLines), shown))
	for _, line := range e.KernelCommandLines {
		if len(line) > maxLine || len(short) == shown {
			e.LinesComplete, e.KernelCommandLine = false, nil
			continue
		}
		short = append(short, line)
	}
	e.KernelCommandLines = short
	// Of Windows a part would say less that weakens, so it is all or nothing.
	if b, err := json.Marshal(e.Windows); err != nil || len(b) > maxWindows {
		e.Windows, e.Incomplete = nil, append(e.Incomplete, 12, 13)
	}
}
