package store

import (
	"context"
	"database/sql"
	"reflect"
)

// A Tx is one caller's part of a transaction. Its statements are portable SQL
// with ? placeholders.
type Tx struct {
	ctx    context.Context // interrupts statements of a Report; else never done
	conn   *sql.Conn
	store  *Store
	rows   Rows // that the Update named so far
	writes bool // it is an Update's
	follow bool // AfterCommit's function is to run
}

// Follow has AfterCommit's function run once this update is on disk.
func (t *Tx) Follow() { t.follow = true }

// Also names more rows that the update changes, if they are known only inside it.
func (t *Tx) Also(rows Rows) error {
	t.rows = t.rows.And(rows)
	return advance(t, rows)
}

// Beside returns the process's only value of type T for this store, which is zero at first.
// All transactions share it. A rollback doesn't reset it and other processes don't see it,
// so a cache that is kept there has to be checked against the store in each transaction.
func Beside[T any](t *Tx) *T {
	key := reflect.TypeFor[T]()
	if v, ok := t.store.beside.Load(key); ok {
		return v.(*T)
	}
	v, _ := t.store.beside.LoadOrStore(key, new(T))
	return v.(*T)
}

// Exec runs a statement that returns no rows.
func (t *Tx) Exec(query string, args ...any) (sql.Result, error) {
	return t.conn.ExecContext(t.ctx, t.store.dialect.bind(query), args...)
}

// QueryRow reads at most one row. The query runs when the row is scanned, so that a row that
// is never scanned doesn't occupy the connection.
func (t *Tx) QueryRow(query string, args ...any) Row { return oneRow{t, query, args} }

// A Row is one that is being read: of a query, or of QueryRow.
type Row interface{ Scan(...any) error }

type oneRow struct {
	tx    *Tx
	query string
	args  []any
}

func (r oneRow) Scan(into ...any) error {
	return r.tx.conn.QueryRowContext(r.tx.ctx, r.tx.store.dialect.bind(r.query), r.args...).Scan(into...)
}

// Each reads every row of a query.
func (t *Tx) Each(read func(Row) error, query string, args ...any) error {
	rows, err := t.conn.QueryContext(t.ctx, t.store.dialect.bind(query), args...)
	if err != nil {
		return err
	}
	defer func() { _ = rows.Close() }()
	for rows.Next() {
		if err := read(rows); err != nil {
			return err
		}
	}
	return rows.Err()
}

// Collect reads the rows of a query into a list.
func Collect[T any](t *Tx, read func(Row) (T, error), query string, args ...any) (list []T, err error) {
	err = t.Each(func(r Row) error {
		one, err := read(r)
		list = append(list, one)
		return err
	}, query, args...)
	if err != nil {
		return nil, err
	}
	return list, nil
}
