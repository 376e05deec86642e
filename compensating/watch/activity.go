package watch

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/countersign/countersign/compensating/sightings"
)

const (
	askEvery = 2 * time.Second
	askLimit = 10 * time.Second
	// maxAsked bounds the sessions of one answer.
	maxAsked = 20_000
)

// ask polls pg_stat_activity until ctx ends, and spools the sessions that are new.
func (s Sensor) ask(ctx context.Context, to *spool, log *slog.Logger) {
	said := ""
	known := map[session]bool{}
	for ctx.Err() == nil {
		err := s.askOn(ctx, to, known)
		if ctx.Err() != nil {
			return
		}
		// An error of the driver's can hold the connection string.
		to.fails(errors.New(plain(err)))
		if words := plain(err); words != said {
			said = words
			log.Warn("sessions can't be asked for", "sensor", s.Name, "err", words)
		}
		select {
		case <-ctx.Done():
		case <-time.After(later):
		}
	}
}

type session struct {
	pid   int
	start time.Time
}

func (s Sensor) askOn(ctx context.Context, to *spool, known map[session]bool) error {
	dsn, err := os.ReadFile(s.DSNFile)
	if err != nil {
		return err
	}
	dial, cancel := context.WithTimeout(ctx, askLimit)
	conn, err := pgx.Connect(dial, strings.TrimSpace(string(dsn)))
	cancel()
	if err != nil {
		return err
	}
	defer func() { _ = conn.Close(context.WithoutCancel(ctx)) }()
	tick := time.NewTicker(askEvery)
	defer tick.Stop()
	for {
		if err := once(ctx, conn, to, known); err != nil {
			return err
		}
		to.works()
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
	}
}

func once(ctx context.Context, conn *pgx.Conn, to *spool, known map[session]bool) error {
	ctx, cancel := context.WithTimeout(ctx, askLimit)
	defer cancel()
	// A session that is still being let in isn't one yet.
	rows, err := conn.Query(ctx, `SELECT pid, backend_start, usename::text, coalesce(datname::text, ''), coalesce(host(client_addr), ''), application_name
		FROM pg_stat_activity WHERE usename IS NOT NULL AND backend_type = 'client backend' AND state IS DISTINCT FROM 'starting' LIMIT $1`, maxAsked)
	if err != nil {
		return err
	}
	defer rows.Close()
	var lines []byte
	here := map[session]bool{}
	for rows.Next() {
		var l sightings.ActivityLine
		var from string
		if err := rows.Scan(&l.PID, &l.Start, &l.User, &l.Database, &from, &l.Program); err != nil {
			return err
		}
		id := session{l.PID, l.Start.UTC()}
		here[id] = true
		if known[id] {
			continue
		}
		if from != "" {
			if l.From, err = netip.ParseAddr(from); err != nil {
				return err
			}
		}
		line, err := json.Marshal(l)
		if err != nil {
			return err
		}
		lines = append(append(lines, line...), '\n')
	}
	if err := rows.Err(); err != nil {
		return err
	}
	if len(lines) > 0 {
		if err := to.write(lines); err != nil {
			return err
		}
	}
	if len(here) >= maxAsked {
		to.turnAway(fmt.Sprintf("there are more than %d sessions, and only so many are asked for", maxAsked))
	}
	clear(known)
	for id := range here {
		known[id] = true
	}
	return nil
}

// plain is an error without what it was made of.
func plain(err error) string {
	var parse *pgconn.ParseConfigError
	switch {
	case err == nil:
		return "the connection ended"
	case errors.As(err, &parse):
		return "the dsn_file holds no connection string"
	}
	return err.Error()
}
