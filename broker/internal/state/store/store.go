// Package store keeps the broker's state in one SQLite file: hosts, scopes,
// leases and the audit log.
//
// Trust: the file is the broker's own; whoever can write it can admit hosts
// and forget leases, but can't do so without the audit log's signed
// checkpoints, which agents hold, telling. It holds no credential.
//
// Promise: a nil error of Update means that the change is on disk. Updates
// that wait at the same time share one commit, so that durability costs one
// sync for all of them. After a failed commit the store answers nothing but
// ErrStopped: what is on disk is then known only by opening it anew, and that
// is what a restart does.
package store

import (
	"context"
	"database/sql"
	"database/sql/driver"
	"errors"
	"fmt"
	"os"
	"sync"
	"time"
)

// ErrStopped says that an earlier commit failed and nothing is known of the
// disk since.
var ErrStopped = errors.New("the store has stopped after a failed write; free or mend the disk under the state folder and restart the broker")

// A Store is safe for concurrent use.
type Store struct {
	dialect Dialect
	path    string
	owner   string   // of this process's claims
	lock    *os.File // nil where it is only read
	writer  *sql.DB  // one connection, used by commitLoop alone
	readers *sql.DB  // of View
	reports *sql.DB  // of Report
	queue   chan *update
	quit    chan struct{} // closed by Close
	done    chan struct{} // closed when no update is taken any more

	mu      sync.Mutex
	closed  bool  // guarded by mu
	stopped error // guarded by mu; set once, by commitLoop

	after    func() // guarded by mu; nil: nothing
	log      logKeeper
	watchers watchers
	strict   *strictness // nil: what updates change isn't held against what they name
	beside   sync.Map    // pointers of Beside, by what they point to
}

type update struct {
	ctx    context.Context
	rows   Rows
	change func(*Tx) error
	result chan error
}

// batchSize bounds how many updates share a commit, and so how long the first
// of them waits for the others.
const batchSize = 64

// Update runs change, which changes the rows, in a transaction and returns when it is
// durable, or with change's error when it is undone. Change must be quick and free of
// other I/O: all writers wait for it. It may be run again from the start.
func (s *Store) Update(ctx context.Context, rows Rows, change func(*Tx) error) error {
	u := &update{ctx: ctx, rows: rows, change: change, result: make(chan error, 1)}
	select {
	case s.queue <- u:
	case <-ctx.Done():
		return ctx.Err()
	case <-s.done:
		return s.stopReason()
	}
	return <-u.result
}

// View runs read over one consistent snapshot. It is for requests of hosts and for
// the broker's own loops, and must be quick: read little, by an index.
func (s *Store) View(ctx context.Context, read func(*Tx) error) error {
	conn, err := s.readers.Conn(ctx)
	if err != nil {
		return err
	}
	defer func() { _ = conn.Close() }()
	return s.snapshot(context.Background(), conn, read)
}

const (
	viewers   = 4 // connections of View
	reporters = 2 // connections of Report
	// reportTime is how long a Report may take, its wait for a connection included.
	// It bounds how long one snapshot keeps the write-ahead log from being reused.
	reportTime = 10 * time.Second
)

// ErrSlow is returned for a Report that took too long.
var ErrSlow = fmt.Errorf("the store did not answer within %v: ask for less at a time, or again when fewer operators ask", reportTime)

// Report runs read over one consistent snapshot, for operators. It has connections of
// its own, so that no number of them keeps a host waiting, and ends with ErrSlow
// after ten seconds: what is longer is read in pages.
func (s *Store) Report(ctx context.Context, read func(*Tx) error) error {
	bounded, cancel := context.WithTimeoutCause(ctx, reportTime, ErrSlow)
	defer cancel()
	conn, err := s.reports.Conn(bounded)
	if err == nil {
		defer func() { _ = conn.Close() }()
		err = s.snapshot(bounded, conn, read)
	}
	if err != nil && ctx.Err() == nil && bounded.Err() != nil {
		return ErrSlow
	}
	return err
}

// snapshot runs read in a transaction. Transactions are begun and ended by statements, as
// database/sql's own cost a goroutine each.
func (s *Store) snapshot(ctx context.Context, conn *sql.Conn, read func(*Tx) error) error {
	if _, err := conn.ExecContext(ctx, `BEGIN`); err != nil {
		return err
	}
	defer func() { _ = rollback(conn) }()
	return read(&Tx{ctx: ctx, conn: conn, store: s})
}

// rollback ends the transaction of a connection; where that fails, as after SQLite did it
// by itself, the connection.
func rollback(conn *sql.Conn) error {
	_, err := conn.ExecContext(context.Background(), `ROLLBACK`)
	if err != nil {
		_ = conn.Raw(func(any) error { return driver.ErrBadConn })
	}
	return err
}

// AfterCommit has f run after each commit of an update that called [Tx.Follow], before the
// updates in it are answered. It must not update the store, and all updates wait for it.
func (s *Store) AfterCommit(f func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.after = f
}

// Stopped is closed when the store no longer takes updates.
func (s *Store) Stopped() <-chan struct{} { return s.done }

// Err is why the store stopped, nil while it runs or after Close.
func (s *Store) Err() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.stopped
}

// Close waits for the running commit.
func (s *Store) Close() error {
	s.mu.Lock()
	first := !s.closed
	s.closed = true
	s.mu.Unlock()
	if first {
		close(s.quit)
	}
	<-s.done
	err := s.closeDBs()
	if first && s.lock != nil {
		err = errors.Join(err, s.lock.Close())
	}
	return err
}

func (s *Store) closeDBs() error {
	return errors.Join(s.readers.Close(), s.reports.Close(), s.log.close(), s.writer.Close())
}

func (s *Store) stopReason() error {
	if err := s.Err(); err != nil {
		return err
	}
	return ErrStopped
}

func (s *Store) commitLoop() {
	defer close(s.done)
	for {
		var batch []*update
		select {
		case u := <-s.queue:
			batch = append(batch, u)
		case <-s.quit:
			return
		}
	gather:
		for len(batch) < batchSize {
			select {
			case u := <-s.queue:
				batch = append(batch, u)
			default:
				break gather
			}
		}
		if err := s.commit(batch); err != nil {
			s.mu.Lock()
			s.stopped = fmt.Errorf("%w: %w", ErrStopped, err)
			s.mu.Unlock()
			return
		}
		s.log.committed()
	}
}

// commit runs the updates in one transaction and answers all after the sync. Where one of
// several fails, all are run again, each under a savepoint of its own, so that it takes
// nothing of the others with it: savepoints cost SQLite a copy of each page that changes.
func (s *Store) commit(batch []*update) error {
	results := make([]error, len(batch))
	failed, follow, err := s.transact(batch, results, false)
	if failed && err == nil && len(batch) > 1 {
		_, follow, err = s.transact(batch, results, true)
	}
	if err == nil && follow {
		s.mu.Lock()
		after := s.after
		s.mu.Unlock()
		if after != nil {
			after()
		}
	}
	for i, u := range batch {
		if err != nil {
			results[i] = fmt.Errorf("%w: %w", ErrStopped, err)
		}
		u.result <- results[i]
	}
	return err
}

// transact runs updates and commits them. Without savepoints it commits nothing and
// returns failed where one of them fails. Follow reports whether one called Tx.Follow.
func (s *Store) transact(batch []*update, results []error, savepoints bool) (failed, follow bool, err error) {
	ctx := context.Background()
	conn, err := s.writer.Conn(ctx)
	if err != nil {
		return false, false, err
	}
	defer func() { _ = conn.Close() }()
	if _, err := conn.ExecContext(ctx, s.dialect.Begin); err != nil {
		return false, false, err
	}
	ended := false
	defer func() {
		if !ended {
			_ = rollback(conn)
		}
	}()

	tx := &Tx{ctx: ctx, conn: conn, store: s, writes: true}
	var changed Rows
	for i, u := range batch {
		if results[i] = u.ctx.Err(); results[i] != nil {
			continue
		}
		if savepoints {
			if _, err := tx.Exec(`SAVEPOINT one`); err != nil {
				return false, false, err
			}
		}
		tx.rows = nil
		results[i] = s.run(u, tx)
		switch {
		case results[i] != nil && !savepoints:
			ended = true
			return true, false, rollback(conn)
		case results[i] != nil:
			if _, err := tx.Exec(`ROLLBACK TO one`); err != nil {
				return false, false, errors.Join(results[i], err)
			}
		default:
			changed = changed.And(tx.rows)
		}
		if savepoints {
			if _, err := tx.Exec(`RELEASE one`); err != nil {
				return false, false, err
			}
		}
	}
	if _, err = tx.Exec(`COMMIT`); err != nil {
		return false, false, err
	}
	ended = true
	s.watchers.tell(changed)
	return false, tx.follow, nil
}

// run keeps a panic of one update from ending the loop that all depend on.
func (s *Store) run(u *update, tx *Tx) (err error) {
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("store: an update panicked: %v", p)
		}
	}()
	if s.strict != nil {
		if err := s.strict.begin(tx.conn); err != nil {
			return err
		}
	}
	if err := tx.Also(u.rows); err != nil {
		return err
	}
	if err := u.change(tx); err != nil || s.strict == nil {
		return err
	}
	return s.strict.check(tx.rows)
}

// Millis is how times stand in the store: Unix milliseconds, 0 for none.
func Millis(t time.Time) int64 {
	if t.IsZero() {
		return 0
	}
	return t.UnixMilli()
}

// Time is the reverse of Millis.
func Time(ms int64) time.Time {
	if ms == 0 {
		return time.Time{}
	}
	return time.UnixMilli(ms).UTC()
}
