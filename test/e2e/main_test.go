// Package e2e proves the product from outside: the real programs, against a
// real TPM simulator, Vault, PostgreSQL and systemd.
package e2e_test

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/countersign/countersign/test/lab"
)

// The parts that all tests share; each test has a broker and hosts of its own.
var (
	tpmCA *lab.TPMCA
	vault *lab.Vault
	pg    *lab.Postgres
	work  string // 0711, so that other users reach files they are given
)

func TestMain(m *testing.M) {
	code, err := withLab(m)
	if err != nil {
		fmt.Fprintln(os.Stderr, "e2e:", err)
		code = 1
	}
	os.Exit(code)
}

func withLab(m *testing.M) (code int, err error) {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	if work, err = os.MkdirTemp("", "countersign-e2e-"); err != nil {
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
	if err := lab.BuildLegacy(ctx, filepath.Join(work, "legacy")); err != nil {
		return 1, err
	}
	return m.Run(), nil
}

func folder(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp(work, "t")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(dir, 0o711); err != nil {
		t.Fatal(err)
	}
	return dir
}

func within(t *testing.T, d time.Duration) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), d)
	t.Cleanup(cancel)
	return ctx
}

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

// eventually polls until done, and fails with what it last said.
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
