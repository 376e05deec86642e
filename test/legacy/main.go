// Command legacy is a program as it was written long ago: it reads a user name
// and a password from a properties file, connects to PostgreSQL through a pool
// and knows nothing else. On SIGHUP it reads the file again and makes a new
// pool; the old one drains.
//
// It writes one JSON line a second to -status, and the last one when it ends.
package main

import (
	"bufio"
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"net"
	"net/url"
	"os"
	"os/signal"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"
)

type status struct {
	User    string `json:"user"` // as PostgreSQL sees it
	Queries int64  `json:"queries"`
	Failed  int64  `json:"failed"`
	Pools   int    `json:"pools"` // made so far
	Error   string `json:"error,omitempty"`
}

func main() {
	file := flag.String("file", "", "properties file with user and password")
	host := flag.String("host", "127.0.0.1", "of PostgreSQL")
	port := flag.Int("port", 5432, "of PostgreSQL")
	database := flag.String("database", "", "of PostgreSQL")
	out := flag.String("status", "", "file for status lines")
	flag.Parse()
	if err := run(*file, net.JoinHostPort(*host, fmt.Sprint(*port)), *database, *out); err != nil {
		fmt.Fprintln(os.Stderr, "legacy:", err)
		os.Exit(1)
	}
}

func run(file, address, database, out string) error {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, os.Interrupt)
	defer stop()
	hup := make(chan os.Signal, 1)
	signal.Notify(hup, syscall.SIGHUP)

	var st status
	var current atomic.Pointer[pgxpool.Pool]
	open := func() error {
		user, password, err := read(file)
		if err != nil {
			return err
		}
		u := url.URL{Scheme: "postgres", User: url.UserPassword(user, password), Host: address, Path: database, RawQuery: "pool_max_conns=4"}
		pool, err := pgxpool.New(ctx, u.String())
		if err != nil {
			return err
		}
		if old := current.Swap(pool); old != nil {
			go old.Close() // waits for the queries that run on it
		}
		st.Pools++
		return nil
	}
	for open() != nil { // the file comes when it comes
		select {
		case <-ctx.Done():
			return nil
		case <-hup:
		case <-time.After(200 * time.Millisecond):
		}
	}
	query := time.NewTicker(20 * time.Millisecond)
	defer query.Stop()
	report := time.NewTicker(time.Second)
	defer report.Stop()
	for {
		select {
		case <-ctx.Done():
			return write(out, st)
		case <-hup:
			if err := open(); err != nil {
				st.Error = err.Error()
			}
		case <-report.C:
			if err := write(out, st); err != nil {
				return err
			}
		case <-query.C:
			var sum int
			st.Queries++
			if err := current.Load().QueryRow(ctx, "SELECT session_user, sum(amount) FROM invoices GROUP BY 1").Scan(&st.User, &sum); err != nil && ctx.Err() == nil {
				st.Failed++
				st.Error = err.Error()
			}
		}
	}
}

func read(file string) (user, password string, err error) {
	f, err := os.Open(file)
	if err != nil {
		return "", "", err
	}
	defer func() { _ = f.Close() }()
	s := bufio.NewScanner(f)
	for s.Scan() {
		key, value, _ := strings.Cut(s.Text(), "=")
		switch key {
		case "user":
			user = value
		case "password":
			password = value
		}
	}
	return user, password, s.Err()
}

func write(out string, st status) error {
	f, err := os.OpenFile(out, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	if err := json.NewEncoder(f).Encode(st); err != nil {
		_ = f.Close()
		return err
	}
	return f.Close()
}
