package kinds

import (
	"github.com/countersign/countersign/hostagent/internal/program"
	"github.com/countersign/countersign/hostagent/internal/program/proc"
	"github.com/countersign/countersign/hostagent/internal/program/systemd"
)

// All are the kinds of programs on Linux, one line each.
func All() []program.Kind {
	units := systemd.New()
	return []program.Kind{
		units,
		proc.New(units),
	}
}
