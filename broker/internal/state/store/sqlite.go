package store

import (
	"crypto/rand"
	"database/sql"
	"errors"
	"fmt"
	"net/url"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// Open opens or makes the store in the file path and brings its schema up to
// date.
func Open(path string) (*Store, error) { return OpenAs(SQLite(), path, false) }

// OpenAs is Open with a dialect of SQLite's, for tests. A strict store fails updates that
// change rows which they didn't name.
func OpenAs(d Dialect, path string, strict bool) (*Store, error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return nil, err
	}
	lock, err := exclusive(path + ".lock")
	if err != nil {
		return nil, err
	}
	s, err := openLocked(d, path)
	if err != nil {
		return nil, errors.Join(err, lock.Close())
	}
	if strict {
		s.strict = &strictness{}
	}
	s.lock = lock
	go s.commitLoop()
	s.log.ended = make(chan struct{})
	go s.log.run(s.done)
	return s, nil
}

func openLocked(d Dialect, path string) (*Store, error) {
	// SQLite takes the journal's mode from the database file, so it is made
	// closed to others before SQLite sees it.
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, fmt.Errorf("open store: %w", err)
	}
	_ = f.Close()
	s, err := open(d, path, "rwc")
	if err != nil {
		return nil, err
	}
	if err := s.migrate(); err != nil {
		return nil, errors.Join(fmt.Errorf("store %s: %w", path, err), s.closeDBs())
	}
	// Nobody else has the store open: whoever had claims is gone.
	if _, err := s.writer.Exec(`DELETE FROM claims`); err != nil {
		return nil, errors.Join(fmt.Errorf("store %s: %w", path, err), s.closeDBs())
	}
	return s, nil
}

// exclusive holds a lock for as long as the file is open: two brokers on one
// store would each act on what the other changed. It is a file of its own, since
// closing another descriptor of the database would drop SQLite's own locks.
func exclusive(path string) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, fmt.Errorf("open store: %w", err)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		_ = f.Close()
		return nil, fmt.Errorf("another broker has this store open (%s is locked: %w)", path, err)
	}
	return f, nil
}

// OpenReadOnly opens the store for View alone and never writes to it.
func OpenReadOnly(path string) (*Store, error) {
	if _, err := os.Stat(path); err != nil {
		return nil, err
	}
	s, err := open(SQLite(), path, "ro")
	if err != nil {
		return nil, err
	}
	s.closed = true
	close(s.done)
	if err := s.current(); err != nil {
		return nil, errors.Join(fmt.Errorf("store %s: %w", path, err), s.closeDBs())
	}
	return s, nil
}

// Behind reports whether Open will change the schema of an existing store, which takes
// minutes where it is large.
func Behind(path string) (bool, error) {
	s, err := open(SQLite(), path, "ro")
	if err != nil {
		return false, err
	}
	err = s.current()
	return errors.Is(err, errBehind), s.closeDBs()
}

var errBehind = errors.New("start this version's broker on it once")

// current fails unless the schema is the one that this program knows: who only reads
// can't bring it up to date.
func (s *Store) current() error {
	names, err := s.dialect.versions()
	if err != nil {
		return err
	}
	var have int
	if err := s.readers.QueryRow(`SELECT COALESCE(MAX(version), 0) FROM schema_version`).Scan(&have); err != nil {
		return err
	}
	switch {
	case have > len(names):
		return fmt.Errorf("has schema version %d, this program knows up to %d: use the broker's own version of it", have, len(names))
	case have < len(names):
		return fmt.Errorf("has schema version %d, this program needs %d: %w", have, len(names), errBehind)
	}
	return nil
}

func open(d Dialect, path, mode string) (*Store, error) {
	dsn := (&url.URL{Scheme: "file", Opaque: (&url.URL{Path: path}).EscapedPath()}).String()
	pragmas := "&_pragma=busy_timeout(10000)&_pragma=foreign_keys(1)"
	if mode != "ro" {
		pragmas += fmt.Sprintf("&_pragma=journal_mode(WAL)&_pragma=synchronous(FULL)&_pragma=journal_size_limit(%d)&_pragma=wal_autocheckpoint(0)", keepLog)
	}
	writer, err := openDB(dsn + "?mode=" + mode + pragmas + "&_txlock=immediate")
	if err != nil {
		return nil, err
	}
	writer.SetMaxOpenConns(1)
	readers, err := openDB(dsn + "?mode=" + mode + pragmas)
	if err != nil {
		return nil, errors.Join(err, writer.Close())
	}
	reports, err := openDB(dsn + "?mode=" + mode + pragmas)
	if err != nil {
		return nil, errors.Join(err, writer.Close(), readers.Close())
	}
	copier, err := openDB(dsn + "?mode=" + mode + pragmas)
	if err != nil {
		return nil, errors.Join(err, writer.Close(), readers.Close(), reports.Close())
	}
	for _, db := range []struct {
		*sql.DB
		most int
	}{{readers, viewers}, {reports, reporters}, {copier, 1}} {
		// Kept open: a connection that is opened anew reads the schema first.
		db.SetMaxOpenConns(db.most)
		db.SetMaxIdleConns(db.most)
	}
	if err := writer.Ping(); err != nil {
		return nil, fmt.Errorf("open store %s: %w", path, err)
	}
	return &Store{dialect: d, path: path, owner: rand.Text(), writer: writer, readers: readers, reports: reports, queue: make(chan *update), quit: make(chan struct{}), done: make(chan struct{}), log: newLogKeeper(path+"-wal", writer, copier)}, nil
}
