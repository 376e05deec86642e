package vault

import (
	"os"
	"testing"
	"time"
)

// The secret id's end is known where the broker's policies let it be looked up,
// and that of the next one once it is in the file. Where they don't, nothing is
// said, and nothing else fails.
func TestSecretIDsEnd(t *testing.T) {
	ctx := within(t, time.Minute)
	if err := root.Sys().PutPolicyWithContext(ctx, "look-up", `path "auth/approle/role/looks-up/secret-id/lookup" { capabilities = ["update"] }`); err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		settings map[string]any
		known    bool
	}{
		"looks-up":    {map[string]any{"secret_id_ttl": "20h", "token_policies": []string{BrokerPolicy, "look-up"}}, true},
		"must-not":    {map[string]any{"secret_id_ttl": "20h"}, false},
		"has-no-end1": {map[string]any{}, false},
	} {
		t.Run(name, func(t *testing.T) {
			cfg := appRole(t, name, c.settings)
			i := newIssuer(t, cfg)
			for _, what := range []string{"the first", "the next"} {
				for range 2 {
					if _, err := i.session.keepOnce(ctx); err != nil {
						t.Fatal(err)
					}
				}
				token, ends := i.session.ends()
				if left := time.Until(ends); !token.IsZero() || ends.IsZero() == c.known || c.known && (left > 21*time.Hour || left < 19*time.Hour) {
					t.Errorf("%s: the token ends at %s, the secret id at %s", what, token, ends)
				}
				next := put(t, "auth/approle/role/"+name+"/secret-id", map[string]any{})
				id := next.Data["secret_id"].(string)
				issued.secret(id)
				if err := os.WriteFile(cfg.AppRole.SecretIDFile, []byte(id), 0o600); err != nil {
					t.Fatal(err)
				}
			}
		})
	}
}
