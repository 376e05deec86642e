package lab

import (
	"crypto"
	"crypto/aes"
	"crypto/cipher"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"errors"
	"maps"
	"math/big"
	"slices"
	"sync/atomic"
	"time"

	"github.com/google/go-tpm/tpm2"

	"github.com/countersign/countersign/attestors/evidence"
	"github.com/countersign/countersign/attestors/tpm"
)

// A SoftTPM does in software what a host's TPM does: an endorsement key that
// the lab's CA may have certified, an attestation key, a TLS key and PCRs. It
// stands for hosts in numbers that swtpm can't, and for attackers: nothing in
// it keeps a rule, and each edit changes a statement before it is signed.
type SoftTPM struct {
	EK        tpm.EK
	AKPublic  []byte // TPMT_PUBLIC
	TLSPublic []byte // TPMT_PUBLIC
	TLSKey    *ecdsa.PrivateKey

	PCRs         map[int]evidence.Digest // what isn't here is zero
	ResetCount   uint32
	RestartCount uint32

	ek, ak *ecdsa.PrivateKey
	start  time.Time
	ticks  atomic.Uint64 // added to the clock, so that no two statements have the same
}

// NewSoftTPM makes one with P-256 keys, certified by ca unless that is nil.
func NewSoftTPM(ca *TPMCA) (*SoftTPM, error) {
	s := &SoftTPM{PCRs: map[int]evidence.Digest{}, start: time.Now()}
	for _, key := range []**ecdsa.PrivateKey{&s.ek, &s.ak, &s.TLSKey} {
		var err error
		if *key, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader); err != nil {
			return nil, err
		}
	}
	der, err := x509.MarshalPKIXPublicKey(s.ek.Public())
	if err != nil {
		return nil, err
	}
	s.EK.Public = der
	if ca != nil {
		if s.EK.Certificate, err = ca.IssueEK(s.ek.Public()); err != nil {
			return nil, err
		}
	}
	template, err := tpm.AKTemplate(tpm.P256)
	if err != nil {
		return nil, err
	}
	if s.AKPublic, err = publicArea(template, s.ak.Public()); err != nil {
		return nil, err
	}
	s.TLSPublic, err = publicArea(tpm.TLSKeyTemplate(), s.TLSKey.Public())
	return s, err
}

// NewTLSKey has the TPM make another TLS key in the place of the first.
func (s *SoftTPM) NewTLSKey() (err error) {
	if s.TLSKey, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader); err != nil {
		return err
	}
	s.TLSPublic, err = publicArea(tpm.TLSKeyTemplate(), s.TLSKey.Public())
	return err
}

func publicArea(template tpm2.TPMTPublic, key crypto.PublicKey) ([]byte, error) {
	public, err := tpm.WithKey(template, key)
	if err != nil {
		return nil, err
	}
	return tpm2.Marshal(public), nil
}

// Activate opens a challenge to the endorsement key for the attestation key.
func (s *SoftTPM) Activate(challenge tpm.Challenge) ([]byte, error) {
	name := objectName(s.AKPublic)
	private, err := s.ek.ECDH()
	if err != nil {
		return nil, err
	}
	point, err := tpm2.Unmarshal[tpm2.TPMSECCPoint](challenge.EncryptedSecret)
	if err != nil {
		return nil, err
	}
	encoded := make([]byte, 65)
	encoded[0] = 4
	new(big.Int).SetBytes(point.X.Buffer).FillBytes(encoded[1:33])
	new(big.Int).SetBytes(point.Y.Buffer).FillBytes(encoded[33:])
	ephemeral, err := private.Curve().NewPublicKey(encoded)
	if err != nil {
		return nil, err
	}
	z, err := private.ECDH(ephemeral)
	if err != nil {
		return nil, err
	}
	seed := tpm2.KDFe(crypto.SHA256, z, "IDENTITY", encoded[1:33], private.PublicKey().Bytes()[1:33], 256)

	integrity, err := tpm2.Unmarshal[tpm2.TPM2BDigest](challenge.CredentialBlob)
	if err != nil {
		return nil, err
	}
	encrypted := slices.Clone(challenge.CredentialBlob[2+len(integrity.Buffer):])
	mac := hmac.New(sha256.New, tpm2.KDFa(crypto.SHA256, seed, "INTEGRITY", nil, nil, 256))
	mac.Write(encrypted)
	mac.Write(name)
	if !hmac.Equal(mac.Sum(nil), integrity.Buffer) {
		return nil, errors.New("the challenge is for another attestation key")
	}
	block, err := aes.NewCipher(tpm2.KDFa(crypto.SHA256, seed, "STORAGE", name, nil, 128))
	if err != nil {
		return nil, err
	}
	//lint:ignore SA1019 CFB is what TPMs use here
	cipher.NewCFBDecrypter(block, make([]byte, aes.BlockSize)).XORKeyStream(encrypted, encrypted)
	secret, err := tpm2.Unmarshal[tpm2.TPM2BDigest](encrypted)
	if err != nil {
		return nil, err
	}
	return secret.Buffer, nil
}

// ActivateBy is Activate by the endorsement key of other, for s's attestation key.
func (s *SoftTPM) ActivateBy(other *SoftTPM, challenge tpm.Challenge) ([]byte, error) {
	return (&SoftTPM{AKPublic: s.AKPublic, ek: other.ek}).Activate(challenge)
}

// Quote quotes PCRs.
func (s *SoftTPM) Quote(extra evidence.Digest, pcrs []int, edits ...func(*tpm2.TPMSAttest)) (tpm.Quote, error) {
	h := sha256.New()
	values := make([]tpm.PCR, len(pcrs))
	indices := make([]uint, len(pcrs))
	for i, index := range slices.Sorted(slices.Values(pcrs)) {
		values[i] = tpm.PCR{Index: index, SHA256: s.PCRs[index]}
		indices[i] = uint(index)
		h.Write(values[i].SHA256[:])
	}
	attest := s.statement(tpm2.TPMSTAttestQuote, extra)
	attest.Attested = tpm2.NewTPMUAttest(tpm2.TPMSTAttestQuote, &tpm2.TPMSQuoteInfo{
		PCRSelect: tpm2.TPMLPCRSelection{PCRSelections: []tpm2.TPMSPCRSelection{{
			Hash: tpm2.TPMAlgSHA256, PCRSelect: tpm2.PCClientCompatible.PCRs(indices...)}}},
		PCRDigest: tpm2.TPM2BDigest{Buffer: h.Sum(nil)},
	})
	encoded, signature, err := s.sign(attest, edits)
	return tpm.Quote{Attest: encoded, Signature: signature, PCRs: values}, err
}

// Certify certifies the TLS key.
func (s *SoftTPM) Certify(extra evidence.Digest, edits ...func(*tpm2.TPMSAttest)) (tpm.Certification, error) {
	attest := s.statement(tpm2.TPMSTAttestCertify, extra)
	attest.Attested = tpm2.NewTPMUAttest(tpm2.TPMSTAttestCertify, &tpm2.TPMSCertifyInfo{
		Name: tpm2.TPM2BName{Buffer: objectName(s.TLSPublic)}})
	encoded, signature, err := s.sign(attest, edits)
	return tpm.Certification{Attest: encoded, Signature: signature}, err
}

func (s *SoftTPM) statement(kind tpm2.TPMST, extra evidence.Digest) tpm2.TPMSAttest {
	return tpm2.TPMSAttest{
		Magic:     tpm2.TPMGeneratedValue,
		Type:      kind,
		ExtraData: tpm2.TPM2BData{Buffer: extra[:]},
		ClockInfo: tpm2.TPMSClockInfo{
			Clock:      uint64(time.Since(s.start).Milliseconds()) + s.ticks.Add(1),
			ResetCount: s.ResetCount, RestartCount: s.RestartCount, Safe: true},
	}
}

// sign signs a statement after its edits.
func (s *SoftTPM) sign(attest tpm2.TPMSAttest, edits []func(*tpm2.TPMSAttest)) (encoded, signature []byte, err error) {
	for _, edit := range edits {
		edit(&attest)
	}
	encoded = tpm2.Marshal(attest)
	signature, err = s.Sign(encoded)
	return encoded, signature, err
}

// Sign signs anything with the attestation key, which no TPM would.
func (s *SoftTPM) Sign(statement []byte) ([]byte, error) {
	digest := sha256.Sum256(statement)
	r, t, err := ecdsa.Sign(rand.Reader, s.ak, digest[:])
	if err != nil {
		return nil, err
	}
	return tpm2.Marshal(tpm2.TPMTSignature{
		SigAlg: tpm2.TPMAlgECDSA,
		Signature: tpm2.NewTPMUSignature(tpm2.TPMAlgECDSA, &tpm2.TPMSSignatureECC{
			Hash:       tpm2.TPMAlgSHA256,
			SignatureR: tpm2.TPM2BECCParameter{Buffer: r.FillBytes(make([]byte, 32))},
			SignatureS: tpm2.TPM2BECCParameter{Buffer: t.FillBytes(make([]byte, 32))},
		}),
	}), nil
}

// objectName is the Name of an object that SHA-256 names.
func objectName(public []byte) []byte {
	digest := sha256.Sum256(public)
	return append([]byte{0x00, 0x0b}, digest[:]...)
}

// Clone is a second one with the same keys, as a cloned machine has; PCRs and
// counts go apart from here.
func (s *SoftTPM) Clone() *SoftTPM {
	clone := &SoftTPM{EK: s.EK, AKPublic: s.AKPublic, TLSPublic: s.TLSPublic, TLSKey: s.TLSKey, PCRs: maps.Clone(s.PCRs),
		ResetCount: s.ResetCount, RestartCount: s.RestartCount, ek: s.ek, ak: s.ak, start: s.start}
	clone.ticks.Store(s.ticks.Load())
	return clone
}

// TakeEK gives s the endorsement key of other: one TPM, whose other keys were
// made anew.
func (s *SoftTPM) TakeEK(other *SoftTPM) {
	s.EK, s.ek = other.EK, other.ek
}
