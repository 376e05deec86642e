// Package expiry lists what ends by itself, and says in time what a person has
// to renew.
//
// It is pure: [List] makes ends of what the caller knows, and [Alarms] makes
// words of those that no program will renew. [Kinds] is the same list for
// people; a test holds docs/OPERATIONS.md to it.
package expiry

import (
	"cmp"
	"crypto/x509"
	"fmt"
	"slices"
	"time"

	"github.com/countersign/countersign/broker/internal/issue"
	"github.com/countersign/countersign/broker/internal/issue/ca"
	"github.com/countersign/countersign/broker/internal/issue/vault"
	"github.com/countersign/countersign/internal/lifetime"
)

// What ends, as the metric's label has it.
const (
	HostCA   = "host-ca"
	Operator = "operator"
	EKRoot   = "ek-root"
)

// A Kind is a kind of thing that ends: a row of the table in
// docs/OPERATIONS.md.
type Kind struct {
	Thing     string // as people call it
	Life      string
	Renewer   string
	Otherwise string // what happens if nobody does
	What      string // the metric's label; empty: it has none
}

// Kinds are all of them.
var Kinds = []Kind{
	{"host certificate", "30 days", "the agent, in a proof at two thirds; after its end by joining again with the same EK, AK and TLS key", "an admitted host comes back by itself; a quarantined or removed one stays out", ""},
	{"listener certificate", "90 days", "the broker, at two thirds and at each start", "does not happen while the broker runs", ""},
	{"host CA", "20 years", "nobody: agents pin it", "agents go on by the pin and say so; rotate it", HostCA},
	{"operator CA", "20 years", "nobody needs to: only the broker checks it, by its own key", "nothing", ""},
	{"operator certificate of a person", "90 days, at most 366", "an admin: `operator remove`, `operator add`", "each call is answered with what to do", Operator},
	{"certificate of the watch", "90 days, at most 366", "the watch, at two thirds, into its state folder", "after being off for so long it says what to do; an admin adds a new one", Operator},
	{"workload CA and its issuer", "20 years", "nobody: verifiers trust it", "no certificate is issued that would outlive it; make a new one", ca.EndRoot + ", " + ca.EndIssuer},
	{"CRL", "7 days, or three intervals", "the broker, at each interval, each revocation, and when its clock was set back", "verifiers that demand a CRL refuse everybody", ca.EndCRL},
	{"workload certificate", "the scope's `ttl`", "the agent, at two thirds", "the program can't use it", ""},
	{"audit key", "none", "", "", ""},
	{"Vault token of the broker", "as Vault says", "the broker, by renewing it or logging in again; of a token file that can't be renewed, nobody", "no credential is issued, renewed or revoked at Vault", vault.EndToken},
	{"Vault secret id", "as the AppRole says", "nobody: write a new one into `secret_id_file`", "the next login fails, and then as above", vault.EndSecretID},
	{"join token", "1 hour, at most 30 days", "nobody: make another", "the host is told to ask for a new one", ""},
	{"EK certificate", "its vendor's", "nobody", "nothing for a TPM that the broker knows; a new host's EK hash has to be registered", ""},
	{"certificate in `ek_roots`", "its vendor's", "nobody: ask the vendor for its next", "TPMs under it count as known, not certified, when they join first", EKRoot},
}

// An End is when one thing ends.
type End struct {
	What string
	Name string    // which one, where there are several; no name that a host chose
	At   time.Time // never zero
	Do   string    // what a person has to do; empty: a program renews it
	Warn time.Duration
}

// An OperatorKey is an operator's certificate, as the store knows it.
type OperatorKey struct {
	Name, Role       string
	Program          bool // it renews itself
	Created, Expires time.Time
}

// Known is what a broker knows. What is nil or zero doesn't exist, or has no
// end.
type Known struct {
	HostCA    *x509.Certificate
	EKRoots   []*x509.Certificate
	Operators []OperatorKey
	Issuers   []issue.End
}

// forgotten is how long after its end an operator's certificate is still
// listed.
const forgotten = 30 * 24 * time.Hour

// patience is how long a program may take to renew what is due until a person
// hears of it.
const patience = 24 * time.Hour

// List returns the ends, soonest first.
func List(k Known, now time.Time) (ends []End) {
	certificate := func(what, name string, c *x509.Certificate, do string) {
		if c != nil {
			ends = append(ends, End{What: what, Name: name, At: c.NotAfter, Do: do, Warn: lifetime.Warning})
		}
	}

	certificate(HostCA, "", k.HostCA, "agents go on by its pin; move to a new one: \"Rotate CAs\" in docs/OPERATIONS.md")
	for _, c := range k.EKRoots {
		certificate(EKRoot, c.Subject.String(), c, "ask the TPM's vendor for its next certificate and put it into ek_roots, or register new hosts by their EK hash")
	}
	for _, e := range k.Issuers {
		ends = append(ends, End{What: e.What, At: e.At, Do: e.Do, Warn: lifetime.Warning})
	}
	ends = append(ends, operators(k.Operators, now)...)

	slices.SortFunc(ends, func(a, b End) int {
		return cmp.Or(a.At.Compare(b.At), cmp.Compare(a.What, b.What), cmp.Compare(a.Name, b.Name))
	})
	return ends
}

// operators lists the last certificate of each name.
func operators(keys []OperatorKey, now time.Time) (ends []End) {
	last := map[string]OperatorKey{}
	for _, k := range keys {
		if l, ok := last[k.Name]; !ok || k.Expires.After(l.Expires) {
			last[k.Name] = k
		}
	}
	for _, k := range last {
		if now.After(k.Expires.Add(forgotten)) {
			continue
		}
		e := End{What: Operator, Name: k.Name, At: k.Expires, Warn: min(lifetime.Warning, k.Expires.Sub(k.Created)/3),
			Do: fmt.Sprintf("`countersign operator remove %s`, then `countersign operator add %s --role %s`", k.Name, k.Name, k.Role)}
		if k.Program {
			e.Warn = max(k.Expires.Sub(k.Created)/3-patience, 0)
			e.Do = "it renews itself while it runs and reaches the broker: look at its log; after its end, " + e.Do
		}
		ends = append(ends, e)
	}
	return ends
}

// Alarms says in words what of ends a person has to see to now.
func Alarms(ends []End, now time.Time) (alarms []string) {
	for _, e := range ends {
		if e.Do == "" || now.Before(e.At.Add(-e.Warn)) {
			continue
		}
		verb := "ends"
		if !now.Before(e.At) {
			verb = "ended"
		}
		name := e.What
		if e.Name != "" {
			name += " " + e.Name
		}
		alarms = append(alarms, fmt.Sprintf("%s %s at %s: %s", name, verb, e.At.UTC().Format(time.RFC3339), e.Do))
	}
	return alarms
}
