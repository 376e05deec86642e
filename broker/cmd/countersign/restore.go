package main

import (
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/spf13/cobra"

	"github.com/countersign/countersign/broker/api/event"
	"github.com/countersign/countersign/broker/internal/config"
	"github.com/countersign/countersign/broker/internal/state/audit"
	"github.com/countersign/countersign/broker/internal/state/store"
	"github.com/countersign/countersign/internal/cli"
	"github.com/countersign/countersign/internal/faults"
)

// restoreCommand puts a backup of the store in place. What was issued after
// the backup is not in it: a new epoch says so to everybody who holds a
// checkpoint, and agents bring their leases back when they next prove
// themselves.
func restoreCommand(file *string) *cobra.Command {
	cmd := &cobra.Command{
		Use: "restore BACKUP", Short: "Put a backup of the store in place and open a new epoch of the audit log", Args: cli.Exactly(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := config.Load(*file)
			if err != nil {
				return err
			}
			// A write-ahead log that was left behind would be replayed into the backup.
			for _, ending := range []string{"", "-wal", "-shm"} {
				if _, err := os.Stat(c.StoreFile() + ending); err == nil {
					return no("%s exists: move %s* away first; restore never overwrites a store", c.StoreFile()+ending, c.StoreFile())
				}
			}
			if err := copyFile(args[0], c.StoreFile()); err != nil {
				return err
			}
			s, err := store.Open(c.StoreFile())
			if err != nil {
				return errors.Join(err, removeStore(c.StoreFile()))
			}
			var epoch int64
			err = verifyLog(cmd, s)
			if err == nil {
				err = s.Update(cmd.Context(), store.Everything(), func(tx *store.Tx) error {
					was, err := audit.Epoch(tx)
					if err != nil {
						return err
					}
					epoch = was + 1
					return audit.OpenEpoch(tx, epoch, "operator:root", faults.Now(), event.Epoch{Reason: "the store was restored from a backup"})
				})
			}
			if err := errors.Join(err, s.Close()); err != nil {
				return errors.Join(err, removeStore(c.StoreFile()))
			}
			fmt.Fprintf(cmd.OutOrStdout(), "restored as epoch %d. Leases that were issued after the backup come back as their hosts prove themselves; "+
				"`countersign vault orphans` then lists what Vault has and nobody spoke for.\n", epoch)
			return nil
		},
	}
	return cmd
}

// verifyLog hashes a store's audit log again.
func verifyLog(cmd *cobra.Command, s *store.Store) error {
	p := newProgress(cmd.ErrOrStderr())
	defer p.end()
	var v audit.Verification
	if err := v.Verify(cmd.Context(), s, func(index, all int64, _ []byte) error {
		p.show("records of the audit log", index+1, all)
		return nil
	}); err != nil {
		return err
	}
	if v.Problem != nil {
		return fmt.Errorf("the backup's audit log: %w", v.Problem)
	}
	return nil
}

// copyFile copies a file to a new one, or leaves none.
func copyFile(from, to string) (err error) {
	in, err := os.Open(from)
	if err != nil {
		return err
	}
	defer func() { _ = in.Close() }()
	out, err := os.OpenFile(to, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer func() {
		if err = errors.Join(err, out.Close()); err != nil {
			err = errors.Join(err, os.Remove(to))
		}
	}()
	if _, err := io.Copy(out, in); err != nil {
		return err
	}
	return out.Sync()
}
