// Package challenge keeps what a broker asked of one connection: nonces, and
// at most one joining that waits for its answer. It lives in memory and ends
// with the connection, so brokers share nothing and a peer that asks for much
// takes only from itself.
package challenge

import (
	"crypto/rand"
	"errors"
	"sync"
	"time"

	"github.com/countersign/countersign/attestors/evidence"
	"github.com/countersign/countersign/attestors/tpm/appraise"
	"github.com/countersign/countersign/broker/internal/state/inventory"
)

const (
	// MostNonces is how many nonces a connection may have open.
	MostNonces = 16
	// Lifetime is how long a challenge may take to answer.
	Lifetime = 30 * time.Second
)

// ErrSpent says that a nonce was never given here, was used, or is too old.
// The peer asks for another; it is no finding.
var ErrSpent = errors.New("the nonce is not open on this connection")

// A Given nonce, and what was known of the host then: evidence that was on its way at the
// same time may carry counters of any order above that, and continue from what came after.
type Given struct {
	At         time.Time
	Seen       *appraise.Counters
	Continuity inventory.Continuity
}

// A Joining is a host that was asked to activate a credential for each of its EKs.
type Joining struct {
	at    time.Time
	Nonce evidence.Nonce
	Body  []byte // of the request, as sent
	EKs   []Endorsement
	AK    *appraise.AK
	Seen  *appraise.Counters // what was known of AK's TPM then; nil: nothing
	TLS   []byte             // TPMT_PUBLIC
	Token string
	Name  string
}

// An Endorsement is an EK, and what activation with it has to give back.
type Endorsement struct {
	*appraise.EK
	Secret []byte
}

// A Conn is one TLS connection: what a request on it has to be bound to, and
// the challenges that are open on it.
type Conn struct {
	KeySPKI  []byte // PKIX DER of the peer's TLS key
	Exporter [evidence.ExporterSize]byte
	Address  string // the peer's, without port

	mu     sync.Mutex
	nonces map[evidence.Nonce]Given
	join   *Joining
}

// Key is the digest by which the peer's TLS key is pinned.
func (c *Conn) Key() evidence.Digest { return evidence.Sum(c.KeySPKI) }

// Binding is what evidence for this call on this connection commits to.
func (c *Conn) Binding(call evidence.Call, nonce evidence.Nonce, request []byte) evidence.Binding {
	return evidence.Binding{Call: call, Nonce: nonce, KeySPKI: c.KeySPKI, Exporter: c.Exporter, Request: request}
}

// Give opens n nonces, fewer where the connection has too many open. What is known of the
// host is kept with them.
func (c *Conn) Give(n int, known Given) []evidence.Nonce {
	now := known.At
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.nonces == nil {
		c.nonces = map[evidence.Nonce]Given{}
	}
	for nonce, g := range c.nonces {
		if now.Sub(g.At) > Lifetime {
			delete(c.nonces, nonce)
		}
	}
	var given []evidence.Nonce
	for len(given) < n && len(c.nonces) < MostNonces {
		nonce := NewNonce()
		c.nonces[nonce] = known
		given = append(given, nonce)
	}
	return given
}

// Take spends a nonce.
func (c *Conn) Take(nonce evidence.Nonce, now time.Time) (Given, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	g, ok := c.nonces[nonce]
	delete(c.nonces, nonce)
	if !ok || now.Sub(g.At) > Lifetime || now.Before(g.At) {
		return Given{}, ErrSpent
	}
	return g, nil
}

// Join puts j in the place of the joining that was open.
func (c *Conn) Join(j *Joining, now time.Time) {
	c.mu.Lock()
	defer c.mu.Unlock()
	j.at = now
	c.join = j
}

// TakeJoin spends the open joining.
func (c *Conn) TakeJoin(now time.Time) (*Joining, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	j := c.join
	c.join = nil
	if j == nil || now.Sub(j.at) > Lifetime || now.Before(j.at) {
		return nil, ErrSpent
	}
	return j, nil
}

// NewNonce is 32 random bytes.
func NewNonce() evidence.Nonce {
	var n evidence.Nonce
	_, _ = rand.Read(n[:]) // never fails
	return n
}
