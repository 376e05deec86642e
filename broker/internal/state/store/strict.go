package store

import (
	"database/sql"
	"errors"
	"fmt"

	"modernc.org/sqlite"
)

// strictness holds what an update changes against what it named. It is commitLoop's.
type strictness struct {
	conn    any // on which the hook is
	changed []row
	err     error // of the hook
}

// keys say of which topic the rows of a table are, and in which column a host's or a
// lease's id is; -1 where the topic's rows aren't named singly. What each change may
// append to, the audit log, isn't here, nor what the store itself keeps.
var keys = map[string]struct {
	topic  Topic
	column int
}{
	"hosts": {Hosts, 0}, "host_eks": {Hosts, 1}, "decisions": {Hosts, 0}, "repeats": {Hosts, 0}, "grants": {Leases, 0},
	"findings": {Findings, -1}, "canaries": {Canaries, -1}, "policies": {Scopes, -1}, "operators": {Operators, -1}, "join_tokens": {Tokens, -1},
	"reference_sets": {References, -1}, "reference_maintenance": {References, -1}, "releases": {References, -1},
	"ca_values": {Values, -1}, "meta": {Broker, -1},
}

// begin forgets what was changed before.
func (s *strictness) begin(conn *sql.Conn) error {
	s.changed, s.err = nil, nil
	return conn.Raw(func(c any) error {
		if s.conn != c {
			c.(*preparing).RegisterPreUpdateHook(s.note)
			s.conn = c
		}
		return nil
	})
}

func (s *strictness) note(d sqlite.SQLitePreUpdateData) {
	key, ok := keys[d.TableName]
	if !ok {
		return
	}
	one := row{topic: key.topic}
	if key.column >= 0 {
		values := make([]any, d.Count())
		read := d.Old
		if d.Op == sqliteInsert {
			read = d.New
		}
		if err := read(values...); err != nil {
			s.err = errors.Join(s.err, err)
			return
		}
		one.id = fmt.Sprint(values[key.column])
	}
	s.changed = append(s.changed, one)
}

// sqliteInsert is SQLITE_INSERT (https://sqlite.org/c3ref/c_alter_table.html).
const sqliteInsert = 18

// check is an error unless all that was changed is named.
func (s *strictness) check(named Rows) error {
	for _, one := range s.changed {
		if !named.has(one) {
			return fmt.Errorf("store: an update changed %s %s, which it did not name", one.topic, one.id)
		}
	}
	return s.err
}
