package lab

import (
	"bufio"
	"context"
	"crypto/tls"
	"errors"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/vault/api"
	"github.com/jackc/pgx/v5"
)

func startVault(t *testing.T) (*Vault, *api.Client) {
	t.Helper()
	started := time.Now()
	v, err := StartVault(within(t, time.Minute), t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("vault up after %v", time.Since(started).Round(time.Millisecond))
	t.Cleanup(func() {
		if err := v.Stop(); err != nil {
			t.Error(err)
		}
	})
	client, err := v.Client()
	if err != nil {
		t.Fatal(err)
	}
	return v, client
}

func startPostgres(t *testing.T, settings ...string) *Postgres {
	t.Helper()
	started := time.Now()
	pg, err := StartPostgres(within(t, time.Minute), t.TempDir(), settings...)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("postgres up after %v", time.Since(started).Round(time.Millisecond))
	t.Cleanup(func() {
		if err := pg.Close(); err != nil {
			t.Error(err)
		}
	})
	return pg
}

// put writes to Vault what must succeed.
func put(t *testing.T, c *api.Client, path string, data map[string]any) *api.Secret {
	t.Helper()
	secret, err := c.Logical().WriteWithContext(within(t, time.Minute), path, data)
	if err != nil {
		t.Fatal(err)
	}
	return secret
}

func get(t *testing.T, c *api.Client, path string) *api.Secret {
	t.Helper()
	secret, err := c.Logical().ReadWithContext(within(t, time.Minute), path)
	if err != nil {
		t.Fatal(err)
	}
	if secret == nil {
		t.Fatalf("nothing at %s", path)
	}
	return secret
}

func status(err error) int {
	var response *api.ResponseError
	if errors.As(err, &response) {
		return response.StatusCode
	}
	return 0
}

func TestVaultSealStopStart(t *testing.T) {
	v, client := startVault(t)
	ctx := within(t, time.Minute)
	put(t, client, "sys/mounts/kv", map[string]any{"type": "kv", "options": map[string]any{"version": "2"}})
	kv := client.KVv2("kv")
	var err error
	for range 100 { // a new kv version 2 mount says "upgrading" for a moment
		if _, err = kv.Put(ctx, "billing", map[string]any{"password": "first"}); err == nil {
			break
		}
		time.Sleep(20 * time.Millisecond)
	}
	if err != nil {
		t.Fatal(err)
	}
	read := func() error {
		secret, err := kv.Get(ctx, "billing")
		if err == nil && secret.Data["password"] != "first" {
			t.Errorf("read back %v", secret.Data)
		}
		return err
	}
	if err := read(); err != nil {
		t.Fatal(err)
	}

	if err := v.Seal(ctx); err != nil {
		t.Fatal(err)
	}
	if err := read(); status(err) != http.StatusServiceUnavailable {
		t.Errorf("a sealed Vault answers %v, want 503", err)
	}
	if err := v.Unseal(ctx); err != nil {
		t.Fatal(err)
	}
	if err := read(); err != nil {
		t.Error(err)
	}

	if err := errors.Join(v.Stop(), v.Stop()); err != nil {
		t.Fatal(err)
	}
	if err := read(); err == nil || status(err) != 0 {
		t.Errorf("a stopped Vault answers %v", err)
	}
	if err := v.Start(ctx); err != nil {
		t.Fatal(err)
	}
	if err := read(); err != nil {
		t.Error(err)
	}
}

func TestVaultAuditAndQuota(t *testing.T) {
	v, client := startVault(t)
	hash := put(t, client, "sys/audit-hash/file", map[string]any{"input": client.Token()}).Data["hash"].(string)
	client.AddHeader("X-Correlation-Id", "decision-42")
	get(t, client, "auth/token/lookup-self")
	log, err := os.ReadFile(v.AuditLog)
	if err != nil {
		t.Fatal(err)
	}
	if strings.Contains(string(log), client.Token()) {
		t.Error("the audit log holds the root token")
	}
	for _, want := range []string{hash, "decision-42"} {
		if !strings.Contains(string(log), want) {
			t.Errorf("the audit log has no %s", want)
		}
	}

	put(t, client, "sys/quotas/rate-limit/all", map[string]any{"rate": 2, "path": "auth/token"})
	ctx := within(t, time.Minute)
	for range 20 {
		if _, err = client.Logical().ReadWithContext(ctx, "auth/token/lookup-self"); err != nil {
			break
		}
	}
	if status(err) != http.StatusTooManyRequests {
		t.Errorf("20 requests under a quota of 2 a second: %v, want 429", err)
	}
}

func TestVaultSocketAudit(t *testing.T) {
	_, client := startVault(t)
	listener, err := net.Listen("unix", filepath.Join(t.TempDir(), "audit.sock"))
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	lines := make(chan string, 1)
	go func() {
		conn, err := listener.Accept()
		if err != nil {
			lines <- err.Error()
			return
		}
		defer conn.Close()
		line, _ := bufio.NewReader(conn).ReadString('\n')
		lines <- line
	}()
	put(t, client, "sys/audit/socket", map[string]any{"type": "socket",
		"options": map[string]string{"address": listener.Addr().String(), "socket_type": "unix"}})
	if line := <-lines; !strings.HasPrefix(line, "{") {
		t.Errorf("the audit socket got %q", line)
	}
}

// A token role as the broker uses one: orphan, with a lease that can be looked up
// and revoked by its id.
func TestVaultTokenRole(t *testing.T) {
	_, client := startVault(t)
	put(t, client, "auth/token/roles/billing", map[string]any{"orphan": true, "renewable": true, "token_explicit_max_ttl": "1h", "allowed_policies": "default"})
	token := put(t, client, "auth/token/create/billing", map[string]any{"ttl": "1m", "policies": []string{"default"}}).Auth
	if !token.Orphan {
		t.Error("the role's token is no orphan")
	}
	put(t, client, "auth/token/renew-accessor", map[string]any{"accessor": token.Accessor, "increment": "30m"})
	seen := put(t, client, "auth/token/lookup-accessor", map[string]any{"accessor": token.Accessor})
	if ttl, err := seen.TokenTTL(); err != nil || ttl < 25*time.Minute {
		t.Errorf("TTL %v (%v) after a renewal to 30 minutes", ttl, err)
	}
	put(t, client, "auth/token/revoke-accessor", map[string]any{"accessor": token.Accessor})
	_, err := client.Auth().Token().LookupAccessorWithContext(within(t, time.Minute), token.Accessor)
	if err == nil || !strings.Contains(err.Error(), "invalid accessor") {
		t.Errorf("a revoked token's accessor: %v", err)
	}
}

func TestVaultEngines(t *testing.T) {
	v, client := startVault(t)
	for _, engine := range []string{"pki", "ssh", "transit"} {
		put(t, client, "sys/mounts/"+engine, map[string]any{"type": engine})
	}
	for _, method := range []string{"approle", "cert", "jwt"} {
		put(t, client, "sys/auth/"+method, map[string]any{"type": method})
	}
	put(t, client, "pki/root/generate/internal", map[string]any{"common_name": "lab"})
	put(t, client, "ssh/config/ca", map[string]any{"generate_signing_key": true})
	put(t, client, "transit/keys/k", nil)

	put(t, client, "auth/approle/role/broker", map[string]any{"token_policies": "default"})
	id := get(t, client, "auth/approle/role/broker/role-id").Data["role_id"]
	secret := put(t, client, "auth/approle/role/broker/secret-id", nil).Data["secret_id"]
	if login := put(t, client, "auth/approle/login", map[string]any{"role_id": id, "secret_id": secret}); login.Auth.ClientToken == "" {
		t.Error("AppRole login gave no token")
	}

	put(t, client, "pki/roles/client", map[string]any{"allow_any_name": true, "key_type": "ec", "key_bits": 256})
	pair := put(t, client, "pki/issue/client", map[string]any{"common_name": "broker", "ttl": "1h"}).Data
	put(t, client, "auth/cert/certs/broker", map[string]any{"certificate": pair["issuing_ca"], "token_policies": "default"})
	certificate, err := tls.X509KeyPair([]byte(pair["certificate"].(string)), []byte(pair["private_key"].(string)))
	if err != nil {
		t.Fatal(err)
	}
	client, err = v.Client() // with connections of its own
	if err != nil {
		t.Fatal(err)
	}
	client.CloneConfig().HttpClient.Transport.(*http.Transport).TLSClientConfig.Certificates = []tls.Certificate{certificate}
	if login := put(t, client, "auth/cert/login", nil); login.Auth.ClientToken == "" {
		t.Error("certificate login gave no token")
	}
}

func TestDatabaseCredentials(t *testing.T) {
	v, client := startVault(t)
	pg := startPostgres(t, "max_connections=20")
	ctx := within(t, time.Minute)
	role := DatabaseRole{Name: "billing-ro", Database: "billing", DefaultTTL: time.Hour, MaxTTL: 8 * time.Hour}
	for range 2 { // configuring twice does no harm
		if err := ConfigureDatabase(ctx, v, pg, role); err != nil {
			t.Fatal(err)
		}
	}

	creds := get(t, client, "database/creds/billing-ro")
	user, password := creds.Data["username"].(string), creds.Data["password"].(string)
	conn, err := pgx.Connect(ctx, pg.DSN(user, password, "billing"))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(ctx)
	var session, current string
	var sum int
	err = conn.QueryRow(ctx, "SELECT session_user, current_user, sum(amount) FROM invoices").Scan(&session, &current, &sum)
	if err != nil || session != user || current != "billing_readers" || sum != 242 {
		t.Errorf("logged in as %q acting as %q, sum %d: %v", session, current, sum, err)
	}
	if _, err := conn.Exec(ctx, "DELETE FROM invoices"); err == nil {
		t.Error("a reader deleted the invoices")
	}
	if _, err := pgx.Connect(ctx, pg.DSN(user, password+"x", "billing")); err == nil {
		t.Error("a wrong password got in")
	}
	psql := exec.CommandContext(ctx, "psql", "-At", "-c", "SELECT count(*) FROM invoices", pg.DSN(user, "", "billing"))
	psql.Env = append(os.Environ(), "PGPASSWORD="+password)
	if out, err := psql.Output(); err != nil || strings.TrimSpace(string(out)) != "3" {
		t.Errorf("psql: %q, %v", out, err)
	}

	if got := roles(t, pg, user); got != 1 {
		t.Fatalf("%d roles %s before the revocation", got, user)
	}
	put(t, client, "sys/leases/lookup", map[string]any{"lease_id": creds.LeaseID})
	put(t, client, "sys/leases/revoke", map[string]any{"lease_id": creds.LeaseID, "sync": true})
	if got := roles(t, pg, user); got != 0 {
		t.Errorf("%d roles %s after the revocation", got, user)
	}
	if err := conn.Ping(ctx); err == nil {
		t.Error("the revoked user's session lives on")
	}
	if _, err := client.Logical().WriteWithContext(ctx, "sys/leases/lookup", map[string]any{"lease_id": creds.LeaseID}); status(err) != http.StatusBadRequest {
		t.Errorf("the lease after its revocation: %v, want 400", err)
	}

	log, err := os.ReadFile(pg.Log)
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(string(log), "user="+user+" db=billing") || !strings.Contains(string(log), "connection authorized: user="+user) {
		t.Errorf("the log has no login of %s", user)
	}
	if strings.Contains(string(log), password) || strings.Contains(string(log), pg.Password) {
		t.Error("the log holds a password")
	}
	if got, err := pg.Query(ctx, "postgres", "SHOW max_connections"); err != nil || got[0] != "20" {
		t.Errorf("max_connections is %v (%v)", got, err)
	}
}

// A lease whose user somebody has dropped by hand can still be revoked.
func TestRevocationRepeats(t *testing.T) {
	v, client := startVault(t)
	pg := startPostgres(t)
	ctx := within(t, time.Minute)
	if err := ConfigureDatabase(ctx, v, pg, DatabaseRole{Name: "ro", Database: "billing", DefaultTTL: time.Hour, MaxTTL: time.Hour}); err != nil {
		t.Fatal(err)
	}
	creds := get(t, client, "database/creds/ro")
	if err := pg.Exec(ctx, "billing", `DROP ROLE "`+creds.Data["username"].(string)+`"`); err != nil {
		t.Fatal(err)
	}
	put(t, client, "sys/leases/revoke", map[string]any{"lease_id": creds.LeaseID, "sync": true})
}

func TestPostgresStopStart(t *testing.T) {
	pg := startPostgres(t)
	ctx := within(t, time.Minute)
	if err := pg.Exec(ctx, "postgres", "CREATE TABLE kept AS SELECT 7 AS n"); err != nil {
		t.Fatal(err)
	}
	if err := pg.Stop(); err != nil {
		t.Fatal(err)
	}
	if _, err := pg.Query(ctx, "postgres", "SELECT 1"); err == nil {
		t.Error("a stopped PostgreSQL answers")
	}
	if err := pg.Start(ctx); err != nil {
		t.Fatal(err)
	}
	if got, err := pg.Query(ctx, "postgres", "SELECT n FROM kept"); err != nil || len(got) != 1 || got[0] != "7" {
		t.Errorf("after a restart: %v, %v", got, err)
	}
}

func roles(t *testing.T, pg *Postgres, name string) int {
	t.Helper()
	got, err := pg.Query(context.Background(), "postgres", "SELECT rolname FROM pg_roles WHERE rolname = $1", name)
	if err != nil {
		t.Fatal(err)
	}
	return len(got)
}
