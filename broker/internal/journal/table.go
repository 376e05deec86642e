package journal

import (
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/countersign/countersign/broker/internal/store"
)

// ErrUnknown says that the journal has no such grant.
var ErrUnknown = errors.New("no such lease")

const columns = `id, host_id, scope, kind, state, delivery_id, instance, due, issued, ended, body`

// Save writes g as it is now.
func Save(tx *store.Tx, g Grant) error {
	body, err := json.Marshal(g)
	if err != nil {
		return err
	}
	_, err = tx.Exec(`INSERT INTO grants (`+columns+`) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
		ON CONFLICT (id) DO UPDATE SET state = excluded.state, instance = excluded.instance,
		due = excluded.due, ended = excluded.ended, body = excluded.body`,
		g.ID, g.Host, g.Scope, g.Kind, string(g.State), g.DeliveryID, g.Instance,
		store.Millis(g.Due), store.Millis(g.Issued), store.Millis(g.Ended), body)
	return err
}

// Load reads one grant.
func Load(tx *store.Tx, id string) (Grant, error) {
	g, err := scan(tx.QueryRow(`SELECT `+columns+` FROM grants WHERE id = ?`, id))
	if errors.Is(err, sql.ErrNoRows) {
		return g, fmt.Errorf("%w: %s", ErrUnknown, id)
	}
	return g, err
}

func scan(row store.Row) (Grant, error) {
	var g Grant
	var id, host, scope, kind, state, delivery, instance string
	var due, issued, ended int64
	var body []byte
	if err := row.Scan(&id, &host, &scope, &kind, &state, &delivery, &instance, &due, &issued, &ended, &body); err != nil {
		return g, err
	}
	if err := json.Unmarshal(body, &g); err != nil {
		return g, fmt.Errorf("grant %s: %w", id, err)
	}
	g.ID, g.Host, g.Scope, g.Kind, g.State = id, host, scope, kind, State(state)
	g.DeliveryID, g.Instance = delivery, instance
	g.Due, g.Issued, g.Ended = store.Time(due), store.Time(issued), store.Time(ended)
	return g, nil
}

// A Filter selects grants; empty fields select all.
type Filter struct {
	Host, Scope, Delivery string
	Instance              *string // nil: of any; empty: those for a coming one
	States                []State
	After                 string    // ids above this
	DueBy                 time.Time // with a Due at or before this
	Limit                 int
}

// Unended are the states of credentials that may still work.
var Unended = []State{Intended, Provisional, Live, Retiring, Revoking}

// query is f in SQL.
func (f Filter) query() (query string, args []any) {
	var where []string
	add := func(clause string, values ...any) {
		where = append(where, clause)
		args = append(args, values...)
	}
	if f.Host != "" {
		add(`host_id = ?`, f.Host)
	}
	if f.Scope != "" {
		add(`scope = ?`, f.Scope)
	}
	if f.Delivery != "" {
		add(`delivery_id = ?`, f.Delivery)
	}
	if f.Instance != nil {
		add(`instance = ?`, *f.Instance)
	}
	if f.After != "" {
		add(`id > ?`, f.After)
	}
	if len(f.States) > 0 {
		marks := strings.TrimSuffix(strings.Repeat("?, ", len(f.States)), ", ")
		where = append(where, `state IN (`+marks+`)`)
		for _, s := range f.States {
			args = append(args, string(s))
		}
	}
	order := `id`
	if !f.DueBy.IsZero() {
		add(`due > 0 AND due <= ?`, store.Millis(f.DueBy))
		order = `due`
	}
	query = `SELECT ` + columns + ` FROM grants`
	if len(where) > 0 {
		query += ` WHERE ` + strings.Join(where, ` AND `)
	}
	query += ` ORDER BY ` + order
	if f.Limit > 0 {
		query += ` LIMIT ?`
		args = append(args, f.Limit)
	}
	return query, args
}

// List reads grants by id, or by due time where DueBy is set.
func List(tx *store.Tx, f Filter) ([]Grant, error) {
	query, args := f.query()
	return store.Collect(tx, scan, query, args...)
}

// CountUnended is how many grants of a host may still work.
func CountUnended(tx *store.Tx, host string) (n int, err error) {
	err = tx.QueryRow(`SELECT COUNT(*) FROM grants WHERE host_id = ? AND state <> ?`, host, string(Gone)).Scan(&n)
	return n, err
}

// NextDue is the earliest Due of all grants, zero where none has one.
func NextDue(tx *store.Tx) (time.Time, error) {
	var ms sql.NullInt64
	err := tx.QueryRow(`SELECT MIN(due) FROM grants WHERE due > 0`).Scan(&ms)
	return store.Time(ms.Int64), err
}
