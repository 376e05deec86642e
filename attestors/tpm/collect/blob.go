package collect

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"

	"github.com/countersign/countersign/attestors/evidence"
)

// blobMagic begins an exported blob and names its format.
const blobMagic = "countersign tpm key v1\n"

// maxBlobField bounds each field of an exported blob; the largest, an RSA
// key's private area, has a few hundred bytes.
const maxBlobField = 2048

// A Blob is a key that its TPM has encrypted for itself, with the authorization
// value that using it takes. Whoever has it can use the key in that TPM, so it
// prints as its name only; Export is the one way to its bytes.
type Blob struct {
	public  []byte // TPMT_PUBLIC
	private []byte // TPM2B_PRIVATE's contents
	auth    []byte
}

// Public is the key's TPMT_PUBLIC.
func (b Blob) Public() []byte { return bytes.Clone(b.public) }

// IsZero says whether there is no key.
func (b Blob) IsZero() bool { return len(b.public) == 0 }

// Export is the blob for the host's state file, which must be readable to
// nobody but the agent.
func (b Blob) Export() []byte {
	out := []byte(blobMagic)
	for _, field := range [][]byte{b.public, b.private, b.auth} {
		out = binary.BigEndian.AppendUint16(out, uint16(len(field)))
		out = append(out, field...)
	}
	return out
}

// ParseBlob reads what Export writes.
func ParseBlob(exported []byte) (Blob, error) {
	rest, ok := bytes.CutPrefix(exported, []byte(blobMagic))
	if !ok {
		return Blob{}, errors.New("not a TPM key of this version")
	}
	var fields [3][]byte
	for i := range fields {
		if len(rest) < 2 {
			return Blob{}, errors.New("a TPM key that ends early")
		}
		size := int(binary.BigEndian.Uint16(rest))
		rest = rest[2:]
		if size == 0 || size > maxBlobField || size > len(rest) {
			return Blob{}, fmt.Errorf("a TPM key whose field %d has a size of %d bytes", i, size)
		}
		fields[i], rest = bytes.Clone(rest[:size]), rest[size:]
	}
	if len(rest) != 0 {
		return Blob{}, fmt.Errorf("a TPM key with %d bytes behind its end", len(rest))
	}
	return Blob{public: fields[0], private: fields[1], auth: fields[2]}, nil
}

// String names the key without showing it.
func (b Blob) String() string {
	if b.IsZero() {
		return "no TPM key"
	}
	return "TPM key " + evidence.Sum(b.public).String()[:16]
}

// GoString, Format, LogValue and MarshalText keep every way of printing to String.
func (b Blob) GoString() string             { return b.String() }
func (b Blob) Format(f fmt.State, _ rune)   { fmt.Fprint(f, b.String()) }
func (b Blob) LogValue() slog.Value         { return slog.StringValue(b.String()) }
func (b Blob) MarshalText() ([]byte, error) { return []byte(b.String()), nil }
