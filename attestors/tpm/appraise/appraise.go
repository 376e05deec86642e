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
	"errors"
	"fmt"
)

// A Check names one thing that evidence must fulfil.
type Check string

const (
	CheckEncoding      Check = "encoding"       // a structure is malformed, oversized, or has bytes behind its end
	CheckEKKey         Check = "ek-key"         // the EK is of a kind that TPMs don't have
	CheckEKCertificate Check = "ek-certificate" // the EK's certificate is none, or is for another key
	CheckEKChain       Check = "ek-chain"       // it doesn't lead to a configured root
	CheckEKExpired     Check = "ek-expired"     // it is outside of its time
	CheckEKUsage       Check = "ek-usage"       // it isn't for endorsement keys
	CheckKeyType       Check = "key-type"       // an AK or TLS key has a type, size or curve we don't take
	CheckScheme        Check = "scheme"         // a key's or signature's scheme isn't the expected one with SHA-256
	CheckAttributes    Check = "attributes"     // a key may do more, or is held less tightly, than it must
	CheckSignature     Check = "signature"      // the AK didn't sign this
	CheckMagic         Check = "magic"          // no TPM made this statement
	CheckType          Check = "type"           // it is a statement about something else
	CheckExtraData     Check = "extra-data"     // it is bound to another request, connection or nonce
	CheckName          Check = "name"           // the certified key is another one
	CheckBank          Check = "pcr-bank"       // the quote isn't over the SHA-256 bank alone
	CheckSelection     Check = "pcr-selection"  // the PCRs reported aren't exactly those quoted
	CheckDuplicatePCR  Check = "pcr-duplicate"  // a PCR is reported twice
	CheckRequiredPCR   Check = "pcr-required"   // a PCR that is needed wasn't quoted
	CheckPCRDigest     Check = "pcr-digest"     // the values reported aren't those quoted
	CheckInternal      Check = "internal"       // appraising panicked: nothing is accepted
)

// A Rejected is evidence that says no.
type Rejected struct {
	Check  Check
	Detail string
}

func (r *Rejected) Error() string {
	return fmt.Sprintf("TPM evidence rejected: %s: %s", r.Check, r.Detail)
}

// reject has a plain error type as its result, so that no nil *Rejected turns
// into an error that isn't nil.
func reject(check Check, format string, args ...any) error {
	return &Rejected{check, fmt.Sprintf(format, args...)}
}

// guard turns a panic of the libraries below into a rejection: they were not
// written for hostile input alone.
func guard(err *error) {
	if r := recover(); r != nil {
		*err = reject(CheckInternal, "panic: %v", r)
	}
}

// CheckOf names the check that an error failed, or is empty if the error isn't
// a rejection.
func CheckOf(err error) Check {
	var r *Rejected
	if errors.As(err, &r) {
		return r.Check
	}
	return ""
}
