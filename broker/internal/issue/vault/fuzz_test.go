package vault

import (
	"bytes"
	"maps"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/vault/api"

	"github.com/countersign/countersign/broker/internal/issue"
)

// FuzzParsePolicy: any text gives rules or an error, and what rules can be written
// down again reads the same.
func FuzzParsePolicy(f *testing.F) {
	f.Add(Requirements(mustParse(scopesHCL)).Broker.HCL())
	f.Add("path \"a\" {\n capabilities = [\"read\"]\n denied_parameters = {}\n}")
	f.Add(`{"path": {"a": {"capabilities": ["read"]}}}`)
	f.Add("path \"a\" {\n capabilities = " + strings.Repeat("[", 1000) + "\n}")
	f.Add("path \"${x}\" { capabilities = !!!true }")
	f.Fuzz(func(t *testing.T, text string) {
		rules, err := parsePolicy(text)
		if err != nil {
			return
		}
		var p Policy
		for _, path := range sorted(rules) {
			r := rules[path]
			all := slices.Concat([]string{path}, r.Capabilities, sorted(r.Parameters), sorted(r.Denied))
			for _, values := range slices.Concat(slices.Collect(maps.Values(r.Parameters)), slices.Collect(maps.Values(r.Denied))) {
				all = append(all, values...)
			}
			if r.other != nil || slices.ContainsFunc(all, func(s string) bool { return !literal("x" + s + "x") }) {
				return
			}
			p.Rules = append(p.Rules, r.Rule)
		}
		again, err := parsePolicy(p.HCL())
		if err != nil {
			t.Fatalf("%v in\n%s", err, p.HCL())
		}
		for path, r := range rules {
			if !slices.Equal(again[path].Capabilities, r.Capabilities) || len(r.Parameters) > 0 && !reflect.DeepEqual(again[path].Parameters, r.Parameters) ||
				len(r.Denied) > 0 && !reflect.DeepEqual(again[path].Denied, r.Denied) {
				t.Fatalf("%q: %v became %v", path, r, again[path])
			}
		}
	})
}

// FuzzFields: any answer that decodes makes a credential or an error, with fields
// in order of their names.
func FuzzFields(f *testing.F) {
	f.Add([]byte(`{"lease_id": "database/creds/billing-ro/x", "lease_duration": 60, "mount_type": "database", "data": {"username": "v-a", "password": "p"}}`))
	f.Add([]byte(`{"data": {"data": {"a": 1, "b": {"c": [true, null]}}, "metadata": {"version": 1}}}`))
	f.Add([]byte(`{"data": {"data": null, "metadata": {"version": 2}}}`))
	f.Add([]byte(`{"data": {"serial_number": "1", "signed_key": "k", "expiration": 99999999999}}`))
	f.Fuzz(func(t *testing.T, body []byte) {
		answer, err := api.ParseSecret(bytes.NewReader(body))
		if err != nil || answer == nil {
			return
		}
		for _, name := range []string{"billing-db", "billing-kv", "billing-pki"} {
			var c issue.Credential
			if err := fill(&c, scope(name), answer, time.Now()); err != nil {
				continue
			}
			if !slices.IsSortedFunc(c.Fields, func(a, b issue.Field) int { return strings.Compare(a.Name, b.Name) }) || len(c.Fields) > maxFields {
				t.Fatalf("fields %v", c.Fields)
			}
		}
	})
}
