// Package ways lists the ways of delivery. To add one, add its block to
// config.Credential, which checks its settings, and a line to All.
package ways

import (
	"github.com/countersign/countersign/hostagent/internal/deliver"
	"github.com/countersign/countersign/hostagent/internal/deliver/files"
)

// All lists the ways. A credential uses the first that has a block in its config.
var All = []deliver.Kind{
	files.Of,
}
