package ca

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rsa"
	"crypto/x509"
	"errors"
	"fmt"
)

// Limits of a certificate request. The key is looked at before the signature,
// because what a check costs grows with the key.
const (
	maxCSR     = 16 << 10
	minRSABits = 2048
	maxRSABits = 4096
)

// parseCSR reads a PKCS #10 request and returns what is used of it: its key, and
// the proof that its maker holds the private half. What else it asks for is left
// out, so that nothing behind this can follow it.
func parseCSR(der []byte) (*x509.CertificateRequest, error) {
	if len(der) > maxCSR {
		return nil, fmt.Errorf("certificate request has %d bytes; at most %d are read", len(der), maxCSR)
	}
	full, err := x509.ParseCertificateRequest(der)
	if err != nil {
		return nil, fmt.Errorf("certificate request is no PKCS #10 request in DER: %w", err)
	}
	if err := checkKey(full.PublicKey); err != nil {
		return nil, err
	}
	if err := full.CheckSignature(); err != nil {
		return nil, fmt.Errorf("certificate request is not signed by its key: %w", err)
	}
	return &x509.CertificateRequest{
		Raw: full.Raw, RawTBSCertificateRequest: full.RawTBSCertificateRequest, RawSubjectPublicKeyInfo: full.RawSubjectPublicKeyInfo,
		Signature: full.Signature, SignatureAlgorithm: full.SignatureAlgorithm,
		PublicKey: full.PublicKey, PublicKeyAlgorithm: full.PublicKeyAlgorithm,
	}, nil
}

func checkKey(key any) error {
	switch k := key.(type) {
	case *ecdsa.PublicKey:
		if k.Curve == elliptic.P256() || k.Curve == elliptic.P384() {
			return nil
		}
		return fmt.Errorf("certificate request has a key on %s; P-256 and P-384 are certified", k.Curve.Params().Name)
	case *rsa.PublicKey:
		if bits := k.N.BitLen(); bits < minRSABits || bits > maxRSABits {
			return fmt.Errorf("certificate request has an RSA key of %d bits; %d to %d are certified", bits, minRSABits, maxRSABits)
		}
		return nil
	}
	return errors.New("certificate request has a key of another kind than P-256, P-384 and RSA")
}
