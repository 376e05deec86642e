// Package appraise is the broker's side of a measured boot: it replays a host's
// event log against quoted PCRs and says what they prove of the boot.
//
// It trusts the quoted values, which the TPM signed, and that firmware begins
// each PCR's chain before anything else runs. The log is the host's word: root
// there may have rewritten it, and may extend any PCR after boot.
//
// What a quote proves. A PCR's value proves which digests were extended into it,
// in which order, and nothing else: not an event's type, and its data only where
// the digest is the hash of the data. So everything here is told apart by digest,
// by what the digest is the hash of, by PCR and by place before the PCR's
// separator, which firmware extends into PCR 0 to 7 before it hands over. An
// event's type can only take a fact away, never make one.
//
// Each PCR is judged by itself. Replay proves it, whatever its events mean. An
// event that isn't understood is named beside its PCR, and takes with it the facts
// that it could hide or fake, and no others: firmware writes odd events, and a
// refusal of the whole log would help nobody.
//
// What firmware measured before a separator is final. What stands
// behind one, and all of PCR 8 and up, can be added to by root after boot, but
// never taken from: such facts are lists that lack nothing and may hold too much.
// A policy must hold every member of such a list against what it allows, never
// look for one member, and do so only where the list's PCRs replayed or are
// unused: root can leave all that extended a PCR from 8 up out of the log. Where
// one value is wanted, as of the kernel's command line, there is a fact only if the
// PCRs leave no other reading.
//
// A kernel that was started by kexec is measured by nothing here, and firmware
// that lies can't be seen: PCR 0 is what it says of itself.
package appraise

import (
	"bytes"
	"crypto/sha256"
	"fmt"
	"slices"

	"github.com/countersign/countersign/attestors/boot"
	"github.com/countersign/countersign/attestors/evidence"
)

const (
	CheckStructure evidence.Check = "event-log-structure" // the log isn't one that firmware writes
	CheckReplay    evidence.Check = "event-log-replay"    // its digests don't lead to the quoted PCRs
)

func reject(check evidence.Check, format string, args ...any) error {
	return &evidence.Rejected{Check: check, Detail: fmt.Sprintf(format, args...)}
}

// A measurement is an event that extended a PCR.
type measurement struct {
	*boot.Event
	digest evidence.Digest

	// proven are the bytes that the digest is the hash of, or nil where the log
	// doesn't hold them. They are the event's data, or in PCR 0 to 7 the data less its
	// last byte: shim up to 15 measures so, and firmware that leaves out a text's NUL.
	// No two byte strings have one digest, so whatever is read of proven, and of
	// nothing else, is the same in every log that replays.
	proven []byte
}

func newMeasurement(e *boot.Event, digest evidence.Digest) measurement {
	m := measurement{Event: e, digest: digest}
	n := len(e.Data)
	switch {
	case digest == evidence.Sum(e.Data):
		m.proven = e.Data[:n:n]
		if m.proven == nil {
			m.proven = []byte{}
		}
	case n > 0 && e.PCR < firmwarePCRs && digest == evidence.Sum(e.Data[:n-1]):
		m.proven = e.Data[: n-1 : n-1]
	}
	return m
}

// opaque reports whether the log doesn't hold what the event measured.
func (m *measurement) opaque() bool { return m.proven == nil }

// PCRs with a rule of their own.
const (
	firmwarePCRs = 8  // 0 to 7 belong to the firmware, and end in a separator
	pcrIMA       = 10 // IMA's, and replayed by it
)

// Appraise holds a log against the quoted SHA-256 PCRs. userspace is systemd's own
// log, or empty where there is none; like the event log it is read after the
// quote. PCRs that weren't quoted prove nothing, so there are no facts from them.
//
// Only a log that can't be parsed, and one that doesn't replay to the quoted value
// of a PCR that it covers, is refused; the error is always an *evidence.Rejected.
// An event that isn't understood limits the facts of its own PCR: see [Facts.PCRs].
func Appraise(log, userspace []byte, pcrs map[int]evidence.Digest) (Facts, error) {
	parsed, err := boot.Parse(log)
	if err != nil {
		return Facts{}, reject(CheckStructure, "the event log can't be read: %v", err)
	}
	later, err := boot.ParseUserspace(userspace)
	if err != nil {
		return Facts{}, reject(CheckStructure, "systemd's log can't be read: %v", err)
	}

	b := &bootLog{}
	if err := b.sort(parsed); err != nil {
		return Facts{}, err
	}
	facts := Facts{Asserted: Asserted{Padding: len(parsed.Padding)}}
	if err := b.replay(later, pcrs, &facts); err != nil {
		return Facts{}, err
	}

	b.read(&facts)
	b.report(pcrs, &facts)
	return facts, nil
}

// bootLog is a log's measurements, each PCR for itself: the order of events of
// different PCRs is the host's word.
type bootLog struct {
	pcr      [boot.PCRCount][]measurement
	locality byte // of the TPM's start, which is PCR 0's first value
	state    [boot.PCRCount]PCR
}

// limit notes an event of a PCR that isn't understood, or the lack of one.
func (b *bootLog) limit(pcr int, e *boot.Event, why string) {
	s := &b.state[pcr]
	if s.NotUnderstood++; s.Limit == nil {
		s.Limit = &Limit{Why: why}
		if e != nil {
			s.Limit.Event, s.Limit.Type = e.Number, e.Type.String()
		}
	}
}

// took notes that a fact rests on a PCR.
func (b *bootLog) took(fact string, pcrs ...int) {
	for _, pcr := range pcrs {
		if s := &b.state[pcr]; !slices.Contains(s.Facts, fact) {
			s.Facts = append(s.Facts, fact)
		}
	}
}

// sort finds the SHA-256 digest of each event and puts it to its PCR.
func (b *bootLog) sort(log *boot.Log) error {
	for i := range log.Events {
		e := &log.Events[i]
		if e.Type == boot.NoAction {
			b.noAction(e)
			continue
		}
		digest := e.Digest(boot.SHA256)
		if digest == nil {
			b.limit(int(e.PCR), e, "it has no SHA-256 digest")
			continue
		}
		b.pcr[e.PCR] = append(b.pcr[e.PCR], newMeasurement(e, evidence.Digest(digest)))
	}
	if err := log.Unsuited(); err != nil {
		return reject(CheckStructure, "%v", err)
	}
	return nil
}

var startupLocality = []byte("StartupLocality\x00")

// noAction takes the start-up locality (TCG PC Client Platform Firmware Profile,
// TCG_EfiStartupLocalityEvent), the first that is told, from an event that extends
// nothing. It is proven with PCR 0: another one leads to another value.
func (b *bootLog) noAction(e *boot.Event) {
	rest, ok := bytes.CutPrefix(e.Data, startupLocality)
	switch {
	case !ok || b.locality != 0:
	case e.PCR == pcrFirmware && len(rest) == 1 && (rest[0] == 0 || rest[0] == 3 || rest[0] == 4):
		b.locality = rest[0]
	default:
		b.limit(pcrFirmware, e, "the start-up locality is 0, 3 or 4, and of PCR 0")
	}
}

// replay extends each quoted PCR from its first value with what the logs say, and
// empties those that the quote doesn't prove.
func (b *bootLog) replay(later []boot.Measurement, pcrs map[int]evidence.Digest, facts *Facts) error {
	stub := sections(b.pcr[pcrSections]) != nil
	for pcr := range b.pcr {
		value, quoted := pcrs[pcr]
		if quoted && pcr == pcrIMA && unused(value) {
			facts.PCRsUnused = append(facts.PCRsUnused, pcr)
		}
		if !quoted || pcr == pcrIMA {
			b.pcr[pcr] = nil
			continue
		}
		var recorded []boot.Measurement
		if systemdExtends(pcr) {
			recorded = slices.DeleteFunc(slices.Clone(later), func(m boot.Measurement) bool { return m.PCR != pcr })
		}
		if len(b.pcr[pcr]) == 0 && unused(value) {
			facts.PCRsUnused = append(facts.PCRsUnused, pcr)
			continue
		}
		if len(b.pcr[pcr]) == 0 && pcr < firmwarePCRs {
			return reject(CheckReplay, "PCR %d was quoted as %v, and the log has no event of it", pcr, value)
		}
		if len(b.pcr[pcr]) == 0 && len(recorded) == 0 {
			facts.PCRsUnexplained = append(facts.PCRsUnexplained, pcr)
			continue
		}
		var first evidence.Digest
		if pcr == 0 {
			first[len(first)-1] = b.locality
		}
		got := first
		matched := -1 // as many events as lead to the quoted value
		for i, m := range b.pcr[pcr] {
			if got == value {
				matched = i
			}
			got = extend(got, m.digest)
		}
		// systemd's log is read after the quote, and may have grown since.
		proven := 0
		for got != value && proven < len(recorded) {
			got = extend(got, evidence.Digest(recorded[proven].SHA256))
			proven++
		}
		switch {
		case got == value:
			facts.PCRsReplayed = append(facts.PCRsReplayed, pcr)
			facts.userspace(recorded[:proven])
		case systemdExtends(pcr) && (stub || len(recorded) > 0) || pcr >= 16:
			// What systemd measured can't be told from what somebody left out.
			facts.PCRsUnreplayed = append(facts.PCRsUnreplayed, pcr)
			b.pcr[pcr] = nil
		case matched >= 0:
			return reject(CheckReplay, "%v wasn't measured: PCR %d was quoted as the events before it leave it", b.pcr[pcr][matched], pcr)
		default:
			last := b.pcr[pcr][len(b.pcr[pcr])-1]
			return reject(CheckReplay, "PCR %d was quoted as %v, but its %d events, the last being %v, lead to %v",
				pcr, value, len(b.pcr[pcr]), last, got)
		}
	}
	return nil
}

func extend(value, digest evidence.Digest) evidence.Digest {
	var both [2 * sha256.Size]byte
	copy(both[:], value[:])
	copy(both[sha256.Size:], digest[:])
	return sha256.Sum256(both[:])
}

// unused says whether a PCR has its value of before the first extend: zeros, or
// ones where only a dynamic launch resets it.
func unused(value evidence.Digest) bool {
	return value.IsZero() || len(bytes.Trim(value[:], "\xff")) == 0
}

// systemdExtends names the PCRs that systemd extends after boot. It does so where
// its stub was booted, whose sections are then in the log, or keeps a log of it.
func systemdExtends(pcr int) bool {
	return pcr == 9 || pcr == 11 || pcr == 12 || pcr == 13 || pcr == 15
}
