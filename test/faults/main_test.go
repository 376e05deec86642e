// Package faults kills, fills and steps the real programs, in their faults
// build, and looks afterwards whether the invariants hold: by fsck, by Vault's
// and by PostgreSQL's own state. A round whose failpoint was not hit fails.
package faults_test

import (
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/countersign/countersign/test/lab"
)

var rounds = flag.Int("rounds", 1, "how often each fault is tried")

var (
	tpmCA *lab.TPMCA
	vault *lab.Vault
	pg    *lab.Postgres
	work  string
)

func TestMain(m *testing.M) {
	flag.Parse()
	code, err := withLab(m)
	if err != nil {
		fmt.Fprintln(os.Stderr, "faults:", err)
		code = 1
	}
	os.Exit(code)
}

func withLab(m *testing.M) (code int, err error) {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	if work, err = os.MkdirTemp("", "countersign-faults-"); err != nil {
		return 1, err
	}
	defer func() { _ = os.RemoveAll(work) }()
	if err := os.Chmod(work, 0o711); err != nil {
		return 1, err
	}
	if tpmCA, err = lab.NewTPMCA(filepath.Join(work, "tpmca")); err != nil {
		return 1, err
	}
	if vault, err = lab.StartVault(ctx, filepath.Join(work, "vault")); err != nil {
		return 1, err
	}
	defer func() { _ = vault.Stop() }()
	if pg, err = lab.StartPostgres(ctx, filepath.Join(work, "postgres")); err != nil {
		return 1, err
	}
	defer func() { _ = pg.Close() }()
	if err := lab.ConfigureDatabase(ctx, vault, pg, lab.DatabaseRole{Name: "billing-ro", Database: "billing", DefaultTTL: time.Hour, MaxTTL: 24 * time.Hour}); err != nil {
		return 1, err
	}
	return m.Run(), nil
}

const scopes = `
scope "soft" {
  reprove = "5s"
  grace   = "1h"
  host    { labels = { role = "billing" } }
  process { exe = "/opt/billing/bin/billingd" }
  vault {
    path = "database/creds/billing-ro"
    ttl  = "30m"
  }
}

scope "sleeper" {
  reprove = "5s"
  grace   = "1h"
  host    { labels = { role = "billing" } }
  process { exe = %q }
  vault {
    path = "database/creds/billing-ro"
    ttl  = "30m"
  }
}
`

func must[T any](v T, err error) func(testing.TB) T {
	return func(t testing.TB) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

func check(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func within(t *testing.T, d time.Duration) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), d)
	t.Cleanup(cancel)
	return ctx
}

func eventually(t *testing.T, d time.Duration, what string, done func() (bool, string)) {
	t.Helper()
	deadline := time.Now().Add(d)
	for {
		ok, said := done()
		if ok {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("not within %v: %s; last: %s", d, what, said)
		}
		time.Sleep(50 * time.Millisecond)
	}
}

// A site is one broker, started without faults.
type site struct {
	dir     string
	broker  *lab.Broker
	sleeper string // an exe that the agent's scope is for
}

func newSite(t *testing.T, o lab.BrokerOptions) *site {
	t.Helper()
	ctx := within(t, time.Minute)
	s := &site{dir: must(os.MkdirTemp(work, "t"))(t)}
	check(t, os.Chmod(s.dir, 0o711))
	s.sleeper = filepath.Join(s.dir, "sleeper")
	check(t, os.WriteFile(s.sleeper, must(os.ReadFile("/bin/sleep"))(t), 0o755))
	roots := filepath.Join(s.dir, "ek-roots.pem")
	root, intermediate := tpmCA.PEM()
	check(t, os.WriteFile(roots, append(root, intermediate...), 0o644))
	dir := filepath.Join(s.dir, "broker")
	token := filepath.Join(dir, "vault-token")
	o.Faults, o.EKRoots = true, []string{roots}
	o.Vault = fmt.Sprintf("address = %q\nca_file = %q\ntoken_file = %q", vault.Addr, vault.CACert, token)
	s.broker = must(lab.NewBroker(ctx, dir, o))(t)
	text := fmt.Sprintf(scopes, s.sleeper)
	check(t, os.MkdirAll(s.broker.Scopes(), 0o700))
	check(t, os.WriteFile(filepath.Join(s.broker.Scopes(), "scopes.hcl"), []byte(text), 0o600))
	check(t, os.WriteFile(token, []byte(must(lab.SetUpVault(ctx, vault, s.broker.Scopes()))(t)), 0o600))
	check(t, s.broker.Start(ctx))
	t.Cleanup(func() {
		_ = s.broker.Stop()
		if t.Failed() {
			text, _ := os.ReadFile(s.broker.Log())
			t.Logf("broker.log:\n%s", text)
		}
	})
	check(t, s.broker.ApplyScopes(ctx, text))
	return s
}

type lease struct {
	ID    string            `json:"id"`
	State string            `json:"state"`
	Names map[string]string `json:"names"`
}

func (s *site) leases(t *testing.T, args ...string) []lease {
	t.Helper()
	var out struct {
		Leases []lease `json:"leases"`
	}
	check(t, s.broker.JSON(within(t, time.Minute), &out, append([]string{"lease", "list"}, args...)...))
	return out.Leases
}

// invariants holds the journal against itself, against Vault and against
// PostgreSQL: nothing that works is unknown, unless it dies by itself within
// minutes, and nothing that is known as live is gone.
func (s *site) invariants(t *testing.T) {
	t.Helper()
	ctx := within(t, time.Minute)
	out, err := exec.CommandContext(ctx, must(lab.Program("countersign", false))(t), "fsck", "-c", s.broker.Config(), "-o", "json").Output()
	if err != nil {
		t.Errorf("fsck: %v\n%s", err, out)
	}
	known := map[string]string{} // grant → state
	live := map[string]bool{}    // PostgreSQL users
	for _, l := range s.leases(t) {
		known[l.ID] = l.State
		if l.State == "live" || l.State == "retiring" {
			live[l.Names["db_username"]] = true
		}
	}
	roles := must(pg.Query(ctx, "postgres", "SELECT rolname FROM pg_roles WHERE rolname LIKE 'v-%'"))(t)
	for user := range live {
		if !slices.Contains(roles, user) {
			t.Errorf("the journal says that %s is live; PostgreSQL has no such role", user)
		}
	}
	client := must(vault.Client())(t)
	list := must(client.Logical().ListWithContext(ctx, "auth/token/accessors"))(t)
	for _, accessor := range list.Data["keys"].([]any) {
		found, err := client.Logical().WriteWithContext(ctx, "auth/token/lookup-accessor", map[string]any{"accessor": accessor})
		if err != nil {
			continue // ended meanwhile
		}
		meta, _ := found.Data["meta"].(map[string]any)
		grant, _ := meta["grant"].(string)
		if grant == "" || !s.mine(meta) {
			continue
		}
		if state := known[grant]; state == "live" || state == "retiring" || state == "revoking" {
			continue
		}
		ttl, _ := found.Data["ttl"].(json.Number).Int64()
		if ttl > 125 {
			t.Errorf("Vault has a token of lease %s (%q in the journal) for another %d s", grant, known[grant], ttl)
		}
	}
	s.noSecrets(t)
}

// mine says whether a token was made for this site's hosts.
func (s *site) mine(meta map[string]any) bool {
	out, err := s.broker.CLI(context.Background(), "host", "show", fmt.Sprint(meta["host"]))
	return err == nil && len(out) > 0
}

// noSecrets looks for what must never be written into logs, store and audit.
func (s *site) noSecrets(t *testing.T) {
	t.Helper()
	for _, file := range []string{s.broker.Log(), filepath.Join(s.broker.State(), "store.db"), filepath.Join(s.broker.State(), "store.db-wal")} {
		text, err := os.ReadFile(file)
		if err != nil {
			continue
		}
		for _, secret := range secretsIn(string(text)) {
			t.Errorf("%s holds %q", file, secret)
		}
	}
}

// secretsIn finds tokens and private keys.
func secretsIn(text string) (found []string) {
	for _, mark := range []string{"hvs.", "hvb.", "PRIVATE KEY-----"} {
		if i := strings.Index(text, mark); i >= 0 {
			found = append(found, text[i:min(i+12, len(text))])
		}
	}
	return found
}

func TestTheScanFindsSecrets(t *testing.T) {
	for _, planted := range []string{"x hvs.CAESIJ y", "-----BEGIN EC PRIVATE KEY-----"} {
		if len(secretsIn("log "+planted+" log")) == 0 {
			t.Errorf("%q was not found", planted)
		}
	}
}
