package sightings

import (
	"bytes"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"time"
)

// prefixes are the values of log_line_prefix that are tried where none is stated:
// PostgreSQL's own, Debian's, and what log analysers ask for.
var prefixes = []string{
	"%m [%p] ",
	"%m [%p] %q%u@%d ",
	"%t [%p] ",
	"%t [%p] %q%u@%d ",
	"%t [%p]: [%l-1] user=%u,db=%d,app=%a,client=%h ",
	"%t [%p]: user=%u,db=%d,app=%a,client=%h ",
	"%m [%p] user=%u db=%d app=%a client=%h ",
	"%m [%p]: [%l-1] user=%u,db=%d,app=%a,client=%h ",
}

// PostgresStderr reads what PostgreSQL writes to its standard error.
//
// Its messages have their line breaks marked, by a tab behind each. Its prefixes have
// not: a line break in a user name or in that of a database, which anybody may send,
// begins what looks like a line of its own. So where the prefix holds names (%u, %d or
// %a), a line counts only when the next one begins as a line does, and a message only
// as a whole, for what is forged has the rest of the true line behind it, or on the
// next. That leaves little; a prefix without names, csvlog and jsonlog leave nothing.
type PostgresStderr struct {
	postgres
	prefixes []pgPrefix
	last     int     // of prefixes, the one that fitted
	held     *pgHeld // a record that waits for the next line
}

// NewPostgresStderr makes a reader of a log whose lines begin as log_line_prefix
// says; empty: as is usual. The prefix has to hold a time (%m, %t or %n) and a
// process (%p or %c).
func NewPostgresStderr(source, prefix string) (*PostgresStderr, error) {
	r := &PostgresStderr{postgres: newPostgres(source)}
	list := prefixes
	if prefix != "" {
		list = []string{prefix}
	}
	for _, text := range list {
		p, err := compilePrefix(text)
		if err != nil {
			return nil, fmt.Errorf("log_line_prefix %q: %w", text, err)
		}
		r.prefixes = append(r.prefixes, p)
	}
	return r, nil
}

// A pgPrefix is a log_line_prefix: what stands between its escapes, and the escapes.
type pgPrefix []pgPiece

type pgPiece struct {
	escape  byte // 0: none, the piece ends the prefix
	literal string
}

func compilePrefix(text string) (pgPrefix, error) {
	var p pgPrefix
	literal := ""
	for i := 0; i < len(text); i++ {
		if text[i] != '%' || i+1 == len(text) {
			literal += text[i : i+1]
			continue
		}
		i++
		for i < len(text)-1 && (text[i] == '-' || text[i] >= '0' && text[i] <= '9') {
			i++ // padding
		}
		if text[i] == '%' {
			literal += "%"
			continue
		}
		if !strings.ContainsRune("audrhpPtmnicslxvbeQqL", rune(text[i])) {
			return nil, fmt.Errorf("%%%c is no escape of PostgreSQL's", text[i])
		}
		p = append(p, pgPiece{literal: literal, escape: text[i]})
		literal = ""
	}
	p = append(p, pgPiece{literal: literal})
	for _, wanted := range []string{"mtn", "pc"} {
		if !slices.ContainsFunc(p, func(e pgPiece) bool { return e.escape != 0 && strings.IndexByte(wanted, e.escape) >= 0 }) {
			return nil, fmt.Errorf("it needs one of %%%s", strings.Join(strings.Split(wanted, ""), ", %"))
		}
	}
	for i := 1; i < len(p); i++ {
		if p[i].literal == "" && p[i-1].escape != 'q' && p[i].escape != 'q' && p[i].escape != 0 {
			return nil, fmt.Errorf("nothing stands between %%%c and %%%c", p[i-1].escape, p[i].escape)
		}
	}
	return p, nil
}

// match reads head, which is all that stands before the severity.
func (p pgPrefix) match(head []byte, log *postgres, r *pgRecord) bool {
	background := false // what follows is only there for sessions
	for i, piece := range p {
		if background && len(head) == 0 {
			return true
		}
		if !bytes.HasPrefix(head, []byte(piece.literal)) {
			return false
		}
		head = head[len(piece.literal):]
		if piece.escape == 0 {
			return len(head) == 0
		}
		if piece.escape == 'q' {
			background = true
			continue
		}
		next := p[i+1]
		end := len(head)
		switch {
		case next.escape == 0: // up to the end, whatever a name holds
			if end -= len(next.literal); end < 0 {
				return false
			}
		case next.literal != "" && piece.escape == 'a':
			end = bytes.LastIndex(head, []byte(next.literal)) // the client chose it
		case next.literal != "":
			end = bytes.Index(head, []byte(next.literal))
			if strings.IndexByte("tms", piece.escape) >= 0 && next.literal == " " {
				end = timeEnd(head)
			}
		case next.escape == 'q' && i+2 < len(p) && p[i+2].literal != "":
			if at := bytes.Index(head, []byte(p[i+2].literal)); at >= 0 {
				end = at
			}
		}
		if end < 0 {
			return false
		}
		value := head[:end]
		head = head[end:]
		switch piece.escape {
		case 'm', 't':
			var ok bool
			if r.time, ok = log.time(value); !ok {
				return false
			}
		case 'n':
			seconds, fraction, _ := bytes.Cut(value, []byte("."))
			s, ok := digits(seconds)
			ms, okFraction := digits(fraction)
			if !ok || !okFraction || len(seconds) > 11 || len(fraction) > 3 {
				return false
			}
			if r.time, ok = plausible(time.Unix(int64(s), int64(ms)*1e6)); !ok {
				return false
			}
		case 'p':
			if _, ok := digits(value); !ok || len(value) == 0 || len(value) > 10 {
				return false
			}
			r.session = string(value)
		case 'c':
			if r.session == "" {
				r.session = text(value)
			}
		case 'u':
			r.user = known(value)
		case 'd':
			r.database = known(value)
		case 'a':
			r.program = known(value)
		case 'h':
			if bytes.ContainsAny(value, " ,") {
				return false
			}
			r.from = known(value)
		case 'r':
			if host, _, ok := bytes.Cut(value, []byte("(")); ok {
				value = host
			}
			r.from = known(value)
		}
	}
	return true
}

// known is a value that PostgreSQL has: it writes [unknown] before it does.
func known(b []byte) []byte {
	if len(b) == 0 || string(b) == "[unknown]" {
		return nil
	}
	return b
}

// timeEnd is where a date, a time and a zone end: at the third space.
func timeEnd(b []byte) int {
	end := -1
	for n := 0; n < 3; n++ {
		at := bytes.IndexByte(b[end+1:], ' ')
		if at < 0 {
			return len(b)
		}
		end += at + 1
	}
	return end
}

var severities = [][]byte{[]byte("LOG:  "), []byte("FATAL:  "), []byte("ERROR:  "), []byte("WARNING:  "), []byte("NOTICE:  "), []byte("INFO:  "),
	[]byte("PANIC:  "), []byte("DETAIL:  "), []byte("HINT:  "), []byte("STATEMENT:  "), []byte("CONTEXT:  "), []byte("QUERY:  "), []byte("LOCATION:  "),
	[]byte("DEBUG1:  "), []byte("DEBUG2:  "), []byte("DEBUG3:  "), []byte("DEBUG4:  "), []byte("DEBUG5:  "), []byte("BACKTRACE:  ")}

// maxMarks is how many severities of a line are looked at: more than fit into the
// names of a prefix.
const maxMarks = 32

// Line takes one line. One that begins with a tab continues the record before.
func (p *PostgresStderr) Line(number int64, line []byte, emit func(Sighting)) {
	p.health.Lines++
	if len(line) == 0 || line[0] == '\t' {
		return
	}
	r, ok, marked := p.find(number, line)
	switch {
	case !ok && p.begins(line):
		// A line break in its prefix: what follows is the rest of it.
		p.health.unreadable(fmt.Sprintf("line %d of %d bytes ends in its log_line_prefix", number, len(line)))
		p.take(emit)
		return
	case !ok:
		p.health.unreadable(fmt.Sprintf("line %d of %d bytes doesn't begin as log_line_prefix says", number, len(line)))
		// What PostgreSQL's children write comes between, as it is. The rest of a
		// line of its own has that line's severity.
		if marked && p.held != nil {
			p.health.Unreadable++
			p.held = nil
		}
		return
	}
	p.take(emit)
	if p.prefixes[p.last].names() {
		p.held = hold(&r)
		return
	}
	p.record(&r, emit)
}

// take takes the record that waited.
func (p *PostgresStderr) take(emit func(Sighting)) {
	if p.held != nil {
		p.record(p.held.record(), emit)
		p.held = nil
	}
}

// Flush gives what waits.
func (p *PostgresStderr) Flush(emit func(Sighting)) {
	p.take(emit)
	p.postgres.Flush(emit)
}

// Save is what Restore takes.
func (p *PostgresStderr) Save() ([]byte, error) {
	s := p.state()
	s.Held = p.held
	return json.Marshal(s)
}

// Restore goes on from where Save was called.
func (p *PostgresStderr) Restore(b []byte) error {
	var s pgState
	if err := json.Unmarshal(b, &s); err != nil {
		return err
	}
	p.restore(s)
	p.held = s.Held
	return nil
}

// begins says whether a line begins with a time, as its prefix wants it.
func (p *PostgresStderr) begins(line []byte) bool {
	if p.prefixes[p.last][0].literal != "" {
		return false
	}
	_, ok := p.time(line[:timeEnd(line)])
	return ok
}

// names says whether a prefix holds what others chose.
func (p pgPrefix) names() bool {
	return slices.ContainsFunc(p, func(e pgPiece) bool { return e.escape == 'u' || e.escape == 'd' || e.escape == 'a' })
}

// find reads a line. The text of a severity can stand in a name, too: that the whole
// of a prefix stands before it tells. Of several such places the first is meant,
// except where only another makes a login whose names are the prefix's own. Marked
// says that there was one, whatever stands before it.
func (p *PostgresStderr) find(number int64, line []byte) (found pgRecord, ok, marked bool) {
	from := 0
	for marks := 0; marks < maxMarks; {
		at := bytes.Index(line[from:], []byte(":  "))
		if at < 0 {
			break
		}
		at += from
		from = at + 3
		word := at
		for word > 0 && (line[word-1] >= 'A' && line[word-1] <= 'Z' || line[word-1] >= '0' && line[word-1] <= '9') {
			word--
		}
		if !slices.ContainsFunc(severities, func(s []byte) bool { return bytes.Equal(s, line[word:from]) }) {
			continue
		}
		marks++
		marked = true
		r, fits := p.prefixed(line[:word])
		if !fits {
			continue
		}
		r.line, r.severity, r.message = number, line[word:at], line[from:]
		if !ok {
			found, ok = r, true
		}
		if bytes.HasPrefix(r.message, pgAuthorized) && r.user != nil && after(r.message[len(pgAuthorized):], r.user) != nil {
			return r, true, true
		}
	}
	return found, ok, marked
}

func (p *PostgresStderr) prefixed(head []byte) (r pgRecord, ok bool) {
	for i := range p.prefixes {
		at := (p.last + i) % len(p.prefixes)
		if r = (pgRecord{}); p.prefixes[at].match(head, &p.postgres, &r) {
			p.last = at
			return r, true
		}
	}
	return r, false
}
