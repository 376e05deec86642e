package store

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"os"

	"modernc.org/sqlite"
)

// backupStep is how many pages are copied between two reports of progress.
const backupStep = 2048

// Backup copies one snapshot of the store into file, which must not exist, and syncs
// it. It may be called while a broker writes to the store: what is written after the
// beginning is not in the copy. Progress receives the number of pages copied
// and of all pages.
//
// The read transaction that is held meanwhile is what keeps SQLite's backup from
// beginning anew at each write of another process; it also keeps the write-ahead log
// from shrinking until the copy is done.
func (s *Store) Backup(ctx context.Context, file string, progress func(done, all int)) (err error) {
	f, err := os.OpenFile(file, os.O_CREATE|os.O_EXCL|os.O_RDWR, 0o600)
	if err != nil {
		return fmt.Errorf("backup: %w", err)
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	conn, err := s.reports.Conn(ctx)
	if err != nil {
		return err
	}
	defer func() { _ = conn.Close() }()
	tx, err := conn.BeginTx(ctx, nil)
	if err != nil {
		return err
	}
	defer func() { _ = tx.Rollback() }()
	var version int
	if err := tx.QueryRowContext(ctx, `SELECT MAX(version) FROM schema_version`).Scan(&version); err != nil { // takes the snapshot
		return err
	}
	err = conn.Raw(func(driver any) error {
		source, ok := driver.(interface {
			NewBackup(string) (*sqlite.Backup, error)
		})
		if !ok {
			return errors.New("backup: this SQLite driver copies nothing")
		}
		b, err := source.NewBackup((&url.URL{Scheme: "file", Opaque: (&url.URL{Path: file}).EscapedPath()}).String())
		if err != nil {
			return err
		}
		return errors.Join(copyPages(ctx, b, f, progress), b.Finish())
	})
	if err != nil {
		return fmt.Errorf("backup to %s: %w", file, err)
	}
	return f.Sync()
}

func copyPages(ctx context.Context, b *sqlite.Backup, f *os.File, progress func(done, all int)) error {
	for {
		more, err := b.Step(backupStep)
		if err != nil {
			return err
		}
		// Little by little: a broker that syncs its log waits for what is written to
		// the same file system.
		if err := f.Sync(); err != nil {
			return err
		}
		progress(b.PageCount()-b.Remaining(), b.PageCount())
		if !more {
			return nil
		}
		if err := ctx.Err(); err != nil {
			return err
		}
	}
}
