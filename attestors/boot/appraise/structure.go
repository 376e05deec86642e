package appraise

import (
	"encoding/binary"

	"github.com/countersign/countersign/attestors/boot"
	"github.com/countersign/countersign/attestors/evidence"
)

// PCRs of the firmware that are spoken of by number.
const (
	pcrFirmware   = 0
	pcrDrivers    = 2
	pcrImages     = 4
	pcrSecureBoot = 7
)

// Separators (PC Client Platform Firmware Profile, EV_SEPARATOR) are looked for by
// digest, whatever an event calls itself.
var (
	separators = map[evidence.Digest]bool{
		evidence.Sum([]byte{0, 0, 0, 0}):             true,
		evidence.Sum([]byte{0xff, 0xff, 0xff, 0xff}): true,
	}
	separatorError = evidence.Sum([]byte{1, 0, 0, 0})
)

// messages are the texts that the Platform Firmware Profile has for EV_ACTION and
// EV_EFI_ACTION. They are known by digest, so that no log can make an image of one.
var messages = func() map[evidence.Digest]string {
	known := map[evidence.Digest]string{}
	for _, text := range []string{
		"Calling EFI Application from Boot Option",
		"Returning from EFI Application from Boot Option",
		"Exit Boot Services Invocation",
		"Exit Boot Services Returned with Failure",
		"Exit Boot Services Returned with Success",
		"Calling INT 19h", "Returned INT 19h", "Return via INT 18h",
		"Booting BCV device", "Start Option ROM Scan", "Unhiding Option ROM Code", "Entering ROM Based Setup",
		"DMA Protection Disabled",
	} {
		known[evidence.Sum([]byte(text))] = text
		known[evidence.Sum([]byte(text+"\x00"))] = text
	}
	return known
}()

// cut returns the place of a PCR's first separator, or -1. What stands before it
// is final; an error that firmware measured instead of it ends what is final, too.
func cut(pcr []measurement) int {
	for i := range pcr {
		if separators[pcr[i].digest] || pcr[i].digest == separatorError {
			return i
		}
	}
	return -1
}

// hashesData reports whether the Platform Firmware Profile defines a type's digest
// as that of the event's data.
func hashesData(t boot.EventType) bool {
	switch t {
	case boot.Separator, boot.Action, boot.EFIAction, boot.CRTMVersion, boot.VariableDriverConfig,
		boot.VariableAuthority, boot.VariableBoot2, boot.GPT:
		return true
	}
	return false
}

const typeUnknown = "its type is in no specification"

// strange says why an event of a firmware's PCR isn't understood, or is empty. It
// believes the event's type, and so is for a reader: no fact rests on it.
func strange(m *measurement) string {
	switch {
	case separators[m.digest] || messages[m.digest] != "":
		return ""
	case m.digest == separatorError && m.Type == boot.Separator:
		return "firmware measured that it failed"
	case m.Type == boot.Separator:
		return "the digest isn't a separator's"
	case !m.Type.Known():
		return typeUnknown
	case m.opaque() && hashesData(m.Type):
		return "the digest isn't of the data, as its type has it"
	}
	return ""
}

// A variable is a UEFI_VARIABLE_DATA: the measured form of a UEFI variable.
type variable struct {
	guid [16]byte
	name string
	data []byte
}

// shimTrail is how many bytes more than the variable shim up to 15 hashes: it
// takes the length of the structure with its padding, less one.
const shimTrail = 5

// parseVariable reads bytes that are exactly one variable, or one with shim's
// trail. Its name and length stand before its content, so the hash of the whole
// proves each.
func parseVariable(b []byte) (variable, bool) {
	const header = 16 + 8 + 8
	if len(b) < header {
		return variable{}, false
	}
	chars, size := binary.LittleEndian.Uint64(b[16:]), binary.LittleEndian.Uint64(b[24:])
	rest := uint64(len(b) - header)
	if chars > rest/2 {
		return variable{}, false
	}
	if rest -= 2 * chars; size > rest || rest-size != 0 && rest-size != shimTrail {
		return variable{}, false
	}
	name, ok := utf16Text(b[header : header+2*chars])
	return variable{guid: [16]byte(b), name: name, data: b[header+2*chars:][:size]}, ok
}
