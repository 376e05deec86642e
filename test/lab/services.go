package lab

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"
)

// Services are what several brokers can share: a CA of TPMs, Vault, and a
// PostgreSQL with the database "billing" and Vault's role "billing-ro".
type Services struct {
	Dir   string // 0711, so that other users reach files they are given
	TPMCA *TPMCA
	Vault *Vault
	PG    *Postgres
}

// StartServices starts all of them in a folder of its own; Close stops them
// and removes it.
func StartServices(ctx context.Context) (s *Services, err error) {
	s = &Services{}
	if s.Dir, err = os.MkdirTemp("", "countersign-"); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, s.Close())
		}
	}()
	if err := os.Chmod(s.Dir, 0o711); err != nil {
		return nil, err
	}
	if s.TPMCA, err = NewTPMCA(filepath.Join(s.Dir, "tpmca")); err != nil {
		return nil, err
	}
	if s.Vault, err = StartVault(ctx, filepath.Join(s.Dir, "vault")); err != nil {
		return nil, err
	}
	if s.PG, err = StartPostgres(ctx, filepath.Join(s.Dir, "postgres")); err != nil {
		return nil, err
	}
	return s, ConfigureDatabase(ctx, s.Vault, s.PG, DatabaseRole{Name: "billing-ro", Database: "billing", DefaultTTL: time.Hour, MaxTTL: 24 * time.Hour})
}

// Close stops what runs and removes the folder.
func (s *Services) Close() error {
	var errs []error
	if s.Vault != nil {
		errs = append(errs, s.Vault.Stop())
	}
	if s.PG != nil {
		errs = append(errs, s.PG.Close())
	}
	return errors.Join(append(errs, os.RemoveAll(s.Dir))...)
}

// Folder makes a folder that other users may pass through.
func (s *Services) Folder() (string, error) {
	dir, err := os.MkdirTemp(s.Dir, "t")
	if err != nil {
		return "", err
	}
	return dir, os.Chmod(dir, 0o711)
}

// NewBrokerFor makes and starts a broker that trusts the services' TPMs and has
// a login at their Vault with the rights that scopes need; the scopes are in
// force when it returns.
func (s *Services) NewBrokerFor(ctx context.Context, dir, scopes string, o BrokerOptions) (*Broker, error) {
	if err := os.MkdirAll(dir, 0o711); err != nil {
		return nil, err
	}
	roots := filepath.Join(dir, "ek-roots.pem")
	root, intermediate := s.TPMCA.PEM()
	if err := os.WriteFile(roots, append(root, intermediate...), 0o600); err != nil {
		return nil, err
	}
	home := filepath.Join(dir, "broker")
	token := filepath.Join(home, "vault-token")
	o.EKRoots = []string{roots}
	address, ca := s.Vault.Addr, s.Vault.CACert
	if o.Front != nil {
		address, ca = o.Front.Addr, o.Front.CACert
	}
	o.Vault = fmt.Sprintf("address = %q\nca_file = %q\ntoken_file = %q", address, ca, token)
	b, err := NewBroker(ctx, home, o)
	if err != nil {
		return nil, err
	}
	if err := os.MkdirAll(b.Scopes(), 0o700); err != nil {
		return nil, err
	}
	if err := os.WriteFile(filepath.Join(b.Scopes(), "scopes.hcl"), []byte(scopes), 0o600); err != nil {
		return nil, err
	}
	secret, err := SetUpVault(ctx, s.Vault, b.Scopes())
	if err != nil {
		return nil, err
	}
	if err := os.WriteFile(token, []byte(secret), 0o600); err != nil {
		return nil, err
	}
	if err := b.Start(ctx); err != nil {
		return nil, err
	}
	return b, b.ApplyScopes(ctx, scopes)
}
