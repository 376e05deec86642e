package vault

import (
	"bytes"
	"context"
	"flag"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/hashicorp/vault/api"

	"github.com/countersign/countersign/broker/internal/config"
	"github.com/countersign/countersign/broker/internal/issue"
	"github.com/countersign/countersign/broker/internal/policy"
	"github.com/countersign/countersign/test/lab"
)

// What all tests share: one Vault and one PostgreSQL, a set of scopes that
// Setup has applied, and a broker's token.
var (
	testVault *lab.Vault
	testPG    *lab.Postgres
	root      *api.Client
	logged    lockedBuffer // every log line of every issuer
	issued    secretsSeen  // every secret byte that a test was given
)

type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lockedBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lockedBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// secretsSeen collects secrets, and everything in which none of them may stand.
type secretsSeen struct {
	mu      sync.Mutex
	secrets []string
	words   []string
}

func (s *secretsSeen) secret(v string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if v != "" {
		s.secrets = append(s.secrets, v)
	}
}

func (s *secretsSeen) said(words string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.words = append(s.words, words)
}

func (s *secretsSeen) leaks(log string) (found []string) {
	for _, secret := range s.secrets {
		for _, words := range append(s.words, log) {
			if strings.Contains(words, secret) {
				found = append(found, words)
			}
		}
	}
	return found
}

const scopesHCL = `
scope "billing-db" {
  process { unit = "billing.service" }
  vault {
    path = "database/creds/billing-ro"
    ttl  = "8h"
  }
}
scope "billing-static" {
  process { unit = "billing.service" }
  vault {
    path = "database/static-creds/billing-batch"
    ttl  = "1h"
  }
}
scope "billing-kv" {
  process { unit = "billing.service" }
  vault {
    path = "kv/data/billing"
    ttl  = "1h"
  }
}
scope "billing-pki" {
  process { unit = "billing.service" }
  vault {
    path       = "pki/issue/billing"
    method     = "write"
    parameters = { common_name = "billing.example.com" }
    ttl        = "1h"
  }
}
scope "billing-ssh" {
  process { unit = "billing.service" }
  vault {
    path       = "ssh/issue/billing"
    method     = "write"
    parameters = { key_type = "ed25519", valid_principals = "billing" }
    ttl        = "1h"
  }
}
`

func TestMain(m *testing.M) {
	flag.Parse()
	if flag.Lookup("test.fuzz").Value.String() != "" { // its workers need no lab
		os.Exit(m.Run())
	}
	code, err := withLab(m)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		code = 1
	}
	if found := issued.leaks(logged.String()); len(found) > 0 {
		fmt.Fprintf(os.Stderr, "secrets stand in %d logs or errors, first:\n%s\n", len(found), found[0])
		code = 1
	}
	os.Exit(code)
}

func withLab(m *testing.M) (code int, err error) {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	dir, err := os.MkdirTemp("", "countersign-vault-")
	if err != nil {
		return 1, err
	}
	defer os.RemoveAll(dir)
	if testVault, err = lab.StartVault(ctx, filepath.Join(dir, "vault")); err != nil {
		return 1, err
	}
	defer testVault.Stop()
	if testPG, err = lab.StartPostgres(ctx, filepath.Join(dir, "postgres"), "max_connections=30"); err != nil {
		return 1, err
	}
	defer testPG.Close()
	if root, err = testVault.Client(); err != nil {
		return 1, err
	}
	if err := prepare(ctx); err != nil {
		return 1, err
	}
	return m.Run(), nil
}

// prepare makes the engines behind the scopes.
func prepare(ctx context.Context) error {
	if err := lab.ConfigureDatabase(ctx, testVault, testPG, lab.DatabaseRole{
		Name: "billing-ro", Database: "billing", DefaultTTL: 8 * time.Hour, MaxTTL: 24 * time.Hour,
	}); err != nil {
		return err
	}
	if err := testPG.Exec(ctx, "billing", `CREATE ROLE batch LOGIN PASSWORD 'before'`); err != nil {
		return err
	}
	for _, w := range []struct {
		path string
		data map[string]any
	}{
		{"database/static-roles/billing-batch", map[string]any{"db_name": "billing", "username": "batch", "rotation_period": "24h"}},
		{"sys/mounts/kv", map[string]any{"type": "kv", "options": map[string]any{"version": "2"}}},
		{"sys/mounts/pki", map[string]any{"type": "pki", "config": map[string]any{"max_lease_ttl": "8760h"}}},
		{"pki/root/generate/internal", map[string]any{"common_name": "lab", "ttl": "8760h"}},
		{"pki/roles/billing", map[string]any{"allowed_domains": "example.com", "allow_subdomains": true, "generate_lease": true, "ttl": "1h", "max_ttl": "1h", "key_type": "ec", "key_bits": 256}},
		{"sys/mounts/ssh", map[string]any{"type": "ssh"}},
		{"ssh/config/ca", map[string]any{"generate_signing_key": true}},
		{"ssh/roles/billing", map[string]any{"key_type": "ca", "allow_user_certificates": true, "allowed_users": "billing", "ttl": "30m", "max_ttl": "30m"}},
		{"sys/auth/approle", map[string]any{"type": "approle"}},
		{"sys/auth/cert", map[string]any{"type": "cert"}},
	} {
		if _, err := root.Logical().WriteWithContext(ctx, w.path, w.data); err != nil {
			return err
		}
	}
	var err error
	for range 100 { // a new kv version 2 mount says "upgrading" for a moment
		if _, err = root.Logical().WriteWithContext(ctx, "kv/data/billing", map[string]any{"data": map[string]any{
			"password": "kv-secret-4711", "port": 5432, "tls": true, "hosts": []string{"a", "b"}, "empty": "",
		}}); err == nil {
			break
		}
		time.Sleep(20 * time.Millisecond)
	}
	if err != nil {
		return err
	}
	_, err = Setup(ctx, root, Requirements(mustParse(scopesHCL)))
	return err
}

func mustParse(hcl string) *policy.Set {
	set, err := policy.Parse([]policy.File{{Name: "test.hcl", Content: []byte(hcl)}}, policy.Options{Kinds: []policy.Kind{Kind.Kind}})
	if err != nil {
		panic(err)
	}
	return set
}

func scope(name string) *policy.Scope { return mustParse(scopesHCL).Scope(name) }

func within(t *testing.T, d time.Duration) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), d)
	t.Cleanup(cancel)
	return ctx
}

// brokerToken is a token with the broker's policy, as `vault token create` gives.
func brokerToken(t *testing.T, settings map[string]any) string {
	t.Helper()
	body := map[string]any{"policies": []string{BrokerPolicy}, "no_default_policy": true, "no_parent": true, "ttl": "1h"}
	for k, v := range settings {
		body[k] = v
	}
	s := put(t, "auth/token/create", body)
	issued.secret(s.Auth.ClientToken)
	return s.Auth.ClientToken
}

func tokenConfig(t *testing.T, token string) config.Vault {
	t.Helper()
	file := filepath.Join(t.TempDir(), "token")
	if err := os.WriteFile(file, []byte(token+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	return config.Vault{Address: testVault.Addr, CAFile: testVault.CACert, TokenFile: file}
}

func newIssuer(t *testing.T, cfg config.Vault) *Issuer {
	t.Helper()
	i, err := New(within(t, time.Minute), cfg, slog.New(slog.NewTextHandler(&logged, &slog.HandlerOptions{Level: slog.LevelDebug})), time.Now)
	if err != nil {
		t.Fatal(err)
	}
	return i
}

func order(id string) issue.Order {
	return issue.Order{Lease: id, Host: "host-1", Request: "req-" + id, Now: time.Now()}
}

// values are a credential's fields; they are remembered as secrets.
func values(c issue.Credential) map[string]string {
	out := map[string]string{}
	for _, f := range c.Fields {
		out[f.Name] = string(f.Value.Reveal())
		if f.Name == "password" || f.Name == "private_key" {
			issued.secret(out[f.Name])
		}
	}
	return out
}

func TestTheScanForSecretsFindsOne(t *testing.T) {
	var s secretsSeen
	s.secret("hunter2-long-enough")
	s.said("an honest error")
	if found := s.leaks("an honest log"); found != nil {
		t.Errorf("found %q in honest words", found)
	}
	s.said("password hunter2-long-enough is wrong")
	if found := s.leaks("level=INFO hunter2-long-enough"); len(found) != 2 {
		t.Errorf("found %q of two plants", found)
	}
}

// mustIssue issues what must succeed.
func mustIssue(t *testing.T, i *Issuer, name, id string) issue.Credential {
	t.Helper()
	c, err := i.issue(within(t, 30*time.Second), scope(name), order(id))
	if err != nil {
		t.Fatal(err)
	}
	values(c)
	return c
}

// fails wants an error with all of the words, and remembers it for the leak scan.
func fails(t *testing.T, err error, words ...string) {
	t.Helper()
	if err == nil {
		t.Fatalf("no error; want one with %q", words)
	}
	issued.said(err.Error())
	for _, w := range words {
		if !strings.Contains(err.Error(), w) {
			t.Errorf("error %q lacks %q", err, w)
		}
	}
}

func put(t *testing.T, path string, data map[string]any) *api.Secret {
	t.Helper()
	s, err := root.Logical().WriteWithContext(within(t, time.Minute), path, data)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// login says whether PostgreSQL lets the user in.
func login(t *testing.T, user, password string) error {
	t.Helper()
	return connect(within(t, 10*time.Second), testPG.DSN(user, password, "billing"))
}

func roleExists(t *testing.T, user string) bool {
	t.Helper()
	there, err := testPG.Query(within(t, 10*time.Second), "postgres", "SELECT rolname FROM pg_roles WHERE rolname = $1", user)
	if err != nil {
		t.Fatal(err)
	}
	return len(there) > 0
}

// known is what the issuer knows its credential by.
func known(c issue.Credential) ref {
	r, err := refOf(c.Handle)
	if err != nil {
		panic(err)
	}
	return r
}
