package journal

import (
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/countersign/countersign/broker/internal/store"
)

// TestPlans: what a request or the sweep asks the journal is answered by an index
// that names just that, however much a host or a scope has. SQLite chooses by what
// it knows of the columns, so a new index can take a query from another.
func TestPlans(t *testing.T) {
	s, err := store.Open(filepath.Join(t.TempDir(), "store.db"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.Close() })
	instance := "i"
	for name, c := range map[string]struct {
		filter Filter
		want   string
	}{
		"a repeated delivery":    {Filter{Host: "h", Delivery: "d", States: Unended}, "grants_delivery (host_id=? AND delivery_id=?)"},
		"what a program has":     {Filter{Host: "h", Scope: "s", Instance: &instance, States: Unended}, "grants_program (host_id=? AND scope=? AND instance=?)"},
		"a host's of one scope":  {Filter{Host: "h", Scope: "s", States: Unended}, "grants_program (host_id=? AND scope=?)"},
		"a host's that are live": {Filter{Host: "h", States: []State{Live}}, "grants_host (host_id=? AND state=?)"},
		"all of a host":          {Filter{Host: "h"}, "(host_id=?"},
		"what is due":            {Filter{DueBy: time.Unix(1, 0), Limit: 9}, "grants_due (due>? AND due<?)"},
		"the next page":          {Filter{After: "a", Limit: 9}, "(id>?)"},
	} {
		query, args := c.filter.query()
		err := s.View(t.Context(), func(tx *store.Tx) error {
			var a, b, d int
			var plan string
			if err := tx.QueryRow("EXPLAIN QUERY PLAN "+query, args...).Scan(&a, &b, &d, &plan); err != nil {
				return err
			}
			if !strings.Contains(plan, c.want) {
				t.Errorf("%s: %s, want %s", name, plan, c.want)
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
	}
}
