package appraise

import (
	"fmt"
	"slices"

	"github.com/countersign/countersign/attestors/boot"
	"github.com/countersign/countersign/attestors/evidence"
)

// Facts are what the quote proves of a boot. A fact that isn't proven is absent,
// which is not the same as false.
type Facts struct {
	PCRsReplayed    []int `json:"pcrs_replayed"`              // the logs lead to the quoted value
	PCRsUnused      []int `json:"pcrs_unused,omitempty"`      // quoted as never extended, which the logs agree with
	PCRsUnreplayed  []int `json:"pcrs_unreplayed,omitempty"`  // extended after boot by what no log shows: no facts from these
	PCRsUnexplained []int `json:"pcrs_unexplained,omitempty"` // quoted as extended, and no log speaks of them

	// PCRs says of each quoted PCR what is known of it, in order.
	PCRs []PCR `json:"pcrs,omitempty"`

	// Final since the separator.
	FirmwareVersion *string                       `json:"firmware_version,omitempty"`
	SecureBoot      *bool                         `json:"secure_boot,omitempty"`
	SecureBootMode  string                        `json:"secure_boot_mode,omitempty"` // setup, user, audit or deployed
	SecureBootNotes []string                      `json:"secure_boot_notes,omitempty"`
	Databases       map[string]*SignatureDatabase `json:"signature_databases,omitempty"` // PK, KEK, db, dbx, and dbt and dbr where measured

	// Complete for each PCR that replayed or is unused, but root may have added to
	// them after boot: hold every member against what is allowed.
	Authorities        []Authority       `json:"authorities,omitempty"` // what images were verified by, with shim's variables
	Components         []Component       `json:"boot_components,omitempty"`
	MOK                []evidence.Digest `json:"mok,omitempty"`                  // PCR 14 in order: what shim's variables held, or Windows' own events
	GRUBCommands       []string          `json:"grub_commands,omitempty"`        // everything that GRUB measured as text
	KernelConfig       []string          `json:"kernel_config,omitempty"`        // what systemd-boot and its stub measured as text
	Userspace          []Record          `json:"userspace,omitempty"`            // what systemd measured, where its log shows it
	KernelCommandLines []string          `json:"kernel_command_lines,omitempty"` // all that may have been a kernel's, if LinesComplete
	// LinesComplete says that everything in PCR 8 and 12 could be read: nothing
	// there is a command line under another name.
	LinesComplete bool `json:"kernel_command_lines_complete"`

	// There only where the PCRs leave no other reading, by a boot loader that the
	// components must show: root can extend what a loader that never ran would have.
	KernelCommandLine *string  `json:"kernel_command_line,omitempty"`
	SbatLevel         *string  `json:"sbat_level,omitempty"`
	Windows           *Windows `json:"windows,omitempty"`

	Asserted Asserted `json:"asserted"`
}

// A PCR is what the appraisal made of one quoted PCR.
type PCR struct {
	Index  int  `json:"pcr"`
	Events int  `json:"events"` // that the event log has of it
	Proven bool `json:"proven"` // the logs lead to the quoted value, or it was never extended

	// Understood says that the PCR is proven and each of its events is one that the
	// reader knows. In PCR 0 to 6 it believes the events' types, which are the host's
	// word: it is for people, and for a policy that wants nothing odd; no fact rests
	// on it.
	Understood    bool     `json:"understood"`
	NotUnderstood int      `json:"not_understood,omitempty"` // events
	Facts         []string `json:"facts,omitempty"`          // that rest on it
	Limit         *Limit   `json:"limit,omitempty"`          // the first that isn't understood

	withheld bool // its list is not given: an event could be a member of it, or none
}

// A Limit is an event that isn't understood, and keeps facts of its PCR from being
// known.
type Limit struct {
	Event int    `json:"event,omitempty"` // place in the log; 0: the lack of one
	Type  string `json:"type,omitempty"`  // as the host has it
	Why   string `json:"why"`
}

func (l Limit) String() string {
	if l.Event == 0 {
		return l.Why
	}
	return fmt.Sprintf("event %d (%s): %s", l.Event, l.Type, l.Why)
}

// A SignatureDatabase is one of Secure Boot's variables.
type SignatureDatabase struct {
	SHA256       evidence.Digest   `json:"sha256"` // of the variable's content
	Certificates []Certificate     `json:"certificates,omitempty"`
	HashCount    int               `json:"hash_count"`
	Malformed    bool              `json:"malformed,omitempty"` // its lists end in bytes that are none
	Hashes       []evidence.Digest `json:"-"`
}

// Contains says whether the database lists a SHA-256 image digest.
func (db *SignatureDatabase) Contains(image evidence.Digest) bool {
	return db != nil && slices.Contains(db.Hashes, image)
}

// A Certificate is known by its SHA-256. Its subject is empty where Go can't parse
// it, as with some that are in real firmware, or where it is longer than any.
type Certificate struct {
	SHA256  evidence.Digest `json:"sha256"`
	Subject string          `json:"subject,omitempty"`
}

// An Authority is one entry that images were verified by, or a variable that shim
// measures with them.
type Authority struct {
	Variable    string          `json:"variable"`
	SHA256      evidence.Digest `json:"sha256"` // as measured: the variable's GUID, name and content
	Certificate *Certificate    `json:"certificate,omitempty"`
}

// A Component is one measured object: an image's Authenticode digest in PCR 2 and
// 4, a section's content in PCR 11, else a file's or a blob's digest.
type Component struct {
	PCR    int             `json:"pcr"`
	Kind   string          `json:"kind"`
	SHA256 evidence.Digest `json:"sha256"`
}

// Kinds follow from the PCR alone, or from a section name's digest.
const (
	KindDriver      = "driver"      // PCR 2: option ROMs and drivers from cards
	KindApplication = "application" // PCR 4: shim, GRUB, a boot manager, a kernel, a unified kernel image
	KindFile        = "file"        // PCR 9: what GRUB read, and what a kernel's stub was given
	KindSection     = "section"     // PCR 11: of a unified kernel image, followed by its name where its digest tells
	KindConfig      = "config"      // PCR 12: what was given to a unified kernel image, or Windows' own events
	KindUserspace   = "userspace"   // PCR 9 and 11 to 13: what systemd's log has for these, but for phases of the boot
	KindExtension   = "extension"   // PCR 13: system extensions, or Windows' own events
)

// A Record is what systemd measured. Text is empty unless the digest proves it.
type Record struct {
	PCR    int             `json:"pcr"`
	SHA256 evidence.Digest `json:"sha256"`
	Text   string          `json:"text,omitempty"`
}

// Asserted is the host's word, there to be read by people. Policy must not use it.
type Asserted struct {
	Padding    int      `json:"padding,omitempty"` // bytes behind the last event
	Components []string `json:"boot_components,omitempty"`
	MOK        []string `json:"mok,omitempty"`
}

// phases are the texts that systemd measures into PCR 11 as it goes on.
var phases = []string{"enter-initrd", "leave-initrd", "sysinit", "ready", "shutdown", "final"}

// userspace takes what was proven of systemd's log. Root may have moved there the
// last of a PCR's events, so what isn't plainly systemd's own is a component too.
func (f *Facts) userspace(later []boot.Measurement) {
	for _, m := range later {
		r := Record{PCR: m.PCR, SHA256: evidence.Digest(m.SHA256)}
		if m.Text != "" && r.SHA256 == evidence.Sum([]byte(m.Text)) {
			r.Text = m.Text
		}
		f.Userspace = append(f.Userspace, r)
		if m.PCR != pcrSystem && (m.PCR != pcrSections || !slices.Contains(phases, r.Text)) {
			f.Components = append(f.Components, Component{PCR: m.PCR, Kind: KindUserspace, SHA256: r.SHA256})
			f.Asserted.Components = append(f.Asserted.Components, m.Kind)
		}
	}
}

// Complete reports whether everything that extended a PCR is known, and listed: only
// then is a list of what it holds the whole list.
func (f *Facts) Complete(pcr int) bool {
	if slices.ContainsFunc(f.PCRs, func(p PCR) bool { return p.Index == pcr && p.withheld }) {
		return false
	}
	return f.proven(pcr)
}

func (f *Facts) proven(pcr int) bool {
	return slices.Contains(f.PCRsReplayed, pcr) || slices.Contains(f.PCRsUnused, pcr)
}

// report says of each quoted PCR what became of it.
func (b *bootLog) report(pcrs map[int]evidence.Digest, f *Facts) {
	for pcr := range b.pcr {
		if _, quoted := pcrs[pcr]; !quoted || pcr == pcrIMA {
			continue
		}
		for i := range b.pcr[pcr] {
			m := &b.pcr[pcr][i]
			why := ""
			switch {
			case pcr == pcrSecureBoot: // whose reader has looked at each event
			case pcr < firmwarePCRs:
				why = strange(m)
			case !m.Type.Known() && m.opaque():
				why = typeUnknown
			}
			if why != "" {
				b.limit(pcr, m.Event, why)
			}
		}
		s := b.state[pcr]
		s.Index, s.Events, s.Proven = pcr, len(b.pcr[pcr]), f.proven(pcr)
		s.Understood = s.Proven && s.Limit == nil
		slices.Sort(s.Facts)
		f.PCRs = append(f.PCRs, s)
	}
}
