package collect

import (
	"context"
	"encoding/binary"
	"fmt"
	"strings"
	"time"

	"github.com/google/go-tpm/tpm2"
)

// Info is what a TPM says of itself.
type Info struct {
	Manufacturer string        `json:"manufacturer"` // four letters of the TCG's vendor list
	Vendor       string        `json:"vendor"`       // the maker's own text
	Firmware     string        `json:"firmware"`
	PCRBanks     []string      `json:"pcr_banks"` // the active ones
	SHA256Bank   bool          `json:"sha256_bank"`
	OwnerAuth    bool          `json:"owner_auth_set"` // then no keys can be made
	InLockout    bool          `json:"in_lockout"`
	LockoutCount uint32        `json:"lockout_count"`
	LockoutMax   uint32        `json:"lockout_max"`
	LockoutHeal  time.Duration `json:"lockout_heal"` // until the count goes down by one
}

// Bits of TPMA_PERMANENT (TPM 2.0 library, part 2, section 8.6).
const (
	permanentOwnerAuthSet = 1 << 0
	permanentInLockout    = 1 << 9
)

// Info reads what the TPM says of itself.
func (d *Device) Info(ctx context.Context) (Info, error) {
	var info Info
	err := d.do(ctx, "read its properties", func(s *session) error {
		fixed, err := s.properties(tpm2.TPMPTManufacturer)
		if err != nil {
			return err
		}
		variable, err := s.properties(tpm2.TPMPTPermanent)
		if err != nil {
			return err
		}
		banks, err := s.banks()
		if err != nil {
			return err
		}
		v1, v2 := fixed[tpm2.TPMPTFirmwareVersion1], fixed[tpm2.TPMPTFirmwareVersion2]
		info = Info{
			Manufacturer: letters(fixed[tpm2.TPMPTManufacturer]),
			Vendor: letters(fixed[tpm2.TPMPTVendorString1], fixed[tpm2.TPMPTVendorString2],
				fixed[tpm2.TPMPTVendorString3], fixed[tpm2.TPMPTVendorString4]),
			Firmware:     fmt.Sprintf("%d.%d.%d.%d", v1>>16, v1&0xffff, v2>>16, v2&0xffff),
			PCRBanks:     banks,
			OwnerAuth:    variable[tpm2.TPMPTPermanent]&permanentOwnerAuthSet != 0,
			InLockout:    variable[tpm2.TPMPTPermanent]&permanentInLockout != 0,
			LockoutCount: variable[tpm2.TPMPTLockoutCounter],
			LockoutMax:   variable[tpm2.TPMPTMaxAuthFail],
			LockoutHeal:  time.Duration(variable[tpm2.TPMPTLockoutInterval]) * time.Second,
		}
		for _, bank := range banks {
			info.SHA256Bank = info.SHA256Bank || bank == "sha256"
		}
		return nil
	})
	return info, err
}

// properties reads a group of TPM properties from the first one on.
func (s *session) properties(first tpm2.TPMPT) (map[tpm2.TPMPT]uint32, error) {
	rsp, err := tpm2.GetCapability{Capability: tpm2.TPMCapTPMProperties, Property: uint32(first), PropertyCount: 64}.Execute(s)
	if err != nil {
		return nil, err
	}
	list, err := rsp.CapabilityData.Data.TPMProperties()
	if err != nil {
		return nil, err
	}
	properties := make(map[tpm2.TPMPT]uint32, len(list.TPMProperty))
	for _, p := range list.TPMProperty {
		properties[p.Property] = p.Value
	}
	return properties, nil
}

// banks names the PCR banks that have PCRs.
func (s *session) banks() ([]string, error) {
	rsp, err := tpm2.GetCapability{Capability: tpm2.TPMCapPCRs, PropertyCount: 16}.Execute(s)
	if err != nil {
		return nil, err
	}
	list, err := rsp.CapabilityData.Data.AssignedPCR()
	if err != nil {
		return nil, err
	}
	names := map[tpm2.TPMIAlgHash]string{tpm2.TPMAlgSHA1: "sha1", tpm2.TPMAlgSHA256: "sha256",
		tpm2.TPMAlgSHA384: "sha384", tpm2.TPMAlgSHA512: "sha512"}
	var banks []string
	for _, bank := range list.PCRSelections {
		active := false
		for _, bits := range bank.PCRSelect {
			active = active || bits != 0
		}
		if !active {
			continue
		}
		name, ok := names[bank.Hash]
		if !ok {
			name = fmt.Sprintf("%#04x", uint16(bank.Hash))
		}
		banks = append(banks, name)
	}
	return banks, nil
}

// letters reads text that TPMs keep in numbers, without what isn't printable.
func letters(numbers ...uint32) string {
	var text []byte
	for _, n := range numbers {
		text = binary.BigEndian.AppendUint32(text, n)
	}
	return strings.TrimSpace(strings.Map(func(r rune) rune {
		if r < ' ' || r > '~' {
			return -1
		}
		return r
	}, string(text)))
}
