// Package appraise is the broker's side of a host's TPM: it judges endorsement
// keys, attestation keys, certifications and quotes.
//
// It trusts the configured roots of TPM makers, and, once a challenge was
// answered, that a TPM keeps the rules of the attestation key's attributes.
// Everything else comes from the host and is hostile. It promises that each
// structure is read whole and strictly, that a refusal names the check that
// failed, and that no input makes it panic.
//
// The order matters to its callers: an AK means nothing before its challenge
// is answered, since software can make up every structure here except for the
// answer.
package appraise

import (
	"fmt"

	"github.com/countersign/countersign/attestors/evidence"
)

const (
	CheckEncoding      evidence.Check = "encoding"       // a structure is malformed, oversized, or has bytes behind its end
	CheckEKKey         evidence.Check = "ek-key"         // the EK is of a kind that TPMs don't have
	CheckEKCertificate evidence.Check = "ek-certificate" // the EK's certificate is none, or is for another key
	CheckEKChain       evidence.Check = "ek-chain"       // it doesn't lead to a configured root
	CheckEKExpired     evidence.Check = "ek-expired"     // it is outside of its time
	CheckEKUsage       evidence.Check = "ek-usage"       // it isn't for endorsement keys
	CheckKeyType       evidence.Check = "key-type"       // an AK or TLS key has a type, size or curve we don't take
	CheckScheme        evidence.Check = "scheme"         // a key's or signature's scheme isn't the expected one with SHA-256
	CheckAttributes    evidence.Check = "attributes"     // a key may do more, or is held less tightly, than it must
	CheckSignature     evidence.Check = "signature"      // the AK didn't sign this
	CheckMagic         evidence.Check = "magic"          // no TPM made this statement
	CheckType          evidence.Check = "type"           // it is a statement about something else
	CheckExtraData     evidence.Check = "extra-data"     // it is bound to another request, connection or nonce
	CheckName          evidence.Check = "name"           // the certified key is another one
	CheckBank          evidence.Check = "pcr-bank"       // the quote isn't over the SHA-256 bank alone
	CheckSelection     evidence.Check = "pcr-selection"  // the PCRs reported aren't exactly those quoted
	CheckDuplicatePCR  evidence.Check = "pcr-duplicate"  // a PCR is reported twice
	CheckRequiredPCR   evidence.Check = "pcr-required"   // a PCR that is needed wasn't quoted
	CheckPCRDigest     evidence.Check = "pcr-digest"     // the values reported aren't those quoted
	CheckInternal      evidence.Check = "internal"       // appraising panicked: nothing is accepted
)

// reject has a plain error type as its result, so that no nil *evidence.Rejected
// turns into an error that isn't nil.
func reject(check evidence.Check, format string, args ...any) error {
	return &evidence.Rejected{Check: check, Detail: fmt.Sprintf(format, args...)}
}

// guard turns a panic of the libraries below into a rejection: they were not
// written for hostile input alone.
func guard(err *error) {
	if r := recover(); r != nil {
		*err = reject(CheckInternal, "panic: %v", r)
	}
}
