package store

import (
	"embed"
	"fmt"
	"io/fs"
	"slices"
)

// A Dialect is what differs between databases. The broker's statements use ? placeholders
// and, as far as possible, SQL that databases have in common. A test lists the statements
// that only SQLite understands.
type Dialect struct {
	Migrations fs.FS               // NNNN_name.sql, in the order of their names
	Bind       func(string) string // rewrites the placeholders; nil if they are ?
	Begin      string              // begins a transaction that writes
}

//go:embed sqlite/migrations/*.sql
var sqliteMigrations embed.FS

// SQLite returns the dialect that Open uses.
func SQLite() Dialect {
	migrations, err := fs.Sub(sqliteMigrations, "sqlite/migrations")
	if err != nil {
		panic(err) // it is embedded
	}
	return Dialect{Migrations: migrations, Begin: `BEGIN IMMEDIATE`}
}

func (d Dialect) bind(statement string) string {
	if d.Bind == nil {
		return statement
	}
	return d.Bind(statement)
}

// versions are the names of the migrations, in order.
func (d Dialect) versions() ([]string, error) {
	names, err := fs.Glob(d.Migrations, "*.sql")
	slices.Sort(names)
	return names, err
}

// migrate brings the schema up to date.
func (s *Store) migrate() error {
	names, err := s.dialect.versions()
	if err != nil {
		return err
	}
	tx, err := s.writer.Begin()
	if err != nil {
		return err
	}
	defer func() { _ = tx.Rollback() }()
	if _, err := tx.Exec(`CREATE TABLE IF NOT EXISTS schema_version (version INTEGER NOT NULL)`); err != nil {
		return err
	}
	var have int
	if err := tx.QueryRow(`SELECT COALESCE(MAX(version), 0) FROM schema_version`).Scan(&have); err != nil {
		return err
	}
	if have > len(names) {
		return fmt.Errorf("has schema version %d, this broker knows up to %d: run the newer broker", have, len(names))
	}
	for i, name := range names[have:] {
		text, err := fs.ReadFile(s.dialect.Migrations, name)
		if err != nil {
			return err
		}
		if _, err := tx.Exec(string(text)); err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
		if _, err := tx.Exec(s.dialect.bind(`INSERT INTO schema_version (version) VALUES (?)`), have+i+1); err != nil {
			return err
		}
	}
	return tx.Commit()
}
