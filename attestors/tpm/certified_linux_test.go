package tpm_test

import (
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/asn1"
	"testing"

	"github.com/countersign/countersign/attestors/tpm"
	"github.com/countersign/countersign/test/check"
	"github.com/countersign/countersign/test/lab"
)

// A certificate is for a key, whichever name it gives the key's algorithm.
func TestCertifies(t *testing.T) {
	ca := check.Must(lab.NewTPMCA(t.TempDir()))(t)
	key := check.Must(rsa.GenerateKey(rand.Reader, 2048))(t)
	other := check.Must(rsa.GenerateKey(rand.Reader, 2048))(t)
	der := check.Must(ca.IssueEK(key.Public()))(t)
	plain := check.Must(x509.ParseCertificate(der))(t)

	// crypto/x509 makes no certificate with this name, so it is put in by hand: the
	// signature doesn't fit any more, which only the broker checks.
	oaep := *plain
	oaep.PublicKey = nil
	oaep.RawSubjectPublicKeyInfo = check.Must(asn1.Marshal(struct {
		Algorithm struct{ ID asn1.ObjectIdentifier }
		Key       asn1.BitString
	}{
		struct{ ID asn1.ObjectIdentifier }{asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 1, 7}},
		asn1.BitString{Bytes: x509.MarshalPKCS1PublicKey(&key.PublicKey), BitLength: 8 * len(x509.MarshalPKCS1PublicKey(&key.PublicKey))},
	}))(t)

	unknown := oaep
	unknown.RawSubjectPublicKeyInfo = []byte{0x30, 0}

	public := check.Must(x509.MarshalPKIXPublicKey(key.Public()))(t)
	wrong := check.Must(x509.MarshalPKIXPublicKey(other.Public()))(t)
	for name, tt := range map[string]struct {
		cert   *x509.Certificate
		public []byte
		want   bool
	}{
		"its key":             {plain, public, true},
		"another key":         {plain, wrong, false},
		"its key, as OAEP":    {&oaep, public, true},
		"another key, OAEP":   {&oaep, wrong, false},
		"an unknown kind":     {&unknown, public, false},
		"no key to compare":   {plain, nil, false},
		"garbage for the key": {plain, []byte("garbage"), false},
	} {
		if got := tpm.Certifies(tt.cert, tt.public); got != tt.want {
			t.Errorf("%s: %v", name, got)
		}
	}
}
