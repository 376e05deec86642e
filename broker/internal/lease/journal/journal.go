// Package journal is what the broker knows of every credential it issued: one
// lease each, from the intent to issue it until its end is confirmed.
//
// Step is the whole life of a lease as a pure function. It is called by the
// request path and by the sweeper alike, so that what repairs a crash is what
// runs every day: recovery completes a lease or revokes it, it never issues.
// The journal stores the issuer's reference to a credential (a token accessor, a lease id,
// a serial) without reading it. It never stores the credential.
package journal

import (
	"encoding/json"
	"fmt"
	"slices"
	"time"

	"github.com/countersign/countersign/broker/internal/issue"
)

// A State is where a lease stands.
type State string

const (
	Intended    State = "intended"    // allowed and recorded, not known to be issued
	Provisional State = "provisional" // issued, delivery not acknowledged: dies by itself
	Live        State = "live"        // acknowledged
	Retiring    State = "retiring"    // replaced, lives on for the scope's overlap
	Revoking    State = "revoking"    // to be ended, not confirmed
	Gone        State = "gone"        // its end is confirmed
)

// A Lease is one credential's entry. It is a value; Step returns a new one.
type Lease struct {
	ID         string    `json:"id"`
	Host       string    `json:"host"`
	Scope      string    `json:"scope"`
	Kind       string    `json:"kind"`
	State      State     `json:"-"`
	DeliveryID string    `json:"-"`
	Instance   string    `json:"-"` // the program instance it is for; empty: the coming one of a hand-over
	Due        time.Time `json:"-"` // when Step wants to be called with Tick; zero: never
	Issued     time.Time `json:"-"`
	Ended      time.Time `json:"-"`

	From     string          `json:"from,omitempty"` // of a hand-over: the instance that asked, and that ends
	Unit     string          `json:"unit,omitempty"`
	Boot     string          `json:"boot,omitempty"`
	SHA256   string          `json:"sha256,omitempty"`
	Subject  json.RawMessage `json:"subject"` // the attested program, in its one encoding
	Facts    json.RawMessage `json:"facts"`   // appraise.Recorded, of which Subject is the program
	Policy   int64           `json:"policy"`
	Release  string          `json:"release,omitempty"` // one that announced the program's digest
	Machine  Machine         `json:"machine,omitzero"`
	Audience []string        `json:"audience,omitempty"`
	Sources  []string        `json:"sources,omitempty"`

	Ref       json.RawMessage   `json:"ref,omitempty"`   // issue.Ref
	Names     map[string]string `json:"names,omitempty"` // by which other systems know it: user name, key id, serial
	NotBefore time.Time         `json:"not_before,omitzero"`

	TTL     time.Duration `json:"ttl"`
	Overlap time.Duration `json:"overlap,omitempty"`
	Grace   time.Duration `json:"grace,omitempty"` // of silence after ProveBy
	Expires time.Time     `json:"expires,omitzero"`
	Acked   time.Time     `json:"acked,omitzero"`
	Settled bool          `json:"settled,omitempty"` // the issuer gave it its length
	Whole   bool          `json:"whole,omitempty"`   // it had that from the start
	ProveBy time.Time     `json:"prove_by,omitzero"`

	Replaces  string `json:"replaces,omitempty"`
	Unrotated bool   `json:"unrotated,omitempty"` // a static secret that was read, never acknowledged: rotate it
	Reason    string `json:"reason,omitempty"`    // why it ends
	Attempts  int    `json:"attempts,omitempty"`  // of revoking it
	LastError string `json:"last_error,omitempty"`

	// Unreadable is why the row can't be read; only what its columns hold is known then.
	// List returns such a lease with the others, Load and Save fail on it.
	Unreadable error `json:"-"`
}

// An oldRef is the reference as earlier brokers wrote it into stores and tickets: in fields
// of their own.
type oldRef struct {
	Accessor   string `json:"accessor,omitempty"`
	VaultLease string `json:"vault_lease,omitempty"`
	Serial     string `json:"serial,omitempty"`
}

// UnmarshalJSON also accepts leases and tickets that earlier brokers wrote.
func (g *Lease) UnmarshalJSON(b []byte) (err error) {
	type lease Lease // without this method
	read := struct {
		*lease
		oldRef
	}{lease: (*lease)(g)}
	if err := json.Unmarshal(b, &read); err != nil {
		return err
	}
	if g.Ref != nil || read.oldRef == (oldRef{}) {
		return nil
	}

	// The issuers use the same field names in their references.
	g.Ref, err = json.Marshal(read.oldRef)
	for name, value := range map[string]string{"vault_accessor": read.Accessor, "vault_lease": read.VaultLease, "certificate_serial": read.Serial} {
		if value == "" {
			continue
		}
		if g.Names == nil {
			g.Names = map[string]string{}
		}
		g.Names[name] = value
	}
	return err
}

// A Machine is how the host had booted, as the decision knew it that a lease was made
// on; what wasn't proven is left out.
type Machine struct {
	SecureBoot  *bool  `json:"secure_boot,omitempty"`
	CommandLine string `json:"kernel_command_line,omitempty"` // a long one as sha256:HEX
	Reference   string `json:"reference,omitempty"`           // the set that the boot matched
}

// An Event is something that happened to a lease. Its step is what comes of it for a
// lease that isn't gone.
type Event interface {
	step(g Lease, now time.Time) (Lease, []Effect, error)
}

type (
	// Issued: the issuer answered.
	Issued struct {
		Ref       json.RawMessage
		Names     map[string]string
		NotBefore time.Time
		Expires   time.Time
		Whole     bool // Expires is the end of its full length
		Static    bool // reading it made nothing that could be ended
	}
	// IssueFailed: the issuer did not, and ended what it may have made.
	IssueFailed struct{ Err error }
	// Acknowledged: the agent says that the credential is delivered.
	Acknowledged struct{}
	// Extended: the issuer gave it its full length.
	Extended struct{ Expires time.Time }
	// ExtendFailed: it did not.
	ExtendFailed struct{ Err error }
	// Proved: host and instance were proven again.
	Proved struct{ By time.Time }
	// Bound: the coming instance of a hand-over came, or one that adopts the lease.
	Bound struct {
		Instance string
		Subject  json.RawMessage
	}
	// Replaced: another lease took over and was acknowledged.
	Replaced struct{}
	// Vanished: the issuer says that it is over, by its length or by others.
	Vanished struct{}
	// Revoke: somebody or something wants its end.
	Revoke struct{ Reason string }
	// Revoked: the issuer confirmed its end.
	Revoked struct{}
	// RevokeFailed: the issuer did not.
	RevokeFailed struct{ Err error }
	// Tick: time passed.
	Tick struct{}
)

// An Effect is what has to be done in the world after a step. Each may be done
// again without harm.
type Effect int

const (
	// DoExtend asks the issuer to give the credential its full length.
	DoExtend Effect = iota + 1
	// DoRevoke asks the issuer to end the credential and to confirm it.
	DoRevoke
	// DoReplace sends Replaced to the lease that this one replaces, once this
	// one has its length. It asks nobody outside.
	DoReplace
)

// Intend makes a lease in its first state.
func Intend(g Lease, now time.Time) Lease {
	g.State = Intended
	g.Issued = now
	g.Due = now.Add(issue.ProvisionalFor)
	return g
}

// Step is the state machine. An event that a state has no answer to changes
// nothing and is an error, which tells of a bug or of a peer's false word.
func Step(g Lease, e Event, now time.Time) (Lease, []Effect, error) {
	if g.State != Gone {
		return e.step(g, now)
	}
	switch e.(type) {
	case Revoke, Revoked, RevokeFailed, Tick, Replaced, Vanished:
		return g, nil, nil // late, and true already
	}
	return g, nil, invalid(g, e)
}

// is reports whether the lease is in one of these states.
func (g Lease) is(states ...State) bool { return slices.Contains(states, g.State) }

func (e Issued) step(g Lease, now time.Time) (Lease, []Effect, error) {
	if g.State != Intended {
		// The sweeper gave it up meanwhile: end what was made.
		g.Ref = e.Ref
		return revoke(g, "issued too late", now)
	}
	g.State = Provisional
	g.Ref, g.Names, g.NotBefore, g.Expires = e.Ref, e.Names, e.NotBefore, e.Expires
	g.Unrotated, g.Whole = e.Static, e.Whole
	g.Due = now.Add(issue.ProvisionalFor)
	return g, nil, nil
}

func (e IssueFailed) step(g Lease, now time.Time) (Lease, []Effect, error) {
	if g.State != Intended {
		return g, nil, invalid(g, e)
	}
	g.LastError = e.Err.Error()
	return revoke(g, "issuing failed", now)
}

func (e Acknowledged) step(g Lease, now time.Time) (Lease, []Effect, error) {
	switch {
	case g.State == Live && !g.Settled:
		return g, []Effect{DoExtend}, nil // said again: the host waits for it
	case g.is(Live, Retiring):
		return g, nil, nil
	case g.State != Provisional:
		return g, nil, invalid(g, e)
	}
	g.State = Live
	g.Unrotated = false
	g.Acked = now
	if g.Whole {
		return Extended{Expires: g.Expires}.step(g, now)
	}
	g.Due = now.Add(extendRetry)
	return g, []Effect{DoExtend}, nil
}

func (e Extended) step(g Lease, now time.Time) (Lease, []Effect, error) {
	if !g.is(Live, Retiring) {
		return g, nil, nil
	}
	first := !g.Settled
	g.Expires, g.LastError, g.Settled = e.Expires, "", true
	if g.State == Retiring {
		return g, nil, nil
	}
	g.Due = g.Expires
	if !g.Due.After(now) {
		g.Due = now.Add(time.Minute) // its issuer still remembers it
	}
	if first && g.Replaces != "" {
		return g, []Effect{DoReplace}, nil
	}
	return g, nil, nil
}

func (e ExtendFailed) step(g Lease, now time.Time) (Lease, []Effect, error) {
	if g.State == Live {
		g.LastError = e.Err.Error()
		g.Due = now.Add(extendRetry)
	}
	return g, nil, nil
}

func (e Vanished) step(g Lease, now time.Time) (Lease, []Effect, error) {
	if !g.is(Live, Retiring) {
		return g, nil, nil // its own answer comes
	}
	if g.Reason == "" {
		g.Reason = "ended at the issuer"
		if !now.Before(g.Expires) {
			g.Reason = "expired"
		}
	}
	return gone(g, now), nil, nil
}

func (e Proved) step(g Lease, _ time.Time) (Lease, []Effect, error) {
	if !g.is(Live, Retiring, Provisional) {
		return g, nil, invalid(g, e)
	}
	g.ProveBy = e.By
	return g, nil, nil
}

func (e Bound) step(g Lease, _ time.Time) (Lease, []Effect, error) {
	if !g.is(Live, Retiring, Provisional) {
		return g, nil, invalid(g, e)
	}
	g.Instance, g.Subject = e.Instance, e.Subject
	return g, nil, nil
}

func (e Replaced) step(g Lease, now time.Time) (Lease, []Effect, error) {
	if !g.is(Live, Provisional) {
		return g, nil, nil // ending already
	}
	g.State = Retiring
	g.Reason = "replaced"
	g.Due = earlier(now.Add(g.Overlap), g.Expires)
	return g, nil, nil
}

func (e Revoke) step(g Lease, now time.Time) (Lease, []Effect, error) {
	return revoke(g, e.Reason, now)
}

func (e Revoked) step(g Lease, now time.Time) (Lease, []Effect, error) {
	if g.State != Revoking {
		return g, nil, invalid(g, e)
	}
	return gone(g, now), nil, nil
}

func (e RevokeFailed) step(g Lease, now time.Time) (Lease, []Effect, error) {
	if g.State != Revoking {
		return g, nil, invalid(g, e)
	}
	g.Attempts++
	g.LastError = e.Err.Error()
	g.Due = now.Add(backoff(g.Attempts))
	return g, nil, nil
}

func gone(g Lease, now time.Time) Lease {
	g.State = Gone
	g.Ended = now
	g.Due = time.Time{}
	g.LastError = ""
	return g
}

// extendRetry leaves room for several tries within issue.ProvisionalFor.
const extendRetry = 10 * time.Second

func (Tick) step(g Lease, now time.Time) (Lease, []Effect, error) {
	if g.Due.IsZero() || now.Before(g.Due) {
		return g, nil, nil
	}
	switch g.State {
	case Intended:
		return revoke(g, "never known to be issued", now)
	case Provisional:
		return revoke(g, "delivery was never acknowledged", now)
	case Live:
		if !g.Settled && !now.Before(g.Issued.Add(issue.ProvisionalFor)) {
			// The host has gone back to what it had.
			return revoke(g, "never given its length", now)
		}
		// At its end it dies by itself; the issuer is asked, so that a clock
		// that jumped takes nothing.
		g.Due = now.Add(extendRetry)
		return g, []Effect{DoExtend}, nil
	case Retiring:
		return revoke(g, g.Reason, now)
	case Revoking:
		g.Due = now.Add(backoff(g.Attempts))
		return g, []Effect{DoRevoke}, nil
	}
	return g, nil, nil
}

// revoke sets Due so that the sweeper comes back if the effect gets lost.
func revoke(g Lease, reason string, now time.Time) (Lease, []Effect, error) {
	if g.State != Revoking {
		g.State = Revoking
		g.Reason = reason
		g.Attempts = 0
	}
	g.Due = now.Add(backoff(0))
	return g, []Effect{DoRevoke}, nil
}

// backoff is 2 s doubling to a minute: Vault comes back when it does, and the
// lease should not outlive that by much.
func backoff(attempts int) time.Duration {
	return min(2*time.Second<<min(attempts, 5), time.Minute)
}

func earlier(a, b time.Time) time.Time {
	if b.IsZero() || a.Before(b) {
		return a
	}
	return b
}

func invalid(g Lease, e Event) error {
	return fmt.Errorf("lease %s is %s: no %T", g.ID, g.State, e)
}
