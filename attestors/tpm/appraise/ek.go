package appraise

import (
	"bytes"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"io"
	"slices"
	"time"

	"github.com/countersign/countersign/attestors/evidence"
	"github.com/countersign/countersign/attestors/tpm"
	"github.com/google/go-tpm/tpm2"
)

// secretSize is the length of a challenge's secret.
const secretSize = 32

var (
	oidEKCertificate = asn1.ObjectIdentifier{2, 23, 133, 8, 1} // tcg-kp-EKCertificate
	oidSAN           = asn1.ObjectIdentifier{2, 5, 29, 17}
	oidManufacturer  = asn1.ObjectIdentifier{2, 23, 133, 2, 1}
	oidModel         = asn1.ObjectIdentifier{2, 23, 133, 2, 2}
	oidVersion       = asn1.ObjectIdentifier{2, 23, 133, 2, 3}
	directoryNameTag = 4 // of GeneralName
)

// An EK is an endorsement key that was judged. Only VerifyEK makes one.
type EK struct {
	Hash      evidence.Digest
	Algorithm tpm.KeyAlgorithm

	// Certified says that a certificate of a configured root's vouches for the
	// key; what follows is that certificate's. Without one the key is whoever's:
	// its hash must be known beforehand.
	Certified    bool
	Manufacturer string // such as id:494E5443, if the certificate has it
	Model        string
	Version      string
	Serial       string // hexadecimal
	NotAfter     time.Time

	public tpm2.TPMTPublic
}

// VerifyEK judges an endorsement key. One without a certificate is accepted as
// not certified; one whose certificate is bad in any way is rejected. Without
// roots no certificate is good.
func VerifyEK(ek tpm.EK, roots, intermediates *x509.CertPool, now time.Time) (verified *EK, err error) {
	defer guard(&err)
	if len(ek.Public) > maxStructure || len(ek.Certificate) > tpm.MaxCertificate {
		return nil, reject(CheckEncoding, "the EK has %d bytes and its certificate %d", len(ek.Public), len(ek.Certificate))
	}
	key, err := x509.ParsePKIXPublicKey(ek.Public)
	if err != nil {
		return nil, reject(CheckEncoding, "the EK isn't a PKIX public key")
	}
	// One key has one encoding, or it could come under several hashes.
	if again, err := x509.MarshalPKIXPublicKey(key); err != nil || !bytes.Equal(again, ek.Public) {
		return nil, reject(CheckEncoding, "the EK isn't encoded as DER demands")
	}
	alg, err := tpm.AlgorithmOf(key)
	if err != nil {
		return nil, reject(CheckEKKey, "%v", err)
	}
	public, err := tpm.EKPublic(key)
	if err != nil {
		return nil, reject(CheckEKKey, "%v", err)
	}
	verified = &EK{Hash: ek.Hash(), Algorithm: alg, public: public}
	if len(ek.Certificate) == 0 {
		return verified, nil
	}
	cert, err := verifyCertificate(ek, roots, intermediates, now)
	if err != nil {
		return nil, err
	}
	verified.Certified = true
	verified.Serial = cert.SerialNumber.Text(16)
	verified.NotAfter = cert.NotAfter
	verified.Manufacturer, verified.Model, verified.Version = makeOf(cert)
	return verified, nil
}

// maxIssuerRSA bounds the keys of issuers that a TPM holds, in bits.
const maxIssuerRSA = 4096

// WithIssuers returns intermediates with the certificates of CAs that a TPM
// holds, in DER. They vouch for nothing: a chain still has to end in a root. What
// isn't a certificate of bounded size is left out, and so is one with a key that
// takes long to verify by: who sends these isn't known yet.
func WithIssuers(intermediates *x509.CertPool, issuers [][]byte) *x509.CertPool {
	if len(issuers) == 0 {
		return intermediates
	}

	more := x509.NewCertPool()
	if intermediates != nil {
		more = intermediates.Clone()
	}
	for _, der := range issuers[:min(len(issuers), tpm.MaxIssuers)] {
		if len(der) > tpm.MaxCertificate {
			continue
		}
		cert, err := x509.ParseCertificate(der)
		if err != nil {
			continue
		}
		if key, ok := cert.PublicKey.(*rsa.PublicKey); !ok || key.N.BitLen() <= maxIssuerRSA {
			more.AddCert(cert)
		}
	}
	return more
}

func verifyCertificate(ek tpm.EK, roots, intermediates *x509.CertPool, now time.Time) (*x509.Certificate, error) {
	cert, err := x509.ParseCertificate(ek.Certificate)
	if err != nil {
		return nil, reject(CheckEKCertificate, "the certificate can't be read: %v", err)
	}
	if now.Before(cert.NotBefore) || now.After(cert.NotAfter) {
		return nil, reject(CheckEKExpired, "the certificate is good from %s to %s",
			cert.NotBefore.UTC().Format(time.RFC3339), cert.NotAfter.UTC().Format(time.RFC3339))
	}
	if roots == nil { // which x509 would take for the system's
		roots = x509.NewCertPool()
	}
	// The alternative name is critical and holds a directory name, which Go's
	// verifier has no use for; every other critical extension must be one it knows.
	cert.UnhandledCriticalExtensions = slices.DeleteFunc(cert.UnhandledCriticalExtensions,
		func(id asn1.ObjectIdentifier) bool { return id.Equal(oidSAN) })
	if _, err := cert.Verify(x509.VerifyOptions{
		Roots: roots, Intermediates: intermediates, CurrentTime: now,
		KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}, // Go doesn't know the one for EKs, which comes next
	}); err != nil {
		return nil, reject(CheckEKChain, "the certificate leads to no configured root: %v", err)
	}
	if cert.IsCA || !slices.ContainsFunc(cert.UnknownExtKeyUsage, oidEKCertificate.Equal) {
		return nil, reject(CheckEKUsage, "the certificate isn't for endorsement keys (%s)", oidEKCertificate)
	}
	if !tpm.Certifies(cert, ek.Public) {
		return nil, reject(CheckEKCertificate, "the certificate is for another key than this EK")
	}
	return cert, nil
}

// makeOf reads who made the TPM out of the alternative name; parts that can't
// be read are left empty, since nothing rests on them but what operators see.
func makeOf(cert *x509.Certificate) (manufacturer, model, version string) {
	for _, extension := range cert.Extensions {
		if !extension.Id.Equal(oidSAN) {
			continue
		}
		var names []asn1.RawValue
		if _, err := asn1.Unmarshal(extension.Value, &names); err != nil {
			return
		}
		for _, name := range names {
			var sequence pkix.RDNSequence
			if name.Class != asn1.ClassContextSpecific || name.Tag != directoryNameTag {
				continue
			}
			if _, err := asn1.Unmarshal(name.Bytes, &sequence); err != nil {
				continue
			}
			for _, set := range sequence {
				for _, attribute := range set {
					value, _ := attribute.Value.(string)
					switch {
					case attribute.Type.Equal(oidManufacturer):
						manufacturer = value
					case attribute.Type.Equal(oidModel):
						model = value
					case attribute.Type.Equal(oidVersion):
						version = value
					}
				}
			}
		}
	}
	return
}

// NewChallenge makes a secret that can be read only by a TPM that has both the
// EK and the AK. Its owner compares what comes back in constant time.
func NewChallenge(random io.Reader, ek *EK, ak *AK) (challenge tpm.Challenge, secret []byte, err error) {
	defer guard(&err)
	secret = make([]byte, secretSize)
	if _, err := io.ReadFull(random, secret); err != nil {
		return tpm.Challenge{}, nil, err
	}
	key, err := tpm2.ImportEncapsulationKey(&ek.public)
	if err != nil {
		return tpm.Challenge{}, nil, reject(CheckEKKey, "the EK can't be challenged: %v", err)
	}
	blob, encrypted, err := tpm2.CreateCredential(random, key, ak.Name(), secret)
	if err != nil {
		return tpm.Challenge{}, nil, reject(CheckEKKey, "the EK can't be challenged: %v", err)
	}
	return tpm.Challenge{CredentialBlob: blob, EncryptedSecret: encrypted}, secret, nil
}
