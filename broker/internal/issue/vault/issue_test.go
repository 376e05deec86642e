package vault

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/countersign/countersign/broker/internal/issue"
)

func connect(ctx context.Context, dsn string) error {
	conn, err := pgx.Connect(ctx, dsn)
	if err != nil {
		return err
	}
	defer conn.Close(ctx)
	return conn.Ping(ctx)
}

// eventually waits for what Vault does in its own time.
func eventually(t *testing.T, what string, done func() bool) {
	t.Helper()
	ctx := within(t, 30*time.Second)
	for !done() {
		if !sleep(ctx, 50*time.Millisecond) {
			t.Fatalf("it never came about: %s", what)
		}
	}
}

// tokenLives asks Vault with the root token.
func tokenLives(t *testing.T, accessor string) bool {
	t.Helper()
	_, err := root.Auth().Token().LookupAccessorWithContext(within(t, 10*time.Second), accessor)
	if err != nil && !strings.Contains(err.Error(), "invalid accessor") {
		t.Fatal(err)
	}
	return err == nil
}

func TestDatabaseUser(t *testing.T) {
	i := newIssuer(t, tokenConfig(t, brokerToken(t, nil)))
	ctx := within(t, time.Minute)
	c := mustIssue(t, i, "billing-db", "db1")
	v := values(c)
	if err := login(t, v["username"], v["password"]); err != nil {
		t.Fatalf("the issued user can't log in: %v", err)
	}
	if c.Static || known(c).Lease == "" || known(c).Accessor == "" || c.Names["db_username"] != v["username"] ||
		c.Names["vault_lease"] != known(c).Lease || c.Names["vault_accessor"] != known(c).Accessor {
		t.Errorf("credential %+v, names %v", c.Handle, c.Names)
	}
	if left := time.Until(c.Expires); left > i.provisional || left < i.provisional-time.Minute {
		t.Errorf("provisional credential lives for %v", left)
	}
	info, err := root.Auth().Token().LookupAccessorWithContext(ctx, known(c).Accessor)
	if err != nil {
		t.Fatal(err)
	}
	if got := fmt.Sprintf("%v %v %v %v", info.Data["policies"], info.Data["orphan"], info.Data["type"], info.Data["meta"]); got !=
		"[countersign-billing-db] true service map[grant:db1 host:host-1 scope:billing-db]" {
		t.Errorf("the lease's token: %s", got)
	}
	until, err := i.Extend(ctx, c.Handle, 8*time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	if left := time.Until(until); left > 8*time.Hour || left < 8*time.Hour-time.Minute {
		t.Errorf("extended credential lives for %v", left)
	}
	if err := i.Revoke(ctx, c.Handle); err != nil {
		t.Fatal(err)
	}
	if roleExists(t, v["username"]) || tokenLives(t, known(c).Accessor) {
		t.Errorf("revoked, but role: %v, token: %v", roleExists(t, v["username"]), tokenLives(t, known(c).Accessor))
	}
	if err := i.Revoke(ctx, c.Handle); err != nil {
		t.Errorf("revoked twice: %v", err)
	}
	if _, err := i.Extend(ctx, c.Handle, 8*time.Hour); !errors.Is(err, issue.ErrGone) {
		t.Errorf("extending a revoked credential: %v", err)
	}
}

// Vault gives no more than the database role's max_ttl, whatever is asked for.
func TestExtendedByLessThanAsked(t *testing.T) {
	databaseRole(t, "1h", "2h")
	t.Cleanup(func() { databaseRole(t, "8h", "24h") })
	i := newIssuer(t, tokenConfig(t, brokerToken(t, nil)))
	c := mustIssue(t, i, "billing-db", "less")
	until, err := i.Extend(within(t, time.Minute), c.Handle, 8*time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	if left := time.Until(until); left > 2*time.Hour || left < time.Hour {
		t.Errorf("extended credential lives for %v, not the 2h that Vault gave", left)
	}
	if err := i.Revoke(within(t, time.Minute), c.Handle); err != nil {
		t.Error(err)
	}
}

func TestNeverExtendedDiesByItself(t *testing.T) {
	i := newIssuer(t, tokenConfig(t, brokerToken(t, nil)))
	i.provisional = 2 * time.Second
	c := mustIssue(t, i, "billing-db", "dies")
	user := values(c)["username"]
	if !roleExists(t, user) {
		t.Fatal("the role isn't there at first")
	}
	eventually(t, "the role is gone", func() bool { return !roleExists(t, user) })
	if _, err := i.Extend(within(t, time.Minute), c.Handle, 8*time.Hour); !errors.Is(err, issue.ErrGone) {
		t.Errorf("extending it: %v", err)
	}
}

func TestKV(t *testing.T) {
	i := newIssuer(t, tokenConfig(t, brokerToken(t, nil)))
	ctx := within(t, time.Minute)
	c := mustIssue(t, i, "billing-kv", "kv1")
	var names []string
	for _, f := range c.Fields {
		names = append(names, f.Name)
	}
	v := values(c)
	if !slices.Equal(names, []string{"empty", "hosts", "password", "port", "tls"}) ||
		v["hosts"] != `["a","b"]` || v["password"] != "kv-secret-4711" || v["port"] != "5432" || v["tls"] != "true" || v["empty"] != "" {
		t.Errorf("fields %v: %v", names, v)
	}
	if !c.Static || known(c).Lease != "" || time.Until(c.Expires) < 59*time.Minute {
		t.Errorf("credential %+v, static %v", c.Handle, c.Static)
	}
	if c.Names["secret_version"] != "1" {
		t.Errorf("names %v, want the secret's version", c.Names)
	}
	if tokenLives(t, known(c).Accessor) {
		t.Error("the token that read it lives on")
	}
	if until, err := i.Extend(ctx, c.Handle, time.Hour); err != nil || !until.Equal(c.Expires) {
		t.Errorf("extended until %v, %v", until, err)
	}
	over := c.Handle
	over.Expires = time.Now().Add(-time.Second)
	if _, err := i.Extend(ctx, over, time.Hour); !errors.Is(err, issue.ErrGone) {
		t.Errorf("extended after its time: %v", err)
	}
	if err := i.Revoke(ctx, c.Handle); err != nil {
		t.Error(err)
	}
}

func TestStaticRole(t *testing.T) {
	i := newIssuer(t, tokenConfig(t, brokerToken(t, nil)))
	c := mustIssue(t, i, "billing-static", "static1")
	v := values(c)
	if err := login(t, v["username"], v["password"]); err != nil {
		t.Fatal(err)
	}
	if !c.Static || c.Names["db_username"] != "batch" {
		t.Errorf("static %v, names %v", c.Static, c.Names)
	}
	before := c.Names["secret_version"]
	if at, err := time.Parse(time.RFC3339Nano, before); err != nil || time.Since(at) > time.Hour {
		t.Errorf("version %q: %v", before, err)
	}
	if _, err := root.Logical().WriteWithContext(within(t, time.Minute), "database/rotate-role/billing-batch", nil); err != nil {
		t.Fatal(err)
	}
	if after := mustIssue(t, i, "billing-static", "static2").Names["secret_version"]; after == "" || after == before {
		t.Errorf("version %q after a rotation, and %q before it", after, before)
	}
}

func TestPKI(t *testing.T) {
	i := newIssuer(t, tokenConfig(t, brokerToken(t, nil)))
	ctx := within(t, time.Minute)
	c := mustIssue(t, i, "billing-pki", "pki1")
	v := values(c)
	serial := c.Names["certificate_serial"]
	if c.Static || known(c).Lease == "" || serial == "" || serial != v["serial_number"] || !strings.Contains(v["private_key"], "PRIVATE KEY") {
		t.Fatalf("credential %+v, names %v", c.Handle, c.Names)
	}
	until, err := i.Extend(ctx, c.Handle, time.Hour) // such leases aren't renewed
	if err != nil {
		t.Fatal(err)
	}
	if left := time.Until(until); left > time.Hour || left < 59*time.Minute {
		t.Errorf("lives for %v", left)
	}
	if err := i.Revoke(ctx, c.Handle); err != nil {
		t.Fatal(err)
	}
	s, err := root.Logical().ReadWithContext(ctx, "pki/cert/"+serial)
	if err != nil {
		t.Fatal(err)
	}
	if at, _ := s.Data["revocation_time"].(json.Number).Int64(); at == 0 {
		t.Error("Vault's CA doesn't show the certificate as revoked")
	}
}

func TestSSH(t *testing.T) {
	i := newIssuer(t, tokenConfig(t, brokerToken(t, nil)))
	c := mustIssue(t, i, "billing-ssh", "ssh1")
	v := values(c)
	serial, err := strconv.ParseUint(v["serial_number"], 16, 64)
	if err != nil {
		t.Fatal(err)
	}
	if c.Static || known(c).Lease != "" || c.Names["ssh_serial"] != fmt.Sprint(serial) || !strings.HasPrefix(c.Names["ssh_key_id"], "vault-") ||
		!strings.Contains(v["private_key"], "PRIVATE KEY") {
		t.Errorf("credential %+v, names %v", c.Handle, c.Names)
	}
	if left := time.Until(c.Expires); left > 30*time.Minute || left < 29*time.Minute {
		t.Errorf("lives for %v, its certificate for 30m", left)
	}
}

// One lease's end touches no other, and the end of the broker's token none.
func TestLeasesAreIndependent(t *testing.T) {
	token := brokerToken(t, nil)
	i := newIssuer(t, tokenConfig(t, token))
	var all []issue.Credential
	var mu sync.Mutex
	var group sync.WaitGroup
	for n := range 8 {
		group.Go(func() {
			c, err := i.issue(within(t, 30*time.Second), scope("billing-db"), order(fmt.Sprint("many", n)))
			if err != nil {
				t.Error(err)
				return
			}
			mu.Lock()
			defer mu.Unlock()
			all = append(all, c)
		})
	}
	group.Wait()
	if t.Failed() {
		return
	}
	if err := i.Revoke(within(t, time.Minute), all[0].Handle); err != nil {
		t.Fatal(err)
	}
	put(t, "auth/token/revoke", map[string]any{"token": token})
	for _, c := range all[1:] {
		v := values(c)
		if err := login(t, v["username"], v["password"]); err != nil {
			t.Errorf("%s: %v", v["username"], err)
		}
	}
	again := newIssuer(t, tokenConfig(t, brokerToken(t, nil)))
	for _, c := range all {
		if err := again.Revoke(within(t, time.Minute), c.Handle); err != nil {
			t.Error(err)
		}
	}
}

func TestLeaseNeverKnownToBeIssued(t *testing.T) {
	i := newIssuer(t, tokenConfig(t, brokerToken(t, nil)))
	ctx := within(t, time.Minute)
	h := issue.Handle{Lease: "unknown", Scope: "billing-db", Issued: time.Now()}
	fails(t, i.Revoke(ctx, h), "over by itself at")
	h.Issued = h.Issued.Add(-lateStart - i.provisional)
	if err := i.Revoke(ctx, h); err != nil {
		t.Errorf("after its time: %v", err)
	}
	h.Issued = time.Time{}
	fails(t, i.Revoke(ctx, h), "can't be confirmed")
}

// Tokens of a role that was changed behind our back would not die by themselves.
func TestTokenRoleThatBreaksThePromise(t *testing.T) {
	for setting, v := range map[string]any{"token_period": 3600, "orphan": false, "renewable": false} {
		t.Run(setting, func(t *testing.T) {
			i := newIssuer(t, tokenConfig(t, brokerToken(t, nil)))
			mustIssue(t, i, "billing-db", "honest")
			t.Cleanup(func() { setUp(t) })
			put(t, "auth/token/roles/countersign-billing-db", map[string]any{setting: v})
			_, err := i.issue(within(t, time.Minute), scope("billing-db"), order("dishonest"))
			fails(t, err, "token role countersign-billing-db")
			if !errors.Is(err, issue.ErrConfig) {
				t.Errorf("%v is no configuration error", err)
			}
		})
	}
}
