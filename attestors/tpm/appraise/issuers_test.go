package appraise_test

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"math/big"
	"testing"

	"github.com/countersign/countersign/attestors/tpm"
	"github.com/countersign/countersign/attestors/tpm/appraise"
)

// Issuers come from whoever asks to join: what isn't a certificate, is too large, or
// would take long to verify by is left out, and more than there may be are not read.
func TestWithIssuers(t *testing.T) {
	signer := must[*ecdsa.PrivateKey](t)(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))
	serial := int64(0)
	certificate := func(key crypto.PublicKey, extra int) []byte {
		serial++
		template := &x509.Certificate{SerialNumber: big.NewInt(serial), IsCA: true, BasicConstraintsValid: true, DNSNames: []string{string(make([]byte, extra))}}
		return must[[]byte](t)(x509.CreateCertificate(rand.Reader, template, template, key, signer))
	}
	long := func(bits uint) *rsa.PublicKey {
		n := new(big.Int).Lsh(big.NewInt(1), bits-1)
		return &rsa.PublicKey{N: n.Add(n, big.NewInt(1)), E: 65537}
	}
	none := x509.NewCertPool()
	for name, c := range map[string]struct {
		der  []byte
		left bool
	}{
		"ECC":                {certificate(signer.Public(), 0), false},
		"RSA-4096":           {certificate(long(4096), 0), false},
		"RSA-8192":           {certificate(long(8192), 0), true},
		"RSA-60000":          {certificate(long(60000), 0), true},
		"garbage":            {[]byte("garbage"), true},
		"nothing":            {nil, true},
		"a large one":        {certificate(signer.Public(), tpm.MaxCertificate), true},
		"a certificate, cut": {certificate(signer.Public(), 0)[:100], true},
	} {
		if left := appraise.WithIssuers(none, [][]byte{c.der}).Equal(none); left != c.left {
			t.Errorf("%s: left out %v", name, left)
		}
	}

	var many [][]byte
	for range tpm.MaxIssuers + 1 {
		many = append(many, certificate(signer.Public(), 0))
	}
	if !appraise.WithIssuers(nil, many).Equal(appraise.WithIssuers(nil, many[:tpm.MaxIssuers])) {
		t.Error("more issuers are read than there may be")
	}
	if !none.Equal(x509.NewCertPool()) {
		t.Error("the configured pool is changed")
	}
}
