package findings

import (
	"cmp"
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"strings"
	"time"

	"github.com/countersign/countersign/broker/internal/state/inventory"
	"github.com/countersign/countersign/broker/internal/state/store"
)

// ErrUnknown says that there is no such finding.
var ErrUnknown = errors.New("no such finding")

// ErrUnreadable is returned for a finding whose row holds what no broker wrote.
var ErrUnreadable = errors.New("the finding's row can't be read")

const columns = `id, detector, cause_key, severity, lease, host_id, scope, account, status, opened, first, last, count, body`

// An Outcome is what a report did.
type Outcome int

const (
	Known    Outcome = iota // nothing that was not known to be going on
	New                     // its cause was never reported before
	Reopened                // it was closed, and happened again
)

// Report enters what the watch says of a cause, in place of what it said before.
func Report(tx *store.Tx, r Finding, now time.Time) (Finding, Outcome, error) {
	f, err := one(tx, `SELECT `+columns+` FROM findings WHERE detector = ? AND cause_key = ?`, r.Detector, r.Cause)
	outcome := Known
	if errors.Is(err, ErrUnknown) {
		f, outcome = Finding{ID: inventory.NewID(), Status: Open}, New
	} else if err != nil {
		return f, Known, err
	}
	f, again := reported(f, r, now)
	if again {
		outcome = Reopened
	}
	if outcome != Known {
		n, err := count(tx, Open)
		if err != nil {
			return f, Known, err
		}
		if n >= maxOpen {
			return f, Known, ErrFull
		}
		if err := prune(tx, now); err != nil {
			return f, Known, err
		}
		if err := tx.QueryRow(`SELECT COALESCE(MAX(opened), 0) + 1 FROM findings`).Scan(&f.Opened); err != nil {
			return f, Known, err
		}
	}
	return f, outcome, save(tx, f)
}

// count is how many there are of a status.
func count(tx *store.Tx, s Status) (n int, err error) {
	err = tx.QueryRow(`SELECT COALESCE(SUM(n), 0) FROM counts WHERE topic = ?`, "findings "+string(s)).Scan(&n)
	return n, err
}

// pruned is how many findings are looked at for room.
const pruned = 100

// prune forgets closed findings, the oldest first, once as many are kept as may be open;
// the audit log has them. One that is closed until a time to come stays.
func prune(tx *store.Tx, now time.Time) error {
	if n, err := count(tx, Closed); err != nil || n < maxOpen {
		return err
	}
	after := int64(0)
	for gone := 0; gone == 0; {
		old, err := List(tx, Filter{Status: Closed, After: after, Limit: pruned})
		if err != nil || len(old) == 0 {
			return err
		}
		for _, f := range old {
			if after = f.Opened; f.Unreadable != nil || f.Until.After(now) {
				continue
			}
			if _, err := tx.Exec(`DELETE FROM findings WHERE id = ?`, f.ID); err != nil {
				return err
			}
			gone++
		}
	}
	return nil
}

// Close closes a finding, or says anew why it is closed.
func Close(tx *store.Tx, id, by, reason string, until, now time.Time) (Finding, error) {
	f, err := Load(tx, id)
	if err != nil {
		return f, err
	}
	f.Status, f.Closed, f.ClosedBy, f.Reason, f.Until, f.Over = Closed, now, by, reason, until, false
	return f, save(tx, f)
}

// Settle closes a finding by evidence: what was seen of it until now is over.
func Settle(tx *store.Tx, f Finding, by, reason string, now time.Time) (Finding, error) {
	f.Status, f.Closed, f.ClosedBy, f.Reason, f.Until, f.Over = Closed, now, by, reason, time.Time{}, true
	return f, save(tx, f)
}

func save(tx *store.Tx, f Finding) error {
	body, err := json.Marshal(f)
	if err != nil {
		return err
	}
	_, err = tx.Exec(`INSERT INTO findings (`+columns+`) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
		ON CONFLICT (id) DO UPDATE SET severity = excluded.severity, lease = excluded.lease, host_id = excluded.host_id, scope = excluded.scope,
		account = excluded.account, status = excluded.status, opened = excluded.opened, first = excluded.first, last = excluded.last,
		count = excluded.count, body = excluded.body`,
		f.ID, f.Detector, f.Cause, string(f.Severity), f.Lease, f.Host, f.Scope, f.Account, string(f.Status), f.Opened,
		store.Millis(f.First), store.Millis(f.Last), f.Count, string(body))
	return err
}

// Load reads one finding.
func Load(tx *store.Tx, id string) (Finding, error) {
	return one(tx, `SELECT `+columns+` FROM findings WHERE id = ?`, id)
}

func one(tx *store.Tx, query string, args ...any) (Finding, error) {
	f, err := scan(tx.QueryRow(query, args...))
	if errors.Is(err, sql.ErrNoRows) {
		return f, fmt.Errorf("%w: %v; `countersign finding list --status all` shows them", ErrUnknown, args[len(args)-1])
	}
	return f, cmp.Or(err, f.Unreadable)
}

func scan(row store.Row) (Finding, error) {
	var c Finding // the columns
	var body string
	var first, last int64
	if err := row.Scan(&c.ID, &c.Detector, &c.Cause, &c.Severity, &c.Lease, &c.Host, &c.Scope, &c.Account, &c.Status, &c.Opened, &first, &last, &c.Count, &body); err != nil {
		return c, err
	}
	c.First, c.Last = store.Time(first), store.Time(last)
	f := c
	if err := json.Unmarshal([]byte(body), &f); err != nil {
		c.Unreadable = fmt.Errorf("%w: %s: %w", ErrUnreadable, c.ID, err)
		return c, nil
	}
	return f, nil
}

// A Filter selects findings; empty fields select all.
type Filter struct {
	Status   Status
	Detector string
	Host     string // id
	Severity Severity
	Newest   bool  // the last opened first; else the first
	After    int64 // behind the one with this Opened, in that order; 0: from the beginning
	Limit    int
}

// query is f in SQL.
func (f Filter) query() (string, []any) {
	where, args := []string{`opened > ?`}, []any{f.After}
	order := `opened`
	if f.Newest {
		order = `opened DESC`
		if where[0], args[0] = `opened < ?`, f.After; f.After == 0 {
			args[0] = int64(math.MaxInt64)
		}
	}
	for _, c := range []struct{ column, value string }{
		{"status", string(f.Status)}, {"detector", f.Detector}, {"host_id", f.Host}, {"severity", string(f.Severity)},
	} {
		if c.value != "" {
			where, args = append(where, c.column+` = ?`), append(args, c.value)
		}
	}
	return `SELECT ` + columns + ` FROM findings WHERE ` + strings.Join(where, ` AND `) + ` ORDER BY ` + order + ` LIMIT ?`, append(args, f.Limit)
}

// List reads findings in the order of opening, those that are unreadable among them.
func List(tx *store.Tx, f Filter) ([]Finding, error) {
	query, args := f.query()
	return store.Collect(tx, scan, query, args...)
}

const riskQuery = `SELECT DISTINCT scope, severity FROM findings WHERE host_id = ? AND status = ?`

// OfHost is the risk that a host's open findings make.
func OfHost(tx *store.Tx, host string) (Risk, error) {
	r := Risk{}
	err := tx.Each(func(row store.Row) error {
		var scope string
		var s Severity
		err := row.Scan(&scope, &s)
		r[scope] = max(r[scope], risks[s])
		return err
	}, riskQuery, host, string(Open))
	return r, err
}
