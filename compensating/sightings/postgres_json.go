package sightings

import (
	"bytes"
	"fmt"

	"github.com/go-json-experiment/json/jsontext"
)

// PostgresJSON reads jsonlog, of PostgreSQL 15 and later.
type PostgresJSON struct{ postgres }

// NewPostgresJSON makes a reader.
func NewPostgresJSON(source string) *PostgresJSON {
	return &PostgresJSON{postgres: newPostgres(source)}
}

// Line takes one record.
func (p *PostgresJSON) Line(number int64, line []byte, emit func(Sighting)) {
	p.health.Lines++
	if len(bytes.TrimSpace(line)) == 0 {
		return
	}
	var r struct {
		Time     string         `json:"timestamp"`
		User     string         `json:"user"`
		Database string         `json:"dbname"`
		PID      jsontext.Value `json:"pid"`
		From     string         `json:"remote_host"`
		Session  string         `json:"session_id"`
		Severity string         `json:"error_severity"`
		Message  string         `json:"message"`
		Program  string         `json:"application_name"`
	}
	if len(line) > maxRecord || parse(line, &r) != nil {
		p.health.unreadable(fmt.Sprintf("line %d of %d bytes is no JSON of PostgreSQL's", number, len(line)))
		return
	}
	t, ok := p.time([]byte(r.Time))
	if !ok {
		p.health.unreadable(fmt.Sprintf("line %d has no time that can be read", number))
		return
	}
	p.record(&pgRecord{time: t, line: number, session: string(r.PID) + "/" + r.Session, user: known([]byte(r.User)), database: known([]byte(r.Database)),
		from: []byte(r.From), program: known([]byte(r.Program)), severity: []byte(r.Severity), message: []byte(r.Message)}, emit)
}
