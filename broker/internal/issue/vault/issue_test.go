package vault

import (
	"context"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
)

func connect(ctx context.Context, dsn string) error {
	conn, err := pgx.Connect(ctx, dsn)
	if err != nil {
		return err
	}
	defer conn.Close(ctx)
	return conn.Ping(ctx)
}

func TestDatabaseUser(t *testing.T) {
	i := newIssuer(t, tokenConfig(t, brokerToken(t, nil)))
	ctx := within(t, time.Minute)
	c := mustIssue(t, i, "billing-db", "db1")
	v := values(c)
	if err := login(t, v["username"], v["password"]); err != nil {
		t.Fatalf("the issued user can't log in: %v", err)
	}
	if c.Static || c.VaultLease == "" || c.Accessor == "" || c.Names["db_username"] != v["username"] || c.Names["vault_lease"] != c.VaultLease {
		t.Errorf("credential %+v", c.Handle)
	}
	if left := time.Until(c.Expires); left > i.provisional || left < i.provisional-time.Minute {
		t.Errorf("provisional credential lives for %v", left)
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
	if roleExists(t, v["username"]) {
		t.Errorf("role %s is still in pg_roles", v["username"])
	}
	if err := i.Revoke(ctx, c.Handle); err != nil {
		t.Errorf("revoked twice: %v", err)
	}
}
