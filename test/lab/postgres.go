package lab

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/url"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/jackc/pgx/v5"
)

// LogLinePrefix is the log_line_prefix of the lab's PostgreSQL. Its times are UTC.
const LogLinePrefix = "%m [%p] user=%u db=%d app=%a client=%h "

// Postgres is a running PostgreSQL on 127.0.0.1 that takes SCRAM passwords only
// and logs connections and disconnections.
type Postgres struct {
	Port     int
	User     string // the superuser, for Vault's database engine
	Password string
	Log      string

	bin, data string
	settings  []string
	env       []string
	process   *process
}

// StartPostgres makes a cluster and starts it on a free port. Each setting is one
// of PostgreSQL's, as "max_connections=20". The log goes to dir; the data lies in
// a temporary directory of its own, because PostgreSQL refuses to be root and
// its user couldn't reach a directory of root's. Close removes it.
func StartPostgres(ctx context.Context, dir string, settings ...string) (*Postgres, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	initdb, err := findInitdb()
	if err != nil {
		return nil, err
	}
	addr, err := freeAddr()
	if err != nil {
		return nil, err
	}
	_, port, err := net.SplitHostPort(addr)
	if err != nil {
		return nil, err
	}
	pg := &Postgres{
		User:     "vault",
		Password: newPassword(),
		Log:      filepath.Join(dir, "postgres.log"),
		bin:      filepath.Dir(initdb),
		settings: settings,
	}
	if pg.Port, err = strconv.Atoi(port); err != nil {
		return nil, err
	}
	if pg.data, err = os.MkdirTemp("", "countersign-postgres-"); err != nil {
		return nil, err
	}
	if err = pg.initdb(ctx); err == nil {
		err = pg.Start(ctx)
	}
	if err != nil {
		return nil, errors.Join(err, os.RemoveAll(pg.data))
	}
	return pg, nil
}

// initdb makes the cluster, with the superuser's password.
func (pg *Postgres) initdb(ctx context.Context) error {
	cred, err := postgresCredential()
	if err != nil {
		return err
	}
	password := filepath.Join(pg.data, "password")
	if err := os.WriteFile(password, []byte(pg.Password+"\n"), 0o600); err != nil {
		return err
	}
	// From any address: tests give clients some of their own.
	hba := filepath.Join(pg.data, "pg_hba.conf")
	if err := os.WriteFile(hba, []byte("host all all all scram-sha-256\n"), 0o600); err != nil {
		return err
	}
	if cred != nil {
		for _, name := range []string{pg.data, password, hba} {
			if err := os.Chown(name, int(cred.Uid), int(cred.Gid)); err != nil {
				return err
			}
		}
	}
	cmd := exec.Command(filepath.Join(pg.bin, "initdb"), "--pgdata", filepath.Join(pg.data, "cluster"), "--username", pg.User,
		"--pwfile", password, "--auth", "scram-sha-256", "--encoding", "UTF8", "--no-locale", "--no-sync")
	cmd.Dir, cmd.Env = "/", append(os.Environ(), "LC_ALL=C")
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: cred}
	p, err := startProcess(cmd, pg.Log, syscall.SIGKILL)
	if err != nil {
		return err
	}
	select {
	case <-p.ended:
	case <-ctx.Done():
		return errors.Join(ctx.Err(), p.stop(syscall.SIGTERM))
	}
	if p.err != nil {
		return fmt.Errorf("initdb: %w; it says:\n%s", p.err, p.tail())
	}
	return os.Remove(password)
}

// Start starts a stopped PostgreSQL again on the same port and data.
func (pg *Postgres) Start(ctx context.Context) error {
	cred, err := postgresCredential()
	if err != nil {
		return err
	}
	args := []string{"-D", filepath.Join(pg.data, "cluster")}
	for _, setting := range append([]string{
		"listen_addresses=127.0.0.1",
		"port=" + strconv.Itoa(pg.Port),
		"unix_socket_directories=",
		"hba_file=" + filepath.Join(pg.data, "pg_hba.conf"),
		"fsync=off",
		"log_connections=on",
		"log_disconnections=on",
		"log_line_prefix=" + LogLinePrefix,
		"log_timezone=UTC",
		"log_min_error_statement=panic", // a failed CREATE ROLE names its password
	}, pg.settings...) {
		args = append(args, "-c", setting)
	}
	cmd := exec.Command(filepath.Join(pg.bin, "postgres"), args...)
	cmd.Dir, cmd.Env = "/", append(append(os.Environ(), "LC_ALL=C"), pg.env...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: cred}
	if pg.process, err = startProcess(cmd, pg.Log, syscall.SIGQUIT); err != nil {
		return err
	}
	err = pg.process.await(ctx, func(ctx context.Context) error {
		conn, err := pgx.Connect(ctx, pg.DSN(pg.User, pg.Password, "postgres"))
		if err != nil {
			return err
		}
		return conn.Close(ctx)
	})
	if err != nil {
		return errors.Join(err, pg.Stop())
	}
	return nil
}

// SetClockOff starts it again on a machine whose clock is off by d.
func (pg *Postgres) SetClockOff(ctx context.Context, d time.Duration) error {
	library, err := filepath.Glob("/usr/lib/*/faketime/libfaketime.so.1")
	if err != nil || len(library) != 1 {
		return errors.New("no libfaketime: install libfaketime, or run test/setup.sh")
	}
	pg.env = []string{"LD_PRELOAD=" + library[0], fmt.Sprintf("FAKETIME=%+ds", int(d.Seconds())), "FAKETIME_DONT_FAKE_MONOTONIC=1"}
	if err := pg.Stop(); err != nil {
		return err
	}
	return pg.Start(ctx)
}

// Stop ends it, with its sessions; the data stays. Stopping twice is no error.
func (pg *Postgres) Stop() error { return pg.process.stop(syscall.SIGINT) }

// Close stops it and removes its data.
func (pg *Postgres) Close() error { return errors.Join(pg.Stop(), os.RemoveAll(pg.data)) }

// DSN returns the connection URL of user in database.
func (pg *Postgres) DSN(user, password, database string) string {
	u := url.URL{
		Scheme:   "postgres",
		User:     url.UserPassword(user, password),
		Host:     net.JoinHostPort("127.0.0.1", strconv.Itoa(pg.Port)),
		Path:     database,
		RawQuery: "sslmode=disable",
	}
	return u.String()
}

// Exec runs statements as the superuser in database.
func (pg *Postgres) Exec(ctx context.Context, database, sql string) error {
	return pg.as(ctx, database, func(conn *pgx.Conn) error {
		_, err := conn.PgConn().Exec(ctx, sql).ReadAll()
		return err
	})
}

// Query returns the first column of a query's rows, asked as the superuser in
// database.
func (pg *Postgres) Query(ctx context.Context, database, sql string, args ...any) (values []string, err error) {
	err = pg.as(ctx, database, func(conn *pgx.Conn) error {
		rows, err := conn.Query(ctx, sql, args...)
		if err != nil {
			return err
		}
		values, err = pgx.CollectRows(rows, func(row pgx.CollectableRow) (string, error) {
			v, err := row.Values()
			if err != nil {
				return "", err
			}
			return fmt.Sprint(v[0]), nil
		})
		return err
	})
	return values, err
}

func (pg *Postgres) as(ctx context.Context, database string, f func(*pgx.Conn) error) error {
	conn, err := pgx.Connect(ctx, pg.DSN(pg.User, pg.Password, database))
	if err != nil {
		return err
	}
	return errors.Join(f(conn), conn.Close(ctx))
}

// postgresCredential returns the user to run as: postgres, if we are root.
func postgresCredential() (*syscall.Credential, error) {
	if os.Geteuid() != 0 {
		return nil, nil
	}
	u, err := user.Lookup("postgres")
	if err != nil {
		return nil, fmt.Errorf("%w: install postgresql", err)
	}
	uid, err := strconv.ParseUint(u.Uid, 10, 32)
	if err != nil {
		return nil, err
	}
	gid, err := strconv.ParseUint(u.Gid, 10, 32)
	if err != nil {
		return nil, err
	}
	return &syscall.Credential{Uid: uint32(uid), Gid: uint32(gid)}, nil
}

// findInitdb looks in PATH, and in Debian's folder for the newest version.
func findInitdb() (string, error) {
	if name, err := exec.LookPath("initdb"); err == nil {
		return filepath.EvalSymlinks(name)
	}
	names, err := filepath.Glob("/usr/lib/postgresql/*/bin/initdb")
	if err != nil {
		return "", err
	}
	newest, version := "", -1
	for _, name := range names {
		if v, err := strconv.Atoi(strings.Split(name, "/")[4]); err == nil && v > version {
			newest, version = name, v
		}
	}
	if newest == "" {
		return "", errors.New("no initdb: install postgresql, or run test/setup.sh")
	}
	return newest, nil
}

// TakeConnections leaves nobody else a connection, Vault neither, until release.
func (pg *Postgres) TakeConnections(ctx context.Context) (release func(), err error) {
	var held []*pgx.Conn
	release = func() {
		for _, conn := range held {
			_ = conn.Close(ctx)
		}
	}
	take := func() {
		for {
			conn, err := pgx.Connect(ctx, pg.DSN(pg.User, pg.Password, "postgres"))
			if err != nil {
				return
			}
			held = append(held, conn)
		}
	}
	if take(); len(held) == 0 {
		return nil, errors.New("no connection is left to take")
	}
	mine := make([]int32, len(held))
	for n, conn := range held {
		mine[n] = int32(conn.PgConn().PID())
	}
	for others := 1; others > 0; {
		if err := held[0].QueryRow(ctx, `SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity
			WHERE backend_type = 'client backend' AND NOT pid = ANY($1)`, mine).Scan(&others); err != nil {
			release()
			return nil, err
		}
	}
	take()
	return release, nil
}
