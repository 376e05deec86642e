// Package ways names the ways of delivery. It trusts them to keep what
// [deliver.Push] and [deliver.Pull] promise. Each has a block type of its own in
// config.Credential, where its settings are checked, and by which a credential's
// config names it.
package ways

import (
	"github.com/countersign/countersign/hostagent/internal/deliver"
	"github.com/countersign/countersign/hostagent/internal/deliver/files"
)

// All are the ways that a credential can take, one line each. The first that has
// a block in the credential's config is taken.
var All = []deliver.Kind{
	files.Of,
}
