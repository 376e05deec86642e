package store_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/countersign/countersign/broker/internal/state/store"
)

// endless is a query that reads for minutes.
const endless = `WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 1000000000000) SELECT COUNT(*) FROM n`

// Operators that ask for more than can be answered keep no host waiting: they have
// connections of their own, and are interrupted.
func TestReportsKeepNoRequestWaiting(t *testing.T) {
	s, err := store.Open(filepath.Join(t.TempDir(), "store.db"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.Close() })
	ctx, cancel := context.WithCancel(t.Context())
	var reports sync.WaitGroup
	started := make(chan struct{}, 8)
	for range 8 {
		reports.Go(func() {
			var n int
			err := s.Report(ctx, func(tx *store.Tx) error {
				started <- struct{}{}
				return tx.QueryRow(endless).Scan(&n)
			})
			if err == nil {
				t.Error("an endless query was answered")
			}
		})
	}
	for range 2 { // as many as run at a time
		<-started
	}
	for i := range 20 {
		if err := s.Update(t.Context(), store.Everything(), set(fmt.Sprint(i), "x")); err != nil {
			t.Fatal(err)
		}
		if n := count(t, s); n != i+1 {
			t.Fatalf("%d rows after %d updates", n, i+1)
		}
	}
	select {
	case <-started:
		t.Error("a third report ran: they have as many connections as they like")
	default:
	}
	cancel()
	reports.Wait()
}

// A report that takes too long ends, and says so.
func TestASlowReportEnds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, err := store.Open(filepath.Join(t.TempDir(), "store.db"))
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = s.Close() }()
		const forever = `WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT i FROM n`
		began := time.Now()
		if err := s.Report(t.Context(), func(tx *store.Tx) error {
			return tx.Each(func(store.Row) error { time.Sleep(time.Second / 2); return nil }, forever)
		}); !errors.Is(err, store.ErrSlow) {
			t.Errorf("a report without an end: %v, want ErrSlow", err)
		}
		if took := time.Since(began); took < 10*time.Second || took > 11*time.Second {
			t.Errorf("it took %v", took)
		}
		var n int
		if err := s.Report(t.Context(), func(tx *store.Tx) error { return tx.QueryRow(`SELECT 1`).Scan(&n) }); err != nil {
			t.Errorf("after it: %v", err)
		}
	})
}

// writing writes to s until stop is called, each time a pair of rows with one value of
// so many bytes.
func writing(t *testing.T, s *store.Store, bytes int) (stop func()) {
	large := strings.Repeat("x", bytes)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() {
		defer close(done)
		for i := 0; ctx.Err() == nil; i++ {
			if err := s.Update(context.Background(), store.Everything(), func(tx *store.Tx) error {
				for _, name := range []string{"a", "b"} {
					if _, err := tx.Exec(`INSERT INTO meta (name, value) VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET value = excluded.value`,
						fmt.Sprintf("%s%d", name, i%50), fmt.Sprintf("%d %s", i, large)); err != nil {
						return err
					}
				}
				return nil
			}); err != nil {
				t.Error(err)
				return
			}
		}
	}()
	return func() { cancel(); <-done }
}

// A backup under steady writes by another process ends, is one snapshot, and can be
// opened; a file that exists is left alone.
func TestBackupUnderWrites(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	path := filepath.Join(dir, "store.db")
	s, err := store.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.Close() })
	stop := writing(t, s, 64<<10)
	defer stop()
	for { // until there is something to copy
		if n := count(t, s); n == 100 {
			break
		}
	}
	// As `broker backup` does it, beside the broker.
	reader, err := store.OpenReadOnly(path)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = reader.Close() }()
	file, steps := filepath.Join(dir, "copy #1.db"), 0
	if err := reader.Backup(t.Context(), file, func(done, all int) {
		if steps++; done > all {
			t.Errorf("%d of %d pages", done, all)
		}
	}); err != nil {
		t.Fatal(err)
	}
	if steps == 0 {
		t.Error("no progress was told")
	}
	if err := reader.Backup(t.Context(), file, func(int, int) {}); !errors.Is(err, os.ErrExist) {
		t.Errorf("onto an existing file: %v", err)
	}
	opened, err := store.OpenReadOnly(file)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = opened.Close() }()
	if err := opened.View(t.Context(), func(tx *store.Tx) error {
		var pairs, torn int
		if err := tx.QueryRow(`SELECT COUNT(*), COALESCE(SUM(a.value <> b.value), 0) FROM meta AS a JOIN meta AS b ON b.name = 'b' || substr(a.name, 2) WHERE a.name LIKE 'a%'`).Scan(&pairs, &torn); err != nil {
			return err
		}
		if pairs != 50 || torn != 0 {
			t.Errorf("the copy has %d pairs, %d of which are of two moments", pairs, torn)
		}
		var sound string
		if err := tx.QueryRow(`PRAGMA integrity_check`).Scan(&sound); err != nil || sound != "ok" {
			t.Errorf("integrity_check: %s, %v", sound, err)
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
}

// The write-ahead log grows while somebody reads an old snapshot, and shrinks again
// after it, though there is never a moment without a reader.
func TestTheLogShrinksAgain(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	path := filepath.Join(dir, "store.db")
	s, err := store.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.Close() })
	size := func() int64 {
		info, err := os.Stat(path + "-wal")
		if err != nil {
			t.Fatal(err)
		}
		return info.Size()
	}
	const grown = 80 << 20
	stop := writing(t, s, 1<<20)
	defer stop()
	if err := s.View(t.Context(), func(tx *store.Tx) error {
		var n int
		if err := tx.QueryRow(`SELECT COUNT(*) FROM meta`).Scan(&n); err != nil {
			return err
		}
		for size() < grown {
			time.Sleep(10 * time.Millisecond)
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	// Two readers that take turns: one always reads.
	ctx, cancel := context.WithCancel(t.Context())
	var readers sync.WaitGroup
	for range 2 {
		readers.Go(func() {
			for ctx.Err() == nil {
				_ = s.View(context.Background(), func(tx *store.Tx) error {
					var n int
					err := tx.QueryRow(`SELECT COUNT(*) FROM meta`).Scan(&n)
					time.Sleep(3 * time.Millisecond)
					return err
				})
			}
		})
	}
	defer func() { cancel(); readers.Wait() }()
	deadline := time.Now().Add(time.Minute)
	for size() > grown/2 {
		if time.Now().After(deadline) {
			t.Fatalf("the log has %d MiB still", size()>>20)
		}
		time.Sleep(50 * time.Millisecond)
	}
}
