package main

import (
	"context"
	"encoding/json"
	"fmt"
	"path/filepath"
	"regexp"
	"strings"
	"time"

	"github.com/countersign/countersign/test/lab"
)

// stranger is an address of this machine that no host has.
const stranger = "127.0.0.9"

func startWatch(_ context.Context, d *demo) (detail string, err error) {
	d.watch, err = lab.StartWatch(filepath.Join(d.dir, "watch"), d.broker, fmt.Sprintf(`
sensor "postgres-stderr" "db" {
  path            = %q
  log_line_prefix = %q
}
sensor "vault-audit" "vault" { path = %q }
`, d.pg.Log, lab.LogLinePrefix, d.vault.AuditLog))
	return "", err
}

type found struct {
	Detector, Severity, Account, Response string
}

// findings are what the watch told the broker.
func (d *demo) findings(ctx context.Context) (list []found, err error) {
	out, err := d.broker.CLI(ctx, "finding", "list", "-o", "json")
	if err != nil {
		return nil, err
	}
	for line := range strings.Lines(string(out)) {
		var f found
		if err := json.Unmarshal([]byte(line), &f); err != nil {
			return nil, err
		}
		list = append(list, f)
	}
	return list, nil
}

// awaitFinding waits for a detector's finding about an account, which is all that is
// found of it.
func (d *demo) awaitFinding(ctx context.Context, detector, account string) (f found, took time.Duration, err error) {
	took, err = until(ctx, time.Minute, func() (bool, string, error) {
		list, err := d.findings(ctx)
		for _, one := range list {
			if one.Account == account {
				f = one
			}
		}
		return f.Detector == detector, fmt.Sprintf("%+v", list), err
	})
	return f, took, err
}

var inFile = regexp.MustCompile(`user=(\S+)\s+password=(\S+)`)

func copied(ctx context.Context, d *demo) (string, error) {
	if list, err := d.findings(ctx); err != nil || len(list) > 0 {
		return "", fmt.Errorf("before anything was wrong: %+v, %w", list, err)
	}
	text, err := d.machine.Sh(ctx, "cat /etc/billing/db.properties")
	if err != nil {
		return "", err
	}
	m := inFile.FindStringSubmatch(text)
	if m == nil {
		return "", fmt.Errorf("the file holds no user and password")
	}
	user := m[1]
	if err := d.pg.LoginFrom(ctx, stranger, user, m[2], "billing"); err != nil {
		return "", err
	}
	f, took, err := d.awaitFinding(ctx, "foreign-source", user)
	if err != nil {
		return "", err
	}
	gone, err := until(ctx, 20*time.Second, func() (bool, string, error) {
		n, err := d.roles(ctx, user)
		return n == 0, user + " is still there", err
	})
	if err != nil {
		return "", err
	}
	if _, err := until(ctx, 30*time.Second, func() (bool, string, error) {
		st, err := d.program(ctx)
		d.user = st.User
		return strings.HasPrefix(st.User, "v-") && st.User != user, fmt.Sprintf("%+v", st), err
	}); err != nil {
		return "", err
	}
	return fmt.Sprintf("%s (%s) %.1f s after the login, PostgreSQL has forgotten the user %.1f s after that", f.Detector, f.Response, took.Seconds(), gone.Seconds()), nil
}

func canary(ctx context.Context, d *demo) (string, error) {
	var canary struct{ Username, Password string }
	if err := d.broker.JSON(ctx, &canary, "canary", "issue", "--scope", "billing-db"); err != nil {
		return "", err
	}
	if err := d.pg.LoginFrom(ctx, stranger, canary.Username, canary.Password, "billing"); err == nil {
		return "", fmt.Errorf("the canary opens")
	}
	f, took, err := d.awaitFinding(ctx, "canary", canary.Username)
	return fmt.Sprintf("%s, %s, %.1f s after the login failed", f.Detector, f.Severity, took.Seconds()), err
}
