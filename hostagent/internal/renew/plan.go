// Package renew keeps one credential in force: it obtains it for the program
// that is to have it, delivers, replaces it before its end, and gives it back
// when the program ends.
//
// Each credential has one goroutine over a pure Plan, so that one that is
// stuck holds up no other. The package trusts program for what runs, attest
// for what the broker says, and the way of delivery for what the program has:
// what is pushed is acknowledged once it is committed, what is pulled once it is
// read. It promises that a credential is taken away only on a broker's word, at
// its end, or when the program that earned it is gone; a fault takes nothing.
package renew

import (
	"time"

	"github.com/countersign/countersign/attestors/process"
)

// A Lease is what the agent knows of a credential that it holds. It is kept on
// disk; the secret is not in it.
type Lease struct {
	ID       string    `json:"id"`
	Delivery string    `json:"delivery"`
	Instance string    `json:"instance"`         // the program instance it is for
	Coming   bool      `json:"coming,omitempty"` // for the instance after Instance: a hand-over
	Boot     string    `json:"boot"`
	Unit     string    `json:"unit,omitempty"`
	SHA256   string    `json:"sha256"`
	Expires  time.Time `json:"expires"`
	Replace  time.Time `json:"replace"`
	Ticket   []byte    `json:"ticket"`
	Acked    bool      `json:"acked"`
	AckBy    time.Time `json:"ack_by"`
	Replaces string    `json:"replaces,omitempty"`

	// Ended is why the lease is over, while something of it is still to be
	// removed; Returned says that the broker knows, or is owed to be told.
	Ended    string `json:"ended,omitempty"`
	Returned bool   `json:"returned,omitempty"`
}

// holds says whether a credential is in force by l.
func (l *Lease) holds() bool { return l != nil && l.Ended == "" }

// with is a copy of l, changed: a lease that others may see never changes.
func (l *Lease) with(change func(*Lease)) *Lease {
	c := *l
	change(&c)
	return &c
}

// fits says whether a lease that was earned by an earlier instance may serve p
// while no broker can be asked: the same unit, running the same file, in the
// same boot.
func (l *Lease) fits(p *process.Program) bool {
	return l.Unit != "" && l.Unit == p.Unit() && l.Boot == p.Boot && l.SHA256 == p.Main().SHA256.String()
}

// Observed is all that Plan decides on.
type Observed struct {
	Now      time.Time
	Program  *process.Program // what runs, or starts; nil: nothing, or Unknown
	Unknown  bool             // what runs could not be seen
	Lease    *Lease           // whose credential stands in the files; nil: none
	Withheld *Lease           // whose credential is kept in memory while its unit is down
	RetryAt  time.Time        // no request before this
	Offline  bool             // the last request found no broker that could decide

	Asked   bool   // Program came for a credential, and none is offered to it
	Offered *Lease // whose credential Program may read; nil: none
	Read    bool   // the one that is offered was read
}

// A Kind of action.
type Kind int

const (
	Wait     Kind = iota // until Until, or until something changes
	Obtain               // a credential, replacing Lease if there is one
	Adopt                // put back what was withheld
	Withdraw             // take the files away and give the lease back
	Drop                 // give back what was withheld
	Accept               // acknowledge what was offered: it was read
	Retract              // offer it no longer: it dies by itself
)

// An Action is what to do next.
type Action struct {
	Kind   Kind
	Until  time.Time // of Wait; zero: only a change matters
	Reason string    // of Withdraw, Drop and Retract
}

// Plan says what to do next. It has no side effects.
func Plan(o Observed) Action {
	l := o.Offered
	if l == nil {
		return planHeld(o)
	}
	switch {
	case o.Read:
		return Action{Kind: Accept}
	case !o.Now.Before(l.AckBy):
		return Action{Kind: Retract, Reason: "it was not read in time"}
	case !o.Unknown && (o.Program == nil || o.Program.Instance().String() != l.Instance):
		return Action{Kind: Retract, Reason: "the program ended before it read it"}
	}
	a := planHeld(o)
	if a.Kind == Obtain || a.Kind == Wait && (a.Until.IsZero() || l.AckBy.Before(a.Until)) {
		return Action{Kind: Wait, Until: l.AckBy}
	}
	return a
}

// planHeld is Plan without what is offered.
func planHeld(o Observed) Action {
	if o.Withheld != nil && !o.Now.Before(o.Withheld.Expires) {
		return Action{Kind: Drop, Reason: "expired"}
	}
	if l := o.Lease; l != nil {
		switch {
		case !l.holds() && o.Now.Before(o.RetryAt):
			return Action{Kind: Wait, Until: o.RetryAt}
		case !l.holds():
			return Action{Kind: Withdraw, Reason: l.Ended}
		case !o.Now.Before(l.Expires):
			return Action{Kind: Withdraw, Reason: "expired"}
		case o.Unknown:
			// Not knowing is no end: the lease runs on, and is not replaced blindly.
			return Action{Kind: Wait, Until: l.Expires}
		case o.Program == nil && !l.Coming:
			return Action{Kind: Withdraw, Reason: "the program ended"}
		case o.Program != nil && o.Program.Instance().String() != l.Instance && !l.Coming:
			return Action{Kind: Withdraw, Reason: "the program was restarted"}
		case o.Program == nil, o.Now.Before(l.Replace) && !o.Asked:
			return Action{Kind: Wait, Until: earliest(l.Expires, l.Replace, o.Now)}
		case o.Now.Before(o.RetryAt):
			return Action{Kind: Wait, Until: earliest(l.Expires, o.RetryAt, o.Now)}
		}
		return Action{Kind: Obtain}
	}
	if o.Program == nil {
		if o.Withheld != nil {
			return Action{Kind: Wait, Until: o.Withheld.Expires}
		}
		return Action{Kind: Wait}
	}
	if o.Withheld != nil && o.Offline && o.Withheld.fits(o.Program) {
		return Action{Kind: Adopt}
	}
	if o.Now.Before(o.RetryAt) {
		return Action{Kind: Wait, Until: o.RetryAt}
	}
	return Action{Kind: Obtain}
}

// earliest of a and b that lies after now, or a.
func earliest(a, b, now time.Time) time.Time {
	if b.After(now) && b.Before(a) {
		return b
	}
	return a
}
