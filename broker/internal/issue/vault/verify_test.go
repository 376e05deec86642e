package vault

import (
	"bufio"
	"encoding/json"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/countersign/countersign/broker/internal/policy"
)

func verify(t *testing.T, set *policy.Set) []Finding {
	t.Helper()
	found, err := Verify(within(t, time.Minute), root, Requirements(set))
	if err != nil {
		t.Fatal(err)
	}
	return found
}

// setUp restores what the test changed.
func setUp(t *testing.T) {
	t.Helper()
	if _, err := Setup(within(t, time.Minute), root, Requirements(mustParse(scopesHCL))); err != nil {
		t.Fatal(err)
	}
}

func remove(t *testing.T, path string) {
	t.Helper()
	if _, err := root.Logical().DeleteWithContext(within(t, time.Minute), path); err != nil {
		t.Fatal(err)
	}
}

func policyText(t *testing.T, name string) string {
	t.Helper()
	text, err := root.Sys().GetPolicyWithContext(within(t, time.Minute), name)
	if err != nil {
		t.Fatal(err)
	}
	return text
}

func writePolicy(t *testing.T, name, text string) {
	t.Helper()
	put(t, "sys/policies/acl/"+name, map[string]any{"policy": text})
}

func TestSetupIsCleanAndWritesNothingTwice(t *testing.T) {
	if found := verify(t, mustParse(scopesHCL)); len(found) > 0 {
		t.Fatalf("after setup: %v", found)
	}
	changed, err := Setup(within(t, time.Minute), root, Requirements(mustParse(scopesHCL)))
	if err != nil || len(changed) > 0 {
		t.Fatalf("a second setup changed %q, %v", changed, err)
	}
}

// Each drift starts from a clean Vault, changes one thing, and is named.
func TestVerifyNamesEachDrift(t *testing.T) {
	const db = "countersign-billing-db"
	role := func(k string, v any) func(*testing.T) {
		return func(t *testing.T) { put(t, "auth/token/roles/"+db, map[string]any{k: v}) }
	}
	add := func(name, text string) func(*testing.T) {
		return func(t *testing.T) { writePolicy(t, name, policyText(t, name)+text) }
	}
	swap := func(name, old, new string) func(*testing.T) {
		return func(t *testing.T) {
			text := policyText(t, name)
			if !strings.Contains(text, old) {
				t.Fatalf("policy %s lacks %q:\n%s", name, old, text)
			}
			writePolicy(t, name, strings.Replace(text, old, new, 1))
		}
	}
	for _, d := range []struct {
		name   string
		drift  func(*testing.T)
		object string
		words  string
		mend   func(*testing.T) // where setup doesn't
	}{
		{"no period", role("token_period", 3600), "token role " + db, "token_period is 3600, not 0", nil},
		{"old period", role("period", 3600), "token role " + db, "period is 3600", role("period", 0)},
		{"orphan", role("orphan", false), "token role " + db, "orphan is false, not true", nil},
		{"longest life", role("token_explicit_max_ttl", 60), "token role " + db, "token_explicit_max_ttl is 60, not 28800", nil},
		{"more policies", role("allowed_policies", []string{db, "admin"}), "token role " + db, "allowed_policies", nil},
		{"policy globs", role("allowed_policies_glob", []string{"*"}), "token role " + db, "allowed_policies_glob", nil},
		{"token type", role("token_type", "default-batch"), "token role " + db, `token_type is "default-batch", not "service"`, nil},
		{"default policy", role("token_no_default_policy", false), "token role " + db, "token_no_default_policy is false", nil},
		{"no renewal", role("renewable", false), "token role " + db, "renewable is false", nil},
		{"token role", func(t *testing.T) { remove(t, "auth/token/roles/"+db) }, "token role " + db, "is missing", nil},
		{"scope's policy", func(t *testing.T) { remove(t, "sys/policies/acl/"+db) }, "policy " + db, "is missing", nil},
		{"more capabilities", swap(db, `["read"]`, `["read", "list"]`), "policy " + db, `grants ["list"] on database/creds/billing-ro`, nil},
		{"fewer capabilities", swap(db, `["read"]`, `["deny"]`), "policy " + db, `lacks ["read"] on database/creds/billing-ro`, nil},
		{"more paths", add(db, "\npath \"secret/*\" {\n  capabilities = [\"read\"]\n}\n"), "policy " + db, `grants ["read"] on secret/*, which is not needed`, nil},
		{"broker's more paths", add(BrokerPolicy, "\npath \"sys/policies/acl/*\" {\n  capabilities = [\"update\"]\n}\n"), "policy " + BrokerPolicy, "on sys/policies/acl/*", nil},
		{"broker's fewer paths", swap(BrokerPolicy, "sys/leases/revoke/database/creds/billing-ro/*", "sys/leases/revoke/database/creds/other/*"),
			"policy " + BrokerPolicy, `lacks ["update"] on sys/leases/revoke/database/creds/billing-ro/*`, nil},
		{"any parameter", swap(BrokerPolicy, "    \"sync\" = []\n", "    \"*\" = []\n"), "policy " + BrokerPolicy, "names parameter *", nil},
		{"denied parameters", swap(db, `["read"]`, "[\"read\"]\n  denied_parameters = {\n    \"version\" = []\n  }"), "policy " + db, "denies parameters on database/creds/billing-ro", nil},
		{"unreadable policy", func(t *testing.T) { writePolicy(t, db, `{"path": {"x": {"capabilities": ["read"]}}}`) }, "policy " + db, "can't be compared", nil},
		{"audit header", func(t *testing.T) { remove(t, headerList+"/"+correlation) }, auditHeader, "does not show it", nil},
		{"HMAC'd header", func(t *testing.T) { put(t, headerList+"/"+correlation, map[string]any{"hmac": true}) }, auditHeader, "only its HMAC", nil},
		{"database default_ttl", func(t *testing.T) { databaseRole(t, "1h", "24h") }, "database/roles/billing-ro", "default_ttl is 1h0m0s, shorter than the ttl 8h0m0s of scope billing-db",
			func(t *testing.T) { databaseRole(t, "8h", "24h") }},
		{"database max_ttl", func(t *testing.T) { databaseRole(t, "2h", "2h") }, "database/roles/billing-ro", "max_ttl is 2h0m0s, shorter",
			func(t *testing.T) { databaseRole(t, "8h", "24h") }},
		{"certificates without leases", func(t *testing.T) { pkiRole(t, false) }, "pki/roles/billing", "generate_lease is off", func(t *testing.T) { pkiRole(t, true) }},
		{"orphaned policy", func(t *testing.T) {
			writePolicy(t, "countersign-old", `path "kv/data/old" { capabilities = ["read"] }`)
		}, "policy countersign-old", "no scope and no token role has it",
			func(t *testing.T) { remove(t, "sys/policies/acl/countersign-old") }},
	} {
		t.Run(d.name, func(t *testing.T) {
			if found := verify(t, mustParse(scopesHCL)); len(found) > 0 {
				t.Fatalf("not clean before: %v", found)
			}
			d.drift(t)
			found := verify(t, mustParse(scopesHCL))
			if !slices.ContainsFunc(found, func(f Finding) bool { return f.Object == d.object && strings.Contains(f.Problem, d.words) }) {
				t.Errorf("want %s: %s; found %v", d.object, d.words, found)
			}
			for _, f := range found {
				if f.Remedy == "" || strings.Contains(f.String(), "\n") {
					t.Errorf("finding without remedy or of many lines: %q", f)
				}
			}
			if d.mend != nil {
				d.mend(t)
			}
			setUp(t)
			if found := verify(t, mustParse(scopesHCL)); len(found) > 0 {
				t.Errorf("not clean after setup: %v", found)
			}
		})
	}
}

func databaseRole(t *testing.T, initial, longest string) {
	t.Helper()
	path := "database/roles/billing-ro"
	s, err := root.Logical().ReadWithContext(within(t, time.Minute), path)
	if err != nil {
		t.Fatal(err)
	}
	s.Data["default_ttl"], s.Data["max_ttl"] = initial, longest
	put(t, path, s.Data)
}

func pkiRole(t *testing.T, leases bool) {
	t.Helper()
	put(t, "pki/roles/billing", map[string]any{"allowed_domains": "example.com", "allow_subdomains": true, "generate_lease": leases, "ttl": "1h", "max_ttl": "1h", "key_type": "ec", "key_bits": 256})
}

// A scope that goes leaves its token role, and the broker's right to end its
// leases, until an operator takes them away.
func TestScopeThatIsNoMore(t *testing.T) {
	i := newIssuer(t, tokenConfig(t, brokerToken(t, nil)))
	c := mustIssue(t, i, "billing-db", "leftover")
	_, rest, _ := strings.Cut(scopesHCL[1:], "\nscope ")
	fewer := mustParse("scope " + rest)
	if fewer.Scope("billing-db") != nil {
		t.Fatal("the scope is still there")
	}
	t.Cleanup(func() { setUp(t) })
	if _, err := Setup(within(t, time.Minute), root, Requirements(fewer)); err != nil {
		t.Fatal(err)
	}
	found := verify(t, fewer)
	if len(found) != 1 || found[0].Object != "token role countersign-billing-db" || !strings.Contains(found[0].Remedy, "vault delete auth/token/roles/countersign-billing-db") {
		t.Errorf("found %v", found)
	}
	if err := i.Revoke(within(t, time.Minute), c.Handle); err != nil {
		t.Errorf("a lease of the gone scope can't be ended: %v", err)
	}
	_, err := i.issue(within(t, time.Minute), scope("billing-db"), order("leftover2"))
	fails(t, err, "auth/token/create/countersign-billing-db", `"update"`)
}

// A write that has no parameters is for none: its scope's tokens can't choose what
// the engine makes of it. Vault itself says so.
func TestAWriteWithoutParameters(t *testing.T) {
	const name, path = "countersign-anonymous", "pki/issue/anonymous"
	put(t, "pki/roles/anonymous", map[string]any{"allow_any_name": true, "require_cn": false, "generate_lease": true, "ttl": "1h", "max_ttl": "1h", "key_type": "ec", "key_bits": 256})
	set := mustParse(scopesHCL + `
scope "anonymous" {
  process { unit = "billing.service" }
  vault {
    path   = "` + path + `"
    method = "write"
    ttl    = "1h"
  }
}
`)
	t.Cleanup(func() {
		remove(t, "sys/policies/acl/"+name)
		remove(t, "auth/token/roles/"+name)
		setUp(t)
	})
	if _, err := Setup(within(t, time.Minute), root, Requirements(set)); err != nil {
		t.Fatal(err)
	}
	if found := verify(t, set); len(found) > 0 {
		t.Errorf("after setup: %v", found)
	}

	token := put(t, "auth/token/create", map[string]any{"policies": []string{name}, "no_default_policy": true, "ttl": "5m"}).Auth.ClientToken
	client, err := root.Clone()
	if err != nil {
		t.Fatal(err)
	}
	client.SetToken(token)
	write := func(data map[string]any) error {
		s, err := client.Logical().WriteWithContext(within(t, time.Minute), path, data)
		if err == nil {
			issued.secret(s.Data["private_key"].(string))
		}
		return err
	}
	if err := write(nil); err != nil {
		t.Errorf("without parameters: %v", err)
	}
	for _, data := range []map[string]any{{"common_name": "admin.example.com"}, {"alt_names": "admin.example.com"}, {"ttl": "1m"}, {"": ""}, {"*": ""}} {
		if err := write(data); err == nil || !strings.Contains(err.Error(), "permission denied") {
			t.Errorf("with %v: %v", data, err)
		}
	}

	// A policy from before, or one that denies less, is named, and was no restriction.
	for _, denied := range []string{"", "  denied_parameters = {\n    \"ttl\" = []\n  }\n", "  allowed_parameters = {}\n"} {
		writePolicy(t, name, "path \""+path+"\" {\n  capabilities = [\"update\"]\n"+denied+"}\n")
		if err := write(map[string]any{"common_name": "admin.example.com"}); err != nil {
			t.Errorf("with the policy %q: %v", denied, err)
		}
		if found := verify(t, set); !slices.ContainsFunc(found, func(f Finding) bool { return f.Problem == "allows any parameter on "+path }) {
			t.Errorf("with the policy %q: %v", denied, found)
		}
	}
}

// The broker's policy names leases by prefix; a lease named in the body must not
// go round it.
func TestBrokerTokenReachesNoOtherLease(t *testing.T) {
	foreign := put(t, "pki/issue/billing", map[string]any{"common_name": "other.example.com"})
	issued.secret(foreign.Data["private_key"].(string))
	rest := strings.Split(scopesHCL, "scope \"billing-pki\"")[0]
	n := Requirements(mustParse(rest))
	writePolicy(t, "narrow", n.Broker.HCL())
	t.Cleanup(func() { remove(t, "sys/policies/acl/narrow") })
	i := newIssuer(t, tokenConfig(t, brokerToken(t, map[string]any{"policies": []string{"narrow"}})))
	ctx := within(t, time.Minute)
	for _, c := range []call{
		{path: "sys/leases/revoke/" + foreign.LeaseID, body: map[string]any{"sync": true}},
		{path: "sys/leases/revoke/database/creds/billing-ro/x", body: map[string]any{"sync": true, "lease_id": foreign.LeaseID}},
		{path: "sys/leases/renew/database/creds/billing-ro/x", body: map[string]any{"lease_id": foreign.LeaseID}},
		{path: "sys/leases/lookup", body: map[string]any{"lease_id": foreign.LeaseID}},
	} {
		_, err := i.session.asBroker(ctx, c)
		fails(t, err, "lacks \"update\" on "+c.path)
	}
	if _, err := root.Sys().LookupWithContext(ctx, foreign.LeaseID); err != nil {
		t.Errorf("the foreign lease is gone: %v", err)
	}
}

func TestRequestIDStandsInVaultsAuditLog(t *testing.T) {
	i := newIssuer(t, tokenConfig(t, brokerToken(t, nil)))
	mustIssue(t, i, "billing-db", "audited")
	f, err := os.Open(testVault.AuditLog)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	paths := map[string]bool{}
	lines := bufio.NewScanner(f)
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		var e struct {
			Request struct {
				Path    string              `json:"path"`
				Headers map[string][]string `json:"headers"`
			} `json:"request"`
		}
		if err := json.Unmarshal(lines.Bytes(), &e); err != nil {
			t.Fatal(err)
		}
		if slices.Contains(e.Request.Headers["x-correlation-id"], "req-audited") {
			paths[e.Request.Path] = true
		}
	}
	if err := lines.Err(); err != nil {
		t.Fatal(err)
	}
	if !paths["auth/token/create/countersign-billing-db"] || !paths["database/creds/billing-ro"] {
		t.Errorf("the request id stands on %v", sorted(paths))
	}
}
