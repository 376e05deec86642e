package tpm

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	_ "crypto/sha512"
	"testing"

	"github.com/google/go-tpm/tpm2"
)

// policyOr is TPM2_PolicyOR over two policies of a fresh session.
func policyOr(h crypto.Hash, a, b []byte) []byte {
	or := h.New()
	or.Write(make([]byte, h.Size()))
	or.Write([]byte{0x00, 0x00, 0x01, 0x71}) // TPM_CC_PolicyOR
	or.Write(a)
	or.Write(b)
	return or.Sum(nil)
}

// policyB is policyA or policyC, TPM2_PolicyAuthorizeNV with the index that
// the TCG reserves for it.
func TestPolicyB(t *testing.T) {
	policyC256 := mustHex("3767e2edd43ff45a3a7e1eaefcef78643dca964632e7aad82c673a30d8633fde")
	policyA384 := mustHex("8bbf2266537c171cb56e403c4dc1d4b64f432611dc386e6f532050c3278c930e143e8bb1133824ccb431053871c6db53")
	policyC384 := mustHex("d6032ce61f2fb3c240eb3cf6a33237ef2b6a16f4293c22b455e261cffd217ad5b4947c2d73e63005eed2dc2b3593d165")
	if !bytes.Equal(policyOr(crypto.SHA256, policyASHA256, policyC256), policyBSHA256) {
		t.Error("SHA-256")
	}
	if !bytes.Equal(policyOr(crypto.SHA384, policyA384, policyC384), policyBSHA384) {
		t.Error("SHA-384")
	}
}

// A challenge depends on the name algorithm and the parameters: templates for
// the same kind of key have the same, or a host could choose.
func TestTemplatesOfOneKindAgree(t *testing.T) {
	seen := map[KeyAlgorithm]tpm2.TPMTPublic{}
	for _, template := range EKTemplates() {
		first, ok := seen[template.Algorithm]
		if !ok {
			seen[template.Algorithm] = template.Public
			continue
		}
		same := template.Public
		same.ObjectAttributes, same.AuthPolicy, same.Unique = first.ObjectAttributes, first.AuthPolicy, first.Unique
		if !bytes.Equal(tpm2.Marshal(same), tpm2.Marshal(first)) {
			t.Errorf("%s differs from another template for %s", template.Name, template.Algorithm)
		}
	}
	if len(seen) != 3 {
		t.Errorf("templates for %d kinds", len(seen))
	}
}

// The low-range templates are those that go-tpm has too.
func TestLowRangeTemplates(t *testing.T) {
	for _, template := range EKTemplates() {
		want, ok := map[string]tpm2.TPMTPublic{"L-1": tpm2.RSAEKTemplate, "L-2": tpm2.ECCEKTemplate}[template.Name]
		if ok && !bytes.Equal(tpm2.Marshal(template.Public), tpm2.Marshal(want)) {
			t.Errorf("%s differs", template.Name)
		}
	}
}

func TestKeysThatTPMsDontHave(t *testing.T) {
	weak, err := rsa.GenerateKey(rand.Reader, 1024)
	if err != nil {
		t.Fatal(err)
	}
	odd, err := ecdsa.GenerateKey(elliptic.P224(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	for _, key := range []crypto.PublicKey{weak.Public(), odd.Public(), "key", nil} {
		if _, err := EKPublic(key); err == nil {
			t.Errorf("%T is taken for an EK", key)
		}
	}
	if _, err := AKTemplate(P384); err == nil {
		t.Error("a P-384 AK")
	}
}
