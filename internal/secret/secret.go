// Package secret is the type in which both sides carry what must never be
// printed. Every way Go has of turning a value into text gives the same word
// instead of the bytes; Reveal is the only way to them, so that a search for
// its callers is the list of places where a secret is out.
package secret

import (
	"crypto/subtle"
	"fmt"
	"io"
	"log/slog"
)

const redacted = "[redacted]"

// A Bytes holds a secret. It can't be compared with ==; use Equal.
type Bytes struct {
	_     [0]func()
	value []byte
}

// New takes ownership of b.
func New(b []byte) Bytes { return Bytes{value: b} }

// Reveal is the secret itself. The caller must not keep it for longer than
// the write it is for.
func (s Bytes) Reveal() []byte { return s.value }

// Len is the secret's length in bytes.
func (s Bytes) Len() int { return len(s.value) }

// Equal compares in constant time.
func (s Bytes) Equal(other []byte) bool {
	return subtle.ConstantTimeCompare(s.value, other) == 1
}

// Wipe overwrites the secret. Copies that the runtime or a library made are
// beyond its reach.
func (s Bytes) Wipe() { clear(s.value) }

func (s Bytes) String() string               { return redacted }
func (s Bytes) GoString() string             { return redacted }
func (s Bytes) LogValue() slog.Value         { return slog.StringValue(redacted) }
func (s Bytes) MarshalText() ([]byte, error) { return []byte(redacted), nil }
func (s Bytes) MarshalJSON() ([]byte, error) { return []byte(`"` + redacted + `"`), nil }

// Format catches every verb, %x and %d among them.
func (s Bytes) Format(f fmt.State, _ rune) { _, _ = io.WriteString(f, redacted) }
