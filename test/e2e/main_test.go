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

	"github.com/countersign/countersign/test/check"
	"github.com/countersign/countersign/test/lab"
)

// services are what all tests share; each test has a broker and hosts of its
// own.
var services *lab.Services

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
	if services, err = lab.StartServices(ctx); err != nil {
		return 1, err
	}
	defer func() { _ = services.Close() }()
	if err := lab.BuildLegacy(ctx, legacyProgram()); err != nil {
		return 1, err
	}
	return m.Run(), nil
}

func legacyProgram() string { return filepath.Join(services.Dir, "legacy") }

func folder(t *testing.T) string {
	t.Helper()
	return check.Must(services.Folder())(t)
}
