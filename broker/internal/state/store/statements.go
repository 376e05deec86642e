package store

import (
	"context"
	"database/sql"
	"database/sql/driver"
	"errors"

	"modernc.org/sqlite"
)

// openDB opens a pool of connections that prepare each statement once. Parsing a statement
// takes SQLite longer than running it for a request.
func openDB(dsn string) (*sql.DB, error) {
	c, err := sqlite.NewConnector(dsn)
	if err != nil {
		return nil, err
	}
	return sql.OpenDB(connector{c}), nil
}

type connector struct{ driver.Connector }

func (c connector) Connect(ctx context.Context) (driver.Conn, error) {
	made, err := c.Connector.Connect(ctx)
	if err != nil {
		return nil, err
	}
	conn, ok := made.(sqliteConn)
	if !ok {
		return nil, errors.Join(errors.New("store: this SQLite driver lacks what the store needs of a connection"), made.Close())
	}
	return &preparing{sqliteConn: conn, statements: map[string]*statement{}}, nil
}

// sqliteConn is what the driver's connections can do, as far as it is used here.
type sqliteConn interface {
	driver.Conn
	driver.ConnBeginTx
	driver.ConnPrepareContext
	driver.ExecerContext
	driver.QueryerContext
	driver.SessionResetter
	driver.Validator
	NewBackup(string) (*sqlite.Backup, error)
	RegisterPreUpdateHook(sqlite.PreUpdateHookFn)
}

// mostStatements bounds how many statements a connection keeps. The broker uses about half
// as many. Others are prepared each time.
const mostStatements = 512

// A preparing connection keeps its prepared statements by their text. As with every driver,
// one goroutine at a time uses the connection.
type preparing struct {
	sqliteConn
	statements map[string]*statement
}

// A statement is in use until its rows are closed. Meanwhile the same text is prepared again.
type statement struct {
	driver.Stmt
	exec  driver.StmtExecContext
	query driver.StmtQueryContext
	used  bool
}

// prepared returns the kept statement for the text, or nil if it has to be run without one.
func (c *preparing) prepared(ctx context.Context, text string) (*statement, error) {
	if s, ok := c.statements[text]; ok {
		if s.used {
			return nil, nil
		}
		return s, nil
	}
	if len(c.statements) == mostStatements {
		return nil, nil
	}
	made, err := c.PrepareContext(ctx, text)
	if err != nil {
		return nil, err
	}
	s := &statement{Stmt: made}
	var execs, queries bool
	s.exec, execs = made.(driver.StmtExecContext)
	s.query, queries = made.(driver.StmtQueryContext)
	if !execs || !queries {
		return nil, made.Close()
	}
	c.statements[text] = s
	return s, nil
}

// ExecContext implements driver.ExecerContext.
func (c *preparing) ExecContext(ctx context.Context, text string, args []driver.NamedValue) (driver.Result, error) {
	s, err := c.prepared(ctx, text)
	if err != nil {
		return nil, err
	}
	if s == nil {
		return c.sqliteConn.ExecContext(ctx, text, args)
	}
	return s.exec.ExecContext(ctx, args)
}

// QueryContext implements driver.QueryerContext.
func (c *preparing) QueryContext(ctx context.Context, text string, args []driver.NamedValue) (driver.Rows, error) {
	s, err := c.prepared(ctx, text)
	if err != nil {
		return nil, err
	}
	if s == nil {
		return c.sqliteConn.QueryContext(ctx, text, args)
	}
	rows, err := s.query.QueryContext(ctx, args)
	if err != nil {
		return nil, err
	}
	s.used = true
	return &keptRows{rows, s}, nil
}

// Close implements driver.Conn.
func (c *preparing) Close() error {
	var errs []error
	for _, s := range c.statements {
		errs = append(errs, s.Close())
	}
	return errors.Join(append(errs, c.sqliteConn.Close())...)
}

// keptRows make the statement available again when they are closed.
type keptRows struct {
	driver.Rows
	statement *statement
}

func (r *keptRows) Close() error {
	r.statement.used = false
	return r.Rows.Close()
}
