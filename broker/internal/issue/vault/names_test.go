package vault

import (
	"testing"

	"github.com/hashicorp/vault/api"

	"github.com/countersign/countersign/broker/internal/policy"
)

// What is called a username is one where it is a database's, and no token that stands
// under that name.
func TestStaticAccountsAreDatabases(t *testing.T) {
	for audience, want := range map[string]string{"postgres://db1:5432/billing": "x", "sqlserver://mssql1": "x", "https://git.example.com": "", "smtp://mail:25": "", "": ""} {
		s := &policy.Scope{Source: &Source{Path: "kv/data/x"}}
		if audience != "" {
			s.Audience = []string{audience}
		}
		if got := names(s, &api.Secret{MountType: "kv"}, map[string]any{"username": "x", "password": "y"})["db_username"]; got != want {
			t.Errorf("of %q: %q, want %q", audience, got, want)
		}
	}
}
