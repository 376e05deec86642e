package main

import (
	"crypto/rand"
	"encoding/base32"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/spf13/cobra"

	"github.com/countersign/countersign/broker/api/event"
	"github.com/countersign/countersign/broker/internal/config"
	"github.com/countersign/countersign/broker/internal/front/pki"
	"github.com/countersign/countersign/broker/internal/issue/ca"
	"github.com/countersign/countersign/broker/internal/issue/fingerprint"
	"github.com/countersign/countersign/broker/internal/state/audit"
	"github.com/countersign/countersign/broker/internal/state/inventory"
	"github.com/countersign/countersign/broker/internal/state/store"
	"github.com/countersign/countersign/internal/cli"
	"github.com/countersign/countersign/internal/faults"
)

const defaultConfig = "/etc/countersign/broker.hcl"

func brokerCommand(o *options) *cobra.Command {
	cmd := &cobra.Command{Use: "broker", Short: "Run a broker"}
	var file string
	cmd.PersistentFlags().StringVarP(&file, "config", "c", defaultConfig, "the broker's config file")
	cmd.AddCommand(
		&cobra.Command{Use: "init", Short: "Make a new broker's keys and store", Args: cli.Exactly(0), RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := config.Load(file)
			if err != nil {
				return err
			}
			return initBroker(cmd, c)
		}},
		&cobra.Command{Use: "serve", Short: "Serve hosts and operators", Args: cli.Exactly(0), RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := config.Load(file)
			if err != nil {
				return err
			}
			return serve(cmd.Context(), c, cmd.ErrOrStderr())
		}},
		backupCommand(o, &file),
		restoreCommand(o, &file),
		acknowledgeCommand(o, &file),
	)
	return cmd
}

// initBroker makes everything that a broker never makes twice.
func initBroker(cmd *cobra.Command, c *config.Broker) error {
	if _, err := os.Stat(c.StoreFile()); err == nil {
		return no("%s exists: this broker was initialised before; `countersign broker serve` runs it", c.StoreFile())
	}
	if err := os.MkdirAll(c.StateDir, 0o700); err != nil {
		return err
	}
	password, err := keyPassword(c.KeyPasswordFile, true)
	if err != nil {
		return err
	}
	id := inventory.NewID()
	now := faults.Now()
	hostCA, err := pki.Create(c.StateDir, pki.HostCA, "countersign hosts "+id, password, now)
	if err != nil {
		return err
	}
	if _, err := pki.Create(c.StateDir, pki.OperatorCA, "countersign operators "+id, password, now); err != nil {
		return err
	}
	if err := ca.Init(c.StateDir, id, c.TrustDomain, password, now); err != nil {
		return err
	}
	if err := audit.CreateKey(c.StateDir, id, rand.Reader); err != nil {
		return err
	}
	if _, err := fingerprint.Open(c.StateDir); err != nil {
		return err
	}
	s, err := store.Open(c.StoreFile())
	if err != nil {
		return err
	}
	err = s.Update(cmd.Context(), store.Any(store.Broker), func(tx *store.Tx) error {
		if _, err := tx.Exec(`INSERT INTO meta (name, value) VALUES ('broker.id', ?)`, id); err != nil {
			return err
		}
		_, err := audit.Append(tx, event.Record{Time: now, Actor: "operator:root"}, event.Initialised{Broker: id, HostCA: hostCA.Fingerprint()})
		return err
	})
	if err := errors.Join(err, s.Close()); err != nil {
		return err
	}
	fmt.Fprintf(cmd.OutOrStdout(), "broker %s is ready; agents pin its CA in their config:\n\n  ca_sha256 = %q\n\nBack up %s and keep the key password %s elsewhere.\n",
		id, hostCA.Fingerprint(), c.StateDir, c.KeyPasswordFile)
	return nil
}

// keyPassword reads the password of the CAs' keys, or makes one.
func keyPassword(path string, create bool) ([]byte, error) {
	b, err := os.ReadFile(path)
	if errors.Is(err, os.ErrNotExist) && create {
		var random [25]byte
		_, _ = rand.Read(random[:]) // never fails
		b = []byte(base32.StdEncoding.EncodeToString(random[:]))
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			return nil, err
		}
		return b, os.WriteFile(path, b, 0o600)
	}
	if err != nil {
		return nil, fmt.Errorf("key_password_file: %w", err)
	}
	for len(b) > 0 && (b[len(b)-1] == '\n' || b[len(b)-1] == '\r') {
		b = b[:len(b)-1]
	}
	if len(b) < 16 {
		return nil, fmt.Errorf("key_password_file %s holds less than 16 characters", path)
	}
	return b, nil
}
