package audit

import (
	"context"
	"database/sql"
	"encoding/json"
	"errors"
	"log/slog"
	"slices"
	"strings"
	"time"

	"github.com/countersign/countersign/attestors/evidence"
	"github.com/countersign/countersign/broker/api/event"
	"github.com/countersign/countersign/broker/internal/state/store"
)

// RepeatTime is how long events that are equal to one in the log are counted, before the
// log says how many they were.
const RepeatTime = time.Hour

// mostApart is how many events of a host are told apart by what the host itself says.
const mostApart = 64

// AppendOnce writes e like [Append], unless a record that is equal to it was written in the
// last RepeatTime: then it counts e, in a row that the transaction commits and that doesn't
// grow. Equal are events of the same host with the same what and detail. what is one of few
// things for each host; detail may be the host's own word, and once a host has had many
// events recorded its further ones are equal whatever their detail is. The update has to
// name the host.
func AppendOnce(tx *store.Tx, r event.Record, e event.Event, what string, detail ...string) error {
	apart := what + " " + evidence.Sum([]byte(strings.Join(detail, "\x00"))).String()
	rep, err := loadRepeat(tx, r.Host, apart)
	if errors.Is(err, sql.ErrNoRows) {
		var n int
		if err := tx.QueryRow(`SELECT COUNT(*) FROM repeats WHERE host_id = ?`, r.Host).Scan(&n); err != nil {
			return err
		}
		if n >= mostApart {
			rep, err = loadRepeat(tx, r.Host, what)
		} else {
			what = apart
		}
	} else {
		what = apart
	}
	switch {
	case errors.Is(err, sql.ErrNoRows):
	case err != nil:
		return err
	case rep.current(r.Time):
		_, err := tx.Exec(`UPDATE repeats SET n = n + 1, last = ? WHERE host_id = ? AND what = ?`, store.Millis(r.Time), r.Host, what)
		return err
	default:
		if err := rep.settle(tx, r.Time); err != nil {
			return err
		}
	}

	n, err := Append(tx, r, e)
	if err != nil {
		return err
	}
	body, err := json.Marshal(event.Record{Kind: e.Kind(), Actor: r.Actor, Scope: r.Scope, Lease: r.Lease})
	if err != nil {
		return err
	}
	_, err = tx.Exec(`INSERT INTO repeats (host_id, what, record, first, last, n, body) VALUES (?, ?, ?, ?, ?, 0, ?)`,
		r.Host, what, n, store.Millis(r.Time), store.Millis(r.Time), string(body))
	return err
}

// A repeat is a record, and what came since that is equal to it.
type repeat struct {
	host, what  string
	record      int64
	first, last time.Time
	n           int64
	body        event.Record // kind, actor and subject of the record
}

const repeatColumns = `host_id, what, record, first, last, n, body`

func scanRepeat(row store.Row) (p repeat, err error) {
	var first, last int64
	var body string
	if err := row.Scan(&p.host, &p.what, &p.record, &first, &last, &p.n, &body); err != nil {
		return p, err
	}
	p.first, p.last = store.Time(first), store.Time(last)
	return p, json.Unmarshal([]byte(body), &p.body)
}

func loadRepeat(tx *store.Tx, host, what string) (repeat, error) {
	return scanRepeat(tx.QueryRow(`SELECT `+repeatColumns+` FROM repeats WHERE host_id = ? AND what = ?`, host, what))
}

// current reports whether what happens now is counted. A clock that was set back begins anew.
func (p repeat) current(now time.Time) bool {
	return now.Sub(p.first) < RepeatTime && !now.Before(p.first.Add(-time.Minute))
}

// settle writes how often it happened, and forgets it.
func (p repeat) settle(tx *store.Tx, now time.Time) error {
	if p.n > 0 {
		r := event.Record{Time: now, Actor: p.body.Actor, Host: p.host, Scope: p.body.Scope, Lease: p.body.Lease}
		if _, err := Append(tx, r, event.Repeated{Of: p.body.Kind, Record: p.record, Count: p.n, First: p.first, Last: p.last}); err != nil {
			return err
		}
	}
	_, err := tx.Exec(`DELETE FROM repeats WHERE host_id = ? AND what = ?`, p.host, p.what)
	return err
}

const (
	settleEvery = time.Minute
	settlePage  = 100
)

// KeepRepeats settles, until ctx ends, what was counted for RepeatTime.
func KeepRepeats(ctx context.Context, s *store.Store, now func() time.Time, log *slog.Logger) error {
	ticker := time.NewTicker(settleEvery)
	defer ticker.Stop()
	for {
		for {
			n, err := Settle(ctx, s, now())
			if err != nil && ctx.Err() == nil {
				log.Error("audit: what was repeated is not recorded yet", "err", err)
			}
			if err != nil || n < settlePage {
				break
			}
		}
		select {
		case <-ctx.Done():
			return nil
		case <-ticker.C:
		}
	}
}

// Settle writes some of what was counted for RepeatTime, and returns how many.
func Settle(ctx context.Context, s *store.Store, now time.Time) (n int, err error) {
	var due []repeat
	if err := s.View(ctx, func(tx *store.Tx) (err error) {
		due, err = store.Collect(tx, scanRepeat, `SELECT `+repeatColumns+` FROM repeats WHERE first <= ? ORDER BY first LIMIT ?`,
			store.Millis(now.Add(-RepeatTime)), settlePage)
		return err
	}); err != nil || len(due) == 0 {
		return 0, err
	}
	var hosts []string
	for _, p := range due {
		hosts = append(hosts, p.host)
	}
	slices.Sort(hosts)
	return len(due), s.Update(ctx, store.Host(slices.Compact(hosts)...), func(tx *store.Tx) error {
		for _, p := range due {
			// It may have been settled, or counted once more, meanwhile.
			p, err := loadRepeat(tx, p.host, p.what)
			if errors.Is(err, sql.ErrNoRows) || err == nil && p.current(now) {
				continue
			}
			if err == nil {
				err = p.settle(tx, now)
			}
			if err != nil {
				return err
			}
		}
		return nil
	})
}
