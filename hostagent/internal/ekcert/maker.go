// Package ekcert is about the certificates of endorsement keys (EKs) that a TPM
// doesn't hold itself: it names the URL at which a TPM's maker serves one,
// fetches it, reads it, and keeps the host's copies in the agent's state folder.
//
// It trusts nobody: neither the maker's server, nor a proxy, nor a file that
// somebody brought. Which keys are this TPM's is what the TPM said. The package
// keeps a certificate only if it is for one of these keys; whether its issuer is
// a maker of TPMs is the broker's decision alone, as for a certificate out of a
// TPM. Certificates are public: nothing here is secret.
//
// It promises that nothing is sent anywhere except by [Client.Fetch], that what
// it reads is bounded, and that a file that it replaces is kept under another
// name.
package ekcert

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"net/url"

	"github.com/countersign/countersign/attestors/tpm"
)

// A maker is a TPM maker that serves certificates by URL.
type maker struct {
	name string
	base string // the URL's begin; the key's id follows it
	id   func(crypto.PublicKey) (string, error)
}

// makers are those known, by the manufacturer that their TPMs report. Neither
// documents its service; both rules are those of tpm2-tools
// (tools/tpm2_getekcertificate.c) and go-attestation (attest/tpm.go), which are
// used with real TPMs.
var makers = map[string]maker{
	"INTC": {"Intel", "https://ekop.intel.com/ekcertservice/", intelID},
	"AMD":  {"AMD", "https://ftpm.amd.com/pki/aia/", amdID},
}

// A NoServiceError is returned for a TPM whose maker serves no certificates by
// URL, as far as this program knows.
type NoServiceError struct {
	Manufacturer string
}

func (e *NoServiceError) Error() string {
	return fmt.Sprintf("the TPM's maker %q serves no certificates by URL that this program knows", e.Manufacturer)
}

// Maker returns the name of a manufacturer to show: "Intel" for INTC.
func Maker(manufacturer string) string {
	if m, ok := makers[manufacturer]; ok {
		return m.name
	}
	return manufacturer
}

// URL returns where the maker of a TPM serves the certificate of an EK, or a
// [NoServiceError]. The manufacturer is as the TPM reports it: INTC, AMD.
func URL(manufacturer string, ek tpm.EK) (string, error) {
	m, ok := makers[manufacturer]
	if !ok {
		return "", &NoServiceError{manufacturer}
	}

	key, err := x509.ParsePKIXPublicKey(ek.Public)
	if err != nil {
		return "", fmt.Errorf("URL of EK %s: %w", ek.Hash(), err)
	}
	id, err := m.id(key)
	if err != nil {
		return "", fmt.Errorf("URL of EK %s: %w", ek.Hash(), err)
	}
	return m.base + id, nil
}

// intelID is the base64url of SHA-256 over modulus and exponent (3 bytes), or
// over x and y. Its padding is escaped: Intel's server refuses a plain "=".
func intelID(key crypto.PublicKey) (string, error) {
	var hashed []byte
	switch k := key.(type) {
	case *rsa.PublicKey:
		hashed = append(modulus(k), byte(k.E>>16), byte(k.E>>8), byte(k.E))
	case *ecdsa.PublicKey:
		point, err := k.Bytes()
		if err != nil {
			return "", err
		}
		hashed = point[1:]
	default:
		return "", fmt.Errorf("a key of type %T: only RSA and ECC are known", key)
	}

	digest := sha256.Sum256(hashed)
	return url.QueryEscape(base64.URLEncoding.EncodeToString(digest[:])), nil
}

// amdIDSize is how much of the digest AMD's URLs have.
const amdIDSize = 16

// amdID is the hexadecimal begin of SHA-256 over a kind (4 bytes) and the key:
// exponent (4 bytes) and modulus, or x and y. It is also the certificate's serial
// number.
func amdID(key crypto.PublicKey) (string, error) {
	var hashed []byte
	switch k := key.(type) {
	case *rsa.PublicKey:
		hashed = binary.BigEndian.AppendUint32([]byte{0x00, 0x00, 0x22, 0x22}, uint32(k.E))
		hashed = append(hashed, modulus(k)...)
	case *ecdsa.PublicKey:
		point, err := k.Bytes()
		if err != nil {
			return "", err
		}
		hashed = append([]byte{0x00, 0x00, 0x44, 0x44}, point[1:]...)
	default:
		return "", fmt.Errorf("a key of type %T: only RSA and ECC are known", key)
	}

	digest := sha256.Sum256(hashed)
	return hex.EncodeToString(digest[:amdIDSize]), nil
}

func modulus(key *rsa.PublicKey) []byte { return key.N.FillBytes(make([]byte, key.Size())) }
