package appraise

import (
	"crypto"
	"crypto/sha256"
	"math/bits"

	"github.com/countersign/countersign/attestors/evidence"
	"github.com/countersign/countersign/attestors/tpm"
	"github.com/google/go-attestation/attest"
	"github.com/google/go-tpm/tpm2"
)

// Verified is what a quote proved.
type Verified struct {
	PCRs     map[int]evidence.Digest
	Counters Counters
}

// VerifyQuote checks that the AK quoted exactly the PCRs that are reported,
// with exactly their values, all of the required ones among them, bound to
// extra.
func (ak *AK) VerifyQuote(q tpm.Quote, extra evidence.Digest, required []int) (verified *Verified, err error) {
	return ak.VerifyRecordedQuote(q, extra[:], required)
}

// MaxNonce is the length in bytes of the longest nonce that a TPM takes
// (TPM2B_DATA: a TPMT_HA, whose digest has 64 bytes at most).
const MaxNonce = 64

// VerifyRecordedQuote is VerifyQuote for a quote that other tools asked for, with a
// nonce of 1 to MaxNonce bytes. A broker's own nonces are digests.
func (ak *AK) VerifyRecordedQuote(q tpm.Quote, nonce []byte, required []int) (verified *Verified, err error) {
	defer guard(&err)
	extra := nonce
	s, err := decodeStatement(q.Attest, tpm2.TPMSTAttestQuote, "quote")
	if err != nil {
		return nil, err
	}
	sig, err := decodeSignature(q.Signature, &ak.signingKey, "quote's signature")
	if err != nil {
		return nil, err
	}
	if len(q.PCRs) > tpm.PCRCount {
		return nil, reject(CheckDuplicatePCR, "%d PCRs are reported; a TPM has %d", len(q.PCRs), tpm.PCRCount)
	}
	// go-attestation checks signature, binding and values, in one error without
	// a name. Our own checks name it, and go on where go-attestation stops.
	failed := ak.attestation(q, extra)
	if failed != nil && !ak.signed(q.Attest, sig) {
		return nil, reject(CheckSignature, "the AK didn't sign the quote")
	}
	verified, err = s.checkQuote(q, extra, required)
	if err == nil && failed != nil {
		return nil, reject(CheckSignature, "%v", failed)
	}
	return verified, err
}

// attestation asks go-attestation about the quote.
func (ak *AK) attestation(q tpm.Quote, extra []byte) error {
	pcrs := make([]attest.PCR, len(q.PCRs))
	for i := range q.PCRs {
		pcrs[i] = attest.PCR{Index: q.PCRs[i].Index, Digest: q.PCRs[i].SHA256[:], DigestAlg: crypto.SHA256}
	}
	public := attest.AKPublic{Public: ak.key, Hash: crypto.SHA256}
	return public.VerifyAll([]attest.Quote{{Quote: q.Attest, Signature: q.Signature}}, pcrs, extra)
}

// checkQuote holds a signed quote against what is reported and required.
func (s *statement) checkQuote(q tpm.Quote, extra []byte, required []int) (*Verified, error) {
	if err := checkExtraData(s, extra, "quote"); err != nil {
		return nil, err
	}
	if s.bank != tpm2.TPMAlgSHA256 {
		return nil, reject(CheckBank, "the quote is over PCR bank %#04x, not SHA-256", uint16(s.bank))
	}
	selected := 0
	for _, b := range s.selected {
		selected += bits.OnesCount8(b)
	}
	if selected == 0 {
		return nil, reject(CheckSelection, "the quote is over no PCR")
	}
	v := &Verified{PCRs: make(map[int]evidence.Digest, len(q.PCRs)), Counters: s.counters}
	for _, pcr := range q.PCRs {
		if _, twice := v.PCRs[pcr.Index]; twice {
			return nil, reject(CheckDuplicatePCR, "PCR %d is reported twice", pcr.Index)
		}
		if !s.selects(pcr.Index) {
			return nil, reject(CheckSelection, "PCR %d is reported, but was not quoted", pcr.Index)
		}
		v.PCRs[pcr.Index] = pcr.SHA256
	}
	if len(v.PCRs) != selected {
		return nil, reject(CheckSelection, "%d PCRs were quoted, but %d are reported", selected, len(v.PCRs))
	}
	if len(required) == 0 {
		return nil, reject(CheckRequiredPCR, "no PCRs are required: such a quote proves nothing")
	}
	for _, index := range required {
		if _, ok := v.PCRs[index]; !ok {
			return nil, reject(CheckRequiredPCR, "PCR %d wasn't quoted", index)
		}
	}
	h := sha256.New()
	for index := range 8 * len(s.selected) {
		if pcr, ok := v.PCRs[index]; ok {
			h.Write(pcr[:])
		}
	}
	if string(h.Sum(nil)) != string(s.pcrDigest) {
		return nil, reject(CheckPCRDigest, "the values reported aren't those that were quoted")
	}
	return v, nil
}

// selects says whether the quote is over a PCR.
func (s *statement) selects(index int) bool {
	return index >= 0 && index < tpm.PCRCount && index/8 < len(s.selected) && s.selected[index/8]&(1<<(index%8)) != 0
}

// Counters are a TPM's sense of time in one statement. For keys in the owner
// hierarchy a TPM adds a constant of the key's to both counts: they compare
// among one AK's statements, and nowhere else.
type Counters struct {
	ResetCount   uint32 // restarts of the machine
	RestartCount uint32 // resumptions since
	Clock        uint64 // milliseconds
	Safe         bool   // false: after a power cut, Clock may have been seen before
}

// Before says whether c is older than what was already seen from the same AK:
// the statement is replayed, or the TPM was set back. A clock that repeats
// after a power cut comes with a higher reset count.
func (c Counters) Before(seen Counters) bool {
	// As differences, since the added constant may carry a count over its end.
	if d := int32(c.ResetCount - seen.ResetCount); d != 0 {
		return d < 0
	}
	if d := int32(c.RestartCount - seen.RestartCount); d != 0 {
		return d < 0
	}
	return c.Clock < seen.Clock
}
