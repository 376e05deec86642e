// Package evidence is the vocabulary that host and broker share: what a nonce
// is, and how a request is bound to the key, the connection and the nonce it
// was made for.
//
// It trusts nothing and decides nothing. What it promises is that both sides
// compute the same 32 bytes from the same inputs: every field that enters a
// binding has a fixed length, so no two different inputs share an encoding.
package evidence

import (
	"crypto/sha256"
	"crypto/subtle"
	"encoding/hex"
	"errors"
	"fmt"
)

// NonceSize is the length of a nonce in bytes: TPM 2.0 accepts up to the size
// of its largest hash as qualifying data, and every TPM has SHA-256.
const NonceSize = 32

// ExporterLabel names the TLS exporter (RFC 8446, section 7.5) whose 32 bytes
// bind a request to one connection.
const ExporterLabel = "EXPORTER-countersign-session-v1"

// ExporterSize is the length of the exported keying material in bytes.
const ExporterSize = 32

// A Nonce is a broker's challenge; it is used once, on the connection it was
// given on.
type Nonce [NonceSize]byte

// ParseNonce reads a nonce from the wire.
func ParseNonce(b []byte) (Nonce, error) {
	if len(b) != NonceSize {
		return Nonce{}, fmt.Errorf("a nonce has %d bytes, not %d", NonceSize, len(b))
	}
	return Nonce(b), nil
}

// A Digest is a SHA-256 value, written as lowercase hex.
type Digest [sha256.Size]byte

// ParseDigest reads 64 lowercase hex digits.
func ParseDigest(s string) (Digest, error) {
	var d Digest
	if len(s) != hex.EncodedLen(len(d)) {
		return d, fmt.Errorf("a SHA-256 digest has 64 hex digits, not %d characters", len(s))
	}
	for _, c := range []byte(s) {
		if (c < '0' || c > '9') && (c < 'a' || c > 'f') {
			return Digest{}, errors.New("a SHA-256 digest is written in lowercase hex")
		}
	}
	_, err := hex.Decode(d[:], []byte(s))
	return d, err
}

// Sum is the digest of b.
func Sum(b []byte) Digest { return sha256.Sum256(b) }

func (d Digest) String() string { return hex.EncodeToString(d[:]) }

// Equal compares in constant time.
func (d Digest) Equal(other Digest) bool {
	return subtle.ConstantTimeCompare(d[:], other[:]) == 1
}

// IsZero says whether no digest was set.
func (d Digest) IsZero() bool { return d == Digest{} }

// MarshalText writes the lowercase hex form.
func (d Digest) MarshalText() ([]byte, error) { return []byte(d.String()), nil }

// UnmarshalText reads what MarshalText writes.
func (d *Digest) UnmarshalText(b []byte) (err error) {
	*d, err = ParseDigest(string(b))
	return err
}

// LogsDigest names an event log together with systemd's, so that neither has to
// be sent twice; zero where there is none.
func LogsDigest(event, userspace []byte) Digest {
	if len(event)+len(userspace) == 0 {
		return Digest{}
	}
	a, b := Sum(event), Sum(userspace)
	return Sum(append(a[:], b[:]...))
}

// A Call is what a binding is for. Evidence made for one call never serves
// another, because the call's label is hashed into it.
type Call string

const (
	CallJoin    Call = "join"    // the first quote of a host that asks to be admitted
	CallCertify Call = "certify" // the AK's certification of the TLS key
	CallProve   Call = "prove"   // host and program evidence without a credential
	CallIssue   Call = "issue"   // a credential, new or replaced
)

// A Binding is what a quote's qualifying data commits to.
type Binding struct {
	Call     Call
	Nonce    Nonce
	KeySPKI  []byte             // PKIX DER of the TLS key of the connection
	Exporter [ExporterSize]byte // ExporterLabel's value on the connection
	Request  []byte             // the request, exactly as sent
}

// ExtraData is SHA-256(label ‖ nonce ‖ SHA-256(TLS key SPKI) ‖ TLS exporter ‖
// SHA-256(request)), where label is the SHA-256 of the call's name under this
// format's version, so that it too has a fixed length.
func (b Binding) ExtraData() Digest {
	h := sha256.New()
	label := Sum([]byte("countersign binding v1 " + string(b.Call)))
	key := Sum(b.KeySPKI)
	request := Sum(b.Request)
	h.Write(label[:])
	h.Write(b.Nonce[:])
	h.Write(key[:])
	h.Write(b.Exporter[:])
	h.Write(request[:])
	return Digest(h.Sum(nil))
}
