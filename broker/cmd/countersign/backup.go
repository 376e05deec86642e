package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"syscall"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/countersign/countersign/broker/internal/config"
	"github.com/countersign/countersign/broker/internal/issue/ca"
	"github.com/countersign/countersign/broker/internal/issue/fingerprint"
	"github.com/countersign/countersign/broker/internal/ops/fsck"
	"github.com/countersign/countersign/broker/internal/state/store"
	"github.com/countersign/countersign/internal/cli"
	"github.com/countersign/countersign/internal/durable"
	"github.com/countersign/countersign/internal/faults"
)

// A backedUp is what a backup came to.
type backedUp struct {
	File    string      `json:"file"`
	Denials string      `json:"denials,omitempty"` // the copy of the denial log
	Bytes   int64       `json:"bytes"`
	Keys    string      `json:"keys,omitempty"` // the folder with them
	Report  fsck.Report `json:"fsck"`
}

func backupCommand(o *options, file *string) *cobra.Command {
	var keys bool
	cmd := &cobra.Command{
		Use: "backup FILE", Short: "Copy the store while the broker runs, and verify the copy", Args: cli.Exactly(1),
		Long: `Copy the store while the broker runs, and verify the copy.

The copy is one snapshot: what the broker writes meanwhile is not in it. It is made
beside FILE, checked against the invariants and its own audit log, and given its name
only then. FILE must not exist. The denial log, a record of what was taken away, is copied
to FILE.denials. The broker's keys are not in the store: --keys copies
them to FILE.keys. The CAs' keys stay encrypted there, under the key password, which is
not copied; audit.key and secret-hmac.key are not encrypted, so keep the folder as safe
as the state folder.`,
		Example: `  countersign broker backup /backup/countersign-$(date +%F).db
  countersign broker backup --keys /backup/countersign.db -o json`,
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := config.Load(*file)
			if err != nil {
				return err
			}
			b := backedUp{File: args[0]}
			if keys {
				b.Keys = args[0] + ".keys"
			}
			if err := b.make(cmd, c); err != nil {
				return err
			}
			if err := o.print(cmd.OutOrStdout(), b, func(w io.Writer) {
				for _, v := range b.Report.Violations {
					fmt.Fprintf(w, "%s: %s\n", v.Invariant, v.Detail)
				}
				fmt.Fprintf(w, "%s: %d bytes, with %d records, %d leases and %d hosts\n", b.File, b.Bytes, b.Report.Records, b.Report.Leases, b.Report.Hosts)
				if b.Keys != "" {
					fmt.Fprintf(w, "%s: the broker's keys; audit.key and secret-hmac.key are not encrypted, and the key password is not there: keep it elsewhere\n", b.Keys)
				}
			}); err != nil {
				return err
			}
			if b.Report.Total > 0 {
				return no("the copy is whole, and %d invariants don't hold in the store itself", b.Report.Total)
			}
			return nil
		},
	}
	cmd.Flags().BoolVar(&keys, "keys", false, "copy the broker's keys, too, to FILE.keys")
	return cmd
}

// make copies the store, and the keys if they are wanted.
func (b *backedUp) make(cmd *cobra.Command, c *config.Broker) error {
	for _, file := range []string{b.File, b.File + ".denials", b.Keys} {
		if _, err := os.Lstat(file); !errors.Is(err, os.ErrNotExist) {
			return no("%s exists: a backup never overwrites a file", file)
		}
	}
	if err := private(filepath.Dir(b.File)); err != nil {
		return err
	}
	// Two at once could take each other's copies.
	lock, err := os.Open(c.StateDir)
	if err != nil {
		return err
	}
	defer func() { _ = lock.Close() }()
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		return no("another backup of this store is being made (%s is locked: %v)", c.StateDir, err)
	}
	if err := b.store(cmd, c); err != nil {
		return err
	}
	// After the store, so that it is no older. A broker that never ran has none.
	switch err := durable.Copy(c.DenialLog, b.File+".denials"); {
	case err == nil:
		b.Denials = b.File + ".denials"
	case !errors.Is(err, os.ErrNotExist):
		return fmt.Errorf("%s is whole, but the denial log is not copied: %w", b.File, err)
	}
	if b.Keys == "" {
		return nil
	}
	if err := copyKeys(c.StateDir, b.Keys); err != nil {
		return fmt.Errorf("%s is whole, but the keys are not copied: %w", b.File, err)
	}
	return nil
}

// private fails for a folder that others can write to: by a link in the place of the
// copy they could have any file of the machine overwritten.
func private(dir string) error {
	info, err := os.Stat(dir)
	if err != nil {
		return err
	}
	owner := info.Sys().(*syscall.Stat_t).Uid
	if info.Mode().Perm()&0o022 != 0 || owner != 0 && int(owner) != os.Geteuid() {
		return no("others can write to %s: back up into a folder that only its owner can write to (`chmod go-w`), and that is yours or root's", dir)
	}
	return nil
}

// store copies and verifies the store.
func (b *backedUp) store(cmd *cobra.Command, c *config.Broker) error {
	s, err := store.OpenReadOnly(c.StoreFile())
	if err != nil {
		return err
	}
	defer func() { _ = s.Close() }()
	// What an earlier try left behind is of no use.
	partial := b.File + ".partial"
	if err := removeStore(partial); err != nil {
		return err
	}
	p := newProgress(cmd.ErrOrStderr())
	defer p.end()
	err = s.Backup(cmd.Context(), partial, func(done, all int) { p.show("pages copied", int64(done), int64(all)) })
	if err == nil {
		b.Report, err = verified(cmd, partial, p)
	}
	if err != nil {
		return errors.Join(err, removeStore(partial))
	}
	info, err := os.Stat(partial)
	if err != nil {
		return err
	}
	b.Bytes = info.Size()
	// A link, unlike a rename, never takes the place of a file that came meanwhile.
	if err := os.Link(partial, b.File); err != nil {
		return err
	}
	return errors.Join(removeStore(partial), durable.SyncDir(filepath.Dir(b.File)))
}

// verified holds a copy of a store against the invariants.
func verified(cmd *cobra.Command, file string, p *progress) (fsck.Report, error) {
	s, err := store.OpenReadOnly(file)
	if err != nil {
		return fsck.Report{}, err
	}
	report, err := fsck.Check(cmd.Context(), s, faults.Now(), p.show)
	return report, errors.Join(err, s.Close())
}

// removeStore removes a store's file, and what SQLite may have left beside it.
func removeStore(file string) error {
	var errs []error
	for _, ending := range []string{"", "-wal", "-shm", "-journal"} {
		if err := os.Remove(file + ending); err != nil && !errors.Is(err, os.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// keyFiles are the broker's keys and certificates in the state folder, by name: whatever
// else is there, such as the key password or Vault's secret id, is not copied.
var keyFiles = []string{
	"host-ca.crt", "host-ca.key", "operator-ca.crt", "operator-ca.key",
	"workload-ca.crt", "workload-ca.key", "workload-ca-issuer.crt", "workload-ca-issuer.key",
	ca.CRLFile, "audit.key", "audit.pub", fingerprint.KeyFile,
}

// copyKeys copies what there is of keyFiles to a new folder: all of it, or nothing.
func copyKeys(stateDir, dir string) (err error) {
	if err := os.Mkdir(dir, 0o700); err != nil {
		return err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, os.RemoveAll(dir))
		}
	}()
	for _, name := range keyFiles {
		err := durable.Copy(filepath.Join(stateDir, name), filepath.Join(dir, name))
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
	}
	return durable.SyncDir(dir)
}
