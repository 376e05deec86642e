package journal_test

import (
	"encoding/json"
	"maps"
	"testing"

	"github.com/countersign/countersign/broker/internal/lease/journal"
	"github.com/countersign/countersign/test/check"
)

// Leases and tickets of brokers before this one had a field for each issuer's words.
func TestOldLeases(t *testing.T) {
	for _, c := range []struct {
		body, ref string
		names     map[string]string
	}{
		{`{"id":"a","host":"h","scope":"s","kind":"vault","subject":{},"facts":{},"policy":3,"accessor":"ac1","vault_lease":"database/creds/b/1","names":{"db_username":"v-1"},"ttl":3600000000000}`,
			`{"accessor":"ac1","vault_lease":"database/creds/b/1"}`,
			map[string]string{"db_username": "v-1", "vault_accessor": "ac1", "vault_lease": "database/creds/b/1"}},
		{`{"id":"b","host":"h","scope":"s","kind":"certificate","subject":{},"facts":{},"policy":3,"serial":"17","ttl":3600000000000}`,
			`{"serial":"17"}`, map[string]string{"certificate_serial": "17"}},
		{`{"id":"c","host":"h","scope":"s","kind":"vault","subject":{},"facts":{},"policy":3,"ttl":3600000000000}`, ``, nil},
		{`{"id":"d","host":"h","scope":"s","kind":"vault","subject":{},"facts":{},"policy":3,"ref":{"accessor":"ac2"},"names":{"x":"y"},"ttl":3600000000000}`,
			`{"accessor":"ac2"}`, map[string]string{"x": "y"}},
	} {
		var g journal.Lease
		check.Nil(t, json.Unmarshal([]byte(c.body), &g))
		if string(g.Ref) != c.ref || !maps.Equal(g.Names, c.names) || g.Policy != 3 {
			t.Errorf("%s: %s and %v", g.ID, g.Ref, g.Names)
		}
		var again journal.Lease
		check.Nil(t, json.Unmarshal(check.Must(json.Marshal(g))(t), &again))
		if string(again.Ref) != c.ref || !maps.Equal(again.Names, c.names) {
			t.Errorf("%s, written again: %s and %v", g.ID, again.Ref, again.Names)
		}
	}
}
