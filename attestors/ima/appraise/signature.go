package appraise

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/rsa"
	"crypto/x509"
	"encoding/binary"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"slices"
	"strings"
)

// The security.ima attribute of a signed file (the kernel's
// security/integrity/integrity.h): a type, then a header and the signature.
const (
	attrSignature       = 0x03 // of the file's digest
	attrVeritySignature = 0x06 // of a structure that holds fs-verity's digest
	headerSize          = 1 + 8
)

// hashAlgorithms are enum hash_algo's, without those that are broken.
var hashAlgorithms = map[byte]struct {
	name string
	hash crypto.Hash
}{4: {"sha256", crypto.SHA256}, 5: {"sha384", crypto.SHA384}, 6: {"sha512", crypto.SHA512}}

// A verifier is one key that signs files.
type verifier func(hash crypto.Hash, digest, signature []byte) bool

func parseKey(text string) (verifier, error) {
	block, rest := pem.Decode([]byte(text))
	if block == nil {
		return nil, errors.New("no PEM block")
	}
	if strings.TrimSpace(string(rest)) != "" {
		return nil, errors.New("more than one PEM block")
	}
	var public any
	switch block.Type {
	case "CERTIFICATE":
		cert, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, err
		}
		public = cert.PublicKey
	case "PUBLIC KEY":
		key, err := x509.ParsePKIXPublicKey(block.Bytes)
		if err != nil {
			return nil, err
		}
		public = key
	default:
		return nil, fmt.Errorf("a PEM block of type %q, not CERTIFICATE or PUBLIC KEY", block.Type)
	}
	switch key := public.(type) {
	case *rsa.PublicKey:
		return func(hash crypto.Hash, digest, signature []byte) bool {
			return rsa.VerifyPKCS1v15(key, hash, digest, signature) == nil
		}, nil
	case *ecdsa.PublicKey:
		return func(_ crypto.Hash, digest, signature []byte) bool { return ecdsa.VerifyASN1(key, digest, signature) }, nil
	}
	return nil, fmt.Errorf("a key of type %T; RSA and ECDSA sign files", public)
}

// signed says whether a key of the policy signed what was measured. Which key
// an attribute names is not looked at: there are few.
func (r *Rules) signed(m Measurement) bool {
	attr := m.Signature
	if len(attr) < headerSize {
		return false
	}
	kind, version := attr[0], attr[1]
	algorithm, known := hashAlgorithms[attr[2]]
	size := int(binary.BigEndian.Uint16(attr[7:]))
	signature := attr[headerSize:]
	if !known || size != len(signature) {
		return false
	}
	text, verity := strings.CutPrefix(m.Digest, "verity:")
	name, sum, _ := strings.Cut(text, ":")
	digest, err := hex.DecodeString(sum)
	if err != nil || name != algorithm.name {
		return false
	}
	switch {
	case kind == attrSignature && version == 2 && !verity:
	case kind == attrVeritySignature && version == 3 && verity:
		h := algorithm.hash.New()
		h.Write([]byte{attrVeritySignature, attr[2]})
		h.Write(digest)
		digest = h.Sum(nil)
	default:
		return false
	}
	return slices.ContainsFunc(r.keys, func(v verifier) bool { return v(algorithm.hash, digest, signature) })
}
