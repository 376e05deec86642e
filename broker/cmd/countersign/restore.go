package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"time"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"

	v1 "github.com/countersign/countersign/broker/api/countersign/v1"
	"github.com/countersign/countersign/broker/api/event"
	"github.com/countersign/countersign/broker/internal/config"
	"github.com/countersign/countersign/broker/internal/ops/recovery"
	"github.com/countersign/countersign/broker/internal/state/audit"
	"github.com/countersign/countersign/broker/internal/state/denials"
	"github.com/countersign/countersign/broker/internal/state/store"
	"github.com/countersign/countersign/internal/cli"
	"github.com/countersign/countersign/internal/durable"
	"github.com/countersign/countersign/internal/faults"
)

// A restored store, and what became of it.
type restored struct {
	Epoch   int64           `json:"epoch"`
	Backup  time.Time       `json:"backup"` // its last record
	Log     string          `json:"denial_log,omitempty"`
	LogAt   time.Time       `json:"denial_log_at,omitzero"` // its newest line
	Merged  recovery.Merged `json:"merged,omitempty"`
	BadLine int             `json:"bad_lines,omitempty"`
	Held    string          `json:"held,omitempty"` // why nothing new is issued
}

// restoreCommand puts a backup of the store in place. What was issued after
// the backup is not in it: a new epoch says so to everybody who holds a
// checkpoint, and agents bring their leases back when they next prove
// themselves. What was taken away after it is in the denial log.
func restoreCommand(o *options, file *string) *cobra.Command {
	var logs []string
	cmd := &cobra.Command{
		Use: "restore BACKUP", Short: "Put a backup of the store in place and open a new epoch of the audit log", Args: cli.Exactly(1),
		Long: `Put a backup of the store in place and open a new epoch of the audit log.

What was taken away after the backup (quarantines, removals of hosts and operators,
revoked leases and certificates, spent join tokens) is taken away again, as the denial
log says: the broker's own, denial_log in its config, if it is still there, and those
that --denial-log names, such as a copy of it on another machine. The copy beside the
backup, BACKUP.denials, is as old as the backup, so it doesn't count.

With no denial log the broker doesn't know what was taken away. It keeps the leases in
force, but issues nothing new, takes no lease back by a ticket, and refuses operators from
outside until you run ` + "`countersign broker acknowledge`" + ` on its machine.`,
		Example: `  countersign broker restore /backup/countersign-2026-11-28.db
  countersign broker restore --denial-log /mnt/other/denials.log /backup/countersign-2026-11-28.db`,
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := config.Load(*file)
			if err != nil {
				return err
			}
			r, err := restore(cmd, c, args[0], logs)
			if err != nil {
				return err
			}
			return o.print(cmd.OutOrStdout(), r, r.tell)
		},
	}
	cmd.Flags().StringSliceVar(&logs, "denial-log", nil, "a newer denial log than the broker's own; may be given several times")
	return cmd
}

func (r restored) tell(w io.Writer) {
	fmt.Fprintf(w, "restored as epoch %d. Leases that were issued after the backup come back as their hosts prove themselves; "+
		"`countersign vault orphans` then lists what Vault has and nobody spoke for.\n", r.Epoch)
	if r.BadLine > 0 {
		fmt.Fprintf(w, "%d lines of the denial log can't be read: what they say isn't known\n", r.BadLine)
	}
	for kind, n := range r.Merged {
		fmt.Fprintf(w, "taken away again by the denial log: %d of kind %s\n", n, kind)
	}
	if r.Held != "" {
		fmt.Fprintf(w, "%s: nothing new is issued, and operators from outside are refused, until `countersign broker acknowledge` on this machine\n", r.Held)
		return
	}
	fmt.Fprintf(w, "the denial log %s ends at %s\n", r.Log, r.LogAt.Format(time.RFC3339))
}

// restore puts a backup in place, or leaves none.
func restore(cmd *cobra.Command, c *config.Broker, backup string, logs []string) (r restored, err error) {
	// A write-ahead log that was left behind would be replayed into the backup.
	for _, ending := range []string{"", "-wal", "-shm"} {
		if _, err := os.Stat(c.StoreFile() + ending); err == nil {
			return r, no("%s exists: move %s* away first; restore never overwrites a store", c.StoreFile()+ending, c.StoreFile())
		}
	}
	// What is not merged yet must not be served: the store gets its name at the end.
	unmerged := c.StoreFile() + ".restoring"
	if err := dropUnmerged(unmerged); err != nil {
		return r, err
	}
	if err := durable.Copy(backup, unmerged); err != nil {
		return r, err
	}
	s, err := store.Open(unmerged)
	if err != nil {
		return r, errors.Join(err, dropUnmerged(unmerged))
	}
	if err = verifyLog(cmd, s); err == nil {
		r, err = takeAwayAgain(cmd, c, s, backup, logs)
	}
	if err := errors.Join(err, s.Close()); err != nil {
		return r, errors.Join(err, dropUnmerged(unmerged))
	}
	// A link, unlike a rename, never takes the place of a store that came meanwhile.
	if err := os.Link(unmerged, c.StoreFile()); err != nil {
		return r, errors.Join(err, dropUnmerged(unmerged))
	}
	return r, errors.Join(dropUnmerged(unmerged), durable.SyncDir(filepath.Dir(c.StoreFile())))
}

// dropUnmerged removes a store that doesn't have its name yet, with its lock.
func dropUnmerged(file string) error {
	return errors.Join(removeStore(file), durable.Remove(file+".lock"))
}

// takeAwayAgain merges the denial logs, or holds the broker where there is none, and opens a
// new epoch.
func takeAwayAgain(cmd *cobra.Command, c *config.Broker, s *store.Store, backup string, logs []string) (r restored, err error) {
	ctx, now := cmd.Context(), faults.Now()
	id, err := brokerID(ctx, s)
	if err != nil {
		return r, err
	}
	if r.Backup, err = lastRecord(ctx, s); err != nil {
		return r, err
	}
	l, err := audit.Open(s, c.StateDir, id)
	if err != nil {
		return r, err
	}
	if err := recovery.Seed(ctx, s, now); err != nil {
		return r, err
	}

	var last int64 // denial that the backup knows
	if err := s.View(ctx, func(tx *store.Tx) (err error) { last, err = denials.Last(tx); return err }); err != nil {
		return r, err
	}
	r.Merged = recovery.Merged{}
	for _, file := range append([]string{backup + ".denials", c.DenialLog}, logs...) {
		contents, err := denials.Read(file, l.Verifier())
		own := file == backup+".denials" || file == c.DenialLog
		if own && errors.Is(err, os.ErrNotExist) {
			continue
		}
		if err != nil {
			return r, err
		}
		merged, err := recovery.Merge(ctx, s, contents, "operator:root", now, slog.New(slog.NewTextHandler(cmd.ErrOrStderr(), nil)))
		if err != nil {
			return r, err
		}
		for kind, n := range merged {
			r.Merged[kind] += n
		}
		r.BadLine += contents.Bad
		if file != backup+".denials" && contents.At.After(r.LogAt) && contents.Last >= last {
			r.Log, r.LogAt = file, contents.At
		}
	}
	switch {
	case r.Log == "":
		r.Held = fmt.Sprintf("the store was restored from a backup of %s without a denial log that is newer, so what was taken away since then isn't known", r.Backup.Format(time.RFC3339))
	case r.BadLine > 0:
		r.Held = fmt.Sprintf("the store was restored from a backup of %s, and %d lines of the denial log can't be read", r.Backup.Format(time.RFC3339), r.BadLine)
	}
	r.Epoch, err = openEpoch(ctx, s, "operator:root", "the store was restored from a backup", r.Held)
	return r, err
}

// openEpoch opens the next epoch of the audit log, and holds the broker if held says why.
func openEpoch(ctx context.Context, s *store.Store, actor, reason, held string) (epoch int64, err error) {
	err = s.Update(ctx, store.Any(store.Broker), func(tx *store.Tx) error {
		was, err := audit.Epoch(tx)
		if err != nil {
			return err
		}
		epoch = was + 1
		if err := audit.OpenEpoch(tx, epoch, actor, faults.Now(), event.Epoch{Reason: reason}); err != nil || held == "" {
			return err
		}
		return denials.SetHold(tx, held)
	})
	return epoch, err
}

// lastRecord returns the time of the newest record of a store's audit log.
func lastRecord(ctx context.Context, s *store.Store) (at time.Time, err error) {
	err = s.View(ctx, func(tx *store.Tx) error {
		var last int64
		if err := tx.QueryRow(`SELECT COALESCE(MAX(idx), 0) FROM audit_records`).Scan(&last); err != nil {
			return err
		}
		return audit.Read(tx, last, 1, func(_ int64, body []byte) error {
			r, err := event.Parse(body)
			at = r.Time
			return err
		})
	})
	return at, err
}

// acknowledgeCommand ends the hold of a broker that was restored without a denial log.
func acknowledgeCommand(o *options, file *string) *cobra.Command {
	var reason string
	cmd := &cobra.Command{
		Use: "acknowledge", Short: "Stand for a restore: for the audit log's new epoch, and for what isn't known", Args: cli.Exactly(0),
		Long: `Stand for a restore of the broker's store.

Agents report the audit log's new epoch, since records could have been hidden by it, until you
have acknowledged it, and an operator can do so from anywhere.

A broker that was restored without a denial log is held, too: it doesn't know what was taken
away between the backup and its restore, and this ends the hold. First quarantine and remove
anew the hosts and operators that were, and revoke the leases that were: ` + "`countersign status`" + `
says from when on the broker doesn't know. While it is held, this works on its machine alone.`,
		Example: `  countersign broker acknowledge --reason "checked against the tickets of 28 November"`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if !cmd.Flags().Changed("socket") && o.address == "" {
				if c, err := config.Load(*file); err == nil {
					o.socket = c.Socket()
				}
			}
			client, err := o.client(cmd.Context())
			if err != nil {
				return err
			}
			r, err := client.AcknowledgeRestore(cmd.Context(), connect.NewRequest(&v1.AcknowledgeRestoreRequest{Reason: reason}))
			if err != nil {
				return err
			}
			return o.show(cmd.OutOrStdout(), r.Msg, func(w io.Writer) {
				if r.Msg.GetEpoch() > 1 {
					fmt.Fprintf(w, "epoch %d of the audit log is acknowledged: agents hear of it at their next proof\n", r.Msg.GetEpoch())
				}
				if r.Msg.GetHeld() != "" {
					fmt.Fprintf(w, "acknowledged: %s. The broker issues again.\n", r.Msg.GetHeld())
				}
			})
		},
	}
	cmd.Flags().StringVar(&reason, "reason", "", "how you know that it is safe, for the audit log")
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
