package appraise

import (
	"encoding/binary"

	"github.com/countersign/countersign/attestors/boot"
	"github.com/countersign/countersign/attestors/evidence"
)

// What separators and ExitBootServices measure. These digests are looked for
// whatever an event calls itself.
var (
	separators = map[evidence.Digest]string{
		evidence.Sum([]byte{0, 0, 0, 0}):             "\x00\x00\x00\x00",
		evidence.Sum([]byte{0xff, 0xff, 0xff, 0xff}): "\xff\xff\xff\xff",
	}
	separatorError = evidence.Sum([]byte{1, 0, 0, 0})
	exitCalled     = evidence.Sum([]byte("Exit Boot Services Invocation"))
	exitFailed     = evidence.Sum([]byte("Exit Boot Services Returned with Failure"))
	exitDone       = evidence.Sum([]byte("Exit Boot Services Returned with Success"))
)

// PCRs of the firmware that are spoken of by number.
const (
	pcrFirmware   = 0
	pcrOptions    = 1
	pcrDrivers    = 2
	pcrImages     = 4
	pcrExit       = 5
	pcrSecureBoot = 7
)

// checkStructure holds the log against the rules that firmware keeps.
func (b *bootLog) checkStructure(events []boot.Event) error {
	for pcr := range firmwarePCRs {
		if err := b.checkSeparator(pcr); err != nil {
			return err
		}
	}
	for pcr := range b.pcr {
		for i := range b.pcr[pcr] {
			if err := checkDigest(&b.pcr[pcr][i]); err != nil {
				return err
			}
		}
	}
	if err := b.checkExit(); err != nil {
		return err
	}
	return checkOrder(events)
}

// checkSeparator finds the one separator of a firmware's PCR.
func (b *bootLog) checkSeparator(pcr int) error {
	found := -1
	for i := range b.pcr[pcr] {
		m := &b.pcr[pcr][i]
		data, is := separators[m.digest]
		switch {
		case m.digest == separatorError:
			return reject(CheckStructure, "%v: firmware measured that it failed", m)
		case is && m.Type != boot.Separator:
			return reject(CheckStructure, "%v hides a separator under another type", m)
		case is && string(m.Data) != data:
			return reject(CheckStructure, "%v: the digest is a separator's, the data isn't", m)
		case !is && m.Type == boot.Separator:
			return reject(CheckStructure, "%v: the digest isn't a separator's", m)
		case is && found >= 0:
			return reject(CheckStructure, "%v is the second separator of its PCR", m)
		case is:
			found = i
		case found >= 0 && !allowedAfter(m):
			return reject(CheckStructure, "%v stands behind its PCR's separator", m)
		}
	}
	if found < 0 {
		return reject(CheckStructure, "PCR %d has no separator", pcr)
	}
	b.cut[pcr] = found
	return nil
}

// allowedAfter says whether firmware or a boot loader measures such things after
// the separator: images, what ExitBootServices and partition tables say, and the
// authorities that images were verified by. Some firmware also measures its boot
// options there; no fact is made of those.
func allowedAfter(m *measurement) bool {
	switch m.PCR {
	case pcrOptions:
		return m.Type == boot.VariableBoot || m.Type == boot.VariableBoot2
	case pcrImages, pcrExit:
		return true
	case pcrSecureBoot:
		return m.Type == boot.VariableAuthority
	}
	return false
}

// checkDigest holds a digest against the data where the type defines it so.
func checkDigest(m *measurement) error {
	if m.ofData {
		return nil
	}
	if m.PCR == pcrSecureBoot {
		return reject(CheckStructure, "%v: the digest isn't of the data, as everything in PCR 7 is", m)
	}
	switch m.Type {
	case boot.Separator, boot.Action, boot.EFIAction, boot.CRTMVersion, boot.VariableDriverConfig,
		boot.VariableAuthority, boot.VariableBoot2, boot.GPT:
		return reject(CheckStructure, "%v: the digest isn't of the data, as its type has it", m)
	case boot.VariableBoot:
		// Some firmware hashes the whole structure, some only what the variable holds.
		if v, ok := parseVariable(m.Data); !ok || m.digest != evidence.Sum(v.data) {
			return reject(CheckStructure, "%v: the digest is neither of the data nor of the variable in it", m)
		}
	}
	return nil
}

// checkExit follows ExitBootServices through PCR 5: called, and failed and called
// again until done, and then nothing.
func (b *bootLog) checkExit() error {
	called, done := false, false
	for pcr := range b.pcr {
		for i := range b.pcr[pcr] {
			m := &b.pcr[pcr][i]
			exit := m.digest == exitCalled || m.digest == exitFailed || m.digest == exitDone
			switch {
			case exit && (pcr != pcrExit || i <= b.cut[pcrExit]):
				return reject(CheckStructure, "%v: ExitBootServices is measured into PCR 5, behind its separator", m)
			case exit && (m.Type != boot.EFIAction || !m.ofData):
				return reject(CheckStructure, "%v hides ExitBootServices under another type or data", m)
			case pcr != pcrExit:
			case done:
				return reject(CheckStructure, "%v follows the end of ExitBootServices", m)
			case exit && (m.digest == exitCalled) == called:
				return reject(CheckStructure, "%v: ExitBootServices is called and returns in turns", m)
			case exit:
				called, done = m.digest == exitCalled, m.digest == exitDone
			case called:
				return reject(CheckStructure, "%v stands within ExitBootServices", m)
			}
		}
	}
	if !done {
		return reject(CheckStructure, "PCR 5 doesn't say that ExitBootServices was called and returned")
	}
	return nil
}

// checkOrder refuses a log that goes on with the firmware's PCRs after
// ExitBootServices. The order across PCRs isn't proven, but an honest log has it.
func checkOrder(events []boot.Event) error {
	done := false
	for i := range events {
		e := &events[i]
		if done && e.PCR < firmwarePCRs && e.Type != boot.NoAction {
			return reject(CheckStructure, "%v follows the end of ExitBootServices", e)
		}
		if d := e.Digest(boot.SHA256); e.PCR == pcrExit && d != nil && evidence.Digest(d) == exitDone {
			done = true
		}
	}
	return nil
}

// A variable is a UEFI_VARIABLE_DATA: the measured form of a UEFI variable.
type variable struct {
	guid [16]byte
	name string
	data []byte
}

// parseVariable reads data that is exactly one variable. Its name and length
// stand before its content, so the hash of the whole proves each.
func parseVariable(b []byte) (variable, bool) {
	const header = 16 + 8 + 8
	if len(b) < header {
		return variable{}, false
	}
	chars, size := binary.LittleEndian.Uint64(b[16:]), binary.LittleEndian.Uint64(b[24:])
	rest := uint64(len(b) - header)
	if chars > rest/2 || size != rest-2*chars {
		return variable{}, false
	}
	name, ok := utf16Text(b[header : header+2*chars])
	return variable{guid: [16]byte(b), name: name, data: b[header+2*chars:]}, ok
}
