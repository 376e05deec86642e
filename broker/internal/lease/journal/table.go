package journal

import (
	"cmp"
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/countersign/countersign/broker/internal/state/denials"
	"github.com/countersign/countersign/broker/internal/state/store"
)

// ErrUnknown says that the journal has no such lease.
var ErrUnknown = errors.New("no such lease")

// ErrUnreadable is returned for a lease whose row holds what no broker wrote.
var ErrUnreadable = errors.New("the lease's row can't be read")

const columns = `id, host_id, scope, kind, state, delivery_id, instance, due, issued, ended, body`

// Save writes g as it is now. A lease that is revoked before its ticket ends goes to the
// denial log.
func Save(tx *store.Tx, g Lease) error {
	if g.Unreadable != nil {
		return g.Unreadable
	}
	body, err := json.Marshal(g)
	if err != nil {
		return err
	}
	_, err = tx.Exec(`INSERT INTO grants (`+columns+`) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
		ON CONFLICT (id) DO UPDATE SET state = excluded.state, instance = excluded.instance,
		due = excluded.due, ended = excluded.ended, body = excluded.body`,
		g.ID, g.Host, g.Scope, g.Kind, string(g.State), g.DeliveryID, g.Instance,
		store.Millis(g.Due), store.Millis(g.Issued), store.Millis(g.Ended), body)
	if until := g.TicketEnd(); err == nil && (g.State == Revoking || g.State == Gone && g.Ended.Before(until)) {
		err = denials.Set(tx, denials.Denial{Kind: denials.Lease, Name: g.ID, Until: until})
	}
	return err
}

// TicketEnd returns when the lease's ticket ends, by which its host brings it back after a
// restore.
func (g Lease) TicketEnd() time.Time { return g.Issued.Add(g.TTL) }

// Load reads one lease.
func Load(tx *store.Tx, id string) (Lease, error) {
	g, err := scan(tx.QueryRow(`SELECT `+columns+` FROM grants WHERE id = ?`, id))
	if errors.Is(err, sql.ErrNoRows) {
		return g, fmt.Errorf("%w: %s", ErrUnknown, id)
	}
	return g, cmp.Or(err, g.Unreadable)
}

func scan(row store.Row) (Lease, error) {
	var g Lease
	var id, host, scope, kind, state, delivery, instance string
	var due, issued, ended int64
	var body []byte
	if err := row.Scan(&id, &host, &scope, &kind, &state, &delivery, &instance, &due, &issued, &ended, &body); err != nil {
		return g, err
	}
	if err := json.Unmarshal(body, &g); err != nil {
		g = Lease{Unreadable: fmt.Errorf("%w: %s: %w", ErrUnreadable, id, err)}
	}
	g.ID, g.Host, g.Scope, g.Kind, g.State = id, host, scope, kind, State(state)
	g.DeliveryID, g.Instance = delivery, instance
	g.Due, g.Issued, g.Ended = store.Time(due), store.Time(issued), store.Time(ended)
	return g, nil
}

// A Filter selects leases; empty fields select all.
type Filter struct {
	Host, Scope, Delivery string
	Instance              *string // nil: of any; empty: those for a coming one
	States                []State
	Newest                bool   // the newest first; else the oldest
	After                 Cursor // those behind it, in that order
	Limit                 int

	places bool // only where each is
}

// A Cursor is a lease's place in a list, from Lease.Cursor; zero: before the first.
type Cursor struct {
	Issued int64 // Unix milliseconds
	ID     string
}

// Cursor is where a list goes on behind g.
func (g Lease) Cursor() Cursor { return Cursor{store.Millis(g.Issued), g.ID} }

// String is the cursor for the wire; ParseCursor reads it.
func (c Cursor) String() string {
	if c == (Cursor{}) {
		return ""
	}
	return strconv.FormatInt(c.Issued, 10) + "." + c.ID
}

// ParseCursor reads what String wrote.
func ParseCursor(s string) (Cursor, error) {
	if s == "" {
		return Cursor{}, nil
	}
	ms, id, ok := strings.Cut(s, ".")
	issued, err := strconv.ParseInt(ms, 10, 64)
	if err != nil || !ok || id == "" {
		return Cursor{}, fmt.Errorf("%.80q is no place in a list of leases: begin again without it", s)
	}
	return Cursor{issued, id}, nil
}

// Unended are the states of credentials that may still work.
var Unended = []State{Intended, Provisional, Live, Retiring, Revoking}

// query is f in SQL. Each form of it goes by an index, which a test holds.
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
	f.states(add)
	order, behind := `ASC`, `>`
	if f.Newest {
		order, behind = `DESC`, `<`
	}
	// What may still work of one host is little: it is found first, and put in order
	// then. The plus keeps SQLite from reading all that the host ever had, in order.
	plus := ``
	if f.Host != "" && len(f.States) > 0 && !slices.Contains(f.States, Gone) {
		plus = `+`
	}
	if f.After != (Cursor{}) {
		add(`(`+plus+`issued, `+plus+`id) `+behind+` (?, ?)`, f.After.Issued, f.After.ID)
	}
	query = `SELECT ` + f.what() + ` FROM grants`
	if len(where) > 0 {
		query += ` WHERE ` + strings.Join(where, ` AND `)
	}
	query += ` ORDER BY ` + plus + `issued ` + order + `, ` + plus + `id ` + order
	if f.Limit > 0 {
		query += ` LIMIT ?`
		args = append(args, f.Limit)
	}
	return query, args
}

func (f Filter) what() string {
	if f.places {
		return `issued, id`
	}
	return columns
}

// states adds the clause for f.States: the words of the partial indexes, so that
// SQLite sees which of them has all that is asked for.
func (f Filter) states(add func(string, ...any)) {
	if len(f.States) == 0 {
		return
	}
	if len(f.States) == 1 && f.States[0] == Gone {
		add(`state = 'gone'`)
		return
	}
	if !slices.Contains(f.States, Gone) {
		add(`state <> 'gone'`)
		if len(f.States) == len(Unended) {
			return
		}
	}
	var args []any
	for _, s := range f.States {
		args = append(args, string(s))
	}
	if len(args) == 1 {
		add(`state = ?`, args...)
		return
	}
	// The plus keeps SQLite from merging as many lists, of which each is read whole.
	add(`+state IN (`+strings.TrimSuffix(strings.Repeat("?, ", len(args)), ", ")+`)`, args...)
}

// List reads leases by the time of issue, those that are unreadable among them.
func List(tx *store.Tx, f Filter) ([]Lease, error) {
	query, args := f.query()
	return store.Collect(tx, scan, query, args...)
}

// Cursors reads where the leases are that List would read, without their bodies.
func Cursors(tx *store.Tx, f Filter) ([]Cursor, error) {
	f.places = true
	query, args := f.query()
	return store.Collect(tx, func(row store.Row) (c Cursor, err error) {
		err = row.Scan(&c.Issued, &c.ID)
		return c, err
	}, query, args...)
}

// CountUnended is how many leases of a host may still work.
func CountUnended(tx *store.Tx, host string) (n int, err error) {
	err = tx.QueryRow(`SELECT COUNT(*) FROM grants WHERE host_id = ? AND state <> 'gone'`, host).Scan(&n)
	return n, err
}

// Due returns the ids of at most limit leases of a kind whose Due has come, the
// longest due first.
func Due(tx *store.Tx, kind string, now time.Time, limit int) ([]string, error) {
	return store.Collect(tx, func(row store.Row) (id string, err error) {
		err = row.Scan(&id)
		return id, err
	}, `SELECT id FROM grants WHERE kind = ? AND due > 0 AND due <= ? ORDER BY due LIMIT ?`, kind, store.Millis(now), limit)
}

// NextDue is the earliest Due of a kind's leases, zero where none has one.
func NextDue(tx *store.Tx, kind string) (time.Time, error) {
	var ms sql.NullInt64
	err := tx.QueryRow(`SELECT MIN(due) FROM grants WHERE kind = ? AND due > 0`, kind).Scan(&ms)
	return store.Time(ms.Int64), err
}

// Overdue counts the leases of a kind that were due at t or before, and returns the
// earliest of their times; zero without any.
func Overdue(tx *store.Tx, kind string, t time.Time) (n uint64, oldest time.Time, err error) {
	var ms sql.NullInt64
	err = tx.QueryRow(`SELECT COUNT(*), MIN(due) FROM grants WHERE kind = ? AND due > 0 AND due <= ?`, kind, store.Millis(t)).Scan(&n, &ms)
	return n, store.Time(ms.Int64), err
}

// Forgettable looks at limit leases behind after, by the time of issue, and returns the
// ids of those that ended at t or before, and whose ticket did: by a ticket a lease comes
// back that the journal doesn't know. One that can't be read is passed over. Next is where
// to go on, zero at the end.
func Forgettable(tx *store.Tx, t time.Time, after Cursor, limit int) (ids []string, next Cursor, err error) {
	n := 0
	err = tx.Each(func(row store.Row) error {
		var ended int64       // in milliseconds
		var ttl sql.NullInt64 // in nanoseconds; null: unreadable
		if err := row.Scan(&next.Issued, &next.ID, &ended, &ttl); err != nil {
			return err
		}
		n++
		if expires := store.Time(next.Issued).Add(time.Duration(ttl.Int64)); ttl.Valid && !store.Time(ended).After(t) && !expires.After(t) {
			ids = append(ids, next.ID)
		}
		return nil
	}, `SELECT issued, id, ended,
		CASE json_valid(body) WHEN 1 THEN CASE json_type(body, '$.ttl') WHEN 'integer' THEN json_extract(body, '$.ttl') END END FROM grants
		WHERE state = 'gone' AND (issued, id) > (?, ?) AND issued <= ? ORDER BY issued, id LIMIT ?`, after.Issued, after.ID, store.Millis(t), limit)
	if n < limit {
		next = Cursor{}
	}
	return ids, next, err
}

// Forget deletes leases. The audit log has what they were.
func Forget(tx *store.Tx, ids []string) error {
	for _, id := range ids {
		if _, err := tx.Exec(`DELETE FROM grants WHERE id = ? AND state = 'gone'`, id); err != nil {
			return err
		}
	}
	return nil
}
