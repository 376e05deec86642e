package main

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"

	_ "modernc.org/sqlite" // to spoil a broker's store with

	"github.com/countersign/countersign/test/lab"
)

// A demo is everything that is up so far.
type demo struct {
	dir     string
	tpmCA   *lab.TPMCA
	tpm     *lab.TPM
	broker  *lab.Broker
	vault   *lab.Vault
	pg      *lab.Postgres
	machine *lab.Machine
	watch   *lab.Watch
	user    string // PostgreSQL's name of the legacy program
}

func newDemo() (*demo, error) {
	dir, err := os.MkdirTemp("", "countersign-demo-")
	return &demo{dir: dir}, err
}

func (d *demo) close() error {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	var errs []error
	if d.machine != nil {
		errs = append(errs, d.machine.Poweroff(ctx))
	}
	if d.watch != nil {
		errs = append(errs, d.watch.Stop())
	}
	if d.broker != nil {
		errs = append(errs, d.broker.Stop())
	}
	if d.vault != nil {
		errs = append(errs, d.vault.Stop())
	}
	if d.pg != nil {
		errs = append(errs, d.pg.Close())
	}
	if d.tpm != nil {
		d.tpm.Stop()
	}
	return errors.Join(append(errs, os.RemoveAll(d.dir))...)
}

func (d *demo) lookAround(w io.Writer) {
	fmt.Fprintf(w, "\nEverything stays up until Ctrl-C. To look around:\n\n"+
		"  bin/countersign --socket %[1]s/operator.sock status\n"+
		"  bin/countersign --socket %[1]s/operator.sock audit tail -f\n"+
		"  nsenter -t %[2]d -a countersign-agent status\n"+
		"  VAULT_ADDR=%[3]s VAULT_CACERT=%[4]s vault status\n\n", d.broker.State(), d.machine.PID(), d.vault.Addr, d.vault.CACert)
}

const scopes = `
scope "billing-db" {
  description = "Billing reads its own schema"
  reprove     = "5s"
  grace       = "1h"
  host { labels = { role = "billing" } }
  process {
    unit         = "billing.service"
    user         = "billing"
    exe          = "/opt/billing/bin/billingd"
    before_start = true
  }
  vault {
    path    = "database/creds/billing-ro"
    ttl     = "1m"
    overlap = "10s"
  }
}

scope "billing-tls" {
  reprove = "5s"
  host { labels = { role = "billing" } }
  process {
    unit         = "billing.service"
    before_start = true
  }
  certificate {
    dns = ["billing.example.com"]
    ttl = "24h"
  }
}
`

const credentials = `
credential "billing-db" {
  process { unit = "billing.service" }
  file "/etc/billing/db.properties" {
    template = "user={{ .username | properties }}\npassword={{ .password | properties }}\n"
    owner    = "billing"
    group    = "billing"
    mode     = "0400"
  }
  on_change { signal = "SIGHUP" }
}

credential "billing-tls" {
  key = "p256"
  process { unit = "billing.service" }
  file "/etc/billing/tls.key" {
    template = "{{ .private_key | pem }}"
    owner    = "billing"
  }
  file "/etc/billing/tls.crt" {
    template = "{{ .chain | pem }}"
    owner    = "billing"
    mode     = "0440"
  }
  file "/etc/billing/ca.crt" {
    template = "{{ .ca | pem }}"
    owner    = "billing"
    mode     = "0440"
  }
}

credential "thief" {
  scope = "billing-db"
  process { unit = "thief.service" }
  file "/etc/thief.properties" { template = "{{ .password }}" }
}
`

var steps = []step{
	{"tpm", "software TPM made, its EK certified", makeTPM, func(_ context.Context, d *demo) error {
		return os.WriteFile(filepath.Join(d.dir, "tpm"), nil, 0o600) // in the folder's place
	}},
	{"services", "Vault and PostgreSQL up", startServices, func(_ context.Context, d *demo) error {
		return os.WriteFile(filepath.Join(d.dir, "vault"), nil, 0o600)
	}},
	{"broker", "broker up with its embedded store and CA", startBroker, func(_ context.Context, d *demo) error {
		return os.WriteFile(filepath.Join(d.dir, "ek-roots.pem"), []byte("no certificate"), 0o444)
	}},
	{"watch", "the watch follows PostgreSQL's and Vault's logs", startWatch, func(_ context.Context, d *demo) error {
		return os.WriteFile(filepath.Join(d.dir, "watch"), nil, 0o600) // in the folder's place
	}},
	{"verify", "`vault verify`: Vault gives what the scopes need and nothing more", verifyVault, func(ctx context.Context, d *demo) error {
		c, err := d.vault.Client()
		if err != nil {
			return err
		}
		return c.Sys().PutPolicyWithContext(ctx, "countersign-billing-db", `path "*" { capabilities = ["read"] }`)
	}},
	{"join", "host joined by its EK certificate and a join token", joinHost, func(_ context.Context, d *demo) error { return d.broker.Stop() }},
	{"attest", "host attested, its PCRs learned as its reference", attestHost, func(ctx context.Context, d *demo) error {
		_, err := d.broker.CLI(ctx, "host", "quarantine", d.machine.HostID)
		return err
	}},
	{"program", "a legacy program, as its own user and reading only its file, is in as a user that Vault made", startProgram, func(ctx context.Context, d *demo) error {
		_, err := d.machine.Sh(ctx, "cp /bin/sleep /opt/billing/bin/billingd")
		return err
	}},
	{"tls", "openssl completes a TLS handshake with the certificate file", handshake, func(ctx context.Context, d *demo) error {
		_, err := d.machine.Sh(ctx, "cd /etc/billing && openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256 -out tls.key")
		return err
	}},
	{"rotation", "rotated while the program queries through its pool", rotation, func(ctx context.Context, d *demo) error {
		return d.pg.Exec(ctx, "postgres", `ALTER ROLE "`+d.user+`" NOLOGIN; SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = '`+d.user+`'`)
	}},
	{"refused", "another program that asks for the same is refused", refused, func(ctx context.Context, d *demo) error {
		return d.broker.ApplyScopes(ctx, strings.Replace(scopes, `unit         = "billing.service"
    user         = "billing"
    exe          = "/opt/billing/bin/billingd"`, `unit = "thief.service"`, 1))
	}},
	{"replay", "a recorded request, played again, is turned away", replay, func(ctx context.Context, d *demo) error { return d.broker.Stop() }},
	{"sealed", "Vault sealed for a while: nothing breaks", sealed, func(ctx context.Context, d *demo) error {
		return d.pg.Exec(ctx, "postgres", `ALTER ROLE "`+d.user+`" NOLOGIN; SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = '`+d.user+`'`)
	}},
	{"copied", "a copied credential, used from another address, is found and revoked; the program gets another", copied, func(_ context.Context, d *demo) error { return d.watch.Stop() }},
	{"canary", "a canary is touched, with a wrong password: found", canary, func(_ context.Context, d *demo) error { return d.watch.Stop() }},
	{"ends", "the program ends, and PostgreSQL forgets its user", ends, func(ctx context.Context, d *demo) error {
		_, err := d.machine.Sh(ctx, "systemctl kill -s KILL countersign-agent; systemctl mask --now --runtime countersign-agent")
		return err
	}},
	{"pcr", "a PCR changes: the host fails, its leases are revoked", pcrChanges, func(ctx context.Context, d *demo) error {
		_, err := d.broker.CLI(ctx, "host", "reference", d.machine.HostID)
		return err
	}},
	{"audit", "audit log, a receipt and fsck verified", verifyAudit, func(_ context.Context, d *demo) error {
		db, err := sql.Open("sqlite", filepath.Join(d.broker.State(), "store.db"))
		if err != nil {
			return err
		}
		_, err = db.Exec(`UPDATE audit_records SET body = replace(body, '"broker.initialised"', '"broker.initialized"')`)
		return errors.Join(err, db.Close())
	}},
}
