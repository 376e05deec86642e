package appraise_test

import (
	"crypto/sha256"
	"encoding/binary"
	"slices"
	"testing"

	"github.com/google/go-tpm/tpm2"

	"github.com/countersign/countersign/attestors/evidence"
	"github.com/countersign/countersign/attestors/tpm"
	"github.com/countersign/countersign/attestors/tpm/appraise"
	"github.com/countersign/countersign/attestors/tpm/collect"
	"github.com/countersign/countersign/test/lab"
)

// A statementEdit changes a statement before an attacker's AK signs it.
type statementEdit = func(*tpm2.TPMSAttest)

func selectBanks(banks ...tpm2.TPMSPCRSelection) statementEdit {
	return func(a *tpm2.TPMSAttest) {
		info, _ := a.Attested.Quote()
		info.PCRSelect.PCRSelections = banks
	}
}

func bank(hash tpm2.TPMIAlgHash, pcrs ...uint) tpm2.TPMSPCRSelection {
	return tpm2.TPMSPCRSelection{Hash: hash, PCRSelect: tpm2.PCClientCompatible.PCRs(pcrs...)}
}

// digestOf makes the quote's digest one over these values.
func digestOf(values ...evidence.Digest) statementEdit {
	return func(a *tpm2.TPMSAttest) {
		h := sha256.New()
		for _, v := range values {
			h.Write(v[:])
		}
		info, _ := a.Attested.Quote()
		info.PCRDigest.Buffer = h.Sum(nil)
	}
}

var none = tpm2.TPMSPCRSelection{Hash: tpm2.TPMAlgSHA256, PCRSelect: make([]byte, 3)}

func TestQuoteAttacks(t *testing.T) {
	soft := must[*lab.SoftTPM](t)(lab.NewSoftTPM(maker))
	other := must[*lab.SoftTPM](t)(lab.NewSoftTPM(maker))
	ak := must[*appraise.AK](t)(appraise.ParseAK(soft.AKPublic))
	pcrs := []int{0, 4, 7}
	soft.PCRs[4] = evidence.Sum([]byte("boot loader"))
	other.PCRs = soft.PCRs
	forged := evidence.Sum([]byte("the boot loader that should be"))

	quote := func(t *testing.T, edits ...statementEdit) tpm.Quote {
		t.Helper()
		return must[tpm.Quote](t)(soft.Quote(extra, pcrs, edits...))
	}
	change := func(edits ...statementEdit) func(*testing.T) tpm.Quote {
		return func(t *testing.T) tpm.Quote { return quote(t, edits...) }
	}
	report := func(edit func(*tpm.Quote)) func(*testing.T) tpm.Quote {
		return func(t *testing.T) tpm.Quote {
			q := quote(t)
			edit(&q)
			return q
		}
	}
	resign := func(edit func([]byte) []byte) func(*testing.T) tpm.Quote {
		return func(t *testing.T) tpm.Quote {
			q := quote(t)
			q.Attest = edit(q.Attest)
			q.Signature = must[[]byte](t)(soft.Sign(q.Attest))
			return q
		}
	}
	for _, attack := range []struct {
		name string
		make func(*testing.T) tpm.Quote
		want evidence.Check
	}{
		{"duplicate PCR, the forged one first", report(func(q *tpm.Quote) { q.PCRs = append([]tpm.PCR{{Index: 4, SHA256: forged}}, q.PCRs...) }), appraise.CheckDuplicatePCR},
		{"duplicate PCR, the forged one last", report(func(q *tpm.Quote) { q.PCRs = append(q.PCRs, tpm.PCR{Index: 4, SHA256: forged}) }), appraise.CheckDuplicatePCR},
		{"duplicate PCR of the same value", report(func(q *tpm.Quote) { q.PCRs = append(q.PCRs, q.PCRs[1]) }), appraise.CheckDuplicatePCR},
		{"very many PCRs", report(func(q *tpm.Quote) { q.PCRs = slices.Repeat(q.PCRs, 1000) }), appraise.CheckDuplicatePCR},
		{"forged value", report(func(q *tpm.Quote) { q.PCRs[1].SHA256 = forged }), appraise.CheckPCRDigest},
		{"values swapped", report(func(q *tpm.Quote) { q.PCRs[0].SHA256, q.PCRs[1].SHA256 = q.PCRs[1].SHA256, q.PCRs[0].SHA256 }), appraise.CheckPCRDigest},
		{"a quoted PCR not reported", report(func(q *tpm.Quote) { q.PCRs = q.PCRs[:2] }), appraise.CheckSelection},
		{"a PCR reported that was not quoted", report(func(q *tpm.Quote) { q.PCRs = append(q.PCRs, tpm.PCR{Index: 9}) }), appraise.CheckSelection},
		{"a PCR that no TPM has", report(func(q *tpm.Quote) { q.PCRs[2].Index = 1 << 40 }), appraise.CheckSelection},
		{"a negative PCR", report(func(q *tpm.Quote) { q.PCRs[2].Index = -1 }), appraise.CheckSelection},
		{"missing PCR", func(t *testing.T) tpm.Quote { return must[tpm.Quote](t)(soft.Quote(extra, []int{0, 4})) }, appraise.CheckRequiredPCR},
		{"empty selection", func(t *testing.T) tpm.Quote {
			q := quote(t, selectBanks(none), digestOf())
			q.PCRs = nil
			return q
		}, appraise.CheckSelection},
		{"empty selection, values reported", change(selectBanks(none), digestOf()), appraise.CheckSelection},
		{"no bank", change(selectBanks(), digestOf()), appraise.CheckSelection},
		{"SHA-1 bank", change(selectBanks(bank(tpm2.TPMAlgSHA1, 0, 4, 7))), appraise.CheckBank},
		{"SHA-384 bank", change(selectBanks(bank(tpm2.TPMAlgSHA384, 0, 4, 7))), appraise.CheckBank},
		{"several banks", change(selectBanks(bank(tpm2.TPMAlgSHA1, 0), bank(tpm2.TPMAlgSHA256, 0, 4, 7))), appraise.CheckBank},
		{"one bank twice", change(selectBanks(bank(tpm2.TPMAlgSHA256, 0), bank(tpm2.TPMAlgSHA256, 4, 7))), appraise.CheckBank},
		{"nil extraData", change(func(a *tpm2.TPMSAttest) { a.ExtraData.Buffer = nil }), appraise.CheckExtraData},
		{"extraData of another request", change(func(a *tpm2.TPMSAttest) { a.ExtraData.Buffer[0] ^= 1 }), appraise.CheckExtraData},
		{"extraData with more behind it", change(func(a *tpm2.TPMSAttest) { a.ExtraData.Buffer = append(a.ExtraData.Buffer, 0) }), appraise.CheckExtraData},
		{"extraData cut short", change(func(a *tpm2.TPMSAttest) { a.ExtraData.Buffer = a.ExtraData.Buffer[:31] }), appraise.CheckExtraData},
		{"not made by a TPM", change(func(a *tpm2.TPMSAttest) { a.Magic = 0x12345678 }), appraise.CheckMagic},
		{"a certification instead", func(t *testing.T) tpm.Quote {
			q := quote(t)
			c := must[tpm.Certification](t)(soft.Certify(extra))
			q.Attest, q.Signature = c.Attest, c.Signature
			return q
		}, appraise.CheckType},
		{"by another AK", func(t *testing.T) tpm.Quote { return must[tpm.Quote](t)(other.Quote(extra, pcrs)) }, appraise.CheckSignature},
		{"changed after it was signed", report(func(q *tpm.Quote) { q.Attest[len(q.Attest)-1] ^= 1 }), appraise.CheckSignature},
		{"signature changed", report(func(q *tpm.Quote) { q.Signature[len(q.Signature)-1] ^= 1 }), appraise.CheckSignature},
		{"signature with a NULL scheme", report(func(q *tpm.Quote) { q.Signature = []byte{0x00, 0x10} }), appraise.CheckScheme},
		{"signature with an RSA scheme", report(func(q *tpm.Quote) { binary.BigEndian.PutUint16(q.Signature, 0x14) }), appraise.CheckScheme},
		{"signature with SHA-1", report(func(q *tpm.Quote) { binary.BigEndian.PutUint16(q.Signature[2:], 0x04) }), appraise.CheckScheme},
		{"no signature", report(func(q *tpm.Quote) { q.Signature = nil }), appraise.CheckEncoding},
		{"trailing bytes in the signature", report(func(q *tpm.Quote) { q.Signature = append(q.Signature, 0) }), appraise.CheckEncoding},
		{"trailing bytes in the statement", resign(func(b []byte) []byte { return append(b, 0) }), appraise.CheckEncoding},
		{"statement cut short", resign(func(b []byte) []byte { return b[:len(b)-1] }), appraise.CheckEncoding},
		{"a safe flag that is neither", resign(func(b []byte) []byte { b[4+2+2+2+32+8+4+4] = 2; return b }), appraise.CheckEncoding},
		{"oversized statement", resign(func(b []byte) []byte { return append(b, make([]byte, 4096)...) }), appraise.CheckEncoding},
		{"no statement", report(func(q *tpm.Quote) { q.Attest = nil }), appraise.CheckEncoding},
	} {
		t.Run(attack.name, func(t *testing.T) {
			must[*appraise.Verified](t)(ak.VerifyQuote(quote(t), extra, pcrs))
			_, err := ak.VerifyQuote(attack.make(t), extra, pcrs)
			rejected(t, err, attack.want)
		})
	}
	t.Run("bound to nothing", func(t *testing.T) {
		q := must[tpm.Quote](t)(soft.Quote(evidence.Digest{}, pcrs))
		_, err := ak.VerifyQuote(q, evidence.Digest{}, pcrs)
		rejected(t, err, appraise.CheckExtraData)
	})
	t.Run("nothing required", func(t *testing.T) {
		_, err := ak.VerifyQuote(quote(t), extra, nil)
		rejected(t, err, appraise.CheckRequiredPCR)
	})
}

// The same attacks that a host can make with a TPM of its own.
func TestQuoteAttacksWithARealTPM(t *testing.T) {
	device := devices[0]
	for _, alg := range []tpm.KeyAlgorithm{tpm.P256, tpm.RSA2048} {
		blob := must[collect.Blob](t)(device.CreateAK(t.Context(), alg))
		second := must[collect.Blob](t)(device.CreateAK(t.Context(), alg))
		ak := must[*appraise.AK](t)(appraise.ParseAK(blob.Public()))
		pcrs := []int{0, 4, 23}
		good := must[tpm.Quote](t)(device.Quote(t.Context(), blob, extra, pcrs))
		must[*appraise.Verified](t)(ak.VerifyQuote(good, extra, pcrs))

		_, err := ak.VerifyQuote(must[tpm.Quote](t)(device.Quote(t.Context(), second, extra, pcrs)), extra, pcrs)
		rejected(t, err, appraise.CheckSignature)

		_, err = ak.VerifyQuote(good, evidence.Sum([]byte("another request")), pcrs)
		rejected(t, err, appraise.CheckExtraData)

		// The extension that the host would rather not show.
		if err := realTPMs[0].Extend(23, []byte("malware")); err != nil {
			t.Fatal(err)
		}
		later := must[tpm.Quote](t)(device.Quote(t.Context(), blob, extra, pcrs))
		must[*appraise.Verified](t)(ak.VerifyQuote(later, extra, pcrs))
		later.PCRs = good.PCRs
		_, err = ak.VerifyQuote(later, extra, pcrs)
		rejected(t, err, appraise.CheckPCRDigest)
	}
}

// forgedTLS is a software TPM that certifies another TLS key.
func forgedTLS(soft *lab.SoftTPM, public []byte) *lab.SoftTPM {
	forger := soft.Clone()
	forger.TLSPublic = public
	return forger
}

func TestCertificationAttacks(t *testing.T) {
	soft := must[*lab.SoftTPM](t)(lab.NewSoftTPM(nil))
	other := must[*lab.SoftTPM](t)(lab.NewSoftTPM(nil))
	ak := must[*appraise.AK](t)(appraise.ParseAK(soft.AKPublic))
	for _, attack := range []struct {
		name string
		make func(*testing.T) (tpm.Certification, error)
		want evidence.Check
	}{
		{"of another key", func(*testing.T) (tpm.Certification, error) { return forgedTLS(soft, other.TLSPublic).Certify(extra) }, appraise.CheckName},
		{"by another AK", func(*testing.T) (tpm.Certification, error) { return forgedTLS(other, soft.TLSPublic).Certify(extra) }, appraise.CheckSignature},
		{"wrong extraData", func(*testing.T) (tpm.Certification, error) { return soft.Certify(evidence.Sum(nil)) }, appraise.CheckExtraData},
		{"nil extraData", func(*testing.T) (tpm.Certification, error) {
			return soft.Certify(extra, func(a *tpm2.TPMSAttest) { a.ExtraData.Buffer = nil })
		}, appraise.CheckExtraData},
		{"not made by a TPM", func(*testing.T) (tpm.Certification, error) {
			return soft.Certify(extra, func(a *tpm2.TPMSAttest) { a.Magic = 0 })
		}, appraise.CheckMagic},
		{"a quote instead", func(t *testing.T) (tpm.Certification, error) {
			q, err := soft.Quote(extra, []int{0})
			return tpm.Certification{Attest: q.Attest, Signature: q.Signature}, err
		}, appraise.CheckType},
		{"trailing bytes in the statement", func(t *testing.T) (c tpm.Certification, err error) {
			c = must[tpm.Certification](t)(soft.Certify(extra))
			c.Attest = append(c.Attest, 0)
			c.Signature, err = soft.Sign(c.Attest)
			return c, err
		}, appraise.CheckEncoding},
		{"trailing bytes in the signature", func(t *testing.T) (tpm.Certification, error) {
			c, err := soft.Certify(extra)
			c.Signature = append(c.Signature, 0)
			return c, err
		}, appraise.CheckEncoding},
	} {
		t.Run(attack.name, func(t *testing.T) {
			must[[]byte](t)(ak.VerifyCertification(soft.TLSPublic, must[tpm.Certification](t)(soft.Certify(extra)), extra))
			_, err := ak.VerifyCertification(soft.TLSPublic, must[tpm.Certification](t)(attack.make(t)), extra)
			rejected(t, err, attack.want)
		})
	}
}

// A quote that another tool asked for has a nonce of any length that a TPM takes,
// and is bound to the whole of it.
func TestRecordedQuotes(t *testing.T) {
	soft := must[*lab.SoftTPM](t)(lab.NewSoftTPM(maker))
	ak := must[*appraise.AK](t)(appraise.ParseAK(soft.AKPublic))
	pcrs := []int{0, 4, 7}
	for _, n := range []int{1, 16, 20, 32, 48, appraise.MaxNonce} {
		nonce := make([]byte, n)
		nonce[n-1] = 7
		q := must[tpm.Quote](t)(soft.Quote(extra, pcrs, func(a *tpm2.TPMSAttest) { a.ExtraData.Buffer = nonce }))
		must[*appraise.Verified](t)(ak.VerifyRecordedQuote(q, nonce, pcrs))

		for _, other := range [][]byte{append(slices.Clone(nonce), 0), append([]byte{1}, nonce[1:]...), nonce[:n-1]} {
			if slices.Equal(other, nonce) {
				continue
			}
			_, err := ak.VerifyRecordedQuote(q, other, pcrs)
			rejected(t, err, appraise.CheckExtraData)
		}
		if n != len(extra) { // a broker's own are digests
			_, err := ak.VerifyQuote(q, extra, pcrs)
			rejected(t, err, appraise.CheckExtraData)
		}
	}
}
