package sightings

import (
	"bytes"
	"encoding/json"
	"net/netip"
	"slices"
	"strings"
	"time"
)

// settle is how long after "connection authorized" PostgreSQL may still turn a
// client away: it says so before it looks whether role and database exist.
const settle = 2 * time.Second

// maxSessions bounds the sessions that are followed; the oldest is forgotten.
const maxSessions = 1 << 15

// A pgRecord is one record of PostgreSQL's log, whatever its form.
type pgRecord struct {
	time           time.Time
	line           int64
	session        string // pid, or pid and start
	user, database []byte // by the record's own fields; nil where it has none
	from           []byte // host, "[local]" or nothing, by the record's own field
	program        []byte
	severity       []byte
	message        []byte
}

// postgres follows sessions through the records of one log. What it looks for is
// the same in all of PostgreSQL's forms:
//
//	connection received: host=10.0.0.7 port=40112
//	connection authorized: user=app database=billing application_name=billingd
//	FATAL:  role "app" does not exist
//	disconnection: session time: 0:00:01.042 user=app database=billing host=10.0.0.7 port=40112
type postgres struct {
	source   string
	health   Health
	sessions map[string]*pgSession
	order    []begun  // oldest first; may name ended ones
	waiting  []string // sessions whose login is not settled, oldest first

	zoneName string // of the last time that was read
	location *time.Location
}

type begun struct {
	name    string
	session *pgSession
}

type pgSession struct {
	From  netip.Addr `json:"from,omitzero"`
	Local bool       `json:"local,omitempty"`
	Login *Sighting  `json:"login,omitempty"` // authorized, and waiting for what comes next
	Known bool       `json:"known,omitempty"` // was seen at work
}

// A pgState is what a reader of PostgreSQL's log goes on from.
type pgState struct {
	Health   Health                `json:"health"`
	Sessions map[string]*pgSession `json:"sessions,omitempty"`
	Waiting  []string              `json:"waiting,omitempty"`
	Record   int64                 `json:"record,omitempty"` // of csvlog: where a record began whose rest is to come
	Held     *pgHeld               `json:"held,omitempty"`   // a record of stderr that waits for the next line
}

// A pgHeld is what is kept of a record: names, and of its message no more than the
// reader looks for, since messages hold statements, and those hold passwords.
type pgHeld struct {
	Time     time.Time `json:"time"`
	Line     int64     `json:"line"`
	Session  string    `json:"session"`
	User     []byte    `json:"user,omitempty"`
	Database []byte    `json:"database,omitempty"`
	From     []byte    `json:"from,omitempty"`
	Program  []byte    `json:"program,omitempty"`
	Severity string    `json:"severity"`
	Message  []byte    `json:"message,omitempty"`
}

func hold(r *pgRecord) *pgHeld {
	h := &pgHeld{Time: r.time, Line: r.line, Session: r.session, User: slices.Clone(r.user), Database: slices.Clone(r.database), From: slices.Clone(r.from),
		Program: slices.Clone(r.program), Severity: string(r.severity)}
	if h.Severity == "FATAL" || slices.ContainsFunc([][]byte{pgReceived, pgAuthorized, pgReplicator, pgEnded}, func(begin []byte) bool { return bytes.HasPrefix(r.message, begin) }) {
		h.Message = slices.Clone(r.message[:min(len(r.message), 4*maxText)])
	}
	return h
}

func (h *pgHeld) record() *pgRecord {
	return &pgRecord{time: h.Time, line: h.Line, session: h.Session, user: h.User, database: h.Database, from: h.From, program: h.Program,
		severity: []byte(h.Severity), message: h.Message}
}

// Save is what Restore takes.
func (p *postgres) Save() ([]byte, error) { return json.Marshal(p.state()) }

func (p *postgres) state() pgState {
	return pgState{Health: p.health, Sessions: p.sessions, Waiting: p.waiting}
}

// Restore goes on from where Save was called.
func (p *postgres) Restore(b []byte) error {
	var s pgState
	if err := json.Unmarshal(b, &s); err != nil {
		return err
	}
	p.restore(s)
	return nil
}

func (p *postgres) restore(s pgState) {
	p.health, p.waiting = s.Health, s.Waiting
	for name, session := range s.Sessions {
		p.sessions[name] = session
		p.order = append(p.order, begun{name, session})
	}
}

func newPostgres(source string) postgres {
	return postgres{source: source, sessions: map[string]*pgSession{}}
}

// Rest is of no use: no record that is looked for is so long.
func (p *postgres) Rest([]byte) {}

// Health is how the log could be read.
func (p *postgres) Health() Health { return p.health }

var (
	pgReceived   = []byte("connection received: host=")
	pgAuthorized = []byte("connection authorized: user=")
	pgReplicator = []byte("replication connection authorized: user=")
	pgEnded      = []byte("disconnection: session time: ")
	pgTerminated = []byte("terminating connection")
	pgDatabase   = []byte(" database=")
	pgProgram    = []byte(" application_name=")
	pgEncrypted  = []byte(" SSL enabled (")
	pgKerberos   = []byte(" GSS (")

	// pgTurnedAway is what PostgreSQL says to a client whom it let in, before the
	// client can do anything. Whatever else ends a session, it had begun.
	pgTurnedAway = []string{"role \"", "database \"", "permission denied for database", "too many connections for", "sorry, too many clients already",
		"remaining connection slots are reserved", "the database system is", "cannot connect to template", "parameter \"", "unrecognized configuration parameter",
		"invalid value for parameter", "permission denied to set parameter", "must be superuser to connect", "must be superuser or replication", "number of requested standby connections"}
)

func (p *postgres) record(r *pgRecord, emit func(Sighting)) {
	p.health.saw(r.time)
	p.settled(r.time.Add(-settle), emit)
	switch string(r.severity) {
	case "DETAIL", "HINT", "CONTEXT", "STATEMENT", "QUERY", "LOCATION", "BACKTRACE":
		return // more of the record before
	}
	switch {
	case bytes.HasPrefix(r.message, pgReceived):
		p.succeeded(r.session, emit)
		host, rest, _ := bytes.Cut(r.message[len(pgReceived):], []byte(" "))
		port, found := bytes.CutPrefix(rest, []byte("port="))
		if _, ok := digits(port); len(rest) > 0 && (!found || !ok) {
			p.health.unreadable("a connection with more behind its port")
			return
		}
		s := p.begin(r.session)
		s.From, s.Local = pgHost(host)
		s.Known = true // its login is what counts
		return
	case bytes.HasPrefix(r.message, pgAuthorized), bytes.HasPrefix(r.message, pgReplicator):
		p.succeeded(r.session, emit)
		p.authorized(r)
		return
	}
	s := p.sessions[r.session]
	if string(r.severity) == "FATAL" && !bytes.HasPrefix(r.message, pgTerminated) {
		p.refused(r, s, emit)
		return
	}
	if s != nil && s.Login != nil {
		emit(*s.Login)
		s.Login = nil
	}
	if bytes.HasPrefix(r.message, pgEnded) {
		delete(p.sessions, r.session)
	}
	if (s == nil || !s.Known) && len(r.user) > 0 {
		// A session from before the log, or the reader, began.
		if s == nil {
			s = p.begin(r.session)
			s.From, s.Local = pgHost(r.from)
		}
		s.Known = true
		emit(Sighting{Time: r.time, Kind: Session, Source: p.source, Line: r.line, Account: text(r.user), Target: text(r.database),
			From: s.From, Local: s.Local, Program: text(r.program)})
		if bytes.HasPrefix(r.message, pgEnded) {
			delete(p.sessions, r.session)
		}
	}
}

// succeeded gives the login that waits under a session's name when another session begins
// under it, as process ids come again: nobody turned it away.
func (p *postgres) succeeded(session string, emit func(Sighting)) {
	if s := p.sessions[session]; s != nil && s.Login != nil {
		emit(*s.Login)
		s.Login = nil
	}
}

// authorized takes the message's user and database where the record's own fields
// say the same, or has none.
func (p *postgres) authorized(r *pgRecord) {
	_, rest, _ := bytes.Cut(r.message, []byte("user="))
	user, database, program := r.user, r.database, r.program
	if user != nil {
		if rest = after(rest, user); rest == nil {
			p.health.unreadable("a login whose user isn't the record's")
			return
		}
	} else {
		user, rest = upTo(rest, pgDatabase, pgProgram, pgEncrypted, pgKerberos)
	}
	if behind, ok := bytes.CutPrefix(rest, pgDatabase); ok {
		if database == nil {
			database, rest = upTo(behind, pgProgram, pgEncrypted, pgKerberos)
		} else if rest = after(behind, database); rest == nil {
			p.health.unreadable("a login whose database isn't the record's")
			return
		}
	} else if bytes.HasPrefix(r.message, pgAuthorized) {
		p.health.unreadable("a login without a database")
		return
	}
	if behind, ok := bytes.CutPrefix(rest, pgProgram); ok {
		program = behind
		for _, tail := range [][]byte{pgEncrypted, pgKerberos} {
			if i := bytes.LastIndex(program, tail); i >= 0 {
				program = program[:i]
			}
		}
	} else if len(rest) > 0 && !bytes.HasPrefix(rest, pgEncrypted) && !bytes.HasPrefix(rest, pgKerberos) {
		p.health.unreadable("a login with more behind its database")
		return
	}
	s := p.sessions[r.session]
	if s == nil {
		s = p.begin(r.session)
		s.From, s.Local = pgHost(r.from)
	}
	s.Known = true
	s.Login = &Sighting{Time: r.time, Kind: Login, Source: p.source, Line: r.line, Account: text(user), Target: text(database),
		From: s.From, Local: s.Local, Program: text(program)}
	p.waiting = append(p.waiting, r.session)
}

// upTo divides text before the first of the marks that is in it.
func upTo(text []byte, marks ...[]byte) (before, rest []byte) {
	end := len(text)
	for _, m := range marks {
		if i := bytes.Index(text[:end], m); i >= 0 {
			end = i
		}
	}
	return text[:end], text[end:]
}

// after is text behind word, which has to end there or at a space; nil otherwise.
func after(text, word []byte) []byte {
	if !bytes.HasPrefix(text, word) || len(text) > len(word) && text[len(word)] != ' ' {
		return nil
	}
	return text[len(word):]
}

// refused is a session that PostgreSQL ended before it began to work.
func (p *postgres) refused(r *pgRecord, s *pgSession, emit func(Sighting)) {
	if s == nil {
		s = p.begin(r.session)
		s.From, s.Local = pgHost(r.from)
	}
	seen := Sighting{Time: r.time, Kind: Attempt, Source: p.source, Line: r.line, Account: text(r.user), Target: text(r.database),
		From: s.From, Local: s.Local, Program: text(r.program)}
	if s.Login != nil {
		if r.user != nil && text(r.user) != s.Login.Account || !slices.ContainsFunc(pgTurnedAway, func(words string) bool { return bytes.HasPrefix(r.message, []byte(words)) }) {
			emit(*s.Login)
			s.Login = nil
			return
		}
		seen.Account, seen.Target, seen.Program = s.Login.Account, s.Login.Target, s.Login.Program
		s.Login = nil
	}
	s.Known = true // and was not at work, whatever else is said of it
	if seen.Account == "" {
		seen.Account = quoted(r.message)
	}
	if seen.Account != "" {
		emit(seen)
	}
}

// quoted is the text between a message's first and last quotation marks, as in
// `password authentication failed for user "app"`.
func quoted(message []byte) string {
	// no pg_hba.conf entry for host "10.0.0.7", user "app", database "billing", no encryption
	if _, user, ok := bytes.Cut(message, []byte(`, user "`)); ok {
		if end := bytes.Index(user, []byte(`", database "`)); end >= 0 {
			return text(user[:end])
		}
	}
	first, last := bytes.IndexByte(message, '"'), bytes.LastIndexByte(message, '"')
	if first < 0 || last <= first {
		return ""
	}
	return text(message[first+1 : last])
}

// settled gives the logins that nobody turned away until then. Where the log's clock was
// set back, those of before don't wait for it to come there again.
func (p *postgres) settled(until time.Time, emit func(Sighting)) {
	for len(p.waiting) > 0 {
		s := p.sessions[p.waiting[0]]
		if s != nil && s.Login != nil {
			if t := s.Login.Time; t.After(until) && !t.After(until.Add(2*settle)) {
				return
			}
			emit(*s.Login)
			s.Login = nil
		}
		p.waiting = p.waiting[1:]
	}
}

// Flush gives the logins that wait.
func (p *postgres) Flush(emit func(Sighting)) {
	p.settled(p.health.Last, emit)
}

// begin makes room for a session, and forgets the oldest where there are too many.
func (p *postgres) begin(session string) *pgSession {
	s := &pgSession{}
	p.sessions[session] = s
	p.order = append(p.order, begun{session, s})
	for len(p.order) > maxSessions {
		if old := p.order[0]; p.sessions[old.name] == old.session && old.session.Login == nil {
			delete(p.sessions, old.name)
		}
		p.order = p.order[1:]
	}
	return s
}

// pgHost reads a client's address. A name, which PostgreSQL writes where
// log_hostname is on, is none.
func pgHost(b []byte) (a netip.Addr, local bool) {
	if len(b) == 0 || len(b) > 64 {
		return a, false
	}
	if string(b) == "[local]" {
		return a, true
	}
	a, err := netip.ParseAddr(string(b))
	if err != nil {
		return netip.Addr{}, false
	}
	return a.Unmap().WithZone(""), false
}

// time reads a time as PostgreSQL writes it: "2026-11-22 03:04:05.678 UTC". A
// zone is UTC, an offset, or a name that the machine's time zone table knows.
func (p *postgres) time(b []byte) (time.Time, bool) {
	const stamp = len("2026-11-22 03:04:05")
	if len(b) < stamp {
		return time.Time{}, false
	}
	year, ok1 := digits(b[0:4])
	month, ok2 := digits(b[5:7])
	day, ok3 := digits(b[8:10])
	hour, ok4 := digits(b[11:13])
	minute, ok5 := digits(b[14:16])
	second, ok6 := digits(b[17:19])
	if !ok1 || !ok2 || !ok3 || !ok4 || !ok5 || !ok6 || b[4] != '-' || b[7] != '-' || (b[10] != ' ' && b[10] != 'T') || b[13] != ':' || b[16] != ':' ||
		month < 1 || month > 12 || day < 1 || day > 31 || hour > 23 || minute > 59 || second > 60 {
		return time.Time{}, false
	}
	rest, nano := b[stamp:], 0
	if len(rest) > 1 && rest[0] == '.' {
		rest = rest[1:]
		for scale := 100_000_000; len(rest) > 0 && rest[0] >= '0' && rest[0] <= '9'; scale /= 10 {
			nano += int(rest[0]-'0') * scale
			rest = rest[1:]
		}
	}
	zone, ok := p.zone(bytes.TrimSpace(rest))
	if !ok {
		p.health.Sample = "a time in a zone that isn't known here: log_timezone = 'UTC' is read everywhere"
		return time.Time{}, false
	}
	return plausible(time.Date(year, time.Month(month), day, hour, minute, second, nano, zone))
}

func digits(b []byte) (n int, ok bool) {
	for _, c := range b {
		if c < '0' || c > '9' {
			return 0, false
		}
		n = n*10 + int(c-'0')
	}
	return n, true
}

// zone remembers the last one: a log has one, or two in a year.
func (p *postgres) zone(b []byte) (*time.Location, bool) {
	if string(b) == p.zoneName && p.location != nil {
		return p.location, true
	}
	zone, ok := zone(b)
	if ok {
		p.zoneName, p.location = string(b), zone
	}
	return zone, ok
}

func zone(b []byte) (*time.Location, bool) {
	switch string(b) {
	case "", "UTC", "GMT", "Z", "Etc/UTC":
		return time.UTC, true
	}
	if b[0] == '+' || b[0] == '-' {
		figures := strings.ReplaceAll(string(b[1:]), ":", "")
		n, ok := digits([]byte(figures))
		if !ok || len(figures) != 2 && len(figures) != 4 {
			return nil, false
		}
		if len(figures) == 2 {
			n *= 100
		}
		if n/100 > 15 || n%100 > 59 {
			return nil, false
		}
		offset := n/100*3600 + n%100*60
		if b[0] == '-' {
			offset = -offset
		}
		return time.FixedZone("", offset), true
	}
	if len(b) > 32 {
		return nil, false
	}
	zone, err := time.LoadLocation(string(b))
	return zone, err == nil && !strings.Contains(string(b), ".") && string(b) != "Local"
}
