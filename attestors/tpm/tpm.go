// Package tpm is what host and broker share about a host's TPM 2.0: the types
// that travel between them, the templates of the keys they speak of, and the
// names both compute from the same bytes.
//
// It does no I/O and decides nothing: collect makes these values on the host,
// appraise judges them at the broker. What it promises is that the parameters
// of an endorsement key follow from its public key alone, so that a host can't
// choose the ones it is challenged under.
package tpm

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rsa"
	"fmt"

	"github.com/countersign/countersign/attestors/evidence"
)

// A KeyAlgorithm is a kind of key that hosts use. Endorsement keys come in all
// of them, attestation keys as P256 or RSA2048, TLS keys as P256.
type KeyAlgorithm string

const (
	P256    KeyAlgorithm = "ecc-p256"
	P384    KeyAlgorithm = "ecc-p384"
	RSA2048 KeyAlgorithm = "rsa-2048"
)

// AlgorithmOf names the algorithm of a public key, or fails for keys that are
// none of ours.
func AlgorithmOf(key crypto.PublicKey) (KeyAlgorithm, error) {
	switch k := key.(type) {
	case *rsa.PublicKey:
		if k.N.BitLen() != 2048 || k.E != 65537 {
			return "", fmt.Errorf("an RSA key of %d bits with exponent %d: only 2048 bits with 65537 are known", k.N.BitLen(), k.E)
		}
		return RSA2048, nil
	case *ecdsa.PublicKey:
		switch k.Curve {
		case elliptic.P256():
			return P256, nil
		case elliptic.P384():
			return P384, nil
		}
		return "", fmt.Errorf("an ECC key on %s: only P-256 and P-384 are known", k.Curve.Params().Name)
	}
	return "", fmt.Errorf("a key of type %T: only RSA and ECC are known", key)
}

// PCRCount is the number of PCRs of a PC client TPM.
const PCRCount = 24

// DefaultPCRs are the PCRs that a host quotes: firmware, boot loader and kernel
// (0–9), IMA (10), and what the operating system measures (11–15). The dynamic
// root of trust's (16–23) are not used.
func DefaultPCRs() []int {
	pcrs := make([]int, 16)
	for i := range pcrs {
		pcrs[i] = i
	}
	return pcrs
}

// An EK is an endorsement key as its host presents it.
type EK struct {
	Public      []byte // PKIX DER of the public key
	Certificate []byte // DER of its certificate, or empty where the TPM has none
}

// Hash names the EK: the SHA-256 of its public key's PKIX DER.
func (ek EK) Hash() evidence.Digest { return evidence.Sum(ek.Public) }

// A Challenge is a secret that only the TPM with the challenged EK can open,
// and only if the challenged AK is in the same TPM (TPM2_MakeCredential).
type Challenge struct {
	CredentialBlob  []byte // TPMS_ID_OBJECT
	EncryptedSecret []byte // the seed, encrypted to the EK
}

// A PCR is one register of the SHA-256 bank.
type PCR struct {
	Index  int
	SHA256 evidence.Digest
}

// A Quote is a signed statement of an AK about PCRs, and the values that its
// host says they have.
type Quote struct {
	Attest    []byte // TPMS_ATTEST
	Signature []byte // TPMT_SIGNATURE
	PCRs      []PCR
}

// A Certification is a signed statement of an AK that a key is in its TPM.
type Certification struct {
	Attest    []byte // TPMS_ATTEST
	Signature []byte // TPMT_SIGNATURE
}
