package server

import (
	"testing"

	"github.com/countersign/countersign/broker/api"
	v1 "github.com/countersign/countersign/broker/api/countersign/v1"
	"github.com/countersign/countersign/broker/internal/lease/journal"
	"github.com/countersign/countersign/broker/internal/state/inventory"
)

// What the broker says has a code on the wire.
func TestEveryStateHasItsCode(t *testing.T) {
	for _, s := range inventory.States {
		m := &v1.Host{State: string(s)}
		if api.CompleteCodes(m); m.GetStateCode() == 0 {
			t.Errorf("host state %s has no code", s)
		}
	}
	for _, s := range append(journal.Unended, journal.Gone) {
		m := &v1.Lease{State: string(s)}
		if api.CompleteCodes(m); m.GetStateCode() == 0 {
			t.Errorf("lease state %s has no code", s)
		}
	}
	for _, o := range []api.Outcome{api.Retry, api.Rejected, api.Refused, api.Fault} {
		m := &v1.ErrorDetail{Outcome: string(o)}
		if api.CompleteCodes(m); m.GetOutcomeCode() == 0 {
			t.Errorf("outcome %s has no code", o)
		}
	}
}
