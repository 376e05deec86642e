package sightings

import (
	"bytes"
	"encoding/json"
	"fmt"
)

// maxRecord bounds a record that takes several lines.
const maxRecord = 1 << 20

// PostgresCSV reads csvlog, of PostgreSQL 9.0 and later.
type PostgresCSV struct {
	postgres
	begin   int64 // line at which the record began; 0: none is open
	text    []byte
	quoted  bool // the record goes on in the next line
	tooLong bool
	columns [][]byte
}

// Columns of csvlog. Later versions have more behind them.
const (
	csvTime = iota
	csvUser
	csvDatabase
	csvPID
	csvFrom
	csvSession
	csvSeverity = 11
	csvMessage  = 13
	csvProgram  = 22
	csvColumns  = 23
)

// NewPostgresCSV makes a reader.
func NewPostgresCSV(source string) *PostgresCSV {
	return &PostgresCSV{postgres: newPostgres(source)}
}

// Save is what Restore takes.
func (p *PostgresCSV) Save() ([]byte, error) {
	s := p.state()
	if p.quoted {
		s.Record = p.begin
	}
	return json.Marshal(s)
}

// Restore goes on from where Save was called.
func (p *PostgresCSV) Restore(b []byte) error {
	var s pgState
	if err := json.Unmarshal(b, &s); err != nil {
		return err
	}
	p.restore(s)
	// What there was of an open record isn't kept: it is a statement's, most likely.
	p.begin, p.tooLong, p.quoted = s.Record, s.Record > 0, s.Record > 0
	return nil
}

// Rest counts the quotation marks of a line that was too long to be given whole:
// what follows is in a record or isn't, and who writes long statements would choose.
func (p *PostgresCSV) Rest(part []byte) {
	if bytes.Count(part, []byte{'"'})%2 == 1 {
		p.quoted, p.tooLong = !p.quoted, true
	}
}

// Line takes one line, which may be part of a record.
func (p *PostgresCSV) Line(number int64, line []byte, emit func(Sighting)) {
	p.health.Lines++
	if number == 1 {
		p.quoted = false // a file begins with a record
	}
	if !p.quoted {
		if len(line) == 0 {
			return
		}
		if _, ok := p.time(before(line, ',')); !ok {
			p.health.unreadable(fmt.Sprintf("line %d of %d bytes doesn't begin with a time", number, len(line)))
			return
		}
		p.begin, p.text, p.tooLong = number, p.text[:0], false
	} else if !p.tooLong {
		p.text = append(p.text, '\n')
	}
	if bytes.Count(line, []byte{'"'})%2 == 1 {
		p.quoted = !p.quoted
	}
	if len(p.text)+len(line) > maxRecord {
		p.tooLong = true
	}
	if !p.tooLong {
		p.text = append(p.text, line...)
	}
	if p.quoted {
		return
	}
	if p.tooLong {
		p.health.unreadable(fmt.Sprintf("the record at line %d is longer than %d bytes", p.begin, maxRecord))
		return
	}
	p.whole(emit)
}

func before(b []byte, mark byte) []byte {
	if i := bytes.IndexByte(b, mark); i >= 0 {
		return b[:i]
	}
	return b
}

func (p *PostgresCSV) whole(emit func(Sighting)) {
	p.columns = split(p.text, p.columns[:0])
	if len(p.columns) < csvColumns {
		p.health.unreadable(fmt.Sprintf("the record at line %d has %d columns; csvlog has %d or more", p.begin, len(p.columns), csvColumns))
		return
	}
	c := p.columns
	t, ok := p.time(c[csvTime])
	if !ok {
		p.health.unreadable(fmt.Sprintf("the record at line %d doesn't begin with a time", p.begin))
		return
	}
	from := c[csvFrom]
	if i := bytes.LastIndexByte(from, ':'); i >= 0 && !bytes.Equal(from, []byte("[local]")) {
		from = from[:i]
	}
	p.record(&pgRecord{time: t, line: p.begin, session: string(c[csvPID]) + "/" + string(c[csvSession]), user: known(c[csvUser]), database: known(c[csvDatabase]),
		from: from, program: known(c[csvProgram]), severity: c[csvSeverity], message: c[csvMessage]}, emit)
}

// split takes a record apart. The columns are parts of it, or copies where a
// quotation mark was doubled.
func split(record []byte, columns [][]byte) [][]byte {
	for {
		if len(record) == 0 || record[0] != '"' {
			column, rest, more := bytes.Cut(record, []byte{','})
			columns = append(columns, column)
			if !more {
				return columns
			}
			record = rest
			continue
		}
		record = record[1:]
		end := 0
		doubled := false
		for {
			i := bytes.IndexByte(record[end:], '"')
			if i < 0 {
				return append(columns, record)
			}
			end += i
			if end+1 < len(record) && record[end+1] == '"' {
				doubled = true
				end += 2
				continue
			}
			break
		}
		column := record[:end]
		if doubled {
			column = bytes.ReplaceAll(column, []byte(`""`), []byte(`"`))
		}
		columns = append(columns, column)
		record = record[end+1:]
		if len(record) == 0 {
			return columns
		}
		record = record[1:] // the comma
	}
}
