package appraise_test

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/google/go-tpm/tpm2"

	"github.com/countersign/countersign/attestors/evidence"
	"github.com/countersign/countersign/attestors/tpm"
	"github.com/countersign/countersign/attestors/tpm/appraise"
	"github.com/countersign/countersign/attestors/tpm/collect"
	"github.com/countersign/countersign/test/lab"
)

// A software AK's bytes are those of a real one, so it can be read. Only the
// challenge to a real TPM's EK shows that it isn't in there.
func TestSoftwareAKFailsActivation(t *testing.T) {
	device := devices[0]
	presented := ekOf(t, device, tpm.P256)
	ek := must[*appraise.EK](t)(verifyEK(presented))
	blob := must[collect.Blob](t)(device.CreateAK(t.Context(), tpm.P256))
	open := func(c tpm.Challenge) ([]byte, error) { return device.Activate(t.Context(), blob, presented, c) }
	if err := activates(t, ek, must[*appraise.AK](t)(appraise.ParseAK(blob.Public())), open); err != nil {
		t.Fatalf("the honest twin: %v", err)
	}

	soft := must[*lab.SoftTPM](t)(lab.NewSoftTPM(nil))
	ak, err := appraise.ParseAK(soft.AKPublic)
	if err != nil {
		t.Fatalf("a software AK can't be told apart by its bytes, but: %v", err)
	}
	if err := activates(t, ek, ak, open); err == nil {
		t.Error("the TPM opened a challenge for an AK that it doesn't have")
	}
	if err := activates(t, ek, ak, soft.Activate); err == nil {
		t.Error("software opened a challenge to a TPM's EK")
	}
}

func TestAKOfAnotherTPMFailsActivation(t *testing.T) {
	for _, alg := range []tpm.KeyAlgorithm{tpm.P256, tpm.RSA2048, tpm.P384} {
		presented := ekOf(t, devices[0], alg)
		ek := must[*appraise.EK](t)(verifyEK(presented))
		own := must[collect.Blob](t)(devices[0].CreateAK(t.Context(), tpm.P256))
		other := must[collect.Blob](t)(devices[1].CreateAK(t.Context(), tpm.P256))
		open := func(c tpm.Challenge) ([]byte, error) { return devices[0].Activate(t.Context(), own, presented, c) }
		if err := activates(t, ek, must[*appraise.AK](t)(appraise.ParseAK(own.Public())), open); err != nil {
			t.Fatalf("the honest twin: %v", err)
		}
		foreign := must[*appraise.AK](t)(appraise.ParseAK(other.Public()))
		if err := activates(t, ek, foreign, open); err == nil {
			t.Errorf("EK %s: the TPM opened a challenge for another TPM's AK", alg)
		}
		if err := activates(t, ek, foreign, func(c tpm.Challenge) ([]byte, error) {
			return devices[1].Activate(t.Context(), other, ekOf(t, devices[1], alg), c)
		}); err == nil {
			t.Errorf("EK %s: another TPM opened a challenge to this one's EK", alg)
		}
	}
}

// The lab's software TPMs join as real ones do.
func TestSoftTPMActivatesItsOwnAK(t *testing.T) {
	soft := must[*lab.SoftTPM](t)(lab.NewSoftTPM(maker))
	ek := must[*appraise.EK](t)(verifyEK(soft.EK))
	ak := must[*appraise.AK](t)(appraise.ParseAK(soft.AKPublic))
	if err := activates(t, ek, ak, soft.Activate); err != nil || !ek.Certified {
		t.Errorf("certified %v: %v", ek.Certified, err)
	}
	c := must[tpm.Certification](t)(soft.Certify(extra))
	must[[]byte](t)(ak.VerifyCertification(soft.TLSPublic, c, extra))
}

func TestEKCertificateAttacks(t *testing.T) {
	key := must[*ecdsa.PrivateKey](t)(ecdsa.GenerateKey(elliptic.P256(), rand.Reader)).Public()
	other := must[*ecdsa.PrivateKey](t)(ecdsa.GenerateKey(elliptic.P256(), rand.Reader)).Public()
	stranger := must[*lab.TPMCA](t)(lab.NewTPMCA(t.TempDir()))
	issue := func(ca *lab.TPMCA, key crypto.PublicKey, edits ...func(*x509.Certificate)) []byte {
		return must[[]byte](t)(ca.IssueEK(key, edits...))
	}
	good := issue(maker, key)
	for _, attack := range []struct {
		name        string
		certificate []byte
		want        evidence.Check
	}{
		{"of another EK", issue(maker, other), appraise.CheckEKCertificate},
		{"expired", issue(maker, key, func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Minute) }), appraise.CheckEKExpired},
		{"not yet valid", issue(maker, key, func(c *x509.Certificate) { c.NotBefore = time.Now().Add(time.Hour) }), appraise.CheckEKExpired},
		{"wrong EKU", issue(maker, key, func(c *x509.Certificate) {
			c.UnknownExtKeyUsage, c.ExtKeyUsage = nil, []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}
		}), appraise.CheckEKUsage},
		{"no EKU", issue(maker, key, func(c *x509.Certificate) { c.UnknownExtKeyUsage = nil }), appraise.CheckEKUsage},
		{"a CA's", issue(maker, key, func(c *x509.Certificate) { c.IsCA = true }), appraise.CheckEKUsage},
		{"unknown root", issue(stranger, key), appraise.CheckEKChain},
		{"another critical extension", issue(maker, key, func(c *x509.Certificate) {
			c.ExtraExtensions = append(c.ExtraExtensions, pkix.Extension{Id: asn1.ObjectIdentifier{1, 2, 3, 4}, Critical: true, Value: []byte{5, 0}})
		}), appraise.CheckEKChain},
		{"trailing bytes", append(slices.Clone(good), 0), appraise.CheckEKCertificate},
		{"no certificate at all", []byte("certificate"), appraise.CheckEKCertificate},
		{"oversized", append(slices.Clone(good), make([]byte, 10000)...), appraise.CheckEncoding},
	} {
		t.Run(attack.name, func(t *testing.T) {
			ek := must[tpm.EK](t)(ekFor(key, good))
			must[*appraise.EK](t)(verifyEK(ek))
			ek.Certificate = attack.certificate
			_, err := verifyEK(ek)
			rejected(t, err, attack.want)
		})
	}
	t.Run("no roots configured", func(t *testing.T) {
		// Not even if the system trusts the maker for its own purposes.
		system := filepath.Join(t.TempDir(), "roots.pem")
		root, intermediate := maker.PEM()
		if err := os.WriteFile(system, append(root, intermediate...), 0o600); err != nil {
			t.Fatal(err)
		}
		t.Setenv("SSL_CERT_FILE", system)
		_, err := appraise.VerifyEK(must[tpm.EK](t)(ekFor(key, good)), nil, middle, time.Now())
		rejected(t, err, appraise.CheckEKChain)
	})
}

// moreInSequence adds a NULL to a short SEQUENCE, which Go's parser passes over.
func moreInSequence(der []byte) []byte {
	der = append(slices.Clone(der), 5, 0)
	der[1] += 2
	return der
}

func ekFor(key crypto.PublicKey, certificate []byte) (tpm.EK, error) {
	der, err := x509.MarshalPKIXPublicKey(key)
	return tpm.EK{Public: der, Certificate: certificate}, err
}

func TestEKPublicAttacks(t *testing.T) {
	good := must[*lab.SoftTPM](t)(lab.NewSoftTPM(nil)).EK
	must[*appraise.EK](t)(verifyEK(good))
	weak := must[*rsa.PrivateKey](t)(rsa.GenerateKey(rand.Reader, 1024))
	p521 := must[*ecdsa.PrivateKey](t)(ecdsa.GenerateKey(elliptic.P521(), rand.Reader))
	for _, attack := range []struct {
		name string
		ek   tpm.EK
		want evidence.Check
	}{
		{"empty", tpm.EK{}, appraise.CheckEncoding},
		{"trailing bytes", tpm.EK{Public: append(slices.Clone(good.Public), 0)}, appraise.CheckEncoding},
		{"another encoding of the same key", tpm.EK{Public: moreInSequence(good.Public)}, appraise.CheckEncoding},
		{"RSA-1024", must[tpm.EK](t)(ekFor(weak.Public(), nil)), appraise.CheckEKKey},
		{"P-521", must[tpm.EK](t)(ekFor(p521.Public(), nil)), appraise.CheckEKKey},
	} {
		t.Run(attack.name, func(t *testing.T) {
			_, err := verifyEK(attack.ek)
			rejected(t, err, attack.want)
		})
	}
}

// edited is a public area after an edit.
func edited(t *testing.T, public []byte, edit func(*tpm2.TPMTPublic)) []byte {
	t.Helper()
	area := must[*tpm2.TPMTPublic](t)(tpm2.Unmarshal[tpm2.TPMTPublic](public))
	edit(area)
	return tpm2.Marshal(*area)
}

func attribute(edit func(*tpm2.TPMAObject)) func(*tpm2.TPMTPublic) {
	return func(p *tpm2.TPMTPublic) { edit(&p.ObjectAttributes) }
}

func eccParms(scheme tpm2.TPMTECCScheme, curve tpm2.TPMECCCurve) func(*tpm2.TPMTPublic) {
	return func(p *tpm2.TPMTPublic) {
		p.Parameters = tpm2.NewTPMUPublicParms(tpm2.TPMAlgECC, &tpm2.TPMSECCParms{Scheme: scheme, CurveID: curve})
	}
}

func ecdsaWith(hash tpm2.TPMIAlgHash) tpm2.TPMTECCScheme {
	return tpm2.TPMTECCScheme{Scheme: tpm2.TPMAlgECDSA,
		Details: tpm2.NewTPMUAsymScheme(tpm2.TPMAlgECDSA, &tpm2.TPMSSigSchemeECDSA{HashAlg: hash})}
}

// nullScheme is a public area with TPM_ALG_NULL as its scheme: such a key takes
// the scheme that its user names.
func nullScheme(t *testing.T, public []byte) []byte {
	t.Helper()
	i := bytes.Index(public, []byte{0x00, 0x18, 0x00, 0x0b}) // ECDSA, SHA-256
	if i < 0 {
		t.Fatal("no scheme found")
	}
	return slices.Concat(public[:i], []byte{0x00, 0x10}, public[i+4:])
}

func TestAKAttacks(t *testing.T) {
	good := must[collect.Blob](t)(devices[0].CreateAK(t.Context(), tpm.P256)).Public()
	goodRSA := must[collect.Blob](t)(devices[0].CreateAK(t.Context(), tpm.RSA2048)).Public()
	must[*appraise.AK](t)(appraise.ParseAK(good))
	must[*appraise.AK](t)(appraise.ParseAK(goodRSA))
	for _, attack := range []struct {
		name   string
		public []byte
		want   evidence.Check
	}{
		{"empty", nil, appraise.CheckEncoding},
		{"trailing bytes in the TPMT", append(slices.Clone(good), 0), appraise.CheckEncoding},
		{"trailing bytes in the TPMT, RSA", append(slices.Clone(goodRSA), 0), appraise.CheckEncoding},
		{"cut short", good[:len(good)-1], appraise.CheckEncoding},
		{"oversized", append(slices.Clone(good), make([]byte, 4096)...), appraise.CheckEncoding},
		{"as TPM2B", append([]byte{0, byte(len(good))}, good...), appraise.CheckKeyType},
		{"as TPM2B with trailing bytes", append(append([]byte{0, byte(len(good))}, good...), 1, 2, 3), appraise.CheckKeyType},
		{"NULL scheme", nullScheme(t, good), appraise.CheckScheme},
		{"RSAPSS scheme", edited(t, goodRSA, func(p *tpm2.TPMTPublic) {
			must[*tpm2.TPMSRSAParms](t)(p.Parameters.RSADetail()).Scheme = tpm2.TPMTRSAScheme{Scheme: tpm2.TPMAlgRSAPSS,
				Details: tpm2.NewTPMUAsymScheme(tpm2.TPMAlgRSAPSS, &tpm2.TPMSSigSchemeRSAPSS{HashAlg: tpm2.TPMAlgSHA256})}
		}), appraise.CheckScheme},
		{"SHA-1 scheme", edited(t, good, eccParms(ecdsaWith(tpm2.TPMAlgSHA1), tpm2.TPMECCNistP256)), appraise.CheckScheme},
		{"P-384", edited(t, good, eccParms(ecdsaWith(tpm2.TPMAlgSHA256), tpm2.TPMECCNistP384)), appraise.CheckKeyType},
		{"SHA-1 name", edited(t, good, func(p *tpm2.TPMTPublic) { p.NameAlg = tpm2.TPMAlgSHA1 }), appraise.CheckKeyType},
		{"not a point of the curve", func() []byte { b := slices.Clone(good); b[len(b)-1] ^= 1; return b }(), appraise.CheckKeyType},
		{"a key derivation scheme", bytes.Replace(good, []byte{0, 3, 0, 0x10}, []byte{0, 3, 0, 0x20}, 1), appraise.CheckScheme}, // behind the curve
		{"not restricted", edited(t, good, attribute(func(a *tpm2.TPMAObject) { a.Restricted = false })), appraise.CheckAttributes},
		{"not fixedTPM", edited(t, good, attribute(func(a *tpm2.TPMAObject) { a.FixedTPM = false })), appraise.CheckAttributes},
		{"not fixedParent", edited(t, good, attribute(func(a *tpm2.TPMAObject) { a.FixedParent = false })), appraise.CheckAttributes},
		{"imported", edited(t, good, attribute(func(a *tpm2.TPMAObject) { a.SensitiveDataOrigin = false })), appraise.CheckAttributes},
		{"doesn't sign", edited(t, good, attribute(func(a *tpm2.TPMAObject) { a.SignEncrypt = false })), appraise.CheckAttributes},
		{"decrypts", edited(t, good, attribute(func(a *tpm2.TPMAObject) { a.Decrypt = true })), appraise.CheckAttributes},
		{"a policy", edited(t, good, func(p *tpm2.TPMTPublic) { p.AuthPolicy.Buffer = make([]byte, 32) }), appraise.CheckAttributes},
		{"unknown attributes", func() []byte { b := slices.Clone(good); b[4] |= 0x80; return b }(), appraise.CheckAttributes},
		{"a storage key", tpm2.Marshal(tpm2.ECCSRKTemplate), appraise.CheckKeyType},
		{"RSA exponent 3", edited(t, goodRSA, func(p *tpm2.TPMTPublic) { must[*tpm2.TPMSRSAParms](t)(p.Parameters.RSADetail()).Exponent = 3 }), appraise.CheckKeyType},
		{"RSA-1024", edited(t, goodRSA, func(p *tpm2.TPMTPublic) { must[*tpm2.TPMSRSAParms](t)(p.Parameters.RSADetail()).KeyBits = 1024 }), appraise.CheckKeyType},
	} {
		t.Run(attack.name, func(t *testing.T) {
			_, err := appraise.ParseAK(attack.public)
			rejected(t, err, attack.want)
		})
	}
}

// Each forged TLS key is certified by an AK that signs what it is told to.
func TestTLSKeyAttacks(t *testing.T) {
	soft := must[*lab.SoftTPM](t)(lab.NewSoftTPM(nil))
	ak := must[*appraise.AK](t)(appraise.ParseAK(soft.AKPublic))
	good := soft.TLSPublic
	must[[]byte](t)(ak.VerifyCertification(good, must[tpm.Certification](t)(soft.Certify(extra)), extra))
	for _, attack := range []struct {
		name   string
		public []byte
		want   evidence.Check
	}{
		{"without noDA", edited(t, good, attribute(func(a *tpm2.TPMAObject) { a.NoDA = false })), appraise.CheckAttributes},
		{"not fixedTPM", edited(t, good, attribute(func(a *tpm2.TPMAObject) { a.FixedTPM = false })), appraise.CheckAttributes},
		{"not fixedParent", edited(t, good, attribute(func(a *tpm2.TPMAObject) { a.FixedParent = false })), appraise.CheckAttributes},
		{"imported", edited(t, good, attribute(func(a *tpm2.TPMAObject) { a.SensitiveDataOrigin = false })), appraise.CheckAttributes},
		{"restricted", edited(t, good, attribute(func(a *tpm2.TPMAObject) { a.Restricted = true })), appraise.CheckAttributes},
		{"decrypts", edited(t, good, attribute(func(a *tpm2.TPMAObject) { a.Decrypt = true })), appraise.CheckAttributes},
		{"NULL scheme", nullScheme(t, good), appraise.CheckScheme},
		{"trailing bytes", append(slices.Clone(good), 0), appraise.CheckEncoding},
		{"RSA", must[collect.Blob](t)(devices[0].CreateAK(t.Context(), tpm.RSA2048)).Public(), appraise.CheckKeyType},
	} {
		t.Run(attack.name, func(t *testing.T) {
			forger := forgedTLS(soft, attack.public)
			c := must[tpm.Certification](t)(forger.Certify(extra))
			_, err := ak.VerifyCertification(attack.public, c, extra)
			rejected(t, err, attack.want)
		})
	}
}
