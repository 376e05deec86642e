package main

import (
	"bytes"
	"context"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/countersign/countersign/internal/cli"
	"github.com/countersign/countersign/test/lab"
)

const vaultScopes = `
scope "billing-kv" {
  process { unit = "billing.service" }
  vault {
    path = "kv/billing"
    ttl  = "1h"
  }
}
`

// The verbs against a real Vault, as an operator runs them.
func TestVaultVerbs(t *testing.T) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	v, err := lab.StartVault(ctx, t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := v.Stop(); err != nil {
			t.Error(err)
		}
	})
	client, err := v.Client()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := client.Logical().WriteWithContext(ctx, "sys/mounts/kv", map[string]any{"type": "kv"}); err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "billing.hcl"), []byte(vaultScopes), 0o600); err != nil {
		t.Fatal(err)
	}
	t.Setenv("VAULT_ADDR", v.Addr)
	t.Setenv("VAULT_CACERT", v.CACert)
	t.Setenv("VAULT_TOKEN", v.RootToken)
	do := func(code int, words string, args ...string) string {
		t.Helper()
		var stdout, stderr bytes.Buffer
		if got := run(ctx, append([]string{"vault"}, args...), &stdout, &stderr); got != code {
			t.Fatalf("vault %v: exit %d, not %d\n%s%s", args, got, code, &stdout, &stderr)
		}
		if !strings.Contains(stdout.String()+stderr.String(), words) {
			t.Errorf("vault %v lacks %q:\n%s%s", args, words, &stdout, &stderr)
		}
		if strings.Contains(stdout.String()+stderr.String(), v.RootToken) {
			t.Errorf("vault %v prints the operator's token", args)
		}
		return stdout.String()
	}
	do(0, `path "kv/billing" {`, "policy", dir)
	do(cli.No, "token role countersign-billing-kv: is missing; run `countersign vault setup`", "verify", dir)
	do(0, "wrote token role countersign-billing-kv", "setup", dir)
	do(0, "Vault is as 1 scopes need it", "verify", dir)
	if _, err := client.Logical().WriteWithContext(ctx, "auth/token/roles/countersign-billing-kv", map[string]any{"token_period": 60}); err != nil {
		t.Fatal(err)
	}
	var report struct {
		Findings []struct{ Object, Problem, Remedy string }
	}
	if err := json.Unmarshal([]byte(do(cli.No, "token_period is 60, not 0", "verify", dir, "-o", "json")), &report); err != nil || len(report.Findings) != 1 {
		t.Errorf("%v: %+v", err, report)
	}
	do(0, "changed", "setup", dir, "-o", "json")
	do(cli.Usage, "no such file", "verify", filepath.Join(dir, "nowhere"))
	t.Setenv("VAULT_TOKEN", "")
	do(cli.Usage, "VAULT_TOKEN", "verify", dir)
	t.Setenv("VAULT_TOKEN", v.RootToken)
	if err := v.Seal(ctx); err != nil {
		t.Fatal(err)
	}
	do(exitUnreach, "sealed", "verify", dir)
}
