package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"time"
)

// A pgServer is a PostgreSQL 15 with log_connections and log_disconnections, and
// Debian's log_line_prefix.
type pgServer struct {
	kind, file string
	offset     time.Duration // of its clock
	zone       *time.Location
	tls        bool
	scram      bool // or trust
	sessions   []*session
	junk       []byte // the whole of it, where nothing else was written
}

func (w *world) newPostgres(kind string) *pgServer {
	s := &pgServer{kind: kind, offset: w.clock(), zone: time.UTC, tls: w.chance(40), scram: w.chance(80)}
	s.file = fmt.Sprintf("db%d.%s", len(w.logs), strings.TrimPrefix(kind, "postgres-"))
	if w.chance(15) {
		s.zone = time.FixedZone("-03", -3*3600)
	}
	w.logs = append(w.logs, s)
	return s
}

func (s *pgServer) source() source { return source{s.kind, s.file} }

// A session is one connection.
type session struct {
	at        time.Time
	user, db  string
	from      string // address, or [local]
	program   string
	before    bool // it began before the log did
	open      bool // and doesn't end in it
	long      time.Duration
	failure   string        // FATAL, with its SQLSTATE first; "auth " before it where no password was right
	statement string        // one that fails
	slow      time.Duration // to say its password
	forges    *session      // whose "connection received" its user name and database imitate
	claims    string        // the address that it puts there
	pid, port int
}

// forge makes of a session's names the beginning of a log line: PostgreSQL takes 63
// bytes of each, newlines too, and writes them into its prefix as they are.
func (p *pgServer) forge(s *session) {
	at := s.at.Add(p.offset).In(p.zone).Format(pgTime)
	s.user = cut(fmt.Sprintf("e\n%s [%d] [unknown]", at, s.forges.pid))
	s.db = cut("[unknown] LOG:  connection received: host=" + s.claims + " port=1")
	s.failure = p.noSuch(s.user)
}

func cut(name string) string { return name[:min(len(name), 63)] }

// noSuch is how a server refuses a user that it doesn't know.
func (p *pgServer) noSuch(user string) string {
	if p.scram {
		return fmt.Sprintf(`auth 28P01 password authentication failed for user "%s"`, user)
	}
	return fmt.Sprintf(`28000 role "%s" does not exist`, user)
}

// A pgLine is one message.
type pgLine struct {
	at                               time.Time
	s                                *session
	n                                int // of the session's lines
	status, level, state             string
	message, detail, statement, name string // name: application_name, once it is set
	known                            bool   // user and database are
}

// lines are a session's messages.
func (p *pgServer) lines(w *world, s *session) []pgLine {
	var out []pgLine
	at := s.at
	add := func(after time.Duration, l pgLine) {
		at = at.Add(after)
		l.at, l.s, l.n = at, s, len(out)+1
		out = append(out, l)
	}
	ms := func(most int) time.Duration { return time.Duration(1+w.rng.IntN(most)) * time.Millisecond }
	host := "host=" + s.from
	if s.from != "[local]" {
		host += fmt.Sprintf(" port=%d", s.port)
	}
	if !s.before {
		add(0, pgLine{level: "LOG", state: "00000", message: "connection received: " + host})
		at = at.Add(s.slow)
		failure, auth := strings.CutPrefix(s.failure, "auth ")
		fatal := pgLine{level: "FATAL", status: "startup", known: true}
		fatal.state, fatal.message, _ = strings.Cut(failure, " ")
		if auth {
			fatal.status, fatal.detail = "authentication", `Connection matched pg_hba.conf line 97: "host    all             all             0.0.0.0/0               scram-sha-256"`
			add(ms(80), fatal)
			return out
		}
		if p.scram && s.from != "[local]" && !strings.HasPrefix(failure, "28000") { // a role that isn't there comes as far only under trust
			add(ms(60), pgLine{level: "LOG", state: "00000", status: "authentication", known: true,
				message: fmt.Sprintf(`connection authenticated: identity="%s" method=scram-sha-256 (/etc/postgresql/15/main/pg_hba.conf:97)`, s.user)})
		}
		m := fmt.Sprintf("connection authorized: user=%s database=%s", s.user, s.db)
		if s.program != "" {
			m += " application_name=" + s.program
		}
		if p.tls && s.from != "[local]" {
			m += " SSL enabled (protocol=TLSv1.3, cipher=TLS_AES_256_GCM_SHA384, bits=256)"
		}
		add(ms(3)-time.Millisecond, pgLine{level: "LOG", state: "00000", status: "authentication", known: true, message: m})
		if s.failure != "" {
			add(ms(4)-time.Millisecond, fatal)
			return out
		}
		if s.statement != "" {
			add(ms(300), pgLine{level: "ERROR", state: "42P01", status: "SELECT", known: true, name: s.program,
				message: `relation "nope" does not exist`, statement: s.statement})
		}
	}
	if !s.open {
		end := s.at.Add(s.long)
		if end.After(at) {
			at = end
		}
		d := at.Sub(s.at)
		add(0, pgLine{level: "LOG", state: "00000", status: "idle", known: true, name: s.program, message: fmt.Sprintf(
			"disconnection: session time: %d:%02d:%06.3f user=%s database=%s %s", int(d.Hours()), int(d.Minutes())%60, d.Seconds()-60*float64(int(d.Minutes())), s.user, s.db, host)})
	}
	return out
}

// render gives pids as a kernel does, one after the other and round again, none to
// two sessions at once, and writes all messages in the order of their times.
func (p *pgServer) render(w *world) []byte {
	if p.junk != nil {
		return p.junk
	}
	slices.SortStableFunc(p.sessions, func(a, b *session) int { return a.at.Compare(b.at) })
	var all []pgLine
	ends := map[int]time.Time{}
	pid := 1000 + w.rng.IntN(20000)
	for _, s := range p.sessions {
		for {
			if pid += 1 + w.rng.IntN(9); pid > 32768 {
				pid = 300 + w.rng.IntN(100)
			}
			if !s.at.Before(ends[pid]) {
				break
			}
		}
		s.pid, s.port = pid, 32768+w.rng.IntN(28000)
		ends[pid] = s.at.Add(s.long + time.Second)
		if s.open {
			ends[pid] = w.end.Add(time.Hour)
		}
		if s.failure != "" {
			ends[pid] = s.at.Add(s.slow + time.Second)
		}
	}
	for _, s := range p.sessions {
		if s.forges != nil {
			p.forge(s)
		}
		all = append(all, p.lines(w, s)...)
	}
	slices.SortStableFunc(all, func(a, b pgLine) int { return a.at.Compare(b.at) })
	var out bytes.Buffer
	for _, l := range all {
		if l.at.Before(w.start) || l.at.After(w.end) {
			continue
		}
		p.format(w, &out, l)
	}
	return out.Bytes()
}

const pgTime = "2006-01-02 15:04:05.000 MST"

func (p *pgServer) format(w *world, out *bytes.Buffer, l pgLine) {
	at, began := l.at.Add(p.offset).In(p.zone), l.s.at.Add(p.offset).In(p.zone)
	stamp, start := at.Format(pgTime), began.Format("2006-01-02 15:04:05 MST")
	id := fmt.Sprintf("%x.%x", began.Unix(), l.s.pid)
	backend := "client backend"
	user, db := l.s.user, l.s.db
	if !l.known {
		user, db, backend = "", "", "not initialized"
	}
	switch p.kind {
	case "postgres-stderr":
		if !l.known {
			user, db = "[unknown]", "[unknown]"
		}
		prefix := fmt.Sprintf("%s [%d] %s@%s ", stamp, l.s.pid, user, db)
		tabs := func(s string) string { return strings.ReplaceAll(s, "\n", "\n\t") }
		fmt.Fprintf(out, "%s%s:  %s\n", prefix, l.level, tabs(l.message))
		if l.detail != "" {
			fmt.Fprintf(out, "%sDETAIL:  %s\n", prefix, tabs(l.detail))
		}
		if l.statement != "" {
			fmt.Fprintf(out, "%sSTATEMENT:  %s\n", prefix, tabs(l.statement))
		}
		if w.rng.IntN(400) == 0 {
			out.WriteString("cp: cannot stat 'pg_wal/000000010000000000000042': No such file or directory\n")
		}
	case "postgres-csv":
		q := func(s string) string {
			if s == "" {
				return ""
			}
			return `"` + strings.ReplaceAll(s, `"`, `""`) + `"`
		}
		from := l.s.from
		if from != "[local]" {
			from += fmt.Sprintf(":%d", l.s.port)
		}
		fmt.Fprintf(out, `%s,%s,%s,%d,"%s",%s,%d,"%s",%s,%s,0,%s,%s,%s,%s,,,,,%s,,,"%s","%s",,0`+"\n", stamp, q(user), q(db), l.s.pid, from, id, l.n,
			l.status, start, pick(w, "", "3/17"), l.level, l.state, q(l.message), q(l.detail), q(l.statement), strings.ReplaceAll(l.name, `"`, `""`), backend)
	case "postgres-json":
		type line struct {
			Timestamp   string `json:"timestamp"`
			User        string `json:"user,omitempty"`
			DB          string `json:"dbname,omitempty"`
			PID         int    `json:"pid"`
			RemoteHost  string `json:"remote_host"`
			RemotePort  int    `json:"remote_port,omitempty"`
			SessionID   string `json:"session_id"`
			LineNum     int    `json:"line_num"`
			PS          string `json:"ps"`
			Start       string `json:"session_start"`
			TxID        int    `json:"txid"`
			Severity    string `json:"error_severity"`
			State       string `json:"state_code,omitempty"`
			Message     string `json:"message"`
			Detail      string `json:"detail,omitempty"`
			Statement   string `json:"statement,omitempty"`
			Application string `json:"application_name,omitempty"`
			Backend     string `json:"backend_type"`
			Query       int    `json:"query_id"`
		}
		j := line{stamp, user, db, l.s.pid, l.s.from, l.s.port, id, l.n, l.status, start, 0, l.level, strings.TrimPrefix(l.state, "00000"), l.message, l.detail, l.statement, l.name, backend, 0}
		if l.s.from == "[local]" {
			j.RemotePort = 0
		}
		e := json.NewEncoder(out)
		e.SetEscapeHTML(false)
		_ = e.Encode(j) // a bytes.Buffer takes it all
	}
}
