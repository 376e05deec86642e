package hostapi

import (
	"crypto/hmac"
	"crypto/sha256"
	"encoding/binary"

	"github.com/countersign/countersign/attestors/evidence"
)

// checkContinuation fails a proof that continues from an answer that the host has left
// behind: two machines run with one TPM's state.
const checkContinuation evidence.Check = "continuation"

// Continuations make the values by which a proof shows which answer it continues from, and
// reads them. A value is a number and its MAC for one host, so that a broker whose store was
// restored knows that it gave it.
type Continuations struct{ Key []byte }

// Sizes of a value's parts, in bytes.
const (
	numberSize = 8
	macSize    = 16
)

func (c Continuations) mac(host string, number []byte) []byte {
	h := hmac.New(sha256.New, c.Key)
	h.Write([]byte("countersign continuation\x00" + host + "\x00"))
	h.Write(number)
	return h.Sum(nil)[:macSize]
}

// seal returns the value for a number; empty for 0, which is none.
func (c Continuations) seal(host string, n int64) []byte {
	if n == 0 {
		return nil
	}
	number := binary.BigEndian.AppendUint64(nil, uint64(n))
	return append(number, c.mac(host, number)...)
}

// open returns a value's number. A value that this broker didn't make for the host is worth
// as much as none, which is 0: whoever shows it could have shown none.
func (c Continuations) open(host string, value []byte) int64 {
	if len(value) != numberSize+macSize || !hmac.Equal(c.mac(host, value[:numberSize]), value[numberSize:]) {
		return 0
	}
	return int64(binary.BigEndian.Uint64(value))
}
