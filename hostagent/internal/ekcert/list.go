package ekcert

import (
	"crypto/x509"
	"errors"
	"os"
	"time"

	"github.com/countersign/countersign/attestors/tpm"
)

// A Source is where the certificate of an EK is.
type Source string

// Sources of a certificate.
const (
	InTPM  Source = "tpm"  // in the TPM's NV memory
	InFile Source = "kept" // fetched or imported
	None   Source = "none"
)

// A Key is what is known of one EK's certificate.
type Key struct {
	Hash      string           `json:"ek_hash"`
	Algorithm tpm.KeyAlgorithm `json:"algorithm"`
	Source    Source           `json:"certificate"`
	Issuer    string           `json:"issuer,omitempty"`
	NotAfter  time.Time        `json:"not_after,omitzero"`
	URL       string           `json:"url,omitempty"`     // where the maker serves it, if it does
	Problem   string           `json:"problem,omitempty"` // why a kept file is not used
}

// List reports on the EKs of a TPM: eks is what the TPM holds, dir the folder of
// the kept certificates. It reads files alone.
func List(dir, manufacturer string, eks []tpm.EK) []Key {
	keys := make([]Key, 0, len(eks))
	for _, ek := range eks {
		k := Key{Hash: ek.Hash().String(), Source: None}
		if key, err := x509.ParsePKIXPublicKey(ek.Public); err == nil {
			k.Algorithm, _ = tpm.AlgorithmOf(key) // collect finds no others
		}
		if address, err := URL(manufacturer, ek); err == nil {
			k.URL = address
		}

		var cert *x509.Certificate
		var err error
		if len(ek.Certificate) > 0 {
			k.Source = InTPM
			cert, err = x509.ParseCertificate(ek.Certificate)
		} else if cert, err = load(dir, ek); err == nil {
			k.Source = InFile
		}
		switch {
		case err == nil:
			k.Issuer, k.NotAfter = cert.Issuer.String(), cert.NotAfter
		case !errors.Is(err, os.ErrNotExist):
			k.Problem = err.Error()
		}
		keys = append(keys, k)
	}
	return keys
}
