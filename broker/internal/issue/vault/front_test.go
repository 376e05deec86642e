package vault

import (
	"path/filepath"
	"testing"

	"github.com/countersign/countersign/broker/internal/config"
	"github.com/countersign/countersign/test/check"
	"github.com/countersign/countersign/test/lab"
)

// newFront is a front before the tests' Vault, and the config of a broker that
// goes through it.
func newFront(t *testing.T) (*lab.Front, config.Vault) {
	t.Helper()
	f := check.Must(lab.NewFront(testVault, filepath.Join(t.TempDir(), "ca.pem")))(t)
	t.Cleanup(f.Close)
	c := tokenConfig(t, brokerToken(t, nil))
	c.Address, c.CAFile = f.Addr, f.CACert
	return f, c
}
