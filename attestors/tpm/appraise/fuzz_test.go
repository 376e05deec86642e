package appraise_test

import (
	"bytes"
	"testing"

	"github.com/countersign/countersign/attestors/evidence"
	"github.com/countersign/countersign/attestors/tpm"
	"github.com/countersign/countersign/attestors/tpm/appraise"
	"github.com/countersign/countersign/attestors/tpm/collect"
	"github.com/countersign/countersign/test/lab"
)

// judged demands that hostile input is accepted or rejected by a named check,
// and that nothing panicked on the way.
func judged(t *testing.T, err error) {
	t.Helper()
	if err == nil {
		return
	}
	if check := evidence.CheckOf(err); check == "" || check == appraise.CheckInternal {
		t.Errorf("%v", err)
	}
}

func FuzzParseAK(f *testing.F) {
	public, _, _ := bootQuote(f)
	f.Add(public)
	for _, alg := range []tpm.KeyAlgorithm{tpm.P256, tpm.RSA2048} {
		f.Add(must[collect.Blob](f)(devices[0].CreateAK(f.Context(), alg)).Public())
	}
	f.Fuzz(func(t *testing.T, public []byte) {
		ak, err := appraise.ParseAK(public)
		judged(t, err)
		if err == nil && !bytes.Equal(ak.Encoded(), public) {
			t.Error("the AK's encoding isn't what was read")
		}
	})
}

func FuzzVerifyQuote(f *testing.F) {
	public, q, nonce := bootQuote(f)
	f.Add(public, q.Attest, q.Signature, []byte{0, 4, 7}, nonce[:])
	for _, alg := range []tpm.KeyAlgorithm{tpm.P256, tpm.RSA2048} {
		blob := must[collect.Blob](f)(devices[0].CreateAK(f.Context(), alg))
		q := must[tpm.Quote](f)(devices[0].Quote(f.Context(), blob, extra, tpm.DefaultPCRs()))
		f.Add(blob.Public(), q.Attest, q.Signature, []byte{0, 1, 2}, extra[:])
	}
	f.Fuzz(func(t *testing.T, public, attest, signature, indices, binding []byte) {
		ak, err := appraise.ParseAK(public)
		judged(t, err)
		if err != nil {
			return
		}
		quote := tpm.Quote{Attest: attest, Signature: signature}
		for _, index := range indices {
			quote.PCRs = append(quote.PCRs, tpm.PCR{Index: int(int8(index))})
		}
		_, err = ak.VerifyQuote(quote, evidence.Sum(binding), []int{0})
		judged(t, err)
	})
}

func FuzzVerifyCertification(f *testing.F) {
	soft := must[*lab.SoftTPM](f)(lab.NewSoftTPM(nil))
	ak := must[*appraise.AK](f)(appraise.ParseAK(soft.AKPublic))
	c := must[tpm.Certification](f)(soft.Certify(extra))
	f.Add(soft.TLSPublic, c.Attest, c.Signature)
	key := must[collect.Blob](f)(devices[0].CreateTLSKey(f.Context()))
	blob := must[collect.Blob](f)(devices[0].CreateAK(f.Context(), tpm.P256))
	c = must[tpm.Certification](f)(devices[0].Certify(f.Context(), blob, key, extra))
	f.Add(key.Public(), c.Attest, c.Signature)
	f.Fuzz(func(t *testing.T, public, attest, signature []byte) {
		_, err := ak.VerifyCertification(public, tpm.Certification{Attest: attest, Signature: signature}, extra)
		judged(t, err)
	})
}

func FuzzVerifyEK(f *testing.F) {
	for _, alg := range []tpm.KeyAlgorithm{tpm.P256, tpm.RSA2048, tpm.P384} {
		ek := ekOf(f, devices[0], alg)
		f.Add(ek.Public, ek.Certificate)
	}
	f.Add(must[*lab.SoftTPM](f)(lab.NewSoftTPM(nil)).EK.Public, fixture(f, "clean/ek_rsa_cert.der"))
	f.Fuzz(func(t *testing.T, public, certificate []byte) {
		ek, err := verifyEK(tpm.EK{Public: public, Certificate: certificate})
		judged(t, err)
		if err == nil && ek.Certified != (len(certificate) > 0) {
			t.Error("certified without a certificate, or not with one")
		}
	})
}
