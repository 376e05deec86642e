package appraise

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rsa"
	"encoding/binary"
	"math/big"

	"github.com/google/go-tpm/tpm2"
)

// maxStructure bounds every structure that a TPM makes for us; the largest, an
// RSA key's certification, has some 700 bytes.
const maxStructure = 2048

// Sizes of P-256 coordinates and RSA-2048 numbers.
const (
	p256Size = 32
	rsaSize  = 256
)

// A reader takes fields off the front of a TPM structure. Once it has run over
// the end everything it reads is zero, and end says so. Nothing is allocated
// by a length that the input claims: fields are slices of it.
type reader struct {
	rest []byte
	over bool
}

func (r *reader) take(n int) []byte {
	if n > len(r.rest) {
		r.rest, r.over = nil, true
		return make([]byte, min(n, 8)) // enough for the numbers below; sized fields get zeros
	}
	field := r.rest[:n:n]
	r.rest = r.rest[n:]
	return field
}

func (r *reader) u8() uint8     { return r.take(1)[0] }
func (r *reader) u16() uint16   { return binary.BigEndian.Uint16(r.take(2)) }
func (r *reader) u32() uint32   { return binary.BigEndian.Uint32(r.take(4)) }
func (r *reader) u64() uint64   { return binary.BigEndian.Uint64(r.take(8)) }
func (r *reader) sized() []byte { return r.take(int(r.u16())) }

// alg reads an algorithm's identifier.
func (r *reader) alg() tpm2.TPMAlgID { return tpm2.TPMAlgID(r.u16()) }

// end fails unless the structure ended exactly here.
func (r *reader) end(what string) error {
	if r.over {
		return reject(CheckEncoding, "the %s ends early", what)
	}
	if len(r.rest) > 0 {
		return reject(CheckEncoding, "the %s has %d bytes behind its end", what, len(r.rest))
	}
	return nil
}

// open begins to read a structure.
func open(b []byte, what string) (*reader, error) {
	if len(b) == 0 {
		return nil, reject(CheckEncoding, "the %s is empty", what)
	}
	if len(b) > maxStructure {
		return nil, reject(CheckEncoding, "the %s has %d bytes, more than %d", what, len(b), maxStructure)
	}
	return &reader{rest: b}, nil
}

// A signingKey is the public area of an asymmetric signing key of a TPM.
type signingKey struct {
	encoded    []byte // TPMT_PUBLIC
	attributes uint32
	policy     []byte
	scheme     tpm2.TPMAlgID
	key        crypto.PublicKey
}

// name is the object's Name: its name algorithm and the digest of its public
// area (TPM 2.0 library, part 1, section 16).
func (k *signingKey) name() []byte {
	h := crypto.SHA256.New()
	h.Write(k.encoded)
	return h.Sum([]byte{0x00, 0x0b})
}

// decodeSigningKey reads a TPMT_PUBLIC: P-256 with ECDSA or RSA-2048 with
// RSASSA, both with SHA-256.
func decodeSigningKey(encoded []byte, what string) (*signingKey, error) {
	r, err := open(encoded, what)
	if err != nil {
		return nil, err
	}
	kind, nameAlg := r.alg(), r.alg()
	k := &signingKey{encoded: encoded, attributes: r.u32(), policy: r.sized()}
	if kind != tpm2.TPMAlgECC && kind != tpm2.TPMAlgRSA {
		return nil, reject(CheckKeyType, "the %s has type %#04x, not RSA or ECC", what, uint16(kind))
	}
	if nameAlg != tpm2.TPMAlgSHA256 {
		return nil, reject(CheckKeyType, "the %s is named by hash %#04x, not SHA-256", what, uint16(nameAlg))
	}
	if symmetric := r.alg(); symmetric != tpm2.TPMAlgNull {
		return nil, reject(CheckKeyType, "the %s has a symmetric algorithm, %#04x: it is no signing key", what, uint16(symmetric))
	}
	want := tpm2.TPMAlgECDSA
	if kind == tpm2.TPMAlgRSA {
		want = tpm2.TPMAlgRSASSA
	}
	if k.scheme = r.alg(); k.scheme != want {
		return nil, reject(CheckScheme, "the %s has scheme %#04x, not %#04x", what, uint16(k.scheme), uint16(want))
	}
	if hash := r.alg(); hash != tpm2.TPMAlgSHA256 {
		return nil, reject(CheckScheme, "the %s signs with hash %#04x, not SHA-256", what, uint16(hash))
	}
	if kind == tpm2.TPMAlgRSA {
		k.key, err = readRSA(r, what)
	} else {
		k.key, err = readECC(r, what)
	}
	if err != nil {
		return nil, err
	}
	return k, nil
}

func readRSA(r *reader, what string) (crypto.PublicKey, error) {
	bits, exponent, modulus := r.u16(), r.u32(), r.sized()
	if err := r.end(what); err != nil {
		return nil, err
	}
	n := new(big.Int).SetBytes(modulus)
	if bits != 8*rsaSize || len(modulus) != rsaSize || n.BitLen() != 8*rsaSize || n.Bit(0) == 0 {
		return nil, reject(CheckKeyType, "the %s isn't an RSA key of 2048 bits", what)
	}
	if exponent != 0 && exponent != 65537 { // 0 stands for 65537
		return nil, reject(CheckKeyType, "the %s has the RSA exponent %d, not 65537", what, exponent)
	}
	return &rsa.PublicKey{N: n, E: 65537}, nil
}

func readECC(r *reader, what string) (crypto.PublicKey, error) {
	curve, kdf, x, y := tpm2.TPMECCCurve(r.u16()), r.alg(), r.sized(), r.sized()
	if curve != tpm2.TPMECCNistP256 {
		return nil, reject(CheckKeyType, "the %s is on curve %#04x, not P-256", what, uint16(curve))
	}
	if kdf != tpm2.TPMAlgNull {
		return nil, reject(CheckScheme, "the %s has a key derivation scheme, %#04x", what, uint16(kdf))
	}
	if err := r.end(what); err != nil {
		return nil, err
	}
	if len(x) > p256Size || len(y) > p256Size {
		return nil, reject(CheckKeyType, "the %s has coordinates of %d and %d bytes", what, len(x), len(y))
	}
	point := make([]byte, 1+2*p256Size)
	point[0] = 4
	copy(point[1+p256Size-len(x):], x)
	copy(point[1+2*p256Size-len(y):], y)
	key, err := ecdsa.ParseUncompressedPublicKey(elliptic.P256(), point)
	if err != nil {
		return nil, reject(CheckKeyType, "the %s is no point of P-256", what)
	}
	return key, nil
}

// A statement is a TPMS_ATTEST: what a TPM says about a quote or a key.
type statement struct {
	magic     uint32
	kind      tpm2.TPMST
	extraData []byte
	counters  Counters

	// of a quote
	bank      tpm2.TPMAlgID
	selected  []byte // bit i of byte j is PCR 8j+i
	pcrDigest []byte
	banks     uint32

	// of a certification
	name []byte
}

// decodeStatement reads a TPMS_ATTEST of the wanted type. It comes before the
// signature is looked at, so that the libraries behind it see sound structures
// only.
func decodeStatement(encoded []byte, want tpm2.TPMST, what string) (*statement, error) {
	r, err := open(encoded, what)
	if err != nil {
		return nil, err
	}
	s := &statement{magic: r.u32(), kind: tpm2.TPMST(r.u16())}
	r.sized() // the signer's qualified name, which depends on parents that we don't know
	s.extraData = r.sized()
	s.counters = Counters{Clock: r.u64(), ResetCount: r.u32(), RestartCount: r.u32()}
	safe := r.u8()
	s.counters.Safe = safe == 1
	r.u64() // the firmware's version, obfuscated per key
	if r.over {
		return nil, r.end(what)
	}
	if s.magic != uint32(tpm2.TPMGeneratedValue) {
		return nil, reject(CheckMagic, "the %s begins with %#08x: no TPM made it", what, s.magic)
	}
	if s.kind != want {
		return nil, reject(CheckType, "the %s is of type %#04x, not %#04x", what, uint16(s.kind), uint16(want))
	}
	if safe > 1 {
		return nil, reject(CheckEncoding, "the %s has a safe flag of %d", what, safe)
	}
	if want == tpm2.TPMSTAttestCertify {
		s.name = r.sized()
		r.sized() // the key's qualified name
		return s, r.end(what)
	}
	s.banks = r.u32()
	if s.banks == 0 {
		return nil, reject(CheckSelection, "the %s is over no PCR bank", what)
	}
	if s.banks > 1 {
		return nil, reject(CheckBank, "the %s is over %d PCR banks, not the SHA-256 one alone", what, s.banks)
	}
	s.bank = r.alg()
	s.selected = r.take(int(r.u8()))
	s.pcrDigest = r.sized()
	return s, r.end(what)
}

// A signature is a TPMT_SIGNATURE.
type signature struct {
	rsa  []byte
	r, s *big.Int
}

// decodeSignature reads a TPMT_SIGNATURE of the key's scheme with SHA-256.
func decodeSignature(encoded []byte, k *signingKey, what string) (*signature, error) {
	r, err := open(encoded, what)
	if err != nil {
		return nil, err
	}
	if scheme := r.alg(); scheme != k.scheme {
		return nil, reject(CheckScheme, "the %s has scheme %#04x, the key %#04x", what, uint16(scheme), uint16(k.scheme))
	}
	if hash := r.alg(); hash != tpm2.TPMAlgSHA256 {
		return nil, reject(CheckScheme, "the %s is over hash %#04x, not SHA-256", what, uint16(hash))
	}
	var sig signature
	if k.scheme == tpm2.TPMAlgRSASSA {
		sig.rsa = r.sized()
		return &sig, r.end(what)
	}
	x, y := r.sized(), r.sized()
	if err := r.end(what); err != nil {
		return nil, err
	}
	if len(x) > p256Size || len(y) > p256Size {
		return nil, reject(CheckEncoding, "the %s has numbers of %d and %d bytes", what, len(x), len(y))
	}
	sig.r, sig.s = new(big.Int).SetBytes(x), new(big.Int).SetBytes(y)
	return &sig, nil
}
