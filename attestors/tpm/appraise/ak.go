package appraise

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/subtle"
	"crypto/x509"
	"fmt"
	"strings"

	"github.com/countersign/countersign/attestors/evidence"
	"github.com/countersign/countersign/attestors/tpm"
	"github.com/google/go-tpm/tpm2"
)

// Bits of TPMA_OBJECT (TPM 2.0 library, part 2, section 8.3).
const (
	fixedTPM             = 1 << 1
	stClear              = 1 << 2
	fixedParent          = 1 << 4
	sensitiveDataOrigin  = 1 << 5
	userWithAuth         = 1 << 6
	adminWithPolicy      = 1 << 7
	noDA                 = 1 << 10
	encryptedDuplication = 1 << 11
	restricted           = 1 << 16
	decrypt              = 1 << 17
	sign                 = 1 << 18
	x509Sign             = 1 << 19
)

var attributeNames = []struct {
	bit  uint32
	name string
}{
	{fixedTPM, "fixedTPM"}, {stClear, "stClear"}, {fixedParent, "fixedParent"}, {sensitiveDataOrigin, "sensitiveDataOrigin"},
	{userWithAuth, "userWithAuth"}, {adminWithPolicy, "adminWithPolicy"}, {noDA, "noDA"}, {encryptedDuplication, "encryptedDuplication"},
	{restricted, "restricted"}, {decrypt, "decrypt"}, {sign, "sign"}, {x509Sign, "x509Sign"},
}

// residence is what keeps a key in the TPM that made it.
const residence = fixedTPM | fixedParent | sensitiveDataOrigin

// checkAttributes checks that a key has all attributes of must, none that are
// in neither must nor may, and no policy, which would be another way to use it.
func (k *signingKey) checkAttributes(what string, must, may uint32) error {
	wrong := func(bits uint32) (names []string) {
		for _, a := range attributeNames {
			if bits&a.bit != 0 {
				names = append(names, a.name)
				bits &^= a.bit
			}
		}
		if bits != 0 {
			names = append(names, fmt.Sprintf("%#x", bits))
		}
		return names
	}
	if missing := must &^ k.attributes; missing != 0 {
		return reject(CheckAttributes, "the %s isn't %s", what, strings.Join(wrong(missing), ", "))
	}
	if excess := k.attributes &^ (must | may); excess != 0 {
		return reject(CheckAttributes, "the %s is %s", what, strings.Join(wrong(excess), ", "))
	}
	if len(k.policy) != 0 {
		return reject(CheckAttributes, "the %s has a policy", what)
	}
	return nil
}

// An AK is an attestation key's public area: restricted to signing what a TPM
// itself states, if it is in a TPM. Software can make the same bytes; only an
// answered challenge shows that it is.
type AK struct{ signingKey }

// ParseAK reads an attestation key's TPMT_PUBLIC.
func ParseAK(public []byte) (ak *AK, err error) {
	defer guard(&err)
	k, err := decodeSigningKey(bytes.Clone(public), "AK")
	if err != nil {
		return nil, err
	}
	if err := k.checkAttributes("AK", residence|restricted|sign, userWithAuth|noDA); err != nil {
		return nil, err
	}
	return &AK{*k}, nil
}

// Public is the key itself.
func (ak *AK) Public() crypto.PublicKey { return ak.key }

// Encoded is the TPMT_PUBLIC that the AK was read from, for the inventory.
func (ak *AK) Encoded() []byte { return bytes.Clone(ak.encoded) }

// Name is the AK's Name, which a challenge is made for.
func (ak *AK) Name() []byte { return ak.name() }

// Hash is the SHA-256 of the TPMT_PUBLIC: the Name without its algorithm.
func (ak *AK) Hash() evidence.Digest { return evidence.Sum(ak.encoded) }

// signed says whether the AK signed the statement.
func (ak *AK) signed(statement []byte, sig *signature) bool {
	digest := sha256.Sum256(statement)
	switch key := ak.key.(type) {
	case *ecdsa.PublicKey:
		return ecdsa.Verify(key, digest[:], sig.r, sig.s)
	case *rsa.PublicKey:
		return rsa.VerifyPKCS1v15(key, crypto.SHA256, digest[:], sig.rsa) == nil
	}
	return false
}

// VerifyCertification checks the AK's statement that a TLS key, given by its
// TPMT_PUBLIC, is in the AK's TPM and can't leave it. It returns the PKIX DER
// of the TLS key.
func (ak *AK) VerifyCertification(tlsPublic []byte, c tpm.Certification, extra evidence.Digest) (spki []byte, err error) {
	defer guard(&err)
	key, err := decodeSigningKey(tlsPublic, "TLS key")
	if err != nil {
		return nil, err
	}
	ec, ok := key.key.(*ecdsa.PublicKey)
	if !ok {
		return nil, reject(CheckKeyType, "the TLS key isn't a P-256 key")
	}
	if err := key.checkAttributes("TLS key", residence|sign|userWithAuth|noDA, 0); err != nil {
		return nil, err
	}
	s, err := decodeStatement(c.Attest, tpm2.TPMSTAttestCertify, "certification")
	if err != nil {
		return nil, err
	}
	sig, err := decodeSignature(c.Signature, &ak.signingKey, "certification's signature")
	if err != nil {
		return nil, err
	}
	if !ak.signed(c.Attest, sig) {
		return nil, reject(CheckSignature, "the AK didn't sign the certification")
	}
	if err := checkExtraData(s, extra[:], "certification"); err != nil {
		return nil, err
	}
	if !bytes.Equal(s.name, key.name()) {
		return nil, reject(CheckName, "the certification is of another key than the TLS key")
	}
	return x509.MarshalPKIXPublicKey(ec)
}

// checkExtraData checks what a statement is bound to.
func checkExtraData(s *statement, extra []byte, what string) error {
	if len(bytes.Trim(extra, "\x00")) == 0 {
		return reject(CheckExtraData, "nothing was given that the %s is to be bound to", what)
	}
	if len(extra) > MaxNonce || subtle.ConstantTimeCompare(s.extraData, extra) != 1 {
		return reject(CheckExtraData, "the %s is bound to something else than this request", what)
	}
	return nil
}
