package policy_test

import (
	"github.com/countersign/countersign/broker/internal/issue/issuers"
	"github.com/countersign/countersign/broker/internal/policy"
)

// The tests read scopes with the blocks of the real issuers, which import package policy.
func init() {
	for _, k := range issuers.Kinds {
		policy.TestOptions.Kinds = append(policy.TestOptions.Kinds, k.Kind)
	}
}
