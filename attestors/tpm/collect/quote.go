package collect

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"slices"

	"github.com/countersign/countersign/attestors/evidence"
	"github.com/countersign/countersign/attestors/tpm"
	"github.com/google/go-tpm/tpm2"
)

// pcrsPerRead is how many values TPM2_PCR_Read returns at most.
const pcrsPerRead = 8

// quoteTries bounds how often a quote is taken anew because a PCR was extended
// between it and the reading of the values.
const quoteTries = 8

// Quote has the AK state the values of the given PCRs of the SHA-256 bank, bound
// to extra. The values it returns are those that were quoted.
func (d *Device) Quote(ctx context.Context, ak Blob, extra evidence.Digest, pcrs []int) (tpm.Quote, error) {
	pcrs = slices.Compact(slices.Sorted(slices.Values(pcrs)))
	if len(pcrs) == 0 || pcrs[0] < 0 || pcrs[len(pcrs)-1] >= tpm.PCRCount {
		return tpm.Quote{}, fmt.Errorf("PCRs %v: give some from 0 to %d", pcrs, tpm.PCRCount-1)
	}
	var quote tpm.Quote
	err := d.do(ctx, "quote", func(s *session) error {
		keys, err := s.load(ak)
		if err != nil {
			return err
		}
		for range quoteTries {
			rsp, err := tpm2.Quote{
				SignHandle:     keys[0],
				QualifyingData: tpm2.TPM2BData{Buffer: extra[:]},
				InScheme:       tpm2.TPMTSigScheme{Scheme: tpm2.TPMAlgNull},
				PCRSelect:      selection(pcrs),
			}.Execute(s)
			if err != nil {
				return err
			}
			values, err := s.readPCRs(pcrs)
			if err != nil {
				return err
			}
			same, err := quoted(rsp.Quoted, values)
			if err != nil {
				return err
			}
			if same {
				quote = tpm.Quote{Attest: rsp.Quoted.Bytes(), Signature: tpm2.Marshal(rsp.Signature), PCRs: values}
				return nil
			}
		}
		return fmt.Errorf("the PCRs were extended during each of %d quotes", quoteTries)
	})
	return quote, err
}

// quoted says whether a quote is over these values.
func quoted(attest tpm2.TPM2BAttest, values []tpm.PCR) (bool, error) {
	contents, err := attest.Contents()
	if err != nil {
		return false, err
	}
	info, err := contents.Attested.Quote()
	if err != nil {
		return false, err
	}
	h := sha256.New()
	for _, pcr := range values {
		h.Write(pcr.SHA256[:])
	}
	return string(h.Sum(nil)) == string(info.PCRDigest.Buffer), nil
}

func selection(pcrs []int) tpm2.TPMLPCRSelection {
	indices := make([]uint, len(pcrs))
	for i, pcr := range pcrs {
		indices[i] = uint(pcr)
	}
	return tpm2.TPMLPCRSelection{PCRSelections: []tpm2.TPMSPCRSelection{{
		Hash: tpm2.TPMAlgSHA256, PCRSelect: tpm2.PCClientCompatible.PCRs(indices...)}}}
}

// readPCRs reads sorted PCRs of the SHA-256 bank.
func (s *session) readPCRs(pcrs []int) ([]tpm.PCR, error) {
	var values []tpm.PCR
	for part := range slices.Chunk(pcrs, pcrsPerRead) {
		rsp, err := tpm2.PCRRead{PCRSelectionIn: selection(part)}.Execute(s)
		if err != nil {
			return nil, err
		}
		if len(rsp.PCRValues.Digests) != len(part) {
			return nil, errors.New("the TPM has no active SHA-256 bank: enable it in the firmware's settings")
		}
		for i, digest := range rsp.PCRValues.Digests {
			if len(digest.Buffer) != len(evidence.Digest{}) {
				return nil, fmt.Errorf("PCR %d has %d bytes", part[i], len(digest.Buffer))
			}
			values = append(values, tpm.PCR{Index: part[i], SHA256: evidence.Digest(digest.Buffer)})
		}
	}
	return values, nil
}
