package findings

import (
	"path/filepath"
	"strings"
	"testing"

	"github.com/countersign/countersign/broker/internal/state/store"
	"github.com/countersign/countersign/broker/internal/state/store/storetest"
)

// TestPlans: a page of findings is found by an index, in the order of opening, without
// reading those that are not on it.
func TestPlans(t *testing.T) {
	s, err := storetest.Open(filepath.Join(t.TempDir(), "store.db"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.Close() })
	for name, c := range map[string]struct {
		filter Filter
		want   string
	}{
		"all":             {Filter{}, "findings_opened (opened>?)"},
		"all, newest":     {Filter{Newest: true}, "findings_opened (opened<?)"},
		"open ones":       {Filter{Status: Open}, "findings_status (status=? AND opened>?)"},
		"open, newest":    {Filter{Status: Open, Newest: true}, "findings_status (status=? AND opened<?)"},
		"of a detector":   {Filter{Detector: "d"}, "findings_detector (detector=? AND opened>?)"},
		"of a host":       {Filter{Host: "h"}, "findings_host (host_id=? AND opened>?)"},
		"of one severity": {Filter{Severity: "high"}, "findings_severity (severity=? AND opened>?)"},
	} {
		query, args := c.filter.query()
		if err := s.View(t.Context(), func(tx *store.Tx) error {
			var a, b, d int
			var plan string
			if err := tx.QueryRow("EXPLAIN QUERY PLAN "+query, args...).Scan(&a, &b, &d, &plan); err != nil {
				return err
			}
			if !strings.Contains(plan, c.want) {
				t.Errorf("%s: %s, want %s", name, plan, c.want)
			}
			return nil
		}); err != nil {
			t.Fatal(err)
		}
	}
}
