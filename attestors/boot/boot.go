// Package boot is what host and broker share about a measured boot: the event
// log that firmware, boot loader and kernel stub wrote, and the log that systemd
// keeps of what it measured later.
//
// It trusts nothing and decides nothing. A log is the host's word until its
// digests replay to quoted PCRs, which is appraise's work. What it promises is
// that a log is read whole and strictly, that Encode gives back the bytes that
// Parse took, and that no input makes it panic, recurse, or allocate by a length
// that the input claims.
package boot

import "fmt"

// MaxLog is the length in bytes of the longest log that is read. A PC's is some
// 15 to 150 KiB, most of it certificates and revoked hashes.
const MaxLog = 1 << 20

// PCRCount is the number of PCRs of a PC client TPM.
const PCRCount = 24

// NoPCR stands in events of Windows that were written beside the TPM and never
// extended.
const NoPCR = 0xFFFFFFFF

// An Algorithm is a TPM's name of a hash algorithm (TPM_ALG_ID).
type Algorithm uint16

const (
	SHA1   Algorithm = 0x0004
	SHA256 Algorithm = 0x000B
	sha384 Algorithm = 0x000C
)

var algorithmNames = map[Algorithm]string{
	SHA1: "SHA-1", SHA256: "SHA-256", sha384: "SHA-384", 0x000D: "SHA-512", 0x0012: "SM3-256",
	0x0027: "SHA3-256", 0x0028: "SHA3-384", 0x0029: "SHA3-512",
}

// String returns the algorithm's usual name, or its number where it isn't known.
func (a Algorithm) String() string {
	if name, ok := algorithmNames[a]; ok {
		return name
	}
	return fmt.Sprintf("algorithm 0x%04x", uint16(a))
}

// sizes are the digest lengths of the algorithms whose names are settled.
var sizes = map[Algorithm]int{
	SHA1: 20, SHA256: 32, sha384: 48, 0x000D: 64, // SHA-512
	0x0012: 32, 0x0027: 32, 0x0028: 48, 0x0029: 64, // SM3, SHA3
}

// maxDigest bounds the digests of algorithms that aren't known here.
const maxDigest = 64

// A Bank is an algorithm that a log has digests of, and their length.
type Bank struct {
	Algorithm Algorithm
	Size      uint16
}

// A SpecID is the header of a crypto-agile log (TCG_EfiSpecIDEvent).
type SpecID struct {
	PlatformClass uint32
	Minor, Major  byte
	Errata        byte
	UintnSize     byte
	Banks         []Bank
	Vendor        []byte
	Register      uint32 // the header's: 0, or 1 in the CC event log of a TDX VM
}

// A Log is a parsed event log. Its slices point into the bytes it was parsed
// from.
type Log struct {
	SpecID  *SpecID // nil in a log that has SHA-1 digests only
	Events  []Event
	Padding []byte // what follows the last event: all zeros or all ones
}

// A Digest is an event's digest for one bank.
type Digest struct {
	Algorithm Algorithm
	Value     []byte
}

// An Event is one entry of a log. Only its digests can be proven by a PCR, and
// its data where a digest is the hash of it; its type never is.
type Event struct {
	Number  int // place in the log, the header of a crypto-agile log being 0
	Offset  int // of its first byte
	PCR     uint32
	Type    EventType
	Digests []Digest
	Data    []byte
}

// Digest is the event's digest for a bank, or nil.
func (e *Event) Digest(alg Algorithm) []byte {
	for _, d := range e.Digests {
		if d.Algorithm == alg {
			return d.Value
		}
	}
	return nil
}

// String names the event as refusals do.
func (e *Event) String() string {
	return fmt.Sprintf("event %d (PCR %d, %s)", e.Number, int32(e.PCR), e.Type)
}

// An EventType says what an event's writer took it for.
type EventType uint32

// The types that have a rule; see the TCG PC Client Platform Firmware Profile.
const (
	PostCode                EventType = 0x01
	NoAction                EventType = 0x03
	Separator               EventType = 0x04
	Action                  EventType = 0x05
	EventTag                EventType = 0x06
	CRTMVersion             EventType = 0x08
	IPL                     EventType = 0x0D
	VariableDriverConfig    EventType = 0x80000001
	VariableBoot            EventType = 0x80000002
	BootServicesApplication EventType = 0x80000003
	BootServicesDriver      EventType = 0x80000004
	RuntimeServicesDriver   EventType = 0x80000005
	GPT                     EventType = 0x80000006
	EFIAction               EventType = 0x80000007
	VariableBoot2           EventType = 0x8000000C
	VariableAuthority       EventType = 0x800000E0
)

var typeNames = map[EventType]string{
	0x00:                    "EV_PREBOOT_CERT",
	PostCode:                "EV_POST_CODE",
	0x02:                    "EV_UNUSED",
	NoAction:                "EV_NO_ACTION",
	Separator:               "EV_SEPARATOR",
	Action:                  "EV_ACTION",
	EventTag:                "EV_EVENT_TAG",
	0x07:                    "EV_S_CRTM_CONTENTS",
	CRTMVersion:             "EV_S_CRTM_VERSION",
	0x09:                    "EV_CPU_MICROCODE",
	0x0A:                    "EV_PLATFORM_CONFIG_FLAGS",
	0x0B:                    "EV_TABLE_OF_DEVICES",
	0x0C:                    "EV_COMPACT_HASH",
	IPL:                     "EV_IPL",
	0x0E:                    "EV_IPL_PARTITION_DATA",
	0x0F:                    "EV_NONHOST_CODE",
	0x10:                    "EV_NONHOST_CONFIG",
	0x11:                    "EV_NONHOST_INFO",
	0x12:                    "EV_OMIT_BOOT_DEVICE_EVENTS",
	0x13:                    "EV_POST_CODE2",
	VariableDriverConfig:    "EV_EFI_VARIABLE_DRIVER_CONFIG",
	VariableBoot:            "EV_EFI_VARIABLE_BOOT",
	BootServicesApplication: "EV_EFI_BOOT_SERVICES_APPLICATION",
	BootServicesDriver:      "EV_EFI_BOOT_SERVICES_DRIVER",
	RuntimeServicesDriver:   "EV_EFI_RUNTIME_SERVICES_DRIVER",
	GPT:                     "EV_EFI_GPT_EVENT",
	EFIAction:               "EV_EFI_ACTION",
	0x80000008:              "EV_EFI_PLATFORM_FIRMWARE_BLOB",
	0x80000009:              "EV_EFI_HANDOFF_TABLES",
	0x8000000A:              "EV_EFI_PLATFORM_FIRMWARE_BLOB2",
	0x8000000B:              "EV_EFI_HANDOFF_TABLES2",
	VariableBoot2:           "EV_EFI_VARIABLE_BOOT2",
	0x8000000D:              "EV_EFI_GPT_EVENT2",
	0x80000010:              "EV_EFI_HCRTM_EVENT",
	VariableAuthority:       "EV_EFI_VARIABLE_AUTHORITY",
	0x800000E1:              "EV_EFI_SPDM_FIRMWARE_BLOB",
	0x800000E2:              "EV_EFI_SPDM_FIRMWARE_CONFIG",
	0x800000E3:              "EV_EFI_SPDM_DEVICE_POLICY",
	0x800000E4:              "EV_EFI_SPDM_DEVICE_AUTHORITY",
}

// Known reports whether the Platform Firmware Profile names the type.
func (t EventType) Known() bool {
	_, ok := typeNames[t]
	return ok
}

func (t EventType) String() string {
	if name, ok := typeNames[t]; ok {
		return name
	}
	return fmt.Sprintf("type 0x%08x", uint32(t))
}
