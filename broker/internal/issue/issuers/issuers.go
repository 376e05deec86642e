// Package issuers is the list of all issuers. A new one adds its line to Kinds.
package issuers

import (
	"github.com/countersign/countersign/broker/internal/issue"
	"github.com/countersign/countersign/broker/internal/issue/ca"
	"github.com/countersign/countersign/broker/internal/issue/vault"
	"github.com/countersign/countersign/broker/internal/policy"
)

// Kinds are the kinds of credentials that there are.
var Kinds = []issue.Kind{
	vault.Kind,
	ca.Kind,
}

// Parse reads a set of scopes with the blocks of all kinds. Reserved are the broker's
// own names and addresses, which no certificate of a scope may have.
func Parse(files []policy.File, reserved ...string) (*policy.Set, error) {
	o := policy.Options{Reserved: reserved}
	for _, k := range Kinds {
		o.Kinds = append(o.Kinds, k.Kind)
	}
	return policy.Parse(files, o)
}
