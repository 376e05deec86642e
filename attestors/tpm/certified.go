package tpm

import (
	"crypto"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"errors"
)

// Bounds of what a TPM holds, on both sides.
const (
	MaxCertificate = 8192 // bytes of a certificate
	MaxIssuers     = 16   // certificates of CAs; Intel's firmware TPMs have 3
)

var oidRSAESOAEP = asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 1, 7}

// CertifiedKey returns the key that cert certifies, or nil if it is of no known
// kind. Some makers name the algorithm of an RSA EK "RSA with OAEP", which
// crypto/x509 doesn't parse; CertifiedKey does.
func CertifiedKey(cert *x509.Certificate) crypto.PublicKey {
	if cert.PublicKey != nil {
		return cert.PublicKey
	}

	var info struct {
		Algorithm pkix.AlgorithmIdentifier
		Key       asn1.BitString
	}
	if rest, err := asn1.Unmarshal(cert.RawSubjectPublicKeyInfo, &info); err != nil || len(rest) > 0 || !info.Algorithm.Algorithm.Equal(oidRSAESOAEP) {
		return nil
	}
	key, err := x509.ParsePKCS1PublicKey(info.Key.RightAlign())
	if err != nil {
		return nil
	}
	return key
}

// SplitCertificates returns the certificates at the start of data, which holds
// them in DER one after another, and what follows the last of them. At most
// [MaxIssuers] are read.
func SplitCertificates(data []byte) (certs []*x509.Certificate, rest []byte) {
	for len(certs) < MaxIssuers {
		var whole asn1.RawValue
		rest, err := asn1.Unmarshal(data, &whole)
		if err != nil {
			break
		}
		cert, err := x509.ParseCertificate(whole.FullBytes)
		if err != nil {
			break
		}
		certs, data = append(certs, cert), rest
	}
	return certs, data
}

// CertifiedPublic returns the PKIX DER of the key that cert certifies.
func CertifiedPublic(cert *x509.Certificate) ([]byte, error) {
	key := CertifiedKey(cert)
	if key == nil {
		return nil, errors.New("the certificate's key is neither RSA nor ECC, as endorsement keys are")
	}
	return x509.MarshalPKIXPublicKey(key)
}

// Certifies reports whether cert is for the key whose PKIX DER is public. It
// compares the keys themselves, so that it doesn't matter how the certificate
// names the key's algorithm.
func Certifies(cert *x509.Certificate, public []byte) bool {
	key, err := x509.ParsePKIXPublicKey(public)
	if err != nil {
		return false
	}
	certified, ok := CertifiedKey(cert).(interface{ Equal(crypto.PublicKey) bool })
	return ok && certified.Equal(key)
}
