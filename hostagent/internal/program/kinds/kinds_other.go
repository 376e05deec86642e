//go:build !linux

package kinds

import "github.com/countersign/countersign/hostagent/internal/program"

// All are none on this system yet.
func All() []program.Kind { return nil }
