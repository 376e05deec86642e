// Package issuers lists all issuers. To add one, add a line to Kinds.
package issuers

import (
	"github.com/countersign/countersign/broker/internal/issue"
	"github.com/countersign/countersign/broker/internal/issue/ca"
	"github.com/countersign/countersign/broker/internal/issue/vault"
	"github.com/countersign/countersign/broker/internal/policy"
)

// Kinds lists the kinds of credentials.
var Kinds = []issue.Kind{
	vault.Kind,
	ca.Kind,
}

// Parse reads a set of scopes with blocks of all kinds. reserved lists the broker's own
// names and addresses, which certificates of scopes must not contain.
func Parse(files []policy.File, reserved ...string) (*policy.Set, error) {
	o := policy.Options{Reserved: reserved}
	for _, k := range Kinds {
		o.Kinds = append(o.Kinds, k.Kind)
	}
	return policy.Parse(files, o)
}
