package findings

import "testing"

const RiskQuery = riskQuery

// LowerMaxOpen is for one test; none runs beside it.
func LowerMaxOpen(t *testing.T, n int) {
	before := maxOpen
	maxOpen = n
	t.Cleanup(func() { maxOpen = before })
}
