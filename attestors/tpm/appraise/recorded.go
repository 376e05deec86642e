package appraise

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rsa"
	"crypto/x509"
	"encoding/binary"
	"encoding/pem"
	"errors"
	"fmt"

	"github.com/google/go-tpm/tpm2"
)

// Recorded evidence comes in files that other tools wrote. What is read of it
// here tells which question to ask, and answers none.

// ParseRecordedAK reads an attestation key's TPM2B_PUBLIC, its TPMT_PUBLIC, or
// its public key in PEM. Of PEM nothing says that the key is restricted to what
// a TPM states: attributes is false.
func ParseRecordedAK(b []byte) (ak *AK, attributes bool, err error) {
	if block, _ := pem.Decode(b); block != nil {
		key, err := x509.ParsePKIXPublicKey(block.Bytes)
		if err != nil {
			return nil, false, fmt.Errorf("AK: %w", err)
		}
		switch k := key.(type) {
		case *ecdsa.PublicKey:
			if k.Curve == elliptic.P256() {
				return &AK{signingKey{key: k, scheme: tpm2.TPMAlgECDSA}}, false, nil
			}
		case *rsa.PublicKey:
			if k.N.BitLen() == 2048 {
				return &AK{signingKey{key: k, scheme: tpm2.TPMAlgRSASSA}}, false, nil
			}
		}
		return nil, false, errors.New("AK: neither P-256 nor RSA-2048")
	}
	if len(b) > 2 && int(binary.BigEndian.Uint16(b)) == len(b)-2 {
		b = b[2:]
	}
	ak, err = ParseAK(b)
	return ak, true, err
}

// QuoteClaims are what a quote says of itself, signed or not: the PCRs that it
// selects, and what it is bound to.
func QuoteClaims(attest []byte) (pcrs []int, extra []byte, err error) {
	s, err := decodeStatement(bytes.Clone(attest), tpm2.TPMSTAttestQuote, "quote")
	if err != nil {
		return nil, nil, err
	}
	for i := range 8 * min(len(s.selected), 4) {
		if s.selects(i) {
			pcrs = append(pcrs, i)
		}
	}
	return pcrs, s.extraData, nil
}
