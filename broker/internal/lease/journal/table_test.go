package journal

import (
	"path/filepath"
	"strings"
	"testing"

	"github.com/countersign/countersign/broker/internal/state/store"
	"github.com/countersign/countersign/broker/internal/state/store/storetest"
)

// TestPlans: what a request or the sweep asks the journal is answered by an index
// that names just that, however much a host or a scope has. SQLite chooses by what
// it knows of the columns, so a new index can take a query from another.
func TestPlans(t *testing.T) {
	s, err := storetest.Open(filepath.Join(t.TempDir(), "store.db"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.Close() })
	instance := "i"
	some := Cursor{Issued: 1, ID: "a"}
	for name, c := range map[string]struct {
		filter Filter
		want   string
	}{
		"a repeated delivery":        {Filter{Host: "h", Delivery: "d", States: Unended}, "grants_open_delivery (host_id=? AND delivery_id=?)"},
		"what a program has":         {Filter{Host: "h", Scope: "s", Instance: &instance, States: Unended}, "grants_open_program (host_id=? AND scope=? AND instance=?)"},
		"a host's of one scope":      {Filter{Host: "h", Scope: "s", States: Unended}, "grants_open_program (host_id=? AND scope=?)"},
		"a host's that are live":     {Filter{Host: "h", States: []State{Live}}, "grants_open_program (host_id=?)"},
		"a host's that may work":     {Filter{Host: "h", States: []State{Live, Retiring}}, "grants_open_program (host_id=?)"},
		"a host's unended":           {Filter{Host: "h", States: Unended, After: some, Limit: 9}, "grants_open_program (host_id=?)"},
		"all of a host":              {Filter{Host: "h", Limit: 9}, "grants_host (host_id=?)"},
		"all of a host, on":          {Filter{Host: "h", After: some, Limit: 9}, "grants_host (host_id=? AND (issued,id)>(?,?))"},
		"all of a host, newest":      {Filter{Host: "h", After: some, Newest: true, Limit: 9}, "grants_host (host_id=? AND (issued,id)<(?,?))"},
		"all of a scope, newest":     {Filter{Scope: "s", After: some, Newest: true, Limit: 9}, "grants_scope (scope=? AND (issued,id)<(?,?))"},
		"a scope's unended":          {Filter{Scope: "s", States: Unended, After: some, Limit: 9}, "grants_open_scope (scope=? AND (issued,id)>(?,?))"},
		"a scope's live, for a plan": {Filter{Scope: "s", States: []State{Live, Provisional}, After: some, Limit: 9}, "grants_open_scope (scope=? AND (issued,id)>(?,?))"},
		"of one state":               {Filter{States: []State{Revoking}, After: some, Newest: true, Limit: 9}, "grants_open_state (state=? AND (issued,id)<(?,?))"},
		"all unended":                {Filter{States: Unended, After: some, Newest: true, Limit: 9}, "grants_open ((issued,id)<(?,?))"},
		"all that ended":             {Filter{States: []State{Gone}, After: some, Newest: true, Limit: 9}, "grants_gone ((issued,id)<(?,?))"},
		"the next page of all":       {Filter{After: some, Limit: 9}, "grants_issued ((issued,id)>(?,?))"},
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
