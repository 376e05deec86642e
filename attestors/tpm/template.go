package tpm

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/rsa"
	"encoding/hex"
	"fmt"
	"slices"

	"github.com/google/go-tpm/tpm2"
)

// Authorization policies of the TCG EK credential profile, version 2.6, annex B:
// policyA is PolicySecret(TPM_RH_ENDORSEMENT); policyB is policyA or one that the
// platform's owner may set.
var (
	policyASHA256 = mustHex("837197674484b3f81a90cc8d46a5d724fd52d76e06520b64f2a1da1b331469aa")
	policyBSHA256 = mustHex("ca3d0a99a2b93906f7a3342414efcfb3a385d44cd1fd459089d19b5071c0b7a0")
	policyBSHA384 = mustHex("b26e7d28d11a50bc53d882bcf5fd3a1a074148bb35d3b4e4cb1c0ad9bde419cacb47ba09699646150f9fc000f3f80e12")
)

func mustHex(s string) []byte {
	b, err := hex.DecodeString(s)
	if err != nil {
		panic(err)
	}
	return b
}

// An EKTemplate is one way in which TPMs make an endorsement key: the TCG's
// name for it, the NV index of its certificate, and its public area. Where
// several make the same kind of key they agree in everything that a challenge
// depends on: the name algorithm and the symmetric parameters.
type EKTemplate struct {
	Name      string
	Algorithm KeyAlgorithm
	NVIndex   tpm2.TPMHandle
	Public    tpm2.TPMTPublic
}

// EKTemplates are the templates that hosts look for, in order of preference.
func EKTemplates() []EKTemplate {
	low := tpm2.TPMAObject{FixedTPM: true, FixedParent: true, SensitiveDataOrigin: true,
		AdminWithPolicy: true, Restricted: true, Decrypt: true}
	high := low
	high.UserWithAuth = true
	return []EKTemplate{
		{"L-2", P256, 0x01c0000a, ekPublic(P256, low, policyASHA256, 32)},
		{"L-1", RSA2048, 0x01c00002, ekPublic(RSA2048, low, policyASHA256, 256)},
		{"H-3", P384, 0x01c00016, ekPublic(P384, high, policyBSHA384, 0)},
		{"H-2", P256, 0x01c00014, ekPublic(P256, high, policyBSHA256, 0)},
		{"H-1", RSA2048, 0x01c00012, ekPublic(RSA2048, high, policyBSHA256, 0)},
	}
}

// ekPublic is an EK's public area with an all-zero unique field of so many bytes.
func ekPublic(alg KeyAlgorithm, attributes tpm2.TPMAObject, policy []byte, unique int) tpm2.TPMTPublic {
	public := tpm2.TPMTPublic{
		Type:             tpm2.TPMAlgECC,
		NameAlg:          tpm2.TPMAlgSHA256,
		ObjectAttributes: attributes,
		AuthPolicy:       tpm2.TPM2BDigest{Buffer: policy},
	}
	switch alg {
	case RSA2048:
		public.Type = tpm2.TPMAlgRSA
		public.Parameters = tpm2.NewTPMUPublicParms(tpm2.TPMAlgRSA, &tpm2.TPMSRSAParms{Symmetric: aesCFB(128), KeyBits: 2048})
		public.Unique = tpm2.NewTPMUPublicID(tpm2.TPMAlgRSA, &tpm2.TPM2BPublicKeyRSA{Buffer: make([]byte, unique)})
		return public
	case P384:
		public.NameAlg = tpm2.TPMAlgSHA384
		public.Parameters = eccParms(aesCFB(256), tpm2.TPMECCNistP384)
	default:
		public.Parameters = eccParms(aesCFB(128), tpm2.TPMECCNistP256)
	}
	public.Unique = eccPoint(make([]byte, unique), make([]byte, unique))
	return public
}

// EKPublic is the public area that every EK with this key has, as far as a
// challenge depends on it.
func EKPublic(key crypto.PublicKey) (tpm2.TPMTPublic, error) {
	alg, err := AlgorithmOf(key)
	if err != nil {
		return tpm2.TPMTPublic{}, err
	}
	templates := EKTemplates()
	public := templates[slices.IndexFunc(templates, func(t EKTemplate) bool { return t.Algorithm == alg })].Public
	public.Unique, err = unique(key)
	return public, err
}

// SRKTemplate is the parent of a host's keys, a P-256 storage key that the TPM
// derives from the owner hierarchy's seed whenever it is asked.
func SRKTemplate() tpm2.TPMTPublic { return tpm2.ECCSRKTemplate }

// AKTemplate is the public area of a new attestation key: it signs only what
// the TPM itself states, and wrong guesses of its authorization don't lock the
// TPM.
func AKTemplate(alg KeyAlgorithm) (tpm2.TPMTPublic, error) {
	attributes := signingAttributes()
	attributes.Restricted = true
	public := tpm2.TPMTPublic{Type: tpm2.TPMAlgECC, NameAlg: tpm2.TPMAlgSHA256, ObjectAttributes: attributes}
	switch alg {
	case P256:
		public.Parameters = ecdsaParms()
		public.Unique = eccPoint(nil, nil)
	case RSA2048:
		public.Type = tpm2.TPMAlgRSA
		public.Parameters = tpm2.NewTPMUPublicParms(tpm2.TPMAlgRSA, &tpm2.TPMSRSAParms{
			Scheme: tpm2.TPMTRSAScheme{
				Scheme:  tpm2.TPMAlgRSASSA,
				Details: tpm2.NewTPMUAsymScheme(tpm2.TPMAlgRSASSA, &tpm2.TPMSSigSchemeRSASSA{HashAlg: tpm2.TPMAlgSHA256}),
			},
			KeyBits: 2048,
		})
		public.Unique = tpm2.NewTPMUPublicID(tpm2.TPMAlgRSA, &tpm2.TPM2BPublicKeyRSA{})
	default:
		return tpm2.TPMTPublic{}, fmt.Errorf("attestation keys are %s or %s, not %s", P256, RSA2048, alg)
	}
	return public, nil
}

// TLSKeyTemplate is the public area of a new TLS key: it signs what it is given.
func TLSKeyTemplate() tpm2.TPMTPublic {
	return tpm2.TPMTPublic{
		Type:             tpm2.TPMAlgECC,
		NameAlg:          tpm2.TPMAlgSHA256,
		ObjectAttributes: signingAttributes(),
		Parameters:       ecdsaParms(),
		Unique:           eccPoint(nil, nil),
	}
}

// WithKey is a template with the given public key in it.
func WithKey(template tpm2.TPMTPublic, key crypto.PublicKey) (tpm2.TPMTPublic, error) {
	var err error
	template.Unique, err = unique(key)
	return template, err
}

// signingAttributes has NoDA: power cuts while a key without it is in use count
// as wrong guesses, and three of them lock it out.
func signingAttributes() tpm2.TPMAObject {
	return tpm2.TPMAObject{FixedTPM: true, FixedParent: true, SensitiveDataOrigin: true,
		UserWithAuth: true, NoDA: true, SignEncrypt: true}
}

func ecdsaParms() tpm2.TPMUPublicParms {
	return tpm2.NewTPMUPublicParms(tpm2.TPMAlgECC, &tpm2.TPMSECCParms{
		Scheme: tpm2.TPMTECCScheme{
			Scheme:  tpm2.TPMAlgECDSA,
			Details: tpm2.NewTPMUAsymScheme(tpm2.TPMAlgECDSA, &tpm2.TPMSSigSchemeECDSA{HashAlg: tpm2.TPMAlgSHA256}),
		},
		CurveID: tpm2.TPMECCNistP256,
	})
}

func eccParms(symmetric tpm2.TPMTSymDefObject, curve tpm2.TPMECCCurve) tpm2.TPMUPublicParms {
	return tpm2.NewTPMUPublicParms(tpm2.TPMAlgECC, &tpm2.TPMSECCParms{Symmetric: symmetric, CurveID: curve})
}

func aesCFB(bits tpm2.TPMKeyBits) tpm2.TPMTSymDefObject {
	return tpm2.TPMTSymDefObject{
		Algorithm: tpm2.TPMAlgAES,
		KeyBits:   tpm2.NewTPMUSymKeyBits(tpm2.TPMAlgAES, bits),
		Mode:      tpm2.NewTPMUSymMode(tpm2.TPMAlgAES, tpm2.TPMAlgCFB),
	}
}

func eccPoint(x, y []byte) tpm2.TPMUPublicID {
	return tpm2.NewTPMUPublicID(tpm2.TPMAlgECC, &tpm2.TPMSECCPoint{
		X: tpm2.TPM2BECCParameter{Buffer: x}, Y: tpm2.TPM2BECCParameter{Buffer: y}})
}

func unique(key crypto.PublicKey) (tpm2.TPMUPublicID, error) {
	switch k := key.(type) {
	case *rsa.PublicKey:
		return tpm2.NewTPMUPublicID(tpm2.TPMAlgRSA, &tpm2.TPM2BPublicKeyRSA{Buffer: k.N.Bytes()}), nil
	case *ecdsa.PublicKey:
		point, err := k.Bytes()
		if err != nil {
			return tpm2.TPMUPublicID{}, err
		}
		x, y := point[1:1+(len(point)-1)/2], point[1+(len(point)-1)/2:]
		return eccPoint(x, y), nil
	}
	return tpm2.TPMUPublicID{}, fmt.Errorf("a key of type %T: only RSA and ECC are known", key)
}
