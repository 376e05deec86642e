package lab

import (
	"context"
	"fmt"
	"net"
	"net/url"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
)

// DatabaseRole is a role of Vault's database engine, over a database of its own.
type DatabaseRole struct {
	Name       string // of the role, as "billing-ro"
	Database   string // made if it isn't there, with a table "invoices" of three rows
	DefaultTTL time.Duration
	MaxTTL     time.Duration
}

// group is the PostgreSQL role that owns what the role's users make.
func (r DatabaseRole) group() string { return r.Database + "_readers" }

// ConfigureDatabase makes the database and its group owner in PostgreSQL, enables
// Vault's engine at database/ if it isn't, and writes the connection (named like
// the database) and the role.
//
// A user that Vault makes acts as the group from its login on, so what it creates
// outlives it: session_user is Vault's name, current_user the group. Revocation
// forbids login, ends the sessions, and drops the user, and can be repeated.
func ConfigureDatabase(ctx context.Context, v *Vault, pg *Postgres, role DatabaseRole) error {
	if err := pg.makeDatabase(ctx, role); err != nil {
		return fmt.Errorf("database %s: %w", role.Database, err)
	}
	client, err := v.Client()
	if err != nil {
		return err
	}
	_, err = client.Logical().WriteWithContext(ctx, "sys/mounts/database", map[string]any{"type": "database"})
	if err != nil && !strings.Contains(err.Error(), "path is already in use at database/") {
		return err
	}
	u, err := url.Parse(pg.DSN("", "", role.Database))
	if err != nil {
		return err
	}
	_, err = client.Logical().WriteWithContext(ctx, "database/config/"+role.Database, map[string]any{
		"plugin_name":             "postgresql-database-plugin",
		"allowed_roles":           "*",
		"connection_url":          fmt.Sprintf("postgresql://{{username}}:{{password}}@%s%s?%s", u.Host, u.Path, u.RawQuery),
		"username":                pg.User,
		"password":                pg.Password,
		"password_authentication": "scram-sha-256",
	})
	if err != nil {
		return err
	}
	_, err = client.Logical().WriteWithContext(ctx, "database/roles/"+role.Name, map[string]any{
		"db_name":     role.Database,
		"default_ttl": role.DefaultTTL.String(),
		"max_ttl":     role.MaxTTL.String(),
		"creation_statements": []string{
			`CREATE ROLE "{{name}}" LOGIN PASSWORD '{{password}}' VALID UNTIL '{{expiration}}' IN ROLE "` + role.group() + `"`,
			`ALTER ROLE "{{name}}" SET role = '` + role.group() + `'`,
		},
		"revocation_statements": []string{strings.ReplaceAll(revocation, "GROUP", role.group())},
	})
	return err
}

const revocation = `DO $$ BEGIN
  IF EXISTS (SELECT FROM pg_roles WHERE rolname = '{{name}}') THEN
    ALTER ROLE "{{name}}" NOLOGIN;
    PERFORM pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = '{{name}}';
    REASSIGN OWNED BY "{{name}}" TO "GROUP";
    DROP OWNED BY "{{name}}";
    DROP ROLE "{{name}}";
  END IF;
END $$`

func (pg *Postgres) makeDatabase(ctx context.Context, role DatabaseRole) error {
	there, err := pg.Query(ctx, "postgres", "SELECT datname FROM pg_database WHERE datname = $1", role.Database)
	if err != nil || len(there) > 0 {
		return err
	}
	database, group := pgx.Identifier{role.Database}.Sanitize(), pgx.Identifier{role.group()}.Sanitize()
	if err := pg.Exec(ctx, "postgres", "CREATE DATABASE "+database); err != nil {
		return err
	}
	return pg.Exec(ctx, role.Database, `
CREATE ROLE `+group+` NOLOGIN;
CREATE TABLE invoices (id serial PRIMARY KEY, amount integer NOT NULL);
INSERT INTO invoices (amount) VALUES (120), (80), (42);
GRANT SELECT ON invoices TO `+group+`;
`)
}

// LoginFrom logs in from an address of this machine, as 127.0.0.9.
func (pg *Postgres) LoginFrom(ctx context.Context, address, user, password, database string) error {
	conn, err := pg.ConnectBy(ctx, (&net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(address)}}).DialContext, "127.0.0.1", user, password, database, "")
	if err != nil {
		return err
	}
	return conn.Close(ctx)
}

// ConnectBy logs in over connections that dial makes, as a program of that name.
func (pg *Postgres) ConnectBy(ctx context.Context, dial pgconn.DialFunc, host, user, password, database, program string) (*pgx.Conn, error) {
	c, err := pgx.ParseConfig(pg.DSN(user, password, database))
	if err != nil {
		return nil, err
	}
	c.Host, c.DialFunc = host, dial
	if program != "" {
		c.RuntimeParams["application_name"] = program
	}
	return pgx.ConnectConfig(ctx, c)
}
